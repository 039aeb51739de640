"""Several processes under torchrun: calibration windows and experts are shared out, files are common.

Every process runs the same program. What must be done once is done by the first; what all need is in the
working folder, which has to be one folder for all of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

from offline.errors import PeerError

if TYPE_CHECKING:
    from torch import Tensor

PATIENCE = timedelta(days=7)
"""How long processes wait for one another: the first writes the whole checkpoint while the others wait. Of a process
that has ended torchrun and the closed connection tell at once."""
_store: Any = None
"""torchrun's key-value store, once the processes have met."""


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

            _together(dist.barrier)

    def sum(self, tensors: Iterable[Tensor]) -> None:
        """Adds each tensor up over all processes, in place."""
        if self.size > 1:
            import torch.distributed as dist

            for tensor in tensors:
                _together(partial(dist.all_reduce, tensor))


def _together(collective: Callable[[], Any]) -> None:
    """Raises PeerError where another process does not take part any more."""
    import torch

    try:
        collective()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # the one type that gloo and nccl have for a closed connection
        raise PeerError(f"another process of this run has ended ({str(error).splitlines()[0][:200]})") from error


def join() -> Group:
    """The process group that torchrun describes, or a group of one. Raises PeerError."""
    global _store
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return Group()
    import torch
    import torch.distributed as dist

    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        _store, rank, _ = next(dist.rendezvous("env://"))
        _together(lambda: dist.init_process_group(backend, store=_store, rank=rank, world_size=size, timeout=PATIENCE))
    return Group(dist.get_rank(), size, int(os.environ.get("LOCAL_WORLD_SIZE", size)))


def is_first() -> bool:
    """Whether this process is the one that talks to the user; needs no group."""
    return os.environ.get("RANK", "0") == "0"


def speaks() -> bool:
    """Whether this process is the one to tell why the run ends.

    That is the first that asks: often all fail for the same reason, and always the others fail for want of the
    first. Before the processes have met, all see the same input, and one on each machine speaks.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return True
    if _store is None:
        return os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        return _store.add("d2moe/spoken", 1) == 1
    except RuntimeError:  # the store's process has ended too
        return True
