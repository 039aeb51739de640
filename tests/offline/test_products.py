"""Calibration's products in bfloat16: where, by whom, how far from float32, and nowhere else."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean

import pytest
import torch
import yaml
from compression import TINY, d2moe_here
from families import write_family
from hostile import digests, refused
from torch import Tensor

from d2moe_vllm.format.config import STATS_FILE
from offline.algebra import rounding
from offline.algebra.moments import Moment
from offline.algebra.products import has_bfloat16, multiplying
from offline.plan import resources
from offline.plan.make import make_plan
from offline.plan.plan import Plan
from offline.plan.recipe import Recipe
from offline.source.dense import open_dense

ABLE = pytest.mark.skipif(not has_bfloat16(), reason="this processor has no bfloat16 products")
GIVEN = ("--ratio", "0.5", "--windows", "4", "--seq-len", "32")


def plan_of(folder: Path, products: str | None = None, device: str = "cpu") -> Plan:
    calibration = {"windows": 2, "seq_len": 16, **({} if products is None else {"products": products})}
    recipe = Recipe.model_validate({"ratio": 0.05, "calibration": calibration})
    return make_plan(open_dense(str(folder)), recipe, device=device)


def noise(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@ABLE
def test_numbers_are_rounded_and_sums_are_not() -> None:
    draw = torch.Generator().manual_seed(0)
    x, w = torch.randn(4096, 96, generator=draw), torch.randn(64, 96, generator=draw)
    with multiplying("bfloat16"):
        product = x @ w.T
        moment = Moment(96)
        moment.add(x)
    rounded = x.bfloat16().double()
    assert 1e-3 < noise(product, x.double() @ w.double().T) < 4e-3
    assert noise(product, rounded @ w.bfloat16().double().T) < 1e-6
    # Of thousands of rows the noise is gone from what they are summed to, and nothing else has come in.
    assert noise(moment.mean(1), rounded.T @ rounded) < 1e-6
    assert noise(x @ w.T, x.double() @ w.double().T) < 1e-6


def test_it_ends_where_it_ends() -> None:
    before = torch.get_float32_matmul_precision()
    with multiplying("bfloat16"):
        assert torch.get_float32_matmul_precision() == "medium"
        with pytest.raises(ValueError, match="cut"), multiplying("float32"):  # noqa: PT012
            assert torch.get_float32_matmul_precision() == "highest"
            raise ValueError("cut short")
        assert torch.get_float32_matmul_precision() == "medium"
    assert torch.get_float32_matmul_precision() == before


def test_by_itself_it_is_for_models_of_real_width(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = write_family(tmp_path / "wide", "mixtral", hidden_size=1024, num_hidden_layers=1)
    for able in (True, False):
        monkeypatch.setattr(resources, "has_bfloat16", lambda device, able=able: able)
        assert plan_of(wide).resources.products == ("bfloat16" if able else "float32")
        assert plan_of(TINY).resources.products == "float32"
        assert plan_of(wide, "float32").resources.products == "float32"
    monkeypatch.undo()
    assert plan_of(wide, device="cuda").resources.products == "bfloat16"


def test_where_there_is_none_it_is_refused(
    texts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "recipe.yaml").write_text("calibration: {products: bfloat16}\n")
    monkeypatch.setattr(resources, "has_bfloat16", lambda device: False)
    given = (*GIVEN, "--calibration", texts[0], "--recipe", tmp_path / "recipe.yaml")
    refused(d2moe_here("compress", TINY, tmp_path / "out", *given), "calibration.products bfloat16", "leave it out")
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


@ABLE
def test_weights_are_rounded_in_float32(
    texts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is calibrated so comes out another one, and as near to what it was; what rounds it never is."""
    seen, real = set(), rounding.feedback_of

    def looking(*given: object) -> object:
        seen.add(torch.get_float32_matmul_precision())
        return real(*given)

    monkeypatch.setattr(rounding, "feedback_of", looking)
    for products in ("float32", "bfloat16"):
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"calibration": {"products": products}}))
        given = (*GIVEN, "--calibration", texts[0], "--recipe", tmp_path / "recipe.yaml")
        assert d2moe_here("compress", TINY, tmp_path / products, *given).returncode == 0
    assert seen == {"highest"}
    assert digests(tmp_path / "float32") != digests(tmp_path / "bfloat16")
    errors = [
        [error for layer in stats["layers"].values() for role in layer["relative_error"].values() for error in role]
        for stats in (json.loads((tmp_path / name / STATS_FILE).read_text()) for name in ("float32", "bfloat16"))
    ]
    assert errors[0] != errors[1]
    # Another bit here and there: what all of it leaves of the weights is the same.
    assert fmean(errors[1]) == pytest.approx(fmean(errors[0]), rel=0.05)
