"""Dense weights from every form that a checkpoint can store, against float64 computations from its tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from d2moe_vllm.format.config import CheckpointConfig, CheckpointError
from offline.checkpoint.reconstruction import Reconstruction
from offline.io.shards import Reader

EXPERTS, HIDDEN, MIDDLE = 4, 16, 24
NAMES = {"gate": "w1", "up": "w3", "down": "w2"}
PLAIN = {"rank": 5, "kept_columns": 8, "used_columns": 8}
VARIANTS: dict[str, tuple[dict[str, Any], list[int]]] = {
    "base and factors": (PLAIN, []),
    "no base": ({"rank": 5, "kept_columns": 0, "used_columns": 0}, []),
    "no deltas": ({"rank": 0, "kept_columns": 8, "used_columns": 4}, []),
    "trimmed": (PLAIN, [0, 2]),
    "low-rank base": ({"rank": 5, "kept_columns": 0, "used_columns": 0, "base_rank": 3}, [1]),
    "columns": ({**PLAIN, "rank": 4, "delta": "columns"}, [3]),
    "columns alone": ({"rank": 4, "kept_columns": 0, "used_columns": 0, "delta": "columns"}, []),
    "shared V": ({**PLAIN, "shared_v": True}, []),
    "shared U": ({**PLAIN, "distinct_u": 2}, [0]),
    "both shared": ({**PLAIN, "shared_v": True, "distinct_u": 3}, [2]),
}


def config(variant: str, dtype: str) -> CheckpointConfig:
    projection, trimmed = VARIANTS[variant]
    return CheckpointConfig.model_validate(
        {
            "family": "mixtral", "experts": "layers.{layer}.experts", "projections": NAMES, "num_experts": EXPERTS,
            "hidden_size": HIDDEN, "intermediate_size": MIDDLE, "dtype": dtype, "pruning": {"groups": 2},
            "layers": {3: {**dict.fromkeys(NAMES, projection), "trimmed": trimmed}},
            "source": {"name": "x", "parameters": 1, "bytes": 1},
        }
    )  # fmt: skip


def random_tensors(settings: CheckpointConfig) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    dtypes = {"BF16": torch.bfloat16, "F32": torch.float32, "F16": torch.float16}
    tensors = {}
    for name, spec in settings.expert_tensors().items():
        kind = name.rpartition(".")[2]
        inputs = MIDDLE if ".w2." in name else HIDDEN
        if kind.endswith("columns"):
            half = torch.stack([torch.randperm(inputs // 2, generator=generator).sort().values for _ in range(2)])
            half = half[:, : spec.shape[0] // 2].sort().values
            tensors[name] = (half + torch.tensor([[0], [inputs // 2]])).flatten().int()
        elif kind == "u_index":
            layer = settings.layers[3]
            index = torch.randint(layer.gate.distinct_u, (EXPERTS,), generator=generator)
            tensors[name] = torch.tensor([-1 if e in layer.trimmed else int(index[e]) for e in range(EXPERTS)]).int()
        else:
            tensors[name] = torch.randn(spec.shape, generator=generator).to(dtypes[spec.dtype])
    return tensors


def expected(tensors: dict[str, Tensor], expert: int, role: str, trimmed: list[int]) -> Tensor:
    """base + delta, from whichever tensors are there."""
    shape = (HIDDEN, MIDDLE) if role == "down" else (MIDDLE, HIDDEN)
    prefix = f"layers.3.experts.{{}}.{NAMES[role]}."

    def get(kind: str, owner: int = 0) -> Tensor | None:
        tensor = tensors.get(prefix.format(owner) + kind)
        return tensor.double() if tensor is not None and tensor.is_floating_point() else tensor

    weight = torch.zeros(shape, dtype=torch.float64)
    if (base := get("base")) is not None:
        for position, column in enumerate(get("base_columns").tolist()):
            weight[:, column] += base[:, position]
    if get("base_u") is not None:
        weight += get("base_u") @ get("base_v")
    if expert in trimmed:
        return weight
    index = get("u_index")
    u = get("delta_u", expert if index is None else int(index[expert]))
    if u is None:
        return weight
    if get("delta_columns", expert) is not None:
        for position, column in enumerate(get("delta_columns", expert).tolist()):
            weight[:, column] += u[:, position]
        return weight
    v = get("delta_v", expert)
    return weight + u @ (get("shared_v") if v is None else v)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant(tmp_path: Path, variant: str, dtype: str) -> None:
    settings = config(variant, dtype)
    tensors = random_tensors(settings)
    assert tensors
    save_file(tensors, tmp_path / "model.safetensors")
    trimmed = VARIANTS[variant][1]
    exact = Reconstruction(Reader(tmp_path), settings, torch.float64)
    single = Reconstruction(Reader(tmp_path), settings)
    for expert in (0, 3, 1, 2, 0):
        for role in NAMES:
            right = expected(tensors, expert, role, trimmed)
            torch.testing.assert_close(exact.weight(3, expert, role), right, rtol=0, atol=1e-12)
            found = single.weight(3, expert, role)
            assert found.dtype == torch.float32
            torch.testing.assert_close(found.double(), right, rtol=1e-5, atol=1e-5)
            base, delta = exact.base(3, role), exact.delta(3, expert, role)
            assert (base is None) == (not settings.layers[3][role].has_base)
            assert (delta is None) == (expert in trimmed or not VARIANTS[variant][0]["rank"])


def test_results_are_the_callers_own(tmp_path: Path) -> None:
    """Changing a weight changes neither the next one nor the shared base."""
    settings = config("trimmed", "float32")
    tensors = random_tensors(settings)
    save_file(tensors, tmp_path / "model.safetensors")
    rebuilt = Reconstruction(Reader(tmp_path), settings)
    for expert in (0, 1):
        before = rebuilt.weight(3, expert, "gate")
        rebuilt.weight(3, expert, "gate").zero_()
        assert torch.equal(rebuilt.weight(3, expert, "gate"), before)


def test_what_is_not_finite_and_what_is_not_compressed(tmp_path: Path) -> None:
    settings = config("shared V", "float32")
    tensors = random_tensors(settings)
    tensors["layers.3.experts.0.w2.shared_v"][1, 1] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors")
    rebuilt = Reconstruction(Reader(tmp_path), settings)
    assert rebuilt.weight(3, 2, "gate").isfinite().all()
    with pytest.raises(CheckpointError, match=r"w2\.shared_v holds NaN"):
        rebuilt.weight(3, 2, "down")
    with pytest.raises(KeyError):
        rebuilt.weight(4, 0, "gate")
