"""What a calibration measures, as a list of circumstances. Pure: no device, no clock."""

from collections.abc import Sequence
from typing import NamedTuple

from ..core.types import ExpertSize
from ..profile import Circumstances

#: Copies by size, bytes: from one that costs little more than its launch to one that takes the full rate.
COPY_BYTES = (64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20, 64 << 20)
#: A copy over a slow, emulated link may take so long at most.
LONGEST_COPY_US = 30_000.0
#: Tokens of each expert: at 1 to 8 reading the weights is what takes time, at 64 arithmetic.
CPU_TOKENS = (2, 4, 8, 16, 64)
#: Fewer on the device: each shape compiles kernels of its own, half a second each the first time.
GPU_TOKENS = (4, 16, 64)
#: Submitted together at most: enough that the cost of a submission is small compared with them.
MOST_EXPERTS = 8
#: Host memory for the experts of one size, by kind of device: more than the CPU's caches hold, so that weights are read
#: from DRAM. Servers with a GPU have caches of several hundred MiB.
ROWS_BYTES = {"cuda": 768 << 20, "cpu": 256 << 20, "null": 1 << 20}
LEAST_ROWS = 4


class Sizes(NamedTuple):
    """How many experts of one size are kept for measuring, and how many are submitted at once."""

    rows: int
    together: int


def sizes_of(expert: ExpertSize, device_kind: str, available_bytes: int) -> Sizes:
    """As many rows as ROWS_BYTES says, in a quarter of the memory at most, but at least four."""
    budget = min(ROWS_BYTES[device_kind], available_bytes // 4)
    rows = max(LEAST_ROWS, budget // expert.nbytes)
    return Sizes(rows, min(MOST_EXPERTS, rows // 2))


def host_plan(
    experts: Sequence[ExpertSize],
    rows_bytes: int,
    *,
    device_kind: str,
    link_gb_per_s: float | None = None,
) -> list[Circumstances]:
    """Link, memory and host costs, which depend on no model; copies of each expert's own size among them.

    Args:
        rows_bytes: host memory there is to copy and to read.
        link_gb_per_s: of an emulated link.
    """
    most = rows_bytes
    if link_gb_per_s is not None:
        most = min(most, int(LONGEST_COPY_US * link_gb_per_s * 1e3))
    sizes = sorted({n for n in (*COPY_BYTES, *(expert.nbytes for expert in experts)) if n <= most} or {most})
    plan = [Circumstances("h2d", busy, nbytes=n) for busy in (False, True) for n in sizes]
    plan += [Circumstances("dram", busy, nbytes=rows_bytes) for busy in (False, True)]
    plan += [Circumstances(kind) for kind in ("enqueue", "read")]
    if device_kind == "cuda":  # where the host decides captured steps
        plan += [Circumstances(kind) for kind in ("batch", "message")]
        plan += [Circumstances("handover", busy) for busy in (False, True)]
    return plan


def expert_plan(expert: ExpertSize, together: int) -> list[Circumstances]:
    """CPU experts alone and beside the link, and experts on the device, by number and tokens."""

    def of(kind: str, busy: bool, num: int, tokens: int) -> Circumstances:
        return Circumstances(kind, busy, *expert, experts=num, tokens=tokens)

    counts = [n for n in (1, 2, 4) if n < together]
    plan = [
        of("cpu", busy, num, tokens)
        for busy in (False, True)
        for num, tokens in (*((n, 1) for n in (*counts, together)), *((together, t) for t in CPU_TOKENS))
    ]
    few = max(1, together // 4)
    numbers = [(few, 1)] if few < together else []
    return plan + [
        of("gpu", False, n, t) for n, t in (*numbers, (together, 1), *((together, t) for t in GPU_TOKENS))
    ]
