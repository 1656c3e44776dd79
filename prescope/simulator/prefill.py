"""The slots as a prompt leaves them: the engine's walk through a layer's rounds, without bytes and clock."""

import numpy as np
from numpy.typing import NDArray

from ..cache.residency import ResidencyTable
from ..cache.rounds import next_is_sure, walk
from ..scheduler.prompt import copies_of_prompt
from ..scheduler.types import Costs, ScheduleSettings
from ..traces.events import PREFILL
from ..traces.routing import RoutingTrace


def prefill_steps(trace: RoutingTrace) -> NDArray[np.int64]:
    """Numbers of a trace's prefill steps, ascending."""
    return np.unique(trace.step[trace.phase == PREFILL]).astype(np.int64)


def prefill(
    table: ResidencyTable, trace: RoutingTrace, step: int, settings: ScheduleSettings, costs: Costs
) -> None:
    """Walk through one prefill step; all that was copied has landed afterwards. `costs`: as calibrated."""
    first, end = np.searchsorted(trace.step, [step, step + 1])
    shape = table.shape
    table.begin_prompt()
    ids, weights = trace.expert_ids[first:end], trace.weights[first:end]
    for layer in range(shape.num_layers):
        flat = ids[:, layer].ravel().astype(np.int64)
        is_used = flat >= 0
        counts = np.bincount(flat[is_used], minlength=shape.num_experts)
        experts = np.flatnonzero(counts)
        learned = counts  # as the engine tells a policy: sums of weights if it asks for them, else tokens
        if table.policy.name == "score":
            learned = np.bincount(flat[is_used], weights[:, layer].ravel()[is_used], shape.num_experts)
        table.saw_prompt(layer, ids[:, layer])
        need = table.need(layer, experts, counts[experts], learned[experts].astype(np.float64))
        is_sure = layer + 1 < shape.num_layers and next_is_sure(need, shape.num_experts)
        need = need.without(
            need.num_misses - copies_of_prompt(settings, costs, need, table.free_share(layer))
        )
        following = (layer + 1, shape.num_experts) if is_sure else None
        for act in walk(table, need, table.rounds(need), following):
            table.landed(act.slots)
