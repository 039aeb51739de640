"""The families by name, and what a config.json of one says of its MoE layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from d2moe_vllm.format.kinds import Role
from offline.errors import InputError
from offline.source.family import Family
from offline.source.rows import ROWS

FAMILIES: Mapping[str, Family] = MappingProxyType({family.model_type: family for family in ROWS})
UNSUPPORTED: Mapping[str, str] = MappingProxyType(
    {
        "granitemoehybrid": "vLLM's loader of this family knows no other tensors of experts than its own; serve it as "
        "it is",
        "cohere2_moe": "vLLM's windows of attention are one token longer than those of transformers, which calibrates; "
        "serve it as it is",
    }
)
"""model_type -> why no row can describe it."""


@dataclass(frozen=True)
class MoEShape:
    """Sizes of a model's MoE layers; `layers` are the decoder layers that have experts, biased: with biases."""

    num_experts: int
    experts_per_token: int
    hidden_size: int
    intermediate_size: int
    layers: tuple[int, ...]
    biased: bool = False

    def projection(self, role: Role) -> tuple[int, int]:
        """(out, in) features."""
        if role == "down":
            return self.hidden_size, self.intermediate_size
        return self.intermediate_size, self.hidden_size

    @property
    def expert_parameters(self) -> int:
        """Parameters of one expert's gate, up and down, but for biases."""
        return 3 * self.hidden_size * self.intermediate_size


def find_family(config: Mapping[str, Any]) -> Family:
    """The family of a config.json. Raises InputError where it is not one of ours."""
    model_type = config.get("model_type")
    family = FAMILIES.get(str(model_type))
    if family is None:
        reason = UNSUPPORTED.get(str(model_type))
        raise InputError(
            f"model_type {model_type!r} is not supported{f': {reason}' if reason else ''}; "
            f"supported families: {', '.join(sorted(FAMILIES))}"
        )
    return family


def check_settings(family: Family, config: Mapping[str, Any]) -> None:
    """Raises InputError for a config.json that transformers and vLLM make different models of."""
    config = family.settings(config)
    for key, values in family.requires.items():
        value = config.get(key)
        if not any(
            value is one or (value == one and isinstance(value, bool) == isinstance(one, bool)) for one in values
        ):
            raise InputError(f"config.json: {key} {value!r}; vLLM serves {family.model_type} with {values[0]} only")
    for key in (*family.absent, *(key for key in family.not_null if config.get(key, "") is None)):
        if key in config:
            raise InputError(
                f"config.json: {key} {config[key]!r}; vLLM serves {family.model_type} without it only; take it out"
            )
    for check in family.checks:
        if problem := check(config):
            raise InputError(
                f"config.json: {problem}: transformers and vLLM read it differently for {family.model_type}, so the "
                "result would not be the model that was calibrated; serve it as it is"
            )


def read_shape(family: Family, config: Mapping[str, Any]) -> MoEShape:
    """MoE sizes from a config.json. Raises InputError for missing or absurd values."""

    def number(key: str) -> int:
        value = config.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 1_000_000:
            raise InputError(f"config.json: {key} is {value!r}, a {family.model_type} model needs a positive number")
        return value

    check_settings(family, config)
    config = family.settings(config)
    keys = family.num_experts_keys
    num_experts = number(next((key for key in keys if key in config), keys[0]))
    if num_experts < 2:
        raise InputError("config.json: a single expert has nothing to share; this is no model for d2moe")
    if number(family.experts_per_token_key) > num_experts:
        raise InputError(f"config.json: {family.experts_per_token_key} exceeds the number of experts")
    groups, chosen = config.get("n_group") or 1, config.get("topk_group") or 1
    if not isinstance(groups, int) or not isinstance(chosen, int) or num_experts % groups or chosen > groups:
        raise InputError(f"config.json: n_group {groups!r} and topk_group {chosen!r} do not fit {num_experts} experts")
    return MoEShape(
        num_experts=num_experts,
        experts_per_token=number(family.experts_per_token_key),
        hidden_size=number("hidden_size"),
        intermediate_size=number(family.intermediate_size_key),
        layers=moe_layers(family, config, number("num_hidden_layers")),
        biased=family.biased,
    )


FIRST = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")
"""As many dense layers come first."""
STEP = ("decoder_sparse_step", "moe_layer_interval")
"""Every so many-th layer has experts, counted from 1."""
LEAST: Mapping[str, int] = MappingProxyType({**dict.fromkeys(FIRST, 0), "moe_layer_end_index": -1})
"""Of a setting's value; 1 of all others."""
MLP_KINDS = {"dense": False, "sparse": True}


def moe_layers(family: Family, config: Mapping[str, Any], num_layers: int) -> tuple[int, ...]:
    """The decoder layers that have experts, by those of family.dense_keys that config.json sets: FIRST, STEP,

    moe_layer_end_index (the last that may have, -1 for the model's last), moe_layer_freq (only multiples of it),
    mlp_only_layers (dense ones), mlp_layer_types (each layer's kind). Raises InputError.
    """
    settings = {key: config[key] for key in family.dense_keys if config.get(key) is not None}
    listed, kinds = settings.pop("mlp_only_layers", []), settings.pop("mlp_layer_types", ["sparse"] * num_layers)
    if not isinstance(listed, list) or not all(isinstance(n, int) for n in listed):
        raise InputError(f"config.json: mlp_only_layers is {listed!r}, expected a list of layer numbers")
    if not isinstance(kinds, list) or len(kinds) != num_layers or not all(kind in MLP_KINDS for kind in kinds):
        raise InputError(f"config.json: mlp_layer_types is {kinds!r}, expected dense or sparse of {num_layers} layers")
    for key, value in settings.items():
        if not isinstance(value, int) or value < LEAST.get(key, 1):
            raise InputError(f"config.json: {key} is {value!r}, expected a positive number")

    def setting(keys: tuple[str, ...], default: int) -> int:
        return next((settings[key] for key in keys if key in settings), default)

    first, step, frequency = setting(FIRST, 0), setting(STEP, 1), setting(("moe_layer_freq",), 1)
    last = setting(("moe_layer_end_index",), -1)
    layers = tuple(
        layer
        for layer in range(first, num_layers if last == -1 else min(last + 1, num_layers))
        if layer % frequency == 0 and (layer + 1) % step == 0 and layer not in listed and MLP_KINDS[kinds[layer]]
    )
    if not layers:
        raise InputError(f"config.json: none of the {num_layers} layers has experts; there is nothing to compress")
    return layers
