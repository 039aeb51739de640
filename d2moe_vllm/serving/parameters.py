"""What one rank has of one MoE layer: sizes and spans, its parameters in ops.weights.Weights' layout, its LayerSpec.

Knows neither vLLM nor any backend: a rank is (tensor-parallel rank and size, which experts are local). What there is,
how large it is, what a rank has of it and how gate and up lie side by side, says the table of kinds.

Tensor-parallel slices need no collective of their own (the layer's all-reduce adds up): ranks share out whatever
counts intermediate channels, which are outputs of gate and up and inputs of down, and replicate all else. Columns of
a base or delta are spread evenly over `groups` slices of the input, so a rank's are one contiguous run; so are the
channels that an expert keeps, of which config.json says how many are in each slice.
Under expert parallelism a rank has what its own experts have; what experts share is on every rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from d2moe_vllm.format.config import CheckpointConfig, CheckpointError, Layer, Storage
from d2moe_vllm.format.kinds import HALVES, KINDS, SCALES, STORAGES, Kind, Role, halves_of, is_cut
from d2moe_vllm.ops.packing import Packing, row_sizes, to_bits
from d2moe_vllm.ops.weights import HalfSpec, LayerSpec


def packing(storage: Storage | None) -> Packing | None:
    """How matrices in a storage are packed, None where they are not."""
    if storage is None or not (stored := STORAGES[storage.type]).bits:
        return None
    return Packing(stored.bits, stored.zero, storage.group_size)


@dataclass
class Share:
    """A rank's share of a layer. experts: this rank's by global number, in the order of their own index here, -1 for
    none. Raises CheckpointError, in one line, where groups or sizes do not divide by tp_size.

    places: where in the parameters the deltas of those that have any lie.
    """

    config: CheckpointConfig
    number: int
    experts: Sequence[int]
    tp_rank: int = 0
    tp_size: int = 1
    places: dict[int, int] = field(init=False)

    def __post_init__(self) -> None:
        groups = self.config.pruning.groups
        if groups % self.tp_size or self.config.intermediate_size % self.tp_size:
            raise CheckpointError(
                f"tensor-parallel size {self.tp_size} does not divide this checkpoint's {groups} column groups and "
                f"{self.config.intermediate_size} intermediate channels; use a size that divides both"
            )
        untrimmed = set(self.config.untrimmed(self.number))
        self.places = {e: place for place, e in enumerate(e for e in self.experts if e in untrimmed)}

    @property
    def layer(self) -> Layer:
        return self.config.layers[self.number]

    @property
    def ragged(self) -> bool:
        return self.layer.channels is not None

    def counts(self, expert: int | None) -> tuple[int, ...]:
        """Channels in each slice of them that an expert keeps, or, for None, the base."""
        channels, groups = self.layer.channels, self.config.pruning.groups
        if channels is None:
            return (self.config.intermediate_size // groups,) * groups
        return channels.experts[expert] if expert is not None else channels.base or (0,) * groups

    def span(self, size: str, role: Role, expert: int | None = None) -> tuple[int, int]:
        """Where in a whole dimension of a tensor this rank's part begins, and how much it is; expert: whose it is."""
        whole = self.config.sizes.size_of(size, role, self.layer, expert)
        if not is_cut(role, size):
            return 0, whole
        if size in ("out", "in"):
            counts, own = self.counts(expert), self.config.pruning.groups // self.tp_size
            before = self.tp_rank * own
            return sum(counts[:before]), sum(counts[before : before + own])
        return self.tp_rank * (whole // self.tp_size), whole // self.tp_size

    def size(self, size: str, role: Role, expert: int | None = None) -> int:
        return self.span(size, role, expert)[1]

    def varies(self, kind: Kind, role: Role) -> bool:
        """Whether a kind's tensors are of another size with every expert."""
        cut = any(size in ("out", "in") and is_cut(role, size) for size in kind.sizes)
        return self.ragged and kind.owner != "layer" and cut

    def owning(self, kind: Kind) -> dict[int, int]:
        """Where in a kind's parameters each expert's own lies, of those that have one."""
        if kind.owner == "every":
            return {expert: place for place, expert in enumerate(self.experts) if expert >= 0}
        return self.places

    def slots(self, kind: Kind, role: Role) -> int:
        """How many of a kind experts share, which are on every rank; 0 where each expert has its own."""
        return self.layer[role].distinct_u if kind.owner == "slot" else 0

    def half(self, name: str) -> tuple[Role, ...]:
        """The projections of "w13" or "w2" that experts have."""
        return halves_of(self.config.projections)[name]

    # Parameters

    def empty_parameters(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Uninitialised parameters by name, in the layout of ops.weights.Weights, on the default device.

        dtype: of whatever has no storage of its own. Columns, norms and channels get valid values, because
        `--load-format dummy` leaves integers as they are.
        """
        parameters: dict[str, Tensor] = {}
        for half in HALVES:
            roles = self.half(half)
            for kind in KINDS:
                if any(kind.present(self.layer, role) for role in roles):
                    found = self._empty(kind, roles, dtype)
                    parameters |= {f"{half}_{kind.name}{suffix}": tensor for suffix, tensor in found.items()}
            parameters |= {f"{half}_{name}": index for name, index in self._indices(roles[0]).items()}
            parameters |= {f"{half}_{name}": made for name, made in self._columns_of_full_base(roles[0]).items()}
        return parameters

    def _empty(self, kind: Kind, roles: tuple[Role, ...], dtype: torch.dtype) -> dict[str, Tensor]:
        """A kind's parameters: gate's and up's side by side, one entry for each owner that is here."""
        if kind.content == "mask":
            return {"": self._empty_mask(kind)}
        lead = () if kind.owner == "layer" else (self.slots(kind, roles[0]) or self._count(kind),)
        each = roles if kind.joined else roles[:1]
        if kind.content == "inputs":
            columns = torch.cat([self._spread(role, self.size(kind.sizes[0], role)) for role in each])
            return {"": columns.repeat(*lead, 1) if lead else columns}
        if kind.content == "slots":
            return {"": torch.zeros(len(self.experts), dtype=torch.int32)}
        how = packing(kind.storage(self.layer[roles[0]]))
        if not self.varies(kind, roles[0]):
            return self._allocated(kind, roles[0], lead, self._shapes(kind, roles, None, how), dtype)
        shapes = [self._shapes(kind, roles, expert, how) for expert in self.owning(kind)]
        names = ("", SCALES) if how else ("",)
        flat = {name: [sum(math.prod(shape[name]) for shape in shapes)] for name in names}
        return self._allocated(kind, roles[0], (), flat, dtype)

    def _count(self, kind: Kind) -> int:
        return len(self.experts if kind.owner == "every" else self.places)

    def _shapes(
        self, kind: Kind, roles: tuple[Role, ...], expert: int | None, how: Packing | None
    ) -> dict[str, list[int]]:
        """Of one owner's matrix of gate and up together, or of down, and of its scales."""
        own = None if kind.owner == "layer" else expert if expert is not None else next(iter(self.places), 0)
        each = [[self.span(size, role, own) for size in kind.sizes] for role in roles]
        joined = kind.axis
        shape = [sum(one[a][1] for one in (each if a == joined else each[:1])) for a in range(len(kind.sizes))]
        if how is None:
            if kind.input_major:
                shape[-2:] = shape[:-3:-1]
            return {"": shape}
        across = each if joined == len(kind.sizes) - 1 else each[:1]
        row, groups = row_sizes(how, [one[-1][1] for one in across], each[0][-1][0])
        return {"": [*shape[:-1], row], SCALES: [*shape[:-1], groups]}

    def _allocated(
        self, kind: Kind, role: Role, lead: tuple[int, ...], shapes: dict[str, list[int]], dtype: torch.dtype
    ) -> dict[str, Tensor]:
        if kind.content == "norms":
            return {"": torch.ones(shapes[""], dtype=torch.float32)}
        if SCALES in shapes:
            types = {"": torch.uint8, SCALES: torch.bfloat16}
            return {name: torch.zeros(*lead, *shape, dtype=types[name]) for name, shape in shapes.items()}
        storage = kind.storage(self.layer[role])
        dtype = dtype if storage is None else getattr(torch, storage.type)
        return {"": torch.empty(*lead, *shapes[""], dtype=dtype)}

    def _empty_mask(self, kind: Kind) -> Tensor:
        """An expert's channels among those of the base; without one nobody asks which they are."""
        if kind.owner == "layer" or self.layer.channels is None or self.layer.channels.base is None:
            return torch.empty(0, dtype=torch.uint8)
        bits = torch.zeros(len(self.experts), self.size("in", "down"), dtype=torch.bool)
        for place, expert in enumerate(self.experts):
            bits[place, : self.size("in", "down", expert)] = expert >= 0
        return to_bits(bits)

    def _columns_of_full_base(self, role: Role) -> dict[str, Tensor]:
        """What kernels ask of any base that they know: of one with all columns, all of them, and no choice of them."""
        if not self.layer[role].full_base or self.ragged or self.layer[role].base_storage is not None:
            return {}
        inputs = self.size("in", role)
        columns = torch.arange(inputs, dtype=torch.int32)
        return {"base_columns": columns, "base_norms": torch.ones(inputs, dtype=torch.float32)}

    def _indices(self, role: Role) -> dict[str, Tensor]:
        """Where each local expert's U and V lie, -1 for none, where that is not simply its own number."""
        projection, trimmed = self.layer[role], self.layer.trimmed
        stored = projection.delta == "dense" or (projection.delta in ("factors", "columns") and projection.rank)
        if not stored or not trimmed or self.ragged:
            return {}
        own = torch.tensor([self.places.get(expert, -1) for expert in self.experts], dtype=torch.int32)
        found = {} if projection.distinct_u else {"u_index": own}
        return found if projection.shared_v or projection.delta == "dense" else {**found, "v_index": own.clone()}

    def _spread(self, role: Role, kept: int) -> Tensor:
        """The first columns of every group that is this rank's."""
        inputs, groups = self.size("in", role), self.config.pruning.groups
        groups //= self.tp_size if is_cut(role, "in") else 1
        within = torch.arange(kept // groups, dtype=torch.int32)
        starts = torch.arange(groups, dtype=torch.int32) * (inputs // groups)
        return (starts.unsqueeze(1) + within).flatten()

    # What backends are told

    def spec(
        self,
        scope: str,
        *,
        activation: str,
        prune_down: bool,
        batch_invariant: bool = False,
        static_shapes: bool = False,
    ) -> LayerSpec:
        """What backends are told of the layer.

        prune_down False: use all kept columns of down (expert parallelism, METHODS 1.5).
        """
        widths: tuple[int, ...] = ()
        skipped: tuple[int, ...] = ()
        if self.ragged:
            spans = [(0, 0) if expert < 0 else self.span("in", "down", expert) for expert in self.experts]
            skipped, widths = (tuple(part) for part in zip(*spans, strict=True))
        has_base = not self.ragged or (self.layer.channels is not None and self.layer.channels.base is not None)
        local = [place for place, expert in enumerate(self.experts) if expert not in self.places]
        return LayerSpec(
            num_experts=len(self.experts),
            intermediate_size=self.size("in", "down") if has_base else 0,
            w13=self._half(self.half("w13"), prune=True),
            w2=self._half(self.half("w2"), prune=prune_down),
            activation=activation,
            scope=scope,
            function=self.layer.up.function or "",
            batch_invariant=batch_invariant,
            static_shapes=static_shapes,
            widths=widths,
            skipped=skipped,
            without=tuple(local) if self.ragged else (),
            swiglu=self.config.gating,
        )

    def _half(self, roles: tuple[Role, ...], *, prune: bool) -> HalfSpec:
        own, down = [self.layer[role] for role in roles], roles == ("down",)
        first = own[0]
        used = first.used_columns if prune else first.kept_columns
        used = self.size("in", roles[0]) if first.full_base else used // (self.tp_size if down else 1)
        # A delta's columns are shared out like the inputs that they name.
        columns = down and first.delta == "columns"
        return HalfSpec(
            ranks=tuple(one.rank // (self.tp_size if columns else 1) for one in own),
            base_ranks=tuple(one.base_rank for one in own),
            groups=self.config.pruning.groups // (self.tp_size if down else 1),
            used=used,
            base=packing(first.base_storage),
            delta=packing(first.delta_storage),
            base_first=self.span("kept" if first.kept_columns else "in", roles[0])[0],
            delta_first=self.span("columns" if columns else "in", roles[0])[0],
        )


def local_experts(num_local: int, num_experts: int, local_expert: Callable[[int], int]) -> list[int]:
    """This rank's experts by global number, in the order of their own index here, -1 for none; local_expert: global
    number -> this rank's index, -1 if the expert lives elsewhere."""
    experts = [-1] * num_local
    for expert in range(num_experts):
        if (local := local_expert(expert)) >= 0:
            experts[local] = expert
    return experts
