"""`d2moe compress` as one function: open, plan, run or resume, publish."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from offline.checkpoint.assembly import Assembly
from offline.checkpoint.publish import publish
from offline.errors import InputError
from offline.io.console import plain_console
from offline.io.folders import check_new_folder
from offline.io.progress import Steps
from offline.io.units import size as in_words
from offline.plan.asked import Asked, plan_asked
from offline.plan.disk import work_bytes
from offline.plan.duration import estimate_seconds, total_seconds
from offline.plan.make import summary
from offline.plan.plan import Plan
from offline.plan.recipe import Recipe
from offline.plan.resources import keeping_states, peak_memory
from offline.run.calibration import compress_layers
from offline.source.dense import open_dense
from offline.source.text import Text
from offline.source.tokens import OWN, TokenizerChoice, choose_windows, forget_tokenizers, open_tokenizer
from offline.work.distributed import Group, is_first, join
from offline.work.workdir import MARKER_FILE, WorkDir, fingerprint, refuse_changed_source


def compress(
    source: str,
    out: Path,
    recipe: Recipe,
    calibration: Text,
    *,
    tokenizer: TokenizerChoice = OWN,
    revision: str | None = None,
    workdir: Path | None = None,
    restart: bool = False,
    memory: int | None = None,
    device: str = "auto",
    allow_larger: bool = False,
    asked: Asked | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Compress `source` into the new folder `out`; an interrupted run is continued. Under torchrun every process
    calls this, and they share the work out.

    calibration: text that the windows are drawn from, read by `tokenizer`;
    memory: bytes that this machine's processes may hold together; device: "auto", "cpu" or "cuda"; asked: how small
    instead of the recipe's ratio.
    Every check that needs no work comes first: a refusal (InputError, CheckpointError) leaves nothing behind.
    Returns what was written, for printing.
    """
    console = console or plain_console(stderr=True)
    chosen = choose_device(device)
    out = out.parent.resolve() / out.name
    folder = (workdir or out.with_name(out.name + ".d2moe-work")).resolve()
    if is_first():
        _check_places(out, folder)
    group = join()
    if chosen.type == "cuda":  # what is predicted for a process has to fit on its GPU
        memory = min(memory or sys.maxsize, torch.cuda.mem_get_info(chosen)[0] * group.local_size)
    options: dict[str, Any] = {"memory": memory, "processes": group.local_size, "device": chosen.type}
    options["allow_larger"] = allow_larger
    plan, fit = plan_asked(open_dense(source, revision), recipe, asked, **options)
    if folder == plan.model.folder or folder in plan.model.folder.parents:
        raise InputError(f"--workdir {folder} holds the source; choose another")
    settings, reads = plan.recipe.calibration, open_tokenizer(plan.model.folder, tokenizer)
    for note in (*plan.model.remarks, *reads.notes):
        console.print(note, highlight=False, soft_wrap=True, markup=False)
    windows = choose_windows(reads, calibration, int(settings.windows), int(settings.seq_len), settings.seed)
    tokenizer_config = reads.config
    del reads
    forget_tokenizers()
    machine = {"device": chosen.type, "processes": group.size, "at_once": _at_once(plan)}
    preferred, plan = plan, _with_room(plan, folder, out, group)
    if plan.states.every > preferred.states.every:
        console.print(
            f"the disk has room for fewer hidden states than planned: {in_words(work_bytes(plan))} instead of "
            f"{in_words(work_bytes(preferred))}, with more layers run twice",
            highlight=False,
            soft_wrap=True,
        )
    mark = fingerprint(plan.model, plan.recipe.to_json(), windows.sha256, machine)
    work = WorkDir(folder, mark, restart=restart, group=group)
    if work.invalidated:
        console.print(
            f"{' and '.join(work.invalidated)} changed since the interrupted run: starting over", soft_wrap=True
        )
    estimate = estimate_seconds(plan, chosen.type)
    predicted = {
        "seconds": round(estimate.most, 1),
        "least_seconds": round(estimate.least, 1),
        "peak_memory_bytes": peak_memory(plan),
        "work_bytes": work_bytes(plan),
    }
    console.print(
        f"compressing {plan.model.name}: about {estimate}, "
        f"{predicted['peak_memory_bytes'] / 1e9:.1f} GB of memory at the peak"
        f"{' for each process' if group.size > 1 else ''}",
        highlight=False,
        soft_wrap=True,
    )
    try:
        with Steps(total_seconds(plan, chosen.type), console) as steps:
            settled = compress_layers(plan, windows.tokens, work, steps, chosen)
            if group.first:
                refuse_changed_source(plan.model, mark)
            steps.label("writing the checkpoint")
            disk = work.nbytes() if group.first else 0
            warnings = _warnings(settled, Assembly(settled, work)) if group.first else []
            if group.first:
                publish(settled, windows, work, out, lambda: refuse_changed_source(plan.model, mark), tokenizer_config)
        group.barrier()
        work.remove()
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise InputError(
            f"{error.strerror} (working folder {folder}, result in {out.parent}); "
            "free some space and run the same command again to continue"
        ) from None
    finally:
        work.close()
    for warning in warnings:
        console.print(warning, highlight=False, soft_wrap=True, markup=False)
    written = {
        "warnings": warnings,
        "path": str(out),
        "tokenizer": tokenizer.folder,
        "predicted": predicted,
        "work_bytes": disk,
    }
    if fit is not None:
        written["fit"] = fit.of(settled).to_json()
    return {**summary(settled, estimate), **written}


