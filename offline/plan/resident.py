"""What one device keeps of a compressed model's weights, as vLLM's and our tensor and expert parallelism cut them.

Experts are counted by the plugin's own allocation (d2moe_vllm/serving/parameters.py). All else is vLLM's: linear layers
are cut by column or row, the vocabulary by row after padding, and whatever is neither (norms, routers, the projections
into a latent) is on every rank. Read from vLLM 0.32, each family's model and vocab_parallel_embedding.py; compared with
what its engine holds (tests/plugin/test_fit_served.py).
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch

from d2moe_vllm.format.config import CheckpointConfig
from d2moe_vllm.format.kinds import TensorSpec
from d2moe_vllm.serving.parameters import Share
from offline.errors import InputError
from offline.plan.kv_cache import head_sizes, mamba_shared, number
from offline.source.family import Family, predicts_further

WIDTH = 2
"""Bytes of a number: vLLM makes a float32 model a 16-bit one, unless --dtype says otherwise."""
VOCABULARY_MULTIPLE = 64
"""To which vLLM pads the vocabulary (DEFAULT_VOCAB_PADDING_SIZE)."""
VOCABULARY = frozenset({"embed_tokens", "lm_head"})
KEYS_AND_VALUES = frozenset({"k_proj", "v_proj"})
"""Cut by heads; where there are more ranks than KV heads, several ranks have the same one."""
COLUMNS = frozenset({
    "q_proj", "q_b_proj", "kv_b_proj", "gate_proj", "up_proj", "w1", "w3", "gate_up_proj",
    # Of layers that keep a state: projections, convolutions, numbers of each head.
    "in_proj_qkvz", "in_proj_ba", "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "in_proj", "conv1d", "conv",
    "A_log", "dt_bias",
})  # fmt: skip
"""Cut along their outputs, biases too."""
ROWS = frozenset({"o_proj", "out_proj", "down_proj", "w2"})
"""Cut along their inputs; a bias is whole."""
STACKS = frozenset({"input_linear", "output_linear"})
"""Of a dense layer's experts in one tensor, cut as each of them is."""


