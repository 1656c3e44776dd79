"""A model family's gate as two tables: act = gate[bits of g] * value[bits of u], rounded once.

Between `up` and `down` stands code of the family's own (SiLU, clamps, scales, whatever `_apply_gate` says). For 16-bit
floats every function of one number is a table of 65536, and the gates in use are products of a function of g and one
of u. So the tables are read off the gate itself, called as the model calls it, and are kept only if they give its
results to the bit on random numbers. Nothing is known here about any family. They hold where they were read: another
device may round a family's functions otherwise.
"""

from typing import NamedTuple

import torch

from .base import TensorFunction

#: All bit patterns of a 16-bit float.
PATTERNS = 1 << 16
#: Random pairs on which a product of tables must equal the gate.
SAMPLES = 1 << 16
_ROW = 256


class GateTables(NamedTuple):
    """A gate as tables of float32 by the bits of its argument; `value` is None for an activation without a gate."""

    gate: torch.Tensor  # (65536,)
    value: torch.Tensor | None  # (65536,)
    interleaved: bool


_CPU = torch.device("cpu")


def activation_tables(
    function: TensorFunction, dtype: torch.dtype, device: torch.device = _CPU
) -> GateTables | None:
    """Tables of an elementwise activation, or None if it is something else."""
    numbers = _all_numbers(dtype, device)
    table = _call(lambda h: function(h).reshape(-1), numbers.view(-1, _ROW))
    g, _ = _samples(dtype, device)
    if not _same(_call(function, g), table[_bits(g)]):
        return None
    return GateTables(table.float(), None, False)


def gate_tables(gate: TensorFunction, dtype: torch.dtype, device: torch.device = _CPU) -> GateTables | None:
    """Tables of a gate (..., 2F) -> (..., F), or None if it is not a product of a function of g and one of u."""
    for interleaved in (False, True):
        for at in (1.0, 0.0):
            tables = _factors(gate, _all_numbers(dtype, device), interleaved, at)
            if tables is not None and _holds(gate, dtype, tables):
                return tables
    return None


def _factors(gate: TensorFunction, numbers: torch.Tensor, interleaved: bool, at: float) -> GateTables | None:
    """Tables under the guess that value(at) = 1: f(g) = gate(g, at), then value(u) = gate(g0, u) / f(g0).

    With f(g0) a power of two, so that the division is exact; the nearest to 1, or u at the ends of the range would
    leave it (subnormal or infinite).
    """
    of_gate = _joint(gate, numbers, torch.full_like(numbers, at), interleaved).float()
    mantissa, exponent = torch.frexp(of_gate)
    usable = torch.isfinite(of_gate) & (mantissa.abs() == 0.5)
    if not usable.any():
        return None
    found = torch.where(usable, (exponent - 1).abs(), PATTERNS).argmin()
    of_value = _joint(gate, numbers[found].repeat(PATTERNS), numbers, interleaved).float()
    return GateTables(of_gate, of_value / of_gate[found], interleaved)


def _holds(gate: TensorFunction, dtype: torch.dtype, tables: GateTables) -> bool:
    g, u = _samples(dtype, tables.gate.device)
    assert tables.value is not None
    product = (tables.gate[_bits(g)] * tables.value[_bits(u)]).to(dtype)
    return _same(_joint(gate, g, u, tables.interleaved), product)


def _joint(gate: TensorFunction, g: torch.Tensor, u: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """The gate of many independent (g, u), laid out as rows of 2F."""
    g, u = g.view(-1, _ROW), u.view(-1, _ROW)
    rows = torch.stack([g, u], dim=-1).flatten(1) if interleaved else torch.cat([g, u], dim=1)
    return _call(gate, rows).reshape(-1)


@torch.no_grad()
def _call(function: TensorFunction, rows: torch.Tensor) -> torch.Tensor:
    return function(rows)


def _all_numbers(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.arange(PATTERNS, dtype=torch.int32, device=device).to(torch.int16).view(dtype)


def _samples(dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs as models have them, (SAMPLES,) each: normal, with spreads from a hundredth to a hundred."""
    rng = torch.Generator().manual_seed(0)
    spread = torch.logspace(-2, 2, SAMPLES, dtype=torch.float32, device="cpu")[
        torch.randperm(SAMPLES, generator=rng, device="cpu")
    ]
    g, u = torch.randn(2, SAMPLES, generator=rng, dtype=torch.float32, device="cpu") * spread
    return g.to(device, dtype), u.to(device, dtype)


def _bits(numbers: torch.Tensor) -> torch.Tensor:
    return numbers.view(torch.int16).to(torch.int64) & (PATTERNS - 1)


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())
