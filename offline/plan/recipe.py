"""What to do, as one validated model (YAML <-> pydantic). The resolved recipe travels in the checkpoint."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import (
    BeforeValidator,
    ConfigDict,
    ModelWrapValidatorHandler,
    ValidationError,
    create_model,
    model_validator,
)

from d2moe_vllm.format.config import first_error
from offline.algebra.merging import MERGES
from offline.errors import InputError
from offline.methods import METHODS
from offline.methods.settings import ENOUGH_ROWS, FEWEST_WINDOWS, Section, Settings
from offline.source.families import MoEShape

REAL_MODEL_WIDTH = 1024
"""From this hidden size on, `auto` multiples are 16, which the GPU kernels want, and calibration computes in bfloat16
where that is faster."""
NARROW = 512
"""Up to so many intermediate channels, experts may keep any number of them; from there on, multiples of 32."""


def _known(name: Any) -> Any:
    if name not in list(METHODS):
        raise ValueError(f"{name!r} is not one of {', '.join(METHODS)}")
    return name


class Recipe(Settings):
    """The settings, and beside them a section for each method that declares one."""

    model_config = ConfigDict(extra="allow")
    method: Annotated[str, BeforeValidator(_known)] = "d2"

    @model_validator(mode="wrap")
    @classmethod
    def _sections(cls, content: Any, handler: ModelWrapValidatorHandler[Recipe]) -> Recipe:
        """Whatever is no field has to be a method's section; of a method that is not known, nothing else matters."""
        if isinstance(content, dict) and content.get("method", "d2") in list(METHODS):
            given = {key: value for key, value in content.items() if key not in cls.model_fields}
            content = {**content, **dict(_own_sections().model_validate(given))}
        return handler(content)

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, content: Any) -> Any:
        """Defaults that depend on what else is asked for."""
        if not isinstance(content, dict):
            return content
        name = content.get("method", "d2")
        fixed = METHODS[name].fixed if name in list(METHODS) else {}
        usual = "uniform" if content.get("accounting") == "paper" else "adaptive"
        if name == "d2" and "bits" not in content:
            asked = any(_of_factors(content)) or any(_given(content, section, field) for section, field in _OF_FACTORS)
            content = {**content, "bits": 16 if asked else "auto"}
        content = _beneath(content, {"allocation": usual, **fixed})
        if name == "d2":
            content = _beneath(content, {"delta": {"method": "whitened" if content["bits"] == 16 else "dense"}})
        return _beneath(content, {"base": {"kind": "auto" if content["allocation"] == "adaptive" else "semi-dynamic"}})

    @model_validator(mode="after")
    def _compatible(self) -> Recipe:
        for field, value, found in _pairs(METHODS[self.method].fixed, self):
            if found != value:
                raise ValueError(f"method {self.method} needs {field} {value}, not {found}; leave it out")
        if self.bits == "auto" and not self.priced:
            raise ValueError(
                f"bits auto chooses among whole deltas of method d2, not for {self.method} with delta.method "
                f"{self.delta.method}; give a number of bits, such as --bits 16"
            )
        if self.bits != 16 and self.accounting == "paper" and not self.priced:
            raise ValueError(f"accounting paper counts numbers, whatever their bits; bits {self.bits} needs stored")
        if self.priced and (asked := next(_of_factors(self.model_dump()), None)):
            mend = "" if self.bits == "auto" else ", or `delta: {method: whitened}` to the recipe"
            raise ValueError(
                f"{asked} does not go with bits {self.bits}: it is for low-rank deltas; add --bits 16{mend}"
            )
        if self.allocation == "adaptive" and self.accounting == "paper":
            raise ValueError("allocation adaptive needs accounting stored")
        if self.accounting == "paper" and (self.delta.trim or self.delta.joint):
            raise ValueError(
                "accounting paper counts a delta for every expert: delta.trim, share_v and distinct_u need "
                "accounting stored"
            )
        if self.base.kind == "auto" and self.allocation != "adaptive":
            raise ValueError("base.kind auto needs allocation adaptive")
        if self.delta.trim and self.base.kind == "none":
            raise ValueError("delta.trim needs a base: trimmed experts run on it alone")
        return self

    def resolve(self, shape: MoEShape, max_positions: int | None) -> Recipe:
        """This recipe with every `auto` decided for one model, but for bits, which are decided layer by layer, and for
        products of wide models, which the device decides."""
        multiple = 16 if shape.model_hidden_size >= REAL_MODEL_WIDTH else 1
        channels = 1 if shape.intermediate_size <= NARROW else 32
        seq_len = self.calibration.seq_len
        if seq_len == "auto":
            seq_len = min(2048, max_positions or 2048)
        elif max_positions and seq_len > max_positions:
            raise InputError(f"calibration.seq_len {seq_len} exceeds the model's {max_positions} positions")
        calibration: dict[str, Any] = {"seq_len": seq_len}
        if self.calibration.windows == "auto":
            enough = math.ceil(ENOUGH_ROWS / shape.rows_for_each_input(int(seq_len)))
            calibration["windows"] = max(enough, FEWEST_WINDOWS)
        if self.calibration.products == "auto" and shape.model_hidden_size < REAL_MODEL_WIDTH:
            calibration["products"] = "float32"
        resolved = self.model_copy(
            update={
                "calibration": self.calibration.model_copy(update=calibration),
                "base": self.base.model_copy(update={"column_multiple": _decide(self.base.column_multiple, multiple)}),
                "delta": self.delta.model_copy(
                    update={
                        "rank_multiple": _decide(self.delta.rank_multiple, multiple),
                        "channel_multiple": _decide(self.delta.channel_multiple, channels),
                    }
                ),
            }
        )
        return METHODS[self.method].resolve(resolved, shape.num_experts)

    def dump(self) -> str:
        """As YAML, in the order of the fields."""
        return yaml.safe_dump(self.to_json(), sort_keys=False)

    def to_json(self) -> dict[str, Any]:
        """Its fields, but for the sections of other methods."""
        return self.model_dump(exclude=(self.model_extra or {}).keys() - {METHODS[self.method].section})


