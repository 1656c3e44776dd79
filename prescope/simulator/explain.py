"""Why an expert went where it went: one layer of one step, replayed up to its decision.

The layers before it run through the simulator's own loop; nothing is needed after them, so that slots and link stay
as they were for the decision. Shapes: S steps, L MoE layers, E experts, n experts needed, d layers ahead.
"""

from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ..cache.residency import ResidencyTable
from ..core.types import Reason
from ..errors import UnsupportedOption
from ..scheduler import SCHEDULES
from ..scheduler.costs import compiled_costs
from ..scheduler.presched import cpu_done, share_alone
from ..scheduler.types import Costs, cpu_time
from .replay import AHEAD, AT_LAYER, DECIDED, DONE, KEY, LATE, LOOKED, ON_CPU, REASON, STEP
from .result import SimResult
from .simulator import Simulator

#: Where an expert was when its layer needed it.
IN_SLOT, ON_LINK, ON_HOST = WHERE = ("in its slot", "on the link", "in host memory")


class LayerExplanation(NamedTuple):
    """One layer of one step.

    Attributes:
        experts: one row an expert, needed or prefetched: expert, tokens, was, decision, reason (`core.types.Reason`),
            by_link_us, by_cpu_us, predicted.
        splits: one row for each number of experts that the link could have brought, late ones before misses: copied,
            waited, on_cpu, link_us, gpu_us, cpu_us, layer_us, chosen. Without prefetches for the next layer, which
            PreSched weighs too.
        backlog_us: until the link was done with what it had been given before.
        layer_us: from the decision to the end of the layer.
        words: the decision in one sentence.
    """

    step: int
    moe_layer: int
    experts: pd.DataFrame
    splits: pd.DataFrame
    backlog_us: float
    layer_us: float
    words: str
    label: str


def explain_layer(
    simulator: Simulator,
    result: SimResult,
    step: int,
    moe_layer: int,
    frequencies: NDArray[np.floating] | None = None,
) -> LayerExplanation:
    """Where each expert of one layer of one step went, and what was weighed.

    Args:
        result: of this simulator, by these `frequencies`.

    Raises:
        UnsupportedOption: the trace has no such decode step, or the model no such layer.
    """
    found = np.flatnonzero(simulator.needs.steps == step)
    if not len(found) or not 0 <= moe_layer < simulator.shape.num_layers:
        steps = simulator.needs.steps
        raise UnsupportedOption(
            f"step {step}, MoE layer {moe_layer}: there are decode steps {steps[0]} to {steps[-1]} and layers 0 to "
            f"{simulator.shape.num_layers - 1}"
        )
    s, log, config = int(found[0]), result.log, result.config
    costs = compiled_costs(simulator.costs, cpu=config["cpu"], predicts=config["lookahead"] > 0)
    slot_of_E, link_free_us = _before(simulator, result, s, moe_layer, frequencies)
    late = _late(result, s, moe_layer, slot_of_E, simulator.needs.tokens_SLE[s, moe_layer])
    decided = float(log.times_us[s, moe_layer, DECIDED])
    backlog = max(0.0, link_free_us - float(log.times_us[s, moe_layer, LOOKED]))
    experts = _experts(simulator, result, s, moe_layer, slot_of_E, late)
    is_missing = (experts["was"] == ON_HOST) & (experts["tokens"] > 0)
    missing = experts[is_missing & ~experts["expert"].isin(list(late))]
    hits = int(((experts["was"] == IN_SLOT) & (experts["tokens"] > 0)).sum())
    tokens = missing["tokens"].to_numpy().astype(np.int64)
    by_link, by_cpu = _each(costs, tokens, hits + len(late), backlog)
    experts.loc[missing.index, "by_link_us"], experts.loc[missing.index, "by_cpu_us"] = by_link, by_cpu
    num_cpu = int(log.counts[s, moe_layer, ON_CPU])
    late_tokens = simulator.needs.tokens_SLE[s, moe_layer][list(late)].astype(np.int64)
    splits = splits_of(
        costs, np.concatenate([late_tokens, tokens]), hits, list(late.values()), backlog,
        len(late) + len(tokens) - num_cpu,
    )  # fmt: skip
    return LayerExplanation(
        step,
        moe_layer,
        experts,
        splits,
        backlog,
        float(log.times_us[s, moe_layer, DONE]) - decided,
        _words(result, experts, splits, num_cpu),
        result.label,
    )


