"""Families whose loaders in vLLM know no other tensors of experts than their own: ours are taken out before they see
them, which gpt-oss's would drop without a word, and Granite 4's and, behind a layer that stays dense, Llama 4's would
fail at."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import wraps
from typing import Any

from torch import Tensor, nn

from d2moe_vllm.compat import RoutedExperts, model_class
from d2moe_vllm.format.kinds import Stored

CLASSES = {
    "gpt_oss": ("gpt_oss", "GptOssForCausalLM"),
    "granitemoehybrid": ("granitemoehybrid", "GraniteMoeHybridForCausalLM"),
    "llama4": ("mllama4", "Llama4ForConditionalGeneration"),
    "llama4_text": ("llama4", "Llama4ForCausalLM"),
}
"""Family -> vLLM's module and class of such a loader."""
Weights = Iterable[tuple[str, Tensor]]
LoadWeights = Callable[[Any, Weights], set[str]]


def take_ours_first(family: str) -> None:
    """Has models of a family's class load our tensors of their experts themselves; nothing for other families. Their
    loader gets all else, and of other checkpoints everything."""
    if family not in CLASSES:
        return
    found = model_class(*CLASSES[family])
    if not hasattr(found.load_weights, "d2moe"):
        found.load_weights = _taking_ours(found.load_weights)


def _taking_ours(load_weights: LoadWeights) -> LoadWeights:
    @wraps(load_weights)
    def load(model: Any, weights: Weights) -> set[str]:
        places, loaded = _places(model), set[str]()

        def others() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in weights:
                if name not in places:
                    yield name, tensor
                    continue
                parameter, layer, one = places[name]
                half = "w2" if one.role == "down" else "w13"
                own = getattr(layer, f"{half}_{one.name}")
                layer.quant_method.loader.load(own.data, tensor, one.name, one.role, one.expert)
                loaded.add(f"{parameter}.{half}_{one.name}")

        return load_weights(model, others()) | loaded

    load.d2moe = True  # type: ignore[attr-defined]
    return load


def _places(model: nn.Module) -> dict[str, tuple[str, Any, Stored]]:
    """A checkpoint's name of every tensor of our experts -> the layer that it is of, by its name and itself, and what
    it is."""
    from d2moe_vllm.serving.experts import D2MoEMethod

    found: dict[str, tuple[str, Any, Stored]] = {}
    for name, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        if isinstance(module, RoutedExperts) and isinstance(method, D2MoEMethod):
            found |= {full: (name, module, one) for full, one in method.config.stored(method.layer).items()}
    return found
