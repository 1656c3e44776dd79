"""Two numbers of 4 bits in a byte, the first in its low half."""

import torch


def split(packed: torch.Tensor) -> torch.Tensor:
    """The numbers (..., 2n) of bytes (..., n), as uint8."""
    return torch.stack([packed & 0xF, packed >> 4], dim=-1).flatten(-2)


def join(numbers: torch.Tensor) -> torch.Tensor:
    """Bytes (..., n) of numbers (..., 2n) below 16."""
    pairs = numbers.to(torch.uint8).contiguous().view(torch.int16)  # the first is the lower byte
    return (pairs | (pairs >> 4)).to(torch.uint8)