_FACTORS_ALONE: Mapping[str, Any] = {
    "accounting": ("stored",),
    "allocation": ("adaptive",),
    "scope": ("off",),
    "calibration": {"inputs": ("dense",)},
    "base": {"kind": ("auto", "none"), "merge": tuple(name for name, merge in MERGES.items() if merge.partial)},
    "delta": {"method": ("dense",), "trim": (0,), "share_v": (False,), "distinct_u": (0,)},
}
"""Fields that ask for the paper's world of low-rank deltas -> the values that do not."""


_OF_FACTORS = (("base", "sparsity"), ("base", "column_multiple"), ("delta", "rank_multiple"))
"""Fields that count with low-rank deltas and pruned bases alone: who gives them, means these."""


def _given(content: Mapping[str, Any], section: str, field: str) -> bool:
    return isinstance(found := content.get(section), Mapping) and field in found


def _of_factors(
    content: Mapping[str, Any], among: Mapping[str, Any] = _FACTORS_ALONE, where: str = ""
) -> Iterator[str]:
    """What in a recipe's content is for low-rank deltas alone, as "field value"."""
    for key, allowed in among.items():
        given = content.get(key)
        if isinstance(allowed, Mapping):
            yield from _of_factors(given if isinstance(given, Mapping) else {}, allowed, f"{where}{key}.")
        elif given is not None and given not in allowed:
            yield f"{where}{key} {given}"


def _own_sections() -> type[Section]:
    """The methods' own sections, as fields."""
    fields: dict[str, Any] = {
        method.section: (method.settings, method.settings()) for method in METHODS.values() if method.settings
    }
    return create_model("Sections", __base__=Section, **fields)


def _beneath(content: dict[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """`content` with these defaults for what it leaves out, also within its sections."""
    content = dict(content)
    for key, value in defaults.items():
        given = content.setdefault(key, value)
        if isinstance(value, Mapping) and isinstance(given, dict):
            content[key] = {**value, **given}
    return content


def _pairs(wanted: Mapping[str, Any], recipe: Recipe) -> Iterator[tuple[str, Any, Any]]:
    """(name, wanted value, the recipe's) of every field that is named, also within sections."""
    for key, value in wanted.items():
        found = getattr(recipe, key)
        if isinstance(value, Mapping):
            yield from ((f"{key}.{field}", one, getattr(found, field)) for field, one in value.items())
        else:
            yield key, value, found


def _decide(value: int | str, automatic: int) -> int:
    return automatic if value == "auto" else int(value)


def load_recipe(path: Path | None, overrides: Mapping[str, Any]) -> Recipe:
    """A recipe file (or the defaults) with command-line values on top.

    overrides: field -> value, of a section a mapping of its fields; None means not given. Raises InputError, naming
    the nearest valid key for an unknown one.
    """
    content: Any = {}
    if path is not None:
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except Exception as error:  # YAML's tags make its reader raise nearly everything there is
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InputError(f"recipe {path} cannot be read: {reason}") from None
        if not isinstance(content, dict):
            raise InputError(f"recipe {path}: expected `key: value` lines, found {type(content).__name__}")
    _override(content, overrides, f"recipe {path}: ")
    where = f"recipe {path}: " if path else ""
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise InputError(where + _explain(error)) from None


def _override(content: dict[str, Any], overrides: Mapping[str, Any], where: str) -> None:
    for key, value in overrides.items():
        if isinstance(value, Mapping):
            if not isinstance(section := content.setdefault(key, {}), dict):
                raise InputError(f"{where}{key} must be a section of `key: value` lines")
            _override(section, value, where)
        elif value is not None:
            content[key] = value


def _explain(error: ValidationError) -> str:
    # A misspelt key comes first: it is often why another one is missing.
    findings = sorted(error.errors(include_url=False), key=lambda one: one["type"] != "extra_forbidden")
    finding = findings[0]
    location = [str(part) for part in finding["loc"]]
    if finding["type"] == "missing" and location == ["ratio"]:
        return "no ratio given; add --ratio 0.4 (or `ratio: 0.4` to the recipe), or --size or --fit"
    if location == ["ratio"] and finding["type"] in ("less_than", "greater_than"):
        share = f"; {finding['input']:g} % is {finding['input'] / 100:g}" if 1 <= finding["input"] < 100 else ""
        return f"ratio {finding['input']:g} is not a share of the bytes, between 0 and 1{share}"
    if finding["type"] != "extra_forbidden":
        return first_error(error)
    fields = {**Recipe.model_fields, **_own_sections().model_fields}
    for part in location[:-1]:
        section: Any = fields[part].annotation
        fields = section.model_fields
    valid = list(fields)
    near = difflib.get_close_matches(location[-1], valid, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"valid keys: {', '.join(valid)}"
    return f"unknown key {'.'.join(location)!r}; {hint}"
