"""`d2moe verify`: a sound checkpoint and its errors against the source; every damage is found and named."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from compression import TINY, d2moe_here
from edits import add_records, edit
from safetensors.torch import load_file, save_file
from synthetic import NAMES, PREFIX, Synthetic, dense_expert, every_variant, write_checkpoint

EXPERT = "model.layers.2.block_sparse_moe.experts.5.w2.delta_u"
NORMS = "model.layers.0.block_sparse_moe.experts.0.w3.base_norms"
PARAMETERS = 4_396_160
"""Of the bundled model."""
ATTENTION = "model.layers.1.self_attn.k_proj.weight"


def verify(folder: Path, *arguments: object) -> tuple[int, dict]:
    done = d2moe_here("verify", folder, *arguments, "--json")
    return done.returncode, json.loads(done.stdout)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two weight files, with recipe and statistics beside them. Not to be changed."""
    folder = tmp_path_factory.mktemp("written") / "checkpoint"
    write_checkpoint(folder)
    add_records(folder, parameters=PARAMETERS)
    return folder


@pytest.fixture
def checkpoint(written: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    shutil.copytree(written, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def refused(done: subprocess.CompletedProcess[str], *fragments: str) -> None:
    assert done.returncode == 2, done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("d2moe:")]) == 1
    for fragment in fragments:
        assert fragment in done.stdout + done.stderr


def test_a_real_compression_is_sound_and_its_errors_are_right(compressed: Path) -> None:
    code, found = verify(compressed, "--source", TINY)
    assert (code, found["sound"], found["problems"], found["notes"]) == (0, True, [], [])
    tensors: dict[str, torch.Tensor] = {}
    for file in compressed.glob("*.safetensors"):
        tensors |= load_file(file)
    source = load_file(TINY / "model.safetensors")
    assert set(found["layers"]) == {"0", "1", "2", "3"}
    for layer in range(4):
        for role, projection in NAMES.items():
            errors = []
            for expert in range(8):
                weight = source[f"{PREFIX.format(layer=layer)}.{expert}.{projection}.weight"].double()
                errors.append(float((weight - dense_expert(tensors, layer, expert, role)).norm() / weight.norm()))
            figures = found["layers"][str(layer)][role]
            assert figures["mean"] == pytest.approx(sum(errors) / 8, rel=1e-5)
            assert figures["worst"] == pytest.approx(max(errors), rel=1e-5)
            assert figures["worst_expert"] == errors.index(max(errors))


def test_what_people_see(compressed: Path, checkpoint: Path) -> None:
    done = d2moe_here("verify", compressed, "--source", TINY)
    assert done.returncode == 0
    assert "sound: 1 weight files" in done.stdout
    assert "gate mean" in done.stdout
    assert "%" in done.stderr  # progress
    for file in sorted(checkpoint.glob("*.safetensors")):
        file.write_bytes(file.read_bytes()[:-8])
    done = d2moe_here("verify", checkpoint)
    refused(done, "not sound", "more)", "truncated")
    assert "sound:" not in done.stdout


def test_every_variant_of_the_format(tmp_path: Path) -> None:
    folder = tmp_path / "all"
    tensors = write_checkpoint(folder, every_variant())
    add_records(folder, parameters=PARAMETERS)
    code, found = verify(folder, "--source", TINY)
    assert (code, found["problems"]) == (0, [])
    source = load_file(TINY / "model.safetensors")
    for layer, expert in ((0, 6), (1, 1), (2, 0), (3, 5)):
        for role, projection in NAMES.items():
            weight = source[f"{PREFIX.format(layer=layer)}.{expert}.{projection}.weight"].double()
            error = float((weight - dense_expert(tensors, layer, expert, role)).norm() / weight.norm())
            assert error <= found["layers"][str(layer)][role]["worst"] + 1e-6
    shown = d2moe_here("inspect", folder).stdout
    for text in (
        "rank 40/24",
        "gate columns as they are",
        "up one V, 3 different U",
        "layer 0: no deltas for experts 4, 5, 6, 7",
    ):
        assert text in " ".join(shown.split())
    index = f"{PREFIX.format(layer=2)}.0.w1.u_index"
    edit(folder, index, lambda t: t.index_fill(0, torch.tensor([3]), 7))
    code, found = verify(folder)
    assert code == 2
    assert any(index in line and "expert 3" in line for line in found["problems"])


