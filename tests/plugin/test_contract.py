"""Every piece of vLLM's insides that we rely on: what breaks here breaks serving.

The table is contract.py. It is held against the installed vLLM by import, and against the source of every other
release in the window without importing it. For a new release: add it to OTHERS, run this, read what differs, then
widen d2moe_vllm.SUPPORTED_VLLM.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from importlib.metadata import distribution
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

import vllm
from contract import ALLOWED_IMPORTS, CONTRACT, Use
from vllm.config import VllmConfig
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm_views import Described, MissingError, Source, installed
from vllm_wheel import UnavailableError, other_release

import d2moe_vllm
from d2moe_vllm import compat
from d2moe_vllm.ops.reference import ACTIVATIONS
from d2moe_vllm.serving.experts import D2MoEMethod
from d2moe_vllm.serving.quantization import D2MoEConfig

OTHERS = ("0.33.0",)
"""Releases in the window that the tests do not run with."""

PACKAGE = Path(d2moe_vllm.__file__).parent
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


def broken(use: Use, describe: Callable[[str], Described]) -> list[str]:
    """In what `use` does not hold, in words."""
    try:
        found = describe(use.name)
    except MissingError as error:
        return [str(error)]
    return [
        *(f"{use.name} takes no {name}" for name in use.parameters if name not in found.parameters),
        *(f"{use.name} has no {name}" for name in use.attributes if name not in found.attributes),
        *(f"{use.name}.{name} is no property" for name in use.properties if name not in found.properties),
        *(f"{use.name} lacks {value!r}" for value in use.values if value not in found.values),
        *(
            f"{use.name}.{name} takes {found.methods.get(name)}, not {parameters}"
            for name, parameters in use.methods.items()
            if found.methods.get(name) != parameters
        ),
    ]


def read_installed(module: str) -> tuple[str, bool] | None:
    path = Path(vllm.__file__).parents[1] / module.replace(".", "/")
    for file, is_package in ((path.with_suffix(".py"), False), (path / "__init__.py", True)):
        if file.is_file():
            return file.read_text(), is_package
    return None


@pytest.fixture(scope="module")
def installed_source() -> Source:
    return Source(read_installed)


@pytest.fixture(scope="module", params=OTHERS)
def other(request: pytest.FixtureRequest) -> Source:
    """Another release's source: about 1 MB of a wheel of 336 MB, once."""
    try:
        return other_release(request.param)
    except UnavailableError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("use", CONTRACT, ids=lambda use: use.name)
def test_the_installed_vllm_keeps_the_contract(use: Use) -> None:
    assert broken(use, installed) == []


@pytest.mark.parametrize("use", CONTRACT, ids=lambda use: use.name)
def test_other_releases_keep_the_contract(use: Use, other: Source, installed_source: Source) -> None:
    """By source alone. Where we rely on what a function does, its code has to be the installed one's."""
    assert broken(use, other) == []
    for member in use.behaves:
        assert other.code(use.name, member) == installed_source.code(use.name, member), member


@pytest.mark.parametrize("use", CONTRACT, ids=lambda use: use.name)
def test_reading_source_finds_what_importing_finds(use: Use, installed_source: Source) -> None:
    """The reader of source itself, where its answers can be checked."""
    assert broken(use, installed_source) == []


@pytest.mark.parametrize("view", ["installed", "source"])
def test_a_broken_contract_is_noticed(view: str, installed_source: Source) -> None:
    """Both ways of looking, on wrong entries of every kind."""
    describe = installed if view == "installed" else installed_source
    method = "vllm.model_executor.layers.fused_moe.fused_moe_method_base.FusedMoEMethodBase"
    wrong = [
        Use("vllm.config.NoSuchConfig"),
        Use("vllm.no_such_module.Name"),
        Use("vllm.forward_context.set_forward_context", parameters=("no_such_parameter",)),
        Use("vllm.config.LoadConfig", attributes=("no_such_field",)),
        Use(method, properties=("apply",)),
        Use(method, methods={"apply": ("self", "layer", "x")}),
        Use(method, methods={"no_such_method": ("self",)}),
        Use("vllm.model_executor.layers.fused_moe.activation.MoEActivation", values=("no such activation",)),
        Use("vllm.model_executor.model_loader.LoadFormats", values=("no such format",)),
        Use("vllm.envs.environment_variables", values=("VLLM_NO_SUCH_VARIABLE",)),
    ]
    assert [use.name for use in wrong if len(broken(use, describe)) != 1] == []


