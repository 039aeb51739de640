"""The two sweeps of a compression: what lies in the working folder meanwhile, what is done twice, and how far a run
says that it is, with a model of enough layers that hidden states are computed anew."""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from compression import d2moe_here
from families import write_family
from hostile import Disk, digests, refused
from rich.console import Console

from offline.algebra.products import has_bfloat16
from offline.io.progress import Steps
from offline.plan.disk import work_bytes
from offline.plan.duration import total_seconds
from offline.plan.make import make_plan
from offline.plan.plan import Plan
from offline.plan.recipe import Recipe
from offline.plan.states import States
from offline.run.calibration import compress_layers
from offline.source.dense import open_dense
from offline.work.workdir import WorkDir

ABLE = pytest.mark.skipif(not has_bfloat16(), reason="this processor has no bfloat16 products")
LAYERS, WINDOWS, LENGTH = 9, 32, 64
TOKENS = torch.randint(0, 256, (WINDOWS, LENGTH), generator=torch.Generator().manual_seed(1))
RECIPES: dict[str, dict[str, Any]] = {
    "default": {},
    "pruned": {"base": {"kind": "semi-dynamic"}},
    "uniform": {"allocation": "uniform"},
    "no base": {"base": {"kind": "none"}},
    "mean": {"base": {"merge": "mean", "kind": "static"}},
    "shared": {"base": {"kind": "svd"}, "delta": {"share_v": True, "distinct_u": 2}},
    "trimmed": {"allocation": "uniform", "delta": {"trim": 1}},
    "follows": {"base": {"kind": "static"}, "calibration": {"inputs": "compressed"}},
    "follows, uniform": {"allocation": "uniform", "calibration": {"inputs": "compressed"}},
    "moe-svd": {"method": "moe-svd"},
    "mobe": {"method": "mobe", "mobe": {"max_steps": 3, "bases": 2}},
    "few bits": {"bits": 4, "base": {"kind": "semi-dynamic"}, "delta": {"method": "whitened"}, "ratio": 0.2},
    "few bits, mobe": {"method": "mobe", "bits": 3, "mobe": {"max_steps": 3, "bases": 2}, "ratio": 0.2},
}
if has_bfloat16():
    RECIPES["bfloat16"] = {"calibration": {"products": "bfloat16"}}


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deep") / "deep"
    return write_family(folder, "mixtral", num_hidden_layers=LAYERS)


def planned(deep: Path, recipe: dict[str, Any]) -> Plan:
    settings = {"ratio": 0.12, "calibration": {"windows": WINDOWS, "seq_len": LENGTH}, **recipe}
    settings["calibration"] = {"windows": WINDOWS, "seq_len": LENGTH, **recipe.get("calibration", {})}
    return make_plan(open_dense(str(deep)), Recipe.model_validate(settings))


class Counted(Steps):
    """Notes what was advanced, and what was skipped to get to where the plan had been."""

    def __init__(self, total: float) -> None:
        super().__init__(total, Console(file=StringIO()))
        self.advanced = self.skipped = 0.0

    def advance(self, work: float) -> None:
        self.advanced += work
        super().advance(work)

    def skip(self, work: float, note: str = "") -> None:
        self.skipped += work
        super().skip(work, note)


class Watched(WorkDir):
    """Notes how much lies there at its fullest."""

    peak = 0

    def look(self) -> None:
        self.peak = max(self.peak, self.nbytes())

    def publish(self, *arguments: Any) -> None:
        super().publish(*arguments)
        self.look()

    def create(self, *arguments: Any) -> Any:
        array = super().create(*arguments)
        self.look()
        return array

    def save_part(self, *arguments: Any) -> None:
        super().save_part(*arguments)
        self.look()


