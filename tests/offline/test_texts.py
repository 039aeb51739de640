"""Texts in any form and of any length: what is read, what is refused, and what is in memory meanwhile."""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from compression import TINY, d2moe_here, script
from families import write_family
from hostile import refused

from offline.errors import InputError
from offline.source import text as texts_module
from offline.source.text import ENTRY, PIECE, Cursor, Text, as_text
from offline.source.tokens import Tokenizer, choose_windows, open_tokenizer

A, B = "The first part.\nIt has two lines.", "The second – with a dash, and an emoji 🙂."
WHOLE = f"{A}\n\n{B}"
ENTRIES = [{"text": A}, {"text": B, "id": 2}]
LINES = "\n".join(json.dumps(entry) for entry in ENTRIES)


def read(path: Path) -> str:
    return "".join(as_text(path).characters())


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    return path


# Forms


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("plain.txt", WHOLE),
        ("windows.txt", WHOLE.replace("\n", "\r\n")),
        ("mark.txt", WHOLE.encode("utf-8-sig")),
        ("wide.txt", WHOLE.encode("utf-16")),
        ("wider.txt", WHOLE.encode("utf-32")),
        ("no-suffix", WHOLE),
        ("lines.jsonl", LINES),
        ("lines.json", LINES),
        ("lines.ndjson", f"\n{LINES}\n\n"),
        ("LINES.JSONL", LINES.replace("\n", "\r\n")),
        ("mark.jsonl", LINES.encode("utf-8-sig")),
        ("wide.jsonl", LINES.encode("utf-16")),
        ("array.json", json.dumps(ENTRIES)),
        ("indented.json", json.dumps(ENTRIES, indent=2, ensure_ascii=False)),
        ("array.jsonl", f" \n{json.dumps(ENTRIES)}\n"),
    ],
)
def test_every_form_is_the_same_text(name: str, content: str | bytes, tmp_path: Path) -> None:
    assert read(write(tmp_path / name, content)) == WHOLE


