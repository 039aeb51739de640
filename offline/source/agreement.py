"""Settings of config.json that transformers, which calibrates, and vLLM, which serves, read differently.

A check looks at more than one setting, or deeper than one; what depends on one alone is in `Family.requires`. Read from
transformers 5.19 (modeling_rope_utils.py and each family's modeling file) and vLLM 0.32 (rotary_embedding, and each
family's model).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

TEXT = "text_config"
"""Where a multimodal model's config.json has the settings of the language model within it."""
Config = Mapping[str, Any]
Check = Callable[[Config], str | None]
"""A config.json -> what in it they read differently, None where they agree."""

ALIKE = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary embedding that both compute in the same way."""
PARTIAL = ("partial_rotary_factor", "rotary_pct", "rotary_emb_fraction")
OWN_SIZES = ("rope_dim", "mrope_section", "alpha", "max_trained_positions")
"""What vLLM alone looks at, but for the sections of a multimodal model's."""


def rope(*kinds: str, partial: bool = False, sections: bool = False) -> Check:
    """Rotary embeddings of one of these kinds, of the whole head; partial: or of its beginning; sections: of a
    multimodal model's three positions, interleaved, for which text has one number."""

    def check(config: Config) -> str | None:
        settings = config.get("rope_scaling") or config.get("rope_parameters") or {}
        if not isinstance(settings, dict):
            return f"rope_scaling {settings!r} is no object"
        if nested := next((key for key, value in settings.items() if isinstance(value, dict)), None):
            return f"rotary embeddings of several kinds ({nested})"
        parts = [(key, at[key]) for at in (settings, config) for key in PARTIAL if at.get(key) is not None]
        if not partial and (cut := next((part for part in parts if part[1] != 1), None)):
            return f"{cut[0]} {cut[1]!r}"
        if partial and (len(set(parts)) > 1 or any(key != PARTIAL[0] for key, _ in parts)):
            return f"rotary embeddings whose part of the head is said otherwise than by one {PARTIAL[0]}"
        if sections and (settings.get("mrope_interleaved") is not True or not settings.get("mrope_section")):
            return "rotary embeddings without mrope_section, or with mrope_interleaved other than true"
        allowed = ("mrope_section",) if sections else ()
        if own := next((key for key in OWN_SIZES if settings.get(key) is not None and key not in allowed), None):
            return f"{own} of the rotary embeddings"
        named = {settings[key] for key in ("rope_type", "type") if settings.get(key) is not None}
        if len(named) > 1:
            return f"rotary embeddings of two types ({' and '.join(sorted(map(str, named)))})"
        kind = next(iter(named), "default")
        if kind not in kinds:
            return f"rotary embeddings of type {kind!r} (only {', '.join(kinds)} are the same in both)"
        if kind == "linear" and not isinstance(settings.get("factor"), float):
            return f"factor {settings.get('factor')!r} of linear rotary embeddings (write it with a point, as 2.0)"
        empty = [key for key in ("factor", "beta_fast", "beta_slow") if key in settings and settings[key] is None]
        return f"{empty[0]} null of {kind} rotary embeddings" if kind == "yarn" and empty else None

    return check


def latent_attention(config: Config) -> str | None:
    """Of multi-head latent attention the scale that YaRN gives: transformers takes more settings than vLLM."""
    settings = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if settings.get("rope_type", settings.get("type")) != "yarn":
        return None
    if settings.get("attention_factor") is not None:
        return "attention_factor of yarn rotary embeddings"
    if settings.get("truncate", True) is not True:
        return "truncate of yarn rotary embeddings"
    scale, all_dims = settings.get("mscale"), settings.get("mscale_all_dim")
    if (scale and all_dims) or (not all_dims and scale in (None, 1, 1.0) and "mscale" not in _nulls(settings)):
        return None
    return f"mscale {scale!r} with mscale_all_dim {all_dims!r}"


def plain_yarn(config: Config) -> str | None:
    """vLLM's gpt-oss takes these of YaRN's settings, all of them but truncate, and no others."""
    settings = config.get("rope_scaling") or config.get("rope_parameters") or {}
    taken = ("rope_type", "type", "rope_theta", "factor", "beta_fast", "beta_slow", "original_max_position_embeddings")
    if other := sorted(set(settings) - {*taken, "truncate"}):
        return f"{other[0]} of yarn rotary embeddings"
    if missing := [key for key in taken[3:] if settings.get(key) is None]:
        return f"yarn rotary embeddings without {missing[0]}"
    return None


