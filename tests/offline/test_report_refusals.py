"""What `d2moe report` refuses: in one line, before any work, with nothing written."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compression import TINY, d2moe_here
from edits import add_records
from safetensors.torch import load_file, save_file
from synthetic import Synthetic, write_checkpoint

from d2moe_vllm.format.config import CheckpointError
from offline.errors import InputError
from offline.io.folders import new_file
from offline.report.content import Request, check_request

REFUSALS: list[tuple[list[object], str]] = [
    ([TINY, "new.html"], "this is a dense checkpoint"),
    (["compressed", "old.html"], "exists already"),
    (["compressed", "nowhere/new.html"], "is no folder"),
    (["compressed", "new.html", "--figures", "old"], "exists already"),
    (["compressed", "new.html", "--figures", "new.html"], "choose two names"),
    (["compressed", "new.html", "--text", "empty.txt"], "less than one window"),
    (["compressed", "new.html", "--text", "none.txt"], "cannot be read"),
    (["compressed", "new.html", "--source", "other"], "is not what the checkpoint was made from"),
    (["compressed", "new.html", "--trimming"], "add --text"),
    (["compressed", "new.html", "--seq-len", "64"], "add --text"),
    (["compressed", "new.html", "--card"], "add --text"),
    (["compressed", "new.html", "--memory", "1kB"], "raise it, or leave the comparison out with --quick"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSALS)
def test_refused_in_one_line_before_any_work(
    arguments: list[object], message: str, compressed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 2, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    Path("old").mkdir()
    Path("old.html").write_text("kept")
    Path("empty.txt").write_text("")
    if "other" in arguments:
        shutil.copytree(TINY, "other")
        tensors = load_file(TINY / "model.safetensors")
        save_file({**tensors, "extra.weight": torch.zeros(1)}, "other/model.safetensors", {"format": "pt"})
    before = sorted(tmp_path.rglob("*"))
    done = d2moe_here("report", *(compressed if one == "compressed" else one for one in arguments))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr
    assert sorted(tmp_path.rglob("*")) == before
    assert Path("old.html").read_text() == "kept"


@pytest.mark.parametrize("name", ["matplotlib", "jinja2"])
def test_a_missing_library_is_named_with_how_to_get_it(
    name: str, compressed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)  # as Python itself marks what cannot be imported
    done = d2moe_here("report", compressed, tmp_path / "page.html")
    assert done.returncode == 2
    assert f"pip install {name}" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d2moe_stats.json", {"layers": {}}, "not the statistics of layer 0"),
        ("d2moe_recipe.yaml", "- a list", "not a recipe"),
        ("d2moe_recipe.yaml", "a: [", "cannot be read"),
    ],
)
def test_damaged_records_are_named(name: str, content: Any, message: str, compressed: Path, tmp_path: Path) -> None:
    shutil.copytree(compressed, tmp_path / "copy")
    (tmp_path / "copy" / name).write_text(content if isinstance(content, str) else json.dumps(content))
    done = d2moe_here("report", tmp_path / "copy", tmp_path / "page.html", "--quick")
    assert done.returncode == 2
    assert message in done.stderr
    assert not (tmp_path / "page.html").exists()


def put(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """A change of one value of the statistics, at keys with dots between them."""

    def change(content: dict[str, Any]) -> None:
        *keys, last = path.split(".")
        for key in keys:
            content = content.setdefault(key, {})
        content[last] = value

    return change


FIT = {"start_error": 0.5, "error": 0.4, "steps": 10, "ended": "converged"}
DAMAGES = [
    put("calibration", "x"),
    put("calibration", None),
    put("calibration.windows", "many"),
    put("versions", [1]),
    put("versions", {"torch": 2}),
    put("written_by", "\ud800"),
    put("layers.0.tokens", [-1, *[1] * 7]),
    put("layers.0.tokens", [1.5, *[1] * 7]),
    put("layers.0.tokens", [10**400, *[1] * 7]),
    put("layers.0.tokens", [1] * 7),
    put("layers.0.relative_error.up", ["x"] * 8),
    put("layers.0.relative_error.other", [0.5] * 8),
    put("layers.0.sensitivity", {role: [1.0] for role in ("gate", "up", "down")}),
    put("layers.0.fit", {"gate": {**FIT, "ended": {}}}),
    put("layers.0.fit", {"gate": {**FIT, "steps": []}}),
    put("layers.0.fit", {"x": FIT}),
    put("selection", {"sensitivity": {"x": 1.0}, "dense": []}),
    put("selection", {"sensitivity": {"0": 1.0}, "dense": []}),
    put("selection", {"sensitivity": {str(n): 1.0 for n in range(4)}, "dense": [1]}),
    put("selection", {"sensitivity": {str(n): "x" for n in range(4)}, "dense": []}),
    lambda content: put("layers.x", content["layers"]["0"])(content),
    lambda content: content["layers"].pop("3"),
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_statistics_are_refused_before_any_work(
    damage: Callable[[dict[str, Any]], object], with_records: Path
) -> None:
    """In one line that names the file: nothing is computed from figures that are none."""
    path = with_records / "d2moe_stats.json"
    sound = path.read_text()
    check_request(Request(with_records))
    content = json.loads(sound)
    damage(content)
    path.write_text(json.dumps(content))
    try:
        with pytest.raises(CheckpointError) as refused:
            check_request(Request(with_records))
    finally:
        path.write_text(sound)
    assert str(refused.value).startswith(str(path))
    assert "\n" not in str(refused.value)


def test_trimming_is_refused_before_any_work(texts: tuple[Path, Path], tmp_path: Path) -> None:
    """Where no expert could run without its delta."""
    zero = dict.fromkeys(("gate", "up", "down"), 0)
    write_checkpoint(tmp_path / "model", Synthetic(kept=zero, used=zero))
    add_records(tmp_path / "model", parameters=4_396_160)
    with pytest.raises(InputError, match="nothing can be trimmed"):
        check_request(Request(tmp_path / "model", texts=texts[1:], seq_len=64, trimming=True))


def test_a_page_that_has_appeared_meanwhile_is_kept(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text("another's")
    with pytest.raises(InputError, match="appeared meanwhile"):
        new_file(tmp_path / "page.html", "ours")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["another's"]
