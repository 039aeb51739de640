"""The families by name, and what a config.json of one says of its MoE layers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from pydantic import ValidationError

from d2moe_vllm.format.config import QUANT_METHOD, CheckpointConfig, first_error
from d2moe_vllm.format.familyrow import FamilyRow
from d2moe_vllm.format.kinds import ROLES, Role, halves_of
from offline.errors import InputError
from offline.source.family import ACTIVATION_KEYS, Family, Layout
from offline.source.rows import ROWS
from offline.source.sites import SELECTIONS, Site

FAMILIES: Mapping[str, Family] = MappingProxyType({family.model_type: family for family in ROWS})
UNSUPPORTED: Mapping[str, str] = MappingProxyType(
    {
        "cohere2_moe": "vLLM's windows of attention are one token longer than those of transformers, which calibrates; "
        "serve it as it is",
    }
)
"""model_type -> why no row can describe it."""


@dataclass(frozen=True)
class MoEShape:
    """Sizes of a model's MoE layers; `layers` are the decoder layers that have experts, biased: with biases.

    hidden_size: of what experts read and give; model_size: of hidden states between layers where that is another, as a
    layer projects what it hands to its experts (moe_latent_size). roles: the projections that experts have.
    """

    num_experts: int
    experts_per_token: int
    hidden_size: int
    intermediate_size: int
    layers: tuple[int, ...]
    biased: bool = False
    roles: tuple[Role, ...] = ROLES
    model_size: int | None = None

    @property
    def model_hidden_size(self) -> int:
        """Of hidden states between layers."""
        return self.hidden_size if self.model_size is None else self.model_size

    @property
    def halves(self) -> Mapping[str, tuple[Role, ...]]:
        """HALVES, of the roles that experts have."""
        return halves_of(self.roles)

    @property
    def selections(self) -> Mapping[Site, tuple[Role, ...]]:
        """SELECTIONS, likewise."""
        return {site: tuple(role for role in every if role in self.roles) for site, every in SELECTIONS.items()}

    def projection(self, role: Role) -> tuple[int, int]:
        """(out, in) features."""
        if role == "down":
            return self.hidden_size, self.intermediate_size
        return self.intermediate_size, self.hidden_size

    def rows_for_each_input(self, tokens: int) -> float:
        """Rows that an expert sees on average of so many tokens, for each input of its widest matrix."""
        return tokens * self.experts_per_token / self.num_experts / max(self.hidden_size, self.intermediate_size)

    @property
    def expert_parameters(self) -> int:
        """Parameters of one expert's projections, but for biases."""
        return len(self.roles) * self.hidden_size * self.intermediate_size


_given: list[Family] = []
"""Families that are known for now, beside ours; the last counts."""


@contextlib.contextmanager
def known(family: Family | None) -> Iterator[None]:
    """Until the end of the block, `find_family` finds a family that a user described, and no other; with None, or a
    family of ours, nothing changes."""
    if family is None or family.row is None:
        yield
        return
    _given.append(family)
    try:
        yield
    finally:
        _given.pop()


def from_row(row: FamilyRow) -> Family:
    """A family as a user described it: with nothing required of config.json but the row's activation. Raises
    InputError for dense_keys that nobody can read."""
    if strange := [key for key in row.dense_keys if key not in DENSE_KEYS]:
        raise InputError(f"dense_keys: {strange[0]!r} is none of {', '.join(DENSE_KEYS)}; leave it out")
    stored = row.released
    released = Layout(stored.gate or "", stored.up, stored.down, stored.transposed) if stored else None
    return Family(
        model_type=row.model_type,
        experts=row.experts,
        projections=row.projections,
        decoder=row.decoder,
        experts_module=row.experts_module,
        num_experts_keys=(row.num_experts_key,),
        experts_per_token_key=row.experts_per_token_key,
        intermediate_size_key=row.intermediate_size_key,
        dense_keys=row.dense_keys,
        requires=dict.fromkeys(ACTIVATION_KEYS, (row.activation, None)),
        checks=(),
        renames=row.renames,
        released=released,
        row=row,
    )


def lookup(config: Mapping[str, Any]) -> Family | None:
    """The family of a config.json: the one that a compressed checkpoint carries, one that is `known`, or one of ours;
    None where there is none. Raises InputError where these contradict one another."""
    model_type = config.get("model_type")
    carried = _carried(config)
    given = _given[-1] if _given else None
    if given and given.model_type != model_type:
        raise InputError(f"model_type {model_type!r} is not {given.model_type!r}, which the given family row is for")
    if given and carried and given.row != carried:
        raise InputError("--family-file says otherwise than the checkpoint, which has its own row; leave it out")
    return from_row(carried) if carried else given or FAMILIES.get(str(model_type))


def _carried(config: Mapping[str, Any]) -> FamilyRow | None:
    """The row in a compressed checkpoint's config.json. Raises InputError where it cannot be one."""
    content = config.get("quantization_config")
    if not isinstance(content, Mapping) or content.get("quant_method") != QUANT_METHOD or not content.get("family_row"):
        return None
    try:
        row = FamilyRow.model_validate(content["family_row"])
    except ValidationError as error:
        raise InputError(f"config.json: bad family_row: {first_error(error)}; restore the original") from None
    if row.model_type != config.get("model_type"):
        raise InputError(f"config.json: family_row is of {row.model_type!r}, not of the model; restore the original")
    return row