def every_other_window(config: Config) -> str | None:
    """vLLM's gpt-oss looks back on a window in every other layer from the first on, transformers where it is said."""
    kinds, layers = config.get("layer_types"), config.get("num_hidden_layers")
    if kinds is None:
        return None
    usual = [("sliding_attention", "full_attention")[number % 2] for number in range(layers or 0)]
    return None if kinds == usual else "layer_types other than sliding_attention and full_attention in turns"


def _nulls(settings: Config) -> list[str]:
    return [key for key, value in settings.items() if value is None]


def head_size(config: Config) -> str | None:
    """vLLM divides the hidden size by the heads, transformers takes head_dim where it is said."""
    size, heads, hidden = (config.get(key) for key in ("head_dim", "num_attention_heads", "hidden_size"))
    if size is None or not isinstance(heads, int) or not isinstance(hidden, int) or not heads:
        return None
    return None if size == hidden // heads else f"head_dim {size!r} ({hidden} in {heads} heads are {hidden // heads})"


def said(*keys: str) -> Check:
    """Settings that vLLM looks up and for which transformers' configuration has no default: they have to be there."""

    def check(config: Config) -> str | None:
        return next((f"{key} is not said" for key in keys if config.get(key) is None), None)

    return check


def alike(first: str, second: str) -> Check:
    """Two names of one number: each program reads one of them."""

    def check(config: Config) -> str | None:
        values = config.get(first), config.get(second)
        return None if values[0] == values[1] else f"{first} {values[0]!r} and {second} {values[1]!r}"

    return check


def dense_first(config: Config) -> str | None:
    """The layers without experts come first: vLLM takes their number, transformers each layer's kind."""
    first, kinds = config.get("first_k_dense_replace"), config.get("mlp_layer_types")
    if not isinstance(first, int):
        return f"first_k_dense_replace {first!r}"
    if kinds is not None and kinds != ["dense"] * first + ["sparse"] * (len(kinds) - first):
        return f"mlp_layer_types that are not first_k_dense_replace {first} dense ones and then sparse ones"
    return None


def one_window(config: Config) -> str | None:
    """A sliding window over every layer, or none: vLLM drops one that is not everywhere, and takes 0 for none."""
    window, kinds = config.get("sliding_window"), config.get("layer_types")
    if window == 0:
        return "sliding_window 0 (null is none)"
    if window is not None and kinds and set(kinds) != {"sliding_attention"}:
        return "layer_types that are not all sliding_attention beside a sliding_window"
    return None


def tied_within(default: bool) -> Check:
    """Whether a multimodal model's head is its embeddings: transformers asks the whole, vLLM the language model; both
    take `default` where that is not said."""

    def check(config: Config) -> str | None:
        whole, within = (one.get("tie_word_embeddings", default) for one in (config, config[TEXT]))
        return None if whole == within else f"tie_word_embeddings {whole!r}, and {within!r} in {TEXT}"

    return check


def rope_of_windows(config: Config) -> str | None:
    """Gemma 4: layers with a window have rotary embeddings of the whole head, the others proportional ones."""
    if config.get("rope_scaling") is not None:
        return "rope_scaling beside rope_parameters"
    if (settings := config.get("rope_parameters")) is None:
        return None
    kinds = {"sliding_attention": "default", "full_attention": "proportional"}
    if not isinstance(settings, dict) or set(settings) != set(kinds):
        return f"rope_parameters of other layers than {' and '.join(kinds)}"
    for layers, kind in kinds.items():
        rotary = dict(settings[layers] or {})
        if (found := rotary.pop("rope_type", None)) != kind:
            return f"rotary embeddings of type {found!r} in layers of {layers} (only {kind} are the same in both)"
        rotary.pop("rope_theta", None)
        if kind == "proportional":
            rotary.pop("partial_rotary_factor", None)
        if rotary:
            return f"{next(iter(rotary))} of the rotary embeddings"
    return None


