"""Other ways to compute experts on the CPU, for `cpu_experts.py` to measure: torch's own operators, inductor, numba.

Each takes weights up (n, 2F, D) and down (n, D, F) in bfloat16 and x (T, D), all pairs, and gives (n, T, D). They are
candidates that were weighed, not code that prescope runs.
"""

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch.nn import functional

Candidate = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def silu_gate(h: torch.Tensor) -> torch.Tensor:
    """The gate of Qwen3, OLMoE and Mixtral."""
    g, u = h.chunk(2, dim=-1)
    return functional.silu(g) * u


def linear(up: torch.Tensor, down: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Expert after expert, each product by all of torch's threads (oneDNN)."""
    experts = [
        functional.linear(silu_gate(functional.linear(x, u)), d) for u, d in zip(up, down, strict=True)
    ]
    return torch.stack(experts)


def batched(up: torch.Tensor, down: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """One batched product over all experts."""
    h = torch.bmm(x.expand(len(up), *x.shape), up.transpose(1, 2))
    return torch.bmm(silu_gate(h), down.transpose(1, 2))


def inductor() -> Candidate | None:
    """Products spelled as sums, which torch.compile turns into C++ loops; a few tokens only."""

    def product(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:  # (n, T, I), (n, O, I) -> (n, T, O)
        return (x.unsqueeze(2).float() * w.unsqueeze(1).float()).sum(-1).to(x.dtype)

    def experts(up: torch.Tensor, down: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return product(silu_gate(product(x.expand(len(up), *x.shape), up)), down)

    return torch.compile(experts, dynamic=False)


def with_numba(threads: int) -> Candidate | None:
    """LLVM's vectorisation of a loop over rows, by numba's own threads; one token only."""
    if find_spec("numba") is None:
        return None
    import numba
    from numba import types
    from numba.extending import intrinsic

    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))

    @intrinsic
    def as_float(context, bits):  # type: ignore[no-untyped-def]
        def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            return builder.bitcast(arguments[0], context.get_value_type(types.float32))

        return types.float32(types.uint32), generate

    @numba.njit(fastmath=True)
    def dot(row, v):  # type: ignore[no-untyped-def]
        total = numba.float32(0.0)
        for k in range(len(v)):
            total += as_float(numba.uint32(row[k]) << numba.uint32(16)) * v[k]
        return total

    @numba.njit(parallel=True, fastmath=True)
    def product(w, row_step, expert_step, x, rows, out):  # type: ignore[no-untyped-def]
        """w: flat uint16 from the first expert on; out (n, rows) = w @ x (n or 1, I)."""
        for i in numba.prange(out.shape[0] * rows):
            e, r = i // rows, i % rows
            base = e * expert_step + r * row_step
            out[e, r] = dot(w[base : base + x.shape[1]], x[e % x.shape[0]])

    def flat(w: torch.Tensor):  # type: ignore[no-untyped-def]
        end = (len(w) - 1) * w.stride(0) + w.shape[1] * w.shape[2]
        return w.view(torch.int16).as_strided((end,), (1,)).numpy().view("uint16")

    def experts(up: torch.Tensor, down: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        h = torch.empty(len(up), up.shape[1])
        product(flat(up), up.stride(1), up.stride(0), x.float().numpy(), up.shape[1], h.numpy())
        act = silu_gate(h.to(x.dtype)).float()
        y = torch.empty(len(up), down.shape[1])
        product(flat(down), down.stride(1), down.stride(0), act.numpy(), down.shape[1], y.numpy())
        return y.to(x.dtype).unsqueeze(1)

    return experts
