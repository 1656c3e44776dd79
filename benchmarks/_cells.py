"""The cells of the laboratory: links x shapes x batches x shares of slots x predictors, and every schedule in each.

Costs are the shipped H200 profile's, slower links emulated; what it does not know of a shape is stated below. Traces
are synthetic, their habits drawn from printed seeds, or the recorded run that comes with prescope.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from prescope.core.types import MoEShape
from prescope.predictor import NoisyOracle, Oracle, Predictor, RecordedPredictor
from prescope.profile import HardwareProfile
from prescope.scheduler import SCHEDULES
from prescope.scheduler.costs import LayerCosts
from prescope.simulator import SimResult, Simulator, as_decode
from prescope.simulator.recording import Recording
from prescope.simulator.replay import AHEAD, DECIDED, DONE, FETCHED, GPU_DONE, MISSES, ON_CPU, REASON
from prescope.traces.events import PHASES
from prescope.traces.routing import RoutingTrace
from prescope.traces.synthetic import SyntheticSpec

CONFIGS = Path(__file__).resolve().parents[1] / "data/configs"
#: How often the H200's link makes each copy.
LINKS = {"PCIe 5": 1, "PCIe 4": 2, "PCIe 3": 4}
SHAPES = {
    "qwen3": "qwen3-30b-a3b",
    "mixtral": "mixtral-8x7b-v0.1",
    "olmoe": "olmoe-1b-7b",
    "glm": "glm-4.5-air",
}
#: The rest of a layer, us, for shapes that no engine was measured with: between those of the two that were.
STATED_REST_US = 180.0
#: Batch -> decode steps.
STEPS = {1: 96, 8: 48, 16: 40, 64: 24}
SLOTS = (0.25, 0.5, 0.75)
#: Recall of the shipped recording's predictors on text that they were not trained on.
RECALL = {
    "early router": {1: 0.743, 2: 0.650, 3: 0.569, 4: 0.508},
    "LLaPor": {1: 0.830, 2: 0.779, 3: 0.737, 4: 0.699},
}
PREDICTORS = ("none", *RECALL, "oracle")
#: One prediction on the H200, us (the recording's).
PREDICT_US = 21.0
RECORDED = "recorded"
#: As it ran, and its three sequences side by side, from empty slots.
RECORDED_BATCHES = (1, 3)
#: One of so many parts of the recorded steps says what is hot, the others are replayed.
PARTS = 3


class Task(NamedTuple):
    """All cells of one trace behind one link."""

    link: str
    shape: str
    batch: int


@dataclass(frozen=True)
class Text:
    """A trace with what is known of it before it runs."""

    trace: RoutingTrace
    frequencies: np.ndarray  # of another run, or of other steps of it: never of what is replayed
    predictors: dict[str, Predictor | None]
    habits: str


def tasks(batches: tuple[int, ...], shapes: tuple[str, ...], links: tuple[str, ...]) -> list[Task]:
    """In a fixed order, so that parts of one grid fit together."""
    return [
        Task(link, shape, batch)
        for shape in shapes
        for batch in (RECORDED_BATCHES if shape == RECORDED else batches)
        for link in links
    ]


@cache
def text_of(shape: str, batch: int, seed: int) -> Text:
    """The trace of a shape and batch: its habits are drawn by the seed, or it is the recorded one."""
    if shape == RECORDED:
        return _recorded(batch)
    config = config_of(shape)
    rng = np.random.default_rng([seed, list(SHAPES).index(shape), batch])
    zipf, persistence, correlation, diversity = rng.uniform((0.1, 0.0, 0.0, 0.1), (1.1, 0.6, 0.5, 0.9))
    spec = SyntheticSpec(
        num_layers=config["moe_layers"],
        num_experts=config["num_experts"],
        top_k=config["num_experts_per_tok"],
        zipf=round(zipf, 2),
        persistence=round(persistence, 2),
        correlation=round(correlation, 2),
        diversity=round(diversity, 2),
        seed=seed,
    )
    trace = spec.generate(prompt_tokens=48, new_tokens=STEPS[batch] + 1, batch=batch, seed=1)
    other = spec.generate(prompt_tokens=48, new_tokens=33, batch=16, seed=2).expert_counts()
    return Text(trace, other, _emulated(trace), str(spec))


def _recorded(batch: int) -> Text:
    """The recorded run without its first part, which tells every schedule alike what is hot, as another run would.

    Told the counts of the very text that is replayed, fixed sets knew what came: they were 2 to 6 % ahead at batch 3.
    """
    recording = Recording.load("medium.b1")
    if batch > 1:
        before, trace = _parts(as_decode(recording.trace, batch))
        habits = f"{trace.model}, its sequences side by side, slots empty at first"
        predictors = _emulated(trace)
    else:
        before, trace = _parts(recording.trace)
        habits = f"{trace.model}, as recorded"
        known = {one.name: _of_part(one, recording.trace, trace) for one in recording.predictors}
        named = {"early router": known["early router"], "LLaPor": known["llapor"]}
        predictors = {"none": None, **named, "oracle": Oracle(trace.shape, 4)}
    told = f"; its first {len(before.steps)} of {len(before.steps) + len(trace.steps)} steps give the frequencies"
    return Text(trace, before.expert_counts(), predictors, habits + told)


def _parts(trace: RoutingTrace) -> tuple[RoutingTrace, RoutingTrace]:
    """What gives the frequencies, and what is replayed: at batch 1 the first of three texts and the two others, side
    by side about as many tokens as their prompts have and what follows.
    """
    end = len(trace.steps) // PARTS
    return trace.select(steps=trace.steps[:end]), trace.select(steps=trace.steps[end:])


def _of_part(predictor: RecordedPredictor, whole: RoutingTrace, part: RoutingTrace) -> RecordedPredictor:
    """What was said of a trace, of the decode steps of its last rows alone."""
    is_decode = part.phase == PHASES.index("decode")
    scores = [
        predictor.replay(whole, ahead)[-len(part) :][is_decode] for ahead in range(1, predictor.lookahead + 1)
    ]
    return RecordedPredictor.of_scores(
        part, scores, name=predictor.name, is_calibrated=predictor.is_calibrated
    )


def _emulated(trace: RoutingTrace) -> dict[str, Predictor | None]:
    made: dict[str, Predictor | None] = {"none": None}
    for name, recall in RECALL.items():
        made[name] = NoisyOracle(trace, recall, seed=3)
    return {**made, "oracle": Oracle(trace.shape, 4)}


@cache
def config_of(shape: str) -> dict[str, Any]:
    """A published model's sizes."""
    config: dict[str, Any] = json.loads((CONFIGS / f"{SHAPES[shape]}.json").read_text())
    return config


