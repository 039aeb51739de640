"""Recipes: YAML and command line, what is refused, what `auto` means."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from offline.errors import InputError
from offline.plan.recipe import Recipe, load_recipe
from offline.source.families import MoEShape

MIXTRAL = MoEShape(8, 2, 4096, 14336, tuple(range(32)))
DEEPSEEK_V3 = MoEShape(256, 8, 7168, 2048, tuple(range(3, 61)))
TINY_SHAPE = MoEShape(8, 2, 128, 256, tuple(range(4)))


def test_round_trip() -> None:
    recipe = Recipe(ratio=0.4).resolve(TINY_SHAPE, 1024)
    assert Recipe.model_validate(yaml.safe_load(recipe.dump())) == recipe


def test_auto_is_16_for_real_models_and_1_for_tiny_ones() -> None:
    real, tiny = Recipe(ratio=0.4).resolve(MIXTRAL, 32768), Recipe(ratio=0.4).resolve(TINY_SHAPE, 1024)
    assert (real.delta.rank_multiple, real.base.column_multiple, real.calibration.seq_len) == (16, 16, 2048)
    assert (tiny.delta.rank_multiple, tiny.base.column_multiple, tiny.calibration.seq_len) == (1, 1, 1024)


@pytest.mark.parametrize(
    ("shape", "seq_len", "windows"),
    [(MIXTRAL, 2048, 128), (MIXTRAL, 512, 448), (DEEPSEEK_V3, 2048, 448), (TINY_SHAPE, 256, 128)],
)
def test_windows_are_as_many_as_give_every_expert_four_rows_for_each_input(
    shape: MoEShape, seq_len: int, windows: int
) -> None:
    recipe = load_recipe(None, {"ratio": 0.4, "calibration": {"seq_len": seq_len}}).resolve(shape, 32768)
    assert recipe.calibration.windows == windows
    assert shape.rows_for_each_input(windows * seq_len) >= 4
    if windows > 128:
        assert shape.rows_for_each_input((windows - 1) * seq_len) < 4


def test_windows_that_were_given_stay() -> None:
    given = load_recipe(None, {"ratio": 0.4, "calibration": {"windows": 8}})
    assert given.resolve(DEEPSEEK_V3, 32768).calibration.windows == 8


def test_the_command_line_wins(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("ratio: 0.2\nbase: {merge: mean}\ncalibration: {windows: 8}\n")
    recipe = load_recipe(path, {"ratio": 0.6, "calibration": {"windows": None, "seed": 3}})
    assert (recipe.ratio, recipe.base.merge) == (0.6, "mean")
    assert (recipe.calibration.windows, recipe.calibration.seed) == (8, 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ratoi: 0.4", "unknown key 'ratoi'; did you mean 'ratio'?"),
        ("ratio: 0.4\nbase: {sparsty: 0.1}", "unknown key 'base.sparsty'; did you mean 'sparsity'?"),
        ("ratio: 0.4\nbase: {merge: median}", "base.merge"),
        ("ratio: 40", "ratio 40 is not a share of the bytes, between 0 and 1; 40 % is 0.4"),
        ("ratio: -0.5", "ratio -0.5 is not a share of the bytes, between 0 and 1"),
        ("{}", "--ratio"),
        ("- 1", "key: value"),
        ("ratio: [", "cannot be read"),
        ("ratio: 0.4\ncalibration: 7", "calibration"),
        ("ratio: 0.4\ncalibration: {seq_len: 1}", "calibration.seq_len"),
        ("ratio: 0.4\ndelta: {rank_multiple: 0}", "delta.rank_multiple"),
        ("ratio: 0.4\nbase: {column_multiple: many}", "base.column_multiple"),
    ],
)
def test_mistakes_are_one_clear_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        load_recipe(path, {"calibration": {"seed": 1}} if "calibration: 7" in text else {})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "allocation", "kind"),
    [
        ({}, "adaptive", "auto"),
        ({"accounting": "paper"}, "uniform", "semi-dynamic"),
        ({"allocation": "uniform"}, "uniform", "semi-dynamic"),
        ({"delta": {"trim": 2}}, "adaptive", "auto"),
        ({"base": {"kind": "none"}}, "adaptive", "none"),
        ({"base": {"merge": "mean"}}, "adaptive", "auto"),
    ],
)
def test_defaults_fit_what_is_asked_for(content: dict, allocation: str, kind: str) -> None:
    recipe = Recipe.model_validate({"ratio": 0.4, **content})
    assert (recipe.allocation, recipe.base.kind) == (allocation, kind)
    assert Recipe.model_validate(yaml.safe_load(recipe.dump())) == recipe


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("accounting: paper\nallocation: adaptive", "allocation adaptive needs accounting stored"),
        ("allocation: uniform\nbase: {kind: auto}", "base.kind auto needs allocation adaptive"),
        ("delta: {trim: 1}\nbase: {kind: none}", "delta.trim needs a base"),
        ("delta: {share_v: true, method: svd}", "need method whitened"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"ratio: 0.4\n{text}")
    with pytest.raises(InputError, match=message):
        load_recipe(path, {})
