"""The compose files: valid, complete, and with command lines that vLLM's own parser takes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from dockerfile import ROOT, stages
from serving import compose, parsed

FILES = ("compose.yaml", "compose.cpu.yaml")
SET = {"VLLM_API_KEY": "sesame", "GRAFANA_PASSWORD": "sesame"}
DEPLOY = ROOT / "deploy"


def text(name: str) -> str:
    return (DEPLOY / name).read_text()


def server(name: str, **values: str) -> dict:
    return compose(text(name), {**SET, **values})["services"]["server"]


@pytest.mark.parametrize("name", FILES)
def test_valid_against_the_schema_of_the_compose_specification(name: str) -> None:
    """The schema comes with check-jsonschema: nothing is fetched."""
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(DEPLOY / name)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", FILES)
def test_no_server_without_a_key(name: str) -> None:
    """Compose stops with our sentence when the variable is not set."""
    with pytest.raises(KeyError, match="choose a key"):
        compose(text(name), {})


@pytest.mark.parametrize("name", FILES)
def test_command_lines_are_vllms(name: str) -> None:
    """As they are by default, and with every variable set."""
    arguments = parsed(server(name)["command"])
    assert arguments.model_tag == "/models/mixtral-d2-40"
    assert arguments.served_model_name == ["mixtral-d2-40"]
    chosen = parsed(server(name, MODEL="mine", GPUS="2", MAX_QUEUED="7")["command"])
    assert (chosen.model_tag, chosen.max_num_queued_reqs) == ("/models/mine", 7)
    assert chosen.tensor_parallel_size == (2 if name == "compose.yaml" else 1)


@pytest.mark.parametrize("name", FILES)
def test_what_production_asks_for(name: str) -> None:
    """A model folder that is only read, a read-only root, a restart at every exit, and time for running requests."""
    service = server(name)
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    # vLLM exits with 0 when a worker dies, which on-failure would take for a success.
    assert service["restart"] == "always"
    drain = parsed(service["command"]).shutdown_timeout
    assert 0 < drain < int(service["stop_grace_period"].removesuffix("s"))
    targets = {volume.split(":")[1]: volume.split(":")[2:] for volume in service["volumes"]}
    assert targets == {"/models": ["ro"], "/home/vllm": []}
    assert service["environment"]["HF_HUB_OFFLINE"] == "1"
    assert all(port.startswith("127.0.0.1:") and port.endswith(":8000") for port in service["ports"])
    assert service["build"]["target"] in stages()[1]
    assert (DEPLOY / service["build"]["context"] / "Dockerfile").exists()


def test_gpus_and_ranks_are_as_many() -> None:
    """One variable sets both."""
    service = server("compose.yaml", GPUS="4")
    device = service["deploy"]["resources"]["reservations"]["devices"][0]
    assert int(device["count"]) == parsed(service["command"]).tensor_parallel_size == 4


def test_prometheus_and_grafana_find_their_files() -> None:
    """Every file that is mounted exists, and is read where it is mounted."""
    services = compose(text("compose.yaml"), SET)["services"]
    mounted = {}
    for name in ("prometheus", "grafana"):
        for volume in services[name]["volumes"]:
            source, target = volume.split(":")[:2]
            if source.startswith("."):
                assert (DEPLOY / source).exists(), source
                mounted[target] = DEPLOY / source
    assert "--config.file=/etc/prometheus/prometheus.yml" in services["prometheus"]["command"]
    assert Path("/etc/prometheus/alerts.yml") in map(Path, mounted)
    home = Path(services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert (mounted[str(home.parent)] / home.name).exists()
    provider = (mounted["/etc/grafana/provisioning"] / "dashboards" / "d2moe.yaml").read_text()
    assert f"path: {home.parent}" in provider
    assert "targets: [server:8000]" in mounted["/etc/prometheus/prometheus.yml"].read_text()
