"""`d2moe compare`: its rows against single runs of the other commands, what it remembers, and what it prints."""

from __future__ import annotations

import html
import json
import os
import re
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from compression import TINY, d2moe_here, script
from safetensors.torch import load_file

from d2moe_vllm.format.files import check_checkpoint
from offline.cli.compare import spread
from offline.errors import InputError, reason
from offline.source.text import as_text
from offline.source.tokens import choose_windows, open_tokenizer

FEW = ("--windows", "16", "--seq-len", "64")


@pytest.fixture(scope="module")
def short(texts: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("short") / "held-out.txt"
    path.write_text(texts[1].read_text()[:8_000])
    return path


@pytest.fixture(scope="module")
def command(few_words: Path, short: Path, tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """One method and one baseline at two ratios, of which the baseline reaches one; what is written is kept."""
    folder = tmp_path_factory.mktemp("compared")
    return [
        "compare", TINY, "--ratio", 0.4, 0.6, "--method", "d2", "--baseline", "frequency", "--text", short,
        "--calibration", few_words, *FEW, "--workdir", folder / "work", "--keep", "--html", folder / "table.html",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def table(command: list[object]) -> dict[str, Any]:
    done = d2moe_here(*command, "--json")
    assert done.returncode == 0, done.stderr
    written = Path(str(command[-1]))
    written.rename(written.with_name("first.html"))  # other tests run the command again
    return json.loads(done.stdout)


def row(table: dict[str, Any], name: str, ratio: float) -> dict[str, Any]:
    (found,) = [one for one in table["rows"] if (one["name"], one["ratio"]) == (name, ratio)]
    return found


def evaluate(folder: object, text: Path) -> float:
    done = d2moe_here("eval", folder, "--text", text, "--seq-len", "64", "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["perplexity"]


def test_rows_are_what_single_runs_give(table: dict[str, Any], few_words: Path, short: Path, tmp_path: Path) -> None:
    """Bytes, parameters and perplexity, to the last digit; the calibration is the one all have in their records."""
    done = d2moe_here("compress", TINY, tmp_path / "d2", "--ratio", 0.4, "--calibration", few_words, *FEW, "--json")
    assert done.returncode == 0, done.stderr
    single, found = json.loads(done.stdout), row(table, "d2", 0.4)
    assert found["bytes"] == single["result"]["bytes"]
    assert found["parameters"] == single["result"]["parameters"]
    assert found["stored_ratio"] == pytest.approx(single["result"]["stored_ratio"], abs=1e-12)
    assert found["perplexity"] == {"held-out.txt": evaluate(tmp_path / "d2", short)}
    assert table["rows"][0]["kind"] == "source"
    assert table["rows"][0]["perplexity"] == {"held-out.txt": evaluate(TINY, short)}
    tokens = choose_windows(open_tokenizer(TINY), as_text(few_words), 16, 64, 0)
    assert table["calibration"]["tokens_sha256"] == tokens.sha256
    for folder in (Path(found["path"]), tmp_path / "d2"):
        recorded = json.loads((folder / "d2moe_stats.json").read_text())["calibration"]["tokens_sha256"]
        assert recorded == tokens.sha256
    files = sorted((tmp_path / "d2").glob("*.safetensors"))
    assert [file.read_bytes() for file in files] == [(Path(found["path"]) / file.name).read_bytes() for file in files]
    assert found["seconds"] > 0
    assert found["peak_memory_bytes"] > 1e7


def test_a_ratio_that_cannot_be_reached_is_a_row(table: dict[str, Any], texts: tuple[Path, Path], short: Path) -> None:
    """The others are measured all the same, and what the row says can be reached is: plan agrees for MoBE."""
    found = row(table, "frequency", 0.6)
    assert 0.5 < found["reachable"] < 0.6
    assert found["bytes"] is found["perplexity"] is found["seconds"] is None
    assert row(table, "frequency", 0.4)["reachable"] is None
    assert row(table, "d2", 0.6)["stored_ratio"] >= 0.6
    assert row(table, "frequency", 0.4)["stored_ratio"] >= 0.4


def test_mobe_says_how_far_it_goes(few_words: Path, short: Path, tmp_path: Path) -> None:
    arguments = ("--text", short, "--calibration", few_words, *FEW, "--workdir", tmp_path / "work")
    done = d2moe_here("compare", TINY, "--ratio", "0.5", "0.7", "--method", "mobe", *arguments)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("mobe")]
    assert len(lines) == 2
    (most,) = {re.fullmatch(r"mobe +\d+ % +not reachable: +at most ([0-9.]+) % *", line)[1] for line in lines}
    plan = ("plan", TINY, "--method", "mobe", *FEW)
    assert d2moe_here(*plan, "--ratio", float(most) / 100).returncode == 0
    refused = d2moe_here(*plan, "--ratio", float(most) / 100 + 0.002)
    assert refused.returncode == 2
    assert "cannot be reached" in refused.stderr


def test_finished_rows_are_not_computed_again(
    command: list[object], table: dict[str, Any], tmp_path: Path, texts: tuple[Path, Path]
) -> None:
    """The second run writes no file of a row and says the same; a new text is measured on what was kept; another
    calibration makes all rows anew."""
    work = Path(table["workdir"])

    def times() -> dict[str, int]:
        return {str(path): path.stat().st_mtime_ns for path in work.rglob("*") if path.is_file()}

    before = times()
    again = d2moe_here(*command, "--json")
    assert json.loads(again.stdout) == table
    assert times() == before
    assert "layer" not in again.stderr

    other = tmp_path / "other.txt"
    other.write_text(texts[1].read_text()[-6_000:])
    more = d2moe_here(*command, "--text", other, "--json")
    assert more.returncode == 0, more.stderr
    assert "compressing" not in more.stderr
    content = json.loads(more.stdout)
    assert row(content, "d2", 0.4)["perplexity"]["other.txt"] == evaluate(work / "d2-0.4", other)
    assert row(content, "d2", 0.4)["seconds"] == row(table, "d2", 0.4)["seconds"]

    few = [value for value in command if value not in ("d2", "--method", 0.6)]
    changed = d2moe_here(*few, "--seed", "1", "--json")
    assert changed.returncode == 0, changed.stderr
    assert "calibration" in changed.stderr
    assert json.loads(changed.stdout)["calibration"]["tokens_sha256"] != table["calibration"]["tokens_sha256"]


def test_a_killed_run_goes_on_and_says_so(table: dict[str, Any], command: list[object], tmp_path: Path) -> None:
    """The compression continues where it was, ends in the same bytes, and its time is marked as not the whole."""
    work = tmp_path / "work"
    chosen = ["--ratio", 0.4, "--method", "d2", *command[command.index("--text") : command.index("--workdir")]]
    arguments = ["compare", *map(str, (TINY, *chosen, "--workdir", work, "--html", tmp_path / "table.html"))]
    done = work / "d2-0.4.work" / "layers" / "00003" / "written-done.safetensors"
    with subprocess.Popen([script("d2moe"), *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
        while not done.exists():
            assert run.poll() is None, "ended before its last layer was done"
            time.sleep(0.005)
        run.kill()
    assert done.exists()
    again = d2moe_here(*arguments, "--json")
    assert again.returncode == 0, again.stderr
    assert "resuming" in again.stderr
    found, whole = row(json.loads(again.stdout), "d2", 0.4), row(table, "d2", 0.4)
    assert found["resumed"]
    assert not whole["resumed"]
    assert {key: found[key] for key in ("bytes", "perplexity")} == {key: whole[key] for key in ("bytes", "perplexity")}
    assert "≥" in (tmp_path / "table.html").read_text()


def test_without_keep_only_the_rows_stay(few_words: Path, short: Path, tmp_path: Path) -> None:
    arguments = ("--text", short, "--calibration", few_words, *FEW, "--workdir", tmp_path / "work", "--json")
    done = d2moe_here("compare", TINY, "--ratio", "0.2", "--baseline", "output-norm", *arguments)
    assert done.returncode == 0, done.stderr
    found = row(json.loads(done.stdout), "output-norm", 0.2)
    assert found["path"] is None
    assert {path.name for path in (tmp_path / "work").iterdir()} == {".d2moe-compare", "rows"}


def test_a_row_that_fails_leaves_the_others(few_words: Path, short: Path, tmp_path: Path) -> None:
    """A folder of somebody else's stands where one row would compute: that row says so, the others are whole, the exit
    code is 1. Once it is gone the same command makes the missing row, and no other."""
    work, page = tmp_path / "work", tmp_path / "table.html"
    foreign = work / "d2-0.2.work"
    arguments = (
        "compare", TINY, "--ratio", "0.2", "--method", "d2", "--baseline", "frequency", "--text", short,
        "--calibration", few_words, *FEW, "--workdir", work, "--html", page,
    )  # fmt: skip
    foreign.mkdir(parents=True)
    (work / ".d2moe-compare").touch()
    (foreign / "mine.txt").write_text("mine")
    done = d2moe_here(*arguments, "--json")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("d2moe: 1 of 3 rows failed")
    assert "Traceback" not in done.stderr
    content = json.loads(done.stdout)
    failed = row(content, "d2", 0.2)
    assert "not empty and not ours" in failed["failed"]
    assert failed["bytes"] is failed["perplexity"] is failed["seconds"] is None
    assert "not empty and not ours" in page.read_text()
    whole = [one for one in content["rows"] if one["name"] != "d2"]
    assert [one["name"] for one in whole] == ["source", "frequency"]
    assert all(one["perplexity"]["held-out.txt"] > 1 and one["failed"] is None for one in whole)
    assert (foreign / "mine.txt").read_text() == "mine"

    table = d2moe_here(*arguments)
    assert table.returncode == 1
    lines = table.stdout.splitlines()
    assert any(re.match(r"d2 +20 % +failed: +see below", line) for line in lines)
    assert any(line.startswith("d2 20 % failed: ") and "not empty and not ours" in line for line in lines)

    (foreign / "mine.txt").unlink()
    again = d2moe_here(*arguments, "--json")
    assert again.returncode == 0, again.stderr
    mended = json.loads(again.stdout)
    assert row(mended, "d2", 0.2)["failed"] is None
    assert row(mended, "d2", 0.2)["perplexity"]["held-out.txt"] > 1
    assert [one for one in mended["rows"] if one["name"] != "d2"] == whole


def test_refused_by_one_method_is_a_row_refused_by_all_is_an_error(
    few_words: Path, short: Path, tmp_path: Path
) -> None:
    """What is too little memory for a compression is enough for the baselines that hold one layer; alone, the method is
    refused as `compress` would, before any work."""
    arguments = ("--ratio", "0.2", "--text", short, "--calibration", few_words, *FEW, "--workdir", tmp_path / "work")
    little = ("compare", TINY, *arguments, "--memory", "500MB", "--method", "mobe")
    done = d2moe_here(*little)
    assert done.returncode == 2
    assert "does not suffice" in done.stderr
    assert not (tmp_path / "work").exists()
    done = d2moe_here(*little, "--baseline", "frequency", "--json")
    assert done.returncode == 1
    content = json.loads(done.stdout)
    assert "does not suffice" in row(content, "mobe", 0.2)["failed"]
    assert row(content, "frequency", 0.2)["perplexity"]["held-out.txt"] > 1


def test_an_interrupt_ends_it(few_words: Path, short: Path, tmp_path: Path) -> None:
    """Ctrl-C is no failure of a row: no further row is tried."""
    work = tmp_path / "work"
    arguments = (
        "compare", TINY, "--ratio", "0.2", "0.4", "--method", "d2", "--text", short, "--calibration", few_words, *FEW,
        "--workdir", work,
    )  # fmt: skip
    with subprocess.Popen([script("d2moe"), *map(str, arguments)], stderr=subprocess.PIPE, text=True) as run:
        while not (work / "d2-0.2.work" / "layers").exists():
            assert run.poll() is None, "ended before it began"
            time.sleep(0.005)
        run.send_signal(signal.SIGINT)
        _, said = run.communicate(timeout=60)
    assert run.returncode == 1
    assert said.strip().splitlines()[-1] == "d2moe: interrupted; run the same command again to continue"
    assert not (work / "d2-0.4.work").exists()
    assert {path.name for path in (work / "rows").iterdir()} == {"source-0.0.json"}


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "out of memory (MemoryError)"),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: you tried"),
            "out of",
        ),
        (InputError("ratio 2 is\nwrong"), "ratio 2 is wrong"),
        (KeyError("a"), "KeyError: 'a'"),
    ],
)
def test_reasons_are_one_line(error: Exception, said: str) -> None:
    assert reason(error).startswith(said)
    assert "\n" not in reason(error)


def test_the_experts_bytes_are_those_of_their_tensors(few_words: Path, short: Path, tmp_path: Path) -> None:
    """Of every kind of row, counted once more from the files: headers are none of them, layers that a method leaves
    dense are. `channels` stores unequal widths; what is rounded counts as codes and scales."""
    page = tmp_path / "table.html"
    arguments = (
        "compare", TINY, "--ratio", "0.2", "0.9", "--method", "moe-svd", "--baseline", "channels", "frequency",
        "rtn-4", "--text", short, "--calibration", few_words, *FEW, "--workdir", tmp_path / "work", "--html", page,
        "--keep",
    )  # fmt: skip
    done = d2moe_here(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    content = json.loads(done.stdout)
    dense = 4 * 8 * 3 * 128 * 256 * 2
    for name in ("moe-svd", "channels", "frequency"):
        found, folder = row(content, name, 0.2), tmp_path / "work" / f"{name}-0.2"
        tensors = {key: one for file in folder.glob("*.safetensors") for key, one in load_file(file).items()}
        stored = sum(one.nbytes for key, one in tensors.items() if ".experts." in key)
        assert found["expert_bytes"] == stored == found["expert_share"] * dense
        assert found["counted"] is None
        assert found["stored_ratio"] >= 0.2
    source, rounded = content["rows"][0], content["rows"][-1]
    assert (source["expert_bytes"], source["expert_share"]) == (dense, 1)
    assert rounded["expert_bytes"] == dense * (4 / 8 + 2 / 64) / 2
    widths = check_checkpoint(tmp_path / "work" / "channels-0.2").layers
    assert len({sum(counts) for layer in widths.values() if layer.channels for counts in layer.channels.experts}) > 8
    channels = row(content, "channels", 0.2)
    assert channels["stored_ratio"] < 0.201
    assert channels["perplexity"]["held-out.txt"] > source["perplexity"]["held-out.txt"]
    assert 0.7 < row(content, "channels", 0.9)["reachable"] < 0.72
    assert content["frontier"] is None
    again = d2moe_here(*arguments)
    for shown in (again.stdout, html.unescape(page.read_text())):
        assert f"{100 * channels['expert_share']:.1f} %" in shown
        assert "26.6 %*" in shown


def test_the_defaults_curve_is_told_with_the_table(table: dict[str, Any], command: list[object]) -> None:
    """Through the two rows of d2; the other row beside it lies between them, in size, and far above."""
    judged = table["frontier"]["texts"]["held-out.txt"]
    default = [row(table, "d2", ratio) for ratio in (0.6, 0.4)]
    assert judged["curve"] == [[one["expert_share"], one["perplexity"]["held-out.txt"]] for one in default]
    (beside,) = judged["rows"]
    assert (beside["name"], beside["ratio"], judged["largest"]) == ("frequency", 0.4, None)
    assert beside["below"] < -0.1
    assert beside["share"] == row(table, "frequency", 0.4)["expert_share"] == 3 / 8
    page = html.unescape(Path(str(command[-1])).with_name("first.html").read_text())
    for shown in (page, d2moe_here(*command).stdout):
        assert "The default's curve (d2) on held-out.txt: none of the other rows between 50 and 7 %" in shown
    assert page.count("<svg") == 1


class _Table(HTMLParser):
    """The cells of a page's one table, and every address in the page."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.open: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [str(value) for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "link"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def test_the_table_is_printed_although_the_page_cannot_be_written(
    table: dict[str, Any], command: list[object], tmp_path: Path
) -> None:
    """The page is written last: here something lies where it is put together."""
    (tmp_path / "table.html.partial").mkdir()
    done = d2moe_here(*command[:-1], tmp_path / "table.html", "--json")
    assert done.returncode == 2
    rows = json.loads(done.stdout)["rows"]
    # Other tests here have rows computed anew, which takes another time.
    assert [(row["name"], row["ratio"], row["bytes"], row["perplexity"]) for row in rows] == [
        (row["name"], row["ratio"], row["bytes"], row["perplexity"]) for row in table["rows"]
    ]
    assert "table.html.partial" in done.stderr.splitlines()[-1]


def test_html_is_whole_and_says_the_same(table: dict[str, Any], command: list[object]) -> None:
    """Every tag is closed, nothing is fetched, and the cells are the JSON's figures."""
    page = Path(str(command[-1])).with_name("first.html").read_text()
    parsed = _Table()
    parsed.feed(page)
    assert parsed.open == []
    assert all(link.startswith("data:") for link in parsed.links)
    assert "://" not in page.replace("http://www.w3.org/", "")
    assert "light dark" in page
    assert len(parsed.rows) == 1 + len(table["rows"])
    for cells, found in zip(parsed.rows[1:], table["rows"], strict=True):
        assert cells[0] == found["name"]
        if found["reachable"] is None:
            assert f"{found['bytes']:,}" in cells
            assert f"{found['perplexity']['held-out.txt']:.2f}" in cells
        else:
            assert cells[2].startswith("not reachable: at most ")


def test_without_workdir_the_same_command_goes_on_from_any_folder(
    few_words: Path, short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the user's cache; another calibration has a folder of its own; nothing is left where one stands."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    arguments = ("compare", TINY, "--ratio", "0.2", "--baseline", "frequency", "--text", short, *FEW)
    found = []
    for number, more in enumerate([(), (), ("--seed", "1")]):
        (tmp_path / str(number)).mkdir()
        monkeypatch.chdir(tmp_path / str(number))
        done = d2moe_here(*arguments, "--calibration", few_words, *more, "--json")
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout))
        assert f"working folder: {found[-1]['workdir']}\n" in done.stderr
        assert os.listdir() == []
    assert found[0] == found[1]
    assert found[0]["workdir"] != found[2]["workdir"]
    assert {Path(one["workdir"]).parent for one in found} == {tmp_path / "cache" / "d2moe" / "compare"}


def test_beside_the_page_lies_its_working_folder(few_words: Path, short: Path, tmp_path: Path) -> None:
    arguments = ("--text", short, "--calibration", few_words, *FEW, "--html", tmp_path / "table.html")
    done = d2moe_here("compare", TINY, "--ratio", "0.2", "--baseline", "frequency", *arguments)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"table.html", "table.html.d2moe-compare"}


