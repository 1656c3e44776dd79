"""LLaPor's networks for a few tokens in four to six launches a layer.

As torch launches it, a prediction is some fifty small kernels: 62 us for a layer of Qwen3-30B-A3B's shape, where these
take 19 (before `_scale` was a launch of its own). On a branch of the step's graph, those cost each layer of the medium
model 10 us, these 2 (batch 1, H200, docs/log/kernels.md). The same sums as `Llapor.predict`, in another order.

Shapes: T tokens, D width, P compressed width, H hidden, B width of the block, E experts, K top-k, d layers ahead,
N = lookahead * E.
"""

from typing import Protocol

import torch
import triton
import triton.language as tl

from ..core.types import MoEShape
from .layer_groups import LayerGroups
from .llapor_config import LlaporConfig

#: Columns of a program.
COLUMNS = 16
#: Products a program holds at once, all tokens and columns together, of fewer tokens than 8 and of more: 8 tokens took
#: 85, 54 and 38 us with 4096, 8192 and 16384 of them (a layer of Qwen3-30B-A3B's shape, H200).
FEW_PRODUCTS, PRODUCTS = 8192, 16384


@triton.jit
def _times(a, b):  # type: ignore[no-untyped-def]
    return a * b


@triton.jit
def _gelu(x):  # type: ignore[no-untyped-def]
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _product(  # type: ignore[no-untyped-def]
    x, shift, matrix, column, num_tokens, num_rows, num_columns, row_stride, column_stride,
    SHIFTED: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """(TOKENS, COLUMNS) of (x - shift) @ matrix: x (T, num_rows), shift (num_rows,)."""
    token = tl.arange(0, TOKENS)
    part = tl.zeros((TOKENS, ROWS, COLUMNS), tl.float32)
    for begin in range(0, num_rows, ROWS):
        row = begin + tl.arange(0, ROWS)
        is_row = row < num_rows
        mask = (token < num_tokens)[:, None] & is_row[None, :]
        value = tl.load(x + token[:, None] * num_rows + row[None, :], mask=mask, other=0.0).to(tl.float32)
        if SHIFTED:
            value -= tl.load(shift + row, mask=is_row, other=0.0)[None, :]
        weight = tl.load(
            matrix + row[:, None] * row_stride + column[None, :] * column_stride,
            mask=is_row[:, None] & (column < num_columns)[None, :], other=0.0,
        )  # fmt: skip
        part += value[:, :, None] * weight[None, :, :]
    return tl.sum(part, 1)


@triton.jit
def _project(  # type: ignore[no-untyped-def]
    x, mean, pca, router, router_bias, f, base, num_tokens, width, compressed, num_base,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """f (T, P) = (x - mean) @ pca; and the routers (num_base, D) of the coming layers on x: base (T, num_base)."""
    token = tl.arange(0, TOKENS)
    blocks = tl.cdiv(compressed, COLUMNS)
    program = tl.program_id(0)
    if program < blocks:
        column = program * COLUMNS + tl.arange(0, COLUMNS)
        value = _product(
            x, mean, pca, column, num_tokens, width, compressed, compressed, 1, True, TOKENS, ROWS, COLUMNS
        )
        mask = (token < num_tokens)[:, None] & (column < compressed)[None, :]
        tl.store(f + token[:, None] * compressed + column[None, :], value, mask=mask)
    else:
        column = (program - blocks) * COLUMNS + tl.arange(0, COLUMNS)
        value = _product(
            x, mean, router, column, num_tokens, width, num_base, 1, width, False, TOKENS, ROWS, COLUMNS
        )
        is_column = column < num_base
        value += tl.load(router_bias + column, mask=is_column, other=0.0)[None, :]
        mask = (token < num_tokens)[:, None] & is_column[None, :]
        tl.store(base + token[:, None] * num_base + column[None, :], value, mask=mask)


@triton.jit
def _hide(  # type: ignore[no-untyped-def]
    f, ids, weights, matrix, bias, choice, whiten, trust, h, share,
    num_tokens, compressed, hidden, num_experts, top_k,
    CHOICE: tl.constexpr, TRUST: tl.constexpr, PADDED: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """h (T, H) = gelu(f @ matrix + what was chosen + bias); and the share (T,) of the correction that counts."""
    token = tl.arange(0, TOKENS)
    here = token < num_tokens
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = column < hidden
    value = _product(
        f, f, matrix, column, num_tokens, compressed, hidden, hidden, 1, False, TOKENS, ROWS, COLUMNS
    )
    value += tl.load(bias + column, mask=is_column, other=0.0)[None, :]
    if CHOICE:
        for k in range(top_k):
            expert = tl.load(ids + token * top_k + k, mask=here, other=-1).to(tl.int32)
            known = (expert >= 0) & (expert < num_experts)
            weight = tl.load(weights + token * top_k + k, mask=known, other=0.0).to(tl.float32)
            row = tl.load(
                choice + expert[:, None] * hidden + column[None, :],
                mask=known[:, None] & is_column[None, :],
                other=0.0,
            )
            value += weight[:, None] * row
    mask = here[:, None] & is_column[None, :]
    tl.store(h + token[:, None] * hidden + column[None, :], _gelu(value), mask=mask)
    if TRUST and tl.program_id(0) == 0:
        all = tl.arange(0, PADDED)
        is_one = all < compressed
        state = tl.load(
            f + token[:, None] * compressed + all[None, :], mask=here[:, None] & is_one[None, :], other=0.0
        )
        distance = tl.sum(state * state * tl.load(whiten + all, mask=is_one, other=0.0)[None, :], 1)
        share_T = tl.minimum(tl.load(trust) / tl.where(here, distance, 1.0), 1.0)
        tl.store(share + token, share_T, mask=here)


@triton.jit
def _open_block(  # type: ignore[no-untyped-def]
    h, up, up_bias, gate, gate_bias, out, num_tokens, hidden, block,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out (T, B) = sigmoid(h @ gate + its bias) * gelu(h @ up + its bias)."""
    token = tl.arange(0, TOKENS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = column < block
    update = _product(h, h, up, column, num_tokens, hidden, block, block, 1, False, TOKENS, ROWS, COLUMNS)
    update = _gelu(update + tl.load(up_bias + column, mask=is_column, other=0.0)[None, :])
    open = _product(h, h, gate, column, num_tokens, hidden, block, block, 1, False, TOKENS, ROWS, COLUMNS)
    open = tl.sigmoid(open + tl.load(gate_bias + column, mask=is_column, other=0.0)[None, :])
    mask = (token < num_tokens)[:, None] & is_column[None, :]
    tl.store(out + token[:, None] * block + column[None, :], open * update, mask=mask)


@triton.jit
def _close_block(  # type: ignore[no-untyped-def]
    inner, down, h, num_tokens, hidden, block,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """h (T, H) += inner (T, B) @ down."""
    token = tl.arange(0, TOKENS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = column < hidden
    value = _product(
        inner, inner, down, column, num_tokens, block, hidden, hidden, 1, False, TOKENS, ROWS, COLUMNS
    )
    place = h + token[:, None] * hidden + column[None, :]
    mask = (token < num_tokens)[:, None] & is_column[None, :]
    tl.store(place, tl.load(place, mask=mask, other=0.0) + value, mask=mask)


@triton.jit
def _judge(  # type: ignore[no-untyped-def]
    h, share, base, head, head_bias, skip, z_out, num_tokens, hidden, num_experts, num_outputs, num_ahead,
    RESIDUAL: tl.constexpr, TRUST: tl.constexpr, EXPERTS: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """z_out (T, num_ahead, E): logits, before they are compared within a token and scaled."""
    token = tl.arange(0, TOKENS)
    here = token < num_tokens
    ahead = tl.program_id(1)
    expert = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    is_expert = expert < num_experts
    # Beyond the layer's own experts the head's next columns are another layer's: read, and never stored.
    column = ahead * num_experts + expert
    z = _product(
        h, h, head, column, num_tokens, hidden, num_outputs, num_outputs, 1, False, TOKENS, ROWS, COLUMNS
    )
    if TRUST:
        z *= tl.load(share + token, mask=here, other=1.0)[:, None]
    z += tl.load(head_bias + column, mask=is_expert, other=0.0)[None, :]
    if RESIDUAL:
        all = tl.arange(0, EXPERTS)
        row = base + token[:, None] * (num_ahead * num_experts) + ahead * num_experts
        mask = here[:, None] & (all < num_experts)[None, :]
        values = tl.load(row + all[None, :], mask=mask, other=-float("inf"))
        values = tl.where(here[:, None], values, 0.0)
        most = tl.max(values, 1)
        total = most + tl.log(tl.sum(tl.exp(values - most[:, None]), 1))
        mine = tl.load(row + expert[None, :], mask=here[:, None] & is_expert[None, :], other=0.0)
        z += tl.load(skip + column, mask=is_expert, other=0.0)[None, :] * (mine - total[:, None])
    place = z_out + token[:, None] * (num_ahead * num_experts) + column[None, :]
    tl.store(place, z, mask=here[:, None] & is_expert[None, :])


@triton.jit
def _scale(  # type: ignore[no-untyped-def]
    z_in, share, platt, faded, out, num_tokens, num_experts, num_ahead, top_k,
    TRUST: tl.constexpr, RELATIVE: tl.constexpr, ALL: tl.constexpr, EXPERTS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """out (d, 2, E): expected tokens and probability that any uses an expert; zero beyond the last layer."""
    token = tl.arange(0, TOKENS)
    here = token < num_tokens
    ahead = tl.program_id(0)
    expert = tl.arange(0, EXPERTS)
    is_expert = expert < num_experts
    target = out + ahead * 2 * num_experts + expert
    if ahead >= num_ahead:
        tl.store(target, tl.zeros((EXPERTS,), tl.float32), mask=is_expert)
        tl.store(target + num_experts, tl.zeros((EXPERTS,), tl.float32), mask=is_expert)
    else:
        both = here[:, None] & is_expert[None, :]
        place = z_in + token[:, None] * (num_ahead * num_experts) + ahead * num_experts + expert[None, :]
        z = tl.load(place, mask=both, other=-float("inf"))
        z = tl.where(here[:, None], z, 0.0)
        if RELATIVE and ALL:
            z -= tl.min(tl.where(is_expert[None, :], z, float("inf")), 1)[:, None] - 1.0
        elif RELATIVE:
            # As `baselines.above_threshold`: the best is taken out K times, one at a time, whatever is tied.
            rest = z
            last = tl.max(rest, 1)
            for _ in range(top_k):
                last = tl.max(rest, 1)
                at = tl.argmax(rest, 1)
                rest = tl.where(expert[None, :] == at[:, None], -float("inf"), rest)
            z -= (0.5 * (last + tl.max(rest, 1)))[:, None]
        scale, offset = tl.load(platt + 2 * ahead), tl.load(platt + 2 * ahead + 1)
        scale_T = tl.zeros((TOKENS,), tl.float32) + scale
        offset_T = tl.zeros((TOKENS,), tl.float32) + offset
        if TRUST:
            counts = tl.load(share + token, mask=here, other=1.0)
            scale_0, offset_0 = tl.load(faded + 2 * ahead), tl.load(faded + 2 * ahead + 1)
            scale_T = scale_0 + counts * (scale - scale_0)
            offset_T = offset_0 + counts * (offset - offset_0)
        p = tl.where(both, tl.sigmoid(offset_T[:, None] + scale_T[:, None] * z), 0.0)
        tl.store(target, tl.sum(p, 0), mask=is_expert)
        tl.store(target + num_experts, 1.0 - tl.reduce(1.0 - p, 0, _times), mask=is_expert)


class Networks(Protocol):
    """What is read of a `Llapor`."""

    config: LlaporConfig
    shape: MoEShape
    groups: LayerGroups
    tensors: dict[str, torch.Tensor]

    def check_live(self, x_TD: torch.Tensor, ids_TK: torch.Tensor | None) -> None:
        """Raises BadState where `Llapor.predict` would."""
        ...


class LlaporKernels:
    """A predictor's networks on a GPU.

    Args:
        predictor: on that GPU; its tensors are read anew at each call.
        lookahead: layers ahead that are asked for, d.
    """

    #: With more, a layer waits for experts anyway, and torch's matrix products are the better ones. At 8 tokens 38 us
    #: against 152 (H200); what it takes at 16 was not measured by itself.
    most_tokens = 16

    def __init__(self, predictor: Networks, lookahead: int) -> None:
        self._predictor, self._lookahead = predictor, lookahead

    def __call__(
        self, moe_layer: int, x_TD: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> torch.Tensor:
        """(d, 2, E) float32: expected tokens, and probability that any uses an expert, for the next d layers.

        Args:
            x_TD: router inputs of at most `most_tokens` tokens. `ids_TK`, `weights_TK`: what the layer chose.

        Raises:
            BadState: as `Llapor.predict`.
        """
        predictor, d = self._predictor, self._lookahead
        predictor.check_live(x_TD, ids_TK)
        config, t, E = predictor.config, predictor.tensors, predictor.shape.num_experts
        T, D = x_TD.shape
        num_ahead = min(d, predictor.shape.num_layers - 1 - moe_layer)
        out = torch.empty((d, 2, E), dtype=torch.float32, device=x_TD.device)
        if num_ahead <= 0:
            return out.zero_()
        x_TD, K = x_TD.contiguous(), ids_TK.shape[1]
        P, H, N = t["pca"].shape[2], config.hidden, config.lookahead * E
        tokens = triton.next_power_of_2(T)
        sizes = {
            "TOKENS": tokens,
            "ROWS": max(16, (FEW_PRODUCTS if tokens < 8 else PRODUCTS) // (COLUMNS * tokens)),
            "COLUMNS": COLUMNS,
            "num_warps": 8,
        }
        has_trust = config.residual and config.trust > 0
        f, h, share = (torch.empty((T, n), dtype=torch.float32, device=x_TD.device) for n in (P, H, 1))
        base, num_base = f, 0
        router, bias = t["pca"], t["pca"]  # not looked at
        if config.residual:
            num_base = num_ahead * E
            base = torch.empty((T, num_base), dtype=torch.float32, device=x_TD.device)
            router, bias = t["router"][moe_layer + 1 :], t["router_bias"][moe_layer + 1 :]

        def programs(columns: int) -> int:
            return triton.cdiv(columns, COLUMNS)

        _project[(programs(P) + programs(num_base),)](
            x_TD,
            t["pca_mean"][moe_layer],
            t["pca"][moe_layer],
            router,
            bias,
            f,
            base,
            T,
            D,
            P,
            num_base,
            **sizes,
        )
        _hide[(programs(H),)](
            f, ids_TK.contiguous(), weights_TK.contiguous(), t["in"][moe_layer], t["in_bias"][moe_layer],
            t["choice"][moe_layer] if config.use_choice else f, t["whiten"][moe_layer],
            t["trust"][moe_layer] if has_trust else f, h, share, T, P, H, E, K,
            CHOICE=config.use_choice, TRUST=has_trust, PADDED=triton.next_power_of_2(P), **sizes,
        )  # fmt: skip
        if moe_layer in predictor.groups.middle:
            i, B = moe_layer - predictor.groups.middle.start, config.block
            inner = torch.empty((T, B), dtype=torch.float32, device=x_TD.device)
            _open_block[(programs(B),)](
                h, t["up"][i], t["up_bias"][i], t["gate"][i], t["gate_bias"][i], inner, T, H, B, **sizes
            )
            _close_block[(programs(H),)](inner, t["down"][i], h, T, H, B, **sizes)
        z = torch.empty((T, num_ahead * E), dtype=torch.float32, device=x_TD.device)
        _judge[(programs(E), num_ahead)](
            h, share, base, t["head"][moe_layer], t["head_bias"][moe_layer],
            t["skip"][moe_layer] if config.residual else f, z, T, H, E, N, num_ahead,
            RESIDUAL=config.residual, TRUST=has_trust, EXPERTS=triton.next_power_of_2(E), **sizes,
        )  # fmt: skip
        _scale[(d,)](
            z, share, t["platt"][moe_layer], t["platt_faded"][moe_layer] if config.residual else f, out,
            T, E, num_ahead, predictor.shape.top_k, TRUST=has_trust,
            RELATIVE=config.relative, ALL=predictor.shape.top_k >= E,
            EXPERTS=triton.next_power_of_2(E), TOKENS=tokens, num_warps=4,
        )  # fmt: skip
        return out