def costs_of(task: Task, trace: RoutingTrace) -> tuple[LayerCosts, int]:
    """One layer's costs behind a link, and the bytes of an expert."""
    factor = LINKS[task.link]
    profile = HardwareProfile.load("h200")
    profile = profile if factor == 1 else profile.emulated(factor, task.link)
    if task.shape == RECORDED:
        nbytes, width, expert_width = 12582912, 2048, 1024
    else:
        config = config_of(task.shape)
        nbytes = config["derived"]["bytes_per_expert_native"]
        width, expert_width = config["hidden_size"], config["moe_intermediate_size"]
    shape = MoEShape(trace.num_layers, trace.num_experts, trace.top_k, nbytes)
    rest = None if task.shape in ("qwen3", "mixtral") else STATED_REST_US
    costs = profile.costs(shape, width=width, expert_width=expert_width, batch=task.batch, rest_us=rest)
    # The profile times eight experts at once, which a launch hides: an engine learns some us.
    return replace(costs, gpu_us=max(costs.gpu_us, 2e-7 * nbytes)), nbytes


def measure(task: Task, seed: int, schedules: tuple[str, ...] = tuple(SCHEDULES)) -> Iterator[dict[str, Any]]:
    """One row for each share of slots, predictor and schedule."""
    text = text_of(task.shape, task.batch, seed)
    costs, nbytes = costs_of(task, text.trace)
    blind: dict[tuple[str, float], SimResult] = {}
    for name, predictor in text.predictors.items():
        told = costs if predictor is None else costs.with_predictor(PREDICT_US)
        simulator = Simulator(text.trace, told, row_bytes=nbytes, predictor=predictor)
        for slots in SLOTS:
            for schedule in schedules:
                is_blind = SCHEDULES[schedule].predictor == "none"
                run = blind.get((schedule, slots)) if is_blind else None
                if run is None:
                    run = simulator.run(schedule, slots=slots, frequencies=text.frequencies)
                    if is_blind:
                        blind[schedule, slots] = run
                yield {
                    **task._asdict(),
                    "slots": slots,
                    "predictor": name,
                    "schedule": schedule,
                    "row_bytes": nbytes,
                    **facts(run),
                }


def facts(run: SimResult) -> dict[str, float]:
    """Speed, and what a step waited for, ms."""
    log, steps = run.log, len(run.log.step_end_us)
    times, counts = log.times_us, log.counts
    waits = times[..., FETCHED] - times[..., DECIDED]
    demands = counts[..., MISSES] > counts[..., ON_CPU]
    ahead = int((log.copies[:, REASON] == AHEAD).sum())
    used = int(counts[..., -1].sum())
    return {
        "tokens_per_s": run.tokens_per_s,
        "late_ms": float(waits[~demands].sum()) / steps / 1e3,
        "demand_ms": float(waits[demands].sum()) / steps / 1e3,
        "cpu_ms": float((times[..., DONE] - times[..., GPU_DONE]).sum()) / steps / 1e3,
        "hits": float(run.counts.hits / max(1, run.counts.needed)),
        "prefetches": ahead / steps,
        "wasted": max(0, ahead - used) / steps,
        "on_demand": run.counts.on_demand / steps,
        "on_cpu": run.counts.on_cpu / steps,
    }
