"""Checkpoint tensors -> this rank's parameters of one MoE layer; refuses what does not fit or is not complete.

What a rank has of what, says parameters.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from d2moe_vllm.format.config import CheckpointConfig, CheckpointError
from d2moe_vllm.format.files import check_index
from d2moe_vllm.format.kinds import Role, Stored, differ_message, is_cut
from d2moe_vllm.ops.packing import from_bits, pack, row_sizes, to_bits, unpack
from d2moe_vllm.serving.parameters import Share, local_experts, packing

SHARD_ROLES: dict[str, Role] = {"w1": "gate", "w3": "up", "w2": "down"}
"""vLLM's shard ids; without a gate up is its "w1"."""


class LayerLoader(Share):
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
        experts = local_experts(num_local_experts, config.num_experts, local_expert)
        super().__init__(config, layer, experts, tp_rank, tp_size)
        self.stored = config.stored(layer)
        self.loaded: set[str] = set()
        self._arrived: dict[tuple[str, Role], Tensor] = {}
        self._masks: dict[int | None, Tensor] = {}
        self._channels: Tensor | None = None
        self._flat: dict[tuple[str, str], dict[int, tuple[int, list[int]]]] = {}

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
            role = SHARD_ROLES[shard_id]
            role = role if role in self.config.projections else "up"
            stored = self.load(param.data, loaded_weight, name, role, expert_id)
            return stored if return_success else None

        # Llama-4's and others' own loaders ask for this before they pass the expert's number.
        load.supports_moe_loading = True  # type: ignore[attr-defined]
        return load

    def load(self, param: Tensor, tensor: Tensor, name: str, role: Role, expert: int) -> bool:
        """Copy this rank's part of one checkpoint tensor into its parameter.

        Returns False where nothing of it belongs on this rank. Raises CheckpointError, naming the tensor,
        for a wrong shape and for columns that break the format.
        """
        full = self.config.tensor_name(self.number, expert, role, name)
        one = self._checked(full, tensor)
        if not self._belongs(one):
            return False
        self.loaded.add(full)
        kind = one.kind
        if kind.content == "mask":
            self._load_mask(param, tensor, one)
            return True
        part = self._part(tensor, one)
        if role != "down" and kind.joined is None and not self.varies(kind, role):
            self._load_joint(self._own(param, one), part, one)
            return True
        self._place(param, one).copy_(part.mT if self._input_major(one) else part)
        return True

    def _own(self, param: Tensor, one: Stored) -> Tensor:
        """The part of a parameter that is of the tensor's owner, gate's and up's together."""
        if one.kind.owner == "layer" or one.kind.content == "slots":
            return param
        if not self.varies(one.kind, one.role):
            return param[one.expert if self.slots(one.kind, one.role) else self.owning(one.kind)[one.expert]]
        half = "w2" if one.role == "down" else "w13"
        if (half, one.name) not in self._flat:
            self._flat[half, one.name] = self._flat_places(half, one)
        begin, shape = self._flat[half, one.name][one.expert]
        return param[begin : begin + math.prod(shape)].view(shape)

    def _flat_places(self, half: str, one: Stored) -> dict[int, tuple[int, list[int]]]:
        """Where in a flat parameter each expert's matrix begins, and its shape."""
        how, suffix = packing(one.kind.storage(self.layer[one.role])), one.name.removeprefix(one.kind.name)
        found, begin = {}, 0
        for expert in self.owning(one.kind):
            shape = self._shapes(one.kind, self.half(half), expert, how)[suffix]
            found[expert] = begin, shape
            begin += math.prod(shape)
        return found

    def _place(self, param: Tensor, one: Stored) -> Tensor:
        """The part of a parameter that is of the tensor: what lies side by side is gate's first, then up's."""
        param, kind = self._own(param, one), one.kind
        if one.role == "down" or kind.axis is None:
            return param
        axis, last = kind.axis, len(kind.sizes) - 1
        size = self.size(kind.sizes[axis], one.role, self._owner(one))
        if axis == last and (how := packing(kind.storage(self.layer[one.role]))) is not None:
            size = row_sizes(how, (size,))[one.is_scales]
        axis = last - axis if self._input_major(one) else axis
        return param.narrow(axis, 0 if one.role == "gate" else param.shape[axis] - size, size)

    def _owner(self, one: Stored) -> int | None:
        return None if one.kind.owner == "layer" else one.expert

    def _input_major(self, one: Stored) -> bool:
        return one.kind.input_major and packing(one.kind.storage(self.layer[one.role])) is None

    def _load_mask(self, param: Tensor, tensor: Tensor, one: Stored) -> None:
        """Which of the base's channels an expert has: both have to arrive."""
        every, owner = self.config.intermediate_size, self._owner(one)
        own = every // self.tp_size
        self._masks[owner] = from_bits(tensor, every)[self.tp_rank * own : (self.tp_rank + 1) * own]
        if owner is not None:
            self._channels = param
        base, channels = self._masks.get(None), self._channels
        if base is None or channels is None:
            return
        for expert in [expert for expert in self._masks if expert is not None]:
            channels[self.experts.index(expert)] = to_bits(self._masks.pop(expert)[base])

    def missing(self) -> list[str]:
        """Checkpoint names of this rank's tensors that have not been loaded, in checkpoint order."""
        return [name for name, one in self.stored.items() if name not in self.loaded and self._belongs(one)]

    def _belongs(self, one: Stored) -> bool:
        """Whether anything of a tensor is this rank's: what experts share is, wherever the expert it rides with is."""
        if one.kind.owner == "layer" or self.slots(one.kind, one.role):
            return True
        return one.expert in (self.experts if one.kind.owner == "every" else self.places)

    def _part(self, tensor: Tensor, one: Stored) -> Tensor:
        """What a rank has of a tensor; numbers of inputs are counted from its own first one."""
        if one.kind.content == "slots":
            return tensor[self.experts]
        if one.kind.name == "bias" and one.role == "down" and self.tp_rank:
            return torch.zeros_like(tensor)  # what ranks give is added up
        last = len(one.kind.sizes) - 1
        for axis, size in enumerate(one.kind.sizes):
            if not is_cut(one.role, size) or (self.tp_size == 1):
                continue
            first, own = self.span(size, one.role, self._owner(one))
            how = packing(one.kind.storage(self.layer[one.role]))
            if how is None or axis < last:
                tensor = tensor.narrow(axis, first, own)
            elif one.is_scales:
                tensor = tensor.narrow(axis, first // how.group_size, how.row_groups(own, first))
            else:
                whole = self.config.sizes.size_of(size, one.role, self.layer, self._owner(one))
                tensor = pack(unpack(tensor, how.bits, whole)[..., first : first + own], how.bits)
        if one.kind.content == "inputs" and is_cut(one.role, "in"):
            return tensor - self.tp_rank * (self.config.intermediate_size // self.tp_size)
        return tensor

    def _load_joint(self, param: Tensor, part: Tensor, one: Stored) -> None:
        """What gate and up have one of: both have to arrive, where both store it."""
        self._arrived[one.name, one.role] = part
        names = {role: self.config.tensor_name(self.number, 0, role, one.name) for role in self.half("w13")}
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
            check_index(name, tensor.tolist(), self.config, self.number, one)
        if (one.kind.content == "norms" or one.is_scales) and not bool((tensor.isfinite() & (tensor >= 0)).all()):
            what = "scales" if one.is_scales else "norms"
            raise CheckpointError(
                f"layer {self.number}: {one.role}.{one.name} has values that are no {what}; copy the checkpoint again"
            )
        return one
