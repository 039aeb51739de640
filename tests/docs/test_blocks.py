"""Every fenced block of the documents does what it says.

Commands are run, in a folder as a reader has it (reader.py says what stands for Mixtral); Python is run; JSON and YAML
are read by those they are for. A block that cannot be run on a CPU without a network says why in a comment before it
(`<!-- needs: gpu -->`; the words are in syntax.py), and is read by the parsers of the programs that it calls.
"""

from __future__ import annotations

import json
import re
import time
import urllib.request
from pathlib import Path

import forks
import pytest
import yaml
from blocks import DOCUMENTS, Block, MarkupError, blocks, inline_code
from compression import ROOT
from reader import PORT, Models, lay_out, written
from running import commands, difference, run, shape, steps, words
from service import DocumentedServer
from syntax import NEEDS, check, make, valid_shell

from d2moe_vllm.format.config import Manifest, parse_config
from d2moe_vllm.format.familyrow import FamilyRow
from offline.plan.recipe import Recipe

BLOCKS = [block for file in DOCUMENTS for block in blocks(file)]
PROGRAMS = re.compile(r"^\s*(\$ |d2moe |vllm |make |pip |uv |python |docker |kubectl |curl )", re.MULTILINE)


def runs(block: Block) -> bool:
    return not block.needs - {"long"}


def chosen(*kinds: str) -> list[object]:
    """Parameters for a test: the blocks that it runs, those that take long in the slow tier."""
    found = [block for block in BLOCKS if block.kind in kinds and runs(block)]
    slow = pytest.mark.slow
    return [pytest.param(b, id=b.place, marks=[slow] if "long" in b.needs else []) for b in found]


def test_every_block_has_a_test() -> None:
    """And every mark a block: kinds and marks are known, and what a mark claims shows in the block."""
    kinds = {"commands", "session", "formula", "python", "json", "yaml"}
    assert [block.place for block in BLOCKS if block.kind not in kinds] == []
    for block in BLOCKS:
        assert not block.needs or block.kind in ("commands", "session", "python"), f"{block.place} is never run"
        for mark in block.needs:
            assert mark in NEEDS, f"{block.place}: {mark!r} is none of {sorted(NEEDS)}"
            assert re.search(NEEDS[mark], block.text, re.MULTILINE), f"{block.place} does not need {mark!r}"
    assert len(BLOCKS) > 30