def test_several_files_are_one_text_in_their_order(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a.txt", A), write(tmp_path / "b.json", json.dumps([{"text": B}]))
    text = Text((first, second))
    assert "".join(text.characters()) == WHOLE
    assert text.length() == len(WHOLE)
    assert text.sha256() == as_text(write(tmp_path / "c.txt", WHOLE)).sha256()
    assert "".join(Text((second, first)).characters()) == f"{B}\n\n{A}"


@pytest.mark.parametrize(
    ("name", "content", "fragments"),
    [
        ("a.jsonl", '{"text": "x"}\n{"text": "a \\ud83d b"}', ("line 2", "\\ud83d", "surrogate")),
        ("a.json", '[{"text": "x"},\n{"text": "a \\udc00"}]', ("line 2", "\\udc00")),
        ("a.txt", b"one\ntwo \xff", ("line 2", "UTF-8", "invalid start byte")),
        ("a.txt", b"one\ntwo\n\xed\xa0\xbd", ("line 3", "UTF-8")),
        ("a.txt", b"one\ntwo \xe2\x82", ("line 2", "UTF-8", "end of data")),
        ("a.txt", b"o\0n\0e\0", ("line 1", "NUL")),
        ("a.txt", "one\ntwo".encode("utf-16")[:-1], ("line 2", "UTF-16")),
        ("a.txt", LINES, ("holds JSON", ".jsonl")),
        ("a.md", json.dumps(ENTRIES), ("holds JSON",)),
        ("a.txt", b"\x1f\x8b\x08\x00", ("gzip", "unpack")),
        ("a.parquet", b"PAR1....", ("Parquet",)),
        ("a.jsonl", '{"text": "x"}\n{"content": "y"}', ("line 2", "`text`", "'content'")),
        ("a.jsonl", '{"text": "x"}\n{"text": ["y"]}', ("line 2", "`text` is list")),
        ("a.jsonl", '{"text": "x"}\nthe end', ("line 2", "no JSON")),
        ("a.jsonl", '{"text": "x"}\n"y"', ("line 2", "it is str")),
        ("a.jsonl", '{"text": "x", "n": ' + "1" * 5000 + "}", ("line 1", "no JSON")),
        ("a.jsonl", '{"text": ' + "[" * 100_000, ("line 1", "no JSON")),
        ("a.json", '{\n"text": "x"\n}', ("line 1", "no JSON")),
        ("a.json", '[{"text": "x"}\n{"text": "y"}]', ("line 2", "comma")),
        ("a.json", '[{"text": "x"},\n"y"]', ("line 2", "each entry")),
        ("a.json", '[{"text": "x"},\n{"text" "y"}, ' + '{"text": "z"},' * 9999, ("line 2", "no JSON")),
        ("a.json", '[{"text": "x"}]\n[]', ("line 2", "behind the end")),
        ("a.json", '[{"text": "x"},', ("line 1", "no JSON")),
    ],
)
def test_what_is_no_text_is_one_line(
    name: str, content: str | bytes, fragments: tuple[str, ...], tmp_path: Path
) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(InputError) as error:
        read(path)
    for fragment in (str(path), *fragments):
        assert fragment in str(error.value)


@pytest.mark.parametrize("form", ["jsonl", "json"])
def test_one_entry_has_a_bound_and_plain_text_has_none(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(texts_module, "ENTRY", 1 << 18)
    long = "word " * 100_000
    entries = [{"text": "short"}, {"text": long}]
    content = json.dumps(entries) if form == "json" else "\n".join(map(json.dumps, entries))
    path = write(tmp_path / f"long.{form}", content)
    with pytest.raises(InputError, match="more than 262,144 characters; split it, or save it as plain text"):
        read(path)
    assert read(write(tmp_path / "long.txt", long)) == long
    assert ENTRY > 1 << 22


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    """A pipe can be read once only, and would be waited for."""
    os.mkfifo(tmp_path / "pipe")
    for path, fragment in ((tmp_path / "pipe", "save it as a file first"), (tmp_path, "is a folder"),
                           (tmp_path / "none", "No such file"), (Path("/dev/zero"), "no regular file")):  # fmt: skip
        refused(d2moe_here("eval", TINY, "--text", path), fragment)


# Pieces


def test_pieces_are_cut_where_lines_and_words_begin(tmp_path: Path) -> None:
    draw = random.Random(0)
    words = ["of ", "the ", "  ", "language\n", "\n", "\n\n", "\t", "naïve "]
    text = "".join(draw.choices(words, k=700_000))
    pieces = list(as_text(write(tmp_path / "a.txt", text)).pieces())
    assert "".join(pieces) == text
    assert len(pieces) == -(-len(text) // PIECE)
    for before, after in itertools.pairwise(pieces):
        assert len(before) <= PIECE
        assert before.endswith("\n")
        assert not before[-2].isspace()
        assert not after[0].isspace()
    one = list(as_text(write(tmp_path / "b.txt", "word " * 300_000)).pieces())
    assert one[1].startswith(" word")
    assert [len(piece) for piece in as_text(write(tmp_path / "c.txt", "x" * (PIECE + 5))).pieces()] == [PIECE, 5]


def test_a_text_of_several_pieces_has_the_tokens_of_the_whole(tmp_path: Path, texts: tuple[Path, Path]) -> None:
    """The bundled tokenizer splits lines from one another, so that nothing changes where pieces meet."""
    tokenizer, text = open_tokenizer(TINY), texts[0].read_text() * 3
    assert len(text) > PIECE
    pieces = list(as_text(write(tmp_path / "a.txt", text)).pieces())
    whole = torch.tensor(tokenizer.codec.encode(text))
    assert torch.equal(torch.cat([tokenizer.encode(piece) for piece in pieces]), whole)


def test_a_cursor_goes_forwards(tmp_path: Path) -> None:
    text = "".join(chr(97 + number % 26) for number in range(300_000))
    cursor = Cursor(as_text(write(tmp_path / "a.txt", text)))
    for position, count in ((0, 5), (5, 70_000), (3, 1), (200_000, 10), (299_999, 10), (400_000, 1)):
        cursor.go(position)
        assert cursor.ahead(count) == text[cursor.position : cursor.position + count]
    assert cursor.position == len(text)


# Windows


class Counting:
    """A tokenizer with one token for each character, which counts what it is given."""

    name, read = "counting", 0

    def encode(self, text: str) -> list[int]:
        Counting.read += len(text)
        return [ord(one) for one in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


def test_of_a_long_text_only_what_the_windows_need_is_tokenized(tmp_path: Path) -> None:
    """One window from every part of it, at a line's beginning, none over another; drawn anew by another seed."""
    lines = [f"line {number:07d} of the text\n" for number in range(200_000)]
    text = as_text(write(tmp_path / "a.txt", "".join(lines)))
    tokenizer = Tokenizer(tmp_path, None, Counting())
    Counting.read = 0
    windows = choose_windows(tokenizer, text, 16, 100, seed=0)
    assert Counting.read <= 16 * 100 * 16
    assert windows.tokens.shape == (16, 100)
    found = ["".join(map(chr, window.tolist())) for window in windows.tokens]
    numbers = [int(window[5:12]) for window in found]
    assert all(window.startswith("line ") for window in found)
    assert [number * 16 // len(lines) for number in numbers] == list(range(16))
    again, other = (choose_windows(tokenizer, text, 16, 100, seed=seed) for seed in (0, 1))
    assert again.sha256 == windows.sha256 != other.sha256


def test_a_place_too_near_the_end_is_not_a_text_too_short(tmp_path: Path) -> None:
    text = as_text(write(tmp_path / "a.txt", "".join(f"line {number:07d} of the text\n" for number in range(50_000))))

    def last(seed: int) -> float:
        return float(torch.rand(4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)[-1])

    seed = next(seed for seed in range(100_000) if last(seed) > 0.9999)
    windows = choose_windows(Tokenizer(tmp_path, None, Counting()), text, 4, 100, seed=seed)
    numbers = ["".join(map(chr, window.tolist()))[5:12] for window in windows.tokens]
    assert len(windows.tokens) == 4
    assert 49_900 < int(numbers[-1]) < 50_000


def test_of_a_text_that_is_not_much_longer_all_is_drawn_from(tmp_path: Path) -> None:
    """As in version 1: the windows of the whole text, without replacement, in text order."""
    text = as_text(write(tmp_path / "a.txt", "abcdefghij" * 1000))
    tokenizer = Tokenizer(tmp_path, None, Counting())
    windows = choose_windows(tokenizer, text, 5, 100, seed=3)
    chosen = torch.randperm(100, generator=torch.Generator().manual_seed(3))[:5].sort().values
    assert torch.equal(windows.tokens, torch.tensor([ord(c) for c in "abcdefghij"] * 1000).view(100, 100)[chosen])


def test_a_text_that_is_too_short_is_told_what_it_is_good_for(tmp_path: Path) -> None:
    for content, remedy in ((A * 9, "--windows 2"), ("a few words", "--windows 1 --seq-len"), ("", "give more text\n")):
        path = write(tmp_path / "a.txt", content)
        given = ("--windows", "64", "--seq-len", "32", "--ratio", "0.3", "--calibration", path)
        done = d2moe_here("compress", TINY, tmp_path / "out", *given)
        refused(done, "the text is too short")
        assert remedy in done.stderr
        assert "--seq-len 0" not in done.stderr
        assert not (tmp_path / "out").exists()


def test_two_calibration_texts_are_both_read(tmp_path: Path, few_words: Path) -> None:
    words = few_words.read_text()
    parts = [write(tmp_path / name, part) for name, part in (("a.txt", words[:9000]), ("b.txt", words[9000:]))]
    options = [option for path in parts for option in ("--calibration", path)]
    done = d2moe_here(
        "compress",
        TINY,
        tmp_path / "out",
        "--ratio",
        "0.1",
        "--bits",
        "16",
        "--windows",
        "8",
        "--seq-len",
        "64",
        *options,
    )
    assert done.returncode == 0, done.stderr
    stats = json.loads((tmp_path / "out" / "d2moe_stats.json").read_text())
    joined = as_text(write(tmp_path / "c.txt", f"{words[:9000]}\n\n{words[9000:]}"))
    assert stats["calibration"]["tokens_sha256"] == choose_windows(open_tokenizer(TINY), joined, 8, 64, 0).sha256
    evaluated = [d2moe_here("eval", TINY, *[option for path in given for option in ("--text", path)], "--seq-len", "64",
                            "--windows", "8", "--json") for given in (parts, joined.paths)]  # fmt: skip
    assert json.loads(evaluated[0].stdout)["perplexity"] == json.loads(evaluated[1].stdout)["perplexity"]


def test_eval_measures_on_some_windows(few_words: Path) -> None:
    found = [
        json.loads(d2moe_here("eval", TINY, "--text", few_words, "--seq-len", "64", *more, "--json").stdout)
        for more in ((), ("--windows", "5"), ("--windows", "5", "--seed", "1"))
    ]
    assert [one["windows"] for one in found] == [found[0]["windows"], 5, 5]
    assert len({one["perplexity"] for one in found}) == 3
    assert found[0]["windows"] > 5


# Memory


def test_eval_stays_within_the_memory_it_is_given(few_words: Path) -> None:
    """With less it takes less at once, with too little it says what it needs; the figure is the same."""
    given = ("eval", TINY, "--text", few_words, "--seq-len", "64", "--json")
    whole = json.loads(d2moe_here(*given).stdout)
    predicted = whole["predicted"]["peak_memory_bytes"]
    less = json.loads(d2moe_here(*given, "--memory", str(predicted - 1_000_000)).stdout)
    assert less["predicted"]["peak_memory_bytes"] < predicted
    assert less["perplexity"] == pytest.approx(whole["perplexity"], rel=1e-6)
    refused(d2moe_here(*given, "--memory", "100MB"), "does not suffice", "a higher --memory")


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family(tmp_path_factory.mktemp("quick") / "model", "mixtral", num_hidden_layers=1)


@pytest.fixture(scope="module", params=["plain", "jsonl", "array"])
def large(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, texts: tuple[Path, Path]) -> Path:
    """100 MB of text."""
    part, folder = texts[0].read_text(), tmp_path_factory.mktemp("large")
    many: Iterator[str] = (part for _ in range(100_000_000 // len(part.encode()) + 1))
    path = folder / {"plain": "a.txt", "jsonl": "a.jsonl", "array": "a.json"}[request.param]
    with path.open("w") as file:
        if request.param == "plain":
            file.writelines(many)
        else:
            ends = ("", "\n") if request.param == "jsonl" else (", ", "]")
            file.write("" if request.param == "jsonl" else "[")
            for number, content in enumerate(many):
                file.write((ends[0] if number else "") + json.dumps({"text": content}))
                file.write("\n" if request.param == "jsonl" else "")
            file.write("" if request.param == "jsonl" else ends[1])
    assert path.stat().st_size >= 100_000_000
    return path


def run(*arguments: object) -> dict[str, Any]:
    done = subprocess.run(
        [script("d2moe"), *map(str, arguments), "--memory", "2GB", "--json"],
        capture_output=True, text=True, check=False, timeout=1800,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    content: dict[str, Any] = json.loads(done.stdout)
    return content


def test_memory_does_not_depend_on_the_length_of_a_text(large: Path, quick: Path, tmp_path: Path) -> None:
    """100 MB under --memory 2GB: the peak (VmHWM) within a tenth of the prediction, where 15.9 GB were needed once."""
    given = ("--ratio", "0.1", "--windows", "8", "--seq-len", "128", "--calibration", large)
    # To measure on all of it takes minutes: once.
    some = () if large.suffix == ".txt" else ("--windows", "64")
    evaluated = run("eval", quick, "--text", large, "--seq-len", 512, *some)
    assert evaluated["tokens"] > (10_000 if some else 10_000_000)
    for found in (run("compress", quick, tmp_path / "out", *given), evaluated):
        assert found["peak_memory_bytes"] == pytest.approx(found["predicted"]["peak_memory_bytes"], rel=0.1)
