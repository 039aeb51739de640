"""The dense model to compress: a folder, or a Hub id that is downloaded into the usual cache."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from d2moe_vllm.format.kinds import DTYPE_BYTES, DTYPES, Dtype, Role, TensorSpec
from offline.errors import InputError
from offline.io.shards import TORCH_DTYPES
from offline.source.families import UNSUPPORTED, MoEShape, lookup, read_shape, unsupported
from offline.source.family import Family
from offline.source.folder import Companions, check_weights, find_companions, locate
from offline.source.layerwise import check_parameters, read_hf_config
from offline.source.quantized import read_schemes
from offline.source.served import served_by
from offline.source.stored import (
    ExpertTensor,
    SourceReader,
    StoredExperts,
    expert_tensors,
    find_experts,
)
from offline.source.structure import propose


def read_model_config(folder: Path) -> dict[str, Any]:
    """config.json as it is. Raises InputError."""
    path = folder / "config.json"
    try:
        text = path.read_text(encoding="utf-8")
        if text.startswith("\ufeff"):
            raise InputError(f"{path} begins with a byte-order mark, which transformers does not read; save it without")
        config = json.loads(text)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}); SRC must be a Hugging Face model folder") from None
    if not isinstance(config, dict):
        raise InputError(f"{path}: expected a JSON object")
    try:
        json.dumps(config, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise InputError(f"{path} holds half of a surrogate pair, which is no Unicode; mend it") from None
    return config


HEAD_BIAS = "lm_head.bias"
UNCHECKED = (
    "{family}: its row was given by --family-file, and nobody has checked that vLLM, which serves, computes the model "
    "that transformers does, which calibrates: before you rely on it, compare what `d2moe eval` says of the result's "
    "`d2moe export` with what vLLM says of the same text (docs/methods.md, A family without a row)"
)
"""What a user's own row cannot promise."""


@dataclass(frozen=True)
class DenseModel:
    """A dense MoE checkpoint, checked: every expert weight is there, with the shape config.json says.

    name: a Hub id, or the name of its folder; reader: its tensors as they are computed with, quantized ones as 16-bit
    floats; dtype: config.json's name of the experts' dtype ("bfloat16"); homeless: tensors that lie beside the model,
    which has no place for them; twice: what to say where its weights are there twice.
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
    homeless: frozenset[str]
    twice: str | None

    @cached_property
    def settings(self) -> Mapping[str, Any]:
        """config.json's of the language model."""
        return self.family.settings(self.config)

    @property
    def num_layers(self) -> int:
        """All decoder layers; those with experts are shape.layers."""
        return int(self.settings["num_hidden_layers"])

    @property
    def max_positions(self) -> int | None:
        value = self.settings.get("max_position_embeddings")
        return value if isinstance(value, int) else None

    def weight(self, layer: int, expert: int, role: Role) -> Tensor:
        """One expert weight [out, in], in `dtype`. Raises CheckpointError where it is not finite."""
        return self.experts.weight(layer, expert, role)

    def bias(self, layer: int, expert: int, role: Role) -> Tensor | None:
        """One expert's bias [out], in `dtype`; None where experts have none. Raises CheckpointError likewise."""
        return self.experts.bias(layer, expert, role)

    @cached_property
    def _others(self) -> Mapping[str, str]:
        """Name as it will be written -> stored name, of all that is not an expert weight and has a place."""
        beside = self.experts.names | self.homeless
        return {self.family.disk_name(name): name for name in self.reader.specs if name not in beside}

    @property
    def stored_as(self) -> str:
        """In what numbers weights lie on disk besides plain floats, for a user; empty where there are none."""
        return " and ".join(dict.fromkeys(weight.scheme.what for weight in self.reader.quantized.values()))

    @cached_property
    def companions(self) -> Companions:
        """The files beside the weights."""
        return find_companions(self.folder, self.reader.files)

    @property
    def remarks(self) -> list[str]:
        """What a user should know of the source, in lines: what is read, and what a result will not have."""
        told = [self.twice] if self.twice else []
        if self.family.row:
            told.append(UNCHECKED.format(family=self.family.model_type))
            told.append(served_by(self.config))
        if self.stored_as:
            told.append(f"the source's weights are {self.stored_as}; they are read as {self.dtype}")
        if self.family.remark and (remark := self.family.remark(self.settings)):
            told.append(remark)
        if HEAD_BIAS in self.reader.specs and self.reader.tensor(HEAD_BIAS).any():
            told.append(f"vLLM loads {HEAD_BIAS} and leaves it out of its logits; what is measured here has it in them")
        if self.homeless:
            names = sorted(self.homeless)
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            told.append(f"left out, as the model has no place for them: {', '.join(names[:3])}{more}")
        if files := self.companions.summary():
            told.append(f"files left out: {files}")
        return told

    @property
    def left_out(self) -> dict[str, Any]:
        """What is in the source and will not be in a result: tensors, and files with the reason."""
        return {"tensors": sorted(self.homeless), "files": self.companions.left_out}

    @cached_property
    def other_tensors(self) -> Mapping[str, TensorSpec]:
        """All that is not an expert weight, as it will be written: by the released checkpoints' names,
        which vLLM knows, and dequantised."""
        return {written: self.reader.specs[name] for written, name in self._others.items()}

    @property
    def expert_bytes(self) -> int:
        """Of the experts' weights, in `dtype`: those of a quantized original as they are read."""
        experts = len(self.shape.layers) * self.shape.num_experts
        return experts * self.shape.expert_parameters * DTYPE_BYTES[DTYPES[self.dtype]]

    def kept_experts(self, layer: int) -> Mapping[str, TensorSpec]:
        """The expert weights of a layer that stays dense, as they will be written: in the released layout."""
        stored = DTYPES[self.dtype]
        tensors = expert_tensors(self.shape, self.family.layouts[0], [layer])
        return {name: TensorSpec(stored, tensor.shape) for name, tensor in tensors}

    def other_tensor(self, name: str) -> Tensor:
        """A tensor of other_tensors or of some layer's kept_experts. Raises CheckpointError, KeyError."""
        if name in self._others:
            return self.reader.tensor(self._others[name])
        stored, released = self.experts, self.family.layouts[0]
        as_released = stored.layout == released and stored.transposed == released.transposed
        if name in stored.names and as_released:
            return self.reader.tensor(name)
        return self._released[name].assemble(self.weight, self.bias, TORCH_DTYPES[DTYPES[self.dtype]])

    @cached_property
    def _released(self) -> Mapping[str, ExpertTensor]:
        """The expert tensors of the released layout by their names."""
        return dict(expert_tensors(self.shape, self.family.layouts[0], self.shape.layers))


