"""The dense model to compress: a folder, or a Hub id that is downloaded into the usual cache."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from d2moe_vllm.checkpoint import DTYPES, ROLES, Dtype, Role, TensorSpec
from offline.errors import InputError
from offline.families import Family, MoEShape, expert_dtype, expert_weights, find_family, read_shape
from offline.layerwise import check_parameters, read_hf_config
from offline.shards import Reader

PATTERNS = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken", "LICENSE*", "*.py"]


def resolve_folder(source: str, revision: str | None = None) -> Path:
    """A local folder for SRC. Raises InputError where it is neither a folder nor a Hub id that can be had."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        if revision:
            raise InputError(f"--revision {revision} makes no sense for the local folder {source}")
        return folder.resolve()
    if not re.fullmatch(r"[\w.\-]+/[\w.\-]+", source) or folder.exists():
        raise InputError(f"{source} is neither a folder nor a Hub id (owner/name)")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=PATTERNS))
    except Exception as error:  # the hub client raises a dozen types: offline, gated, unknown name, disk
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"no folder {source} here, and the Hub model {source} cannot be had: {reason}; "
            "check the name, the network and `hf auth login`"
        ) from None


def read_model_config(folder: Path) -> dict[str, Any]:
    """config.json as it is. Raises InputError."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}); SRC must be a Hugging Face model folder") from None
    if not isinstance(config, dict):
        raise InputError(f"{path}: expected a JSON object")
    return config


@dataclass(frozen=True)
class DenseModel:
    """A dense MoE checkpoint, checked: every expert weight is there, with the shape config.json says.

    dtype: config.json's name of the experts' dtype ("bfloat16").
    """

    folder: Path
    name: str
    revision: str | None
    config: dict[str, Any]
    reader: Reader
    family: Family
    shape: MoEShape
    dtype: Dtype

    @cached_property
    def other_tensors(self) -> Mapping[str, TensorSpec]:
        """All that is not an expert weight, by disk name."""
        experts = expert_weights(self.family, self.shape)
        return {name: spec for name, spec in self.reader.specs.items() if name not in experts}

    @property
    def max_positions(self) -> int | None:
        value = self.config.get("max_position_embeddings")
        return value if isinstance(value, int) else None

    def weights(self, layer: int) -> dict[Role, list[Any]]:
        """All expert weights of one layer, per role and expert [out, in], in their stored dtype.

        Raises CheckpointError for one that is not finite.
        """
        return {
            role: [self.reader.finite(self.family.weight_name(layer, e, role)) for e in range(self.shape.num_experts)]
            for role in ROLES
        }


def open_dense(source: str, revision: str | None = None) -> DenseModel:
    """Open SRC. Raises InputError or CheckpointError for anything that is not a whole, supported dense MoE."""
    folder = resolve_folder(source, revision)
    config = read_model_config(folder)
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise InputError(f"{source} is already compressed or quantized ({method}); give the original model")
    family = find_family(config)
    shape = read_shape(family, config)
    reader = Reader(folder)
    found = expert_dtype(family, shape, reader.specs)
    weights = expert_weights(family, shape)
    prefixes = tuple(family.experts_prefix(layer) + "." for layer in shape.layers)
    if strange := [name for name in reader.specs if name.startswith(prefixes) and name not in weights]:
        raise InputError(f"{source}: expert tensor {strange[0]} does not fit config.json; wrong config.json?")
    dtype: Dtype = next(name for name, stored in DTYPES.items() if stored == found)
    check_parameters(family, read_hf_config(folder), reader.specs)
    is_hub = not Path(source).expanduser().is_dir()
    # A folder's path is nobody's business in a published checkpoint; its name is what a card can say.
    return DenseModel(
        folder=folder,
        name=source if is_hub else folder.name,
        revision=folder.name if is_hub else None,
        config=config,
        reader=reader,
        family=family,
        shape=shape,
        dtype=dtype,
    )
