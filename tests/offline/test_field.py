"""Situations from the field: what a source, a tokenizer or a text was like when compression went wrong, and what
happens now. Each function has the kind's first member, and others of the same kind. Texts (F3, F5, F6) are in
test_texts.py, settings (F9) in test_agreement.py."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hub
import pytest
import torch
from compression import TINY, d2moe_here, script
from edits import accept
from families import change_config, write_family
from hostile import edit, refused
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from offline.cli import main

FEW = ("--ratio", "0.1", "--windows", "4", "--seq-len", "32")
WORDS = (
    "def fib(n):\n    return n if n < 2 else fib(n - 1) + fib(n - 2)\n\nThe first numbers of Fibonacci's row.\n" * 20
)


@pytest.fixture
def words(tmp_path: Path) -> Path:
    path = tmp_path / "words.txt"
    path.write_text(WORDS)
    return path


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A copy of the bundled model, to be spoilt."""
    return shutil.copytree(TINY, tmp_path / "source")


def compress(source: object, out: Path, text: Path, *more: object) -> subprocess.CompletedProcess[str]:
    return d2moe_here("compress", source, out, *FEW, "--calibration", text, *more, "--json")


def tokens_of(done: subprocess.CompletedProcess[str], out: Path) -> str:
    """SHA-256 of the tokens that a run was calibrated on."""
    assert done.returncode == 0, done.stderr
    digest: str = json.loads((out / "d2moe_stats.json").read_text())["calibration"]["tokens_sha256"]
    return digest


def change_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


# F1: a tokenizer that is not what its class says


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family(tmp_path_factory.mktemp("families") / "deepseek", "deepseek")


