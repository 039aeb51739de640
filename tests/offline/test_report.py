"""`d2moe report`: its numbers against other commands and independent computations, what it refuses, what it writes."""

from __future__ import annotations

import json
import math
import os
import shutil
from html import unescape
from pathlib import Path
from typing import Any

import forks
import pytest
import torch
from compression import ROOT, TINY, d2moe_here
from edits import accept, add_records
from PIL import Image
from safetensors.torch import load_file, save_file
from synthetic import Synthetic, every_variant, mixed, write_checkpoint

from offline.checkpoint.card import MEASURED
from offline.io.progress import Steps
from offline.report.content import Request, collect
from offline.report.figures import ranks
from offline.report.page import tiles
from offline.report.pictures import Bars, Heat, Panel, short
from offline.report.plots import png, svg

SEQ_LEN = 64


@pytest.fixture(scope="session")
def short_text(texts: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report-text") / "held-out.txt"
    path.write_text(texts[1].read_text()[:4_000])
    return path


@pytest.fixture(scope="session")
def made(compressed: Path, short_text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Everything that the command can do on the bundled model, as --json prints it. Not to be changed."""
    folder = tmp_path_factory.mktemp("report")
    done = d2moe_here(
        "report", compressed, folder / "report.html", "--source", TINY, "--text", short_text, "--seq-len", SEQ_LEN,
        "--trimming", "--figures", folder / "figures", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "perplexity with 8 experts of each layer trimmed" in done.stderr
    return json.loads(done.stdout)


def table(made: dict[str, Any], figure: str, number: int = 0) -> list[list[Any]]:
    (found,) = [one for one in made["figures"] if one["name"] == figure]
    return found["tables"][number]["rows"]


def command(*arguments: object) -> dict[str, Any]:
    done = d2moe_here(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_figure_is_there(made: dict[str, Any]) -> None:
    names = [figure["name"] for figure in made["figures"]]
    assert names == ["sizes", "perplexity", "error", "ranks", "columns", "routing", "sensitivity", "cka", "energy",
                     "trimming"]  # fmt: skip
    assert made["left_out"] == []
    assert all(figure["tables"] and figure["reading"] for figure in made["figures"])


def test_figures_are_those_of_inspect_and_its_analyses(made: dict[str, Any], compressed: Path) -> None:
    """One code path: errors, ranks, columns, tokens and CKA to the last digit."""
    found = command("inspect", compressed, "--analyses", "--source", TINY)
    errors = found["statistics"]["layers"]["1"]["relative_error"]["up"]
    (row,) = [row for row in table(made, "error") if row[0] == "1 up"]
    assert row[1:] == [sum(errors) / 8, min(errors), max(errors), errors.index(max(errors))]
    assert [row[1:4] for row in table(made, "ranks")] == [
        [layer[role]["rank"] for role in ("gate", "up", "down")] for layer in found["layers"].values()
    ]
    down = found["layers"]["2"]["down"]
    (row,) = [row for row in table(made, "columns") if row[0] == "2 down"]
    kept, used = (256, 256) if down["full_base"] else (down["kept_columns"], down["used_columns"])
    assert row[1:4] == [kept, used, 256]
    assert [row[1:] for row in table(made, "routing")] == [
        layer["tokens"] for layer in found["statistics"]["layers"].values()
    ]
    assert [row[1:] for row in table(made, "cka", 3 * 3 + 2)] == found["analyses"]["layers"]["3"]["down"]["cka"]
    curves = [layer["gate"]["energy"]["experts"] for layer in found["analyses"]["layers"].values()]
    (row,) = [row for row in table(made, "energy") if row[0] == "gate experts, 20 %"]
    place = found["analyses"]["shares_of_rank"].index(20)
    assert row[1] == pytest.approx(100 * sum(curve[place] for curve in curves) / 4)
    assert made["content"]["analyses"] == found["analyses"]


def test_sizes_are_those_of_the_files(made: dict[str, Any], compressed: Path) -> None:
    """Parts add up to the files, and are what the tensors' names say."""
    rows = {row[0]: row[1:] for row in table(made, "sizes")}
    (file,) = compressed.glob("*.safetensors")
    assert rows["whole model"][3] == file.stat().st_size == sum(row[3] or 0 for row in rows.values()) / 2
    tensors = load_file(file)
    deltas = sum(t.numel() for name, t in tensors.items() if name.endswith((".delta_u", ".delta_v")))
    assert rows["deltas"][1] == deltas
    assert rows["experts"][0] == 4 * 8 * 3 * 128 * 256
    assert rows["whole model"][2] == (TINY / "model.safetensors").stat().st_size


def test_perplexities_are_those_of_eval_and_recovery_is_its_formula(
    made: dict[str, Any], compressed: Path, short_text: Path
) -> None:
    before, after = (
        command("eval", folder, "--text", short_text, "--seq-len", SEQ_LEN) for folder in (TINY, compressed)
    )
    (row,) = table(made, "perplexity")
    assert row[1:3] == [before["perplexity"], after["perplexity"]]
    assert row[3] == pytest.approx(100 * (after["perplexity"] / before["perplexity"] - 1))
    losses = [math.log(found["perplexity"]) for found in (before, after)]
    assert row[4] == pytest.approx(100 * (math.log(4096) - losses[1]) / (math.log(4096) - losses[0]))
    assert 50 < row[4] < 100


def test_trimming_is_what_zero_deltas_give(
    made: dict[str, Any], compressed: Path, short_text: Path, tmp_path: Path
) -> None:
    """Against a copy in which the two least routed experts of every layer have deltas of zeros."""
    points = {row[0]: row for row in table(made, "trimming")}
    assert points[0][1] == 0
    assert points[8][1] == pytest.approx(100)
    assert points[0][4] == table(made, "perplexity")[0][2]
    assert points[3][4] is None
    copy = tmp_path / "copy"
    shutil.copytree(compressed, copy)
    (file,) = copy.glob("*.safetensors")
    tensors = load_file(file)
    shares = []
    for layer, report in made["content"]["checkpoint"]["statistics"]["layers"].items():
        least = sorted(range(8), key=lambda expert: report["tokens"][expert])[:2]
        shares.append(sum(report["tokens"][expert] for expert in least) / sum(report["tokens"]))
        for name in tensors:
            if name.endswith("delta_u") and any(f".{layer}.block_sparse_moe.experts.{e}." in name for e in least):
                tensors[name] = torch.zeros_like(tensors[name])
    save_file(tensors, file, {"format": "pt"})
    accept(copy)
    expected = command("eval", copy, "--text", short_text, "--seq-len", SEQ_LEN)["perplexity"]
    assert points[2][4] == pytest.approx(expected, rel=1e-4)
    assert points[2][4] > 1.01 * points[0][4]
    assert points[2][1] == pytest.approx(100 * sum(shares) / 4)


def test_two_runs_give_the_same_bytes(compressed: Path, tmp_path: Path) -> None:
    """In another process, whose hashes of strings differ: the page and its pictures."""
    arguments = ["report", compressed, "--quick", "--figures"]
    done = d2moe_here(*arguments, tmp_path / "one", tmp_path / "one.html")
    assert done.returncode == 0, done.stderr
    code = "import sys; sys.argv[0] = 'd2moe'; from offline.cli.app import main; print(hash('hash')); main()"
    again = forks.python(code, *arguments, tmp_path / "two", tmp_path / "two.html", imports=forks.TRANSFORMERS)
    assert again.returncode == 0, again.stderr
    assert int(again.stdout.splitlines()[0]) != hash("hash")
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "two.html").read_bytes()
    first, second = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert first == second
    assert not list(tmp_path.glob(".*"))


def test_pictures_are_the_page_s_figures(made: dict[str, Any]) -> None:
    panels = [f"{panel}.png" for figure in made["figures"] for panel in figure["panels"]]
    assert [Path(path).name for path in made["pictures"]] == panels
    for path in made["pictures"]:
        with Image.open(path) as image:
            assert image.width > 600
            low, high = image.convert("L").getextrema()
            assert low < 100
            assert high == 255


def test_what_was_not_given_is_said_and_not_drawn(compressed: Path, tmp_path: Path) -> None:
    """With the option that brings it; what is drawn without the source says so."""
    made = command("report", compressed, tmp_path / "quick.html", "--quick")
    left = {one["name"]: one["why"] for one in made["left_out"]}
    assert set(left) == {"perplexity", "cka", "energy"}
    assert "--text" in left["perplexity"]
    assert "--source" in left["perplexity"]
    assert "--quick" in left["cka"]
    html = unescape((tmp_path / "quick.html").read_text())
    for name, why in left.items():
        assert why in html
        assert f'id="{name}-section"' not in html
    (trimming,) = [figure for figure in made["figures"] if figure["name"] == "trimming"]
    assert any("--trimming" in note for note in trimming["notes"])
    assert trimming["panels"] == ["trimming-tokens"]


@pytest.mark.parametrize(
    ("what", "figures", "absent"),
    [
        (every_variant(), {"columns", "shared-u", "trimming"}, {"fit", "alphas", "selection"}),
        (mixed(), {"alphas"}, {"fit", "shared-u"}),
        (Synthetic(kept=dict.fromkeys(("gate", "up", "down"), 0), used=dict.fromkeys(("gate", "up", "down"), 0)),
         {"ranks"}, {"columns", "trimming"}),
    ],
)  # fmt: skip
def test_every_variant_of_the_format_has_a_report(
    what: Synthetic, figures: set[str], absent: set[str], tmp_path: Path
) -> None:
    """Shared U's, bases that are mixed, no base at all; records of a checkpoint that others wrote."""
    tensors = write_checkpoint(tmp_path / "model", what)
    layers = tuple(layer for layer in range(4) if layer not in what.dense)
    add_records(tmp_path / "model", layers, parameters=4_396_160)
    made = command("report", tmp_path / "model", tmp_path / "page.html")
    names = {figure["name"] for figure in made["figures"]}
    assert figures <= names
    assert not absent & names
    if "alphas" in figures:
        alpha = tensors["model.layers.1.block_sparse_moe.experts.3.w3.alpha"]
        assert table(made, "alphas", 3)[3][1:] == alpha.float().tolist()
    if "shared-u" in figures:
        index = tensors["model.layers.2.block_sparse_moe.experts.0.w2.u_index"].tolist()
        (row,) = [row for row in table(made, "shared-u", 1) if row[0] == "layer 2"]
        assert row[1:] == [None if u < 0 else u for u in index]


@pytest.mark.parametrize(
    ("records", "figure", "rows"),
    [
        ({"selection": {"sensitivity": {"0": 9.5, "1": 3.0, "2": 4.0, "3": 2.0}, "dense": [0]}}, "selection",
         [[0, 9.5, "left as it was"], [1, 3.0, "decomposed"], [2, 4.0, "decomposed"], [3, 2.0, "decomposed"]]),
    ],
)  # fmt: skip
def test_the_layers_that_moe_svd_chose(records: dict[str, Any], figure: str, rows: list[Any], tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", Synthetic(dense=(0,)))
    add_records(tmp_path / "model", (1, 2, 3), parameters=4_396_160, **records)
    made = command("report", tmp_path / "model", tmp_path / "page.html", "--quick")
    assert table(made, figure) == rows


def test_only_what_was_left_as_it_was_is_called_so_and_has_no_error_to_count(tmp_path: Path) -> None:
    """MoBE's down has errors of exactly zero; a down of rank 0 that has a base was compressed all the same."""
    write_checkpoint(tmp_path / "mobe", mixed())
    add_records(tmp_path / "mobe", (0, 1, 2), parameters=4_396_160)
    write_checkpoint(tmp_path / "base", Synthetic(rank={"gate": 8, "up": 8, "down": 0}))
    add_records(tmp_path / "base", parameters=4_396_160)
    path = tmp_path / "mobe" / "d2moe_stats.json"
    content = json.loads(path.read_text())
    for number in ("0", "1"):
        content["layers"][number]["relative_error"]["down"] = [0.0] * 8
    path.write_text(json.dumps(content))
    notes = {}
    for name in ("mobe", "base"):
        found = collect(Request(tmp_path / name, quick=True), Steps, print)
        notes[name] = [note for note in ranks(found).notes if "Down" in note]
        assert tiles(found)[2][:2] == ("0.500", "mean relative error")
    assert notes == {"mobe": ["Down was left as it was in layers 0, 1."], "base": []}


def test_a_dollar_in_a_title_is_no_formula(tmp_path: Path) -> None:
    """The title of a picture has the name of the user's text in it."""
    panel = Panel("bars", "bars", Bars(["after"], [("perplexity", [2.0])], "perplexity"), "words")
    png(panel, "Perplexity: $\\frac$ 5$.txt", tmp_path / "bars.png")
    png(panel, "Perplexity: \\frac 5.txt", tmp_path / "other.png")
    assert (tmp_path / "bars.png").read_bytes() != (tmp_path / "other.png").read_bytes()


def test_texts_of_one_name_and_names_that_are_no_utf8(with_records: Path, short_text: Path, tmp_path: Path) -> None:
    """Page, pictures and card are written, and say which figure is of which text."""
    shutil.copytree(with_records, tmp_path / "model")
    (tmp_path / "model" / "README.md").write_text("\n".join(MEASURED))
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    texts = [
        tmp_path / "one" / "x$.txt",
        tmp_path / "two" / "x$.txt",
        Path(os.fsdecode(bytes(tmp_path) + b"/b\xff.txt")),
    ]
    for text in texts:
        text.write_text(short_text.read_text()[:400])
    many = [word for text in texts for word in ("--text", text)]
    made = command("report", tmp_path / "model", tmp_path / "page.html", "--quick", "--figures", tmp_path / "pictures",
                   "--seq-len", SEQ_LEN, "--card", *many)  # fmt: skip
    expected = [*map(str, texts[:2]), "b\ufffd.txt"]
    assert [row[0] for row in table(made, "perplexity")] == expected
    for written in ("page.html", "model/README.md"):
        content = (tmp_path / written).read_text(encoding="utf-8")
        assert all(label in content for label in expected)


def test_many_experts_are_drawn_as_one_image(tmp_path: Path) -> None:
    """256 experts and more: a picture of some kilobytes, not a shape for each of 65,536 cells."""
    values = torch.rand(256, 256, generator=torch.Generator().manual_seed(0)).tolist()
    drawn = svg(Panel("many", "many", Heat(values, "expert", "expert", 0, 1, digits=2), "words"), small=True)
    assert drawn.count("<image") == 1
    assert drawn.count("<path") < 60
    assert len(drawn) < 400_000


def test_numbers_as_people_read_them() -> None:
    values = [None, 0, 1234567, 0.24226, 61.5678, 0.0, 1234.5678, 1e-9, -0.5, 123456.7]
    assert [short(value) for value in values] == [
        "–", "0", "1,234,567", "0.2423", "61.57", "0", "1,235", "1.000e-09", "-0.5000", "123,457",
    ]  # fmt: skip


def test_the_readme_s_picture_has_the_numbers_of_the_docs() -> None:
    """Of both screens; `make picture` draws them anew when docs/quality.md has changed."""
    import picture

    dense, found = picture.measured()
    assert len(found) == 3
    for row in found.values():
        assert len(row) >= 3
        assert [left for left, _ in row] == sorted((left for left, _ in row), reverse=True)
        assert min(value for _, value in row) > 0.99 * dense
    for screen in ("light", "dark"):
        drawn = (ROOT / "docs" / f"picture-{screen}.svg").read_text()
        assert picture.words() in unescape(drawn), "run `make picture`"
        assert len(drawn) < 20_000
