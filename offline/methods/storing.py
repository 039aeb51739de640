"""Matrices as they are stored: rounded with feedback to the bits that are asked for (METHODS 4.1), or, with 16, as they
are in the checkpoint's dtype."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from d2moe_vllm.format.config import Storage
from d2moe_vllm.format.kinds import SCALE_DTYPE, SCALES, STORAGES
from d2moe_vllm.ops.packing import Packing, pack, unpacked
from offline.algebra.rounding import DAMPING as USUAL
from offline.algebra.rounding import round_matrices
from offline.algebra.sharing import refitted_u
from offline.io.shards import TORCH_DTYPES

DAMPING = "_damping"
"""What a rounded matrix's name is followed by in the part where it says what its factorization took, float32 [1]."""


def storage_of(bits: int, group_size: int) -> Storage | None:
    """config.json's entry; None for matrices that are not packed, or not there."""
    return None if bits in (0, 16) else Storage(type=f"int{bits}", group_size=group_size)


@dataclass(frozen=True)
class Matrix:
    """One matrix [..., out, in], or whatever else is stored beside. parts: its tensors, by what its name is followed
    by; how: of packed ones; inputs: how many a row has."""

    parts: Mapping[str, Tensor]
    how: Packing | None = None
    inputs: int = 0

    @property
    def numbers(self) -> Tensor:
        """What it stands for, float32."""
        if self.how is None:
            return self.parts[""].float()
        return unpacked(self.parts[""], self.parts[SCALES], self.how, self.inputs)

    def named(self, name: str) -> dict[str, Tensor]:
        """Its tensors by full name."""
        return {f"{name}{suffix}": tensor for suffix, tensor in self.parts.items()}


@dataclass(frozen=True)
class Storing:
    """How matrices are stored. bits: of their codes, 16 for numbers in `dtype`; group_size: inputs that share a
    scale."""

    bits: int
    group_size: int
    dtype: torch.dtype

    @property
    def packed(self) -> bool:
        return self.bits != 16

    def store(self, matrices: Sequence[Tensor], moment: Tensor | None) -> list[Matrix]:
        """Matrices [out, in] that read inputs of second moment `moment` [in, in], any scale; None rounds to nearest.
        Not looked at where nothing is rounded."""
        if not self.packed:
            return [Matrix({"": matrix.to(self.dtype)}) for matrix in matrices]
        if not matrices[0].numel():
            return [self._empty(matrix) for matrix in matrices]
        found = round_matrices(
            matrices,
            moment,
            [self.bits] * len(matrices),
            group_size=self.group_size,
            dtype=TORCH_DTYPES[SCALE_DTYPE],
        )
        how, inputs = self._how, matrices[0].shape[1]
        return [
            Matrix(
                {"": pack(one.codes, self.bits), SCALES: one.scales, DAMPING: torch.tensor([one.damping])}, how, inputs
            )
            for one in found
        ]

    def factors(self, matrix: Tensor, gram: Tensor | None, u: Tensor, v: Tensor) -> tuple[Matrix, Matrix]:
        """Factors u [out, rank], v [rank, in] of a matrix that reads inputs of second moment `gram` [in, in].

        Where they are rounded, V is by the inputs; then U is fitted to what V has become, and rounded by what it reads
        (METHODS 4.1). Without rounding nothing asks for the moment.
        """
        if not self.packed:
            return self.store([u], None)[0], self.store([v], None)[0]
        if gram is None:
            raise ValueError("factors are rounded by the second moment of what they read")
        (right,) = self.store([v], gram)
        fitted = refitted_u(u, matrix, gram, right.numbers)
        return self.store([fitted], self.seen(right, gram))[0], right

    def seen(self, v: Matrix, gram: Tensor) -> Tensor | None:
        """The second moment of V x, float64 [rank, rank], where something is rounded by it."""
        if not self.packed:
            return None
        numbers = v.numbers
        return ((numbers @ gram.to(numbers.dtype)) @ numbers.T).double()

    def open(self, parts: Mapping[str, Tensor], name: str, inputs: int) -> Matrix:
        """What `Matrix.named` gave."""
        if not self.packed:
            return Matrix({"": parts[name]})
        return Matrix({"": parts[name], SCALES: parts[name + SCALES]}, self._how, inputs)

    def names(self, name: str) -> tuple[str, ...]:
        """Of the tensors that `open` needs."""
        return (name, name + SCALES) if self.packed else (name,)

    @property
    def _how(self) -> Packing:
        return Packing(self.bits, STORAGES[f"int{self.bits}"].zero, self.group_size)

    def _empty(self, matrix: Tensor) -> Matrix:
        (rows, inputs), how = matrix.shape, self._how
        scales = torch.zeros(rows, how.row_groups(inputs), dtype=TORCH_DTYPES[SCALE_DTYPE])
        codes = torch.zeros(rows, how.row_bytes(inputs), dtype=torch.uint8)
        return Matrix({"": codes, SCALES: scales}, how, inputs)


def damped(parts: Mapping[str, Tensor]) -> float | None:
    """The most damping that any matrix of a part took, where that is more than usual."""
    taken = max((float(tensor.max()) for name, tensor in parts.items() if name.endswith(DAMPING)), default=0.0)
    return taken if taken > 1.5 * USUAL else None
