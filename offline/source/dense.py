"""The dense model to compress: a folder, or a Hub id that is downloaded into the usual cache."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from d2moe_vllm.format.kinds import DTYPES, Dtype, Role, TensorSpec
from offline.errors import InputError
from offline.io.shards import TORCH_DTYPES
from offline.source.families import Family, MoEShape, find_family, read_shape
from offline.source.layerwise import check_parameters, read_hf_config
from offline.source.stored import (
    ExpertTensor,
    SourceReader,
    StoredExperts,
    expert_tensors,
    find_experts,
    read_fp8_blocks,
)

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

    reader: its tensors as they are computed with, fp8 ones dequantised to bfloat16.
    dtype: config.json's name of the experts' dtype ("bfloat16").
    """

    folder: Path
    name: str
    revision: str | None
    config: dict[str, Any]
    reader: SourceReader
    family: Family
    shape: MoEShape
    experts: StoredExperts
    dtype: Dtype

    @property
    def num_layers(self) -> int:
        """All decoder layers; those with experts are shape.layers."""
        return int(self.config["num_hidden_layers"])

    @property
    def max_positions(self) -> int | None:
        value = self.config.get("max_position_embeddings")
        return value if isinstance(value, int) else None

    def weight(self, layer: int, expert: int, role: Role) -> Tensor:
        """One expert weight [out, in], in `dtype`. Raises CheckpointError where it is not finite."""
        return self.experts.weight(layer, expert, role)

    @cached_property
    def _others(self) -> Mapping[str, str]:
        """Name as it will be written -> stored name, of all that is not an expert weight."""
        return {self.family.disk_name(name): name for name in self.reader.specs if name not in self.experts.names}

    @cached_property
    def other_tensors(self) -> Mapping[str, TensorSpec]:
        """All that is not an expert weight, as it will be written: by the released checkpoints' names,
        which vLLM knows, and dequantised."""
        return {written: self.reader.specs[name] for written, name in self._others.items()}

    def kept_experts(self, layer: int) -> Mapping[str, TensorSpec]:
        """The expert weights of a layer that stays dense, as they will be written: in the released layout."""
        stored = DTYPES[self.dtype]
        tensors = expert_tensors(self.shape, self.family.layouts[0], [layer])
        return {name: TensorSpec(stored, tensor.shape) for name, tensor in tensors}

    def other_tensor(self, name: str) -> Tensor:
        """A tensor of other_tensors or of some layer's kept_experts. Raises CheckpointError, KeyError."""
        if name in self._others:
            return self.reader.tensor(self._others[name])
        if name in self.experts.names and self.experts.layout == self.family.layouts[0] and not self.experts.transposed:
            return self.reader.tensor(name)
        return self._released[name].assemble(self.weight, TORCH_DTYPES[DTYPES[self.dtype]])

    @cached_property
    def _released(self) -> Mapping[str, ExpertTensor]:
        """The expert tensors of the released layout by their names."""
        return dict(expert_tensors(self.shape, self.family.layouts[0], self.shape.layers))


def open_dense(source: str, revision: str | None = None) -> DenseModel:
    """Open SRC. Raises InputError or CheckpointError for anything that is not a whole, supported dense MoE."""
    folder = resolve_folder(source, revision)
    config = read_model_config(folder)
    try:
        fp8_blocks = read_fp8_blocks(config)
    except InputError as error:
        raise InputError(f"{source} is {error}") from None
    family = find_family(config)
    shape = read_shape(family, config)
    positions = config.get("max_position_embeddings")
    if isinstance(positions, int) and positions < 2:
        raise InputError(
            f"config.json: max_position_embeddings is {positions}, less than two tokens; wrong config.json?"
        )
    reader = SourceReader(folder, fp8_blocks)
    experts = find_experts(family, shape, reader, shape.layers)
    dtype: Dtype = next(name for name, stored in DTYPES.items() if stored == experts.dtype)
    check_parameters(family, read_hf_config(folder), reader.specs, shape.layers)
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
        experts=experts,
        dtype=dtype,
    )
