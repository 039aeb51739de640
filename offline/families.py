"""Where the experts live in each model family: data, not code paths. A new family is one row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from d2moe_vllm.checkpoint import ROLES, Role, TensorSpec
from offline.errors import InputError


@dataclass(frozen=True)
class Family:
    """One model family as transformers' config.json and safetensors files lay it out.

    experts: prefix of a layer's experts on disk, with {layer}; an expert's weight is
        `<experts>.<expert>.<projection>.weight`, [out, in].
    experts_module: path of the experts inside transformers' decoder layer; its forward takes
        (hidden_states [tokens, hidden], top_k_index [tokens, k], top_k_weights [tokens, k]).
    activation: the hidden_act that vLLM's own code of the family computes, whatever config.json says.
    renames: substrings of disk names -> transformers' module names.
    """

    model_type: str
    experts: str
    projections: Mapping[Role, str]
    num_experts_key: str
    intermediate_size_key: str
    experts_module: str
    renames: Mapping[str, str] = field(default_factory=dict)
    activation: str = "silu"

    def experts_prefix(self, layer: int) -> str:
        """`experts` of one layer."""
        return self.experts.replace("{layer}", str(layer))

    def weight_name(self, layer: int, expert: int, role: Role) -> str:
        """Disk name of one expert's dense weight."""
        return f"{self.experts_prefix(layer)}.{expert}.{self.projections[role]}.weight"

    def module_name(self, name: str) -> str:
        """transformers' parameter name of a tensor on disk."""
        for disk, module in self.renames.items():
            name = name.replace(disk, module)
        return name


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "mixtral": Family(
            model_type="mixtral",
            experts="model.layers.{layer}.block_sparse_moe.experts",
            projections=MappingProxyType({"gate": "w1", "up": "w3", "down": "w2"}),
            num_experts_key="num_local_experts",
            intermediate_size_key="intermediate_size",
            experts_module="mlp.experts",
            renames=MappingProxyType({".block_sparse_moe.": ".mlp."}),
        ),
    }
)


@dataclass(frozen=True)
class MoEShape:
    """Sizes of a model's MoE layers; `layers` are the decoder layers that have experts."""

    num_experts: int
    experts_per_token: int
    hidden_size: int
    intermediate_size: int
    layers: tuple[int, ...]

    def projection(self, role: Role) -> tuple[int, int]:
        """(out, in) features."""
        if role == "down":
            return self.hidden_size, self.intermediate_size
        return self.intermediate_size, self.hidden_size

    @property
    def expert_parameters(self) -> int:
        """Parameters of one expert: gate, up and down."""
        return 3 * self.hidden_size * self.intermediate_size


def find_family(config: Mapping[str, Any]) -> Family:
    """The family of a config.json. Raises InputError where it is not one of ours."""
    model_type = config.get("model_type")
    family = FAMILIES.get(str(model_type))
    if family is None:
        raise InputError(
            f"model_type {model_type!r} is not supported; supported families: {', '.join(sorted(FAMILIES))}"
        )
    return family


def read_shape(family: Family, config: Mapping[str, Any]) -> MoEShape:
    """MoE sizes from a config.json. Raises InputError for missing or absurd values."""

    def number(key: str) -> int:
        value = config.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 1_000_000:
            raise InputError(f"config.json: {key} is {value!r}, a {family.model_type} model needs a positive number")
        return value

    activation = config.get("hidden_act", family.activation)
    if activation != family.activation:
        raise InputError(
            f"config.json: hidden_act {activation!r}; vLLM serves {family.model_type} with {family.activation}"
        )
    if number("num_experts_per_tok") > number(family.num_experts_key):
        raise InputError("config.json: num_experts_per_tok exceeds the number of experts")
    return MoEShape(
        num_experts=number(family.num_experts_key),
        experts_per_token=number("num_experts_per_tok"),
        hidden_size=number("hidden_size"),
        intermediate_size=number(family.intermediate_size_key),
        layers=tuple(range(number("num_hidden_layers"))),
    )


def expert_weights(family: Family, shape: MoEShape) -> dict[str, tuple[int, int]]:
    """Disk name -> (out, in) of every dense expert weight the model must have."""
    return {
        family.weight_name(layer, expert, role): shape.projection(role)
        for layer in shape.layers
        for expert in range(shape.num_experts)
        for role in ROLES
    }


def expert_dtype(family: Family, shape: MoEShape, specs: Mapping[str, TensorSpec]) -> str:
    """The one dtype ("BF16", ...) that all expert weights are stored in.

    Raises InputError where a weight is missing, has another shape than config.json says, or where
    dtypes differ or are not plain floating point.
    """
    dtypes: dict[str, str] = {}
    for name, expected in expert_weights(family, shape).items():
        spec = specs.get(name)
        if spec is None:
            raise InputError(f"the source has no tensor {name}; download the model again")
        if spec.shape != expected:
            raise InputError(f"{name} is {list(spec.shape)}, config.json says {list(expected)}; wrong config.json?")
        dtypes.setdefault(spec.dtype, name)
    if len(dtypes) > 1:
        found = ", ".join(f"{dtype} ({name})" for dtype, name in dtypes.items())
        raise InputError(f"experts of several dtypes are not supported: {found}; save the model in one dtype")
    (dtype,) = dtypes
    if dtype not in ("BF16", "F16", "F32"):
        raise InputError(f"experts stored as {dtype} are not supported; save the model in bfloat16 first")
    return dtype
