"""METHODS 1.5 and 1.6 again, token by token in float64 numpy: slow, naive, and sharing no code with ours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from d2moe_vllm.ops.weights import HalfSpec, LayerSpec, Weights


@dataclass
class Case:
    """One layer's weights as the checkpoint stores them ([out, in] matrices), and a batch.

    delta_u: by expert, or by u_index where a role has one. delta_v: by expert; for roles in delta_columns these
    columns by expert instead, for roles in shared_v one V. trimmed: experts whose deltas are not to be used.
    bias: by expert; swiglu: limit, alpha and beta, or (). activation: of ACTIVATIONS; without a gate there is no role
    of that name anywhere.
    """

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
    base_u: dict[str, np.ndarray] = field(default_factory=dict)
    base_v: dict[str, np.ndarray] = field(default_factory=dict)
    delta_columns: dict[str, list[np.ndarray]] = field(default_factory=dict)
    shared_v: dict[str, np.ndarray] = field(default_factory=dict)
    u_index: dict[str, np.ndarray] = field(default_factory=dict)
    trimmed: tuple[int, ...] = ()
    bias: dict[str, list[np.ndarray]] = field(default_factory=dict)
    swiglu: tuple[float, ...] = ()
    activation: str = "silu"

    @property
    def first(self) -> tuple[str, ...]:
        """What reads the layer's input."""
        return ("gate", "up") if "gate" in self.delta_u else ("up",)


def silu(value: float) -> float:
    return value / (1 + math.exp(-value)) if value > -700 else 0.0


def relu2(value: float) -> float:
    return value * value if value > 0 else value * 0.0


ACTIVATIONS = {"silu": silu, "relu2": relu2}


def gated(parts: Sequence[np.ndarray], swiglu: tuple[float, ...], activation: str = "silu") -> np.ndarray:
    """act(gate) * up, act(up) where there is no gate, or the clamped SwiGLU as gpt-oss has it, number by number."""
    first = parts[0]
    if not swiglu:
        value = np.array([ACTIVATIONS[activation](one) for one in first])
        return value * parts[1] if len(parts) > 1 else value
    gate, up = parts
    limit, alpha, beta = swiglu
    found = np.empty(len(gate))
    for i in range(len(gate)):
        g, u = min(gate[i], limit), max(-limit, min(up[i], limit))
        found[i] = g * (1 / (1 + math.exp(-alpha * g)) if alpha * g > -700 else 0.0) * (u + beta)
    return found


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
    if role in case.base_u:
        return x @ (case.base_u[role] @ case.base_v[role]).T
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


def delta_matrix(case: Case, role: str, expert: int) -> np.ndarray | None:
    """[out, in], or None where the expert has no delta."""
    us = case.delta_u[role]
    if us is None or expert in case.trimmed:
        return None
    u = us[case.u_index[role][expert] if role in case.u_index else expert]
    if role in case.shared_v:
        return u @ case.shared_v[role]
    if role in case.delta_columns:
        inputs = case.intermediate_size if role == "down" else case.x.shape[1]
        return u @ np.eye(inputs)[case.delta_columns[role][expert]]
    return u @ case.delta_v[role][expert]


def _delta(case: Case, role: str, expert: int, x: np.ndarray) -> np.ndarray | float:
    matrix = delta_matrix(case, role, expert)
    return 0.0 if matrix is None else matrix @ x


def forward(case: Case) -> np.ndarray:
    tokens, hidden_size = case.x.shape
    based = case.base[case.first[0]] is not None
    joint = np.sqrt(sum(case.norms[role] ** 2 for role in case.first)) if based else None
    z = {role: _base(case, role, case.x, joint) for role in case.first}
    mix = np.zeros((tokens, case.intermediate_size))
    output = np.zeros((tokens, hidden_size))
    for t in range(tokens):
        for expert, gate_value in zip(case.topk_ids[t], case.topk_weights[t], strict=True):
            if expert < 0:
                continue
            parts = {}
            for role in case.first:
                shared = z[role][t] if isinstance(z[role], np.ndarray) else 0.0
                parts[role] = shared + _delta(case, role, expert, case.x[t]) + np.zeros(case.intermediate_size)
                if case.bias:
                    parts[role] = parts[role] + case.bias[role][expert]
            h = gated(list(parts.values()), case.swiglu, case.activation)
            mix[t] += gate_value * h
            output[t] += gate_value * _delta(case, "down", expert, h)
            if case.bias:
                output[t] += gate_value * case.bias["down"][expert]
    return output + _base(case, "down", mix, case.norms.get("down"))


