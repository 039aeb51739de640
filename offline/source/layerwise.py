"""A transformers model that is never whole in memory: embeddings and head, and one decoder layer at a time.

The stock modeling code runs unchanged. Its decoder layers are exchanged for small probes that record the
arguments a layer is called with, or that inject hidden states before the head, so no family needs code here.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from d2moe_vllm.families import stock_config_class, stock_model_class
from d2moe_vllm.ops.reference import gated
from offline.errors import InputError
from offline.io.shards import Reader
from offline.source.families import find_family
from offline.source.family import ACTIVATION_KEYS, Family, predicts_further
from offline.source.missing import remedy

UNUSED = (".k_scale", ".v_scale", ".kv_scale", ".q_scale", ".prob_scale", ".output_scale", ".rotary_emb.inv_freq")
"""How tensors within a model end that are nothing it computes with: scales of a quantized cache, frequencies that are
computed from the configuration."""


class _Probe(nn.Module):
    """Stands for a decoder layer, with its settings, which models may ask it for (its kind, of hybrid ones); more: how
    many values such a layer returns beside hidden states, here none of them anything."""

    hidden: Tensor

    def __init__(self, layer: nn.Module, more: int) -> None:
        super().__init__()
        for name, value in vars(layer).items():
            if isinstance(value, (str, int)) and not name.startswith("_"):
                setattr(self, name, value)
        self._more = more

    def _returned(self) -> Any:
        return (self.hidden, *[None] * self._more) if self._more else self.hidden


class _Recorder(_Probe):
    """Stands for one decoder layer: passes hidden states through and keeps what came with them."""

    arguments: tuple[tuple[Any, ...], dict[str, Any]]

    def forward(self, hidden_states: Tensor, *unnamed: Any, **arguments: Any) -> Any:
        self.hidden, self.arguments = hidden_states, (unnamed, arguments)
        return self._returned()


class _Injector(_Probe):
    """Stands for all decoder layers: hands given hidden states to the head."""

    def forward(self, hidden_states: Tensor, *unnamed: Any, **arguments: Any) -> Any:
        return self._returned()


def read_hf_config(folder: Path) -> Any:
    """transformers' configuration of a model folder. Raises InputError.

    Never runs code that came with the model: a family that transformers does not know is built from what it
    does know, or from ours (DeepSeek v1).
    """
    return _read_config(folder, lambda content: (family := find_family(content)).stock or family.model_type)


def read_unknown_config(folder: Path, model_type: str) -> Any:
    """Likewise, of a family that has no row. Raises InputError, KeyError where transformers does not know it either."""
    stock_config_class(model_type)
    return _read_config(folder, lambda content: model_type)


def _read_config(folder: Path, stock_of: Callable[[dict[str, Any]], str]) -> Any:
    from transformers import PreTrainedConfig

    try:
        content, _ = PreTrainedConfig.get_config_dict(folder)
        stock = stock_of(content)
        return stock_config_class(stock).from_dict({**content, "model_type": stock})
    except InputError:
        raise
    except Exception as error:  # validation errors of many types, some of several lines
        reason = " ".join(str(error).split())
        raise InputError(f"{folder / 'config.json'}: transformers refuses it: {reason[:300]}") from None


def blueprint(hf_config: Any) -> Any:
    """The stock model without any weight (on the meta device), in eval mode. Raises InputError."""
    config = copy.deepcopy(hf_config)
    for attribute in ("quantization_config", "auto_map"):
        if hasattr(config, attribute):
            delattr(config, attribute)
    for one in (config, config.get_text_config()):
        one.use_cache = False
        one.output_router_logits = False
    try:
        with torch.device("meta"):
            built = stock_model_class(config)
            # Families of which a plan counts the scores: Family.fused.
            attention = "sdpa" if built._supports_sdpa else "eager"
            model = built._from_config(config, dtype=torch.float32, attn_implementation=attention)
    except Exception as error:  # sizes that do not go together
        raise InputError(f"config.json: transformers cannot build this model: {' '.join(str(error).split())}") from None
    return model.eval().requires_grad_(False)


def check_parameters(
    family: Family, hf_config: Any, reader: Reader, moe_layers: Collection[int], experts: Collection[str]
) -> frozenset[str]:
    """Compare all that the stock model holds but its experts with the tensors on disk, both ways; reads no weight, but
    of a head that is tied and stored.

    experts: names on disk of expert tensors. Returns the names of tensors beside the model, which it has no place for:
    they are part of nothing that it computes. Raises InputError, naming the first tensor that is missing, of another
    shape, or within the model and without a place there, or the first layer that has experts in transformers and none
    in moe_layers, or the other way round.
    """
    model = blueprint(hf_config)
    layers = model.get_submodule(family.decoder).layers
    for number, layer in enumerate(layers):
        if (family.experts_module in dict(layer.named_modules())) != (number in moe_layers):
            keys = " and ".join(family.dense_keys) or "num_hidden_layers"
            raise InputError(f"config.json leaves open whether layer {number} has experts; set {keys}")
    others = {family.module_name(name): name for name in reader.specs if name not in experts}
    module, tied = f".{family.experts_module}.", _tied(model)
    state = model.state_dict()
    for name, parameter in state.items():
        if module in name or name in tied:
            continue
        if name not in others:
            raise InputError(f"the source has no tensor for {name}; {remedy(reader, name)}")
        shape = reader.specs[others[name]].shape
        if shape != tuple(parameter.shape):
            raise InputError(
                f"the source's {name} is {list(shape)}, config.json makes it {list(parameter.shape)}; "
                "wrong config.json?"
            )
    for name in tied & set(others):
        _check_tied(reader, others[name], others[_tied_to(model, name)])
    further = int(getattr(hf_config.get_text_config(), "num_nextn_predict_layers", 0) or 0)
    behind = range(len(layers), len(layers) + further)
    strange = {
        disk: name
        for name, disk in others.items()
        if name not in state and not _is_further(name, model) and family.layer_of(name) not in behind
    }
    within = tuple(f"{name}." for name, _ in model.named_children())
    for disk, name in strange.items():
        if name.startswith(within) and not name.endswith(UNUSED):
            raise InputError(
                f"the model that config.json describes has no place for the source's {disk}, and would be loaded "
                "without it; wrong config.json?"
            )
    return frozenset(strange)


def _is_further(name: str, model: Any) -> bool:
    """Whether a tensor is of a module of its own that predicts further tokens, which transformers leaves out, as it
    does the layers behind the last that do so; neither it nor vLLM loads them unless asked to."""
    left_out = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    return predicts_further(name) and any(re.search(pattern, name) for pattern in left_out)


def _check_tied(reader: Reader, head: str, embeddings: str) -> None:
    """Raises InputError where a head that config.json ties to the embeddings is stored and another one: transformers
    then takes it, and vLLM the embeddings."""
    if not torch.equal(reader.tensor(head), reader.tensor(embeddings)):
        raise InputError(
            f"config.json: tie_word_embeddings makes {head} and {embeddings} one, and the source has two that differ; "
            "set tie_word_embeddings to false"
        )


def _tied(model: Any) -> set[str]:
    """Parameters that are others under a second name."""
    keys = getattr(model, "_tied_weights_keys", None) or ()
    return set(keys) if model.config.tie_word_embeddings else set()


def _tied_to(model: Any, name: str) -> str:
    """The parameter that a tied one is."""
    keys = model._tied_weights_keys
    return keys[name] if isinstance(keys, Mapping) else "model.embed_tokens.weight"


class LayerwiseModel:
    """Runs a causal language model of `reader`'s checkpoint in float32 on `device`, layer by layer.

    Embeddings and head are read when they are first needed and dropped by `prepare`. activation: of the experts' gate,
    or of what up gives where they have none; gated: of what gate and up give, or up alone. Raises InputError where
    transformers has no such model or a tensor is missing.
    """

    def __init__(self, reader: Reader, family: Family, hf_config: Any, device: torch.device | None = None) -> None:
        from transformers.activations import ACT2FN

        self._reader, self._family, self._config = reader, family, hf_config
        self.device = device or torch.device("cpu")
        settings = hf_config.get_text_config()
        self.hidden_size: int = settings.hidden_size
        # Families without such a setting have SiLU in their code.
        usual = "silu" if family.row is None else family.row.activation
        name = next(filter(None, (getattr(settings, key, None) for key in ACTIVATION_KEYS)), usual)
        if family.row is not None and name != usual:
            raise InputError(f"the family row says that experts have activation {usual}, transformers {name}; mend it")
        self.activation: Callable[[Tensor], Tensor] = ACT2FN[name]
        self.gated = gated(self.activation, family.swiglu, gate="gate" in family.projections)
        self._blueprints = list(blueprint(hf_config).get_submodule(family.decoder).layers)
        self._recorders = nn.ModuleList(_Recorder(layer, family.returned) for layer in self._blueprints)
        self._injector = _Injector(self._blueprints[0], family.returned)
        self._ends: Any = None
        self._arguments: dict[tuple[int, int], list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}

    @property
    def _model(self) -> Any:
        """The model without its decoder layers, and without what a multimodal one has beside its language model: tokens
        of text never come to it."""
        if self._ends is None:
            model = blueprint(self._config)
            decoder = model.get_submodule(self._family.decoder)
            # Frequencies are computed from the configuration, no checkpoint holds them, nor scales of embeddings.
            for name, module in list(decoder.named_children()):
                if any(buffer.endswith("inv_freq") for buffer, _ in module.named_buffers()):
                    setattr(decoder, name, type(module)(config=decoder.config))
                elif module._non_persistent_buffers_set:
                    for buffer in module._non_persistent_buffers_set:
                        setattr(module, buffer, torch.empty_like(getattr(module, buffer), device="cpu"))
                    model._init_weights(module)
            decoder.layers = nn.ModuleList()
            holder, lead = (model.model, "model.") if self._family.outermost == "model" else (model, "")
            for name in [name for name, _ in holder.named_children() if self._family.beside(f"{lead}{name}.")]:
                setattr(holder, name, None)
            tied, prefix = _tied(model), self._family.layers_prefix
            self._load(model, lambda name: not name.startswith(prefix), lambda name: name, tied)
            if tied:
                model.tie_weights()
            self._ends = model.to(self.device)
        return self._ends

    @property
    def _headed(self) -> Any:
        """Of `_model`, what has `model` and a head."""
        outermost = self._family.outermost
        return self._model if outermost == "model" else self._model.get_submodule(outermost)

    @property
    def _decoder(self) -> Any:
        """Of `_model`, what its layers are in."""
        return self._model.get_submodule(self._family.decoder)

    @property
    def num_layers(self) -> int:
        return len(self._blueprints)

    def embed(self, tokens: Tensor) -> Tensor:
        """Hidden states before the first layer; tokens [batch, seq] -> float32 [batch, seq, hidden]."""
        shape = (int(tokens.shape[0]), int(tokens.shape[1]))
        self._decoder.layers = self._recorders
        with torch.no_grad():
            self._headed.model(input_ids=tokens.to(self.device))
        hidden = self._recorders[0].hidden
        # Masks and rotary tables depend on the batch's shape alone: windows are never padded.
        self._arguments.setdefault(shape, [recorder.arguments for recorder in self._recorders])
        return hidden

    def prepare(self, shapes: Iterable[tuple[int, int]]) -> None:
        """Makes run_layer ready for batches of these shapes (windows, tokens), for which it needs the embeddings; then
        drops embeddings and head: they are not to be in memory together with a layer."""
        for shape in set(shapes) - set(self._arguments):
            self.embed(torch.zeros(shape, dtype=torch.int64))
        self._ends = None

    def load_layer(self, number: int, experts: nn.Module | None) -> nn.Module:
        """One decoder layer in memory, its experts replaced by `experts`; None for a layer that has none."""
        layer = copy.deepcopy(self._blueprints[number])
        if experts is not None:
            layer.set_submodule(self._family.experts_module, nn.Identity())
        prefix = f"{self._family.layers_prefix}{number}."
        self._load(
            layer,
            lambda name: name.startswith(prefix),
            lambda name: name.removeprefix(prefix),
        )
        if experts is not None:
            layer.set_submodule(self._family.experts_module, experts)
        return layer.to(self.device)

    def run_layer(self, number: int, layer: nn.Module, hidden: Tensor) -> Tensor:
        """hidden [batch, seq, hidden] -> the layer's output, of the same shape."""
        shape = (int(hidden.shape[0]), int(hidden.shape[1]))
        if shape not in self._arguments:
            self.embed(torch.zeros(shape, dtype=torch.int64))
        unnamed, named = self._arguments[shape][number]
        output = layer(hidden, *unnamed, **named)
        return output[0] if isinstance(output, tuple) else output

    def logits(self, hidden: Tensor) -> Tensor:
        """Final norm and head: hidden [batch, seq, hidden] -> float32 [batch, seq, vocabulary]."""
        self._injector.hidden = hidden
        self._decoder.layers = nn.ModuleList([self._injector])
        tokens = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=self.device)
        return self._headed(input_ids=tokens).logits.float()

    def _load(
        self,
        module: nn.Module,
        wanted: Callable[[str], bool],
        rename: Callable[[str], str],
        tied: Collection[str] = (),
    ) -> None:
        """Fill a meta module with float32 tensors from disk, by assignment; `tied` are filled by the caller. wanted,
        rename: of tensors by their names in transformers' modules."""
        modules = {self._family.module_name(name): name for name in self._reader.specs}
        names = {rename(module): name for module, name in modules.items() if wanted(module)}
        state = {}
        for parameter in module.state_dict():
            if parameter in names:
                state[parameter] = self._reader.finite(names[parameter]).to(self.device).float()
        module.load_state_dict(state, strict=False, assign=True)
        module.requires_grad_(False)
        held = [*module.named_parameters(), *module.named_buffers()]
        if missing := [name for name, value in held if value.is_meta and name not in tied]:
            raise InputError(f"{self._reader.folder}: no tensor for {missing[0]}; download the model again")


def next_token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Summed negative log-likelihood of the true next tokens, standard causal shift.

    logits: float32 [batch, seq, vocabulary]; tokens: int64 [batch, seq]; the first token of a window is
    context only.
    """
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