def test_f1_the_tokens_are_those_of_tokenizer_json(deepseek: Path, words: Path, tmp_path: Path) -> None:
    """What the released DeepSeek models name; transformers builds another tokenizer by that name. The result names one
    that reads as tokenizer.json says, in transformers and so in vLLM."""
    good = compress(deepseek, tmp_path / "good", words)
    bad = shutil.copytree(deepseek, tmp_path / "bad")
    named = {"tokenizer_class": "LlamaTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (bad / "tokenizer_config.json").write_text(json.dumps(named))
    assert AutoTokenizer.from_pretrained(bad).decode(AutoTokenizer.from_pretrained(bad).encode("a b")) != "a b"
    done = compress(bad, tmp_path / "out", words)
    assert tokens_of(done, tmp_path / "out") == tokens_of(good, tmp_path / "good")
    assert "does not read as tokenizer.json says" in done.stderr
    served = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert served.decode(served.encode(WORDS, add_special_tokens=False)) == WORDS
    assert json.loads((bad / "tokenizer_config.json").read_text()) == named
    # eval reads so too, of the source and of the result.
    for folder in (bad, tmp_path / "out"):
        assert d2moe_here("eval", folder, "--text", words, "--seq-len", "32").returncode == 0


def lowercase(content: dict[str, Any]) -> None:
    content["normalizer"] = {"type": "Lowercase"}


def lose_what_is_unknown(content: dict[str, Any]) -> None:
    """No bytes to fall back on, no token for the unknown: characters vanish."""
    content["model"]["unk_token"] = None
    content["model"]["byte_fallback"] = False
    content["pre_tokenizer"] = {"type": "WhitespaceSplit"}
    content["decoder"] = None


@pytest.mark.parametrize("change", [lowercase, lose_what_is_unknown])
def test_f1_text_that_comes_back_as_another_is_refused(
    change: Callable[[dict[str, Any]], None], tiny: Path, words: Path, tmp_path: Path
) -> None:
    change_json(tiny / "tokenizer.json", change)
    refused(compress(tiny, tmp_path / "out", words), "is another text", "--tokenizer DIR")
    refused(d2moe_here("eval", tiny, "--text", words, "--seq-len", "32"), "is another text")
    assert not (tmp_path / "out").exists()


def test_f1_another_models_tokenizer(tiny: Path, words: Path, tmp_path: Path) -> None:
    """Its ids are beyond the model's."""
    edit(tiny, lambda tensors: tensors.update({n: tensors[n][:300].clone() for n in HEADS}))
    change_config(tiny, vocab_size=300)
    refused(compress(tiny, tmp_path / "out", words), "the model has 300", "another model's")


HEADS = ("model.embed_tokens.weight", "lm_head.weight")


def test_f1_tokens_that_the_model_has_not_are_said(tiny: Path, words: Path) -> None:
    added = {"id": 4096, "content": "<tool>", "single_word": False, "lstrip": False, "rstrip": False}
    added |= {"normalized": False, "special": True}
    change_json(tiny / "tokenizer.json", lambda content: content["added_tokens"].append(added))
    evaluated = ("eval", tiny, "--text", words, "--seq-len", "32")
    assert "its tokenizer has 4097 tokens, the model 4096" in d2moe_here(*evaluated).stderr
    words.write_text("a <tool> b\n" * 200)
    refused(d2moe_here(*evaluated), "gives the token 4096")


# F2: a tokenizer that is code


CODE = """
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizer


class KimiTokenizer(PreTrainedTokenizer):
    vocab_files_names = {"vocab_file": "tiktoken.model"}

    def __init__(self, vocab_file, **more):
        self.inner = Tokenizer.from_file(vocab_file.replace("tiktoken.model", "kimi.vocabulary"))
        super().__init__(**more)

    @property
    def vocab_size(self):
        return self.inner.get_vocab_size()

    def get_vocab(self):
        return self.inner.get_vocab()

    def _tokenize(self, text):
        return self.inner.encode(text, add_special_tokens=False).tokens

    def _convert_token_to_id(self, token):
        return self.inner.token_to_id(token)

    def _convert_id_to_token(self, number):
        return self.inner.id_to_token(number)

    def convert_tokens_to_string(self, tokens):
        return self.inner.decode([self.inner.token_to_id(token) for token in tokens])
"""


@pytest.fixture(scope="module")
def kimi(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As it is released: tiktoken.model, and code that reads it (here the vocabulary of the bundled model)."""
    folder = write_family(tmp_path_factory.mktemp("families") / "kimi", "kimi_k2")
    (folder / "tokenizer.json").rename(folder / "kimi.vocabulary")
    (folder / "tiktoken.model").write_text("YQ== 0\nYg== 1\n")
    (folder / "tokenization_kimi.py").write_text(CODE)
    code = {"auto_map": {"AutoTokenizer": [None, "tokenization_kimi.KimiTokenizer"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "KimiTokenizer", **code}))
    return folder


def test_f2_code_is_run_where_it_is_trusted(kimi: Path, words: Path, tmp_path: Path) -> None:
    done = compress(kimi, tmp_path / "refused", words)
    refused(done, "tokenization_kimi.py", "--trust-remote-code", "--tokenizer DIR")
    refused(d2moe_here("eval", kimi, "--text", words), "--trust-remote-code")
    trusted = compress(kimi, tmp_path / "out", words, "--trust-remote-code")
    other = compress(kimi, tmp_path / "other", words, "--tokenizer", TINY)
    assert tokens_of(trusted, tmp_path / "out") == tokens_of(other, tmp_path / "other")
    assert (tmp_path / "out" / "tokenization_kimi.py").read_text() == CODE
    assert (tmp_path / "out" / "tiktoken.model").exists()
    assert json.loads(other.stdout)["tokenizer"] == str(TINY)
    said = d2moe_here("eval", tmp_path / "out", "--text", words, "--seq-len", "32", "--trust-remote-code")
    assert said.returncode == 0, said.stderr
    given = (*FEW, "--calibration", words, "--tokenizer", TINY, "--json")
    said = d2moe_here("compare", kimi, "--baseline", "svd", "--text", words, "--workdir", tmp_path / "rows", *given)
    assert said.returncode == 0, said.stderr


def test_f2_a_vocabulary_whose_code_is_gone_is_not_guessed_at(kimi: Path, words: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(kimi, tmp_path / "source")
    (folder / "tokenizer_config.json").write_text("{}")
    refused(compress(folder, tmp_path / "out", words), "tiktoken.model", "how text is split", "--tokenizer DIR")


def test_f2_code_that_fails_is_one_line(kimi: Path, words: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(kimi, tmp_path / "source")
    (folder / "tokenization_kimi.py").write_text("raise RuntimeError('needs\\nsomething')\n")
    refused(compress(folder, tmp_path / "out", words, "--trust-remote-code"), "RuntimeError: needs something")


# F4: tensors that the configured model has no place for


def add(name: str, shape: tuple[int, ...] = (1, 128)) -> Callable[[Path], None]:
    return lambda folder: edit(folder, lambda tensors: tensors.update({name: torch.ones(shape)}))


BESIDE = [
    "model.layers.0.self_attn.attn.k_scale",
    "model.layers.1.self_attn.rotary_emb.inv_freq",
    "score.weight",
    "v_head.summary.weight",
    "vision_tower.blocks.0.weight",
]


def test_f4_what_lies_beside_the_model_is_left_out_and_said(tiny: Path, words: Path, tmp_path: Path) -> None:
    for name in BESIDE:
        add(name)(tiny)
    planned = d2moe_here("plan", tiny, *FEW, "--json")
    assert json.loads(planned.stdout)["left_out"]["tensors"] == BESIDE
    done = compress(tiny, tmp_path / "out", words)
    assert done.returncode == 0, done.stderr
    assert all(f"left out, as the model has no place for them: {BESIDE[0]}" in one.stderr for one in (planned, done))
    assert "`v_head.summary.weight`" in (tmp_path / "out" / "README.md").read_text()
    assert not set(BESIDE) & set(json.loads((tmp_path / "out" / "d2moe_manifest.json").read_text())["other_tensors"])
    for more in ((), ("--source", tiny)):
        verified = d2moe_here("verify", tmp_path / "out", *more)
        assert verified.returncode == 0, verified.stdout


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.q_proj.bias", "model.layers.4.input_layernorm.weight", "model.extra_norm.weight"]
)
def test_f4_what_is_strange_within_it_is_refused(name: str, tiny: Path) -> None:
    """Its weights would be loaded, and computed with by nobody."""
    add(name, (128,))(tiny)
    refused(d2moe_here("plan", tiny, *FEW), name, "wrong config.json?")


def test_f4_verify_knows_what_no_loader_takes(compressed: Path, tmp_path: Path) -> None:
    """A manifest that agrees does not make a tensor one of the model's."""
    out = shutil.copytree(compressed, tmp_path / "out")
    (file,) = out.glob("*.safetensors")
    save_file({**load_file(file), "v_head.weight": torch.ones(1, 128)}, file, {"format": "pt"})
    change_json(out / "model.safetensors.index.json", lambda index: index["weight_map"].update(
        {"v_head.weight": file.name}))  # fmt: skip
    others = {"v_head.weight": ["F32", [1, 128]]}
    change_json(out / "d2moe_manifest.json", lambda manifest: manifest["other_tensors"].update(others))
    accept(out)
    done = d2moe_here("verify", out, "--json")
    assert done.returncode == 2
    assert any("v_head.weight has no place in the model" in one for one in json.loads(done.stdout)["problems"])


def test_f4_a_head_that_is_tied_and_another_one(tiny: Path) -> None:
    """transformers 5 takes the stored head then, vLLM the embeddings."""
    change_config(tiny, tie_word_embeddings=True)
    refused(d2moe_here("plan", tiny, *FEW), "tie_word_embeddings", "set tie_word_embeddings to false")
    edit(tiny, lambda tensors: tensors.update({HEADS[1]: tensors[HEADS[0]].clone()}))
    assert d2moe_here("plan", tiny, *FEW).returncode == 0


# F7, A14: tokenizer files that cannot be read


def test_f7_a_tokenizer_of_a_newer_release(tiny: Path, words: Path, tmp_path: Path) -> None:
    change_json(tiny / "tokenizer.json", lambda content: content["model"].update(type="BPEv2"))
    refused(compress(tiny, tmp_path / "out", words), "tokenizer.json", "pip install --upgrade tokenizers transformers")


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        ({"tokenizer.json": "<!DOCTYPE html>"}, "tokenizer.json is no JSON object; copy it again"),
        ({"tokenizer.json": "[]"}, "tokenizer.json is no JSON object"),
        ({"tokenizer.json": "\ufeff{}"}, "tokenizer.json begins with a byte-order mark"),
        ({"tokenizer.json": None}, "none of tokenizer.json, tokenizer.model"),
        ({"tokenizer.json": None, "tokenizer.model": "no model"}, "no usable tokenizer"),
        ({"tokenizer_config.json": "{"}, "no usable tokenizer"),
        ({"tokenizer_config.json": '{"tokenizer_class": 5}'}, "tokenizer"),
    ],
)
def test_f7_no_tokenizer_file_ends_in_a_traceback(
    content: dict[str, str | None], fragment: str, tiny: Path, words: Path, tmp_path: Path
) -> None:
    for name, text in content.items():
        (tiny / name).unlink(missing_ok=True)
        if text is not None:
            (tiny / name).write_text(text)
    refused(compress(tiny, tmp_path / "out", words), fragment)


