"""The manifests as `kubectl kustomize` renders them: valid, and with what production asks for; without a cluster."""

from __future__ import annotations

import functools
import shutil
import subprocess
from typing import Any

import kubernetes_validate
import pytest
import yaml
from dockerfile import ROOT
from serving import parsed

KUBERNETES = ROOT / "deploy" / "kubernetes"
SINGLE = ("gpu-1", "gpu-tp2", "cpu")
OVERLAYS = (*SINGLE, "multi-node")
GPUS = {"gpu-1": 1, "gpu-tp2": 2, "cpu": 0, "multi-node": 8}
VERSIONS = ("1.30", "1.36")
"""Of Kubernetes: the oldest that the manifests are meant for, and a recent one."""
CUSTOM = {"ServiceMonitor", "PrometheusRule", "LeaderWorkerSet"}
"""Kinds that come with an operator; Kubernetes' own schemas do not know them."""
WEIGHTS, SLOW_VOLUME, COMPILING = 100e9, 70e6, 300
"""Bytes, bytes per second and seconds that a start must have time for."""

pytestmark = pytest.mark.skipif(not shutil.which("kubectl"), reason="no kubectl: the manifests are not checked here")


@functools.cache
def rendered(folder: str) -> list[dict[str, Any]]:
    command = ["kubectl", "kustomize", str(KUBERNETES / folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "deprecated" not in done.stderr
    return list(yaml.safe_load_all(done.stdout))


def one(overlay: str, kind: str) -> dict[str, Any]:
    found = [manifest for manifest in rendered(f"overlays/{overlay}") if manifest["kind"] == kind]
    assert len(found) == 1, f"{overlay}: {len(found)} of {kind}"
    return found[0]


def pods(overlay: str) -> dict[str, dict[str, Any]]:
    """Pod templates by role: one server, or leader and worker."""
    if overlay != "multi-node":
        return {"server": one(overlay, "Deployment")["spec"]["template"]}
    group = one(overlay, "LeaderWorkerSet")["spec"]["leaderWorkerTemplate"]
    return {"leader": group["leaderTemplate"], "worker": group["workerTemplate"]}


def seconds(probe: dict[str, Any]) -> int:
    return probe["periodSeconds"] * probe["failureThreshold"]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("folder", [*(f"overlays/{name}" for name in OVERLAYS), "compress"])
def test_valid_for_kubernetes(folder: str, version: str) -> None:
    """Against Kubernetes' schemas, strictly; of an operator's kinds at least the pods."""
    for manifest in rendered(folder):
        if manifest["kind"] not in CUSTOM:
            kubernetes_validate.validate(manifest, version, strict=True)
    if folder == "overlays/multi-node":
        for template in pods("multi-node").values():
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": template["spec"]}
            kubernetes_validate.validate(pod, version, strict=True)


def test_the_validator_finds_a_mistake() -> None:
    """A field that Kubernetes does not know is not let through."""
    wrong = {**one("gpu-1", "Service"), "spec": {"selecter": {}}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, VERSIONS[0], strict=True)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_everything_is_there(overlay: str) -> None:
    kinds = {manifest["kind"] for manifest in rendered(f"overlays/{overlay}")}
    server = {"LeaderWorkerSet"} if overlay == "multi-node" else {"Deployment", "HorizontalPodAutoscaler"}
    assert kinds == server | {
        "Service", "ServiceAccount", "PersistentVolumeClaim", "PodDisruptionBudget", "ServiceMonitor", "PrometheusRule"
    }  # fmt: skip


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_command_lines_are_vllms_and_fit_the_gpus(overlay: str) -> None:
    """As many ranks as a pod has GPUs; on several nodes, as many stages as nodes."""
    for role, template in pods(overlay).items():
        container = template["spec"]["containers"][0]
        known = {"LWS_GROUP_SIZE": "2", "LWS_WORKER_INDEX": str(int(role == "worker")), "LWS_LEADER_ADDRESS": "leader"}
        given = list(container["args"])
        for name, value in known.items():
            given = [argument.replace(f"$({name})", value) for argument in given]
        arguments = parsed(given)
        limits = container["resources"]["limits"]
        assert int(limits.get("nvidia.com/gpu", 0)) == GPUS[overlay]
        assert arguments.tensor_parallel_size == max(1, GPUS[overlay])
        assert arguments.trust_remote_code
        assert arguments.model_tag.startswith("/models/")
        if overlay == "multi-node":
            assert (arguments.nnodes, arguments.pipeline_parallel_size, arguments.headless) == (2, 2, role == "worker")
            assert arguments.node_rank == int(role == "worker")
            assert one(overlay, "LeaderWorkerSet")["spec"]["leaderWorkerTemplate"]["size"] == 2


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_are_confined(overlay: str) -> None:
    """Pod Security Standard "restricted", a read-only root, no rights, and none of Kubernetes' own variables."""
    for template in pods(overlay).values():
        confined(template["spec"])


def confined(spec: dict[str, Any]) -> None:
    assert spec["automountServiceAccountToken"] is False
    # A Service named vllm would set VLLM_PORT=tcp://..., which vLLM reads.
    assert spec["enableServiceLinks"] is False
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] == 2000
    assert spec["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault"
    for container in spec["containers"]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}
        }  # fmt: skip
        assert {"cpu", "memory"} <= set(container["resources"]["requests"])
        assert "memory" in container["resources"]["limits"]
        writable = {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
        assert {"/tmp", "/home/vllm"} <= writable


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_models_come_from_the_volume_and_nowhere_else(overlay: str) -> None:
    """Read-only, offline, and the key out of a secret; shared memory larger than Kubernetes' 64 MiB."""
    claim = one(overlay, "PersistentVolumeClaim")["metadata"]["name"]
    for template in pods(overlay).values():
        container = template["spec"]["containers"][0]
        volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
        mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
        assert mounts["/models"]["readOnly"] is True
        assert volumes[mounts["/models"]["name"]]["persistentVolumeClaim"]["claimName"] == claim
        shared = volumes[mounts["/dev/shm"]["name"]]["emptyDir"]
        assert shared["medium"] == "Memory"
        assert int(shared["sizeLimit"].removesuffix("Gi")) >= 4
        env = {variable["name"]: variable for variable in container["env"]}
        assert env["VLLM_API_KEY"]["valueFrom"]["secretKeyRef"] == {"name": "d2moe-vllm", "key": "api-key"}
        assert env["HF_HUB_OFFLINE"]["value"] == "1"
        image, _, tag = container["image"].rpartition(":")
        assert image.startswith("registry.example.com/")
        assert tag != "latest"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_there_is_time_to_start_and_time_to_stop(overlay: str) -> None:
    """100 GB from a slow volume before anything restarts the pod; running requests end before it is killed."""
    template = pods(overlay).get("server") or pods(overlay)["leader"]
    container = template["spec"]["containers"][0]
    start = seconds(container["startupProbe"])
    assert start >= WEIGHTS / SLOW_VOLUME + COMPILING
    if overlay in SINGLE:
        assert one(overlay, "Deployment")["spec"]["progressDeadlineSeconds"] > start
    assert seconds(container["livenessProbe"]) >= 60
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"] == {"path": "/health", "port": "http"}
    waiting = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    drain = parsed(container["args"][:5]).shutdown_timeout
    # 20 s is what vLLM took to end its processes after the last request, measured on two CPU cores.
    assert template["spec"]["terminationGracePeriodSeconds"] >= waiting + drain + 20


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_labels_and_ports_meet(overlay: str) -> None:
    """Service, disruption budget and monitor select what there is, and the job is called as the alerts expect."""
    service = one(overlay, "Service")
    selected = [
        role
        for role, template in pods(overlay).items()
        if service["spec"]["selector"].items() <= template["metadata"]["labels"].items()
    ]
    assert selected == ["leader" if overlay == "multi-node" else "server"]
    port = service["spec"]["ports"][0]
    ports = pods(overlay)[selected[0]]["spec"]["containers"][0]["ports"]
    assert {"name": port["targetPort"], "containerPort": 8000} in ports
    monitor = one(overlay, "ServiceMonitor")["spec"]
    assert monitor["endpoints"][0] == {"port": port["name"], "path": "/metrics", "interval": "15s"}
    assert monitor["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert service["metadata"]["labels"][monitor["jobLabel"]] == "d2moe-vllm"
    budget = one(overlay, "PodDisruptionBudget")["spec"]
    for template in pods(overlay).values():
        assert budget["selector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
    assert budget["maxUnavailable"] == 1


@pytest.mark.parametrize("overlay", SINGLE)
def test_scaled_by_the_queue(overlay: str) -> None:
    """By the metric that the adapter makes of vLLM's; and the Deployment leaves the number of pods to it."""
    scaler = one(overlay, "HorizontalPodAutoscaler")["spec"]
    deployment = one(overlay, "Deployment")
    assert scaler["scaleTargetRef"] == {
        "apiVersion": "apps/v1", "kind": "Deployment", "name": deployment["metadata"]["name"]
    }  # fmt: skip
    assert "replicas" not in deployment["spec"]
    adapter = yaml.safe_load((ROOT / "deploy" / "monitoring" / "prometheus-adapter.yaml").read_text())
    rule = adapter["rules"]["custom"][0]
    assert rule["seriesQuery"].startswith("vllm:num_requests_waiting{")
    assert [metric["pods"]["metric"]["name"] for metric in scaler["metrics"]] == [rule["name"]["as"]]


def test_the_job_compresses_onto_the_volume() -> None:
    """Confined like the servers; a wrong request is not tried again, an evicted run is."""
    (job,) = rendered("compress")
    spec = job["spec"]["template"]["spec"]
    confined(spec)
    assert spec["restartPolicy"] == "Never"
    actions = {rule["action"]: rule for rule in job["spec"]["podFailurePolicy"]["rules"]}
    assert actions["FailJob"]["onExitCodes"]["values"] == [2]
    assert actions["Ignore"]["onPodConditions"][0]["type"] == "DisruptionTarget"
    container = spec["containers"][0]
    assert container["args"][0] == "compress"
    # What it writes is what the servers read.
    assert container["args"][2] == pods("gpu-1")["server"]["spec"]["containers"][0]["args"][0]
    memory = next(argument for argument in container["args"] if argument.startswith("--memory="))
    limit = int(container["resources"]["limits"]["memory"].removesuffix("Gi")) * 2**30
    assert int(memory.removeprefix("--memory=").removesuffix("GB")) * 1e9 < 0.8 * limit
