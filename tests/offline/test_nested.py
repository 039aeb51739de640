"""Families whose language model lies within a multimodal one: what is beside it stays as it is, and is never run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from compression import d2moe_here
from families import write_family
from hostile import edit, refused
from small_families import SMALL

from offline.io.shards import Reader
from offline.plan.resources import outside_and_inside
from offline.source.dense import open_dense
from offline.source.families import FAMILIES
from offline.source.layerwise import LayerwiseModel, read_hf_config

NESTED = [name for name, family in FAMILIES.items() if family.nested]
PROCESSOR = "preprocessor_config.json"
FEW = ("--windows", "4", "--seq-len", "32")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A family's small checkpoint with an image processor's file, written once. Not to be changed."""
    folder = tmp_path_factory.mktemp("nested")

    def write(name: str) -> Path:
        if not (folder / name).exists():
            write_family(folder / name, name)
            (folder / name / PROCESSOR).write_text(json.dumps({"size": {"shortest_edge": 64}}))
        return folder / name

    return write


def vision(names: object) -> set[str]:
    """Of tensors' names those of the tower and of what leads from it into the language model."""
    parts = (".visual.", "vision", "multi_modal_projector")
    return {name for name in map(str, names) if any(part in name for part in parts)}  # type: ignore[attr-defined]


def test_they_are_those_that_the_tests_give_a_vision_tower() -> None:
    assert [name for name, small in SMALL.items() if small.outside] == NESTED


@pytest.mark.parametrize("name", NESTED)
def test_the_vision_tower_is_copied_and_not_loaded(name: str, source: Callable[[str], Path]) -> None:
    model = open_dense(str(source(name)))
    tower = vision(model.reader.specs)
    assert len(tower) > 5
    assert tower == {one for one in model.other_tensors if model.family.beside(one)}
    layerwise = LayerwiseModel(model.reader, model.family, read_hf_config(model.folder))
    layerwise.embed(torch.zeros(1, 8, dtype=torch.int64))
    loaded = dict(layerwise._model.named_parameters())
    assert not vision(loaded)
    assert len(loaded) == (2 if layerwise._config.tie_word_embeddings else 3)  # embeddings, norm, head
    outside, inside, _ = outside_and_inside(model.other_tensors, model.family, model.num_layers)
    assert outside == sum(tensor.numel() for tensor in loaded.values())
    language = {one: spec for one, spec in model.other_tensors.items() if one not in tower}
    assert outside + model.num_layers * inside >= sum(spec.numel for spec in language.values())


@pytest.mark.parametrize("name", NESTED)
def test_the_compressed_has_the_tower_and_the_settings_of_the_source(
    name: str, source: Callable[[str], Path], few_words: Path, tmp_path: Path
) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"ratio": 0.08}))
    given = ("--recipe", tmp_path / "recipe.yaml", *FEW, "--calibration", few_words)
    done = d2moe_here("compress", source(name), tmp_path / "ours", *given)
    assert done.returncode == 0, done.stderr
    before, after = Reader(source(name)), Reader(tmp_path / "ours")
    tower = vision(before.specs)
    assert tower == vision(after.specs)
    for one in tower:
        assert before.specs[one] == after.specs[one]
        assert torch.equal(before.tensor(one).view(torch.uint8), after.tensor(one).view(torch.uint8))
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert set(config["auto_map"]) == {"AutoModelForCausalLM", "AutoModelForImageTextToText"}
    assert config["quantization_config"]["experts"].startswith(f"{FAMILIES[name].decoder}.layers.{{layer}}.")
    original = json.loads((source(name) / "config.json").read_text())
    assert {key: value for key, value in config.items() if key in original} == original
    assert (tmp_path / "ours" / PROCESSOR).read_bytes() == (source(name) / PROCESSOR).read_bytes()
    assert "pipeline_tag: image-text-to-text" in (tmp_path / "ours" / "README.md").read_text()


@pytest.mark.parametrize("name", NESTED)
def test_what_is_missing_is_named(name: str, tmp_path: Path) -> None:
    folder = write_family(tmp_path / name, name)
    config = (folder / "config.json").read_text()
    for wrong in ({}, {"text_config": 7}):
        content = {key: value for key, value in json.loads(config).items() if key != "text_config"}
        (folder / "config.json").write_text(json.dumps({**content, **wrong}))
        refused(d2moe_here("plan", folder, "--ratio", "0.1"), "text_config")
    (folder / "config.json").write_text(config)
    lost = sorted(vision(Reader(folder).specs))[0]
    edit(folder, lambda tensors: tensors.pop(lost))
    refused(d2moe_here("plan", folder, "--ratio", "0.1"), lost)