def find_family(config: Mapping[str, Any]) -> Family:
    """The family of a config.json. Raises InputError where it is not known."""
    family = lookup(config)
    if family is None:
        raise unsupported(config, UNSUPPORTED.get(str(config.get("model_type"))))
    return family


def unsupported(config: Mapping[str, Any], reason: str | None) -> InputError:
    """What is said of a config.json whose family is not known."""
    return InputError(
        f"model_type {config.get('model_type')!r} is not supported{f': {reason}' if reason else ''}; "
        f"supported families: {', '.join(sorted(FAMILIES))}"
    )


def family_of(config: CheckpointConfig) -> Family:
    """The family of a compressed checkpoint. Raises InputError."""
    if config.family_row:
        return from_row(config.family_row)
    if config.family not in FAMILIES:
        raise InputError(f"family {config.family!r} is not supported; this d2moe-vllm is older than the checkpoint")
    return FAMILIES[config.family]


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
    experts_key = next((key for key in keys if key in config), keys[0])
    if isinstance(counts := config.get(experts_key), list):
        raise InputError(f"config.json: {experts_key} is {counts!r}: {unequal(family.model_type)}")
    num_experts = number(experts_key)
    if num_experts < 2:
        raise InputError("config.json: a single expert has nothing to share; this is no model for d2moe")
    if number(family.experts_per_token_key) > num_experts:
        raise InputError(f"config.json: {family.experts_per_token_key} exceeds the number of experts")
    groups, chosen = config.get("n_group") or 1, config.get("topk_group") or 1
    if not isinstance(groups, int) or not isinstance(chosen, int) or num_experts % groups or chosen > groups:
        raise InputError(f"config.json: n_group {groups!r} and topk_group {chosen!r} do not fit {num_experts} experts")
    hidden, latent = number("hidden_size"), family.latent_key
    own = number(latent) if latent and config.get(latent) is not None else hidden
    return MoEShape(
        num_experts=num_experts,
        experts_per_token=number(family.experts_per_token_key),
        hidden_size=own,
        intermediate_size=number(family.intermediate_size_key),
        layers=moe_layers(family, config, number("num_hidden_layers")),
        biased=family.biased,
        roles=family.roles,
        model_size=None if own == hidden else hidden,
    )


def unequal(model_type: str) -> str:
    """Why layers with experts of different numbers are refused, and what to do about it."""
    return (
        f"layers with experts of different numbers are not supported, as transformers builds every layer of "
        f"{model_type} with as many; prune all layers to one number"
    )


FIRST = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")
"""As many dense layers come first."""
STEP = ("decoder_sparse_step", "moe_layer_interval", "interleave_moe_layer_step")
"""Every so many-th layer has experts, counted from 1."""
LEAST: Mapping[str, int] = MappingProxyType({**dict.fromkeys(FIRST, 0), "moe_layer_end_index": -1})
"""Of a setting's value; 1 of all others."""
MLP_KINDS = {"dense": False, "sparse": True}
WITH_EXPERTS = ("E", "moe")
"""Kinds of layers, in a pattern or by name, that are nothing but experts and what belongs to them."""
DENSE_KEYS = (*FIRST, *STEP, "moe_layer_end_index", "moe_layer_freq", "mlp_only_layers", "mlp_layer_types")
"""All that `moe_layers` can read."""


def moe_layers(family: Family, config: Mapping[str, Any], num_layers: int) -> tuple[int, ...]:
    """The decoder layers that have experts, by their kinds where family.pattern_keys say these, else by those of
    family.dense_keys that config.json sets: FIRST, STEP,

    moe_layer_end_index (the last that may have, -1 for the model's last), moe_layer_freq (only multiples of it, or 0 or
    1 of each layer), mlp_only_layers (dense ones), mlp_layer_types (each layer's kind). Raises InputError.
    """
    if kinds := family.layer_kinds(config):
        with_experts = tuple(layer for layer, kind in enumerate(kinds) if kind in WITH_EXPERTS)
        if not with_experts:
            raise InputError(f"config.json: none of the {num_layers} layers has experts; there is nothing to compress")
        return with_experts
    settings = {key: config[key] for key in family.dense_keys if config.get(key) is not None}
    listed, kinds = settings.pop("mlp_only_layers", []), settings.pop("mlp_layer_types", ["sparse"] * num_layers)
    if not isinstance(listed, list) or not all(isinstance(n, int) for n in listed):
        raise InputError(f"config.json: mlp_only_layers is {listed!r}, expected a list of layer numbers")
    if not isinstance(kinds, list) or len(kinds) != num_layers or not all(kind in MLP_KINDS for kind in kinds):
        raise InputError(f"config.json: mlp_layer_types is {kinds!r}, expected dense or sparse of {num_layers} layers")
    if "mlp_layer_types" in family.dense_keys and isinstance(each := settings.get("moe_layer_freq"), list):
        if len(each) != num_layers or not all(one in (0, 1) for one in each):
            raise InputError(f"config.json: moe_layer_freq is {each!r}, expected 0 or 1 of {num_layers} layers")
        kinds = [kind if one else "dense" for kind, one in zip(kinds, settings.pop("moe_layer_freq"), strict=True)]
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
