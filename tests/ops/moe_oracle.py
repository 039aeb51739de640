"""METHODS 1.5 and 1.6 again, token by token in float64 numpy: slow, naive, and sharing no code with ours."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch


@dataclass
class Case:
    """One layer's weights as the checkpoint stores them ([out, in] matrices), and a batch."""

    x: np.ndarray
    topk_ids: np.ndarray
    topk_weights: np.ndarray
    delta_u: dict[str, list[np.ndarray] | None]
    delta_v: dict[str, list[np.ndarray] | None]
    base: dict[str, np.ndarray | None]
    columns: dict[str, np.ndarray]
    used: dict[str, int]
    groups: int
    num_experts: int
    intermediate_size: int
    scope: str = "off"
    padding: np.ndarray | None = None
    norms: dict[str, np.ndarray] = field(default_factory=dict)


def silu(value: float) -> float:
    return value / (1 + math.exp(-value)) if value > -700 else 0.0


def select(kept: np.ndarray, norms: np.ndarray, used: int, groups: int, scope: str, padding: Any) -> np.ndarray:
    """bool [T, kept], each row by plain sorting in Python."""
    tokens, count = kept.shape
    chosen = np.ones((tokens, count), dtype=bool)
    if scope == "off":
        return chosen
    real = [t for t in range(tokens) if padding is None or not padding[t]]
    for t in range(tokens):
        for g in range(groups):
            own = range(g * count // groups, (g + 1) * count // groups)
            rows = real if scope == "batch" else [t]
            score = {j: norms[j] * math.sqrt(sum(float(kept[r, j]) ** 2 for r in rows)) for j in own}
            best = sorted(own, key=lambda j: (-score[j], j))[: used // groups]
            for j in own:
                chosen[t, j] = j in best
    return chosen


def _base(case: Case, role: str, x: np.ndarray, norms: np.ndarray) -> np.ndarray | float:
    base = case.base[role]
    if base is None:
        return 0.0
    columns = case.columns[role]
    with np.errstate(all="ignore"):
        chosen = select(x[:, columns], norms, case.used[role], case.groups, case.scope, case.padding)
    weight = np.zeros((base.shape[0], x.shape[1]))
    weight[:, columns] = base
    out = np.zeros((x.shape[0], base.shape[0]))
    for t in range(x.shape[0]):
        masked = np.zeros(x.shape[1])
        masked[columns[chosen[t]]] = x[t, columns[chosen[t]]]
        out[t] = weight @ masked
    return out


def _delta(case: Case, role: str, expert: int, x: np.ndarray) -> np.ndarray | float:
    us, vs = case.delta_u[role], case.delta_v[role]
    return 0.0 if us is None or vs is None else us[expert] @ (vs[expert] @ x)


def forward(case: Case) -> np.ndarray:
    tokens, hidden_size = case.x.shape
    joint = np.sqrt(case.norms["gate"] ** 2 + case.norms["up"] ** 2) if case.base["gate"] is not None else None
    z = {role: _base(case, role, case.x, joint) for role in ("gate", "up")}
    mix = np.zeros((tokens, case.intermediate_size))
    output = np.zeros((tokens, hidden_size))
    for t in range(tokens):
        for expert, gate_value in zip(case.topk_ids[t], case.topk_weights[t], strict=True):
            if expert < 0:
                continue
            parts = {}
            for role in ("gate", "up"):
                shared = z[role][t] if isinstance(z[role], np.ndarray) else 0.0
                parts[role] = shared + _delta(case, role, expert, case.x[t]) + np.zeros(case.intermediate_size)
            h = np.array([silu(g) for g in parts["gate"]]) * parts["up"]
            mix[t] += gate_value * h
            output[t] += gate_value * _delta(case, "down", expert, h)
    return output + _base(case, "down", mix, case.norms.get("down"))


def kernel_arguments(case: Case, dtype: torch.dtype) -> tuple[list[torch.Tensor | None], dict[str, Any]]:
    """The same case in the layout of ops.reference.fused_experts: tensors, options."""

    def tensor(value: Any, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(value)).to(kind)

    def deltas(table: dict[str, Any], axis: int) -> torch.Tensor | None:
        roles = [role for role in ("gate", "up") if table[role] is not None]
        if not roles:
            return None
        return tensor(np.stack([np.concatenate([table[r][e] for r in roles], axis) for e in range(case.num_experts)]))

    tensors: list[torch.Tensor | None] = [
        tensor(case.x),
        tensor(case.topk_weights, torch.float32 if dtype != torch.float64 else dtype),
        tensor(case.topk_ids, torch.int32),
        deltas(case.delta_u, 1),
        deltas(case.delta_v, 0),
    ]
    if case.base["gate"] is not None:
        norms = np.sqrt(case.norms["gate"] ** 2 + case.norms["up"] ** 2)
        base = np.concatenate([case.base["gate"], case.base["up"]]).T
        tensors += [tensor(base), tensor(case.columns["gate"], torch.int32), tensor(norms, torch.float32)]
    else:
        tensors += [None, None, None]
    down = [case.delta_u["down"], case.delta_v["down"]]
    tensors += [None if value is None else tensor(np.stack(value)) for value in down]
    if case.base["down"] is not None:
        columns, norms = tensor(case.columns["down"], torch.int32), tensor(case.norms["down"], torch.float32)
        tensors += [tensor(case.base["down"].T), columns, norms]
    else:
        tensors += [None, None, None]
    tensors.append(None if case.padding is None else torch.from_numpy(case.padding))
    gate_u = case.delta_u["gate"]
    options = {
        "num_experts": case.num_experts,
        "gate_rank": 0 if gate_u is None else gate_u[0].shape[1],
        "activation": "silu",
        "scope": case.scope,
        "w13_groups": case.groups,
        "w13_used": case.used["gate"],
        "w2_groups": case.groups,
        "w2_used": case.used["down"],
    }
    return tensors, options
