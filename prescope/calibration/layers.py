"""Time of an engine's layers without their experts, and of a decision, from recorded runs."""

import time
from collections.abc import Callable

import numpy as np
import pandas as pd

from ..core.types import ExpertSize
from ..engine.engine import Engine
from ..profile import Circumstances, Point
from ..profile.curves import fit_line
from ..traces.result import RunResult

BATCHES = (1, 8, 64)
PROMPT_TOKENS, NEW_TOKENS = 8, 12


def layer_points(
    engine: Engine, expert: ExpertSize, *, deadline: float, tell: Callable[[str], None]
) -> list[Point]:
    """Points "rest" and "decide" of decode steps of random tokens, by batch; fewer batches as `deadline` nears.

    Routing does not matter here, and neither does the text. Steps run as the engine's settings say.

    Args:
        expert: the sizes the points are kept under.
        deadline: by `time.perf_counter`; the first batch is run whatever it says.
    """
    rng = np.random.default_rng(0)
    vocabulary = engine.model.config.get_text_config().vocab_size
    points: list[Point] = []
    for batch in BATCHES:
        tell(f"{engine.name or 'the engine'}, batch {batch}")
        started = time.perf_counter()
        prompts = rng.integers(0, vocabulary, (batch, PROMPT_TOKENS)).tolist()
        for _ in range(2):  # the first one captures, compiles and tunes
            run = engine.generate(prompts, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS)
        points += points_of(run, expert, batch)
        now = time.perf_counter()
        if now + (now - started) > deadline:  # the next batch takes as long at least
            break
    return points


def points_of(run: RunResult, expert: ExpertSize, batch: int) -> list[Point]:
    """Point "rest" and, if some layers missed experts, "decide" of a run's decode steps."""
    of = Circumstances("rest", False, *expert, tokens=batch)
    events = run.events[run.events["phase"] == "decode"]
    layers = run.layers[run.layers["phase"] == "decode"]
    if events.empty or layers.empty:
        return []
    num_layers = layers["moe_layer"].nunique()
    by_step = events[events["kind"] == "dense"].groupby("step")["dur_us"].sum() / num_layers
    points = [_point(of, by_step)] if by_step.median() > 0 else []
    is_layered = str(run.config.get("reasons", {}).get("decode", "")).startswith("layered")
    waits = _waits(events, layers, is_layered)
    base_us = _before_first_copy(waits)
    if base_us > 0:
        points.append(Point(of._replace(kind="decide"), base_us, 0.0, len(waits)))
    return points


def _point(of: Circumstances, times: pd.Series) -> Point:
    median = float(times.median())
    spread = float((times.max() - times.min()) / median)
    return Point(of, median, spread, len(times))


def _waits(events: pd.DataFrame, layers: pd.DataFrame, is_layered: bool) -> pd.DataFrame:
    """Wait of each layer that missed experts and found none late: columns misses, us.

    Layer by layer the host reads, decides and enqueues before the stall begins; in a graph what stands before it is
    the look-up, which is counted with the experts.
    """
    kinds = ["stall", "host_wait"] if is_layered else ["stall"]
    us = events[events["kind"].isin(kinds)].groupby(["step", "moe_layer"])["dur_us"].sum()
    clean = layers[(layers["misses"] > 0) & (layers["late"] == 0) & (layers["rounds"] == 1)]
    waits = clean.set_index(["step", "moe_layer"])[["misses"]].join(us.rename("us"), how="inner")
    return waits[waits["us"] > 0]


def _before_first_copy(waits: pd.DataFrame) -> float:
    """The part of a wait that does not grow with the number of misses, from the median wait of each number."""
    medians = waits.groupby("misses")["us"].median()
    return fit_line(medians.index.tolist(), medians.tolist()).base_us if len(medians) > 1 else 0.0
