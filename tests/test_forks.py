"""Processes that tests fork their code from: one that ran out of its time must not answer for those behind it."""

from __future__ import annotations

import signal

import forks
import pytest


def _too_long(*_: object) -> None:
    raise TimeoutError


def test_a_job_that_ran_out_of_time_leaves_nothing_to_the_next() -> None:
    """As pytest-timeout ends a test: by an exception out of a signal."""
    imports = ("json",)
    assert forks.python("print(1)", imports=imports).stdout == "1\n"
    before, timer = signal.signal(signal.SIGALRM, _too_long), signal.getitimer(signal.ITIMER_REAL)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        with pytest.raises(TimeoutError):
            forks.python("import time; time.sleep(600)", imports=imports)
    finally:
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *timer)  # pytest-timeout's own
    for number in (2, 3):
        done = forks.python(f"print({number}); raise SystemExit({number})", imports=imports)
        assert (done.returncode, done.stdout) == (number, f"{number}\n")