def imports(file: str) -> set[str]:
    """`module.Name` of everything that one of our files imports from vLLM, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse((PACKAGE / file).read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "vllm"}
    return found


@pytest.mark.parametrize("file", [file for file in FILES if file != "compat.py"])
def test_only_compat_imports_vllm(file: str) -> None:
    """And the files of ALLOWED_IMPORTS, what is said there."""
    modules = {name if name == "vllm" else name.rpartition(".")[0] for name in imports(file)}
    assert modules <= set(ALLOWED_IMPORTS.get(file, ()))
    assert "import_module" not in (PACKAGE / file).read_text()


@pytest.mark.parametrize("file", FILES)
def test_the_contract_names_every_import(file: str) -> None:
    named = {use.name for use in CONTRACT}
    # Or of what: `from vllm import envs`.
    named |= {name.rpartition(".")[0] for name in named}
    assert imports(file) <= named


def test_our_hooks_have_the_signatures_that_vllm_calls() -> None:
    theirs = {use.name: use.methods for use in CONTRACT}
    for ours, base in ((D2MoEConfig, QuantizationConfig), (D2MoEMethod, FusedMoEMethodBase)):
        found = installed(f"{ours.__module__}.{ours.__name__}").methods
        for hook, parameters in theirs[f"{base.__module__}.{base.__name__}"].items():
            if hook != "__init__":
                assert found[hook] == parameters, hook
        assert not ours.__abstractmethods__


def test_checkpoint_names_map_to_our_parameters() -> None:
    """`experts.3.w1.delta_u` must reach the parameter w13_delta_u: vLLM drops what it cannot map in silence."""
    mapping = RoutedExperts.build_expert_params_mapping("w1", "w2", "w3", 8, routed_experts_prefix="")
    assert ("experts.w13_", "experts.3.w1.", 3, "w1") in mapping
    assert ("experts.w13_", "experts.3.w3.", 3, "w3") in mapping
    assert ("experts.w2_", "experts.3.w2.", 3, "w2") in mapping
    # The hand-written loaders of DeepSeek and others come through here.
    legacy = RoutedExperts.build_expert_params_mapping("gate_proj", "down_proj", "up_proj", 8)
    assert ("experts.routed_experts.w13_", "experts.3.gate_proj.", 3, "w1") in legacy


def test_our_state_in_a_quant_config_is_not_in_the_key_of_compile_caches() -> None:
    """What we keep there may differ from start to start; a hash of it would compile anew each time."""
    config = VllmConfig()
    before = config.compute_hash()
    config.quant_config = SimpleNamespace(anything="of ours")  # type: ignore[assignment]
    assert config.compute_hash() == before


def test_the_contract_has_all_that_our_own_lists_name() -> None:
    values = {use.name.rpartition(".")[2]: set(use.values) for use in CONTRACT}
    assert set(ACTIVATIONS) <= values["MoEActivation"]
    assert set(compat.BYPASSING_LOAD_FORMATS) <= values["LoadFormats"]
    assert all(hasattr(compat, name) for name in compat.__all__)


def refusal_comes_last(source: Source) -> bool:
    """Whether FusedMoEConfig.__post_init__ ends with what compat.let_cpus_have_experts_without_a_gate takes back."""
    code = source.code("vllm.model_executor.layers.fused_moe.config.FusedMoEConfig", "__post_init__")
    last = ast.unparse(ast.parse(code).body[0].body[-1])  # type: ignore[attr-defined]
    return last.startswith("if not self.is_act_and_mul and") and "NotImplementedError('is_act_and_mul=False" in last


def test_experts_without_a_gate_are_refused_on_cpus_when_all_else_is_looked_at(installed_source: Source) -> None:
    """Else something that comes behind would be left out."""
    assert refusal_comes_last(installed_source)


def test_so_they_are_in_other_releases(other: Source) -> None:
    assert refusal_comes_last(other)


def test_the_window_is_the_one_the_package_declares() -> None:
    """SUPPORTED_VLLM, pyproject.toml's extra, and the releases that are checked here."""
    first, last = d2moe_vllm.SUPPORTED_VLLM[0], d2moe_vllm.SUPPORTED_VLLM[-1]
    (requirement,) = [line for line in distribution("d2moe-vllm").requires or () if line.startswith("vllm")]
    assert f">={first[0]}.{first[1]}" in requirement
    assert f"<{last[0]}.{last[1] + 1}" in requirement
    checked = {tuple(map(int, release.split(".")[:2])) for release in (*OTHERS, distribution("vllm").version)}
    assert set(d2moe_vllm.SUPPORTED_VLLM) <= checked
