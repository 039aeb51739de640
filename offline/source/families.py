"""Where the experts live in each model family: data, not code paths. A new family is one row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from d2moe_vllm.format.kinds import Role
from offline.errors import InputError
from offline.source.agreement import (
    ALIKE,
    Check,
    gate_of_one,
    groups,
    head_size,
    latent_attention,
    latent_norms,
    no_window,
    one_window,
    rope,
)


@dataclass(frozen=True)
class Layout:
    """One way in which a layer's experts lie on disk: per role the name of the tensor that holds it.

    A name with {expert} is one expert's matrix [out, in]; one without is all experts' stack [experts, out, in]
    (or [experts, in, out]: the shape tells). Where gate and up have one name they lie in one matrix, gate's
    output rows first.
    """

    gate: str
    up: str
    down: str

    @property
    def stacked(self) -> bool:
        return "{expert}" not in self.gate

    @property
    def fused(self) -> bool:
        return self.gate == self.up

    def name(self, layer: int, expert: int, role: Role) -> str:
        """The tensor that holds one expert's matrix."""
        template: str = getattr(self, role)
        return template.replace("{layer}", str(layer)).replace("{expert}", str(expert))


W: Mapping[Role, str] = MappingProxyType({"gate": "w1", "up": "w3", "down": "w2"})
PROJ: Mapping[Role, str] = MappingProxyType({"gate": "gate_proj", "up": "up_proj", "down": "down_proj"})
SILU: Mapping[str, tuple[Any, ...]] = MappingProxyType({"hidden_act": ("silu", None)})
NO_BIAS: Mapping[str, tuple[Any, ...]] = MappingProxyType({"attention_bias": (False, None)})
"""Where vLLM's attention has none, or not all of transformers', and leaves those on disk out."""
UNTIED: Mapping[str, tuple[Any, ...]] = MappingProxyType({"tie_word_embeddings": (False, None)})
"""Where vLLM's head is always a tensor of its own."""
NO_WINDOW: Mapping[str, tuple[Any, ...]] = MappingProxyType({"sliding_window": (None, 0)})
"""Where vLLM takes a window that transformers does not know."""
Attention = Literal["heads", "latent"]
"""What attention keeps of a token: keys and values of every KV head; one latent vector and a rotated key (MLA)."""


@dataclass(frozen=True)
class Family:
    """One model family as transformers' config.json and safetensors files lay it out.

    experts: prefix of a layer's experts, with {layer}, as vLLM's own loader of the family routes it; a
        compressed expert's tensors are `<experts>.<expert>.<projection>.<kind>`.
    experts_module: path of the experts inside transformers' decoder layer; its forward takes
        (hidden_states [tokens, hidden], top_k_index [tokens, k], top_k_weights [tokens, k]).
    num_experts_keys: config.json's names of the number of experts; the first that is there counts.
    dense_keys: config.json's keys that say which decoder layers have no experts (see `moe_layers`).
    requires: config.json's key -> the values with which transformers and vLLM compute the same model
        (None: the key may be missing); anything else would be served wrongly.
    not_null: keys that may be missing, but not null. absent: keys that may not be there, not even null. checks: of
        settings that belong together. remark: what to tell a user of a config.json that is not refused.
    renames: substrings of disk names -> transformers' module names.
    released: how experts lie in released checkpoints where that is not one tensor per expert.
    stock: transformers' model_type where it has none of this name.
    attention: what vLLM's KV cache holds of a token; None where that is not known here. window_keys: config.json's keys
        that are all set where layers look back on a window of tokens, its size first; (): they never do.
    """

    model_type: str
    experts: str
    projections: Mapping[Role, str]
    experts_module: str = "mlp.experts"
    num_experts_keys: tuple[str, ...] = ("num_experts", "num_local_experts")
    intermediate_size_key: str = "moe_intermediate_size"
    dense_keys: tuple[str, ...] = ()
    requires: Mapping[str, tuple[Any, ...]] = field(default_factory=lambda: SILU)
    not_null: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    checks: tuple[Check, ...] = (rope(*ALIKE),)
    remark: Check | None = None
    renames: Mapping[str, str] = field(default_factory=dict)
    released: Layout | None = None
    stock: str | None = None
    attention: Attention | None = None
    window_keys: tuple[str, ...] = ()

    def experts_prefix(self, layer: int) -> str:
        """`experts` of one layer."""
        return self.experts.replace("{layer}", str(layer))

    @property
    def layouts(self) -> tuple[Layout, ...]:
        """How experts may lie on disk, the released form first; transformers 5 can write its modules' own stack."""
        names = (f"{self.experts}.{{expert}}.{self.projections[role]}.weight" for role in ("gate", "up", "down"))
        module = "model.layers.{layer}." + self.experts_module
        gate_up = f"{module}.gate_up_proj"
        known = (Layout(*names), Layout(gate_up, gate_up, f"{module}.down_proj"))
        return (self.released, *known) if self.released else known

    def module_name(self, name: str) -> str:
        """transformers' parameter name of a tensor on disk."""
        for disk, module in self.renames.items():
            name = name.replace(disk, module)
        return name

    def disk_name(self, name: str) -> str:
        """The released checkpoints' name of a tensor that may be named as transformers' modules are."""
        for disk, module in reversed(list(self.renames.items())):
            name = name.replace(module, disk)
        return name


