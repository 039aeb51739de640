"""vLLM's view of a checkpoint: which layers are ours, what is refused, and in which words."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

import vllm.logger
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.config.quantization import QuantizationConfigArgs
from vllm.forward_context import override_forward_context
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import resolve_quant_method
from vllm.model_executor.layers.quantization.online.base import OnlineQuantizationConfig

from d2moe_vllm import compat, ops
from d2moe_vllm.format.config import CheckpointConfig, CheckpointError
from d2moe_vllm.serving.experts import D2MoEMethod
from d2moe_vllm.serving.quantization import D2MoEConfig


@pytest.fixture
def content(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / "config.json").read_text())["quantization_config"]


@pytest.fixture
def vllm_config(monkeypatch: pytest.MonkeyPatch, checkpoint: Path) -> Iterator[VllmConfig]:
    config = VllmConfig()
    model = SimpleNamespace(model=str(checkpoint), revision=None, model_weights="")
    monkeypatch.setattr(config, "model_config", model)
    monkeypatch.setattr(compat, "get_current_vllm_config", lambda: config)
    with set_current_vllm_config(config):
        yield config


def parallel(**changes: Any) -> SimpleNamespace:
    return SimpleNamespace(
        **{"tp_rank": 0, "tp_size": 1, "ep_size": 1, "use_ep": False, "enable_eplb": False, **changes}
    )


def moe(**changes: Any) -> Any:
    settings = {
        "num_experts": 8,
        "experts_per_token": 2,
        "hidden_dim": 128,
        "intermediate_size": 256,
        "activation": MoEActivation.SILU,
        "has_bias": False,
        "swiglu_limit": None,
        "swiglu_alpha": None,
        "swiglu_beta": None,
        "dp_size": 1,
        "pcp_size": 1,
        "is_sequence_parallel": False,
        "moe_parallel_config": parallel(),
    }
    return SimpleNamespace(**{**settings, **changes})


def routed_experts(**changes: Any) -> Any:
    """As much of vLLM's layer as ours looks at."""

    class Layer(compat.RoutedExperts):
        expert_map = None

        def __init__(self) -> None:
            torch.nn.Module.__init__(self)

        def _map_global_expert_id_to_local_expert_id(self, expert_id: int) -> int:
            return expert_id

    layer = Layer()
    settings = {
        "moe_config": moe(),
        "apply_router_weight_on_input": False,
        "ckpt_gate_proj_name": "w1",
        "ckpt_up_proj_name": "w3",
        "ckpt_down_proj_name": "w2",
        "use_grouped_topk": False,
        "custom_routing_function": None,
        "scoring_func": "softmax",
        "e_score_correction_bias": None,
    }
    for name, value in {**settings, **changes}.items():
        setattr(layer, name, value)
    return layer


def create(method: D2MoEMethod, layer: Any) -> None:
    method.create_weights(layer, 8, 128, 256, torch.float32, weight_loader=None, global_num_experts=8)


def fill(layer: torch.nn.Module) -> None:
    """Random weights; columns and norms stay as they were made."""
    torch.manual_seed(0)
    for name, parameter in layer.named_parameters():
        if parameter.is_floating_point() and "norms" not in name:
            parameter.data.normal_(0, 0.1)


