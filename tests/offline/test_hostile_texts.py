"""Calibration texts as they should not be: a finite result."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hostile import RECIPES, compress, finite_result


@pytest.mark.parametrize("recipe", [name if name == "default" else pytest.param(name, marks=pytest.mark.slow)
                                    for name in RECIPES])  # fmt: skip
@pytest.mark.parametrize("text", ["few tokens", "one token", "one token again and again"])
def test_odd_texts_give_a_finite_result(text: str, recipe: str, source: Path, tmp_path: Path) -> None:
    """Fewer tokens than dimensions; and constant activations, but for positions."""
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPES[recipe]))
    content, windows, length = {
        "few tokens": ("The reference manual describes the syntax and core semantics of the language.", 1, 8),
        "one token": ("the the the the", 1, 2),
        "one token again and again": ("the " * 400, 4, 32),
    }[text]
    (tmp_path / "text.txt").write_text(content)
    more = ("--recipe", tmp_path / "recipe.yaml", "--windows", windows, "--seq-len", length)
    done = compress(source, tmp_path / "out", tmp_path / "text.txt", *more)
    assert done.returncode == 0, done.stderr
    stats = finite_result(source, tmp_path / "out")
    assert sum(stats["layers"]["0"]["tokens"]) == windows * length * 2
