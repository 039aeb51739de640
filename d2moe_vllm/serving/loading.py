"""Checkpoint tensors -> this rank's parameters of one MoE layer; refuses what does not fit or is not complete.

Knows neither vLLM nor any backend: a rank is (tensor-parallel rank and size, which experts are local).

Tensor-parallel slices need no collective of their own (the layer's all-reduce adds up): gate and up
replicate V and shard U and base by output rows; down shards V and base by input columns and replicates U.
Columns of a base or delta are spread evenly over `groups` slices of the input, so a rank's are one contiguous run.
Bases that experts mix their V from are replicated as V is, A is sharded as U; whole matrices of down by input columns.
Under expert parallelism a rank has its own experts' U's and V's; what experts share is on every rank.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from d2moe_vllm.format.config import ROLES, CheckpointConfig, CheckpointError, Projection, Role
from d2moe_vllm.format.files import check_columns, check_u_index, differ_message
from d2moe_vllm.ops.reference import HalfSpec, LayerSpec

SHARD_ROLES: dict[str, Role] = {"w1": "gate", "w3": "up", "w2": "down"}
"""vLLM's shard ids."""

SHARED_KINDS = ("base", "base_columns", "base_norms", "base_u", "base_v", "shared_v", "u_index", "bases")
"""What rides with expert 0 and belongs to every rank, wherever expert 0 lives."""

OWN_KINDS = ("delta_u", "delta_v", "delta_columns", "a", "alpha", "dense")
"""What each expert has of its own; but delta_u where experts share their U's."""

