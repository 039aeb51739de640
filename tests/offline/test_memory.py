"""Memory that was freed goes back to the system, where the C library would keep it."""

from __future__ import annotations

import sys

import pytest

from offline.io import memory

SMALL = 100_000
"""Bytes: glibc takes so small pieces from its heap, and a heap shrinks from its end alone."""


def _held() -> int:
    line = next(line for line in memory.STATUS.read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's heap")
def test_what_was_freed_below_what_is_held_goes_back() -> None:
    if memory._malloc_trim() is None:
        pytest.skip("the C library is not glibc")
    pieces = [bytearray(SMALL) for _ in range(2000)]
    last = pieces[-1]
    pieces.clear()
    before = _held()
    memory.give_back()
    assert before - _held() > 0.8 * 2000 * SMALL
    assert len(last) == SMALL


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: object())
    memory._malloc_trim.cache_clear()
    try:
        assert memory._malloc_trim() is None
        memory.give_back()
    finally:
        memory._malloc_trim.cache_clear()