def test_ours_and_not_ours(content: dict[str, Any], vllm_config: VllmConfig) -> None:
    content["layers"].pop("2")
    config = D2MoEConfig.from_config(content)
    config._checked = True
    prefix = "model.layers.{}.block_sparse_moe.experts"
    assert isinstance(config.get_quant_method(routed_experts(), prefix.format(1)), D2MoEMethod)
    assert config.get_quant_method(routed_experts(), prefix.format(2)) is None
    linear = LinearBase.__new__(LinearBase)
    assert isinstance(config.get_quant_method(linear, "model.layers.1.self_attn.qkv_proj"), UnquantizedLinearMethod)
    assert config.get_quant_method(torch.nn.Module(), "model.embed_tokens") is None


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"scoring_func": "sigmoid"}, "does not route by sigmoid scores without groups of experts"),
        ({"e_score_correction_bias": torch.zeros(8)}, "leaves out the bias by which experts are chosen"),
    ],
)
def test_routing_that_vllms_cpu_backend_lacks_is_refused_there(
    content: dict[str, Any],
    vllm_config: VllmConfig,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    what: str,
) -> None:
    config = D2MoEConfig.from_config(content)
    config._checked = True
    layer = routed_experts(**changes)
    method = config.get_quant_method(layer, "model.layers.1.block_sparse_moe.experts")
    with pytest.raises(ValueError, match=what):
        create(method, layer)
    layer.use_grouped_topk = True
    create(method, layer)
    monkeypatch.setattr(compat, "on_cpu", lambda: False)
    other = routed_experts(**changes)
    create(config.get_quant_method(other, "model.layers.1.block_sparse_moe.experts"), other)


