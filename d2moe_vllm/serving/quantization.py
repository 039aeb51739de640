"""vLLM's view of a d2moe checkpoint: which layers are ours, and the refusal of anything that is not whole."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

from d2moe_vllm import unsupported
from d2moe_vllm.format.config import (
    QUANT_METHOD,
    RECIPE_FILE,
    CheckpointConfig,
    CheckpointError,
    Scope,
    parse_config,
)
from d2moe_vllm.format.files import check_checkpoint
from d2moe_vllm.overrides import SCOPE_HINT, VLLM, backend_in_force, chosen_scope, overrides, scope_in_force

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from d2moe_vllm.compat import FusedMoEConfig


class D2MoEConfig(QuantizationConfig):
    """`quantization_config` of a compressed checkpoint. The rest of our modules are imported on first use,
    so that serving other models with this plugin installed costs nothing."""

    def __init__(self, config: CheckpointConfig) -> None:
        super().__init__()
        self.config = config
        self._checked = False
        self._scope: Scope | None = None
        # Where workers write their metrics; travels to them with this config.
        self.metrics_folder: str | None = None

    def get_name(self) -> str:
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> Any:
        """Claims a d2moe checkpoint whose quantization_config was replaced by the user, so as to refuse it:
        vLLM would take it for a dense model."""
        classes = getattr(hf_config, "auto_map", None) or {}
        ours = any(str(name).startswith("modeling_d2moe.") for name in classes.values())
        return QUANT_METHOD if ours and hf_quant_cfg.get("quant_method") in ("", None) else None

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> D2MoEConfig:
        """Raises CheckpointError, in one line; RuntimeError where this vLLM's insides are not what we know."""
        try:
            from d2moe_vllm.observability import collector  # noqa: F401
            from d2moe_vllm.serving import experts, own_loaders, plain  # noqa: F401
        except Exception as error:
            raise RuntimeError(unsupported(error)) from None
        if "format_version" not in config:
            raise CheckpointError(
                "quantization_config is not a d2moe checkpoint's; --hf-overrides replaces it as a whole: "
                f"to change the scope of column selection use {SCOPE_HINT}"
            )
        return cls(parse_config(config))

    def maybe_update_config(
        self, model_name: str, hf_config: PreTrainedConfig | None = None, revision: str | None = None
    ) -> None:
        """Checks a local checkpoint's files in the front-end process, before any engine starts; prepares metrics.

        A Hub id, and a folder without any weight file (`--load-format dummy`), wait until get_quant_method,
        when it is known how weights are to be loaded. Raises CheckpointError.
        """
        folder = Path(model_name)
        if folder.is_dir() and any(folder.glob("*.safetensors")):
            check_checkpoint(folder, self.config)
            self._checked = True
        from d2moe_vllm.observability import collector

        self.metrics_folder = collector.prepare()

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Our method for the MoE layers in `layers`; vLLM's own for all else."""
        from d2moe_vllm import compat
        from d2moe_vllm.observability import recorder
        from d2moe_vllm.serving.own_loaders import take_ours_first

        # The first layer to ask is the embedding, before its weights are allocated.
        self._check_once()
        compat.ask_for_amx()
        if "gate" not in self.config.projections:
            compat.let_cpus_have_experts_without_a_gate()
        scope = self._scope = self._scope or self._settle_scope()
        if isinstance(layer, compat.RoutedExperts):
            number = compat.extract_layer_index(prefix)
            if number in self.config.layers:
                self._refuse_rounding_again(type(layer), prefix)
                recorder.start(self.metrics_folder, self.config)
                take_ours_first(self.config.family)
                return self._method(layer.moe_config, number, scope)
            if compat.on_cpu() and "gate" not in self.config.projections:
                raise ValueError(
                    f"layer {number} was left dense, and vLLM's CPU backend has no kernel for experts without a gate; "
                    "serve it on another device"
                )
            if compat.on_cpu() and compat.shares_out_experts():
                raise ValueError(
                    f"layer {number} was left dense, and vLLM's CPU backend does not serve dense experts with "
                    "--enable-expert-parallel, whatever the model; leave it out"
                )
            return None
        return compat.UnquantizedLinearMethod() if isinstance(layer, compat.LinearBase) else None

    def _refuse_rounding_again(self, kind: type[torch.nn.Module], prefix: str) -> None:
        online = self.online_quantization_config
        if online is not None and online.resolve_quant_method_cls(kind, prefix) is not None:
            raise ValueError(
                "d2moe's experts are not quantized once more while they are loaded; let --quantization-config name "
                """other layers: '{"linear": "fp8_per_channel"}'"""
            )

    def _settle_scope(self) -> Scope:
        """The scope to serve with, said where it is not the chosen one. Raises ValueError, in one line."""
        from d2moe_vllm import compat

        logger = compat.init_logger(__name__)
        scope = scope_in_force(self.config, compat.additional_config())
        if scope != chosen_scope(self.config, compat.additional_config()):
            logger.info_once("d2moe: VLLM_BATCH_INVARIANT=1: scope 'token' in place of 'batch'", scope="global")
        if scope == "token" and not compat.on_cpu() and not compat.batch_invariant():
            logger.info_once("d2moe: scope 'token' is exact to the last bit only with VLLM_BATCH_INVARIANT=1 on GPUs")
        if scope == "batch" and compat.prefix_caching():
            logger.warning_once(
                "d2moe: prefix caching keeps what one batch's selection of columns computed for other requests; "
                "with --no-enable-prefix-caching a request depends on its own batch alone",
                scope="global",
            )
        return scope

    def _method(self, moe: FusedMoEConfig, number: int, scope: Scope) -> QuantizeMethodBase:
        """For a layer of ours; vLLM's own experts serve it where they can. Raises ValueError, in one line."""
        from d2moe_vllm import compat
        from d2moe_vllm.serving import plain
        from d2moe_vllm.serving.experts import D2MoEMethod

        backend, asked = self._settle_backend(), overrides(compat.additional_config()).get("backend")
        if asked in (None, VLLM) and compat.device_type() == "cuda":
            try:
                theirs = plain.experts_of(moe, self.config, number, scope)
                return plain.PlainMethod(moe, self.config, number, scope, theirs)
            except plain.NotPlainError as reason:
                if asked == VLLM:
                    raise ValueError(
                        f"--additional-config: d2moe backend 'vllm' does not serve this: {reason}"
                    ) from None
                if plain.plain_storage(self.config.layers[number]) is not None:
                    compat.init_logger(__name__).info_once(
                        f"d2moe: backend {backend!r} serves layers that vLLM's own experts might have served: {reason}"
                    )
        return D2MoEMethod(moe, self.config, number, scope, backend)

    def _settle_backend(self) -> str:
        """The backend to serve with, said where it is not the fastest. Raises ValueError, in one line."""
        from d2moe_vllm import compat

        name, why_not_better = backend_in_force(compat.additional_config(), compat.device_type())
        if why_not_better:
            compat.init_logger(__name__).warning_once(f"d2moe: the slow backend {name!r} is used: {why_not_better}")
        return name

    def _check_once(self) -> None:
        from d2moe_vllm import compat

        if option := compat.fails_on_cpu():
            raise ValueError(
                f"vLLM's CPU backend does not serve with {option}, whatever the model; leave it out, or start "
                "several servers behind a load balancer"
            )
        if compat.transformers_code():
            raise ValueError(
                "d2moe serves with vLLM's own classes, not with transformers'; leave --model-impl transformers out"
            )
        if self._checked:
            return

        model, revision, download_dir, elsewhere = compat.model_source()
        # Weights streamed from object storage have no folder; loading still refuses what is incomplete.
        if compat.load_format() != "dummy" and not elsewhere:
            folder = Path(model) if Path(model).is_dir() else _download(model, revision, download_dir)
            check_checkpoint(folder, self.config)
        self._checked = True


def _download(model: str, revision: str | None, download_dir: str | None) -> Path:
    """The snapshot of a Hub id: what vLLM would download anyway, a little earlier."""
    from huggingface_hub import constants, snapshot_download

    return Path(
        snapshot_download(
            model,
            revision=revision,
            cache_dir=download_dir,
            allow_patterns=["*.json", "*.safetensors", RECIPE_FILE],
            local_files_only=constants.HF_HUB_OFFLINE,
        )
    )
