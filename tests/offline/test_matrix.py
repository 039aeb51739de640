"""Every method in every family: compress, verify, inspect, export, and eval of what was compressed and exported.

The fast tier has every method once, in one family after the other, and so every family with two or three of them.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from compression import d2moe_here
from families import CONFIGS, STACKABLE, quantize_fp8, write_family
from safetensors.torch import load_file, save_file

from d2moe_vllm.format.config import Layer
from d2moe_vllm.format.files import read_config
from offline.plan.recipe import Recipe
from offline.source.dense import open_dense

RATIO = 0.08
"""Of the whole checkpoint, most of which is vocabulary: about a third of the experts."""
WINDOWS = ("--windows", "4", "--seq-len", "32")
RECIPES: dict[str, dict[str, Any]] = {
    "default": {},
    "mean": {"base": {"merge": "mean"}},
    "frequency": {"base": {"merge": "frequency"}},
    "regmean": {"base": {"merge": "regmean"}},
    "ties": {"base": {"merge": "ties"}},
    "static": {"base": {"kind": "static"}},
    "svd-base": {"base": {"kind": "svd"}},
    "no-base": {"base": {"kind": "none"}},
    "auto-base": {"base": {"kind": "auto"}, "allocation": "adaptive"},
    "svd": {"delta": {"method": "svd"}},
    "asvd": {"delta": {"method": "asvd"}},
    "prune": {"delta": {"method": "prune"}},
    "trim": {"delta": {"trim": 1}},
    "share-v": {"delta": {"share_v": True}},
    "distinct-u": {"delta": {"distinct_u": 3}},
    "share-v-and-u": {"delta": {"share_v": True, "distinct_u": 2}},
    "uniform": {"allocation": "uniform"},
    "uniform-trim": {"allocation": "uniform", "delta": {"trim": 1}},
    "adaptive": {"allocation": "adaptive", "base": {"kind": "semi-dynamic"}},
    "follows": {"calibration": {"inputs": "compressed"}},
    "paper": {"accounting": "paper"},
    # Where methods meet.
    "adaptive-prune": {"allocation": "adaptive", "base": {"kind": "none"}, "delta": {"method": "prune"}},
    "auto-trim": {"allocation": "adaptive", "base": {"kind": "auto"}, "delta": {"trim": 1}},
    "all-at-once": {
        "allocation": "adaptive",
        "base": {"kind": "auto", "merge": "regmean"},
        "delta": {"share_v": True, "distinct_u": 2, "trim": 1},
        "calibration": {"inputs": "compressed"},
    },
    # In few bits.
    "4-bit-factors": {"bits": 4, "delta": {"method": "whitened"}},
    "3-bit-columns": {"bits": 3, "delta": {"method": "prune"}},
    "8-bit-shared": {"bits": 8, "base": {"kind": "svd"}, "delta": {"method": "whitened", "share_v": True}},
    "2-bit-follows": {"bits": 2, "delta": {"method": "whitened"}, "calibration": {"inputs": "compressed"}},
}
FAST = set(zip(itertools.cycle(CONFIGS), RECIPES, strict=False))
CELLS = [
    pytest.param(family, recipe, id=f"{family}-{recipe}", marks=[] if (family, recipe) in FAST else pytest.mark.slow)
    for family in CONFIGS
    for recipe in RECIPES
]


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A family's small checkpoint, written once."""
    folder = tmp_path_factory.mktemp("families")
    return lambda family: folder / family if (folder / family).exists() else write_family(folder / family, family)


@pytest.fixture(scope="session")
def short_text(tmp_path_factory: pytest.TempPathFactory, texts: tuple[Path, Path]) -> Path:
    path = tmp_path_factory.mktemp("text") / "short.txt"
    path.write_text(texts[1].read_text()[:1500])
    return path


