"""What a compressed checkpoint stands for: the dense weight of one expert, rebuilt from base and delta.

The only place where this is written: `export`, `verify` and `inspect --analyses` use it. One matrix at a time; what
the experts of one layer share is kept until another layer is asked for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from d2moe_vllm.format.config import CheckpointConfig
from d2moe_vllm.format.kinds import Role
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

    def weight(self, layer: int, expert: int, role: Role) -> Tensor:
        """W = base + delta, [out, in]."""
        base, delta = self.base(layer, role), self.delta(layer, expert, role)
        if base is None:
            return torch.zeros(self._config.shape(role), dtype=self._dtype) if delta is None else delta
        return base.clone() if delta is None else delta.add_(base)

    def base(self, layer: int, role: Role) -> Tensor | None:
        """The shared base [out, in], its pruned columns zero; None where there is none. Not to be changed."""
        return self._load_shared(layer, role).get("full_base")

    def delta(self, layer: int, expert: int, role: Role) -> Tensor | None:
        """What is added to the base for one expert, [out, in]; None where nothing is (rank 0, or trimmed)."""
        projection = self._config.layers[layer][role]
        if projection.delta == "dense":
            return self._tensor(layer, expert, role, "dense")
        if not projection.rank or expert in self._config.layers[layer].trimmed:
            return None
        shared = self._load_shared(layer, role)
        if projection.function:
            a, alpha = (self._tensor(layer, expert, role, kind) for kind in ("a", "alpha"))
            return a @ mix(shared["bases"], alpha, projection.function)
        left = self._tensor(layer, int(shared["u_index"][expert]) if "u_index" in shared else expert, role, "delta_u")
        if projection.delta == "columns":
            columns = self._tensor(layer, expert, role, "delta_columns")
            return self._scatter(left, columns, role)
        right = shared["shared_v"] if "shared_v" in shared else self._tensor(layer, expert, role, "delta_v")
        return left @ right

    def _load_shared(self, layer: int, role: Role) -> dict[str, Tensor]:
        """What all experts of one projection share: full_base, shared_v, bases, u_index, each where there is one.

        In float32 that is one expert's weights for the layer's bases, as much again at most for shared V's.
        """
        if layer != self._layer:
            self._layer, self._shared = layer, {}
        if role not in self._shared:
            projection = self._config.layers[layer][role]
            shared: dict[str, Tensor] = {}
            if projection.kept_columns:
                base, columns = (self._tensor(layer, 0, role, kind) for kind in ("base", "base_columns"))
                shared["full_base"] = self._scatter(base, columns, role)
            elif projection.base_rank:
                left, right = (self._tensor(layer, 0, role, kind) for kind in ("base_u", "base_v"))
                shared["full_base"] = left @ right
            if projection.rank and projection.shared_v:
                shared["shared_v"] = self._tensor(layer, 0, role, "shared_v")
            if projection.bases:
                shared["bases"] = self._tensor(layer, 0, role, "bases")
            if projection.shares_u:
                shared["u_index"] = self._tensor(layer, 0, role, "u_index")
            self._shared[role] = shared
        return self._shared[role]

    def _scatter(self, values: Tensor, columns: Tensor, role: Role) -> Tensor:
        """values [out, k] at these columns of [out, in], zero elsewhere."""
        full = torch.zeros(self._config.shape(role), dtype=self._dtype)
        full[:, columns] = values
        return full

    def _tensor(self, layer: int, expert: int, role: Role, kind: str) -> Tensor:
        tensor = self._reader.finite(self._config.tensor_name(layer, expert, role, kind))
        return tensor.to(self._dtype) if tensor.is_floating_point() else tensor.long()