QWEN = Family(
    model_type="qwen2_moe",
    experts="model.layers.{layer}.mlp.experts",
    projections=PROJ,
    attention="heads",
    dense_keys=("decoder_sparse_step", "mlp_only_layers"),
    # vLLM attends to all, and has biases of q, k and v, whatever config.json says.
    requires={
        **SILU,
        "architectures": (["Qwen2MoeForCausalLM"], None),
        "use_sliding_window": (False, None),
        "qkv_bias": (True, None),
        "dual_chunk_attention_config": (None,),
    },
    checks=(rope(*ALIKE), no_window, head_size),
)
DEEPSEEK_V3 = Family(
    model_type="deepseek_v3",
    experts="model.layers.{layer}.mlp.experts",
    projections=PROJ,
    attention="latent",
    num_experts_keys=("n_routed_experts",),
    dense_keys=("first_k_dense_replace",),
    # vLLM takes a missing scoring_func for softmax; transformers always computes sigmoid and bias.
    requires={
        **SILU,
        **NO_BIAS,
        **UNTIED,
        "architectures": (["DeepseekV3ForCausalLM"], None),
        "scoring_func": ("sigmoid",),
        "topk_method": ("noaux_tc",),
        "moe_layer_freq": (1, None),
        "rope_interleave": (True, None),
        "llama_4_scaling": (None,),
    },
    not_null=("moe_layer_freq", "rope_interleave"),
    absent=("index_topk",),
    checks=(rope("default", "yarn"), latent_attention),
    remark=latent_norms,
)
_ROWS = (
    Family(
        model_type="mixtral",
        experts="model.layers.{layer}.block_sparse_moe.experts",
        projections=W,
        attention="heads",
        window_keys=("sliding_window",),
        intermediate_size_key="intermediate_size",
        requires={**SILU, "architectures": (["MixtralForCausalLM"], None)},
        checks=(rope(*ALIKE), one_window),
        renames={".block_sparse_moe.": ".mlp."},
    ),
    Family(
        model_type="phimoe",
        experts="model.layers.{layer}.block_sparse_moe.experts",
        projections=W,
        attention="heads",
        window_keys=("sliding_window",),
        intermediate_size_key="intermediate_size",
        # vLLM routes to two experts with this jitter and wants a bias of the head (which it then leaves out),
        # whatever config.json says; it does not know transformers' own spelling of the class.
        requires={
            **SILU,
            **UNTIED,
            "attention_bias": (True,),
            "architectures": (["PhiMoEForCausalLM"],),
            "num_experts_per_tok": (2,),
            "router_jitter_noise": (0.01,),
            "lm_head_bias": (True,),
        },
        checks=(rope("default", "longrope"), one_window),
        renames={".block_sparse_moe.": ".mlp.", ".gate.weight": ".router.weight"},
    ),
    QWEN,
    Family(
        model_type="qwen3_moe",
        experts=QWEN.experts,
        projections=PROJ,
        attention="heads",
        window_keys=("sliding_window", "use_sliding_window"),
        dense_keys=QWEN.dense_keys,
        # Of biases vLLM has those of q, k and v, transformers that of o too; a shared expert only vLLM knows.
        requires={
            **SILU,
            **NO_BIAS,
            "architectures": (["Qwen3MoeForCausalLM"], None),
            "shared_expert_intermediate_size": (0, None),
            "dual_chunk_attention_config": (None,),
        },
        checks=(rope(*ALIKE), one_window),
    ),
    Family(
        model_type="olmoe",
        experts="model.layers.{layer}.mlp.experts",
        projections=PROJ,
        attention="heads",
        intermediate_size_key="intermediate_size",
        requires={
            **SILU,
            **NO_BIAS,
            **UNTIED,
            **NO_WINDOW,
            "architectures": (["OlmoeForCausalLM"], None),
            "norm_topk_prob": (False, None),
            "clip_qkv": (None,),
            "rms_norm_eps": (1e-5, None),  # vLLM has this number in its code
        },
    ),
    Family(
        model_type="deepseek",
        experts="model.layers.{layer}.mlp.experts",
        projections=PROJ,
        attention="heads",
        num_experts_keys=("n_routed_experts",),
        dense_keys=("first_k_dense_replace", "moe_layer_freq"),
        # What vLLM takes from the later versions of this family, transformers' code of this one does not know.
        requires={
            **SILU,
            **NO_BIAS,
            **UNTIED,
            **NO_WINDOW,
            "architectures": (["DeepseekForCausalLM"], None),
            "mlp_bias": (False, None),
            "scoring_func": ("softmax", None),
            "routed_scaling_factor": (1.0, None),
            "n_group": (1, None),
            "topk_group": (1, None),
            "topk_method": ("greedy", None),
            "rswa_window": (None,),
        },
        not_null=("scoring_func", "moe_layer_freq"),
        checks=(rope(*ALIKE), head_size, gate_of_one),
    ),
    Family(
        model_type="deepseek_v2",
        experts="model.layers.{layer}.mlp.experts",
        projections=PROJ,
        attention="latent",
        num_experts_keys=("n_routed_experts",),
        dense_keys=("first_k_dense_replace",),
        # transformers never renormalizes this family's gates.
        requires={
            **SILU,
            "scoring_func": ("softmax", None),
            "topk_method": ("greedy", "group_limited_greedy", None),
            "norm_topk_prob": (False, None),
            "moe_layer_freq": (1, None),
            **NO_BIAS,
            **UNTIED,
            "architectures": (["DeepseekV2ForCausalLM"], None),
            "mlp_bias": (False, None),
            "llama_4_scaling": (None,),
        },
        not_null=("scoring_func", "moe_layer_freq"),
        absent=("index_topk",),
        checks=(rope("default", "yarn"), latent_attention, groups),
        remark=latent_norms,
    ),
    DEEPSEEK_V3,
    Family(
        model_type="kimi_k2",
        experts=DEEPSEEK_V3.experts,
        projections=PROJ,
        attention=DEEPSEEK_V3.attention,
        num_experts_keys=DEEPSEEK_V3.num_experts_keys,
        dense_keys=DEEPSEEK_V3.dense_keys,
        requires=DEEPSEEK_V3.requires,
        not_null=DEEPSEEK_V3.not_null,
        absent=DEEPSEEK_V3.absent,
        checks=DEEPSEEK_V3.checks,
        remark=DEEPSEEK_V3.remark,
        stock="deepseek_v3",
    ),
    Family(
        model_type="granitemoe",
        experts="model.layers.{layer}.block_sparse_moe.experts",
        projections=PROJ,
        attention="heads",
        experts_module="block_sparse_moe.experts",
        intermediate_size_key="intermediate_size",
        # vLLM takes windows and sinks by layer from settings that transformers does not know here.
        requires={
            **SILU,
            **NO_BIAS,
            **NO_WINDOW,
            "architectures": (["GraniteMoeForCausalLM"], None),
            "layer_types": (None,),
            "attention_sinks": (False, None),
            "layer_rope_theta": (None,),
        },
        not_null=("attention_multiplier",),
        checks=(rope(*ALIKE), head_size),
        renames={".router.layer.weight": ".router.weight"},
        released=Layout(
            gate="model.layers.{layer}.block_sparse_moe.input_linear.weight",
            up="model.layers.{layer}.block_sparse_moe.input_linear.weight",
            down="model.layers.{layer}.block_sparse_moe.output_linear.weight",
        ),
    ),
)
FAMILIES: Mapping[str, Family] = MappingProxyType({family.model_type: family for family in _ROWS})
UNSUPPORTED: Mapping[str, str] = MappingProxyType(
    {"gpt_oss": "its experts have biases, which the compressed form has no place for; serve it as it is"}
)
"""model_type -> why no row can describe it."""


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
        reason = UNSUPPORTED.get(str(model_type))
        raise InputError(
            f"model_type {model_type!r} is not supported{f': {reason}' if reason else ''}; "
            f"supported families: {', '.join(sorted(FAMILIES))}"
        )
    return family


