"""Time of an engine's layers without their experts, and of a decision, from recorded runs."""

import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pandas as pd

from ..core.types import DEVICE_DRIVERS, ExpertSize
from ..engine.engine import Engine
from ..profile import Circumstances, Point
from ..profile.curves import fit_line
from ..scheduler.costs import decide_us_of
from ..traces.result import RunResult

BATCHES = (1, 8, 64)
PROMPT_TOKENS, NEW_TOKENS = 8, 12


def layer_points(
    engine: Engine, expert: ExpertSize, *, deadline: float, tell: Callable[[str], None]
) -> list[Point]:
    """Points "rest" and "decide" of decode steps of random tokens, by batch; fewer batches as `deadline` nears.

    Routing does not matter here, and neither does the text. Steps run as the engine's settings say; where the GPU
    decides, which tells nothing of the host, they are run again with the host deciding.

    Args:
        expert: the sizes the points are kept under.
        deadline: by `time.perf_counter`; the first batch is run whatever it says.
    """
    points: list[Point] = []
    on_device: list[int] = []
    for batch, run in _runs(engine, BATCHES, deadline, tell):
        points += rest_points(run, expert, batch)
        if run.driver in DEVICE_DRIVERS:
            on_device.append(batch)
        else:
            points += decide_points(run, expert, batch)
    if on_device:
        former = engine.config.decode
        engine.configure(decode="host-driven")
        try:
            for batch, run in _runs(engine, on_device, deadline, tell):
                points += decide_points(run, expert, batch)
        finally:
            engine.configure(decode=former)
    return points


def _runs(
    engine: Engine, batches: Sequence[int], deadline: float, tell: Callable[[str], None]
) -> Iterator[tuple[int, RunResult]]:
    """A warm run of each batch, and its batch."""
    rng = np.random.default_rng(0)
    vocabulary = engine.model.config.get_text_config().vocab_size
    for batch in batches:
        tell(f"{engine.name or 'the engine'}, batch {batch}")
        started = time.perf_counter()
        prompts = rng.integers(0, vocabulary, (batch, PROMPT_TOKENS)).tolist()
        for _ in range(2):  # the first one captures, compiles and tunes
            run = engine.generate(prompts, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS)
        yield batch, run
        now = time.perf_counter()
        if now + (now - started) > deadline:  # the next batch takes as long at least
            return


def rest_points(run: RunResult, expert: ExpertSize, batch: int) -> list[Point]:
    """Point "rest" of a run's decode steps; none without a timeline."""
    of = Circumstances("rest", False, *expert, tokens=batch)
    events = run.events[run.events["phase"] == "decode"]
    if events.empty:
        return []
    num_layers = run.layers["moe_layer"].nunique()
    by_step = events[events["kind"] == "dense"].groupby("step")["dur_us"].sum() / num_layers
    return [_point(of, by_step)] if by_step.median() > 0 else []


def decide_points(run: RunResult, expert: ExpertSize, batch: int) -> list[Point]:
    """Point "decide" of a run's decode steps, if the host decided and some layers missed experts."""
    of = Circumstances("decide", False, *expert, tokens=batch)
    if run.driver == "host-driven":
        num, us = int(run.metrics.decode.num_steps), decide_us_of(run)
    else:
        waits = _waits(run)
        num, us = len(waits), _before_first_copy(waits)
    return [Point(of, us, 0.0, num)] if us > 0 else []


def _point(of: Circumstances, times: pd.Series) -> Point:
    median = float(times.median())
    spread = float((times.max() - times.min()) / median)
    return Point(of, median, spread, len(times))


def _waits(run: RunResult) -> pd.DataFrame:
    """Of steps that ran layer by layer, the wait of each layer that missed experts and found none late: columns misses,
    us. The host reads, decides and enqueues before the stall begins.
    """
    events = run.events[run.events["phase"] == "decode"]
    layers = run.layers[run.layers["phase"] == "decode"]
    us = events[events["kind"].isin(["stall", "host_wait"])].groupby(["step", "moe_layer"])["dur_us"].sum()
    clean = layers[(layers["misses"] > 0) & (layers["late"] == 0) & (layers["rounds"] == 1)]
    waits = clean.set_index(["step", "moe_layer"])[["misses"]].join(us.rename("us"), how="inner")
    return waits[waits["us"] > 0]


def _before_first_copy(waits: pd.DataFrame) -> float:
    """The part of a wait that does not grow with the number of misses, from the median wait of each number."""
    medians = waits.groupby("misses")["us"].median()
    return fit_line(medians.index.tolist(), medians.tolist()).base_us if len(medians) > 1 else 0.0