@pytest.mark.parametrize("name", RECIPES)
def test_disk_and_progress_are_what_was_planned(name: str, deep: Path, tmp_path: Path) -> None:
    plan = planned(deep, RECIPES[name])
    work, steps = Watched(tmp_path / "work", {}), Counted(total_seconds(plan))
    settled = compress_layers(plan, TOKENS, work, steps, torch.device("cpu"))
    work.close()
    assert settled.settled
    assert 0.8 * work_bytes(plan) < work.peak <= work_bytes(plan), (work.peak, work_bytes(plan))
    assert steps.advanced == pytest.approx(total_seconds(plan), rel=1e-6)
    # These experts share nothing: where it need not be, no base is made.
    spared = plan.needs_fisher and not settled.needs_fisher
    assert spared == (name in ("default", "bfloat16"))
    assert steps.skipped <= (0.35 if spared else 1e-6) * total_seconds(plan), steps.skipped / total_seconds(plan)
    left = {path.name for path in (tmp_path / "work").glob("*.rows")}
    assert not left, left


def test_with_more_states_kept_it_is_the_same_with_less_work(deep: Path, tmp_path: Path) -> None:
    found, advanced = {}, {}
    for every in (1, 2, 3):
        plan = planned(deep, {"ratio": 0.3})
        plan = replace(plan, resources=replace(plan.resources, every=every))
        work, steps = Watched(tmp_path / f"{every}", {}), Counted(total_seconds(plan))
        compress_layers(plan, TOKENS, work, steps, torch.device("cpu"))
        work.close()
        assert 0.8 * work_bytes(plan) < work.peak <= work_bytes(plan), (every, work.peak, work_bytes(plan))
        parts = sorted((tmp_path / f"{every}").rglob("*.safetensors"))
        found[every] = {str(path.relative_to(tmp_path / f"{every}")): path.read_bytes() for path in parts}
        advanced[every] = steps.advanced
    assert found[1] == found[2] == found[3]
    assert advanced[1] < advanced[2] < advanced[3]


class Broken(Counted):
    """Breaks off at the step of this number, counted from 1."""

    def __init__(self, at: int) -> None:
        super().__init__(1.0)
        self.left = at

    def label(self, text: str) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt
        super().label(text)


def test_it_goes_on_with_as_many_states_as_there_is_room_for_by_then(deep: Path, tmp_path: Path) -> None:
    """Broken off a little further along each time, with another number of states each time it goes on."""
    plan = planned(deep, {"ratio": 0.3, "base": {"kind": "semi-dynamic"}})
    assert plan.needs_fisher
    folder, broken = tmp_path / "broken", 0
    compress_layers(plan, TOKENS, work := WorkDir(tmp_path / "whole", {}), Counted(1.0), torch.device("cpu"))
    work.close()
    for every in itertools.cycle((1, 3, 2, 1, 2, 3)):
        one = replace(plan, resources=replace(plan.resources, every=every))
        work = Watched(folder, {})
        try:
            compress_layers(one, TOKENS, work, Broken(12), torch.device("cpu"))
            break
        except KeyboardInterrupt:
            broken += 1
        finally:
            work.close()
        assert work.peak <= work_bytes(one), (broken, every)
    assert 5 <= broken < 40
    whole, parts = (
        {path.relative_to(root): path.read_bytes() for path in sorted(root.rglob("*.safetensors"))}
        for root in (tmp_path / "whole", folder)
    )
    assert parts == whole
    assert not list(folder.glob("*.rows"))


def test_a_disk_with_less_room_takes_longer_and_gives_the_same_bytes(
    deep: Path, few_words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows = ("--ratio", "0.3", "--windows", "8", "--seq-len", "64")
    given = (*windows, "--calibration", few_words)
    assert d2moe_here("compress", deep, tmp_path / "roomy", *given).returncode == 0
    planned = d2moe_here("plan", deep, *windows, "--json")
    disk = json.loads(planned.stdout)["disk_bytes"]
    assert disk["least_work"] < disk["work"]

    def free(size: int) -> None:
        monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(2 * size, size, size))

    free(disk["least_work"] + disk["result"] - 1)
    refused(d2moe_here("compress", deep, tmp_path / "narrow", *given), "No space left", "--workdir")
    free(disk["least_work"] + disk["result"])
    done = d2moe_here("compress", deep, tmp_path / "narrow", *given)
    assert done.returncode == 0, done.stderr
    assert "room for fewer hidden states" in done.stderr
    assert digests(tmp_path / "narrow") == digests(tmp_path / "roomy")


