"""The table of kinds: the documents say what it says, and sizes of what is packed are those of the bits."""

from __future__ import annotations

from pathlib import Path

import pytest

from d2moe_vllm.format.config import Layer, Projection, Storage
from d2moe_vllm.format.kinds import (
    KINDS,
    PROJECTION_DEFAULTS,
    ROLES,
    SCALE_DTYPE,
    STORAGES,
    Kind,
    is_cut,
    layer_of,
    projection_of,
    storage_tensors,
)

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "checkpoint-format.md"
OWNERS = {
    "layer": "the layer, with expert 0",
    "expert": "every expert with a delta",
    "slot": "`distinct_u` slots, or every expert with a delta",
    "every": "every expert",
}
CONTENTS = {
    "plain": "`dtype`",
    "norms": "float32",
    "inputs": "int32",
    "slots": "int32",
    "mask": "uint8",
}


def where(kind: Kind) -> str:
    """The conditions in words."""
    found = []
    for field, wanted in kind.where.items():
        if isinstance(wanted, bool):
            number = isinstance(PROJECTION_DEFAULTS[field], int) and not isinstance(PROJECTION_DEFAULTS[field], bool)
            found.append(f"`{field} > 0`" if wanted and number else f"`{field}`" if wanted else f"not `{field}`")
        else:
            found.append(f'`{field}` `"{wanted}"`')
    if kind.ragged:
        found.append("`channels`" if kind.ragged == "experts" else "`channels.base`")
    if kind.roles != ROLES:
        found.append(f"{' and '.join(kind.roles)} only")
    return ", ".join(found)


def row(kind: Kind) -> str:
    content = CONTENTS.get(kind.content, f"`{kind.part}_storage`")
    shape = ", ".join(kind.sizes)
    gate, down = (", ".join(size for size in kind.sizes if is_cut(role, size)) or "-" for role in ("gate", "down"))
    return f"| `{kind.name}` | {content} | `[{shape}]` | {OWNERS[kind.owner]} | {where(kind)} | {gate}; {down} |"


def test_the_document_has_the_table() -> None:
    lines = DOCUMENT.read_text(encoding="utf-8").splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("| kind |"))
    written = [line for line in lines[start + 2 : start + 2 + len(KINDS) + 1] if line.startswith("|")]
    expected = [row(kind) for kind in KINDS]
    assert written == expected, "docs/checkpoint-format.md should have\n" + "\n".join(expected)


def test_the_document_lists_the_storages() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert [name for name in STORAGES if f"`{name}`" not in text] == []


def test_a_projection_has_the_same_fields_with_and_without_pydantic() -> None:
    plain, given = projection_of({}), {"kept_columns": 8, "used_columns": 0}
    assert Projection.model_validate(given).model_dump() == {**vars(plain), **given}
    with pytest.raises(ValueError, match="kept_columns 8 needs used_columns"):
        Projection.model_validate({"kept_columns": 8})
    with pytest.raises(ValueError, match="kept_columns 8 needs used_columns"):
        projection_of({"kept_columns": 8})
    layer = {"gate": given, "up": given, "down": given}
    plain_layer, given_layer = vars(layer_of(layer)), Layer.model_validate(layer).model_dump()
    assert set(plain_layer) == set(given_layer)
    assert {name: given_layer[name] for name in ("trimmed", "channels")} == {"trimmed": (), "channels": None}
    storage = projection_of({"delta_storage": {"type": "float32"}}).delta_storage
    assert Storage(type="float32").model_dump() == vars(storage)


@pytest.mark.parametrize(("bits", "share"), [(8, 0.516), (4, 0.266), (3, 0.203), (2, 0.141)])
def test_packed_matrices_have_the_bytes_of_their_bits(bits: int, share: float) -> None:
    """Of 16 bits, groups of 64 with one 16-bit scale: the shares that plain rounding is known to leave."""
    found = storage_tensors(f"int{bits}", 64, (256, 128))
    assert sum(spec.nbytes for spec in found.values()) / (256 * 128 * 2) == pytest.approx(share, abs=5e-4)


def test_rows_of_codes_end_on_a_byte_and_a_last_group_may_be_short() -> None:
    found = storage_tensors("int3", 64, (5, 130))
    assert found[""].shape == (5, 49)  # 390 bits
    assert (found["_scales"].dtype, found["_scales"].shape) == (SCALE_DTYPE, (5, 3))
    assert storage_tensors("bfloat16", 64, (5, 130))[""].shape == (5, 130)