FEW_TOKENS = 64
"""An expert that saw fewer is fitted to hardly more than its weights."""


def _warnings(plan: Plan, assembly: Assembly) -> list[str]:
    """One line for experts that saw few tokens, and for factorizations that took more damping than usual."""
    found, few, damped = [], [], []
    for layer, report in assembly.reports().items():
        few += [f"{layer}/{e} ({count})" for e, count in enumerate(report["tokens"]) if count < FEW_TOKENS]
        damped += [f"{layer}/{e} {role}" for role, experts in report.get("damping", {}).items() for e in experts]
    if few:
        found.append(
            f"{len(few)} experts saw fewer than {FEW_TOKENS} tokens of the calibration text (layer/expert: "
            f"{_some(few)}); more windows, or a text nearer to what is served, would serve them better"
        )
    if damped:
        found.append(
            f"{len(damped)} matrices were rounded with more damping than usual: what their experts saw does not tell "
            f"all inputs apart (layer/expert: {_some(damped)})"
        )
    return found


def _some(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def choose_device(device: str) -> torch.device:
    """`auto` is a GPU where there is one. Raises InputError for one that is not there."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch finds no GPU; use --device cpu")
    if device == "cuda":
        number, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if number >= count:
            raise InputError(f"more processes than this machine's {count} GPUs; use --nproc-per-node {count}")
        return torch.device("cuda", number)
    return torch.device(device)


def _check_places(out: Path, folder: Path) -> None:
    """Refuse a result that would replace something, that cannot be written, or that the cleanup would take along."""
    if os.path.lexists(out) and (folder / MARKER_FILE).exists():
        raise InputError(f"{out} exists already; remove it, or its working folder {folder} if the run is over")
    check_new_folder(out)
    if folder == out or folder in out.parents or out in folder.parents:
        raise InputError(f"--workdir {folder} and the result {out} lie inside one another; choose another --workdir")


def _at_once(plan: Plan) -> list[Any]:
    """What the order of sums depends on. How many states are kept is not of it: a run goes on with what room there is
    by then."""
    return [value for name, value in asdict(plan.resources).items() if name != "every"]


def _with_room(plan: Plan, folder: Path, out: Path, group: Group) -> Plan:
    """The plan with fewer states kept where the disk has no room for as many. Raises InputError, before the work, for
    what would fill the disk hours later all the same."""
    if group.first:
        there = next(parent for parent in (folder, *folder.parents) if parent.exists())
        left_over = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else 0
        beside = plan.budget.nbytes if there.stat().st_dev == out.parent.stat().st_dev else 0
        free = shutil.disk_usage(there).free
        room = free + left_over - beside
        plan = plan if work_bytes(plan) <= room else keeping_states(plan, room)
        if (needed := work_bytes(plan)) > room:
            raise InputError(
                f"No space left for {needed + beside - left_over:,} bytes under {there}: {free:,} are free; "
                "choose another --workdir"
            )
    agreed = torch.tensor([plan.resources.every if group.first else 0])
    group.sum([agreed])
    return replace(plan, resources=replace(plan.resources, every=int(agreed)))