def test_there_is_room_as_far_as_the_source_takes(deep: Path) -> None:
    few = planned(deep, {"calibration": {"windows": 2}})
    assert few.states.every == 1
    assert work_bytes(few) <= few.model.reader.nbytes
    many = planned(deep, {})
    sizes = [work_bytes(replace(many, resources=replace(many.resources, every=every))) for every in range(4)]
    assert work_bytes(many) == min(sizes)
    assert min(sizes) > many.model.reader.nbytes


def test_what_lies_there_in_the_end_is_what_is_stored(deep: Path, tmp_path: Path) -> None:
    """Besides a few kilobytes for each projection: no other kind of base, no higher rank."""
    plan = planned(deep, {"bits": 16})
    work = WorkDir(tmp_path / "work", {})
    with Steps(1, Console(file=StringIO())) as steps:
        settled = compress_layers(plan, TOKENS, work, steps, torch.device("cpu"))
    names = {path.stem for path in (tmp_path / "work" / "layers").glob("*/*.safetensors")}
    experts = {f"{expert:05d}" for expert in range(4)}
    small = {f"measured-{expert}" for expert in experts} | {"measured", "measured-done", "written-done", "facts"}
    assert names <= experts | small | {"sensitivity", "base"}
    stored = {name: spec.nbytes for name, spec in settled.config.expert_tensors().items()}
    found = sum(
        tensor.nbytes
        for layer in settled.config.layers
        for part in (*sorted(experts), "base")
        if work.has_part(layer, part)
        for key, tensor in work.load_part(layer, part).items()
        if not key.endswith((".error", ".energy"))
    )
    work.close()
    assert found == sum(stored.values())


@pytest.mark.parametrize("every", [0, 1, 2])
@pytest.mark.parametrize("layers", [1, 2, 3, 4, 9, 27, 32, 61])
def test_states_are_few_and_each_layer_finds_its_own(layers: int, every: int) -> None:
    states = States(layers, every)
    if not every:
        assert max(len(states.there(layer)) for layer in range(layers)) <= 2 * layers**0.5 + 1
        assert len(states.start) <= 2 * layers**0.5 + 2
    if every == 1:
        assert states.recomputed(first=False) == 0
    for layer in range(layers):
        assert layer in states.there(layer)
    assert states.recomputed(first=True) <= states.recomputed(first=False) < layers
    assert 0 in states.start
    assert layers in states.start


@pytest.mark.parametrize("name", ["default", pytest.param("follows", marks=pytest.mark.slow),
                                  pytest.param("trimmed", marks=pytest.mark.slow),
                                  pytest.param("shared", marks=pytest.mark.slow),
                                  pytest.param("bfloat16", marks=[pytest.mark.slow, ABLE])])  # fmt: skip
def test_broken_off_in_every_sweep_it_ends_in_the_same_bytes(
    name: str, deep: Path, few_words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each time further along than before, on the way through nine layers, down, up again and down."""
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"ratio": 0.12, **RECIPES[name]}))
    given = ("--recipe", tmp_path / "recipe.yaml", "--calibration", few_words, "--windows", "4", "--seq-len", "32")
    disk = Disk(monkeypatch)
    assert d2moe_here("compress", deep, tmp_path / "whole", *given).returncode == 0
    out, breaks = tmp_path / "out", 0
    while breaks < 40:
        disk.fill(at=60)
        done = d2moe_here("compress", deep, out, *given)
        if not done.returncode:
            break
        refused(done, "No space left")
        breaks += 1
    assert 4 <= breaks < 40
    assert digests(out) == digests(tmp_path / "whole")
