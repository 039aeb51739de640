"""What `--additional-config` says of d2moe, and what is in force with it: scope and backend."""

from __future__ import annotations

from typing import Any, get_args

from d2moe_vllm.format.config import CheckpointConfig, Scope

VLLM = "vllm"
"""The backend that is none of ops.BACKENDS: vLLM's own fused experts (serving/plain.py)."""
SCOPE_HINT = """--additional-config '{"d2moe": {"scope": "token"}}'"""


def overrides(additional_config: dict[str, Any]) -> dict[str, Any]:
    """What `--additional-config` says of d2moe: scope and backend. Raises ValueError, in one line, for other keys."""
    found = additional_config.get("d2moe", {})
    if not isinstance(found, dict) or set(found) - {"scope", "backend"}:
        raise ValueError(f"--additional-config: d2moe knows scope and backend, as in {SCOPE_HINT}; found {found!r}")
    return found


def backend_in_force(additional_config: dict[str, Any], device: str) -> tuple[str, str | None]:
    """`ops.choose_backend` of what `--additional-config` says. Raises ValueError, in one line."""
    from d2moe_vllm import ops

    asked = overrides(additional_config).get("backend")
    if asked == VLLM and device == "cuda":
        asked = None
    try:
        return ops.choose_backend(device, asked)
    except ValueError as error:
        raise ValueError(f"--additional-config: d2moe {error}") from None


def chosen_scope(config: CheckpointConfig, additional_config: dict[str, Any]) -> Scope:
    """The checkpoint's scope unless `--additional-config` says otherwise. Raises ValueError, in one line."""
    scope = overrides(additional_config).get("scope", config.pruning.scope)
    if scope not in get_args(Scope):
        raise ValueError(f"--additional-config: d2moe scope {scope!r} is none of {', '.join(get_args(Scope))}")
    return scope


def scope_in_force(config: CheckpointConfig, additional_config: dict[str, Any]) -> Scope:
    """The chosen scope, or "token" in place of "batch" under VLLM_BATCH_INVARIANT=1. Raises ValueError."""
    from d2moe_vllm import compat

    scope = chosen_scope(config, additional_config)
    return "token" if scope == "batch" and compat.batch_invariant() else scope
