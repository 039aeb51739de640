"""The table of tiers is about tests that exist."""

from __future__ import annotations

import pytest
import tiers


def test_every_pattern_has_a_test(pytestconfig: pytest.Config) -> None:
    nodes = pytestconfig.stash[tiers.EVERY_TEST]
    files = {node.partition("::")[0] for node in nodes}
    here = [pattern for pattern in tiers.unmatched(nodes) if pattern.partition("::")[0] in files]
    assert here == []
    if not pytestconfig.option.file_or_dir:
        assert tiers.unmatched(nodes) == []
