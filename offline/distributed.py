"""Several processes under torchrun: calibration windows and experts are shared out, files are common.

Every process runs the same program. What must be done once is done by the first; what all need is in the
working folder, which has to be one folder for all of them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Group:
    """rank of size processes; local_size of them on this machine, which share its memory."""

    rank: int = 0
    size: int = 1
    local_size: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def own(self, items: Sequence[int]) -> list[int]:
        """This process's share: every size-th item."""
        return list(items[self.rank :: self.size])

    def barrier(self) -> None:
        if self.size > 1:
            import torch.distributed as dist

            dist.barrier()

    def sum(self, tensors: Iterable[Tensor]) -> None:
        """Adds each tensor up over all processes, in place."""
        if self.size > 1:
            import torch.distributed as dist

            for tensor in tensors:
                dist.all_reduce(tensor)


def join() -> Group:
    """The process group that torchrun describes, or a group of one."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return Group()
    import torch
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    return Group(dist.get_rank(), size, int(os.environ.get("LOCAL_WORLD_SIZE", size)))


def is_first() -> bool:
    """Whether this process is the one that talks to the user; needs no group."""
    return os.environ.get("RANK", "0") == "0"
