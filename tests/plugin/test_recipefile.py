"""A checkpoint's recipe, as a stranger may have written it: read as plain data, or refused in one line."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from d2moe_vllm.format.config import RECIPE_FILE, CheckpointError
from d2moe_vllm.format.recipefile import MAX_RECIPE, read_recipe
from offline.errors import InputError
from offline.plan.recipe import load_recipe

HOSTILE = {
    "a tag its reader stumbles over": "x: !!bool foo",
    "another": "x: !!timestamp foo",
    "a third": "x: !!int ''",
    "no JSON": "x: !!binary /w==",
    "no number": "x: .nan",
    "a date": "x: 2026-01-01",
    "no text": 'x: "\\ud800"',
    "deep": "a: " + "[" * 2000,
    "aliases": "a: &a [1]\nb: [*a, *a]",
    "a list": "- 1",
    "nothing": "",
    "code": "x: !!python/object/apply:os.system [true]",
    "large": "# " + "x" * MAX_RECIPE,
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_what_is_no_plain_recipe_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / RECIPE_FILE).write_text(text)
    with pytest.raises(CheckpointError, match="copy it again") as refused:
        read_recipe(tmp_path)
    assert "\n" not in str(refused.value)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / RECIPE_FILE)
    with pytest.raises(CheckpointError, match="no regular file"):
        read_recipe(tmp_path)


def test_keys_are_strings(tmp_path: Path) -> None:
    (tmp_path / RECIPE_FILE).write_text("on: 1\n2: {x: [1.5, null]}\n")
    assert read_recipe(tmp_path) == {"true": 1, "2": {"x": [1.5, None]}}


@pytest.mark.parametrize("name", ["a tag its reader stumbles over", "another", "a third", "deep"])
def test_a_users_own_recipe_is_refused_in_one_line_too(name: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(HOSTILE[name])
    with pytest.raises(InputError, match="cannot be read"):
        load_recipe(tmp_path / "recipe.yaml", {})