def _floats(*settings: Mapping[str, Any]) -> str:
    """What quantized weights are read as."""
    half = "float16" in (one.get(key) for one in settings for key in ("dtype", "torch_dtype"))
    return "F16" if half else "BF16"


def open_dense(source: str, revision: str | None = None) -> DenseModel:
    """Open SRC. Raises InputError or CheckpointError for anything that is not a whole, supported dense MoE, and
    ProposalError where its family has no row and could have one."""
    located = locate(source, revision)
    folder = located.folder
    config = read_model_config(folder)
    try:
        schemes = read_schemes(folder, config)
    except InputError as error:
        raise InputError(f"{source} is {error}") from None
    family = lookup(config)
    if family is None:
        if reason := UNSUPPORTED.get(str(config.get("model_type"))):
            raise unsupported(config, reason)
        try:
            check_weights(folder)
        except InputError as error:
            raise unsupported(config, f"it has no row, and cannot be looked at ({error})") from None
        raise propose(SourceReader(folder, schemes, dtype=_floats(config, config)), config)
    shape = read_shape(family, config)
    positions = family.settings(config).get("max_position_embeddings")
    if isinstance(positions, int) and positions < 2:
        raise InputError(
            f"config.json: max_position_embeddings is {positions}, less than two tokens; wrong config.json?"
        )
    twice = check_weights(folder)
    reader = SourceReader(folder, schemes, dtype=_floats(config, family.settings(config)))
    experts = find_experts(family, shape, reader, shape.layers)
    dtype: Dtype = next(name for name, stored in DTYPES.items() if stored == experts.dtype)
    homeless = check_parameters(family, read_hf_config(folder), reader, shape.layers, experts.names)
    return DenseModel(
        folder=folder,
        name=located.name,
        revision=located.revision,
        config=config,
        reader=reader,
        family=family,
        shape=shape,
        experts=experts,
        dtype=dtype,
        homeless=homeless,
        twice=twice,
    )
