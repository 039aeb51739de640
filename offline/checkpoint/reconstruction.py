"""What a compressed checkpoint stands for: the dense weight of one expert, rebuilt from base and delta.

The only place where this is written: `export`, `verify` and `inspect --analyses` use it. One matrix at a time; what
the experts of one layer share is kept until another layer is asked for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from d2moe_vllm.format.config import CheckpointConfig
from d2moe_vllm.format.kinds import SCALES, STORAGES, Role, Stored
from d2moe_vllm.ops.packing import Packing, from_bits, unpacked
from offline.algebra.mixing import mix
from offline.io.shards import Reader


class Reconstruction:
    """Dense expert weights of the layers that a checkpoint's configuration lists.

    reader: of a folder that has passed `check_checkpoint`. dtype: in which to compute, float32 or float64.
    All methods raise CheckpointError for stored values that are not finite, and KeyError for a layer that is not
    compressed.
    """

    def __init__(self, reader: Reader, config: CheckpointConfig, dtype: torch.dtype = torch.float32) -> None:
        self._reader, self._config, self._dtype = reader, config, dtype
        self._layer: int | None = None
        self._shared: dict[Role, dict[str, Tensor]] = {}
        self._kept: dict[int | None, Tensor] = {}
        self._stored: dict[str, Stored] = {}

    def weight(self, layer: int, expert: int, role: Role) -> Tensor:
        """W = base + delta, [out, in], zero at channels that the expert does not keep."""
        base, delta = self.base(layer, role), self.delta(layer, expert, role)
        if base is None:
            return torch.zeros(self._config.shape(role), dtype=self._dtype) if delta is None else delta
        weight = base.clone() if delta is None else delta.add_(base)
        if (kept := self._channels(layer, expert)) is not None:
            weight.masked_fill_(~(kept if role == "down" else kept[:, None]), 0)
        return weight

    def bias(self, layer: int, expert: int, role: Role) -> Tensor | None:
        """[out], zero at channels that the expert does not keep; None where experts have none."""
        if not self._config.layers[layer][role].bias:
            return None
        stored = self.numbers(layer, expert, role, "bias")
        kept = self._channels(layer, expert) if role != "down" else None
        return stored if kept is None else torch.zeros(len(kept), dtype=self._dtype).masked_scatter_(kept, stored)

    def base(self, layer: int, role: Role) -> Tensor | None:
        """The shared base [out, in], zero at columns and channels that are pruned; None where there is none. Not to be
        changed."""
        return self._load_shared(layer, role).get("full_base")

    def delta(self, layer: int, expert: int, role: Role) -> Tensor | None:
        """What is added to the base for one expert, [out, in]; None where nothing is (rank 0, or trimmed)."""
        projection = self._config.layers[layer][role]
        if expert in self._config.layers[layer].trimmed:
            return None
        if projection.delta == "dense":
            return self._spread(self.numbers(layer, expert, role, "dense"), self._channels(layer, expert), role)
        if not projection.rank:
            return None
        shared = self._load_shared(layer, role)
        if projection.function:
            a, alpha = (self.numbers(layer, expert, role, kind) for kind in ("a", "alpha"))
            return a @ mix(shared["bases"], alpha, projection.function)
        left = self.numbers(layer, int(shared["u_index"][expert]) if "u_index" in shared else expert, role, "delta_u")
        if projection.delta == "columns":
            columns = self.numbers(layer, expert, role, "delta_columns")
            return self._scatter(left, columns, role)
        right = shared["shared_v"] if "shared_v" in shared else self.numbers(layer, expert, role, "delta_v")
        return self._spread(left @ right, self._channels(layer, expert), role)

    def _load_shared(self, layer: int, role: Role) -> dict[str, Tensor]:
        """What all experts of one projection share: full_base, shared_v, bases, u_index, each where there is one.

        In float32 that is one expert's weights for the layer's bases, as much again at most for shared V's.
        """
        self._enter(layer)
        if role not in self._shared:
            projection = self._config.layers[layer][role]
            shared: dict[str, Tensor] = {}
            if projection.full_base:
                base = self.numbers(layer, 0, role, "base")
                shared["full_base"] = self._spread(base, self._channels(layer, None), role)
            elif projection.kept_columns:
                base, columns = (self.numbers(layer, 0, role, kind) for kind in ("base", "base_columns"))
                whole = self._scatter(base, columns, role, len(base))
                shared["full_base"] = self._spread(whole, self._channels(layer, None), role)
            elif projection.base_rank:
                left, right = (self.numbers(layer, 0, role, kind) for kind in ("base_u", "base_v"))
                shared["full_base"] = left @ right
            if projection.rank and projection.shared_v:
                shared["shared_v"] = self.numbers(layer, 0, role, "shared_v")
            if projection.bases:
                shared["bases"] = self.numbers(layer, 0, role, "bases")
            if projection.shares_u:
                shared["u_index"] = self.numbers(layer, 0, role, "u_index")
            self._shared[role] = shared
        return self._shared[role]

    def _enter(self, layer: int) -> None:
        """Forgets what another layer's experts share."""
        if layer != self._layer:
            self._layer, self._shared, self._kept, self._stored = layer, {}, {}, self._config.stored(layer)

    def _channels(self, layer: int, expert: int | None) -> Tensor | None:
        """Which intermediate channels an expert keeps, or the base, bool [I]; None where all are kept."""
        if self._config.layers[layer].channels is None:
            return None
        self._enter(layer)
        if expert not in self._kept:
            name = "base_channels" if expert is None else "channels"
            bits = self._reader.tensor(self._config.tensor_name(layer, expert or 0, "down", name))
            self._kept[expert] = from_bits(bits, self._config.intermediate_size)
        return self._kept[expert]

    def _spread(self, values: Tensor, kept: Tensor | None, role: Role) -> Tensor:
        """Values [n, in], or for down [out, n], at the channels that are kept, zero at the others: [out, in]."""
        if kept is None:
            return values
        full = torch.zeros(self._config.shape(role), dtype=self._dtype)
        full[(slice(None), kept) if role == "down" else kept] = values
        return full

    def _scatter(self, values: Tensor, columns: Tensor, role: Role, rows: int | None = None) -> Tensor:
        """values [out, k] at these columns of [out, in], zero elsewhere; rows: instead of out."""
        full = torch.zeros(rows or len(values), self._config.shape(role)[1], dtype=self._dtype)
        full[:, columns] = values
        return full

    def numbers(self, layer: int, expert: int, role: Role, name: str) -> Tensor:
        """A tensor as numbers to compute with; of a packed one what it stands for."""
        full = self._config.tensor_name(layer, expert, role, name)
        self._enter(layer)
        one, projection = self._stored[full], self._config.layers[layer][role]
        tensor = self._reader.finite(full)
        if (storage := one.kind.packed(projection)) is not None:
            stored, owner = STORAGES[storage.type], None if one.kind.owner == "layer" else expert
            inputs = self._config.sizes.size_of(one.kind.sizes[-1], role, self._config.layers[layer], owner)
            how = Packing(stored.bits, stored.zero, storage.group_size)
            tensor = unpacked(tensor, self._reader.finite(full + SCALES), how, inputs)
        return tensor.to(self._dtype) if tensor.is_floating_point() else tensor.long()
