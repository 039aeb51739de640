"""The entry point: lazy, idempotent, and never in the way of other models."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import forks
import pytest
import torch

import d2moe_vllm
from offline.compare.server import Server, ServerError

vllm = pytest.importorskip("vllm")


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)


def with_vllm(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Likewise, with the seconds shared that importing vLLM takes."""
    return forks.python(code, *arguments, imports=forks.VLLM)


def test_importing_the_package_imports_neither_vllm_nor_torch() -> None:
    result = python(
        "import sys, d2moe_vllm; print(sorted({'vllm', 'torch', 'transformers', 'pydantic'} & set(sys.modules)))"
    )
    assert result.stdout.strip() == "[]", result.stderr


def test_is_an_entry_point() -> None:
    (entry,) = [e for e in entry_points(group="vllm.general_plugins") if e.name == "d2moe"]
    assert entry.load() is d2moe_vllm.register


def test_register_is_idempotent_and_leaves_the_layer_code_alone() -> None:
    result = with_vllm(
        "import sys, d2moe_vllm\n"
        "d2moe_vllm.register(); d2moe_vllm.register(); d2moe_vllm._registered = False; d2moe_vllm.register()\n"
        "from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config\n"
        "print(QUANTIZATION_METHODS.count('d2moe'), 'd2moe_vllm.serving.experts' in sys.modules)\n"
        "print(get_quantization_config('d2moe').__name__)\n"
    )
    assert result.stdout.split() == ["1", "False", "D2MoEConfig"], result.stderr


AMX = """
import ctypes
from d2moe_vllm import compat

def allowed():
    bits = ctypes.c_ulong()
    assert ctypes.CDLL(None).syscall(158, 0x1022, ctypes.byref(bits)) == 0  # arch_prctl(ARCH_GET_XCOMP_PERM)
    return bool(bits.value >> 18 & 1)  # XTILE_DATA

before = allowed()
compat.ask_for_amx()
print(before, allowed())
"""


@pytest.mark.skipif(not torch.cpu._is_amx_tile_supported(), reason="a CPU without AMX")
def test_the_kernel_is_asked_for_amx() -> None:
    """vLLM's attention uses it unasked, and is killed for it; docs/test_blocks.py has such servers."""
    result = with_vllm(AMX)
    assert result.stdout.split() == ["False", "True"], result.stderr


@pytest.mark.parametrize("version", ["0.31.2", "0.34.0", "1.0", "0.34.0rc1+cpu"])
def test_outside_the_version_window_it_refuses_only_our_models(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "__version__", version)
    config_class = d2moe_vllm._config_class()
    with pytest.raises(RuntimeError) as error:
        config_class.from_config({})
    message = str(error.value)
    assert version in message
    assert ">=0.32,<0.34" in message
    assert "pip install" in message
    assert "\n" not in message


@pytest.mark.parametrize("version", ["0.32.0", "0.32.0+cpu", "0.33.1", "0.33.0rc2"])
def test_inside_the_version_window(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "__version__", version)
    assert d2moe_vllm._config_class().__name__ == "D2MoEConfig"


ONE_BY_ONE = """
import json, os, sys
from vllm.model_executor.layers import fused_moe, linear
from vllm.model_executor.layers.quantization import get_quantization_config
get_quantization_config("fp8")

def ask(broken=None):
    'What a process says that is asked for a d2moe model, and which of our modules it has imported by then.'
    reading, writing = os.pipe()
    if os.fork() == 0:
        if broken:
            sys.modules[broken] = None
        import d2moe_vllm
        d2moe_vllm.register()
        try:
            get_quantization_config("d2moe").from_config({})
        except Exception as error:
            ours = [name for name in sys.modules if name.startswith("d2moe_vllm.")]
            os.write(writing, json.dumps([type(error).__name__, str(error), str(error.__cause__), ours]).encode())
        os._exit(0)
    os.close(writing)
    return json.loads(os.fdopen(reading).read() or "null")

whole = ask()
print(json.dumps({"": whole, **{name: ask(name) for name in {*whole[3], *sys.argv[1:]}}}))
"""