def check_settings(family: Family, config: Mapping[str, Any]) -> None:
    """Raises InputError for a config.json that transformers and vLLM make different models of."""
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
    keys = family.num_experts_keys
    num_experts = number(next((key for key in keys if key in config), keys[0]))
    if num_experts < 2:
        raise InputError("config.json: a single expert has nothing to share; this is no model for d2moe")
    if number("num_experts_per_tok") > num_experts:
        raise InputError("config.json: num_experts_per_tok exceeds the number of experts")
    groups, chosen = config.get("n_group") or 1, config.get("topk_group") or 1
    if not isinstance(groups, int) or not isinstance(chosen, int) or num_experts % groups or chosen > groups:
        raise InputError(f"config.json: n_group {groups!r} and topk_group {chosen!r} do not fit {num_experts} experts")
    return MoEShape(
        num_experts=num_experts,
        experts_per_token=number("num_experts_per_tok"),
        hidden_size=number("hidden_size"),
        intermediate_size=number(family.intermediate_size_key),
        layers=moe_layers(family, config, number("num_hidden_layers")),
    )


def moe_layers(family: Family, config: Mapping[str, Any], num_layers: int) -> tuple[int, ...]:
    """The decoder layers that have experts, by those of family.dense_keys that config.json sets:

    first_k_dense_replace (as many dense layers first), moe_layer_freq (only multiples of it),
    decoder_sparse_step (every so many-th, counted from 1), mlp_only_layers (dense ones). Raises InputError.
    """
    settings = {key: config[key] for key in family.dense_keys if config.get(key) is not None}
    listed = settings.pop("mlp_only_layers", [])
    if not isinstance(listed, list) or not all(isinstance(n, int) for n in listed):
        raise InputError(f"config.json: mlp_only_layers is {listed!r}, expected a list of layer numbers")
    for key, value in settings.items():
        if not isinstance(value, int) or value < (0 if key == "first_k_dense_replace" else 1):
            raise InputError(f"config.json: {key} is {value!r}, expected a positive number")
    first = settings.get("first_k_dense_replace", 0)
    frequency, step = settings.get("moe_layer_freq", 1), settings.get("decoder_sparse_step", 1)
    layers = tuple(
        layer
        for layer in range(num_layers)
        if layer >= first and layer % frequency == 0 and (layer + 1) % step == 0 and layer not in listed
    )
    if not layers:
        raise InputError(f"config.json: none of the {num_layers} layers has experts; there is nothing to compress")
    return layers
