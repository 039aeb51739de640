"""vLLM plugin that serves d2moe checkpoints: shared pruned base, low-rank delta per expert.

Importing this package imports neither vLLM nor torch.
"""

from __future__ import annotations

import logging
from typing import Any

__version__ = "0.1.0"

SUPPORTED_VLLM = ((0, 32), (0, 33))
"""Minor releases of vLLM whose insides compat.py knows."""

_registered = False


def register() -> None:
    """Entry point of `vllm.general_plugins`: makes vLLM know quant_method "d2moe".

    vLLM calls it in every process. It never raises, since that would stop vLLM for every model: where this
    plugin cannot work, a config is registered that says why as soon as a d2moe checkpoint is asked for.
    """
    global _registered
    if _registered:
        return
    try:
        from vllm.model_executor.layers.quantization import register_quantization_config

        register_quantization_config("d2moe")(_config_class())
    except Exception as error:
        logging.getLogger(__name__).error("%s", unsupported(error))
        return
    _register_families()
    _registered = True


def _register_families() -> None:
    """Lets vLLM read config.json of the families it can serve but has no configuration of."""
    try:
        from d2moe_vllm.families import register_configs

        register_configs()
    except Exception as error:  # other families are served all the same
        logging.getLogger(__name__).warning("d2moe: DeepSeek v1 cannot be served: %s", error)


def _config_class() -> type[Any]:
    import vllm

    release = tuple(int(part) for part in vllm.__version__.split("+")[0].split(".")[:2] if part.isdigit())
    if release not in SUPPORTED_VLLM:
        return _refusing_config(unsupported())
    try:
        from d2moe_vllm.serving.quantization import D2MoEConfig
    except Exception as error:
        return _refusing_config(unsupported(error))
    return D2MoEConfig


def unsupported(error: Exception | None = None) -> str:
    """One sentence: which vLLM was found, which are supported, how to mend it."""
    try:
        import vllm

        found = vllm.__version__
    except Exception:
        found = "of unknown version"
    first, last = SUPPORTED_VLLM[0], SUPPORTED_VLLM[-1]
    window = f">={first[0]}.{first[1]},<{last[0]}.{last[1] + 1}"
    why = f" ({type(error).__name__}: {error})" if error else ""
    return (
        f"d2moe-vllm {__version__} supports vllm{window} but found vllm {found}{why}; "
        f"install a matching pair, for example: pip install 'vllm{window}'"
    )


def _refusing_config(reason: str) -> type[Any]:
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

    class RefusingConfig(QuantizationConfig):
        """Stands in for D2MoEConfig where the plugin does not fit the vLLM it is installed with."""

        def get_name(self) -> str:
            return "d2moe"

        def get_supported_act_dtypes(self) -> list[Any]:
            return []

        @classmethod
        def get_min_capability(cls) -> int:
            return 0

        @staticmethod
        def get_config_filenames() -> list[str]:
            return []

        @classmethod
        def from_config(cls, config: dict[str, Any]) -> Any:
            raise RuntimeError(reason)

        def get_quant_method(self, layer: Any, prefix: str) -> None:
            raise RuntimeError(reason)

    return RefusingConfig
