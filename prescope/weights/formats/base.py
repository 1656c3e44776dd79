"""What a packed form of a matrix says of itself.

Shapes: (N, K) of one matrix, N outputs and K inputs; leading dimensions, such as experts, are kept by every function.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import NamedTuple

import torch

#: Weights that are packed at a time on a CPU, in float32 a few times as many bytes: of a whole matrix they leave its
#: caches, and 1536 x 2048 weights take 40 ms instead of 10 for int4, one thread.
PIECE = 1 << 18


class Part(NamedTuple):
    """One of the tensors that hold a packed matrix.

    Attributes:
        suffix: what its name has behind the matrix's; "" for the weights themselves, "_scale", "_zero", "_global".
        shape: for one matrix; rows of the matrix, or blocks of rows, come first.
    """

    suffix: str
    shape: tuple[int, ...]
    dtype: torch.dtype


class Format(ABC):
    """A packed form."""

    @property
    @abstractmethod
    def name(self) -> str:
        """One word, as `load(experts=...)` takes it where it can."""

    @abstractmethod
    def parts(self, shape: tuple[int, int]) -> tuple[Part, ...]:
        """The tensors that hold a matrix of (N, K)."""

    @abstractmethod
    def unpack(self, parts: Mapping[str, torch.Tensor], shape: tuple[int, int]) -> torch.Tensor:
        """The exact values (..., N, K) in float32 of tensors (..., *part.shape), by suffix."""

    def pack(self, weights: torch.Tensor) -> dict[str, torch.Tensor]:
        """The nearest that the format has to weights (..., N, K), by suffix."""
        together = self.rows_together
        row_size = max(1, together * weights[..., 0, :].numel())
        rows = together * max(1, PIECE // row_size)
        if weights.device.type != "cpu" or rows >= weights.shape[-2]:
            return self._pack(weights)
        pieces = [self._pack(piece) for piece in weights.split(rows, dim=-2)]
        axis = weights.ndim - 2
        return {suffix: torch.cat([one[suffix] for one in pieces], dim=axis) for suffix in pieces[0]}

    @property
    def rows_together(self) -> int:
        """Rows that share scales, so that they are packed together."""
        return 1

    @abstractmethod
    def _pack(self, weights: torch.Tensor) -> dict[str, torch.Tensor]:
        """`pack`, of some rows of a matrix that share scales with no others."""

    def nbytes(self, shape: tuple[int, int]) -> int:
        """Bytes of a matrix, scales included."""
        return sum(torch.Size(part.shape).numel() * part.dtype.itemsize for part in self.parts(shape))

    def is_by_row(self, shape: tuple[int, int]) -> bool:
        """Whether each row has weights and scales of its own, so that rows can be put in another order."""
        return all(part.shape[0] == shape[0] for part in self.parts(shape))


class PackedMatrices:
    """Matrices of one name in many rows, each unpacked when it is asked for.

    Attributes:
        format: of each.
        parts: (R, *part.shape) views of the rows, by suffix.
        dtype: what it is unpacked to.
    """

    def __init__(
        self,
        format: Format,
        parts: Mapping[str, torch.Tensor],
        shape: tuple[int, int],
        dtype: torch.dtype,
    ) -> None:
        self.format, self.parts, self._shape, self.dtype = format, parts, shape, dtype

    @property
    def shape(self) -> tuple[int, int, int]:
        """(R, N, K)."""
        return len(self.parts[""]), *self._shape

    def __getitem__(self, row: int) -> torch.Tensor:
        """The matrix (N, K) of a row, rounded once from its exact values."""
        one = {suffix: part[row] for suffix, part in self.parts.items()}
        return self.format.unpack(one, self._shape).to(self.dtype)
