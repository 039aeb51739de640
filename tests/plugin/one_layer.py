"""One layer of a synthetic checkpoint, loaded and computed with as one rank does, without vLLM."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from synthetic import NAMES, dense_expert
from torch import Tensor

from d2moe_vllm.format.config import CheckpointConfig
from d2moe_vllm.ops import BACKENDS
from d2moe_vllm.ops.weights import Weights
from d2moe_vllm.serving.loading import LayerLoader

LAYER = 1
SHARDS = {"w1": "w13", "w3": "w13", "w2": "w2"}


def layer_tensors(folder: Path, layer: int = LAYER) -> dict[str, Tensor]:
    tensors = load_file(folder / "model-00002-of-00002.safetensors")
    return {name: t for name, t in tensors.items() if name.startswith(f"model.layers.{layer}.")}


def make_loader(
    config: CheckpointConfig, tp: tuple[int, int] = (0, 1), ep: tuple[int, int] = (0, 1), layer: int = LAYER
) -> LayerLoader:
    own = config.num_experts // ep[1]
    first = ep[0] * own
    return LayerLoader(
        config,
        layer,
        num_local_experts=own,
        local_expert=lambda e: e - first if first <= e < first + own else -1,
        tp_rank=tp[0],
        tp_size=tp[1],
    )


def fill(loader: LayerLoader, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Feeds tensors through the parameters' weight_loader, as vLLM does."""
    parameters = loader.empty_parameters(torch.float32)
    for name, tensor in tensors.items():
        _, _, rest = name.partition("experts.")
        expert, shard, kind = rest.split(".")
        parameter = torch.nn.Parameter(parameters[f"{SHARDS[shard]}_{kind}"], requires_grad=False)
        stored = loader.weight_loader(kind)(
            param=parameter,
            loaded_weight=tensor,
            weight_name=f"experts.{SHARDS[shard]}_{kind}",
            shard_id=shard,
            expert_id=int(expert),
            return_success=True,
        )
        assert stored in (True, False)
    return parameters


def compute(
    loader: LayerLoader,
    parameters: dict[str, Tensor],
    x: Tensor,
    ids: Tensor,
    scope: str = "off",
    backend: str = "reference",
) -> Tensor:
    halves = [Weights(**{k: parameters.get(f"{half}_{k}") for k in Weights._fields}) for half in ("w13", "w2")]
    experts = len(loader.experts)
    spec = loader.spec(scope, activation="silu", prune_down=experts == 8)
    if (pack := BACKENDS[backend].pack) is not None:
        # Packing takes the storage of what it packs.
        copies = [Weights(*(None if t is None else t.clone() for t in half)) for half in halves]
        halves = list(pack(*copies, spec))
    own = {expert: local for local, expert in enumerate(loader.experts)}
    local = torch.tensor([[own.get(expert, -1) for expert in row] for row in ids.tolist()])
    weights = torch.linspace(0.2, 0.8, ids.numel()).view(ids.shape)
    return BACKENDS[backend].fused_experts(x, weights, local, *halves, None, spec)


def dense_layer(
    tensors: dict[str, Tensor],
    layer: int,
    x: Tensor,
    ids: Tensor,
    biases: list[list[Tensor]] | None = None,
    swiglu: tuple[float, ...] = (),
) -> Tensor:
    """What `compute` has to come to, in float64 from the dense reconstruction. biases: of every expert gate's, up's and
    down's, in their whole size; swiglu: limit, alpha and beta."""
    weights = torch.linspace(0.2, 0.8, ids.numel()).view(ids.shape)
    expected = torch.zeros_like(x, dtype=torch.float64)
    for t in range(len(x)):
        for e, g in zip(ids[t].tolist(), weights[t].tolist(), strict=True):
            weights_of = [dense_expert(tensors, layer, e, role) for role in NAMES]
            own = [b.double() for b in biases[e]] if biases else [torch.zeros(len(w)).double() for w in weights_of]
            gate, up = (w @ x[t].double() + b for w, b in zip(weights_of[:2], own[:2], strict=True))
            if swiglu:
                limit, alpha, beta = swiglu
                gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
                h = gate / (1 + (-alpha * gate).exp()) * (up + beta)
            else:
                h = torch.nn.functional.silu(gate) * up
            expected[t] += g * (weights_of[2] @ h + own[2])
    return expected