class _UpToHere(Simulator):
    """A simulator after whose last decision nothing is needed and nothing predicted: slots and link stay as it found
    them.

    Args:
        whole: the simulator of the result. `s`, `layer`: step and layer of the decision.
    """

    def __init__(self, whole: Simulator, s: int, layer: int) -> None:
        self.__dict__.update(whole.__dict__)
        self.needs = whole.needs.until(s, layer)
        self.predictions = whole.predictions.until(s, layer)
        self._segments = [
            (prefills, slice(steps.start, min(steps.stop, s + 1)))
            for prefills, steps in whole._segments
            if steps.start <= s
        ]

    def _prefill(self, table: ResidencyTable, *args: Any, **keywords: Any) -> None:
        self.slot_of = table.slot_of  # the table that the replay goes on with
        super()._prefill(table, *args, **keywords)


def _before(
    simulator: Simulator, result: SimResult, s: int, layer: int, frequencies: NDArray[np.floating] | None
) -> tuple[NDArray[np.int64], float]:
    """Slot of each expert of a layer, and when the link is done, as the layer's decision found them."""
    config, E = result.config, simulator.shape.num_experts
    kept = ("cache", "lookahead", "width", "threshold", "cpu", "most_in_flight")
    part = _UpToHere(simulator, s, layer)
    settings = {name: config[name] for name in kept}
    log = part.run(config["schedule"], slots=config["num_slots"], frequencies=frequencies, **settings).log
    before = log.copies[:, STEP] < s
    # Streaming goes on whatever is needed.
    before |= (log.copies[:, AT_LAYER] <= layer) | (not result.streams)
    return part.slot_of[layer * E : (layer + 1) * E], float(log.copy_us[before, 1].max(initial=0.0))


def _late(
    result: SimResult, s: int, layer: int, slot_of_E: NDArray[np.int64], tokens_E: NDArray[np.integer]
) -> dict[int, float]:
    """Experts that a layer needed while their copies were on the link, the first to land first: how long after the
    host had looked.
    """
    log, looked = result.log, float(result.log.times_us[s, layer, LOOKED])
    on_link = (
        (log.copies[:, REASON] == AHEAD) & (log.copies[:, AT_LAYER] == layer) & (log.copies[:, STEP] <= s)
    )
    on_link &= log.copy_us[:, 1] > looked
    return {
        expert: end - looked
        for expert, end in zip(
            (log.copies[on_link, KEY] % len(slot_of_E)).tolist(),
            log.copy_us[on_link, 1].tolist(),
            strict=True,
        )
        if tokens_E[expert] and (slot_of_E[expert] >= 0 or result.streams)
    }


def _experts(
    simulator: Simulator,
    result: SimResult,
    s: int,
    layer: int,
    slot_of_E: NDArray[np.int64],
    late: dict[int, float],
) -> pd.DataFrame:
    """One row an expert: those needed, by where they were and by tokens, then those prefetched in vain."""
    E, log = simulator.shape.num_experts, result.log
    why_ahead = str(Reason.STREAM if result.streams else Reason.PREFETCH)
    needed = dict(zip(*(part.tolist() for part in simulator.needs.at(s, layer)), strict=True))
    looked = log.times_us[s, layer, LOOKED]
    mine = (log.copies[:, STEP] == s) & (log.copies[:, AT_LAYER] == layer)
    ahead = mine & (log.copies[:, REASON] == AHEAD)
    landing = dict(zip((log.copies[ahead, KEY] % E).tolist(), log.copy_us[ahead, 1].tolist(), strict=True))
    waited = list(late)[: int(log.counts[s, layer, LATE])]
    demanded = set((log.copies[mine & ~ahead, KEY] % E).tolist())
    used = simulator.predictions.of(slice(s, s + 1)).used_dSLE[:1, 0, layer]  # what its prefetches went by
    rows = []
    for expert in sorted(needed.keys() | landing.keys()):
        tokens = needed.get(expert, 0)
        was = IN_SLOT if slot_of_E[expert] >= 0 else ON_HOST
        # Streaming decides without predictions, so that its slots are not those of this decision; it has no CPU lane.
        gone = was == ON_HOST and not result.streams
        if expert in demanded:
            was, decision, reason = ON_HOST, "copied on demand", str(Reason.ON_DEMAND)
        elif expert in late and expert not in waited:
            was, reason = ON_HOST, str(Reason.CPU)
            decision = f"computed on the CPU: copied ahead, {late[expert]:,.0f} us late"
        elif expert in late:
            was, decision, reason = ON_LINK, f"copied ahead, {late[expert]:,.0f} us late", why_ahead
        elif expert in landing and not (tokens and gone):
            was = ON_LINK if landing[expert] > looked else IN_SLOT
            wait = f"{landing[expert] - looked:,.0f} us late" if was == ON_LINK else "in time"
            decision, reason = f"copied ahead, {wait}" if tokens else "copied ahead, not needed", why_ahead
        elif gone:
            decision, reason = "computed on the CPU", str(Reason.CPU)
        else:
            was, decision, reason = IN_SLOT, "used where it was", ""
        predicted = float(used[0, expert]) if len(used) and layer else float("nan")
        rows.append((expert, tokens, was, decision, reason, np.nan, np.nan, predicted))
    columns = ["expert", "tokens", "was", "decision", "reason", "by_link_us", "by_cpu_us", "predicted"]
    frame = pd.DataFrame(rows, columns=columns)
    order = np.lexsort(
        (frame["expert"], -frame["tokens"], frame["was"].map(WHERE.index), frame["tokens"] == 0)
    )
    return frame.iloc[order].reset_index(drop=True)