def serving_modules() -> set[str]:
    """Ours that d2moe_vllm.serving.quantization imports, at its top or later, and those that these import."""
    root = Path(d2moe_vllm.__file__).parents[1]
    found: set[str] = set()
    todo = ["d2moe_vllm.serving.quantization"]
    while todo:
        name = todo.pop()
        path = root / name.replace(".", "/")
        file = path.with_suffix(".py") if path.with_suffix(".py").is_file() else path / "__init__.py"
        # The Triton backend's modules import triton, only once a layer is on a GPU; but for the one that packs.
        lazy = name.startswith("d2moe_vllm.ops.triton.") and name != "d2moe_vllm.ops.triton.layout"
        if name in found or name == "d2moe_vllm" or lazy or not file.is_file():
            continue
        found.add(name)
        todo.append(name.rpartition(".")[0])
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("d2moe_vllm"):
                todo += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return found


def test_any_module_that_fails_to_import_is_said_when_a_model_is_asked_for() -> None:
    """Each of our modules that serving imports, missing in turn: one sentence that names it, at the first chance
    (from_config has to import them all). A process forked for each, since importing vLLM takes seconds.

    Without those that only registering imports one family is lost, DeepSeek v1, and that is said.
    """
    needed = serving_modules()
    result = with_vllm(ONE_BY_ONE, *sorted(needed))
    assert result.returncode == 0, result.stderr
    said = json.loads(result.stdout.splitlines()[-1])
    assert said.pop("")[0] == "CheckpointError"  # nothing missing: it reads the config
    assert {
        "d2moe_vllm.compat",
        "d2moe_vllm.serving.experts",
        "d2moe_vllm.serving.loading",
        "d2moe_vllm.ops.reference",
    } <= needed
    for module, (kind, message, cause, _) in said.items():
        if module not in needed:
            assert kind == "CheckpointError", module
            assert f"DeepSeek v1 cannot be served: import of {module} halted" in result.stderr
            continue
        assert (kind, cause) == ("RuntimeError", "None"), module
        assert module in message
        assert ">=0.32,<0.34" in message
        assert "\n" not in message


def test_register_never_raises() -> None:
    """Not even where nothing of vLLM's quantization is what we know: it would stop vLLM for every model."""
    result = with_vllm(
        "import vllm.model_executor.layers.quantization as quantization, vllm\n"
        "del quantization.base_config.QuantizationConfig; vllm.__version__ = '0.99.0'\n"
        "import d2moe_vllm; d2moe_vllm.register(); print('alive')"
    )
    assert result.stdout.strip() == "alive", result.stderr
    assert "supports vllm>=0.32,<0.34 but found vllm 0.99.0" in result.stderr


OTHER_VERSION = "import sys, types\nsys.modules['vllm._version'] = version = types.ModuleType('vllm._version')\n" + (
    "version.__version__, version.__version_tuple__ = '0.34.1', (0, 34, 1)\n"
)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        pytest.param(
            "import sys; sys.modules['d2moe_vllm.serving.loading'] = None\n",
            "d2moe_vllm.serving.loading",
            id="import error",
        ),
        pytest.param(OTHER_VERSION, "but found vllm 0.34.1", id="another vllm", marks=pytest.mark.slow),
    ],
)
def test_vllm_serve_ends_with_our_sentence(checkpoint: Path, tmp_path: Path, fault: str, said: str) -> None:
    """The real front-end: the last error of its log says what is wrong with the plugin, once."""
    (tmp_path / "sitecustomize.py").write_text(fault)
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    with (
        pytest.raises(ServerError, match="exited with 1"),
        Server(checkpoint, log=tmp_path / "log", env={"PYTHONPATH": path}),
    ):
        pass
    log = (tmp_path / "log").read_text()
    sentence = f"d2moe-vllm {d2moe_vllm.__version__} supports vllm>=0.32,<0.34"
    (line,) = [line for line in log.splitlines() if sentence in line]
    assert said in line
    assert line.endswith("pip install 'vllm>=0.32,<0.34'")
    assert "Unknown quantization method" not in log


def test_without_vllm_it_logs_and_returns() -> None:
    result = python("import sys; sys.modules['vllm'] = None\nimport d2moe_vllm; d2moe_vllm.register(); print('alive')")
    assert result.stdout.strip() == "alive"
    assert "supports vllm>=0.32,<0.34" in result.stderr
