"""Two numbers of 4 bits in a byte, the first in its low half."""

import torch


def split(packed: torch.Tensor) -> torch.Tensor:
    """The numbers (..., 2n) of bytes (..., n), as uint8."""
    return torch.stack([packed & 0xF, packed >> 4], dim=-1).flatten(-2)


def join(numbers: torch.Tensor) -> torch.Tensor:
    """Bytes (..., n) of numbers (..., 2n) below 16."""
    pairs = numbers.to(torch.uint8).unflatten(-1, (-1, 2))
    return pairs[..., 0] | (pairs[..., 1] << 4)
