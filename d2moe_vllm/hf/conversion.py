"""Turning a dense transformers model into the compressed one that a checkpoint holds.

Used by both ways into plain transformers: the classes of modeling_d2moe.py, into which this is copied for
checkpoints, and the quantizer (quantizer.py).
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import transformers
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.utils.quantization_config import QuantizationConfigMixin

from d2moe_vllm.format.kinds import KINDS, SCALES
from d2moe_vllm.hf.checks import check_files, d2moe_config
from d2moe_vllm.hf.experts import D2Experts

SCOPES = ("batch", "token", "off")


class D2MoEQuantizationConfig(QuantizationConfigMixin):
    """A checkpoint's `quantization_config` in the form transformers wants: its fields as attributes."""

    def __init__(self, **fields: Any) -> None:
        self.quant_method = "d2moe"
        self.__dict__.update(fields)


def decoder_of(model: Any) -> Any:
    """The module that has a model's decoder layers. Llama 4 gives as its decoder what has that in turn."""
    found = model.get_decoder()
    return found if hasattr(found, "layers") else getattr(found, "model", found)


def convert(model: Any, settings: Mapping[str, Any]) -> None:
    """Puts D2Experts in the place of a model's dense experts, and makes it a D2Mixin. Its weights come later.

    model: a PreTrainedModel, perhaps a multimodal one, fresh from its class's `__init__`.
    settings: `quantization_config`. Raises ValueError, in one line, where a layer has no experts to replace.
    """
    within = settings["experts"].partition(".layers.")[0]
    if "." in within and model.base_model.get_decoder() is model.base_model:
        raise ValueError(
            f"{type(model).__name__} is the language model alone of a multimodal checkpoint; load it with "
            "AutoModelForImageTextToText"
        )
    config, layers = model.config.get_text_config(), decoder_of(model).layers
    names = (getattr(config, key, None) for key in ("hidden_act", "hidden_activation", "mlp_hidden_act"))
    usual = (settings.get("family_row") or {}).get("activation", "silu")
    activation = next(filter(None, names), usual)
    for number, layer in settings["layers"].items():
        _replace_experts(layers[int(number)], number, layer, settings, ACT2FN[activation])
    # Layers that predict further tokens ride along in a checkpoint; transformers has no modules for them.
    for number in range(len(layers), len(layers) + (getattr(config, "num_nextn_predict_layers", 0) or 0)):
        model._keys_to_ignore_on_load_unexpected.add(rf"model\.layers\.{number}\.")
    # What selections are made by, and scales, which float16 might not hold.
    model._keep_in_fp32_modules_strict |= {"base_norms", *(kind.name + SCALES for kind in KINDS)}
    model.base_model.register_forward_pre_hook(_note_padding, with_kwargs=True)
    model._d2moe_shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if not isinstance(model, D2Mixin):
        model.__class__ = d2_class(model.__class__)


def _replace_experts(
    parent: nn.Module, number: str, layer: Mapping[str, Any], settings: Mapping[str, Any], activation: Any
) -> None:
    """Of one decoder layer. Families differ in where they keep their experts, but all call them `experts`."""
    names = [name for name, _ in parent.named_modules() if name.rpartition(".")[2] == "experts"]
    if len(names) != 1:
        raise ValueError(f"layer {number} of {type(parent).__name__} has no experts; restore the original config.json")
    path, _, name = names[0].rpartition(".")
    dense = parent.get_submodule(names[0])
    if isinstance(dense, D2Experts):
        raise ValueError(f"layer {number} has compressed experts already; load the checkpoint anew")
    experts = D2Experts(
        settings["num_experts"],
        settings["hidden_size"],
        settings["intermediate_size"],
        layer,
        groups=settings["pruning"].get("groups", 8),
        projections=settings["projections"],
        dtype=settings["dtype"],
        activation=activation,
        swiglu=settings.get("swiglu"),
        scope=settings["pruning"].get("scope", "off"),
    )
    experts.in_place = True
    parent.get_submodule(path).register_module(name, experts)


def refuse_incomplete(model: Any) -> None:
    """Raises ValueError, in one line, if transformers did not find in the files exactly what the model has.

    Raises RuntimeError if transformers did not say.
    """
    info = model.__dict__.pop("_d2moe_loading_info", None)
    if info is None:
        raise RuntimeError(
            f"transformers {transformers.__version__} does not report what it loaded; install one that d2moe-vllm "
            "was tested with, such as 5.19.0"
        )
    for problem in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if keys := getattr(info, problem):
            raise ValueError(f"{model.config._name_or_path}: {problem} {sorted(keys)[:3]}; load it as a causal LM")
    # With a quantizer transformers puts up with other shapes.
    expected = model.__dict__.pop("_d2moe_shapes")
    for name, tensor in model.state_dict().items():
        if tensor.shape != expected[name]:
            raise ValueError(
                f"{model.config._name_or_path}: {name} is {tuple(tensor.shape)}, but config.json makes it "
                f"{tuple(expected[name])}; restore the original config.json"
            )


