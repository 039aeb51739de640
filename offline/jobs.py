"""`d2moe compress` as one function: open, plan, run or resume, publish."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from offline.calibration import choose_windows, read_text, tokenize
from offline.errors import InputError
from offline.pipeline import Run
from offline.plan import estimate_seconds, layer_work, make_plan, peak_memory
from offline.progress import Steps
from offline.publish import publish
from offline.recipe import Recipe
from offline.source import open_dense
from offline.workdir import WorkDir, fingerprint


def compress(
    source: str,
    out: Path,
    recipe: Recipe,
    calibration: Path,
    *,
    revision: str | None = None,
    workdir: Path | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Compress `source` into the new folder `out`; an interrupted run is continued.

    Every check that needs no work comes first: a refusal (InputError, CheckpointError) leaves nothing behind.
    Returns what was written, for printing.
    """
    console = console or Console(stderr=True)
    out = out.absolute()
    if out.exists():
        raise InputError(f"{out} exists already; choose another folder or remove it")
    if not out.parent.is_dir():
        raise InputError(f"{out.parent} is no folder; create it first")
    plan = make_plan(open_dense(source, revision), recipe)
    settings = plan.recipe.calibration
    tokens = tokenize(plan.model.folder, read_text(calibration))
    windows = choose_windows(tokens, settings.windows, int(settings.seq_len), settings.seed)
    work = WorkDir(
        (workdir or out.with_name(out.name + ".d2moe-work")).absolute(),
        fingerprint(plan.model, plan.recipe, windows.sha256),
    )
    if work.invalidated:
        console.print(f"{' and '.join(work.invalidated)} changed since the interrupted run: starting over")
    predicted = {"seconds": round(estimate_seconds(plan), 1), "peak_memory_bytes": peak_memory(plan)}
    console.print(
        f"compressing {plan.model.name}: about {predicted['seconds']:.0f} s, "
        f"{predicted['peak_memory_bytes'] / 1e9:.1f} GB of memory at the peak",
        highlight=False,
    )
    try:
        run_work = len(plan.model.shape.layers) * sum(layer_work(plan))
        with Steps(run_work, console) as steps:
            run = Run(plan, windows.tokens, work, steps)
            run.compress_layers()
            steps.label("writing the checkpoint")
            publish(plan, windows, work, run.reports(), out)
    except BaseException:
        work.close()
        raise
    work.remove()
    return {**plan.summary(), "path": str(out), "predicted": predicted}
