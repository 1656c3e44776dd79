"""The walk through a layer: every expert is copied before it is computed, once, and nothing stays protected."""

import numpy as np
import pytest

from prescope.cache.policies import make_policy
from prescope.cache.residency import ResidencyTable
from prescope.cache.rounds import What, next_is_sure, walk
from prescope.core.types import MoEShape, Reason

SHAPE = MoEShape(num_layers=2, num_experts=64, top_k=2, row_bytes=1024)


def walked(table: ResidencyTable, experts: np.ndarray, following=None, layer: int = 0):
    """A layer's acts; whoever reads a slot finds its expert there."""
    need = table.need(layer, experts, np.ones_like(experts), np.ones(len(experts)))
    acts = []
    for act in walk(
        table, need, table.rounds(need), following if next_is_sure(need, SHAPE.num_experts) else None
    ):
        if act.what is What.COMPUTE:
            table.landed(act.slots)
            assert (table.key_of[act.slots] == act.moe_layer * SHAPE.num_experts + act.experts).all()
        acts.append(act)
    return need, acts


def experts_of(acts, what: What, layer: int) -> list[int]:
    return sorted(
        e for act in acts if act.what is what and act.moe_layer == layer for e in act.experts.tolist()
    )


@pytest.mark.parametrize("num_slots", [2, 5, 16, 40, 128])
@pytest.mark.parametrize("num_needed", [1, 6, 30, 64])
def test_a_layer_is_computed_once_whatever_fits(num_slots, num_needed):
    rng = np.random.default_rng(num_slots + num_needed)
    table = ResidencyTable(SHAPE, num_slots, make_policy("lru", SHAPE))
    for _ in range(6):
        experts = np.sort(rng.permutation(64)[:num_needed])
        need, acts = walked(table, experts)
        assert experts_of(acts, What.COMPUTE, 0) == experts.tolist()
        missing = sorted(need.experts[need.num_hits + need.num_late :].tolist())
        assert set(missing) <= set(experts_of(acts, What.COPY, 0))
        kinds = [act.what for act in acts]
        first = next(act for act in acts if act.what is What.COMPUTE)
        before = {e for act in acts[: kinds.index(What.COMPUTE)] for e in act.experts.tolist()}
        absent = set(first.experts.tolist()) & set(missing)
        assert absent <= before, "all of the first round's copies come before it is computed"
        assert not table.protected.any()
        table.check_integrity()


@pytest.mark.parametrize(("num_slots", "streamed"), [(128, 32), (80, 20), (16, 4), (2, 0)])
def test_a_long_prompts_next_layer_is_begun_with_a_quarter_of_the_slots(num_slots, streamed):
    table = ResidencyTable(SHAPE, num_slots, make_policy("lru", SHAPE))
    _, acts = walked(table, np.arange(64), following=(1, 64))
    assert experts_of(acts, What.COPY, 1) == list(range(streamed))
    assert {act.reason for act in acts if act.moe_layer == 1} <= {Reason.STREAM}
    table.landed(np.arange(num_slots))
    _, acts = walked(table, np.arange(32), following=(1, 64))
    assert not experts_of(acts, What.COPY, 1), "half of its experts say nothing of the next one's"