def kernel_arguments(case: Case, dtype: torch.dtype) -> tuple[list[Any], LayerSpec]:
    """The same case in the layout of ops.reference.fused_experts: positional arguments, spec."""
    arguments = [
        torch.from_numpy(case.x).to(dtype),
        torch.from_numpy(case.topk_weights).to(torch.float32 if dtype != torch.float64 else dtype),
        torch.from_numpy(case.topk_ids).to(torch.int32),
        _weights(case, case.first, dtype),
        _weights(case, ("down",), dtype),
        None if case.padding is None else torch.from_numpy(case.padding),
    ]
    halves = (_half(case, *case.first), _half(case, "down"))
    spec = LayerSpec(case.num_experts, case.intermediate_size, *halves, case.activation, case.scope, swiglu=case.swiglu)
    return arguments, spec


def _half(case: Case, *roles: str) -> HalfSpec:
    ranks = tuple(0 if us is None else us[0].shape[1] for us in (case.delta_u[role] for role in roles))
    base_ranks = tuple(case.base_v[role].shape[0] if role in case.base_v else 0 for role in roles)
    return HalfSpec(ranks, base_ranks, case.groups, case.used[roles[0]])


def _weights(case: Case, roles: tuple[str, ...], dtype: torch.dtype) -> Weights:
    def tensor(value: Any, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(value)).to(kind)

    def join(table: dict[str, Any], axis: int, place: int | None = None) -> np.ndarray:
        parts = [table[role] if place is None else table[role][place] for role in roles if table.get(role) is not None]
        return np.concatenate(parts, axis)

    fields: dict[str, torch.Tensor] = {}
    untrimmed = [e for e in range(case.num_experts) if e not in case.trimmed]
    ranked = [role for role in roles if case.delta_u[role] is not None]
    if ranked:
        distinct = range(len(case.delta_u[ranked[0]])) if ranked[0] in case.u_index else untrimmed
        fields["delta_u"] = tensor(np.stack([join(case.delta_u, 1, place) for place in distinct]))
        if ranked[0] in case.shared_v:
            fields["shared_v"] = tensor(join(case.shared_v, 0))
        elif ranked[0] in case.delta_columns:
            fields["delta_columns"] = tensor(np.stack([join(case.delta_columns, 0, e) for e in untrimmed]), torch.int32)
        else:
            fields["delta_v"] = tensor(np.stack([join(case.delta_v, 0, e) for e in untrimmed]))
        own = np.array([untrimmed.index(e) if e in untrimmed else -1 for e in range(case.num_experts)])
        if ranked[0] in case.u_index:
            own_u = np.where(own < 0, -1, case.u_index[ranked[0]])
            fields["u_index"] = tensor(own_u, torch.int32)
        elif case.trimmed:
            fields["u_index"] = tensor(own, torch.int32)
        if case.trimmed and "shared_v" not in fields:
            fields["v_index"] = tensor(own, torch.int32)
    if case.bias:
        fields["bias"] = tensor(np.stack([join(case.bias, 0, expert) for expert in range(case.num_experts)]))
    if any(role in case.base_u for role in roles):
        fields |= {"base_u": tensor(join(case.base_u, 1)), "base_v": tensor(join(case.base_v, 0))}
    if case.base[roles[0]] is not None:
        fields["base"] = tensor(np.concatenate([case.base[role] for role in roles]).T)
        fields["base_columns"] = tensor(case.columns[roles[0]], torch.int32)
        norms = np.sqrt(np.sum([case.norms[role] ** 2 for role in roles], axis=0))
        fields["base_norms"] = tensor(norms, torch.float32)
    return Weights(**fields)