def command(*arguments: object) -> dict[str, Any]:
    """Runs a command that must succeed; what it prints as JSON."""
    done = d2moe_here(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(("family", "recipe"), CELLS)
def test_every_method_in_every_family(
    family: str,
    recipe: str,
    source: Callable[[str], Path],
    few_words: Path,
    short_text: Path,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    """What it came through is a cell of the families' table (tests/run_families.py)."""

    def passed(command: str) -> None:
        record_property("command", command)

    original, asked = source(family), RECIPES[recipe]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"ratio": RATIO, **asked}))
    given = ("--recipe", tmp_path / "recipe.yaml", *WINDOWS)
    planned = command("plan", original, *given)["result"]
    passed("plan")
    ours, dense = tmp_path / "ours", tmp_path / "dense"
    done = command("compress", original, ours, *given, "--calibration", few_words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "recipe.yaml"]
    passed("compress")

    found = command("verify", ours, "--source", original)
    assert (found["sound"], found["problems"], found["notes"]) == (True, [], [])
    errors = [one["mean"] for layer in found["layers"].values() for one in layer.values()]
    assert set(found["layers"]) == {str(layer) for layer in open_dense(str(original)).shape.layers}
    # Random experts share nothing: a base, TIES' above all, can be worse than none, and columns can be kept all.
    assert all(0 <= error < 2 for error in errors)
    assert any(errors)
    passed("verify")

    on_disk = sum(path.stat().st_size for path in ours.glob("*.safetensors"))
    seen = command("inspect", ours)
    assert seen["bytes"] == done["result"]["bytes"] == on_disk
    if planned["final"]:
        assert planned["bytes"] == on_disk
    if asked.get("accounting") != "paper":
        assert seen["stored_ratio"] >= RATIO
    for layer in read_config(ours).layers.values():
        _check_layer(layer, asked)
    passed("inspect")

    command("export", ours, dense)
    passed("export")
    measure = ("--text", short_text, "--seq-len", "32")
    compressed, exported = (command("eval", folder, *measure) for folder in (ours, dense))
    assert compressed["tokens"] == exported["tokens"] > 0
    # The export rounds each sum of base and delta to bfloat16, which the compressed form never forms.
    assert compressed["negative_log_likelihood"] == pytest.approx(exported["negative_log_likelihood"], rel=2e-3)
    passed("eval")


def _check_layer(layer: Layer, asked: dict[str, Any]) -> None:
    """What was asked for is what is stored."""
    base, delta = asked.get("base", {}), asked.get("delta", {})
    uniform = asked.get("allocation") == "uniform" or asked.get("accounting") == "paper"
    kind = base.get("kind", "semi-dynamic" if uniform else "auto")
    assert len(layer.trimmed) == delta.get("trim", 0)
    for role in layer.roles:
        projection = layer[role]
        assert projection.shared_v == delta.get("share_v", False)
        assert projection.distinct_u == delta.get("distinct_u", 0)
        if Recipe.model_validate({"ratio": RATIO, **asked}).priced:
            assert projection.delta in ("dense", "factors")  # whole, or the base alone
            assert projection.rank == 0
            continue
        assert projection.delta == ("columns" if delta.get("method") == "prune" else "factors")
        if kind == "semi-dynamic":
            assert projection.kept_columns >= projection.used_columns > 0
            assert projection.rank > 0 or not uniform
        elif kind == "static":
            assert projection.kept_columns == projection.used_columns > 0
        elif kind == "svd":
            assert projection.base_rank > 0
        elif kind == "none":
            assert not projection.has_base
            assert projection.rank > 0


def _weights(source: Path, out: Path, text: Path, ratio: float = RATIO) -> dict[str, bytes]:
    """What the default recipe makes of it, at ranks that do not depend on how many bytes the source takes."""
    command("compress", source, out, "--ratio", ratio, "--accounting", "paper", *WINDOWS, "--calibration", text)
    return {path.name: path.read_bytes() for path in out.iterdir() if path.suffix in (".safetensors", ".yaml")}


@pytest.mark.parametrize(
    "family",
    [name if name in ("granitemoe", "qwen2_moe") else pytest.param(name, marks=pytest.mark.slow) for name in STACKABLE],
)
def test_how_the_original_lies_on_disk_does_not_matter(
    family: str, source: Callable[[str], Path], few_words: Path, tmp_path: Path
) -> None:
    """One tensor per expert as released, or stacked as transformers' own modules are."""
    stacked = write_family(tmp_path / family, family, stacked=True)
    assert _weights(source(family), tmp_path / "a", few_words) == _weights(stacked, tmp_path / "b", few_words)


def test_an_fp8_original_is_compressed_as_what_it_stands_for(few_words: Path, tmp_path: Path) -> None:
    # So many experts that the result, in bfloat16 throughout, is still smaller.
    original = write_family(tmp_path / "fp8" / "model", "deepseek_v3", n_routed_experts=64)
    quantize_fp8(original, block=32)
    plain = shutil.copytree(original, tmp_path / "plain" / "model")
    stored = load_file(original / "model.safetensors")
    dense = {name: tensor for name, tensor in stored.items() if not name.endswith("_scale_inv")}
    for name in dense:
        if (scale := stored.get(f"{name}_scale_inv")) is not None:
            rows, columns = dense[name].shape
            wide = scale.repeat_interleave(32, 0).repeat_interleave(32, 1)[:rows, :columns]
            dense[name] = (stored[name].float() * wide).bfloat16()
    save_file(dense, plain / "model.safetensors", {"format": "pt"})
    config = json.loads((plain / "config.json").read_text())
    del config["quantization_config"]
    (plain / "config.json").write_text(json.dumps(config))
    first, second = (
        _weights(folder, tmp_path / name, few_words, 0.4) for name, folder in (("a", original), ("b", plain))
    )
    assert first == second
