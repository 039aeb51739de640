# vLLM's own OpenAI-compatible server with the d2moe plugin in it:
#   docker build -t d2moe-vllm .
#   docker run --gpus all --ipc=host -p 8000:8000 -v "$PWD/models:/models:ro" d2moe-vllm /models/mixtral-d2-40
FROM python:3.12-slim AS wheel
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY d2moe_vllm d2moe_vllm
COPY offline offline
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM vllm/vllm-openai:v0.32.0
# Nothing but our wheel: the image's torch and vLLM belong together, and hold every package we depend on.
# The call fails the build, and not the first request, should that ever stop being true.
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    uv pip install --system --no-cache --no-deps /wheels/*.whl \
    && d2moe --help >/dev/null
# The image's own `vllm` user, by number so that Kubernetes' runAsNonRoot can check it. Caches go to its home.
USER 2000:0
ENV HOME=/home/vllm
ENTRYPOINT ["vllm", "serve"]
