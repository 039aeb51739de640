"""The shipped recipes: every one loads, is packaged, and gives a plan where a small model of the family is at hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tomllib
import yaml
from compression import ROOT, TINY, d2moe_here
from small_families import SMALL

from offline.plan.recipe import Recipe, load_recipe
from offline.plan.recipes import SHIPPED, find_recipe
from offline.source.families import FAMILIES, MoEShape


def test_every_family_has_one() -> None:
    assert set(SHIPPED) == set(FAMILIES)


def test_each_file_is_called_after_a_family_that_has_it() -> None:
    files = {path.stem for path in (ROOT / "offline" / "plan" / "recipes").glob("*.yaml")}
    assert {path.stem for path in SHIPPED.values()} == files
    assert all(SHIPPED[name].stem == name for name in files)


@pytest.mark.parametrize("name", SHIPPED)
def test_it_loads_and_says_only_what_differs_from_the_default(name: str) -> None:
    load_recipe(SHIPPED[name], {"ratio": 0.4})
    default = Recipe(ratio=0.4).model_dump()
    content = yaml.safe_load(SHIPPED[name].read_text())
    for section, values in content.items():
        for key, value in values.items():
            assert default[section][key] != value, f"{section}.{key} is the default"
    lines = SHIPPED[name].read_text().splitlines()
    for number, line in enumerate(lines):
        if line.startswith("  ") and ":" in line and not line.lstrip().startswith("#"):
            assert lines[number - 1].lstrip().startswith("#"), f"{line} is not explained"


@pytest.mark.parametrize("family", SMALL)
def test_rounding_prunes_about_what_was_asked_for_on_the_real_sizes(family: str) -> None:
    recipe = load_recipe(SHIPPED[family], {"ratio": 0.4})
    assert SMALL[family].released
    for sizes in SMALL[family].released:
        shape = MoEShape(8, 2, *sizes, layers=(0,))
        assert recipe.resolve(shape, 2048).base.column_multiple == 16
        for columns in sizes:
            assert columns % recipe.base.groups == 0
            kept = int(columns / recipe.base.groups * (1 - recipe.base.sparsity / 2)) // 16 * 16
            assert 1 - kept * recipe.base.groups / columns < 0.1


@pytest.mark.parametrize("ratio", [0.2, 0.4, 0.6])
def test_a_name_gives_a_plan_at_any_ratio_and_options_win(ratio: float) -> None:
    for bits, left in (("16", 0.0), ("auto", 0.516)):
        given = ("--recipe", "mixtral", "--ratio", ratio, "--windows", "8", "--bits", bits)
        done = d2moe_here("plan", TINY, *given, "--json")
        assert done.returncode == 0, done.stderr
        plan = json.loads(done.stdout)
        assert plan["recipe"]["ratio"] == ratio
        assert plan["recipe"]["calibration"]["windows"] == 8
        result = plan["result"]
        # Less is left only where 8 bits are: more would save nothing.
        share = result["expert_bytes"] / result["dense_expert_bytes"]
        assert result["stored_ratio"] >= ratio
        assert result["stored_ratio"] - ratio < 0.01 or share == pytest.approx(left, abs=2e-3)


def test_the_ratio_is_the_users() -> None:
    done = d2moe_here("plan", TINY, "--recipe", "mixtral")
    assert done.returncode == 2
    assert "no ratio given; add --ratio 0.4" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_file_of_that_name_wins_and_unknown_names_list_the_near_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = d2moe_here("plan", TINY, "--recipe", "mixtrl")
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "mixtral" in done.stderr
    assert "cannot be read" in d2moe_here("plan", TINY, "--recipe", tmp_path / "zzz.yaml").stderr
    monkeypatch.chdir(tmp_path)
    Path("mixtral").mkdir()
    assert find_recipe("mixtral") == SHIPPED["mixtral"]
    Path("mixtral").rmdir()
    Path("mixtral").write_text("ratio: 0.3\n")
    assert load_recipe(find_recipe("mixtral"), {}).ratio == 0.3


def test_they_are_packaged() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "*.yaml" in project["tool"]["setuptools"]["package-data"]["offline.plan.recipes"]
    assert all(path.parent == ROOT / "offline" / "plan" / "recipes" for path in SHIPPED.values())
