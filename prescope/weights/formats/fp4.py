"""Floats of 4 bits (e2m1) in short groups, each with a scale of 8 bits."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch.nn import functional

from .base import Format, Part
from .nibbles import join, split

#: Values of the 16 patterns: a sign, two bits of exponent, one of mantissa.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
#: Exponent of an e8m0 scale of 2 ** 0.
BIAS = 127


@dataclass(frozen=True)
class Mxfp4(Format):
    """Weights (N, K / 2) of two e2m1 each, times 2 ** (scale - 127) with uint8 scales (N, ceil(K / 32))."""

    @property
    def name(self) -> str:
        return "mxfp4"

    def parts(self, shape: tuple[int, int]) -> tuple[Part, ...]:
        rows, columns = shape
        return Part("", (rows, columns // 2), torch.uint8), Part(
            "_scale", (rows, -(-columns // 32)), torch.uint8
        )

    def unpack(self, parts: Mapping[str, torch.Tensor], shape: tuple[int, int]) -> torch.Tensor:
        return _scaled(parts[""], e8m0(parts["_scale"]), 32)

    def _pack(self, weights: torch.Tensor) -> dict[str, torch.Tensor]:
        columns = weights.shape[-1]
        groups = functional.pad(weights.float(), (0, -columns % 32)).unflatten(-1, (-1, 32))
        # The power of two that brings the largest weight to between 4 and 8, of which 6 and more become 6; or the next,
        # with which none is cut off and all are coarser: whichever comes nearer to the group as a whole.
        sizes = groups.abs()
        _, exponent = torch.frexp(sizes.amax(-1))
        near, wide = ((exponent - 3 + BIAS + more).clamp(0, 254) for more in (0, 1))
        sizes /= e8m0(near).unsqueeze(-1)
        index, error = _nearest(sizes)
        sizes *= 0.5
        index_wide, error_wide = _nearest(sizes)
        is_wide = (4.0 * error_wide < error) & (wide > near)
        packed = _signed(torch.where(is_wide.unsqueeze(-1), index_wide, index), groups)[..., : columns // 2]
        return {"": packed.contiguous(), "_scale": torch.where(is_wide, wide, near).to(torch.uint8)}


@dataclass(frozen=True)
class Nvfp4(Format):
    """Weights (N, K / 2) of two e2m1 each, times e4m3 scales (N, K / 16), times float32 scales of whole rows (N,)."""

    @property
    def name(self) -> str:
        return "nvfp4"

    def parts(self, shape: tuple[int, int]) -> tuple[Part, ...]:
        rows, columns = shape
        return (
            Part("", (rows, columns // 2), torch.uint8),
            Part("_scale", (rows, columns // 16), torch.float8_e4m3fn),
            Part("_global", (rows,), torch.float32),
        )

    def unpack(self, parts: Mapping[str, torch.Tensor], shape: tuple[int, int]) -> torch.Tensor:
        return _scaled(parts[""], parts["_scale"].float() * parts["_global"].unsqueeze(-1), 16)

    def _pack(self, weights: torch.Tensor) -> dict[str, torch.Tensor]:
        groups = weights.float().unflatten(-1, (-1, 16))
        largest = groups.abs().amax(-1) / 6
        of_row = largest.amax(-1) / torch.finfo(torch.float8_e4m3fn).max
        of_row = torch.where(of_row > 0, of_row, 1.0)
        scale = (largest / of_row.unsqueeze(-1)).to(torch.float8_e4m3fn)
        whole = (scale.float() * of_row.unsqueeze(-1)).unsqueeze(-1)
        return {
            "": _signed(_nearest(groups.abs() / torch.where(whole > 0, whole, 1.0))[0], groups),
            "_scale": scale,
            "_global": of_row,
        }


def e8m0(scale: torch.Tensor) -> torch.Tensor:
    """Powers of two by their exponents, of which 127 is 1."""
    bits = (
        scale.to(torch.int32) << 23
    )  # the exponent's place in a float32; its least, 2 ** -127, is a subnormal
    return bits.clamp(min=1 << 22).view(torch.float32)


def _scaled(packed: torch.Tensor, scale: torch.Tensor, group: int) -> torch.Tensor:
    """Weights (..., N, K) with scales (..., N, ceil(K / group))."""
    values = _values(packed.device)[split(packed).int()]
    return values * scale.repeat_interleave(group, dim=-1)[..., : values.shape[-1]]


@cache
@torch.inference_mode(False)  # it outlives the caller's mode
def _values(device: torch.device) -> torch.Tensor:
    # Kept: to make it on a GPU, the host would wait for a copy at each matrix.
    return torch.tensor(E2M1, dtype=torch.float32, device=device)


def _nearest(sizes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of numbers (..., n) from 0 on the nearest of the first 8 patterns, and the squares lost (...)."""
    # Steps of 0.5 up to 2, of 1 up to 4, of 2 up to 6: exact, and ten times as fast as to look for the place.
    halves = (sizes * 2.0).sub_(0.5).ceil_().clamp_(0.0, 4.0)
    ones = (sizes - 2.5).ceil_().clamp_(0.0, 2.0)
    twos = (sizes * 0.5).sub_(2.5).ceil_().clamp_(0.0, 1.0)
    lost = sizes - (halves * 0.5).add_(ones).add_(twos, alpha=2.0)
    return halves.add_(ones).add_(twos), lost.square_().sum(-1)


def _signed(index: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """Bytes of patterns (..., groups, n) with the signs of the numbers, two in each."""
    return join((index + 8.0 * (groups < 0)).flatten(-2))
