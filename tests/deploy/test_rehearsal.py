"""The Dockerfile's stages, run line by line without Docker: an image compresses a model, another one serves it.

The lines are the Dockerfile's, the arguments those of compose.cpu.yaml and of the Kubernetes job. Not shown: the base
images themselves (this machine stands in for them, with its own Python), and anything on a GPU.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from compression import TINY
from dockerfile import ROOT, stages
from rehearsal import Builder, Image, impossible
from serving import compose

WHY_NOT = impossible()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3000),
    pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT)),
]

USER = "2000:0"


def from_this_machine(line: str) -> str | None:
    """As deploy/install.sh does: where uv cannot reach torch's own index, pip may know the CPU build."""
    if "--torch-backend" in line:
        return '/opt/venv/bin/pip install --no-cache-dir --no-deps "torch==${TORCH_VERSION}+cpu"'
    return None


@pytest.fixture(scope="module")
def builder() -> Iterator[Builder]:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # outside of the folders that are overlaid
        yield Builder(Path(folder), from_this_machine)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, texts: tuple[Path, Path]) -> Path:
    """The volume: the bundled model under the name that the job asks for, and a text. Its group may write."""
    folder = tmp_path_factory.mktemp("volume")
    shutil.copytree(TINY, folder / "Mixtral-8x7B-v0.1")
    shutil.copy(texts[0], folder / "calibration.txt")
    folder.chmod(0o2775)
    return folder


def ran(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def test_the_compressor_does_the_jobs_work(builder: Builder, models: Path) -> None:
    """The job's own arguments, on fewer windows; as its user, with a read-only root and no network."""
    image = builder.build("compressor")
    job = yaml.safe_load((ROOT / "deploy" / "kubernetes" / "compress" / "job.yaml").read_text())
    container = job["spec"]["template"]["spec"]["containers"][0]
    entrypoint = json.loads(stages()[1]["compressor"].last("ENTRYPOINT"))
    ran(
        image.run(
            " ".join([*entrypoint, *container["args"], "--windows=32", "--seq-len=128"]),
            user=USER,
            env={variable["name"]: variable["value"] for variable in container["env"]},
            writable={"/models": models},
            read_only=["/home/vllm"],
            network=False,
        )
    )
    assert (models / "mixtral-d2-40" / "d2moe_manifest.json").exists()
    assert ran(image.run("python3 -c 'import torch; print(torch.__version__)'")).strip().endswith("+cpu")
    without_vllm = image.run("python3 -c 'import vllm'")
    assert "No module named 'vllm'" in without_vllm.stderr


def test_the_cpu_server_runs_as_compose_starts_it(builder: Builder, models: Path) -> None:
    """compose.cpu.yaml's command and environment: up, healthy, answering, and a request survives SIGTERM."""
    if not (models / "mixtral-d2-40").exists():
        pytest.skip("the compressor's test did not leave a checkpoint")
    image = builder.build("cpu")
    stage = stages()[1]["cpu"]
    service = compose((ROOT / "deploy" / "compose.cpu.yaml").read_text(), {"VLLM_API_KEY": "sesame", "KV_CACHE": "1"})
    server = service["services"]["server"]
    done = image.run(
        " ".join(["python3 /visitor/visitor.py", *json.loads(stage.last("ENTRYPOINT")), *server["command"]]),
        user=USER,
        env={**server["environment"], "HEALTHCHECK": stage.last("HEALTHCHECK").split("CMD ")[1]},
        binds={"/visitor": Path(__file__).parent, "/models": models},
        read_only=["/home/vllm"],
        network=False,
        timeout=1600,
    )
    seen = json.loads(ran(done))
    print({name: value for name, value in seen.items() if name.startswith("seconds")})
    assert seen["healthy_before"] is False
    assert "died" not in seen, done.stderr[-4000:]
    assert seen["without_key"] == 401
    assert seen["completion"][0] == 200
    assert seen["info"][0] == 200
    assert 'd2moe_delta_bytes{layers="0"' in seen["metrics"][1]
    assert seen["running_at_sigterm"]
    ((status, answer),) = seen["request_at_sigterm"]
    assert status == 200
    assert json.loads(answer)["usage"]["completion_tokens"] == 400
    assert seen["exit"] == 0
    assert seen["seconds_to_stop"] < int(server["stop_grace_period"].removesuffix("s"))


def test_the_gpu_server_gets_a_plugin_that_loads(builder: Builder) -> None:
    """On a stand-in for vLLM's image: this environment's packages, less ours. Nothing else is added or changed."""
    builder.bases["gpu"] = stand_in(builder.folder / "vllm-openai")
    image = builder.build("gpu")
    site = f"lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
    layer = Path(f"{image.layer}{sys.base_prefix}")
    added = {path.relative_to(layer).as_posix() for path in layer.rglob("*") if path.is_file()}
    assert added
    ours = (f"{site}/d2moe_vllm", f"{site}/offline/", "bin/d2moe")
    assert not [path for path in added if not path.startswith(ours)]
    assert f"{site}/d2moe_vllm/serving/__pycache__/experts.{sys.implementation.cache_tag}.pyc" in added
    loads = (
        "from vllm.plugins import load_general_plugins; load_general_plugins(); "
        "from vllm.model_executor.layers.quantization import get_quantization_config; "
        "print(get_quantization_config('d2moe').__name__)"
    )
    assert ran(image.run(f'python3 -c "{loads}"', user=USER)).split()[-1] == "D2MoEConfig"


def stand_in(folder: Path) -> Image:
    """vllm/vllm-openai as far as our lines can tell: its user, uv, and a system Python that has vLLM."""
    (uv,) = re.findall(r"^ARG UV_VERSION=(\S+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    image = Image(folder)
    venv = Path(sys.prefix).resolve()
    site = f"lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
    packages = Path(f"{image.layer}{sys.base_prefix}") / site
    packages.mkdir(parents=True)
    os.setxattr(packages, "trusted.overlay.opaque", b"y")  # hides what is installed on this machine
    (packages / "image.pth").write_text(f"{venv}/{site}\n")
    ran(
        image.run(
            f"{venv}/bin/python -m pip install -q --no-deps --target /opt/uv uv=={uv}; "
            "cp /opt/uv/bin/uv /usr/local/bin/uv; "
            f"rm -rf {venv}/{site}/d2moe_vllm* {venv}/{site}/__editable__*d2moe*; "
            f"rm -f {sys.base_prefix}/lib/python3*/EXTERNALLY-MANAGED; "
            "useradd --uid 2000 --gid 0 --create-home vllm"
        )
    )
    image.env["PATH"] = f"{sys.base_prefix}/bin:{image.env['PATH']}"
    return image
