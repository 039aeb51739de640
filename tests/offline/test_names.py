"""Names that a user or a stranger chose, in what the commands print and write: brackets, dollars, bytes that are no
UTF-8."""

from __future__ import annotations

import io
import json
import os
import shlex
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from compression import d2moe_here
from edits import add_records
from rich.console import Console
from synthetic import Synthetic, write_checkpoint

from offline.cli import main
from offline.cli.compress import compress_table
from offline.cli.export import export_table
from offline.compare.table import compare_table
from offline.io.console import plain_console
from offline.io.naming import labels
from offline.io.progress import Steps

ODD = "a[/b] [red]:x:"
"""Markup that closes nothing, markup that colours, and an emoji's name."""


def printed(table: Any, content: dict[str, Any]) -> str:
    out = io.StringIO()
    with redirect_stdout(out):
        table(plain_console(), content)
    return out.getvalue()


def test_inspect_prints_names_as_they_are(tmp_path: Path) -> None:
    """The source's name is a stranger's, the folder's the user's."""
    folder = tmp_path / "[red]:x:"
    write_checkpoint(folder, Synthetic())
    add_records(folder, parameters=4_396_160)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["source"]["name"] = ODD
    (folder / "config.json").write_text(json.dumps(config))
    done = d2moe_here("inspect", folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{folder}: {ODD} by d2")


def test_a_path_that_is_no_utf8_is_printed_as_its_bytes(tmp_path: Path) -> None:
    folder = Path(os.fsdecode(bytes(tmp_path) + b"/m\xff"))
    write_checkpoint(tmp_path / "model", Synthetic())
    add_records(tmp_path / "model", parameters=4_396_160)
    folder.symlink_to("model")
    written = io.BytesIO()
    with redirect_stdout(io.TextIOWrapper(written, encoding="utf-8")) as out, pytest.raises(SystemExit) as stop:
        main(["inspect", str(folder)])
    out.flush()
    assert stop.value.code == 0
    assert written.getvalue().startswith(bytes(folder) + b": ")


def test_paths_are_printed_as_they_are() -> None:
    """A line to be copied into a shell must not lack a part of its path."""
    one = {"parameters": 10, "bytes": 10}
    predicted = {"seconds": 1, "least_seconds": 1, "peak_memory_bytes": 1, "work_bytes": 1}
    result = {**one, "stores": "", "saves_nothing": False}
    made = {"source": one, "result": result, "predicted": predicted, **predicted, "recipe": {"ratio": 0.4}}
    made |= {"path": f"/x/{ODD}", "tokenizer": None}
    assert f"vllm serve {shlex.quote(f'/x/{ODD}')} --trust-remote-code\n" in printed(compress_table, made)
    exported = {"path": f"/x/{ODD}", "parameters": 1, "bytes": 1, "files": 1, "compressed_bytes": 1}
    assert printed(export_table, exported).count(f"/x/{ODD}") == 2


def test_compare_prints_names_of_texts_as_they_are() -> None:
    """In the table's head and in a row that failed."""
    figures = ("counted", "perplexity", "seconds", "served", "reachable", "bytes")
    row = {**dict.fromkeys(figures), "name": ODD, "kind": "method", "ratio": 0.4, "resumed": False, "failed": ODD}
    content = {
        "rows": [row], "texts": [{"name": ODD}], "serving": None, "frontier": None, "seq_len": 64,
        "calibration": {"windows": 1, "seq_len": 64, "tokens_sha256": "0" * 64},
    }  # fmt: skip
    lines = printed(compare_table, content).splitlines()
    assert ODD in lines[0]
    assert lines[1].startswith(ODD)
    assert f"failed: {ODD}" in lines[2]


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_shows_labels_as_they_are(terminal: bool) -> None:
    """A file that is being checked may be named so; on a terminal and in a log."""
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=200, markup=False, emoji=False)
    with Steps(1, console) as steps:
        steps.label(f"checking {ODD}")
        steps.advance(1)
    assert f"checking {ODD}" in out.getvalue()


def test_texts_get_labels_that_tell_them_apart() -> None:
    """By name, by path where names are the same, by a number where paths look the same; and all can be written."""
    texts = [Path(os.fsdecode(name)) for name in (b"a", b"1/b", b"2/b", b"c\xff", b"c\xfe", b"a.txt", b"c\xfd")]
    found = labels(texts)
    assert found == ["a", "1/b", "2/b", "c\ufffd", "c\ufffd (2)", "a.txt", "c\ufffd (3)"]
    assert len({label.encode() for label in found}) == len(texts)