def other_bytes(
    tensors: Mapping[str, TensorSpec], config: Mapping[str, Any], family: Family, tensor_parallel_size: int
) -> int:
    """Bytes on one rank of all that is no compressed expert, experts of layers that stay dense included.

    tensors: by the released checkpoints' names. What predicts further tokens is not loaded.
    """
    layers, tp = number(config, "num_hidden_layers"), tensor_parallel_size
    found = _rotary_table(config, family)
    for name, spec in tensors.items():
        parts, layer = name.split("."), family.layer_of(name)
        if predicts_further(name) or (layer is not None and layer >= layers):
            continue
        bias = parts[-1] == "bias"
        module = parts[-2] if parts[-1] in ("weight", "bias") else parts[-1]
        if module in VOCABULARY:
            rows = -(-spec.shape[0] // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE // tp
            found += WIDTH * rows * (spec.numel // spec.shape[0])
        elif module in KEYS_AND_VALUES:
            found += WIDTH * spec.numel // _kv_share(config, family, tp)
        elif "mamba" in parts and module in ("in_proj", "conv1d"):
            shared = mamba_shared(config) * (spec.numel // spec.shape[0])
            found += WIDTH * ((spec.numel - shared) // tp + shared)
        elif "mamba" in parts and parts[-2:] in (["mamba", "D"], ["norm", "weight"]):
            found += WIDTH * spec.numel // tp  # of heads, and of their channels
        elif module in COLUMNS or module in STACKS or (module in ROWS and not bias):
            found += WIDTH * -(-spec.numel // tp)
        else:
            found += WIDTH * spec.numel
    return found


def _kv_share(config: Mapping[str, Any], family: Family, tp: int) -> int:
    return tp if family.latent else min(tp, head_sizes(config)[1])


def _rotary_table(config: Mapping[str, Any], family: Family) -> int:
    """Cosines and sines of all positions, which all layers share; of Granite 4's that rotate nothing none."""
    positions = config.get("max_position_embeddings")
    if not isinstance(positions, int) or config.get("position_embedding_type", "rope") != "rope":
        return 0
    return WIDTH * positions * (number(config, "qk_rope_head_dim") if family.latent else _rotated(config))


def _rotated(config: Mapping[str, Any]) -> int:
    """Numbers of a head that are rotated."""
    size, rope = head_sizes(config)[2], config.get("rope_parameters") or config.get("rope_scaling") or {}
    if isinstance(rotated := config.get("rotary_dim"), int):
        return rotated
    share = config.get("partial_rotary_factor") or rope.get("partial_rotary_factor") or 1
    return int(size * share)


def expert_bytes(config: CheckpointConfig, tensor_parallel_size: int = 1, *, expert_parallel: bool = False) -> int:
    """Bytes of all compressed experts on the rank that has most of them, by our own allocation.

    expert_parallel: whole experts, shared out in order as vLLM does (the first ranks have one more where they do not
    come out even), and on every rank what a layer's experts share. Raises CheckpointError where the ranks do not divide
    what they share out.
    """
    experts = _experts_by_rank(config.num_experts, tensor_parallel_size, expert_parallel)
    alike = {layer: number for number, layer in config.layers.items()}
    counts = Counter(config.layers.values())

    def held(rank: int) -> int:
        cut = (0, 1) if expert_parallel else (rank, tensor_parallel_size)
        with torch.device("meta"):
            found = {
                layer: Share(config, number, experts[rank], *cut).empty_parameters(torch.bfloat16)
                for layer, number in alike.items()
            }
        return sum(counts[layer] * sum(one.nbytes for one in parts.values()) for layer, parts in found.items())

    return max(held(rank) for rank in range(tensor_parallel_size))


def _experts_by_rank(experts: int, ranks: int, expert_parallel: bool) -> list[range]:
    if not expert_parallel:
        return [range(experts)] * ranks
    each, more = divmod(experts, ranks)
    firsts = [rank * each + min(rank, more) for rank in range(ranks + 1)]
    return list(itertools.starmap(range, itertools.pairwise(firsts)))


def check_parallel(
    config: Mapping[str, Any], family: Family, groups: int, tensor_parallel_size: int, *, expert_parallel: bool = False
) -> None:
    """Raises InputError, with the sizes that work, where vLLM or our plugin would refuse to share the model out.

    groups: slices of the intermediate channels, of which a rank has whole ones (`base.groups` of the recipe).
    """
    problem = parallel_problem(config, family, groups, tensor_parallel_size, expert_parallel=expert_parallel)
    if problem:
        sizes = range(1, 65)
        works = [n for n in sizes if not parallel_problem(config, family, groups, n, expert_parallel=expert_parallel)]
        raise InputError(
            f"--tensor-parallel-size {tensor_parallel_size} does not divide {problem}; use "
            f"{' or '.join(filter(None, (', '.join(map(str, works[:-1])), str(works[-1]))))}"
        )


def parallel_problem(
    config: Mapping[str, Any], family: Family, groups: int, ranks: int, *, expert_parallel: bool
) -> str | None:
    """What so many ranks do not divide, None where they divide all."""
    heads = number(config, "num_attention_heads")
    vocabulary = number(config, "vocab_size")
    padded = -(-vocabulary // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    counts = {
        "attention heads": heads,
        "rows of the padded vocabulary": padded,
        "intermediate channels": config.get("intermediate_size"),
        "channels of the shared expert": config.get("shared_expert_intermediate_size"),
        "key heads of linear attention": config.get("linear_num_key_heads"),
        "value heads of linear attention": config.get("linear_num_value_heads"),
        "heads of Mamba": config.get("mamba_n_heads") if family.state == "mamba2" else None,
    }
    if not expert_parallel:
        counts |= {
            "intermediate channels of an expert": config.get(family.intermediate_size_key),
            "slices of an expert's channels (base.groups of the recipe)": groups,
        }
    elif ranks > (experts := next(config[key] for key in family.num_experts_keys if key in config)):
        return f"{experts} experts"
    for what, count in counts.items():
        if isinstance(count, int) and count % ranks:
            return f"{count} {what}"
    if family.attention == "heads":
        kv_heads = head_sizes(config)[1]
        if kv_heads % ranks and ranks % kv_heads:
            return f"{kv_heads} KV heads"
    return None