def test_a14_the_package_that_is_missing_is_named(
    tiny: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tiny / "tokenizer.json").unlink()
    (tiny / "tokenizer.model").write_bytes(b"\n\x0e")
    monkeypatch.setattr("offline.source.tokens.importlib.util.find_spec", lambda name: None)
    refused(compress(tiny, tmp_path / "out", words), "pip install sentencepiece")


# F8, A6, A9, A11: what belongs to a model


def write_repository(folder: Path) -> None:
    """A repository as they are: shards by an index, the same weights in other forms, what a server needs, and more."""
    shutil.copytree(TINY, folder, dirs_exist_ok=True)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {f"model-0000{n}-of-00002.safetensors": names[n - 1 :: 2] for n in (1, 2)}
    for file, members in parts.items():
        save_file({name: tensors[name] for name in members}, folder / file, {"format": "pt"})
    weight_map = {name: file for file, members in parts.items() for name in members}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for name, content in {
        "README.md": "---\nlicense: apache-2.0\nlanguage: [fr]\n---",
        "LICENSE": "terms",
        "processor_config.json": "{}",
        "additional_chat_templates/tool.jinja": "{{ messages }}",
        "consolidated.safetensors": "x" * 1000,
        "pytorch_model.bin": "x" * 1000,
        "original/params.json": "{}",
        "original/consolidated.00.pth": "x" * 1000,
        "model.safetensors.part": "x",
        "weights.tar": "x",
        "tokenizer.json.incomplete": "x",
        "hf_quant_config.json": "{}",
        "custom_generate/generate.py": "raise SystemExit",
        ".gitattributes": "x",
    }.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)


