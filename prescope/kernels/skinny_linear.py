"""Linears of a few tokens in one launch: all that take the same input, such as a layer's query, key and value.

A decode step's products read each weight once, and nothing else counts. cuBLAS takes 5.4 us for a weight of 2 MB and
6.8 us for one of 17 MB (H200, one token), most of it start and end of a kernel; three in one launch pay that once. fp32
accumulation, one rounding to the output's dtype.
"""

import torch
import triton
import triton.language as tl

from .launch import launch

#: More tokens than this are cuBLAS's.
MOST_TOKENS = 16
#: Weights in one launch.
MOST_WEIGHTS = 4
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@triton.jit(do_not_specialize=["n0", "n1", "n2", "n3"])  # one of them may be 1, which would be a constant
def _skinny_linear(  # type: ignore[no-untyped-def]
    x, w0, w1, w2, w3, out0, out1, out2, out3, n0, n1, n2, n3, num_tokens, x_stride,
    IN_DIM: tl.constexpr, NUM: tl.constexpr, TOKENS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
):  # fmt: skip
    """One program per BLOCK_OUT rows of one weight (n, IN_DIM); x (num_tokens, IN_DIM), out (num_tokens, n)."""
    block = tl.program_id(0)
    w, out, n = w0, out0, n0
    if NUM > 1:
        before = tl.cdiv(n0, BLOCK_OUT)
        if block >= before:
            w, out, n, block = w1, out1, n1, block - before
            if NUM > 2:
                before = tl.cdiv(n1, BLOCK_OUT)
                if block >= before:
                    w, out, n, block = w2, out2, n2, block - before
                    if NUM > 3:
                        before = tl.cdiv(n2, BLOCK_OUT)
                        if block >= before:
                            w, out, n, block = w3, out3, n3, block - before
    rows = block * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    row_mask = rows < n
    columns = tl.arange(0, BLOCK_IN)
    weight = w + rows[:, None].to(tl.int64) * IN_DIM
    if TOKENS == 1:
        acc = tl.zeros((BLOCK_OUT, BLOCK_IN), dtype=tl.float32)
        for first in range(0, IN_DIM, BLOCK_IN):
            c = first + columns
            mask = c < IN_DIM
            values = tl.load(x + c, mask=mask, other=0.0).to(tl.float32)
            tile = tl.load(weight + c[None, :], mask=row_mask[:, None] & mask[None, :], other=0.0)
            acc += tile.to(tl.float32) * values[None, :]
        tl.store(out + rows, tl.sum(acc, axis=1).to(out.dtype.element_ty), mask=row_mask)
    else:
        token = tl.arange(0, TOKENS)
        token_mask = token < num_tokens
        product = tl.zeros((BLOCK_OUT, TOKENS), dtype=tl.float32)
        for first in range(0, IN_DIM, BLOCK_IN):
            c = first + columns
            mask = c < IN_DIM
            a = tl.load(weight + c[None, :], mask=row_mask[:, None] & mask[None, :], other=0.0)
            b = tl.load(
                x + token[None, :] * x_stride + c[:, None],
                mask=token_mask[None, :] & mask[:, None],
                other=0.0,
            )
            product = tl.dot(a, b, product, input_precision=PRECISION)
        target = out + token[None, :] * n + rows[:, None]
        tl.store(target, product.to(out.dtype.element_ty), mask=token_mask[None, :] & row_mask[:, None])


@torch.library.custom_op("prescope::skinny_linear", mutates_args=())
def skinny_linear(x: torch.Tensor, weights: list[torch.Tensor]) -> list[torch.Tensor]:
    """x (M, I) @ w.T of each weight (N, I), with M up to MOST_TOKENS: (M, N) each."""
    num_tokens, in_dim = x.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    outs = [x.new_empty((num_tokens, weight.shape[0])) for weight in weights]
    filled = [weights[0]] * (MOST_WEIGHTS - len(weights))
    unused = [outs[0]] * (MOST_WEIGHTS - len(outs))
    sizes = [weight.shape[0] for weight in weights]
    block_out, block_in, num_warps, num_stages = tile_of(num_tokens, in_dim, x.element_size())
    grid = (sum(triton.cdiv(size, block_out) for size in sizes),)
    launch(
        _skinny_linear, grid,
        x, *weights, *filled, *outs, *unused, *sizes, *[0] * len(filled), num_tokens, x.stride(0),
        IN_DIM=in_dim, NUM=len(weights), TOKENS=1 if num_tokens == 1 else MOST_TOKENS, PRECISION="ieee",
        BLOCK_OUT=block_out, BLOCK_IN=block_in, num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return outs


@skinny_linear.register_fake
def _(x: torch.Tensor, weights: list[torch.Tensor]) -> list[torch.Tensor]:
    return [x.new_empty((x.shape[0], weight.shape[0])) for weight in weights]


def tile_of(num_tokens: int, in_dim: int, bytes_each: int) -> tuple[int, int, int, int]:
    """Rows and columns of a program's tile, warps, stages.

    The fastest, or within 0.2 us of it, for weights of 2,048 and 4,096 columns in bfloat16 on an H200: 7.0 us for
    query, key and value of 5,120 rows (cuBLAS 19.1), 6.1 for 2,048 x 4,096 (9.9), 1.7 for a router of 128 (4.8); with
    eight tokens 9.2, 10.0 and 5.2 (18.7, 10.1 and 5.0).
    """
    most = max(16, triton.next_power_of_2(in_dim))
    if num_tokens == 1:
        return (2, min(1024, most), 4, 2) if in_dim < 4096 else (2, 2048, 8, 2)
    # Tensor cores take 16 rows at least; float32 needs twice the shared memory for what is on its way.
    return (32, min(256, most), 4, 5) if bytes_each == 2 else (16, min(64, most), 4, 3)