def test_layers_that_stay_dense_refuse_expert_parallelism_on_cpus(
    content: dict[str, Any], vllm_config: VllmConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's own kernel crashes there; a GPU's does not."""
    content["layers"].pop("2")
    config = D2MoEConfig.from_config(content)
    config._checked = True
    monkeypatch.setattr(vllm_config.parallel_config, "enable_expert_parallel", True)
    monkeypatch.setattr(vllm_config.parallel_config, "tensor_parallel_size", 2)
    prefix = "model.layers.{}.block_sparse_moe.experts"
    with pytest.raises(ValueError, match="layer 2 was left dense, and vLLM's CPU backend does not serve dense experts"):
        config.get_quant_method(routed_experts(), prefix.format(2))
    assert isinstance(config.get_quant_method(routed_experts(), prefix.format(1)), D2MoEMethod)
    monkeypatch.setattr(compat, "on_cpu", lambda: False)
    assert config.get_quant_method(routed_experts(), prefix.format(2)) is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.pop("format_version"), '--additional-config \'{"d2moe": {"scope": "token"}}\''),
        (lambda c: c.update(format_version=1), "format version 1 is not supported"),
        (lambda c: c["layers"]["0"]["gate"].update(rank=999), "rank 999 exceeds the matrix"),
        (lambda c: c["pruning"].update(scope="request"), "pruning.scope"),
        (lambda c: c.update(surprise=1), "surprise"),
    ],
)
def test_a_bad_config_is_one_line(content: dict[str, Any], change: Any, words: str) -> None:
    change(content)
    with pytest.raises(CheckpointError) as error:
        D2MoEConfig.from_config(content)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert error.value.__suppress_context__ or error.value.__context__ is None


@pytest.mark.parametrize(
    ("asked", "refused"),
    [
        ({"linear": "fp8_per_channel"}, False),
        ({"moe": "fp8_per_channel"}, True),
        ({"moe": "fp8_per_channel", "ignore": ["*.1.block_sparse_moe.experts"]}, False),
        ({"targets": {"*block_sparse_moe.experts": "fp8_per_block"}}, True),
    ],
)
def test_experts_are_not_quantized_once_more(
    content: dict[str, Any], vllm_config: VllmConfig, asked: dict[str, Any], refused: bool
) -> None:
    """Other layers may be, while they are loaded."""
    config = D2MoEConfig.from_config(content)
    config._checked = True
    config.online_quantization_config = OnlineQuantizationConfig(QuantizationConfigArgs(**asked))
    prefix = "model.layers.1.block_sparse_moe.experts"
    if not refused:
        assert isinstance(resolve_quant_method(config, routed_experts(), prefix), D2MoEMethod)
        return
    with pytest.raises(ValueError, match=r"not quantized once more.*--quantization-config name other layers") as error:
        resolve_quant_method(config, routed_experts(), prefix)
    assert "\n" not in str(error.value)


def test_overridden_config_is_claimed_to_be_refused() -> None:
    ours = SimpleNamespace(auto_map={"AutoModelForCausalLM": "modeling_d2moe.D2MixtralForCausalLM"})
    other = SimpleNamespace(auto_map={"AutoModelForCausalLM": "modeling_other.Model"})
    override = D2MoEConfig.override_quantization_method
    assert override({"quant_method": ""}, None, ours) == "d2moe"
    assert override({"quant_method": "d2moe"}, None, ours) is None
    assert override({"quant_method": "fp8"}, None, ours) is None
    assert override({"quant_method": ""}, None, other) is None
    assert override({"quant_method": ""}, None, SimpleNamespace()) is None
    assert override({}, None) is None


def test_scope_override(content: dict[str, Any], vllm_config: VllmConfig) -> None:
    layer, prefix = routed_experts(), "model.layers.1.block_sparse_moe.experts"
    for additional, expected in (({}, "off"), ({"d2moe": {"scope": "batch"}}, "batch"), ({"other": 1}, "off")):
        vllm_config.additional_config = additional
        method = D2MoEConfig.from_config(content).get_quant_method(layer, prefix)
        assert isinstance(method, D2MoEMethod)
        assert method.scope == expected


def scope_said(content: dict[str, Any], scope: str) -> tuple[str, bool, str]:
    """The scope served with when `scope` is asked for, whether batch-invariant, and what was logged."""
    compat.get_current_vllm_config().additional_config = {"d2moe": {"scope": scope}}
    config = D2MoEConfig.from_config(content)
    said: list[str] = []
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    vllm.logger._print_warning_once.cache_clear()
    vllm.logger._print_info_once.cache_clear()
    logger = compat.init_logger("d2moe_vllm.serving.quantization")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    for _ in range(2):
        method = config.get_quant_method(layer := routed_experts(), "model.layers.1.block_sparse_moe.experts")
    logger.removeHandler(handler)
    assert isinstance(method, D2MoEMethod)
    create(method, layer)
    return method.scope, method.spec.batch_invariant, "\n".join(said)


def test_batch_invariance_forces_scope_token_and_says_so(
    content: dict[str, Any], vllm_config: VllmConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    vllm_config.cache_config.enable_prefix_caching = False
    assert scope_said(content, "batch") == ("batch", False, "")
    assert scope_said(content, "off") == ("off", False, "")
    assert scope_said(content, "token") == ("token", True, "")
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    scope, invariant, said = scope_said(content, "batch")
    assert (scope, invariant, said.count("scope 'token' in place of 'batch'")) == ("token", True, 1)
    # What depends on no neighbour anyway keeps its columns, and becomes exact to the bit.
    assert scope_said(content, "off") == ("off", True, "")


def test_prefix_caching_with_scope_batch_warns_once(content: dict[str, Any], vllm_config: VllmConfig) -> None:
    vllm_config.cache_config.enable_prefix_caching = True
    assert scope_said(content, "batch")[2].count("--no-enable-prefix-caching") == 1
    assert scope_said(content, "token")[2] == ""


@pytest.mark.parametrize("kind", ["data", "pipeline"])
def test_what_fails_on_a_cpu_later_is_refused(content: dict[str, Any], vllm_config: VllmConfig, kind: str) -> None:
    setattr(vllm_config.parallel_config, f"{kind}_parallel_size", 2)
    with pytest.raises(ValueError, match=f"--{kind}-parallel-size") as error:
        D2MoEConfig.from_config(content).get_quant_method(torch.nn.Module(), "model.embed_tokens")
    assert "\n" not in str(error.value)


def test_router_weights_on_the_input(config: CheckpointConfig, vllm_config: VllmConfig) -> None:
    """With one expert per token: the layer of the weighted input, weighted no more."""
    layer = routed_experts(apply_router_weight_on_input=True)
    method = D2MoEMethod(moe(experts_per_token=1), config, 1, "off", "reference")
    create(method, layer)
    fill(layer)
    x, weights, ids = torch.randn(5, 128), torch.rand(5, 1), torch.randint(0, 8, (5, 1))
    weighted = method.apply(layer, x, weights, ids)
    layer.apply_router_weight_on_input = False
    torch.testing.assert_close(weighted, method.apply(layer, x * weights, torch.ones_like(weights), ids))
    assert not torch.allclose(weighted, method.apply(layer, x, weights, ids))


@pytest.mark.parametrize("bad", [{"scop": "token"}, {"scope": "tokens"}, "token", {"scope": "token", "groups": 4}])
def test_bad_overrides_are_refused(content: dict[str, Any], vllm_config: VllmConfig, bad: Any) -> None:
    vllm_config.additional_config = {"d2moe": bad}
    with pytest.raises(ValueError, match="--additional-config: d2moe") as error:
        D2MoEConfig.from_config(content).get_quant_method(torch.nn.Module(), "model.embed_tokens")
    assert "\n" not in str(error.value)


def test_files_are_checked_before_anything_is_allocated(
    checkpoint: Path, content: dict[str, Any], vllm_config: VllmConfig, tmp_path: Path
) -> None:
    D2MoEConfig.from_config(content).maybe_update_config(str(checkpoint))
    broken = shutil.copytree(checkpoint, tmp_path / "broken")
    shard = broken / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="damaged or truncated"):
        D2MoEConfig.from_config(content).maybe_update_config(str(broken))
    # Without any weights it depends on --load-format, which is known once layers are made.
    for file in broken.glob("*.safetensors"):
        file.unlink()
    vllm_config.model_config.model = str(broken)
    config = D2MoEConfig.from_config(content)
    config.maybe_update_config(str(broken))
    with pytest.raises(CheckpointError, match=r"weight file model-00001-of-00002.safetensors is missing"):
        config.get_quant_method(torch.nn.Module(), "model.embed_tokens")
    vllm_config.load_config.load_format = "dummy"
    config.get_quant_method(torch.nn.Module(), "model.embed_tokens")


def test_a_hub_id_is_checked_in_its_snapshot(
    checkpoint: Path, content: dict[str, Any], vllm_config: VllmConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked: list[Any] = []

    def snapshot_download(model: str, **options: Any) -> str:
        asked.append((model, options["revision"], options["cache_dir"]))
        return str(checkpoint)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    vllm_config.model_config.model, vllm_config.model_config.revision = "someone/mixtral-d2", "v1"
    vllm_config.load_config.download_dir = "/cache"
    config = D2MoEConfig.from_config(content)
    config.maybe_update_config("someone/mixtral-d2")
    for _ in range(2):
        config.get_quant_method(torch.nn.Module(), "model.embed_tokens")
    assert asked == [("someone/mixtral-d2", "v1", "/cache")]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"has_bias": True}, "experts have biases in the model, and not all of them in quantization_config"),
        ({"activation": MoEActivation.SWIGLUSTEP}, "activation 'swiglustep'"),
        ({"activation": MoEActivation.GELU, "swiglu_limit": 7.0}, "activation 'gelu' with clamping"),
        (
            {"activation": MoEActivation.SWIGLUOAI},
            r"clamped SwiGLU are \(7.0, 1.702, 1.0\) in the model and none in quantization_config",
        ),
        ({"swiglu_limit": 7.0}, r"are \(7.0, 1.0, 0.0\) in the model and none in quantization_config"),
        ({"num_experts": 16}, r"\(16, 128, 256\) in the model"),
        ({"dp_size": 2}, "scope 'batch' does not work"),
        ({"is_sequence_parallel": True}, "scope 'batch' does not work"),
        ({"moe_parallel_config": parallel(enable_eplb=True)}, "leave --enable-eplb out"),
    ],
)
def test_what_we_cannot_do_is_refused(
    config: CheckpointConfig, vllm_config: VllmConfig, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words) as error:
        D2MoEMethod(moe(**changes), config, 1, "batch", "reference")
    assert "\n" not in str(error.value)


def test_what_a_layer_wants_and_we_cannot_do(config: CheckpointConfig, vllm_config: VllmConfig) -> None:
    with pytest.raises(ValueError, match=r"router weights .* where one expert is chosen per token, not 2"):
        create(D2MoEMethod(moe(), config, 1, "off", "reference"), routed_experts(apply_router_weight_on_input=True))
    with pytest.raises(CheckpointError, match="gate_proj"):
        create(D2MoEMethod(moe(), config, 1, "off", "reference"), routed_experts(ckpt_gate_proj_name="gate_proj"))
    with pytest.raises(CheckpointError, match="tensor-parallel size 3"):
        create(
            D2MoEMethod(moe(moe_parallel_config=parallel(tp_size=3)), config, 1, "off", "reference"), routed_experts()
        )
    vllm_config.lora_config = SimpleNamespace(target_modules=None)  # type: ignore[assignment]
    with pytest.raises(ValueError, match="--lora-target-modules q_proj k_proj v_proj o_proj"):
        D2MoEMethod(moe(), config, 1, "off", "reference")
    vllm_config.lora_config = SimpleNamespace(target_modules=["q_proj", "experts"])  # type: ignore[assignment]
    with pytest.raises(ValueError, match="experts take no LoRA"):
        D2MoEMethod(moe(), config, 1, "off", "reference")
    vllm_config.lora_config = SimpleNamespace(target_modules=["o_proj"])  # type: ignore[assignment]
    D2MoEMethod(moe(), config, 1, "off", "reference")
    vllm_config.load_config.load_format = "sharded_state"
    with pytest.raises(ValueError, match="--load-format sharded_state"):
        D2MoEMethod(moe(), config, 1, "off", "reference")


def test_an_incomplete_layer_is_refused(config: CheckpointConfig, vllm_config: VllmConfig) -> None:
    method, layer = D2MoEMethod(moe(), config, 1, "off", "reference"), routed_experts()
    create(method, layer)
    names = {name for name, _ in layer.named_parameters()}
    assert {"w13_delta_u", "w13_base", "w2_base_norms"} <= names
    with pytest.raises(CheckpointError, match=r"layer 1: 57 tensors were not loaded: .*experts.0.w1.base, "):
        method.process_weights_after_loading(layer)
    vllm_config.load_config.load_format = "dummy"
    method = D2MoEMethod(moe(), config, 1, "off", "reference")
    create(method, layer)
    method.process_weights_after_loading(layer)
    assert not method.supports_eplb
    assert method.maybe_roundup_sizes(100, 30, torch.float32, None) == (100, 30)


def test_expert_parallel_leaves_down_alone(config: CheckpointConfig, vllm_config: VllmConfig) -> None:
    method = D2MoEMethod(moe(moe_parallel_config=parallel(use_ep=True, ep_size=2)), config, 1, "token", "reference")
    create(method, routed_experts())
    assert (method.spec.w13.used, method.spec.w2.used) == (64, 192)


@pytest.fixture
def served(config: CheckpointConfig, vllm_config: VllmConfig) -> tuple[D2MoEMethod, Any]:
    method, layer = D2MoEMethod(moe(), config, 1, "batch", "reference"), routed_experts()
    create(method, layer)
    fill(layer)
    return method, layer


def test_apply_is_one_operator_when_compiled(served: tuple[D2MoEMethod, Any]) -> None:
    method, layer = served

    def forward(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return method.apply(layer, x, weights, ids)

    compiled = torch.compile(forward, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (5, 1, 9):
        x, ids = torch.randn(tokens, 128), torch.stack([torch.randperm(8)[:2] for _ in range(tokens)]).int()
        weights = torch.rand(tokens, 2)
        torch.testing.assert_close(compiled(x, weights, ids), forward(x, weights, ids))


def test_the_operator_keeps_its_promises(served: tuple[D2MoEMethod, Any]) -> None:
    method, layer = served
    parameters = [getattr(layer, name, None) for name in ops.PARAMETERS]
    arguments = (torch.randn(4, 128), torch.rand(4, 2), torch.randint(0, 8, (4, 2)), *parameters)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.d2moe.fused_experts.default, arguments, method.constants, test_utils=checks)


def test_the_cpu_backend_packs_what_was_loaded(config: CheckpointConfig, vllm_config: VllmConfig) -> None:
    """The same layer, before packing by the reference, after it by the C++ backend; no second copy stays."""
    vllm_config.load_config.load_format = "dummy"
    method, layer = D2MoEMethod(moe(), config, 1, "token", "cpu"), routed_experts()
    create(method, layer)
    fill(layer)
    arguments = torch.randn(5, 128), torch.rand(5, 2), torch.stack([torch.randperm(8)[:2] for _ in range(5)])
    assert method.constants["backend"] == "cpu"
    method.constants["backend"] = "reference"
    expected = method.apply(layer, *arguments)
    before = sum(p.nbytes for p in layer.parameters())
    method.constants["backend"] = "cpu"
    method.process_weights_after_loading(layer)
    torch.testing.assert_close(method.apply(layer, *arguments), expected)
    # This layer's ranks are no multiples of 16, which packing rounds them up to.
    assert sum(p.nbytes for p in layer.parameters()) < 1.3 * before


def test_a_backend_is_chosen_and_may_be_named(content: dict[str, Any], vllm_config: VllmConfig) -> None:
    layer, prefix = routed_experts(), "model.layers.1.block_sparse_moe.experts"
    for asked in ("cpu", "reference", "cpu-int8"):
        expected, additional = asked, {} if asked == "cpu" else {"d2moe": {"backend": asked}}
        vllm_config.additional_config = additional
        method = D2MoEConfig.from_config(content).get_quant_method(layer, prefix)
        assert isinstance(method, D2MoEMethod)
        assert method.backend == expected
    vllm_config.additional_config = {"d2moe": {"backend": "triton"}}
    with pytest.raises(ValueError, match="--additional-config: d2moe backend 'triton' is none of those") as error:
        D2MoEConfig.from_config(content).get_quant_method(layer, prefix)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("length", [6, 64])
def test_padding_is_read_from_the_forward_context(served: tuple[D2MoEMethod, Any], length: int) -> None:
    """The mask may be longer than the batch, as vLLM's persistent buffer is."""
    method, layer = served
    x, weights, ids = torch.randn(6, 128), torch.rand(6, 2), torch.stack([torch.randperm(8)[:2] for _ in range(6)])
    alone = method.apply(layer, x[:4], weights[:4], ids[:4])
    x[4:] = torch.nan
    with override_forward_context(SimpleNamespace(is_padding=torch.arange(length) >= 4)):  # type: ignore[arg-type]
        together = method.apply(layer, x, weights, ids)[:4]
    torch.testing.assert_close(together, alone)
    with override_forward_context(SimpleNamespace(is_padding=None)):  # type: ignore[arg-type]
        assert not torch.equal(method.apply(layer, x, weights, ids)[:4], alone)


def test_remote_experts_are_left_out(served: tuple[D2MoEMethod, Any]) -> None:
    method, layer = served
    type(layer).expert_map = torch.tensor([0, 1, 2, 3, -1, -1, -1, -1], dtype=torch.int32)
    x, weights = torch.randn(3, 128), torch.rand(3, 2)
    method.constants["spec"] = ops.encoded(method.spec._replace(scope="off"))
    local = method.apply(layer, x, weights, torch.tensor([[0, 1], [2, 3], [0, 3]]))
    assert local.abs().sum() > 0
    remote = method.apply(layer, x, weights, torch.tensor([[4, 5], [6, 7], [-1, 7]]))
    assert not remote.any()