def _each(
    costs: Costs, tokens: NDArray[np.int64], here: int, backlog_us: float
) -> tuple[list[float], list[float]]:
    """When each miss, most tokens first, would be done over the link behind those before it, or on the CPU with those
    behind it.
    """
    by_link = [backlog_us + j * costs.link_us + (here + j) * costs.gpu_us for j in range(1, len(tokens) + 1)]
    if len(costs.cpu_us) < 2:
        return by_link, [float("nan")] * len(tokens)
    each = np.array([cpu_time(costs.cpu_us, n) for n in tokens.tolist()])
    return by_link, (costs.cpu_base_us + each[::-1].cumsum()[::-1]).tolist() if len(each) else []


def splits_of(
    costs: Costs, tokens: NDArray[np.int64], hits: int, late_us: list[float], backlog_us: float, chosen: int
) -> pd.DataFrame:
    """What each split of a layer's experts without bytes would take by itself: T(k, 0) of `scheduler.presched`, one row
    a k.

    Args:
        tokens: of the late ones, the first to land first, then of the misses, descending. `hits`: other experts needed.
        late_us: when the late ones land.
        chosen: experts that the link brought.
    """
    n, late, has_cpu = len(tokens), len(late_us), len(costs.cpu_us) > 1
    rows = []
    for linked in range(0 if has_cpu else n, n + 1):
        copied, waited = max(0, linked - late), min(linked, late)
        link = backlog_us + copied * (costs.link_us if linked == n else costs.link_busy_us)
        there = link if copied else late_us[linked - 1] if linked else 0.0
        gpu = (hits + linked) * costs.gpu_us + there
        beside, alone = (
            costs.cpu_base_us + sum(cpu_time(cpu_us, t) for t in tokens[linked:].tolist())
            if linked < n
            else 0.0
            for cpu_us in (costs.cpu_us, costs.cpu_alone_us)
        )
        cpu = cpu_done(beside, share_alone(beside, alone), link)
        rows.append((copied, waited, n - linked, there, gpu, cpu, max(gpu, cpu), linked == chosen))
    columns = ["copied", "waited", "on_cpu", "link_us", "gpu_us", "cpu_us", "layer_us", "chosen"]
    return pd.DataFrame(rows, columns=columns)


def _words(result: SimResult, experts: pd.DataFrame, splits: pd.DataFrame, num_cpu: int) -> str:
    title = SCHEDULES[result.config["schedule"]].title
    needed = experts[experts["tokens"] > 0]
    where = needed["was"].value_counts()
    text = (
        f"{title}: of {len(needed)} experts needed, {where.get(IN_SLOT, 0)} in their slots, {where.get(ON_LINK, 0)} "
        f"on the link, {where.get(ON_HOST, 0)} in host memory"
    )
    misses = int(where.get(ON_HOST, 0))
    if not misses:
        return text + "; nothing to decide"
    best = splits.loc[splits["layer_us"].idxmin()]
    taken = splits[splits["chosen"]].iloc[0]
    text += f"; {misses - num_cpu} copied, {num_cpu} on the CPU: {taken['layer_us']:,.0f} us"
    if len(splits) > 1 and best["copied"] != taken["copied"]:
        text += f" (alone, the layer would be done sooner with {best['copied']:.0f} copied: {best['layer_us']:,.0f} us)"
    return text
