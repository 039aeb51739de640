"""Plain transformers models whose experts are a d2moe checkpoint's: shared pruned base, low-rank deltas.

This file travels inside every checkpoint, where it must work without d2moe-vllm installed: its imports of
ours are replaced by those files' source when it is written (see this package's
`checkpoint_modeling_source`), and the rest imports transformers, torch and safetensors only.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

from d2moe_vllm.hf.experts import INDEX_KINDS, D2Experts, projection_shapes
from d2moe_vllm.hf.modeling_deepseek import DeepseekForCausalLM

FORMAT_VERSION = 1
DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


def d2moe_config(config: Any) -> dict[str, Any] | None:
    """The checkpoint's own configuration, or None for a dense model. Raises ValueError, in one line."""
    content = getattr(config, "d2moe", None) or getattr(config, "quantization_config", None)
    if not isinstance(content, dict) or content.get("quant_method") != "d2moe":
        return None
    if content.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"d2moe format version {content.get('format_version')!r} is not supported (this file reads version "
            f"{FORMAT_VERSION}); use the modeling_d2moe.py that came with the checkpoint"
        )
    if lacking := {"layers", "projections", "pruning", "experts", "num_experts"} - set(content):
        raise ValueError(f"quantization_config lacks {', '.join(sorted(lacking))}; restore the original config.json")
    return content


def replace_experts(model: nn.Module, settings: Mapping[str, Any], activation: Any, experts_path: str) -> None:
    """Puts D2Experts in place of `model.layers[i].{experts_path}` for every layer the checkpoint lists."""
    for number, layer in settings["layers"].items():
        parent_path, _, name = experts_path.rpartition(".")
        parent = model.layers[int(number)].get_submodule(parent_path)
        experts = D2Experts(
            settings["num_experts"],
            settings["hidden_size"],
            settings["intermediate_size"],
            layer,
            groups=settings["pruning"].get("groups", 8),
            projections=settings["projections"],
            activation=activation,
            scope=settings["pruning"].get("scope", "off"),
        )
        setattr(parent, name, experts)


