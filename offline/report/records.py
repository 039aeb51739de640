"""What a report needs of a checkpoint's statistics, which a stranger may have written or a disk damaged."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from d2moe_vllm.format.config import STATS_FILE, CheckpointConfig, CheckpointError, first_error
from d2moe_vllm.format.kinds import Role
from offline.checkpoint.inspect import read_statistics

LARGEST = 1e100
"""Of any figure: sums and squares of these are still floats."""
Count = Annotated[int, Field(ge=0, le=2**53)]
Figure = Annotated[float, Field(ge=0, le=LARGEST)]


def _encodable(text: str) -> str:
    """JSON can name half a character, which no page can hold. Raises ValueError."""
    text.encode()
    return text


Text = Annotated[str, AfterValidator(_encodable)]


class _Record(BaseModel):
    """Other fields are left alone: a report does not read them."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class _Fit(_Record):
    start_error: Figure
    error: Figure
    steps: Count | None = None
    ended: Text | None = None


class _Layer(_Record):
    tokens: list[Count]
    relative_error: dict[Role, list[Figure]]
    sensitivity: dict[Role, list[Figure]] | None = None
    fit: dict[Role, _Fit] = {}

    def per_expert(self) -> Sequence[Sequence[float]]:
        return [self.tokens, *self.relative_error.values(), *(self.sensitivity or {}).values()]


class _Selection(_Record):
    sensitivity: dict[str, Figure]
    dense: list[int]


class _Calibration(_Record):
    windows: Count | None = None
    seq_len: Count | None = None
    seed: int | None = None
    tokens_sha256: Text = ""


class _Statistics(_Record):
    layers: dict[str, _Layer]
    selection: _Selection | None = None
    calibration: _Calibration = _Calibration()
    versions: dict[Text, Text] = {}
    written_by: Text = ""


def check_statistics(folder: Path, config: CheckpointConfig, all_layers: Sequence[int]) -> None:
    """Raises CheckpointError where the statistics are not those of this checkpoint's layers and experts, or one of
    their figures is none. all_layers: of the model those with experts, compressed or not."""
    path, content = folder / STATS_FILE, read_statistics(folder)
    try:
        found = _Statistics.model_validate(content)
    except ValidationError as error:
        raise CheckpointError(f"{path}: damaged: {first_error(error)}; copy it again") from None
    for number in config.layers:
        layer = found.layers.get(str(number))
        if layer is None or any(len(values) != config.num_experts for values in layer.per_expert()):
            raise CheckpointError(f"{path}: not the statistics of layer {number}; copy it again")
        if set(layer.relative_error) != set(config.roles):
            raise CheckpointError(f"{path}: layer {number} has no errors of {', '.join(config.roles)}; copy it again")
    if unknown := set(found.layers) - {str(number) for number in config.layers}:
        raise CheckpointError(f"{path}: layer {min(unknown)!r} is none of the checkpoint's; copy it again")
    if (selection := found.selection) is not None:
        left = [number for number in all_layers if number not in config.layers]
        if set(selection.sensitivity) != set(map(str, all_layers)) or sorted(selection.dense) != left:
            raise CheckpointError(f"{path}: its selection of layers is damaged; copy it again")