CARRIED = {"LICENSE", "processor_config.json", "additional_chat_templates/tool.jinja", "original/params.json"}
LEFT_OUT = {
    "consolidated.safetensors": "other weights",
    "pytorch_model.bin": "other weights",
    "original/consolidated.00.pth": "other weights",
    "model.safetensors.part": "unfinished",
    "tokenizer.json.incomplete": "unfinished",
    "weights.tar": "an archive",
    "hf_quant_config.json": "describes other weights",
    "custom_generate/generate.py": "code that transformers runs unasked",
}


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a11_a_copy_gets_what_a_server_needs_and_the_rest_is_said(words: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    write_repository(source)
    done = compress(source, out, words)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["left_out"] == {"tensors": [], "files": LEFT_OUT}
    assert "pytorch_model.bin" in done.stderr
    assert CARRIED | {"tokenizer.json", "generation_config.json"} <= files(out)
    assert not set(LEFT_OUT) & files(out)
    dense = d2moe_here("export", out, tmp_path / "dense")
    assert dense.returncode == 0, dense.stderr
    assert files(tmp_path / "dense") >= CARRIED


def test_f8_from_the_hub(words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its id: card and licence come along, weights in one form only; again without a network; and by the folder of
    the cache it is the same model."""
    write_repository(tmp_path / "repository")
    with hub.serve(tmp_path / "repository") as served:
        hub.use(monkeypatch, served.address, tmp_path / "home")
        done = compress("someone/tiny", tmp_path / "out", words)
    assert done.returncode == 0, done.stderr
    assert {name for name in served.fetched if name.endswith(("safetensors", "bin", "pth", "part", "tar"))} == {
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
    }  # fmt: skip
    assert not any(name.startswith("custom_generate") for name in served.fetched)
    card = ModelCard.load(tmp_path / "out" / "README.md").data
    assert (card.base_model, card.license, card.language) == ("someone/tiny", "apache-2.0", ["fr"])
    assert files(tmp_path / "out") >= CARRIED
    (snapshot,) = (tmp_path / "home").rglob(f"snapshots/{hub.COMMIT}")
    for source in ("someone/tiny", snapshot):
        planned = d2moe_here("plan", source, *FEW, "--json")
        assert json.loads(planned.stdout)["source"]["name"] == "someone/tiny", planned.stderr


# A3, A4, A5, A7: weights in other forms


def test_a3_both_a_whole_file_and_shards(tiny: Path, words: Path, tmp_path: Path) -> None:
    """transformers reads the whole file; of shards that are gone the index does not matter then."""
    write_repository(tmp_path / "other")
    for path in (tmp_path / "other").glob("model*.safetensors*"):
        shutil.copy(path, tiny)
    shard = tiny / "model-00001-of-00002.safetensors"
    save_file({name: tensor * 2 for name, tensor in load_file(shard).items()}, shard, {"format": "pt"})
    found = [d2moe_here("eval", one, "--text", words, "--seq-len", "32", "--json") for one in (TINY, tiny)]
    assert json.loads(found[0].stdout)["perplexity"] == json.loads(found[1].stdout)["perplexity"]
    said = "model.safetensors is read, as transformers does"
    assert said in d2moe_here("plan", tiny, *FEW).stderr
    assert said in found[1].stderr
    shard.unlink()  # A4
    assert d2moe_here("plan", tiny, *FEW).returncode == 0


def test_a5_what_the_index_lacks(tmp_path: Path) -> None:
    """The remedy helps."""
    folder = tmp_path / "source"
    write_repository(folder)
    index = folder / "model.safetensors.index.json"
    whole = json.loads(index.read_text())["weight_map"]
    change_json(index, lambda content: content["weight_map"].pop("model.norm.weight"))
    remedy = f"set it to {whole['model.norm.weight']!r} in its weight_map"
    refused(d2moe_here("plan", folder, *FEW), "model.norm.weight", "does not list it", remedy)
    change_json(index, lambda content: content["weight_map"].update({"model.norm.weight": whole["model.norm.weight"]}))
    assert d2moe_here("plan", folder, *FEW).returncode == 0


def rename(change: Callable[[str], str]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "model.safetensors"
        save_file({change(name): tensor for name, tensor in load_file(path).items()}, path, {"format": "pt"})

    return apply


def replace_weights(name: str, content: bytes = b"x", **more: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        for file, text in {name: content.decode(), **more}.items():
            (folder / file).write_text(text)

    return apply


def quantized(folder: Path) -> None:
    (folder / "quantize_config.json").write_text("{}")
    rename(lambda name: name.replace("w1.weight", "w1.qweight"))(folder)


FORMS: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "pickles": (replace_weights("pytorch_model.bin"), ("pytorch_model.bin", "save_pretrained")),
    "an adapter": (
        replace_weights("adapter_model.safetensors", **{"adapter_config.json": "{}"}), ("adapter", "merge_and_unload")
    ),
    "GGUF": (replace_weights("model-q4.gguf"), ("model-q4.gguf", "original model")),
    "another format's": (replace_weights("consolidated.safetensors"), ("consolidated.safetensors", "does not read")),
    "shards without an index": (replace_weights("model-00001-of-00002.safetensors"), ("index.json", "missing")),
    "nothing": (lambda folder: (folder / "model.safetensors").unlink(), ("no safetensors weights",)),
    "a pointer": (
        replace_weights("model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        ("model.safetensors is a git-lfs pointer", "git lfs pull"),
    ),
    "a tokenizer's pointer": (
        lambda folder: (folder / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\n"),
        ("tokenizer.json is a git-lfs pointer",),
    ),
    "names with a prefix": (rename(lambda name: f"module.{name}"), ("begin with 'module.'", "take that away")),
    "compiled": (rename(lambda name: f"_orig_mod.{name}"), ("begin with '_orig_mod.'",)),
    "saved without its head": (
        rename(lambda name: name.removeprefix("model.")), ("lack the 'model.' in front",)
    ),
    "quantized": (quantized, ("already quantized by GPTQ", "w1.qweight", "give the original model")),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_a7_what_is_there_is_named_with_the_remedy(form: str, tiny: Path) -> None:
    spoil, fragments = FORMS[form]
    spoil(tiny)
    refused(d2moe_here("plan", tiny, *FEW), *fragments)


def test_f5_a_configuration_that_could_not_be_written_again(tiny: Path) -> None:
    path = tiny / "config.json"
    path.write_text(path.read_text().replace('"mixtral"', '"mixtral", "_name_or_path": "\\ud83d"', 1))
    refused(d2moe_here("plan", tiny, *FEW), "config.json", "half of a surrogate pair")
    path.write_text("\ufeff{}")
    refused(d2moe_here("plan", tiny, *FEW), "config.json begins with a byte-order mark")


# A8, A12, A13, F10


def test_a8_groups_that_divide_are_named(words: Path, tmp_path: Path) -> None:
    source = write_family(tmp_path / "source", "mixtral", intermediate_size=90)
    refused(d2moe_here("plan", source, "--ratio", "0.1"), "base.groups 8 does not divide down's 90", "{groups: 2}")
    (tmp_path / "recipe.yaml").write_text("base: {groups: 2}\n")
    done = d2moe_here("plan", source, "--ratio", "0.1", "--recipe", tmp_path / "recipe.yaml")
    assert done.returncode == 0, done.stderr


def test_a12_what_is_printed_can_be_pasted(words: Path, tmp_path: Path) -> None:
    out = tmp_path / "my model (v2)"
    done = d2moe_here("compress", TINY, out, *FEW, "--calibration", words)
    assert done.returncode == 0, done.stderr
    assert f"vllm serve '{out}' --trust-remote-code" in done.stdout
    assert "base_model" not in (out / "README.md").read_text()  # A15
    done = d2moe_here("export", out, tmp_path / "a dense one")
    assert f"vllm serve '{tmp_path / 'a dense one'}'" in done.stdout


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_f10_a_result_is_a_result_whatever_can_be_printed(
    encoding: str, compressed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, printed = tmp_path / "ö-世", io.BytesIO()
    stream = io.TextIOWrapper(printed, encoding=encoding)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        with pytest.raises(SystemExit) as ended:
            main(["export", str(compressed), str(out)])
    assert ended.value.code == 0
    assert (out / "config.json").exists()
    escaped = {"ascii": rb"\xf6-\u4e16", "latin-1": "ö".encode("latin-1") + rb"-\u4e16", "utf-8": "ö-世".encode()}
    stream.flush()
    assert escaped[encoding] in printed.getvalue()


def test_f10_nobody_reads_what_is_printed(compressed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No output at all; a full one, which is an error and no traceback; a closed pipe, in a process of its own."""
    with open("/dev/full", "w") as full:
        for stream, code, more in ((None, 0, ()), (None, 0, ("--json",)), (full, 2, ()), (full, 2, ("--json",))):
            monkeypatch.setattr(sys, "stdout", stream)
            with pytest.raises(SystemExit) as ended:
                main(["inspect", str(compressed), *more])
            monkeypatch.undo()
            assert ended.value.code == code
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())  # for what is left in its buffer
    reader, writer = os.pipe()
    os.close(reader)
    command = [script("d2moe"), "inspect", str(compressed)]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")
