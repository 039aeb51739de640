"""What a model family is: how its config.json and its experts on disk are read. The families are in rows.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from d2moe_vllm.format.familyrow import FamilyRow
from d2moe_vllm.format.kinds import ROLES, Role, roles_of
from offline.errors import InputError
from offline.source.agreement import ALIKE, TEXT, Check, rope


@dataclass(frozen=True)
class Layout:
    """One way in which a layer's experts lie on disk: per role the name of the tensor that holds it.

    A name with {expert} is one expert's matrix [out, in]; one without is all experts' stack [experts, out, in], or
    [experts, in, out] where it is `transposed` (read, it may be either: the shape tells). Where gate and up have one
    name they lie in one matrix, gate's outputs first, or, `interleaved`, each of gate's before up's of its number.
    bias: what a name is followed by in that of its biases, [out] or [experts, out]; "": there are none. gate is "" of
    experts that have none.
    """

    gate: str
    up: str
    down: str
    transposed: bool = False
    interleaved: bool = False
    bias: str = ""

    @property
    def stacked(self) -> bool:
        return "{expert}" not in self.down

    @property
    def fused(self) -> bool:
        return self.gate == self.up

    def name(self, layer: int, expert: int, role: Role) -> str:
        """The tensor that holds one expert's matrix."""
        template: str = getattr(self, role)
        return template.replace("{layer}", str(layer)).replace("{expert}", str(expert))

    def outputs(self, role: Role, size: int) -> slice:
        """Which outputs of the tensor that holds a projection are its own, of which there are so many."""
        if not self.fused or role == "down":
            return slice(0, size)
        if self.interleaved:
            return slice(int(role == "up"), 2 * size, 2)
        return slice(0, size) if role == "gate" else slice(size, 2 * size)


OUTSIDE = ("model_type", "architectures", "tie_word_embeddings")
"""What is the whole model's to say, wherever else it is said."""
SILU: Mapping[str, tuple[Any, ...]] = MappingProxyType({"hidden_act": ("silu", None)})
ACTIVATION_KEYS = ("hidden_act", "hidden_activation", "mlp_hidden_act")
"""Settings that say the experts' activation; the first that is there counts."""
Attention = Literal["heads", "latent", "indexed"]
"""What attention keeps of a token: keys and values of every KV head; one latent vector and a rotated key (MLA); these,
and a key of the indexer that chooses what is attended to (DeepSeek V3.2)."""
State = Literal["delta", "convolution", "mamba2"]
"""What layers without attention keep of a whole request: a gated delta net's state; a short convolution's inputs; a
Mamba-2's state."""


def predicts_further(name: str) -> bool:
    """Whether a tensor is of a module, beside the decoder layers, that predicts further tokens (mtp.fc.weight,
    model.mtp_block.0.mlp.gate.weight)."""
    return any(part.startswith("mtp") for part in name.split(".")[:2])


