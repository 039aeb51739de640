"""Measurements that take long and are kept: what is known of this code is not measured again."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console

from d2moe_vllm.format.config import Scope
from offline.io.progress import Steps
from offline.io.shards import write_file
from offline.run.evaluate import Measure, evaluate
from offline.source.text import as_text


class Job(Protocol):
    """Something to measure; key: by which its result is kept."""

    @property
    def key(self) -> str: ...

    def measure(self) -> Any:
        """What JSON can hold."""


def measure_all(jobs: Sequence[Job], results: Path, code: str, processes: int | None = None) -> dict[str, Any]:
    """Key -> result of every job; `results` keeps them under `code`, and forgets those of another code. processes: as
    many as there are cores by default, as jobs of one thread each are too small to share a core's work."""
    stored = json.loads(results.read_text(encoding="utf-8")) if results.exists() else {}
    known: dict[str, Any] = stored.get(code, {})
    with ProcessPoolExecutor(processes or os.cpu_count()) as pool:
        waiting = {pool.submit(job.measure): job for job in jobs if job.key not in known}
        for count, done in enumerate(as_completed(waiting), start=1):
            known[waiting[done].key] = done.result()
            write_file(results, json.dumps({code: known}, indent=1))
            print(f"{count}/{len(waiting)} {waiting[done].key}: {done.result()}", file=sys.stderr, flush=True)
    return known


def silent() -> Console:
    return Console(file=io.StringIO())


def perplexity(
    folder: Path, text: Path, seq_len: int = 256, scope: Scope | None = None, windows: int | None = None
) -> float:
    """As `d2moe eval` says; windows: how many of the text's are drawn, None for all."""
    measure = Measure(as_text(text), seq_len, windows)
    return evaluate(str(folder), measure, scope, lambda total: Steps(total, silent())).perplexity


def put_tables(page: Path, tables: dict[str, str]) -> None:
    """Replaces what stands between `<!-- name -->` and `<!-- /name -->`."""
    text = page.read_text(encoding="utf-8")
    for name, content in tables.items():
        start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        text = f"{text.split(start)[0]}{start}{content}\n{end}{text.split(end)[1]}"
    write_file(page, text)
