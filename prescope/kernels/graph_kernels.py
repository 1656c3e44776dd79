"""Kernels of a captured decode step: what is needed, what is missing, which slot is given up, and the copies.

They let a whole step run from one CUDA graph. Three ways to serve misses:

*GPU-driven*: `_plan` looks up, chooses slots by the cache policy and `fetch` reads the experts from pinned host
memory, all on the GPU; the host learns what happened a step later.
*Copy-engine*: `_plan` decides as above and writes its orders into mapped host memory; the host does nothing but hand
them to the copy engine, and `_wait` lets the step go on when the last byte is there.
*Host-driven*: `_plan` writes the chosen experts there, and the host decides too, with the same code as everywhere
else: on demand for cache policies that the GPU does not know, or by a schedule. The host shows the GPU in mapped memory
which experts are in slots, and `_look` reads that for the next layer while this one computes; a layer that finds all of
its experts goes on without the host.

A read of mapped memory takes a round trip over the link, behind all that is being copied: some 26 us where the link
gave 13 GB/s (H100, docs/log/engine.md). So a layer that misses nothing waits for none, and an answer is read as a
whole.

Each layer's row of (expert) -> slot lies on the GPU, where the expert kernels look it up. Shapes: T tokens, K top-k,
P = T * K pairs, L MoE layers, E experts, S slots.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer

from ..cache.policies import LFU_KIND, LRU_KIND

#: How `_plan` serves misses: not at all (the host does), or by the policy of this number (`CachePolicy.kind`).
HOST, LRU, LFU = 0, LRU_KIND, LFU_KIND
#: Columns of `stamps`: when the routing was there, when it was decided, when the bytes were there, when it was done,
#: and when the GPU had done its part (0 without a CPU lane).
ROUTED, DECIDED, FETCHED, DONE, COMPUTED = range(5)
NUM_STAMPS = 5
#: Words of an answer in front of the layer's row of the slot table: the copy to wait for, and experts on the CPU. Every
#: word is step + 1 << 32 | its value.
HEAD = 2

#: Numbers of steps in messages run from 1 to this and over again.
NUMBERS = 32767
_NUMBERS = tl.constexpr(NUMBERS)
_POLICY_LRU = tl.constexpr(LRU)
_POLICY_LFU = tl.constexpr(LFU)
_POLICY_HOST = tl.constexpr(HOST)
_DECIDED = tl.constexpr(DECIDED)
_FETCHED = tl.constexpr(FETCHED)
_DONE = tl.constexpr(DONE)
_COMPUTED = tl.constexpr(COMPUTED)
_HEAD = tl.constexpr(HEAD)


@triton.jit
def sequence_of(step):  # type: ignore[no-untyped-def]
    """Number of a step in messages between GPU and host: never 0, so that fresh memory is no message."""
    return (step % _NUMBERS + 1).to(tl.int32)


@triton.jit
def system_fence():  # type: ignore[no-untyped-def]
    """What was written before is seen by the host before what is written, and read, behind."""
    tl.inline_asm_elementwise("fence.sc.sys; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _plan(  # type: ignore[no-untyped-def]
    ids, weights, slot_of, key_of, scores, tick, step,
    log_ids, log_weights, needs, stamps, ask, orders, fetch_expert, fetch_slot, used_mark,
    first_key, num_pairs, num_experts, num_slots,
    POLICY: tl.constexpr, ORDERS: tl.constexpr, FENCE: tl.constexpr, ALWAYS: tl.constexpr,
    PAIRS: tl.constexpr, EXPERTS: tl.constexpr, SLOTS: tl.constexpr, TIMED: tl.constexpr,
):  # fmt: skip
    """One program per layer. `ids` (P,), `slot_of` and `scores` (L * E,), `key_of` (S,); the rest per layer."""
    if TIMED:
        tl.store(stamps, globaltimer())
    pair = tl.arange(0, PAIRS)
    here = pair < num_pairs
    id = tl.load(ids + pair, mask=here, other=-1).to(tl.int32)
    known = here & (id >= 0) & (id < num_experts)
    tl.store(log_ids + pair, tl.where(known, id, -1), mask=here)
    weight = tl.load(weights + pair, mask=here, other=0.0).to(tl.float32)
    tl.store(log_weights + pair, weight, mask=here)
    expert = tl.arange(0, EXPERTS)
    # Ids of no expert are counted in the last bin: EXPERTS > num_experts.
    counts = tl.histogram(tl.where(known, id, EXPERTS - 1), EXPERTS)
    used = (counts > 0) & (expert < num_experts)
    place_of = tl.load(slot_of + first_key + expert, mask=used, other=0)
    missing = used & (place_of < 0)
    num_missing = tl.sum(missing.to(tl.int32))
    tl.store(needs, tl.sum(used.to(tl.int32)))
    tl.store(needs + 1, num_missing)
    if POLICY == _POLICY_HOST:
        if FENCE and (ALWAYS or num_missing > 0):
            # The router's inputs, which an earlier kernel wrote to the host, are there before the question.
            system_fence()
        # The step's number in every word: the host knows a message is whole without any order between stores.
        bits = weight.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
        place = tl.where(known, id, 0xFFFF).to(tl.int64) & 0xFFFF
        tl.store(
            ask + pair, (sequence_of(tl.load(step)).to(tl.int64) << 48) | (place << 32) | bits, mask=here
        )
    else:
        if ORDERS:
            number = sequence_of(tl.load(step)).to(tl.int64) << 48
            tl.store(orders, number | num_missing)
        now = tl.load(tick) + 1
        tl.store(tick, now)
        # As in `cache.policies.learn`, to the bit: hits are counted alike on both sides.
        use = now.to(tl.float64) + expert.to(tl.float64) / num_experts
        if POLICY == _POLICY_LRU:
            tl.store(scores + first_key + expert, use, mask=used)
        elif POLICY == _POLICY_LFU:
            old = tl.load(scores + first_key + expert, mask=used, other=0.0)
            tl.store(scores + first_key + expert, tl.floor(old) + 1.0 + use / (use + 1e9), mask=used)
        if num_missing > 0:
            place = tl.cumsum(missing.to(tl.int32)) - 1
            tl.store(fetch_expert + place, expert, mask=missing)
            tl.store(used_mark + expert, used.to(tl.int32))
            tl.debug_barrier()
            slot = tl.arange(0, SLOTS)
            in_pool = slot < num_slots
            key = tl.load(key_of + slot, mask=in_pool, other=-1)
            owned = key >= 0
            score = tl.load(scores + key, mask=owned, other=0.0)
            local = key - first_key
            mine = owned & (local >= 0) & (local < num_experts)
            is_used = tl.load(used_mark + local, mask=mine, other=0) > 0
            # Free slots go first, then the lowest score; what this layer uses is protected.
            score = tl.where(owned, score, -float("inf"))
            score = tl.where((is_used & mine) | (slot >= num_slots), float("inf"), score)
            for i in range(num_missing):
                lowest = tl.min(score)
                chosen = tl.min(tl.where(score == lowest, slot, SLOTS))
                evicted = tl.load(key_of + chosen)
                tl.store(slot_of + evicted, -1, mask=evicted >= 0)
                missed = tl.load(fetch_expert + i)
                taken = first_key + missed
                if ORDERS:
                    tl.store(orders + 1 + i, number | (missed.to(tl.int64) << 24) | chosen)
                tl.store(slot_of + taken, chosen)
                tl.store(key_of + chosen, taken)
                tl.store(fetch_slot + i, chosen)
                score = tl.where(slot == chosen, float("inf"), score)
    if TIMED:
        tl.store(stamps + _DECIDED, globaltimer())


@triton.jit
def fetch(  # type: ignore[no-untyped-def]
    rows, pool, needs, fetch_expert, fetch_slot, stamps, row_words, slot_words,
    BLOCK: tl.constexpr, TIMED: tl.constexpr,
):  # fmt: skip
    """Copy missing experts, one after the other, by all programs together; words are int64."""
    parts = tl.cdiv(row_words, BLOCK)
    total = tl.load(needs + 1) * parts
    for part in range(tl.program_id(0), total, tl.num_programs(0)):
        i = part // parts
        expert = tl.load(fetch_expert + i).to(tl.int64)
        slot = tl.load(fetch_slot + i).to(tl.int64)
        word = (part % parts) * BLOCK + tl.arange(0, BLOCK)
        mask = word < row_words
        tl.store(
            pool + slot * slot_words + word, tl.load(rows + expert * row_words + word, mask=mask), mask=mask
        )
    if TIMED:
        tl.atomic_max(stamps + _FETCHED, globaltimer())


@triton.jit
def _wait(needs, step, ack, stamps, TIMED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Wait for the bytes, if any are missing: `ack` is copied by the H2D stream behind them."""
    if tl.load(needs + 1) > 0:
        # The step itself, not its number: an old acknowledgement must not answer when numbers come round again. One of
        # a later step does: a run that was interrupted is answered to its end while an earlier step still waits.
        number = (tl.load(step) + 1).to(tl.int32)
        while tl.atomic_add(ack, 0, sem="acquire") < number:
            pass
    if TIMED:
        tl.store(stamps + _FETCHED, globaltimer())