def check_files(folder: str, settings: Mapping[str, Any]) -> None:
    """Refuse files that are not what config and manifest say. Raises ValueError, one line, naming a tensor."""
    manifest = _read_json(folder, "d2moe_manifest.json")
    if not isinstance(manifest, dict) or manifest.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"{folder}: d2moe_manifest.json is not of format version {FORMAT_VERSION}; copy it again")
    try:
        expected = {name: (dtype, tuple(shape)) for name, (dtype, shape) in manifest["other_tensors"].items()}
        sizes = {file: int(entry["bytes"]) for file, entry in manifest["files"].items()}
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ValueError(
            f"{folder}: d2moe_manifest.json lacks other_tensors or files, or they are damaged; copy it again"
        ) from None
    expected.update(_expert_tensors(settings))
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    paths: dict[str, str] = {}
    for file in sorted(sizes):
        path = os.path.join(folder, file)
        if os.path.basename(file) != file:
            raise ValueError(f"{folder}: d2moe_manifest.json names {file!r}, which is no file of this folder")
        if not os.path.isfile(path):
            raise ValueError(f"{folder}: weight file {file} is missing; copy it again")
        try:
            with safe_open(path, framework="pt") as handle:
                slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 - not a dict
                found.update({name: (s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()})
                paths.update(dict.fromkeys(slices, path))
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: damaged or truncated ({error}); copy it again") from None
    for problem, names in (
        ("missing", [name for name in expected if name not in found]),
        ("do not belong here", [name for name in found if name not in expected]),
    ):
        if names:
            raise ValueError(f"{folder}: {len(names)} tensors {problem}: {', '.join(names[:3])}; copy it again")
    for name, spec in expected.items():
        if found[name] != spec:
            raise ValueError(f"{folder}: {name} is {found[name]}, expected {spec}; copy the checkpoint again")
    for file, size in sizes.items():
        if os.path.getsize(os.path.join(folder, file)) != size:
            raise ValueError(f"{folder}: weight file {file} is truncated or replaced; copy it again")
    for number in settings["layers"]:
        _check_indices(folder, settings, str(number), paths)


def _check_indices(folder: str, settings: Mapping[str, Any], number: str, paths: Mapping[str, str]) -> None:
    """A layer's columns and U indices are what the format says, and the same for gate and up where these share them."""
    layer, groups = settings["layers"][number], settings["pruning"].get("groups", 8)
    trimmed = torch.tensor([expert in layer.get("trimmed", ()) for expert in range(settings["num_experts"])])
    tensors = [(name, role, kind) for name, role, kind, _ in _layer_tensors(settings, number) if kind in INDEX_KINDS]
    indices: dict[str, Tensor] = {}
    for path in sorted({paths[name] for name, _, _ in tensors}):
        with safe_open(path, framework="pt") as handle:
            indices.update({name: handle.get_tensor(name).long() for name, _, _ in tensors if paths[name] == path})
    shared: dict[str, Tensor] = {}
    for name, role, kind in tensors:
        values = indices[name]
        if kind == "u_index":
            stored = layer[role]["distinct_u"]
            if not (torch.where(trimmed, values == -1, (values >= 0) & (values < stored))).all():
                raise ValueError(
                    f"{folder}: {name}: must be -1 for trimmed experts and lie in 0..{stored - 1} for all others; "
                    "copy the checkpoint again"
                )
        else:
            inputs = settings["intermediate_size" if role == "down" else "hidden_size"]
            expected = torch.arange(groups).repeat_interleave(len(values) // groups)
            if not (values.diff() > 0).all() or not torch.equal(values * groups // inputs, expected):
                raise ValueError(
                    f"{folder}: {name}: columns must ascend, lie in 0..{inputs - 1} and be spread evenly over "
                    f"{groups} groups; copy the checkpoint again"
                )
        if role != "down" and kind != "delta_columns" and not torch.equal(values, shared.setdefault(kind, values)):
            raise ValueError(f"{folder}: {name} differs between gate and up, which share it; copy it again")


def _layer_tensors(settings: Mapping[str, Any], number: str) -> Iterator[tuple[str, str, str, tuple[int, ...]]]:
    """(name, role, kind, shape) of all of a layer's expert tensors."""
    hidden, intermediate = settings["hidden_size"], settings["intermediate_size"]
    prefix, layer = settings["experts"].replace("{layer}", number), settings["layers"][number]
    for role, projection in settings["projections"].items():
        sizes = (hidden, intermediate) if role == "down" else (intermediate, hidden)
        shapes = projection_shapes(layer[role], layer.get("trimmed", ()), settings["num_experts"], *sizes)
        for expert, kind, shape in shapes:
            yield f"{prefix}.{expert}.{projection}.{kind}", role, kind, shape


def _expert_tensors(settings: Mapping[str, Any]) -> Iterator[tuple[str, tuple[str, tuple[int, ...]]]]:
    dtypes = {**dict.fromkeys(INDEX_KINDS, "I32"), "base_norms": "F32"}
    for number in settings["layers"]:
        for name, _, kind, shape in _layer_tensors(settings, str(number)):
            yield name, (dtypes.get(kind, DTYPES[settings["dtype"]]), shape)


def _read_json(folder: str, name: str) -> Any:
    try:
        with open(os.path.join(folder, name), encoding="utf-8") as file:
            return json.load(file)
    except FileNotFoundError:
        raise ValueError(f"{folder}: {name} is missing; copy the whole checkpoint again") from None
    except ValueError as error:
        raise ValueError(f"{folder}: {name} is not readable as JSON ({error}); copy it again") from None


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

    experts_path: str
    _keep_in_fp32_modules_strict = ["base_norms"]  # noqa: RUF012 - transformers' declaration

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        scope = kwargs.pop("d2moe_scope", None)
        super().__init__(config, *args, **kwargs)
        settings = d2moe_config(config)
        if settings is None:
            return
        # Layers that predict further tokens ride along in a checkpoint; transformers has no modules for them.
        first = config.num_hidden_layers
        for number in range(first, first + (getattr(config, "num_nextn_predict_layers", 0) or 0)):
            self._keys_to_ignore_on_load_unexpected.add(rf"model\.layers\.{number}\.")
        model: Any = self.model
        replace_experts(model, settings, ACT2FN[config.hidden_act], self.experts_path)
        model.register_forward_pre_hook(self._note_padding, with_kwargs=True)
        if scope is not None:
            self.d2moe_scope = scope

    @property
    def d2moe_scope(self) -> str:
        """Who shares one selection of base columns: "batch", "token" or "off". May be set."""
        return next((experts.scope for experts in self._experts()), "off")

    @d2moe_scope.setter
    def d2moe_scope(self, scope: str) -> None:
        if scope not in ("batch", "token", "off"):
            raise ValueError(f"d2moe_scope is {scope!r}, not batch, token or off")
        for experts in self._experts():
            experts.scope = scope

    def _experts(self) -> Iterator[D2Experts]:
        return (module for module in self.modules() if isinstance(module, D2Experts))

    def _note_padding(self, _model: nn.Module, _args: Any, kwargs: Mapping[str, Any]) -> None:
        """Tells the experts which rows are padding, so that these have no say in a selection."""
        mask, tokens = kwargs.get("attention_mask"), kwargs.get("input_ids")
        tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
        padding = None
        if isinstance(mask, Tensor) and mask.dim() == 2 and tokens is not None:
            padding = mask[:, -tokens.shape[1] :].eq(0).reshape(-1)
        for experts in self._experts():
            experts.padding_mask = padding

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
        if pretrained_model_name_or_path is not None:
            check_files(_local_folder(pretrained_model_name_or_path, kwargs), settings)
        config = copy.deepcopy(config)
        # Under its usual name transformers would warn about a quantization type it does not know.
        config.d2moe = config.__dict__.pop("quantization_config", settings)
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, *args, **{**kwargs, "config": config, "output_loading_info": True}
        )
        for problem in ("missing_keys", "mismatched_keys", "unexpected_keys"):
            if info[problem]:
                raise ValueError(f"{pretrained_model_name_or_path}: {problem} {sorted(info[problem])[:3]}")
        model.config.quantization_config = model.config.__dict__.pop("d2moe")
        return (model, info) if wants_info else model

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        if d2moe_config(self.config) is not None:
            raise NotImplementedError(
                "a d2moe model cannot be saved from transformers; copy the checkpoint's folder instead"
            )
        super().save_pretrained(save_directory, *args, **kwargs)


STOCK_CLASSES = {
    "D2MixtralForCausalLM": ("MixtralForCausalLM", "mlp.experts"),
    "D2PhimoeForCausalLM": ("PhimoeForCausalLM", "mlp.experts"),
    "D2Qwen2MoeForCausalLM": ("Qwen2MoeForCausalLM", "mlp.experts"),
    "D2Qwen3MoeForCausalLM": ("Qwen3MoeForCausalLM", "mlp.experts"),
    "D2OlmoeForCausalLM": ("OlmoeForCausalLM", "mlp.experts"),
    "D2DeepseekForCausalLM": (DeepseekForCausalLM, "mlp.experts"),
    "D2DeepseekV2ForCausalLM": ("DeepseekV2ForCausalLM", "mlp.experts"),
    "D2DeepseekV3ForCausalLM": ("DeepseekV3ForCausalLM", "mlp.experts"),
    "D2KimiK2ForCausalLM": ("DeepseekV3ForCausalLM", "mlp.experts"),
    "D2GraniteMoeForCausalLM": ("GraniteMoeForCausalLM", "block_sparse_moe.experts"),
}
"""Class of a checkpoint's auto_map -> the dense class (a name of transformers') and the path of its experts."""


def __getattr__(name: str) -> Any:
    """Makes the class that a checkpoint asks for: transformers may be too old for the other families."""
    if name == "KimiK2Config":
        made = type(name, (transformers.DeepseekV3Config,), {"model_type": "kimi_k2", "__module__": __name__})
        # The modules are DeepSeek-V3's, and so are the names on disk.
        register_checkpoint_conversion_mapping("kimi_k2", get_checkpoint_conversion_mapping("deepseek_v3"), True)
    elif name in STOCK_CLASSES:
        stock, experts_path = STOCK_CLASSES[name]
        base: Any = getattr(transformers, stock) if isinstance(stock, str) else stock
        widened = getattr(base, "_keep_in_fp32_modules_strict", None) or ()
        content = {
            "__doc__": f"{base.__name__} with compressed experts.",
            "__module__": __name__,
            "experts_path": experts_path,
            "config_class": __getattr__("KimiK2Config") if name == "D2KimiK2ForCausalLM" else base.config_class,
            "_keep_in_fp32_modules_strict": [*D2Mixin._keep_in_fp32_modules_strict, *widened],
        }
        made = type(name, (D2Mixin, base), content)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals().setdefault(name, made)