def test_a_page_without_jinja2_is_refused_before_the_run(
    few_words: Path, short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)  # as Python itself marks what cannot be imported
    arguments = ("--text", short, "--calibration", few_words, *FEW, "--html", tmp_path / "table.html")
    done = d2moe_here("compare", TINY, "--ratio", "0.2", "--baseline", "frequency", *arguments)
    assert done.returncode == 2
    assert "pip install jinja2" in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_names_are_escaped(table: dict[str, Any]) -> None:
    from offline.compare.html import page

    content = json.loads(json.dumps(table).replace("held-out.txt", "<b>&.txt").replace("tiny-mixtral", "<i>"))
    written = page(content)
    assert "<b>" not in written
    assert "<i>" not in written
    assert "&lt;b&gt;&amp;.txt" in written


def test_options_take_several_values() -> None:
    given = "compare m --ratio 0.2 0.4 --json --method d2 mobe --text=a --text b c"
    wanted = "compare m --ratio 0.2 --ratio 0.4 --json --method d2 --method mobe --text=a --text b --text c"
    assert spread(given.split()) == wanted.split()
    assert spread(["plan", "m", "--ratio", "0.2", "0.4"]) == ["plan", "m", "--ratio", "0.2", "0.4"]


def test_bad_input_is_one_line(few_words: Path, short: Path, tmp_path: Path) -> None:
    """Exit code 2, one line that names what is wrong, and nothing is left behind."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "mine.html").write_text("mine")
    work = tmp_path / "work"
    good: dict[str, list[object]] = {
        "--ratio": ["0.4"], "--method": ["d2"], "--text": [short], "--calibration": [few_words], "--windows": ["16"],
        "--seq-len": ["64"], "--workdir": [work],
    }  # fmt: skip
    for changes, fragment in [
        ({"--ratio": []}, "--ratio"),
        ({"--ratio": ["0.4", "0.4"]}, "twice"),
        ({"--ratio": ["1.4"]}, "ratio"),
        ({"--method": ["d3"]}, "d3"),
        ({"--baseline": ["experts"]}, "frequency"),
        ({"--text": [tmp_path / "none"]}, "cannot be read"),
        ({"--text": [short, short]}, "twice"),
        ({"--calibration": []}, "--calibration"),
        ({"--windows": ["100000"]}, "too short"),
        ({"--seq-len": ["5000"]}, "1024"),
        ({"--workdir": [tmp_path / "full"]}, "not empty"),
        ({"--workdir": [TINY]}, "source"),
        ({"--vllm-args": ["--enforce-eager"]}, "--serve"),
        ({"--html": [tmp_path / "mine.html"]}, "exists already"),
        ({"--html": [tmp_path / "none" / "a.html"]}, "existing folder"),
    ]:
        options = {name: values for name, values in {**good, **changes}.items() if values}
        done = d2moe_here("compare", TINY, *(part for name, values in options.items() for part in (name, *values)))
        assert done.returncode == 2, (changes, done)
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
        assert fragment in done.stderr
        assert not work.exists()
    assert os.listdir(tmp_path / "full") == ["mine.txt"]
    assert (tmp_path / "mine.html").read_text() == "mine"