@triton.jit
def _await_served(served, step):  # type: ignore[no-untyped-def]
    """Wait until the host has served all layers of the step before, and so has read their messages."""
    number = tl.load(step).to(tl.int32)
    while tl.load(served, volatile=True) < number:
        pass


@triton.jit
def _look(  # type: ignore[no-untyped-def]
    shown, looked, slot_of, step, num_experts, FENCE: tl.constexpr, EXPERTS: tl.constexpr
):
    """Read which of a coming layer's experts are shown, (E,) in mapped host memory, to its row of the slot table.

    To give up an expert's slot, the host first hides the expert in `shown`, then checks whether `looked` has the step's
    number. This kernel first writes that number, then reads `shown`. So either the layer sees that the expert is gone,
    or the host sees that it may be in use and leaves it there, as long as each side's write comes before its read.
    """
    tl.store(looked, sequence_of(tl.load(step)).to(tl.int64))
    if FENCE:
        system_fence()
    tl.debug_barrier()  # reads below come after this word
    expert = tl.arange(0, EXPERTS)
    mask = expert < num_experts
    tl.store(slot_of + expert, tl.load(shown + expert, mask=mask, other=-1, volatile=True), mask=mask)


@triton.jit
def _await_answer(  # type: ignore[no-untyped-def]
    needs, step, landed, answer, slot_of, on_cpu, stamps, num_experts, WORDS: tl.constexpr, TIMED: tl.constexpr
):  # fmt: skip
    """If experts are missing, wait for the host's answer, take over its row of the slot table (E,), then wait for the
    bytes it names.

    `answer` lies in mapped host memory: HEAD words, then the row. `landed` counts copies: the H2D stream copies a
    copy's number there behind its bytes. `on_cpu`: how many experts the CPU computes.
    """
    is_due = tl.load(needs + 1) > 0
    last, num_on_cpu = 0, 0
    if is_due:
        number = tl.load(step) + 1
        word = tl.arange(0, WORDS)
        mask = word < num_experts + _HEAD
        # All words at each look: whichever comes late, none is read a second time.
        message = tl.load(answer + word, mask=mask, other=0, volatile=True)
        while tl.min(tl.where(mask, message >> 32, number)) < number:
            message = tl.load(answer + word, mask=mask, other=0, volatile=True)
        value = message.to(tl.int32)
        tl.store(slot_of + word - _HEAD, value, mask=mask & (word >= _HEAD))
        last = tl.sum(tl.where(word == 0, value, 0))
        num_on_cpu = tl.sum(tl.where(word == 1, value, 0))
    tl.store(on_cpu, num_on_cpu)
    if TIMED:
        tl.store(stamps + _DECIDED, globaltimer())
    if is_due:
        while tl.atomic_add(landed, 0, sem="acquire") < last:
            pass
    if TIMED:
        tl.store(stamps + _FETCHED, globaltimer())


