"""Options and arguments that several commands of `d2moe` take."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from d2moe_vllm.format.config import Scope
from offline.errors import InputError

if TYPE_CHECKING:
    from offline.plan.asked import Asked
    from offline.plan.recipe import Recipe

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Src = Annotated[str, typer.Argument(metavar="SRC", help="Model folder, or a Hub id (owner/name).")]
Ckpt = Annotated[Path, typer.Argument(metavar="CKPT", help="Folder of a compressed checkpoint.")]
Ratio = Annotated[float | None, typer.Option(help="Share of the source's bytes to remove, e.g. 0.4.")]
RecipeFile = Annotated[
    str | None,
    typer.Option("--recipe", help="A YAML file, or a shipped recipe like mixtral; options given here win over it."),
]
Original = Annotated[str | None, typer.Option("--source", metavar="SRC", help="The dense original to compare with.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.")]
Method = Annotated[str | None, typer.Option(help="Compression method, by its name in docs/methods.md (default d2).")]
Bits = Annotated[
    str | None,
    typer.Option(
        metavar="auto|16|8|4|3|2",
        help="Bits of the experts' numbers; auto chooses layer by layer (default of d2), 16 is the paper's world; a "
        "number also goes with moe-svd, mobe, and a recipe of low-rank deltas.",
    ),
]
Accounting = Annotated[
    Literal["stored", "paper"] | None,
    typer.Option(help="What the ratio means: bytes gone from disk, or the paper's nominal share."),
]
ScopeOption = Annotated[
    Scope | None, typer.Option(help="Dynamic column selection: shared by a batch, per token, or off.")
]
WindowsOption = Annotated[
    int | None, typer.Option(help="Calibration windows (default: as many as are enough for the model, 128 at least).")
]
SeqLen = Annotated[int | None, typer.Option(help="Tokens per window (default 2048, or the model's limit).")]
Seed = Annotated[int | None, typer.Option(help="Which windows of the text are drawn.")]
CalibrationText = Annotated[
    list[Path] | None,
    typer.Option(help="Calibration text: UTF-8, or JSON Lines or an array with `text`; several are read in order."),
]


def _use_family_file(context: typer.Context, path: Path | None) -> Path | None:
    """The family that it describes is known until the command ends."""
    if path is not None and not context.resilient_parsing:
        from offline.source.families import known
        from offline.source.familyfile import read_family_file

        context.with_resource(known(read_family_file(path)))
    return path


FamilyFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        callback=_use_family_file,
        help="The row of a family that d2moe has none of, in YAML; `plan` without it proposes one.",
    ),
]
TokenizerOption = Annotated[
    str | None, typer.Option(metavar="DIR", help="Folder of the tokenizer to read texts with (default: the model's).")
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the tokenizer's own code, where it is code; look at it first.")
]
Memory = Annotated[
    str | None, typer.Option(metavar="SIZE", help="Memory to stay within, e.g. 24GB (default: what the machine has).")
]
AllowLarger = Annotated[
    bool, typer.Option("--allow-larger", help="Go on where the result would not be smaller than a quantized source.")
]


Size = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="What the result's weight files may be, e.g. 14GB, instead of a ratio."),
]
FitOption = Annotated[
    str | None,
    typer.Option(
        "--fit", metavar="SIZE", help="What one GPU has, e.g. 24GB: weights, KV cache and the rest fit into it."
    ),
]
MaxModelLen = Annotated[
    int | None, typer.Option(min=1, help="With --fit: tokens of a request (default 8192, or the model's limit).")
]
MaxNumSeqs = Annotated[int | None, typer.Option(min=1, help="With --fit: requests of that length at once (default 4).")]
MaxNumBatchedTokens = Annotated[
    int | None, typer.Option(min=1, help="With --fit: tokens of one step (default: vLLM's for such a device).")
]
TensorParallelSize = Annotated[
    int | None, typer.Option(min=1, help="With --fit: how many such devices share the model (default 1).")
]
ExpertParallel = Annotated[
    bool, typer.Option("--enable-expert-parallel", help="With --fit: devices share out whole experts.")
]
KVCacheDtypeOption = Annotated[
    Literal["auto", "fp8"] | None, typer.Option(help="With --fit: of the KV cache's numbers (default auto, 16 bits).")
]
GpuMemoryUtilization = Annotated[
    float | None, typer.Option(help="With --fit: share of the device that vLLM may use (default 0.92, vLLM's own).")
]


def parse_bits(text: str | None) -> int | str | None:
    """As a recipe has them; what is none of them the recipe refuses."""
    return int(text) if text is not None and text.isdecimal() else text


def parse_size(text: str | None, option: str = "--memory") -> int | None:
    """Bytes of "24GB", "800 MB", "1.5TB" or a plain number. Raises InputError, naming the option."""
    if text is None:
        return None
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmgt]i?b?|b)?\s*", text.lower())
    if not match or float(match[1]) == 0:
        raise InputError(f"{option} {text!r} is no size; write it as 24GB or 800MB")
    unit = (match[2] or "b")[0]
    base = 1024 if "i" in (match[2] or "") else 1000
    return int(float(match[1]) * base ** ("bkmgt".index(unit)))


def read_recipe(given: str | None, overrides: Mapping[str, Any]) -> Recipe:
    """The recipe that --recipe names, or else the default one, with the command's other options on top.

    Raises InputError, see `find_recipe` and `load_recipe`.
    """
    from offline.plan.recipe import load_recipe
    from offline.plan.recipes import find_recipe

    return load_recipe(find_recipe(given) if given else None, overrides)


def read_asked(ratio: float | None, size: str | None, fit: str | None, **serving: Any) -> Asked | None:
    """What --size or --fit asks for, None where neither is given. serving: `Serving`'s fields, None where not given.

    Raises InputError where two of --ratio, --size and --fit are given, and for what goes with --fit alone.
    """
    from offline.plan.asked import Asked
    from offline.plan.serving import Serving

    given = {"--ratio": ratio, "--size": size, "--fit": fit}
    both = [name for name, value in given.items() if value is not None]
    if len(both) > 1:
        raise InputError(f"{' and '.join(both)} both say how small; give one of them")
    chosen = {field: value for field, value in serving.items() if value not in (None, False)}
    if fit is None:
        if chosen:
            name = next(iter(chosen))
            option = "--enable-expert-parallel" if name == "expert_parallel" else f"--{name.replace('_', '-')}"
            raise InputError(f"{option} says what --fit has to hold; add --fit 24GB, or leave it out")
        return Asked(files=parse_size(size, "--size")) if size is not None else None
    share = chosen.get("gpu_memory_utilization")
    if share is not None and not 0 < share <= 1:
        raise InputError(f"--gpu-memory-utilization {share:g} is no share; choose one above 0 and up to 1")
    return Asked(serving=Serving(parse_size(fit, "--fit") or 0, **chosen))


def ratio_for(asked: Asked | None, ratio: float | None) -> float | None:
    """To read a recipe with: where a size is asked for, any one stands for what is found, and over the recipe's."""
    return ratio if asked is None else UNDECIDED


UNDECIDED = 0.5


def need_libraries(what: str, *names: str) -> None:
    """Raises InputError where libraries that only some commands need are missing."""
    if missing := [name for name in names if importlib.util.find_spec(name) is None]:
        raise InputError(
            f"{what} needs {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed; "
            f"pip install {' '.join(missing)} (d2moe-vllm's extra `report`)"
        )