def told_by_shape(config: Config) -> str | None:
    """Stacks of experts that are transposed on disk: vLLM takes them so, transformers by their shape."""
    hidden, size = config.get("hidden_size"), config.get("moe_intermediate_size")
    if not isinstance(size, int) or hidden not in (size, 2 * size):
        return None
    return f"hidden_size {hidden} and moe_intermediate_size {size}, of which stacks of experts may be square"


def real_window(config: Config) -> str | None:
    """Of layers that have one: vLLM takes 0 for none."""
    window = config.get("sliding_window")
    return None if window else f"sliding_window {window!r}"


def some_windows(config: Config) -> str | None:
    """EXAONE: where no layer has a window, vLLM has rotary embeddings in all layers, transformers in none."""
    kinds = config.get("layer_types")
    return None if kinds and "sliding_attention" in kinds else f"layer_types {kinds!r}, of which none says a window"


def no_window(config: Config) -> str | None:
    """Every layer attends to all."""
    kinds = config.get("layer_types")
    return f"layer_types {sorted(set(map(str, kinds)))}" if kinds and set(kinds) != {"full_attention"} else None


def full_indexers(config: Config) -> str | None:
    """GLM-5: layers that take what an indexer before them chose, which vLLM tells by other settings, and which cannot
    run one by one."""
    kinds = config.get("indexer_types")
    return None if kinds is None or set(kinds) == {"full"} else "indexer_types that are not all full"


def mimo(config: Config) -> str | None:
    """MiMo-V2: vLLM reads kinds of layers, heads, windows, norms and rotary embeddings from other settings than
    transformers, whose defaults of these are here."""
    layers, full, sliding = config.get("num_hidden_layers") or 0, "full_attention", "sliding_attention"
    kinds = config.get("layer_types") or [sliding if n and (n + 1) % 6 else full for n in range(layers)]
    experts = config.get("mlp_layer_types") or ["dense", *["sparse"] * (layers - 1)]
    rotary = config.get("rope_parameters")
    if rotary is None:
        rotary = {full: {"rope_theta": 5e6}, sliding: {"rope_theta": 1e4}}
    if not isinstance(rotary, dict) or any(not isinstance(rotary.get(kind), dict) for kind in (full, sliding)):
        return f"rope_parameters of other layers than {full} and {sliding}"
    for kind in (full, sliding):
        given = {"rope_type": "default", "partial_rotary_factor": 0.334, **rotary[kind]}
        if given["rope_type"] != "default" or set(given) != {"rope_type", "rope_theta", "partial_rotary_factor"}:
            return f"rotary embeddings of layers of {kind} that are not plain ones"
        if given["partial_rotary_factor"] != config.get("partial_rotary_factor"):
            return "rotary embeddings whose part of the head is said otherwise than by one partial_rotary_factor"
    same = {
        "hybrid_layer_pattern": [int(kind == sliding) for kind in kinds],
        "moe_layer_freq": [int(kind == "sparse") for kind in experts],
        "swa_num_attention_heads": config.get("num_attention_heads"),
        "swa_num_key_value_heads": 2 * (config.get("num_key_value_heads") or 0),
        "swa_head_dim": config.get("head_dim", 192),
        "swa_v_head_dim": config.get("v_head_dim", 128),
        "sliding_window_size": config.get("sliding_window"),
        "layernorm_epsilon": config.get("rms_norm_eps", 1e-5),
        "rope_theta": rotary[full]["rope_theta"],
        "swa_rope_theta": rotary[sliding]["rope_theta"],
    }
    return next((f"{key} {config.get(key)!r}" for key, value in same.items() if config.get(key) != value), None)


def gate_of_one(config: Config) -> str | None:
    """DeepSeek v1 with one expert a token: vLLM normalizes its gate to 1."""
    if config.get("norm_topk_prob") and config.get("num_experts_per_tok") == 1:
        return "norm_topk_prob true with num_experts_per_tok 1"
    return None


