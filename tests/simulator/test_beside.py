"""What runs say of experts on the CPU: the simulator's own runs, so that the truth is known."""

from dataclasses import replace

import numpy as np
import pytest

from prescope.scheduler.costs import LayerCosts
from prescope.simulator import Simulator
from prescope.simulator.beside import beside_as_in
from prescope.traces.synthetic import SyntheticSpec

TRUE = LayerCosts(
    link_us=170.0, link_busy_us=210.0, gpu_us=4.0, rest_us=200.0, decide_us=40.0, copy_us=7.0,
    cpu_us=(0.0, *(102.0 + 2 * n for n in range(1, 17))), cpu_alone_us=(0.0, *(82.0 + 2 * n for n in range(1, 17))),
    cpu_base_us=60.0, source="made up",
)  # fmt: skip
MERGE_US = 10.0
SPEC = SyntheticSpec(
    num_layers=8, num_experts=32, top_k=4, zipf=0.5, persistence=0.3, correlation=0.3, diversity=0.5
)
TRACE = SPEC.generate(prompt_tokens=8, new_tokens=48, batch=2, seed=0)


def scaled(costs: LayerCosts, factor: float, base_us: float) -> LayerCosts:
    return replace(
        costs,
        cpu_us=tuple(factor * us for us in costs.cpu_us),
        cpu_alone_us=tuple(factor * us for us in costs.cpu_alone_us),
        cpu_base_us=base_us,
    )


def run(schedule: str):
    return Simulator(TRACE, TRUE, row_bytes=9_400_000).run(schedule, slots=96)


@pytest.mark.parametrize("schedule", ["static-split", "hybrimoe"])
def test_a_cpu_that_was_calibrated_asleep_is_as_fast_as_it_was_in_a_run(schedule):
    """Whether copies ran beside it (HybriMoE-like) or not (static split)."""
    known = scaled(TRUE, 1.7, 5.0 * TRUE.cpu_base_us)
    found = beside_as_in([run(schedule)], known, MERGE_US)
    for name in ("cpu_us", "cpu_alone_us"):
        assert getattr(found, name)[1:] == pytest.approx(getattr(TRUE, name)[1:], rel=0.1)
    assert found.source == "made up, as fast as in 1 run of the engine"
    assert found.cpu_base_us - MERGE_US == pytest.approx(TRUE.cpu_base_us, abs=20.0)
    unchanged = {
        "cpu_us": (),
        "cpu_alone_us": (),
        "cpu_base_us": 0.0,
        "link_busy_us": None,
        "spread": known.spread,
        "source": "",
    }
    assert replace(found, **unchanged) == replace(known, **unchanged)


def test_copies_beside_the_cpu_say_what_they_take_there():
    """Copies of the same length in all: not those that it computed beside for a while only."""
    found = beside_as_in([run("hybrimoe")], replace(TRUE, link_busy_us=171.0), MERGE_US)
    assert found.link_busy_us == pytest.approx(TRUE.link_busy_us)


def test_a_cpu_that_varies_from_step_to_step_widens_the_interval():
    one = run("static-split")
    steps = one.events["step"].to_numpy()
    slower = np.where((one.events["lane"] == "cpu") & (steps % 2 == 0), 1.5, 1.0)
    events = one.events.assign(dur_us=one.events["dur_us"] * slower)
    tables = type("Run", (), {"events": events, "layers": one.layers, "metrics": one.metrics})
    steady, varying = (beside_as_in([run], TRUE, MERGE_US) for run in (one, tables()))
    assert steady.spread.cpu < 0.05 < 0.15 < varying.spread.cpu
    assert varying.spread._replace(cpu=0.0) == TRUE.spread._replace(cpu=0.0)


@pytest.mark.parametrize("runs", [[], ["on-demand"]])
def test_runs_that_computed_nothing_on_the_cpu_say_nothing(runs):
    assert beside_as_in([run(one) for one in runs], TRUE, MERGE_US) is TRUE
