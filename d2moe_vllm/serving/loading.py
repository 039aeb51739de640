"""Checkpoint tensors -> this rank's parameters of one MoE layer; refuses what does not fit or is not complete.

Knows neither vLLM nor any backend: a rank is (tensor-parallel rank and size, which experts are local). What there is,
how large it is, what a rank has of it and how gate and up lie side by side, says the table of kinds.

Tensor-parallel slices need no collective of their own (the layer's all-reduce adds up): ranks share out whatever
counts intermediate channels, which are outputs of gate and up and inputs of down, and replicate all else. Columns of
a base or delta are spread evenly over `groups` slices of the input, so a rank's are one contiguous run.
Under expert parallelism a rank has what its own experts have; what experts share is on every rank.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from d2moe_vllm.format.config import CheckpointConfig, CheckpointError, Projection
from d2moe_vllm.format.files import check_index, differ_message
from d2moe_vllm.format.kinds import HALVES, KINDS, ROLES, Kind, Role, Stored, is_cut
from d2moe_vllm.ops.reference import HalfSpec, LayerSpec

SHARD_ROLES: dict[str, Role] = {"w1": "gate", "w3": "up", "w2": "down"}
"""vLLM's shard ids."""


class LayerLoader:
    """Allocates one MoE layer's parameters and fills them, tensor by tensor, in any order.

    local_expert: global expert number -> this rank's index, -1 if the expert lives elsewhere.
    Raises CheckpointError, in one line, where groups or sizes do not divide by tp_size.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        layer: int,
        *,
        num_local_experts: int,
        local_expert: Callable[[int], int],
        tp_rank: int = 0,
        tp_size: int = 1,
    ) -> None:
        groups = config.pruning.groups
        if groups % tp_size or config.intermediate_size % tp_size:
            raise CheckpointError(
                f"tensor-parallel size {tp_size} does not divide this checkpoint's {groups} column groups and "
                f"{config.intermediate_size} intermediate channels; use a size that divides both"
            )
        self.config, self.layer = config, layer
        self.tp_rank, self.tp_size = tp_rank, tp_size
        self.stored = config.stored(layer)
        # This rank's experts by global number, in the order of their own index here, -1 for none; and where in
        # the parameters the deltas of those that have any lie.
        self.experts = [-1] * num_local_experts
        for expert in range(config.num_experts):
            if (local := local_expert(expert)) >= 0:
                self.experts[local] = expert
        untrimmed = set(config.untrimmed(layer))
        self.places = {e: place for place, e in enumerate(e for e in self.experts if e in untrimmed)}
        self.loaded: set[str] = set()
        self._arrived: dict[tuple[str, Role], Tensor] = {}

    @property
    def intermediate_size(self) -> int:
        """This rank's share of the intermediate channels."""
        return self.config.intermediate_size // self.tp_size

    # Parameters

    def empty_parameters(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Uninitialised parameters by name, in the layout of ops.reference.Weights, on the default device.

        dtype: of whatever has no storage of its own. Columns and norms get valid values, because
        `--load-format dummy` leaves integers as they are.
        """
        parameters: dict[str, Tensor] = {}
        for half, roles in HALVES.items():
            for kind in KINDS:
                if any(kind.present(self._projection(role)) for role in roles):
                    parameters[f"{half}_{kind.name}"] = self._empty(kind, roles, dtype)
            parameters |= {f"{half}_{name}": index for name, index in self._indices(roles[0]).items()}
        return parameters

    def _empty(self, kind: Kind, roles: tuple[Role, ...], dtype: torch.dtype) -> Tensor:
        """A kind's parameter: gate's and up's side by side, one entry for each owner that is here."""
        lead = () if kind.owner == "layer" else (self._slots(kind, roles[0]) or len(self.places),)
        each = roles if kind.joined else roles[:1]
        if kind.content == "inputs":
            columns = torch.cat([self._spread(role, self._size(kind.sizes[0], role)) for role in each])
            return columns.repeat(*lead, 1) if lead else columns
        shape = [
            sum(self._size(size, role) for role in (roles if size == kind.joined else roles[:1])) for size in kind.sizes
        ]
        if kind.content == "norms":
            return torch.ones(shape, dtype=torch.float32)
        if kind.content == "slots":
            return torch.zeros(len(self.experts), dtype=torch.int32)
        if kind.input_major:
            shape[-2:] = shape[:-3:-1]
        return torch.empty(*lead, *shape, dtype=self._dtype(kind, roles[0], dtype))

    def _dtype(self, kind: Kind, role: Role, dtype: torch.dtype) -> torch.dtype:
        """Of a parameter: the storage's own where it has one, else what vLLM computes in."""
        storage = kind.storage(self._projection(role))
        return dtype if storage is None else getattr(torch, storage.type)

    def _indices(self, role: Role) -> dict[str, Tensor]:
        """Where each local expert's U and V lie, -1 for none, where that is not simply its own number."""
        projection, trimmed = self._projection(role), self.config.layers[self.layer].trimmed
        if projection.delta not in ("factors", "columns") or not projection.rank or not trimmed:
            return {}
        own = torch.tensor([self.places.get(expert, -1) for expert in self.experts], dtype=torch.int32)
        found = {} if projection.distinct_u else {"u_index": own}
        return found if projection.shared_v else {**found, "v_index": own.clone()}

    def _slots(self, kind: Kind, role: Role) -> int:
        """How many of a kind experts share, which are on every rank; 0 where each expert has its own."""
        return self._projection(role).distinct_u if kind.owner == "slot" else 0

    def _projection(self, role: Role) -> Projection:
        return self.config.layers[self.layer][role]

    def _size(self, size: str, role: Role) -> int:
        """A dimension on this rank."""
        whole = self.config.sizes.size_of(size, role, self._projection(role))
        return whole // self.tp_size if is_cut(role, size) else whole

    def _spread(self, role: Role, kept: int) -> Tensor:
        """The first columns of every group that is this rank's."""
        inputs, groups = self._size("in", role), self.config.pruning.groups
        groups //= self.tp_size if is_cut(role, "in") else 1
        within = torch.arange(kept // groups, dtype=torch.int32)
        starts = torch.arange(groups, dtype=torch.int32) * (inputs // groups)
        return (starts.unsqueeze(1) + within).flatten()

    # Loading

    def weight_loader(self, name: str) -> Callable[..., bool | None]:
        """The `weight_loader` attribute of the parameters of one kind ("delta_u", "base", ...)."""

        def load(
            param: Tensor,
            loaded_weight: Tensor,
            weight_name: str,
            shard_id: str,
            expert_id: int,
            return_success: bool = False,
        ) -> bool | None:
            stored = self.load(param.data, loaded_weight, name, SHARD_ROLES[shard_id], expert_id)
            return stored if return_success else None

        # Llama-4's and others' own loaders ask for this before they pass the expert's number.
        load.supports_moe_loading = True  # type: ignore[attr-defined]
        return load

    def load(self, param: Tensor, tensor: Tensor, name: str, role: Role, expert: int) -> bool:
        """Copy this rank's part of one checkpoint tensor into its parameter.

        Returns False where nothing of it belongs on this rank. Raises CheckpointError, naming the tensor,
        for a wrong shape and for columns that break the format.
        """
        full = self.config.tensor_name(self.layer, expert, role, name)
        one = self._checked(full, tensor)
        if not self._belongs(one):
            return False
        self.loaded.add(full)
        kind = one.kind
        if kind.content == "slots":
            tensor = tensor[self.experts]
        elif kind.owner != "layer":
            param = param[expert if self._slots(kind, role) else self.places[expert]]
        part = self._part(tensor, one)
        if role != "down" and kind.joined is None:
            self._load_joint(param, part, one)
            return True
        if role != "down" and kind.axis is not None:
            axis = kind.axis if not kind.input_major else len(kind.sizes) - 1 - kind.axis
            size = self._size(kind.sizes[kind.axis], role)
            param = param.narrow(axis, 0 if role == "gate" else param.shape[axis] - size, size)
        param.copy_(part.mT if kind.input_major else part)
        return True

    def missing(self) -> list[str]:
        """Checkpoint names of this rank's tensors that have not been loaded, in checkpoint order."""
        return [name for name, one in self.stored.items() if name not in self.loaded and self._belongs(one)]

    def _belongs(self, one: Stored) -> bool:
        """Whether anything of a tensor is this rank's: what experts share is, wherever the expert it rides with is."""
        shared = one.kind.owner == "layer" or self._slots(one.kind, one.role) > 0
        return shared or one.expert in self.places

    def _part(self, tensor: Tensor, one: Stored) -> Tensor:
        """What a tensor-parallel rank has of a tensor; numbers of inputs are counted from its own first one."""
        if one.kind.content == "slots":
            return tensor
        for axis, size in enumerate(one.kind.sizes):
            if is_cut(one.role, size):
                own = tensor.shape[axis] // self.tp_size
                tensor = tensor.narrow(axis, self.tp_rank * own, own)
        if one.kind.content == "inputs" and is_cut(one.role, "in"):
            return tensor - self.tp_rank * self.intermediate_size
        return tensor

    def _load_joint(self, param: Tensor, part: Tensor, one: Stored) -> None:
        """What gate and up have one of: both have to arrive, where both store it."""
        self._arrived[one.name, one.role] = part
        names = {role: self.config.tensor_name(self.layer, 0, role, one.name) for role in HALVES["w13"]}
        stored = [role for role, name in names.items() if name in self.stored]
        if any((one.name, role) not in self._arrived for role in stored):
            return
        parts = [self._arrived.pop((one.name, role)) for role in stored]
        if one.kind.content == "norms":
            param.copy_(torch.stack([norms.float().square() for norms in parts]).sum(dim=0).sqrt())
        elif torch.equal(parts[0], parts[-1]):
            param.copy_(part)
        else:
            raise CheckpointError(differ_message(*names.values()))

    def _checked(self, name: str, tensor: Tensor) -> Stored:
        one = self.stored.get(name)
        if one is None:
            raise CheckpointError(f"{name} does not belong in this checkpoint; its config.json lists no such tensor")
        if tuple(tensor.shape) != one.spec.shape:
            raise CheckpointError(f"{name} is {list(tensor.shape)}, expected {list(one.spec.shape)}; copy it again")
        if one.kind.is_index:
            check_index(name, tensor.tolist(), self.config, self.layer, one)
        if one.kind.content == "norms" and not bool((tensor.isfinite() & (tensor >= 0)).all()):
            raise CheckpointError(
                f"layer {self.layer}: {one.role}.{one.name} has values that are no norms; copy the checkpoint again"
            )
        return one


def layer_spec(
    config: CheckpointConfig,
    layer: int,
    tp_size: int,
    scope: str,
    *,
    num_experts: int,
    activation: str,
    prune_down: bool,
    batch_invariant: bool = False,
    static_shapes: bool = False,
) -> LayerSpec:
    """What backends are told of a layer on one rank that has num_experts of its experts.

    prune_down False: use all kept columns of down (expert parallelism, METHODS 1.5).
    """
    gate, up, down = (config.layers[layer][role] for role in ROLES)
    groups = config.pruning.groups
    # A delta's columns are shared out like the inputs that they name.
    down_rank = down.rank // (tp_size if down.delta == "columns" else 1)
    down_used = down.used_columns if prune_down else down.kept_columns
    return LayerSpec(
        num_experts=num_experts,
        intermediate_size=config.intermediate_size // tp_size,
        w13=HalfSpec((gate.rank, up.rank), (gate.base_rank, up.base_rank), groups, gate.used_columns),
        w2=HalfSpec((down_rank,), (down.base_rank,), groups // tp_size, down_used // tp_size),
        activation=activation,
        scope=scope,
        function=gate.function or "",
        batch_invariant=batch_invariant,
        static_shapes=static_shapes,
    )