BASE_KINDS = ("base", "base_columns", "base_norms", "base_u", "base_v")
JOINT_KINDS = ("base_columns", "base_norms", "u_index")
"""What gate and up both store and share at run time."""


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
        self.specs = {role: config.projection_tensors(layer, role) for role in ROLES}
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

    def empty_parameters(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Uninitialised parameters by name, in the layout of ops.reference.fused_experts, on the default device.

        Columns and norms get valid values, because `--load-format dummy` leaves integers as they are.
        """
        layer, groups = self.config.layers[self.layer], self.config.pruning.groups
        hidden, own = self.config.hidden_size, self.intermediate_size
        parameters: dict[str, Tensor] = {}
        for half, roles, inputs, own_groups in (
            ("w13", (layer.gate, layer.up), hidden, groups),
            ("w2", (layer.down,), own, groups // self.tp_size),
        ):
            # Down's inputs are this rank's, gate's and up's outputs.
            outputs, share = (own, 1) if half == "w13" else (hidden, self.tp_size)
            found = self._empty_deltas(roles, outputs, inputs, own_groups, share, dtype)
            if kept := roles[0].kept_columns // share:
                found["base"] = torch.empty(kept, len(roles) * outputs, dtype=dtype)
                found["base_columns"] = self._spread(inputs, kept, own_groups)
                found["base_norms"] = torch.ones(kept, dtype=torch.float32)
            if rank := sum(projection.base_rank for projection in roles):
                found["base_u"] = torch.empty(outputs, rank, dtype=dtype)
                found["base_v"] = torch.empty(rank, inputs, dtype=dtype)
            parameters.update({f"{half}_{kind}": tensor for kind, tensor in found.items()})
        return parameters

    def _empty_deltas(
        self, roles: tuple[Projection, ...], outputs: int, inputs: int, groups: int, share: int, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """By kind. share: how many ranks divide a delta's columns among them."""
        by_columns, distinct = roles[0].delta == "columns", roles[0].distinct_u
        ranks = [projection.rank // share if by_columns else projection.rank for projection in roles]
        stored = len(self.places)
        if roles[0].delta == "dense":
            return {"dense": torch.empty(stored, outputs, inputs, dtype=dtype)}
        if not (rank := sum(ranks)):
            return {}
        if bases := roles[0].bases:
            return {
                "bases": torch.empty(bases, rank, inputs, dtype=dtype),
                "a": torch.empty(stored, outputs, rank, dtype=dtype),
                "alpha": torch.empty(stored, len(roles) * bases, dtype=dtype),
            }
        found = {"delta_u": torch.empty(distinct or stored, outputs, rank, dtype=dtype)}
        if by_columns:
            columns = torch.cat([self._spread(inputs, columns, groups) for columns in ranks])
            found["delta_columns"] = columns.repeat(stored, 1)
        elif roles[0].shared_v:
            found["shared_v"] = torch.empty(rank, inputs, dtype=dtype)
        else:
            found["delta_v"] = torch.empty(stored, rank, inputs, dtype=dtype)
        own = torch.tensor([self.places.get(expert, -1) for expert in self.experts], dtype=torch.int32)
        if self.config.layers[self.layer].trimmed or distinct:
            found["u_index"] = own.clamp(max=0) if distinct else own
        if self.config.layers[self.layer].trimmed and not roles[0].shared_v:
            found["v_index"] = own.clone()
        return found

    @staticmethod
    def _spread(inputs: int, kept: int, groups: int) -> Tensor:
        """The first columns of every group."""
        within = torch.arange(kept // groups, dtype=torch.int32)
        starts = torch.arange(groups, dtype=torch.int32) * (inputs // groups)
        return (starts.unsqueeze(1) + within).flatten()

    def weight_loader(self, kind: str) -> Callable[..., bool | None]:
        """The `weight_loader` attribute of the parameters of one kind ("delta_u", "base", ...)."""

        def load(
            param: Tensor,
            loaded_weight: Tensor,
            weight_name: str,
            shard_id: str,
            expert_id: int,
            return_success: bool = False,
        ) -> bool | None:
            stored = self.load(param.data, loaded_weight, kind, SHARD_ROLES[shard_id], expert_id)
            return stored if return_success else None

        # Llama-4's and others' own loaders ask for this before they pass the expert's number.
        load.supports_moe_loading = True  # type: ignore[attr-defined]
        return load

    def load(self, param: Tensor, tensor: Tensor, kind: str, role: Role, expert: int) -> bool:
        """Copy this rank's part of one checkpoint tensor into its parameter.

        Returns False where nothing of it belongs on this rank. Raises CheckpointError, naming the tensor,
        for a wrong shape and for columns that break the format.
        """
        self._check(tensor, kind, role, expert)
        if kind in SHARED_KINDS:
            self._load_shared(param, tensor, kind, role)
        elif kind == "delta_u" and self.config.layers[self.layer][role].distinct_u:
            self._load_factor(param[expert], tensor, kind, role)
        elif expert not in self.places:
            return False
        else:
            self._load_factor(param[self.places[expert]], tensor, kind, role)
        self.loaded.add(self._name(kind, role, expert))
        return True

    def missing(self) -> list[str]:
        """Checkpoint names of this rank's tensors that have not been loaded, in checkpoint order."""
        elsewhere = {
            self._name(kind, role, expert)
            for role in ROLES
            for expert in range(self.config.num_experts)
            if expert not in self.places
            for kind in OWN_KINDS
            if not (kind == "delta_u" and self.config.layers[self.layer][role].distinct_u)
        }
        expected = [name for role in self.config.projections for name in self.specs[role]]
        return [name for name in expected if name not in self.loaded and name not in elsewhere]

    def _load_shared(self, param: Tensor, tensor: Tensor, kind: str, role: Role) -> None:
        if kind == "base_norms" and not bool((tensor.isfinite() & (tensor >= 0)).all()):
            raise CheckpointError(
                f"layer {self.layer}: {role}.base_norms has values that are no norms; copy the checkpoint again"
            )
        if kind in JOINT_KINDS and role != "down":
            self._load_joint(param, tensor, kind, role)
        elif kind == "u_index":
            param.copy_(tensor[self.experts])
        elif kind == "base_columns":
            param.copy_(self._inputs(tensor) - self.tp_rank * self.intermediate_size)
        elif kind == "base_norms":
            param.copy_(self._inputs(tensor))
        elif kind != "base":
            self._load_factor(param, tensor, kind, role)
        elif role == "down":
            param.copy_(self._inputs(tensor).t())
        else:
            start = 0 if role == "gate" else self.intermediate_size
            param[:, start : start + self.intermediate_size].copy_(self._outputs(tensor).t())

    def _load_factor(self, param: Tensor, tensor: Tensor, kind: str, role: Role) -> None:
        """param: [outputs, k] for a U, [k, inputs] for a V, int [k] for a delta's columns, [m, k, inputs] for bases,
        [2 m] for alphas, [outputs, inputs] for a whole matrix."""
        layer = self.config.layers[self.layer]
        is_u = kind in ("delta_u", "base_u", "a")
        if role == "down":
            # A U belongs to every rank, unless its columns are inputs themselves.
            sliced = not is_u or (kind == "delta_u" and layer.down.delta == "columns")
            own = self._inputs(tensor) if sliced else tensor
            param.copy_(own - self.tp_rank * self.intermediate_size if kind == "delta_columns" else own)
            return
        rank = layer.gate.base_rank if kind in ("base_u", "base_v") else layer.gate.rank
        rank = layer.gate.bases if kind == "alpha" else rank
        part = slice(0, rank) if role == "gate" else slice(rank, None)
        if kind == "bases":
            param[:, part].copy_(tensor)
        elif is_u:
            param[:, part].copy_(self._outputs(tensor))
        else:
            param[part].copy_(tensor)

    def _load_joint(self, param: Tensor, tensor: Tensor, kind: str, role: Role) -> None:
        """What gate and up share: both have to arrive, where both store it."""
        self._arrived[kind, role] = tensor
        both: tuple[Role, Role] = ("gate", "up")
        stored = [r for r in both if self._name(kind, r, 0) in self.specs[r]]
        if any((kind, r) not in self._arrived for r in stored):
            return
        tensors = [self._arrived.pop((kind, r)) for r in stored]
        if kind == "base_norms":
            param.copy_((tensors[0].float().square() + tensors[1].float().square()).sqrt())
        elif torch.equal(tensors[0], tensors[-1]):
            param.copy_(tensor[self.experts] if kind == "u_index" else tensor)
        else:
            raise CheckpointError(differ_message(*(self._name(kind, r, 0) for r in both)))

    def _outputs(self, tensor: Tensor) -> Tensor:
        """This rank's output rows."""
        size = tensor.shape[0] // self.tp_size
        return tensor.narrow(0, self.tp_rank * size, size)

    def _inputs(self, tensor: Tensor) -> Tensor:
        """This rank's input columns (the last dimension)."""
        size = tensor.shape[-1] // self.tp_size
        return tensor.narrow(-1, self.tp_rank * size, size)

    def _name(self, kind: str, role: Role, expert: int) -> str:
        return self.config.tensor_name(self.layer, expert, role, kind)

    def _check(self, tensor: Tensor, kind: str, role: Role, expert: int) -> None:
        name = self._name(kind, role, expert)
        spec = self.specs[role].get(name)
        if spec is None:
            raise CheckpointError(f"{name} does not belong in this checkpoint; its config.json lists no such tensor")
        if tuple(tensor.shape) != spec.shape:
            raise CheckpointError(f"{name} is {list(tensor.shape)}, expected {list(spec.shape)}; copy it again")
        if kind in ("base_columns", "delta_columns"):
            check_columns(name, tensor.tolist(), self.config, role)
        if kind == "u_index":
            check_u_index(name, tensor.tolist(), self.config, self.layer, role)


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