def _note_padding(model: nn.Module, _args: Any, kwargs: Mapping[str, Any]) -> None:
    """Tells the experts which rows are padding, so that these have no say in a selection."""
    mask, tokens = kwargs.get("attention_mask"), kwargs.get("input_ids")
    tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
    padding = None
    if isinstance(mask, Tensor) and mask.dim() == 2 and tokens is not None:
        padding = mask[:, -tokens.shape[1] :].eq(0).reshape(-1)
    for experts in _experts(model):
        experts.padding_mask = padding


def _experts(model: nn.Module) -> Iterator[D2Experts]:
    return (module for module in model.modules() if isinstance(module, D2Experts))


def _local_folder(source: Any, kwargs: Mapping[str, Any]) -> str:
    """The folder that holds the checkpoint, downloaded first if source is a Hub id."""
    if os.path.isdir(source):
        return os.path.join(source, kwargs.get("subfolder") or "")
    from huggingface_hub import snapshot_download

    options = {key: kwargs[key] for key in ("revision", "cache_dir", "token", "local_files_only") if key in kwargs}
    folder = snapshot_download(str(source), allow_patterns=["*.json", "*.safetensors"], **options)
    return os.path.join(folder, kwargs.get("subfolder") or "")


class D2Mixin(nn.Module):
    """What every d2moe model class adds to its family's own. For a dense config it changes nothing."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        scope = kwargs.pop("d2moe_scope", None)
        super().__init__(config, *args, **kwargs)
        settings = d2moe_config(config)
        if settings is not None:
            convert(self, settings)
            if scope is not None:
                self.d2moe_scope = scope

    @property
    def d2moe_scope(self) -> str:
        """Who shares one selection of base columns: "batch", "token" or "off". May be set."""
        return next((experts.scope for experts in _experts(self)), "off")

    @d2moe_scope.setter
    def d2moe_scope(self, scope: str) -> None:
        if scope not in SCOPES:
            raise ValueError(f"d2moe_scope is {scope!r}, not batch, token or off")
        for experts in _experts(self):
            experts.scope = scope

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """transformers' own, after refusing (ValueError, one line) a checkpoint that is not whole.

        d2moe_scope="token" overrides the checkpoint's scope of dynamic column selection.
        """
        config = kwargs.get("config")
        if config is None or isinstance(config, (str, os.PathLike)):
            names = ("revision", "cache_dir", "token", "local_files_only", "subfolder")
            options = {key: kwargs[key] for key in names if key in kwargs}
            config = cls.config_class.from_pretrained(config or pretrained_model_name_or_path, **options)
        settings = d2moe_config(config)
        if settings is None:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        further = kwargs.pop("quantization_config", None)
        # Programs such as lm-eval hand over what they found in the checkpoint.
        if further is not None and getattr(further, "quant_method", None) != "d2moe":
            raise ValueError("a d2moe checkpoint cannot be quantized further; leave out quantization_config")
        if pretrained_model_name_or_path is not None:
            check_files(_local_folder(pretrained_model_name_or_path, kwargs), settings)
        # This class converts itself: under its usual name transformers would warn about a quantization type that it
        # does not know, or, if it knows it, have our quantizer convert the model a second time.
        config = copy.deepcopy(config)
        del config.quantization_config
        config.d2moe = settings
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **{**kwargs, "config": config})
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        refuse_incomplete(model)
        model.config.quantization_config = D2MoEQuantizationConfig(**model.config.__dict__.pop("d2moe"))
        return loaded

    def _adjust_missing_and_unexpected_keys(self, loading_info: Any) -> None:
        super()._adjust_missing_and_unexpected_keys(loading_info)
        if d2moe_config(self.config) is not None:
            self._d2moe_loading_info = loading_info

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        if d2moe_config(self.config) is not None:
            raise NotImplementedError(
                "a d2moe model cannot be saved from transformers; copy the checkpoint's folder instead"
            )
        super().save_pretrained(save_directory, *args, **kwargs)


@cache
def d2_class(base: Any) -> Any:
    """The compressed counterpart of a dense model class, of the same name with D2 before it."""
    content = {
        "__doc__": f"{base.__name__} with compressed experts.",
        "__module__": D2Mixin.__module__,
        "config_class": base.config_class,
    }
    return type(f"D2{base.__name__}", (D2Mixin, base), content)
