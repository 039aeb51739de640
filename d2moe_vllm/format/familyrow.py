"""A model family that d2moe has no row of, as its user describes it: the content of a --family-file.

A checkpoint that was made with one carries it in `quantization_config`, so that nobody needs the file any more.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from d2moe_vllm.format.kinds import ROLES, Role, roles_of

_PART = r"[A-Za-z0-9_\-]+"


def _word(value: str) -> str:
    if len(value) > _LONGEST or not re.fullmatch(_PART, value):
        raise ValueError(f"{value[:80]!r} is no name; write letters, digits, - and _")
    return value


def _path(value: str) -> str:
    if len(value) > _LONGEST or not re.fullmatch(rf"{_PART}(\.{_PART})*", value):
        raise ValueError(f"{value[:80]!r} is no path of modules; write it as mlp.experts")
    return value


def _pattern(value: str) -> str:
    _path(value.replace("{layer}", "0").replace("{expert}", "0"))
    if value.count("{layer}") != 1 or value.count("{expert}") > 1:
        raise ValueError(f"{value!r} needs {{layer}} once, where a layer's number stands, and {{expert}} once at most")
    return value


def _substring(value: str) -> str:
    if not 3 <= len(value) <= _LONGEST or not re.fullmatch(r"[A-Za-z0-9_.\-]+", value):
        raise ValueError(f"{value[:80]!r} is no part of a tensor's name; write it with its dots, as .gate.weight")
    return value


_LONGEST = 200
"""Characters of a name."""
Word = Annotated[str, AfterValidator(_word)]
Path = Annotated[str, AfterValidator(_path)]
Pattern = Annotated[str, AfterValidator(_pattern)]
Substring = Annotated[str, AfterValidator(_substring)]


def fit_names(projections: Mapping[Role, str]) -> bool:
    """Whether names of projections are those of experts with a gate or of experts without, each another."""
    return roles_of(projections) in (ROLES, ROLES[1:]) and len(set(projections.values())) == len(projections)


class _Described(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ReleasedRow(_Described):
    """Names of the tensors that hold a layer's experts where that is not one tensor for each expert and projection.

    With {expert}: one expert's matrices; without: stacks [experts, out, in], or [experts, in, out] where `transposed`.
    Where gate and up have one name they lie in one matrix, gate's outputs first. gate: None of experts that have none.
    """

    gate: Pattern | None = None
    up: Pattern
    down: Pattern
    transposed: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """Of those that there are."""
        return tuple(name for name in (self.gate, self.up, self.down) if name is not None)

    @model_validator(mode="after")
    def _fits(self) -> ReleasedRow:
        if len({"{expert}" in name for name in self.names}) > 1:
            raise ValueError("all names have {expert}, or none")
        if self.down in (self.gate, self.up):
            raise ValueError("down has a tensor of its own; give it another name than gate and up")
        if self.transposed and "{expert}" in self.down:
            raise ValueError("transposed is for stacks, whose names have no {expert}; leave it out")
        return self


class FamilyRow(_Described):
    """Where a family has its experts, on disk and in transformers, and which keys of config.json tell their sizes.

    model_type: of config.json, which transformers has to know. experts: prefix of a layer's experts, with {layer}, as
    vLLM's loader of the family routes it; the tensors of a compressed expert are named
    `<experts>.<expert>.<projection>.<kind>`. projections: role -> its name there, without gate where experts have none.
    activation: of what gate gives, or up where there is no gate. decoder: path of the module that has
    the decoder's `layers`. experts_module: path of the experts within such a layer. dense_keys: config.json's keys that
    say which layers have no experts. renames: parts of names on disk -> the same in transformers' modules. released:
    None where each expert has a tensor for each projection, `<experts>.<expert>.<projection>.weight`.
    """

    model_type: Word
    experts: Pattern
    projections: dict[Role, Word]
    activation: Literal["silu", "relu2"] = "silu"
    decoder: Path = "model"
    experts_module: Path = "mlp.experts"
    num_experts_key: Word = "num_experts"
    experts_per_token_key: Word = "num_experts_per_tok"
    intermediate_size_key: Word = "moe_intermediate_size"
    dense_keys: tuple[Word, ...] = Field(default=(), max_length=20)
    renames: dict[Substring, Substring] = Field(default={}, max_length=50)
    released: ReleasedRow | None = None

    @model_validator(mode="after")
    def _fits(self) -> FamilyRow:
        if not fit_names(self.projections):
            raise ValueError("projections must name gate, up and down, or up and down alone, each differently")
        if self.released and (self.released.gate is None) == ("gate" in self.projections):
            raise ValueError("released has to name gate where projections do, and only there")
        if self.decoder.partition(".")[0] != "model":
            raise ValueError(f"decoder {self.decoder!r} is not within `model`, which no reader here can run")
        if self.experts_module.rpartition(".")[2] != "experts":
            raise ValueError(f"experts_module {self.experts_module!r} must end with `experts`, the name looked for")
        prefix = f"{self.decoder}.layers.{{layer}}."
        names = [self.experts, *(self.released.names if self.released else ())]
        if wrong := next((name for name in names if not name.startswith(prefix)), None):
            raise ValueError(f"{wrong!r} is not within {prefix!r}, where decoder says that layers are")
        if "{expert}" in self.experts:
            raise ValueError(f"experts {self.experts!r} is the prefix before the expert's number; leave {{expert}} out")
        return self
