"""d2moe as a quantization method of transformers: `from_pretrained` loads compressed checkpoints by itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer

from d2moe_vllm.hf import modeling_d2moe
from d2moe_vllm.hf.checks import MANIFEST, check_files, d2moe_config
from d2moe_vllm.hf.conversion import D2MoEQuantizationConfig, convert, refuse_incomplete

METHOD = "d2moe"


class D2MoEQuantizer(HfQuantizer):
    """Converts the dense model that transformers made of config.json, before weights are loaded into it.

    Refuses what D2Mixin refuses, with the same ValueErrors.
    """

    requires_calibration = True  # what transformers calls a method that cannot compress while loading

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        settings = d2moe_config(model.config)
        if settings is None:
            raise ValueError(f"{model.config._name_or_path}: quantization_config is not d2moe's")
        if checkpoint_files:
            check_files(str(_with_manifest(Path(checkpoint_files[0]).parent)), settings)
        convert(model, settings)
        # From here on it is a model like any other. Of one that is called quantized, transformers would leave tensors
        # in the files' dtype where it renames them.
        self.pre_quantized = False

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        self.pre_quantized = True
        refuse_incomplete(model)
        return model

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return False


def _with_manifest(folder: Path) -> Path:
    """A checkpoint's folder; into a snapshot of the Hub its manifest is fetched, which transformers leaves out."""
    # .../models--OWNER--NAME/snapshots/COMMIT[/SUBFOLDER]
    parents = [folder, *folder.parents]
    commit = next((path for path in parents if path.parent.name == "snapshots"), None)
    if commit is None or (folder / MANIFEST).exists() or not commit.parent.parent.name.startswith("models--"):
        return folder
    repository = commit.parent.parent
    try:
        hf_hub_download(
            repository.name.removeprefix("models--").replace("--", "/"),
            (folder / MANIFEST).relative_to(commit).as_posix(),
            revision=commit.name,
            cache_dir=repository.parent,
        )
    except (EntryNotFoundError, LocalEntryNotFoundError):
        pass  # check_files will say that it is missing
    except HfHubHTTPError as error:
        # transformers does not hand on the token that from_pretrained was given.
        raise ValueError(
            f"{repository.name}: {MANIFEST} cannot be fetched ({type(error).__name__}); for a private repository set "
            "HF_TOKEN or use 'hf auth login', since token= does not reach this file"
        ) from None
    return folder


def register() -> None:
    """Makes transformers know d2moe, and the families that it has no model_type of. Again is harmless."""
    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(D2MoEQuantizationConfig)
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(METHOD)(D2MoEQuantizer)
    for name in modeling_d2moe.OWN:
        model_class = getattr(modeling_d2moe, name)
        config_class = model_class.config_class
        family = config_class.model_type
        if not (family in CONFIG_MAPPING and CONFIG_MAPPING[family].__module__.startswith("transformers.")):
            AutoConfig.register(family, config_class, exist_ok=True)
            AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)
