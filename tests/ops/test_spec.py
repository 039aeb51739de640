"""A layer's constants as a text, which is what a compiled graph keeps of them."""

from __future__ import annotations

import json

import pytest

from d2moe_vllm.ops import decoded, encoded
from d2moe_vllm.ops.weights import HalfSpec, LayerSpec

SPEC = LayerSpec(
    8, 1408, HalfSpec((48, 40), (0, 0), 8, 1792), HalfSpec((64,), (3,), 4, 1152), "gelu", "token", "tanh", True
)


def test_nothing_is_lost() -> None:
    """And the same text is the same object: it is parsed once."""
    specs = [SPEC, SPEC._replace(w2=HalfSpec(())), SPEC._replace(batch_invariant=False, static_shapes=True)]
    assert [decoded(encoded(spec)) for spec in specs] == specs
    found = decoded(encoded(SPEC))
    assert (type(found), type(found.w13), type(found.w13.ranks)) == (LayerSpec, HalfSpec, tuple)
    assert decoded(encoded(SPEC)) is found
    assert len({encoded(spec) for spec in specs}) == len({*specs}) == 3


@pytest.mark.parametrize("half", ["w13", "w2"])
def test_the_text_of_another_version_is_refused(half: str) -> None:
    """A field more or less, at any depth, and not only where it has no default."""
    fields = json.loads(encoded(SPEC))
    for wrong in (
        {**fields, "bits": 4},
        {name: value for name, value in fields.items() if name != "function"},
        {**fields, half: {**fields[half], "bits": 4}},
        {**fields, half: {"ranks": fields[half]["ranks"]}},
    ):
        with pytest.raises(KeyError):
            decoded(json.dumps(wrong))