def test_layers_that_stayed_dense_are_compared_too(tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    write_checkpoint(folder, Synthetic(dense=(1,)))
    add_records(folder, (0, 2, 3), parameters=PARAMETERS)
    name = f"{PREFIX.format(layer=1)}.3.w1.weight"
    code, before = verify(folder, "--source", TINY)
    assert (code, set(before["layers"])) == (0, {"0", "2", "3"})
    edit(folder, name, lambda t: t * 1.01)
    code, after = verify(folder, "--source", TINY)
    assert code == 2
    (problem,) = after["problems"]
    assert name in problem
    assert "differs from the source" in problem


@pytest.mark.parametrize("place", [0.001, 0.5, 0.999])
@pytest.mark.parametrize("number", [1, 2])
def test_one_flipped_bit_in_any_weight_file(checkpoint: Path, number: int, place: float) -> None:
    file = checkpoint / f"model-0000{number}-of-00002.safetensors"
    content = bytearray(file.read_bytes())
    content[int(place * len(content))] ^= 1
    file.write_bytes(content)
    code, found = verify(checkpoint)
    assert code == 2
    assert any(file.name in line for line in found["problems"])
    assert any("SHA-256" in line for line in found["problems"])


@pytest.mark.parametrize(
    ("file", "fragment"),
    [
        ("config.json", "not readable as JSON"),
        ("d2moe_manifest.json", "not readable as JSON"),
        ("model.safetensors.index.json", "not readable as JSON"),
        ("d2moe_stats.json", "cannot be read"),
        ("d2moe_recipe.yaml", "recipe"),
    ],
)
def test_other_files_that_cannot_be_read(checkpoint: Path, file: str, fragment: str) -> None:
    content = bytearray((checkpoint / file).read_bytes())
    content[0] ^= 0x80
    (checkpoint / file).write_bytes(content)
    code, found = verify(checkpoint)
    assert code == 2
    assert any(file in line and fragment in line for line in found["problems"])
    (checkpoint / file).unlink()
    code, found = verify(checkpoint)
    assert code == 2
    assert any(file in line for line in found["problems"])


def test_changed_code_is_a_note_and_missing_code_a_problem(checkpoint: Path) -> None:
    modeling = checkpoint / "modeling_d2moe.py"
    assert verify(checkpoint) == (0, verify(checkpoint)[1])
    modeling.write_text(modeling.read_text() + "\n")
    code, found = verify(checkpoint)
    assert code == 0
    assert "trust_remote_code" in found["notes"][0]
    modeling.unlink()
    assert verify(checkpoint)[0] == 2


def test_code_that_was_changed_after_writing_is_a_problem(compressed: Path, tmp_path: Path) -> None:
    """The manifest of a compression knows the SHA-256 of the modeling file."""
    folder = Path(shutil.copytree(compressed, tmp_path / "checkpoint"))
    (folder / "modeling_d2moe.py").write_text("import os\n")
    code, found = verify(folder)
    assert code == 2
    (problem,) = found["problems"]
    assert "modeling_d2moe.py: its SHA-256 is not that of d2moe_manifest.json" in problem


def test_code_that_somebody_else_would_have_run_is_named(compressed: Path, tmp_path: Path) -> None:
    """A configuration class of his own is a problem; a tokenizer's code may be the source's, so it is a note."""
    folder = Path(shutil.copytree(compressed, tmp_path / "checkpoint"))
    for file, content in (("config.json", {"AutoConfig": "forged.Config"}), ("tokenizer_config.json", {"a": "b.C"})):
        path = folder / file
        settings = json.loads(path.read_text())
        path.write_text(json.dumps({**settings, "auto_map": {**settings.get("auto_map", {}), **content}}))
    (folder / "deep").mkdir()
    (folder / "deep" / "forged.py").write_text("")
    (folder / "custom_generate").mkdir()
    code, found = verify(folder)
    assert code == 2
    assert ["custom_generate: d2moe writes no such folder" in problem for problem in found["problems"]] == [False, True]
    found["problems"].pop()
    assert ["config.json: auto_map is not d2moe's" in problem for problem in found["problems"]] == [True]
    assert ["tokenizer_config.json names code" in found["notes"][0], "deep/forged.py" in found["notes"][1]] == [
        True,
        True,
    ]


def test_files_too_few_and_too_many(checkpoint: Path) -> None:
    shutil.copyfile(checkpoint / "model-00001-of-00002.safetensors", checkpoint / "stray.safetensors")
    code, found = verify(checkpoint)
    assert code == 2
    assert [line for line in found["problems"] if "stray.safetensors" in line and "remove it" in line]
    (checkpoint / "stray.safetensors").unlink()
    (checkpoint / "model-00002-of-00002.safetensors").unlink()
    code, found = verify(checkpoint)
    assert code == 2
    (problem,) = found["problems"]
    assert "model-00002-of-00002.safetensors is missing" in problem


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("kind", ["link", "folder", "pipe"])
def test_a_weight_file_that_is_no_file(checkpoint: Path, kind: str, listed: bool) -> None:
    """A link that leads nowhere, as a cache that was cleared leaves it: one problem, in one line; a pipe is not waited
    for."""
    file = sorted(checkpoint.glob("*.safetensors"))[0] if listed else checkpoint / "other.safetensors"
    file.unlink(missing_ok=True)
    if kind == "link":
        file.symlink_to("nowhere")
    elif kind == "folder":
        file.mkdir()
    else:
        os.mkfifo(file)
    code, found = verify(checkpoint)
    assert code == 2
    (problem,) = [problem for problem in found["problems"] if file.name in problem]
    words = "no regular file" if kind != "link" else "is missing" if listed else "leads nowhere"
    assert words in problem
    refused(d2moe_here("verify", checkpoint), words)


def test_nan_with_a_right_hash_and_norms_that_are_not_the_bases(checkpoint: Path) -> None:
    def spoil(tensor: torch.Tensor) -> torch.Tensor:
        tensor[3, 1] = float("nan")
        tensor[4, 1] = float("inf")
        return tensor

    edit(checkpoint, EXPERT, spoil)
    edit(checkpoint, NORMS, lambda t: t.index_fill(0, torch.tensor([5]), float(t[5]) * 1.01))
    edit(checkpoint, ATTENTION, lambda t: t.index_fill(0, torch.tensor([0]), float("-inf")))
    code, found = verify(checkpoint)
    assert code == 2
    assert any(f"{EXPERT} holds 2 NaN or infinite values" in line for line in found["problems"])
    assert any(ATTENTION in line for line in found["problems"])
    assert any(f"{NORMS}[5]" in line for line in found["problems"])
    assert len(found["problems"]) == 3
    # With a source the broken layer has no errors, and the others have.
    code, found = verify(checkpoint, "--source", TINY)
    assert code == 2
    assert set(found["layers"]) == {"0", "1", "3"}


def test_what_is_no_expert_must_be_the_sources(checkpoint: Path) -> None:
    edit(checkpoint, ATTENTION, lambda t: t.index_fill(0, torch.tensor([0]), 0.5))
    assert verify(checkpoint)[0] == 0
    code, found = verify(checkpoint, "--source", TINY)
    assert code == 2
    (problem,) = found["problems"]
    assert ATTENTION in problem
    assert "differs from the source" in problem


def test_more_problems_than_fit_are_counted(checkpoint: Path, tmp_path: Path) -> None:
    """A source of the right sizes and other weights: every tensor differs."""
    other = tmp_path / "other"
    shutil.copytree(TINY, other)
    tensors = load_file(other / "model.safetensors")
    save_file({n: (t * 1.5).contiguous() for n, t in tensors.items()}, other / "model.safetensors", {"format": "pt"})
    done = d2moe_here("verify", checkpoint, "--source", other)
    refused(done, "not sound", "and 11 more problems", "(and 30 more)")
    assert done.stdout.count("differs from the source") == 20
    assert len(verify(checkpoint, "--source", other)[1]["problems"]) == 31


def test_misuse_is_one_line_before_any_work(checkpoint: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(TINY, other)
    config = json.loads((other / "config.json").read_text())
    tensors = load_file(other / "model.safetensors")
    for change, drop, fragment in (
        ({"num_hidden_layers": 3}, "layers.3.", "parameters"),
        ({"num_local_experts": 7}, "experts.7.", "experts 7, not 8"),
    ):
        kept = {name: tensor for name, tensor in tensors.items() if drop not in name}
        if "num_local_experts" in change:
            kept = {n: t[:7].contiguous() if n.endswith("block_sparse_moe.gate.weight") else t for n, t in kept.items()}
        save_file(kept, other / "model.safetensors", {"format": "pt"})
        (other / "config.json").write_text(json.dumps(config | change))
        done = d2moe_here("verify", checkpoint, "--source", other)
        refused(done, "not what the checkpoint was made from", fragment)
        assert done.stdout == ""
    for arguments, fragment in (
        ((tmp_path / "nowhere",), "no folder"),
        ((checkpoint, "--source", tmp_path / "nowhere"), "neither a folder nor a Hub id"),
        ((checkpoint, "--source", checkpoint), "already compressed"),
        ((TINY,), "dense checkpoint"),
    ):
        refused(d2moe_here("verify", *arguments), fragment)