@dataclass(frozen=True)
class Family:
    """One model family as transformers' config.json and safetensors files lay it out.

    experts: prefix of a layer's experts, with {layer}, as vLLM's own loader of the family routes it; a
        compressed expert's tensors are `<experts>.<expert>.<projection>.<kind>`.
    decoder: path of the module that holds the decoder layers, in transformers' class and in the names of tensors; one
        that is longer than "model" lies within a multimodal class, whose language model alone is calibrated and
        compressed; where it does not begin with "model", what it begins with is a language model with its head.
    experts_module: path of the experts inside transformers' decoder layer; its forward takes
        (hidden_states [tokens, hidden], top_k_index [tokens, k], top_k_weights [tokens, k]), or, where the router's
        weights are on the experts' input, all tokens once for each expert, times these ([experts * tokens, hidden]).
    returned: how many values transformers' decoder layer returns beside hidden states, which come first; what a layer
        is given of one before it is nothing then.
    num_experts_keys: config.json's names of the number of experts; the first that is there counts.
    experts_per_token_key: its name of how many a token is sent to.
    dense_keys: config.json's keys that say which decoder layers have no experts (see `moe_layers`).
    pattern_keys: its keys of which the first that is there says each layer's kind, in a string of letters or a list of
        names, and so how many layers there are, whatever num_hidden_layers says.
    latent_key: its key of the size of what experts read and give, where that may be another than hidden_size.
    requires: config.json's key -> the values with which transformers and vLLM compute the same model
        (None: the key may be missing); anything else would be served wrongly.
    not_null: keys that may be missing, but not null. absent: keys that may not be there, not even null. checks: of
        settings that belong together. remark: what to tell a user of a config.json that is not refused.
    renames: substrings of disk names -> transformers' module names.
    released: how experts lie in released checkpoints where that is not one tensor per expert.
    stock: transformers' model_type where it has none of this name.
    fused: whether transformers attends by torch's fused attention.
    swiglu: limit, alpha and beta of the experts' clamped SwiGLU (format.config.Swiglu); () for another activation.
    attention: what vLLM's KV cache holds of a token; None where that is not known here. state: what it holds of a
        request in the layers that do not attend; None where all do. window_keys: config.json's keys that are all set
        where layers look back on a window of tokens, its size first; (): they never do. window_every: the first of so
        many layers in turn does; 0: those that layer_types calls sliding_attention.
    recipe: the family whose shipped recipe is this one's too; None where it has one of its own.
    row: what a user described it by; None for a family of ours.
    """

    model_type: str
    experts: str
    projections: Mapping[Role, str]
    decoder: str = "model"
    experts_module: str = "mlp.experts"
    returned: int = 0
    num_experts_keys: tuple[str, ...] = ("num_experts", "num_local_experts")
    experts_per_token_key: str = "num_experts_per_tok"
    intermediate_size_key: str = "moe_intermediate_size"
    dense_keys: tuple[str, ...] = ()
    pattern_keys: tuple[str, ...] = ()
    latent_key: str | None = None
    requires: Mapping[str, tuple[Any, ...]] = field(default_factory=lambda: SILU)
    not_null: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    checks: tuple[Check, ...] = (rope(*ALIKE),)
    remark: Check | None = None
    renames: Mapping[str, str] = field(default_factory=dict)
    released: Layout | None = None
    stock: str | None = None
    fused: bool = True
    swiglu: tuple[float, ...] = ()
    attention: Attention | None = None
    state: State | None = None
    window_keys: tuple[str, ...] = ()
    window_every: int = 1
    recipe: str | None = None
    row: FamilyRow | None = None

    @property
    def latent(self) -> bool:
        """Whether all heads share one latent vector."""
        return self.attention in ("latent", "indexed")

    def experts_prefix(self, layer: int) -> str:
        """`experts` of one layer."""
        return self.experts.replace("{layer}", str(layer))

    @property
    def nested(self) -> bool:
        """Whether the language model lies within a multimodal one."""
        return "." in self.decoder

    @property
    def pipeline(self) -> str:
        """What the Hub calls the models' task."""
        return "image-text-to-text" if self.nested else "text-generation"

    def settings(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """The language model's settings in a config.json: its own, or those under TEXT with what is said OUTSIDE, and
        TEXT itself. Raises InputError where there is no TEXT."""
        if not self.nested:
            kinds = self.layer_kinds(config)
            return {**config, "num_hidden_layers": len(kinds)} if kinds else config
        text = config.get(TEXT)
        if not isinstance(text, dict):
            raise InputError(f"config.json: {TEXT} is {text!r}, a {self.model_type} model needs an object of settings")
        return {**text, **{key: config[key] for key in OUTSIDE if key in config}, TEXT: text}

    def layer_kinds(self, config: Mapping[str, Any]) -> Sequence[str]:
        """Each layer's kind, where the family's config.json says it; else (). Raises InputError where it is to and does
        not."""
        if not self.pattern_keys:
            return ()
        key = next((key for key in self.pattern_keys if config.get(key) is not None), self.pattern_keys[0])
        kinds = config.get(key)
        if not isinstance(kinds, (str, list)) or not kinds or not all(isinstance(kind, str) for kind in kinds):
            raise InputError(f"config.json: {key} is {kinds!r}, a {self.model_type} model needs each layer's kind")
        return kinds

    def changed(self, config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
        """A config.json with other settings of the language model."""
        return {**config, TEXT: {**config[TEXT], **changes}} if self.nested else {**config, **changes}

    @property
    def layers_prefix(self) -> str:
        """How the names of the decoder layers' modules begin in transformers."""
        return f"{self.decoder}.layers."

    def layer_of(self, name: str) -> int | None:
        """The number of the decoder layer that a tensor on disk, or of a module, is in; None for one outside of
        them."""
        name = self.module_name(name)
        number = name.removeprefix(self.layers_prefix).partition(".")[0]
        return int(number) if name.startswith(self.layers_prefix) and number.isdigit() else None

    def beside(self, name: str) -> bool:
        """Whether a tensor is of what a multimodal model has beside its language model, such as its vision tower."""
        if self.outermost != "model":  # a whole language model, head and all, lies within
            return not name.startswith(f"{self.outermost}.")
        holder = self.decoder.rpartition(".")[0]
        return bool(holder) and name.startswith(f"{holder}.") and not name.startswith(f"{self.decoder}.")

    @property
    def outermost(self) -> str:
        """The first module of `decoder`: `model`, or a multimodal class's whole language model (Llama 4)."""
        return self.decoder.partition(".")[0]

    @property
    def roles(self) -> tuple[Role, ...]:
        """The projections that experts have: without a gate up and down."""
        return roles_of(self.projections)

    @property
    def biased(self) -> bool:
        """Whether experts have biases."""
        return self.released is not None and bool(self.released.bias)

    @property
    def experts_path(self) -> str:
        """`experts_module` of one layer within transformers' model, with {layer}."""
        return f"{self.layers_prefix}{{layer}}.{self.experts_module}"

    @property
    def layouts(self) -> tuple[Layout, ...]:
        """How experts may lie on disk, the released form first; transformers 5 can write its modules' own stack."""
        if "gate" not in self.projections:
            up, down = (f"{self.experts}.{{expert}}.{self.projections[role]}.weight" for role in self.roles)
            alone = (Layout("", up, down), Layout("", f"{self.experts_path}.up_proj", f"{self.experts_path}.down_proj"))
            return (self.released, *alone) if self.released else alone
        gate, up, down = (f"{self.experts}.{{expert}}.{self.projections[role]}.weight" for role in ROLES)
        if self.biased and self.released:
            # A projection without its bias is none: no other form is known of them.
            return (self.released,)
        gate_up = f"{self.experts_path}.gate_up_proj"
        known = (Layout(gate, up, down), Layout(gate_up, gate_up, f"{self.experts_path}.down_proj"))
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