@pytest.mark.parametrize("block", chosen("commands"))
def test_commands(block: Block, models: Models, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Every command ends with 0; a server that a block starts answers the rest of it."""
    started = time.monotonic()
    valid_shell(block.text)
    lines = commands(block.text)
    made = {name for line in lines if line.startswith("d2moe ") for name in written(words(line)[1:])}
    lay_out(tmp_path, models, made)
    if any(" serve " in f" {line}" for line in lines):
        served, *others = lines
        with DocumentedServer(served, tmp_path, tmp_path / "log") as own:
            assert_completes(own)
            port: int | None = own.port
            run_all(others, tmp_path, port)
    else:
        port = request.getfixturevalue("server").port if PORT in block.text else None
        run_all(lines, tmp_path, port)
    if "long" in block.needs:
        assert time.monotonic() - started > 5, f"{block.place} does not need 'long'"


def run_all(lines: list[str], folder: Path, port: int | None) -> None:
    for line in lines:
        done = run(line, folder, port, {"KEY": "sesame"})
        assert done.code == 0, f"$ {line}\n{done.stdout}\n{done.stderr}"
        if line.startswith("curl "):
            answer = (folder / line.split()[-1]) if " -o " in line else None
            content = answer.read_text() if answer else done.stdout
            assert '"error"' not in content, content
            assert content.strip()


def assert_completes(server: DocumentedServer) -> None:
    """The first model that it names answers a prompt."""
    with urllib.request.urlopen(f"{server.base_url}/models", timeout=60) as answer:
        model = json.load(answer)["data"][0]["id"]
    body = json.dumps({"model": model, "prompt": "The for statement", "max_tokens": 8}).encode()
    asked = urllib.request.Request(f"{server.base_url}/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(asked, timeout=300) as answer:
        assert json.load(answer)["usage"]["completion_tokens"] > 0


@pytest.mark.parametrize("block", chosen("session"))
def test_sessions(block: Block, models: Models, tmp_path: Path) -> None:
    """What the commands print has the documented shape; where a line begins with `d2moe:` they exit with 2."""
    made = {name for command, _ in steps(block.text) for name in written(words(command)[1:])}
    lay_out(tmp_path, models, made)
    for command, expected in steps(block.text):
        done = run(command, tmp_path)
        fails = any(line.startswith("d2moe:") for line in expected)
        assert done.code == (2 if fails else 0), done.stdout + done.stderr
        shown = [line.replace(str(tmp_path), "/models") for line in done.shown]
        assert (why := difference(expected, shown)) is None, f"$ {command}\n{why}"


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.needs], ids=lambda block: block.place)
def test_commands_that_need_more_than_is_here(block: Block) -> None:
    """They are read by bash, and each by the parser of its program; so are those that only need time."""
    assert block.kind == "commands", f"{block.place}: what a session shows cannot be checked without running it"
    assert check(block.text) > 0


@pytest.mark.parametrize("block", chosen("python"))
def test_python(block: Block, models: Models, tmp_path: Path) -> None:
    lay_out(tmp_path, models, set())
    done = forks.python(block.text, imports=forks.TRANSFORMERS, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("block", chosen("json"))
def test_json(block: Block) -> None:
    """Read as JSON, and by the checkpoint format where it is a file of it."""
    text = block.text if block.text.lstrip().startswith(("{", "[")) else f"{{{block.text}}}"
    content = json.loads(text)
    if "quantization_config" in content:
        parse_config(content["quantization_config"], block.place)
    elif "other_tensors" in content:
        assert set(content) == set(Manifest.model_fields)


@pytest.mark.parametrize("block", chosen("yaml"))
def test_yaml(block: Block) -> None:
    """A recipe is one for the product's own model; else it is a family's row, Compose's or Kubernetes', and says so."""
    for content in yaml.safe_load_all(block.text):
        if "model_type" in content:
            FamilyRow.model_validate(content)
        elif not {"services", "apiVersion"} & set(content):
            Recipe.model_validate({"ratio": 0.4, **content})


@pytest.mark.parametrize("block", chosen("formula"))
def test_formulas_are_no_commands(block: Block) -> None:
    """A block without a language is not run, so no command may stand in it."""
    assert not PROGRAMS.search(block.text)


@pytest.mark.parametrize("file", DOCUMENTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_commands_in_the_text_exist(file: Path) -> None:
    """`make X` and `d2moe X` between backticks; what they are given is not looked at."""
    from syntax import app, typer

    known = typer.main.get_command(app).commands
    for code in inline_code(file):
        if found := re.fullmatch(r"d2moe ([a-z]+)( [^a-z].*)?", code):
            assert found[1] in known, code
        if found := re.match(r"make ([a-z-]+)\b", code):
            make([found[1]])


class TestTheChecks:
    """The checks of this file find what they are for."""

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("<!-- needs: gpu -->\n\n```sh\nx\n```\n", "a mark that no block follows"),
            ("<!-- needs: -->\n```sh\nx\n```\n", "an empty mark"),
            ("```sh\nx\n", "a block without an end"),
        ],
    )
    def test_markup(self, text: str, words: str) -> None:
        with pytest.raises(MarkupError, match=words):
            blocks(ROOT / "README.md", text)

    def test_unknown_language(self) -> None:
        (block,) = blocks(ROOT / "README.md", "```ruby\nx\n```\n")
        with pytest.raises(MarkupError, match="ruby"):
            _ = block.kind

    @pytest.mark.parametrize(
        "command",
        [
            "d2moe compress a b --rato 0.4", "d2moe squeeze a", "vllm serve m --no-such-option", "make tea",
            "pip install '.[gpu]'", "docker build --target none .", "docker run d2moe-vllm m --no-such-option",
            "kubectl apply -k deploy/nowhere", "unknown thing", "echo 'open",
        ],
    )  # fmt: skip
    def test_bad_commands_are_refused(self, command: str) -> None:
        with pytest.raises(AssertionError):
            check(command)

    @pytest.mark.parametrize(
        ("expected", "shown", "same"),
        [
            (["a  1,234 b"], ["a 5.6  b"], True),
            (["a 1"], ["b 1"], False),
            (["a 1"], ["a 1", "b"], False),
            (["a", "...", "z"], ["a", "b", "c", "z"], True),
            (["a", "...", "z"], ["a", "z"], True),
            (["a", "...", "z"], ["a", "b"], False),
            (["a b ..."], ["a b c d"], True),
            (["a b ..."], ["a c"], False),
        ],
    )
    def test_shapes(self, expected: list[str], shown: list[str], same: bool) -> None:
        assert (difference(expected, shown) is None) is same

    def test_numbers_are_all_that_may_differ(self) -> None:
        assert shape("layer 0:  0.2422, 645 to 1,594") == shape("layer 3: 0.1 77 to 12") != shape("layer 3: 0.1, 7")
