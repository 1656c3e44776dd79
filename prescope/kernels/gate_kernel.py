"""A family's gate in one launch: by its tables, where it has them, for steps of few tokens.

Between the linears of a step stand two launches in most families and ten in some, each longer than what it computes.
Results are those of the family's own code, to the bit (`gates`).
"""

import torch
import triton
import triton.language as tl

from .base import ExpertsSpec
from .gates import GateTables, activation_tables, gate_tables
from .launch import launch

#: What tables can be read off: functions of 16 bits.
DTYPES = (torch.bfloat16, torch.float16)
_BLOCK = 256


@triton.jit
def _by_tables(  # type: ignore[no-untyped-def]
    h, gate, value, out, width, h_stride, INTERLEAVED: tl.constexpr, HAS_VALUE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """(P, 2F) -> (P, F), or (P, F) -> (P, F) without values."""
    pair = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    step = 2 if INTERLEAVED else 1
    g = tl.load(h + pair * h_stride + column * step, mask=mask, other=0.0).to(tl.int16, bitcast=True)
    result = tl.load(gate + (g.to(tl.int32) & 0xFFFF), mask=mask, other=0.0)
    if HAS_VALUE:
        place = column * 2 + 1 if INTERLEAVED else column + width
        u = tl.load(h + pair * h_stride + place, mask=mask, other=0.0).to(tl.int16, bitcast=True)
        result *= tl.load(value + (u.to(tl.int32) & 0xFFFF), mask=mask, other=0.0)
    tl.store(out + pair * width + column, result.to(out.dtype.element_ty), mask=mask)


class Gates:
    """The gates of an engine's layers. Layers have gates alike: they share tables, which so stay in the caches."""

    def __init__(self) -> None:
        self._by_spec: dict[int, tuple[ExpertsSpec, GateTables | None]] = {}
        self._known: list[GateTables] = []

    def apply(self, spec: ExpertsSpec, h: torch.Tensor, width: int) -> torch.Tensor:
        """What `spec.gate` makes of h (P, 2F or F): (P, F), contiguous."""
        _, tables = self._by_spec.get(id(spec)) or self._read(spec, h, width)
        if tables is None:
            return spec.gate(h).contiguous()
        out = h.new_empty((h.shape[0], width))
        value = tables.gate if tables.value is None else tables.value
        launch(
            _by_tables, (h.shape[0], triton.cdiv(width, _BLOCK)),
            h, tables.gate, value, out, width, h.stride(0), INTERLEAVED=tables.interleaved,
            HAS_VALUE=tables.value is not None, BLOCK=_BLOCK,
        )  # fmt: skip
        return out

    def _read(self, spec: ExpertsSpec, h: torch.Tensor, width: int) -> tuple[ExpertsSpec, GateTables | None]:
        tables = None
        if h.dtype in DTYPES:
            try:
                read = gate_tables if h.shape[1] == 2 * width else activation_tables
                tables = read(spec.gate, h.dtype, h.device)
            except (
                RuntimeError,
                ValueError,
                TypeError,
            ):  # code of the family's own, that takes rows of one width only
                tables = None
        if tables is not None:
            same = next((known for known in self._known if _alike(known, tables)), None)
            if same is None:
                self._known.append(tables)
            tables = same or tables
        # The spec is kept too, so that no other can have its id.
        self._by_spec[id(spec)] = spec, tables
        return spec, tables


def _alike(a: GateTables, b: GateTables) -> bool:
    return a.interleaved == b.interleaved and _equal(a.gate, b.gate) and _equal(a.value, b.value)


def _equal(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return torch.equal(a.view(torch.int32), b.view(torch.int32))  # NaN is like NaN
