"""The entry point: lazy, idempotent, and never in the way of other models."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points

import pytest

import d2moe_vllm

vllm = pytest.importorskip("vllm")


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_importing_the_package_imports_neither_vllm_nor_torch() -> None:
    result = python(
        "import sys, d2moe_vllm; print(sorted({'vllm', 'torch', 'transformers', 'pydantic'} & set(sys.modules)))"
    )
    assert result.stdout.strip() == "[]", result.stderr


def test_is_an_entry_point() -> None:
    (entry,) = [e for e in entry_points(group="vllm.general_plugins") if e.name == "d2moe"]
    assert entry.load() is d2moe_vllm.register


def test_register_is_idempotent_and_leaves_the_layer_code_alone() -> None:
    result = python(
        "import sys, d2moe_vllm\n"
        "d2moe_vllm.register(); d2moe_vllm.register(); d2moe_vllm._registered = False; d2moe_vllm.register()\n"
        "from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config\n"
        "print(QUANTIZATION_METHODS.count('d2moe'), 'd2moe_vllm.experts' in sys.modules)\n"
        "print(get_quantization_config('d2moe').__name__)\n"
    )
    assert result.stdout.split() == ["1", "False", "D2MoEConfig"], result.stderr


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


@pytest.mark.parametrize("module", ["quantization", "experts", "compat"])
def test_a_module_that_fails_to_import_is_said_when_a_model_is_asked_for(module: str) -> None:
    result = python(
        f"import sys; sys.modules['d2moe_vllm.{module}'] = None\n"
        "import d2moe_vllm; d2moe_vllm.register()\n"
        "from vllm.model_executor.layers.quantization import get_quantization_config\n"
        "try: get_quantization_config('d2moe').from_config({})\n"
        "except RuntimeError as error: print(error, error.__cause__)\n"
    )
    assert f"d2moe_vllm.{module}" in result.stdout, result.stderr
    assert ">=0.32,<0.34" in result.stdout
    assert result.stdout.strip().endswith("None")
    assert result.stdout.count("\n") == 1


def test_without_vllm_it_logs_and_returns() -> None:
    result = python("import sys; sys.modules['vllm'] = None\nimport d2moe_vllm; d2moe_vllm.register(); print('alive')")
    assert result.stdout.strip() == "alive"
    assert "supports vllm>=0.32,<0.34" in result.stderr
