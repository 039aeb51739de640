"""One real server for all tests of this folder: the compressed bundled model, compiled, in float32.

Eager in the fast tier, as compiling takes as long as all these tests; there, an engine of
tests/plugin/test_offline_llm.py is traced as for compiling. And the engine's process is there its own worker: another
process costs another import of vLLM, and waits by spinning on a core that the tests need.

With an API key, and with the endpoint plugin, which vLLM loads only where VLLM_PLUGINS names it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from openai import OpenAI

from offline.compare.server import Server

API_KEY = "sesame"


@pytest.fixture(scope="session")
def server(
    request: pytest.FixtureRequest, compressed: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("server") / "log"
    arguments = ["--dtype", "float32", "--max-model-len", "512", "--served-model-name", "tiny"]
    env = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_PLUGINS": "d2moe", "VLLM_API_KEY": API_KEY}
    if "not slow" in request.config.getoption("markexpr"):
        arguments.append("--enforce-eager")
        env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    with Server(compressed, arguments, log=log, env=env) as running:
        yield running


@pytest.fixture(scope="session")
def client(server: Server) -> OpenAI:
    return OpenAI(base_url=server.base_url, api_key=API_KEY, max_retries=0)