def groups(config: Config) -> str | None:
    """DeepSeek v2: vLLM chooses groups of experts whatever topk_method says, and has to be told how many."""
    number, chosen = config.get("n_group"), config.get("topk_group")
    if not isinstance(number, int) or not isinstance(chosen, int):
        return f"n_group {number!r} and topk_group {chosen!r} (both have to be said; 1 and 1 are none)"
    if config.get("topk_method") in (None, "greedy") and chosen < number:
        return f"topk_method {config.get('topk_method')!r} with n_group {number} and topk_group {chosen}"
    return None


def least_step(config: Config) -> str | None:
    """A remark: Mamba's time steps, none of which transformers makes smaller than time_step_min (0.001 by default)."""
    least = config.get("time_step_min", 0.001)
    if not least:
        return None
    return (
        f"transformers, which calibrates, makes no time step of Mamba smaller than time_step_min {least!r}, and "
        "vLLM does; such steps change next to nothing"
    )


def blocks_alike(config: Config) -> str | None:
    """Nemotron-H: vLLM takes sizes and numbers of experts of each layer from block_configs, as Puzzle's models have
    them; transformers' class knows one number."""
    return None if config.get("block_configs") is None else "block_configs (sizes and experts layer by layer)"


def laguna(config: Config) -> str | None:
    """Laguna: rotary embeddings by kind of layer, which vLLM also takes in one, or from other settings; and windows."""
    if "sliding_attention" in (config.get("layer_types") or ()) and not config.get("sliding_window", 512):
        return f"sliding_window {config.get('sliding_window')!r}"
    rotary, kinds = config.get("rope_parameters"), ("full_attention", "sliding_attention")
    if rotary is None:
        return None
    if not isinstance(rotary, dict) or set(rotary) != set(kinds) or not all(isinstance(rotary[k], dict) for k in kinds):
        return f"rope_parameters of other layers than {' and '.join(kinds)}"
    for kind in kinds:
        if problem := rope("default", "yarn", partial=True)({"rope_parameters": rotary[kind]}):
            return f"{problem} in layers of {kind}"
    return None


def every_so_many(config: Config) -> str | None:
    """Llama 4: vLLM counts layers with experts by interleave_moe_layer_step, transformers takes those that moe_layers
    lists, where it is said."""
    step, listed, layers = (config.get(key) for key in ("interleave_moe_layer_step", "moe_layers", "num_hidden_layers"))
    step = 1 if step is None else step
    if listed is None or not isinstance(step, int) or step < 1 or not isinstance(layers, int):
        return None
    return None if listed == list(range(step - 1, layers, step)) else f"moe_layers other than each {step}."


def chunks(config: Config) -> str | None:
    """Llama 4: layers with rotary embeddings attend within chunks in vLLM; transformers takes layer_types for it, where
    it is said, and needs a size of chunks."""
    layers, every = config.get("num_hidden_layers") or 0, config.get("no_rope_layer_interval", 4)
    rotated = config.get("no_rope_layers") or [int((layer + 1) % every != 0) for layer in range(layers)]
    usual = ["chunked_attention" if one else "full_attention" for one in rotated]
    if config.get("layer_types") not in (None, usual):
        return "layer_types other than chunked_attention where no_rope_layers is 1, and full_attention elsewhere"
    size = config.get("attention_chunk_size", 8192)
    return None if size else f"attention_chunk_size {size!r}"


def tuned_late(config: Config) -> str | None:
    """A remark on Llama 4: from some position on, queries of layers without rotary embeddings are scaled."""
    first, longest = config.get("floor_scale", 8192), config.get("max_position_embeddings", 131072)
    if not isinstance(first, int) or not isinstance(longest, int) or longest < first:
        return None
    tuned = config.get("attn_temperature_tuning", True)
    return (
        f"config.json: attn_temperature_tuning {tuned!r} is transformers' to read, which calibrates; vLLM "
        f"scales queries from position {first} on where generation_config.json says so, or where that is silent "
        "and --max-model-len is above 32768"
    )


def latent_norms(config: Config) -> str | None:
    """A remark: the norms within latent attention, whose epsilon transformers fixes at 1e-6."""
    epsilon = config.get("rms_norm_eps")
    if epsilon in (None, 1e-6):
        return None
    return (
        f"config.json: rms_norm_eps {epsilon!r} is also that of the norms within attention in vLLM, and 1e-06 there in "
        "transformers, which calibrates; the difference is in the last digits"
    )
