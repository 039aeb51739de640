"""The exceptions that mean that the user's input is at fault; and any failure in one line."""

from __future__ import annotations

import re

from d2moe_vllm.format.config import CheckpointError


class InputError(Exception):
    """One line that says what is wrong and how to mend it; the command prints it and exits with 2."""


class UnreachableError(InputError):
    """A ratio that a method cannot reach; most: the highest stored ratio that it can."""

    def __init__(self, message: str, most: float) -> None:
        super().__init__(message)
        self.most = most


class PeerError(RuntimeError):
    """Another process of this run has ended, so this one cannot go on; the message is one line."""


def reason(error: BaseException) -> str:
    """One line that says what went wrong. Memory that ran out says so, whoever asked for it."""
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or re.search(r"out of memory|can't allocate memory", text, re.IGNORECASE):
        return f"out of memory ({text[:200] or type(error).__name__}); choose a lower --memory or --seq-len"
    kind = "" if isinstance(error, InputError | CheckpointError) else f"{type(error).__name__}: "
    return f"{kind}{text}"[:500]
