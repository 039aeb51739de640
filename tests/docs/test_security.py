"""What SECURITY.md promises of our own code: no unpickling, no evaluation of text, no shell; one known file of code."""

from __future__ import annotations

import ast
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from compression import ROOT

from d2moe_vllm.families import MODELING_FILE, checkpoint_modeling_source
from d2moe_vllm.observability import info
from offline.checkpoint.remotecode import modeling_sha256

PACKAGES = [path for name in ("d2moe_vllm", "offline") for path in sorted((ROOT / name).rglob("*.py"))]
MODULES = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "code", "codeop"}
BUILTINS = {"eval", "exec", "compile", "__import__", "input"}
CALLS = {
    "os.system", "os.popen", "torch.load", "torch.hub.load", "torch.jit.load", "numpy.load", "np.load",
    "yaml.unsafe_load", "yaml.full_load", "subprocess.getoutput", "subprocess.getstatusoutput",
}  # fmt: skip
LOADERS = {"SafeLoader", "NoAliases", "_KeysOnce"}
"""Of yaml.load; the others are ours and SafeLoaders too."""

PERMITTED = {"offline/source/tokens.py": ["trust_remote_code="]}
"""A tokenizer that is code, run where the user says `--trust-remote-code` (test_field.py has it refused without)."""


def dotted(node: ast.AST) -> str:
    """`a.b.c` of an attribute or a name; empty for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (before := dotted(node.value)):
        return f"{before}.{node.attr}"
    return ""


def offences(source: str) -> Iterator[str]:
    """Uses of what the lists above name, with their lines."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
            yield from (f"{node.lineno}: {name}" for name in names if name in CALLS)
        else:
            names = []
        yield from (f"{node.lineno}: {name}" for name in names if name.partition(".")[0] in MODULES)
        if isinstance(node, ast.Call):
            called = dotted(node.func)
            if called in BUILTINS | CALLS:
                yield f"{node.lineno}: {called}()"
            if called == "yaml.load" and not LOADERS & {dotted(a).split(".")[-1] for a in node.args[1:]}:
                yield f"{node.lineno}: yaml.load() with another loader"
            for keyword in node.keywords:
                if keyword.arg in ("shell", "allow_pickle", "trust_remote_code") and not (
                    isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                ):
                    yield f"{node.lineno}: {keyword.arg}="


@pytest.mark.parametrize("path", PACKAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_neither_package_unpickles_evaluates_or_calls_a_shell(path: Path) -> None:
    found = [offence.partition(": ")[2] for offence in offences(path.read_text(encoding="utf-8"))]
    assert found == PERMITTED.get(str(path.relative_to(ROOT)), [])


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from marshal import loads", "import shelve as s", "import dill.source", "eval('1')",
        "exec(x)", "compile(x, '', 'exec')", "torch.load(p)", "from torch import load", "yaml.load(t)",
        "yaml.load(t, yaml.Loader)", "os.system('ls')", "from os import system", "subprocess.run('ls', shell=True)",
        "np.load(p, allow_pickle=True)", "AutoModel.from_pretrained(p, trust_remote_code=True)",
    ],
)  # fmt: skip
def test_the_check_finds_what_it_is_for(source: str) -> None:
    assert len(list(offences(source))) > 0


def test_the_check_leaves_the_harmless_alone() -> None:
    source = "import re\nre.compile('a')\nmodel.eval()\nyaml.load(t, yaml.SafeLoader)\ntorch.load_state = 1\n"
    assert list(offences(source)) == []


def test_the_code_inside_checkpoints_is_the_reviewed_one(compressed: Path) -> None:
    """SECURITY.md, this release, a checkpoint just written and its manifest agree on the file's SHA-256.

    Where this fails because the file changed: read what changed, as whoever runs it would, then write the new hash and
    length into SECURITY.md.
    """
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    (promised,) = set(re.findall(r"\b[0-9a-f]{64}\b", text))
    lines = len(checkpoint_modeling_source().splitlines())
    assert modeling_sha256() == promised
    assert f"{lines:,} lines" in text, f"it has {lines:,}"
    content = (compressed / MODELING_FILE).read_bytes()
    assert hashlib.sha256(content).hexdigest() == promised
    assert json.loads((compressed / "d2moe_manifest.json").read_text())["modeling_sha256"] == promised


def test_that_code_starts_nothing_and_connects_to_the_hub_alone() -> None:
    """By what it imports: torch, safetensors, transformers, of the Hub's client the download, and of Python what
    computes and reads JSON. Of `os` it uses paths."""
    tree = ast.parse(checkpoint_modeling_source())
    imports = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    froms = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    imports |= {node.module or "" for node in froms}
    assert [[a.name for a in node.names] for node in froms if node.module == "huggingface_hub"] == [
        ["snapshot_download"]
    ]
    assert {name.partition(".")[0] for name in imports} == {
        "__future__", "collections", "copy", "functools", "huggingface_hub", "itertools", "json", "math", "os",
        "safetensors", "torch", "transformers", "types", "typing",
    }  # fmt: skip
    used = {dotted(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert {name for name in used if name.startswith("os.") and not name.startswith("os.path")} <= {"os.PathLike"}


def test_a_recipe_of_aliases_is_not_read_by_the_server(tmp_path: Path) -> None:
    """Forty lines of aliases would be 2^40 words in the answer of /v1/d2moe/info."""
    lines = ["a0: &a0 [word, word]", *(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 40))]
    (tmp_path / "d2moe_recipe.yaml").write_text("\n".join(lines))
    assert info._recipe(tmp_path) is None
    (tmp_path / "d2moe_recipe.yaml").write_text("ratio: 0.4\n")
    assert info._recipe(tmp_path) == {"ratio": 0.4}