@triton.jit
def _await_cpu(on_cpu, step, flag, stamps, TIMED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Wait for the CPU's experts, if the answer named any; `flag` in mapped host memory is set to the step's number."""
    if TIMED:
        tl.store(stamps + _COMPUTED, globaltimer())
    if tl.load(on_cpu) > 0:
        number = (tl.load(step) + 1).to(tl.int32)
        while tl.load(flag, volatile=True) < number:
            pass


@triton.jit
def _to_host(source, target, num_words, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Copy to mapped host memory."""
    word = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = word < num_words
    tl.store(target + word, tl.load(source + word, mask=mask), mask=mask)


@triton.jit
def _keep_inputs(source, ring, step, num_values, stride, RING: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Copy a layer's router inputs to the step's place in mapped host memory, `stride` values a step."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < num_values
    place = (tl.load(step) % RING).to(tl.int64) * stride
    tl.store(ring + place + i, tl.load(source + i, mask=mask), mask=mask)


@triton.jit
def _publish_scores(scores, target, step, num_scores, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Predictions (n,) float32 to mapped host memory, the step's number in each word."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < num_scores
    bits = tl.load(scores + i, mask=mask, other=0.0).to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    tl.store(target + i, (sequence_of(tl.load(step)).to(tl.int64) << 32) | bits, mask=mask)


# Prompts of all lengths come here, and compiling takes up to seconds: once for a power of two is enough.
@triton.jit(do_not_specialize=["num_pairs", "most_blocks"])
def align(  # type: ignore[no-untyped-def]
    ids, slot_of, order, first, blocks, num_pairs, num_experts, most_blocks,
    PAIRS: tl.constexpr, EXPERTS: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Pairs sorted by expert, and tiles of BLOCK_M of them: `blocks` (most_blocks, 3): slot, first and end place."""
    pair = tl.arange(0, PAIRS)
    id = tl.load(ids + pair, mask=pair < num_pairs, other=-1).to(tl.int32)
    known = (pair < num_pairs) & (id >= 0) & (id < num_experts)
    # Those without a slot are computed on the CPU.
    known = known & (tl.load(slot_of + id, mask=known, other=-1) >= 0)
    id = tl.where(known, id, EXPERTS - 1)
    counts = tl.histogram(id, EXPERTS)
    expert = tl.arange(0, EXPERTS)
    counts = tl.where(expert < num_experts, counts, 0)
    starts = tl.cumsum(counts) - counts
    tl.store(first + expert, starts)
    block = tl.arange(0, BLOCKS)
    for column in tl.static_range(3):
        tl.store(blocks + block * 3 + column, tl.zeros((BLOCKS,), tl.int32), mask=block < most_blocks)
    key = tl.sort(id * PAIRS + pair)  # stable: the pair breaks the tie
    tl.store(order + pair, key % PAIRS, mask=pair < num_pairs)
    tl.debug_barrier()
    mine = key // PAIRS
    start = tl.load(first + mine)
    is_known = mine < num_experts
    is_head = is_known & ((pair - start) % BLOCK_M == 0)
    index = tl.cumsum(is_head.to(tl.int32)) - 1
    end = tl.minimum(pair + BLOCK_M, tl.load(first + mine + 1, mask=is_known, other=0))
    tl.store(blocks + index * 3, tl.load(slot_of + mine, mask=is_head, other=0), mask=is_head)
    tl.store(blocks + index * 3 + 1, pair, mask=is_head)
    tl.store(blocks + index * 3 + 2, end, mask=is_head)


@triton.jit
def _combine(  # type: ignore[no-untyped-def]
    pairs, weights, ids, out, stamps, slot_of, cpu_pairs, width, num_experts,
    TOP_K: tl.constexpr, ROUNDED: tl.constexpr, CPU: tl.constexpr, BLOCK: tl.constexpr, TIMED: tl.constexpr,
):  # fmt: skip
    """(T, D) sum of each token's pairs times router weights, in the order of the top-k, as `kernels.combine` does.

    ROUNDED: the product is rounded to the weights' dtype first, as torch does for two tensors of that dtype.
    CPU: pairs of experts without a slot lie in `cpu_pairs` (P, D), in mapped host memory.
    """
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(TOP_K):
        pair = token * TOP_K + k
        expert = tl.load(ids + pair)
        known = (expert >= 0) & (expert < num_experts)  # pairs without an expert were never written
        if CPU:
            here = tl.load(slot_of + expert, mask=known, other=0) >= 0
            value = tl.load(pairs + pair * width + column, mask=mask & known & here, other=0.0)
            value += tl.load(
                cpu_pairs + pair * width + column, mask=mask & known & (here == 0), other=0.0, volatile=True
            )
        else:
            value = tl.load(pairs + pair * width + column, mask=mask & known, other=0.0)
        product = value.to(tl.float32) * tl.load(weights + pair).to(tl.float32)
        if ROUNDED:
            product = product.to(pairs.dtype.element_ty).to(tl.float32)
        total += product
    tl.store(out + token * width + column, total.to(out.dtype.element_ty), mask=mask)
    if TIMED:
        tl.atomic_max(stamps + _DONE, globaltimer())


@triton.jit
def _publish(log, ring, step, num_words, RING: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Copy a step's log to its place in mapped host memory; words are int32."""
    word = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = word < num_words
    place = (tl.load(step) % RING).to(tl.int64) * num_words
    tl.store(ring + place + word, tl.load(log + word, mask=mask), mask=mask)


@triton.jit
def _finish(tokens, ring, step, num_tokens, RING: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Tell the host the step's tokens, with the step's number in each word, and count the step."""
    number = tl.load(step)
    i = tl.arange(0, BLOCK)
    mask = i < num_tokens
    token = tl.load(tokens + i, mask=mask, other=0)
    word = (sequence_of(number).to(tl.int64) << 32) | token
    tl.store(ring + (number % RING) * num_tokens + i, word, mask=mask)
    tl.store(step, number + 1)


@triton.jit
def _stamp(target):  # type: ignore[no-untyped-def]
    tl.store(target, globaltimer())
