"""Fewest misses: what trying every state of the slots finds, on traces of every kind."""

from itertools import combinations

import numpy as np
import pytest

from prescope.traces.bounds import belady_misses, decode_misses
from prescope.traces.routing import RoutingTrace


def trace_of(seed: int) -> RoutingTrace:
    """One to three texts of one or two sequences: layers that need more experts than there are slots, and none."""
    rng = np.random.default_rng(seed)
    num_layers, num_experts = int(rng.integers(1, 3)), int(rng.integers(2, 4))
    top_k = int(rng.integers(1, num_experts + 1))
    ids, steps, sequences, phases = [], [], [], []
    for text in range(int(rng.integers(1, 4))):
        batch = int(rng.integers(1, 3))
        for i in range(1 + int(rng.integers(1, 4))):
            for sequence in range(batch):
                drawn = [rng.permutation(num_experts)[:top_k] for _ in range(num_layers)]
                ids.append(np.where(rng.random((num_layers, top_k)) < 0.2, -1, drawn))
                steps.append(100 * text + i)
                sequences.append(10 * text + sequence)
                phases.append(min(i, 1))
    chosen = np.array(ids)
    return RoutingTrace(
        expert_ids=chosen, weights=np.where(chosen < 0, 0.0, 1.0), step=np.array(steps), sequence=np.array(sequences),
        position=np.arange(len(ids)), phase=np.array(phases), model="made up", fingerprint="0",
        num_experts=num_experts, top_k=top_k, decoder_layers=list(range(num_layers)),
    )  # fmt: skip


def fewest_by_trying(
    trace: RoutingTrace, num_slots: int, bypass: bool, placed: bool, *, in_rounds: bool
) -> int:
    """The least of all ways to fill the slots behind each layer, prompts free.

    Args:
        in_rounds: a layer's experts may make room for one another; else only where all slots do not hold them.
    """
    everything = range(trace.num_layers * trace.num_experts)
    groups = [(list(everything), True)] if placed else []
    for step in trace.steps:
        is_prompt = trace.phase[np.searchsorted(trace.step, step)] == 0
        for need in trace.needed(step):
            keys = (need.moe_layer * trace.num_experts + need.experts).tolist()
            groups.append((keys, bool(is_prompt)))
        if is_prompt and placed:
            groups.append((list(everything), True))
    states = {frozenset[int](): 0}
    for keys, is_free in groups:
        after: dict[frozenset[int], int] = {}
        for state, cost in states.items():
            missed = set(keys) - state
            pool = sorted(state | set(keys))
            for kept in map(frozenset, combinations(pool, min(num_slots, len(pool)))):
                if missed and not bypass and not is_free and not missed & kept:
                    continue  # the last one that was loaded is in a slot
                used = set(keys) & state if bypass else set(keys)
                if not in_rounds and not is_free and len(keys) <= num_slots and not used <= kept:
                    continue
                total = cost + (0 if is_free else len(missed))
                after[kept] = min(total, after.get(kept, total))
        states = after
    return min(states.values())


def belady(trace: RoutingTrace, num_slots: int, bypass: bool) -> int:
    """By the book: at each miss the resident whose next need is farthest away goes."""
    keys = [
        need.moe_layer * trace.num_experts + int(expert)
        for step in trace.steps
        for need in trace.needed(step)
        for expert in need.experts
    ]
    resident: set[int] = set()
    misses = 0
    for i, key in enumerate(keys):
        if key in resident:
            continue
        misses += 1

        def distance(one: int, after: int = i) -> int:
            return next((j for j in range(after + 1, len(keys)) if keys[j] == one), len(keys))

        if len(resident) == num_slots:
            farthest = max(sorted(resident), key=distance)
            if bypass and distance(key) >= distance(farthest):
                continue
            resident.remove(farthest)
        resident.add(key)
    return misses


@pytest.mark.parametrize("bypass", [False, True])
@pytest.mark.parametrize("seed", range(30))
def test_beladys_misses_are_those_of_the_book(seed, bypass):
    trace = trace_of(seed)
    for num_slots in (1, 2, 3, 5):
        found = belady_misses(trace, num_slots, bypass=bypass)
        assert found.misses_prefill + found.misses_decode == belady(trace, num_slots, bypass)


@pytest.mark.parametrize("bypass", [False, True])
@pytest.mark.parametrize("seed", range(30))
def test_no_way_to_fill_the_slots_misses_less(seed, bypass):
    """Counting what prompts load, or in a fixed order where slots do not hold a layer, some caches beat "Belady"."""
    trace = trace_of(seed)
    for num_slots in (1, 2, 3):
        for placed in (False, True):
            found = decode_misses(trace, num_slots, bypass=bypass, placed=placed)
            most, least = (
                fewest_by_trying(trace, num_slots, bypass, placed, in_rounds=in_rounds)
                for in_rounds in (False, True)
            )
            assert least <= found <= most


def test_a_prompt_that_needs_all_of_a_layer_may_bring_any_of_the_next():
    """Its first experts are copied ahead of its router, and may be those that the text needs later."""
    ids = np.array([[[0, 1], [0, -1]], [[0, 1], [1, -1]]])
    trace = RoutingTrace(
        expert_ids=ids, weights=np.where(ids < 0, 0.0, 1.0), step=np.arange(2), sequence=np.zeros(2, int),
        position=np.arange(2), phase=np.arange(2), model="made up", fingerprint="0", num_experts=2, top_k=2,
        decoder_layers=[0, 1],
    )  # fmt: skip
    assert decode_misses(trace, 4) == 1
    assert decode_misses(trace, 4, sure_share=1.0) == 0
    assert decode_misses(trace, 2, sure_share=1.0) == 1


def test_slots_that_are_warm_are_counted_on_where_the_run_before_had_layers_without_experts():
    """Its needs are numbered by step and layer, whether a layer has any or none."""
    trace = trace_of(3)
    everywhere = belady_misses(trace, trace.num_layers * trace.num_experts, before=trace)
    assert (everywhere.misses_prefill, everywhere.misses_decode) == (0, 0)
