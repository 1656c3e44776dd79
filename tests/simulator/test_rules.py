"""Engine and simulator decide alike to the last expert, where the times are the stated ones (`virtual_clock`)."""

import pytest

import prescope
from prescope.predictor import NoisyOracle
from prescope.scheduler import SCHEDULES
from prescope.scheduler.costs import LayerCosts
from prescope.simulator import Simulator
from prescope.traces.events import LAYER_DTYPES
from tests.support.models import prompt, tiny_moe
from tests.support.virtual_clock import virtual_clock

#: A layer takes as long as the copy of an expert, so that some prefetches land in time, some late and some not at all.
COSTS = LayerCosts(
    link_us=1000.0, gpu_us=50.0, rest_us=700.0, decide_us=100.0, cpu_base_us=100.0,
    cpu_us=(0.0, *(400.0 + 100.0 * n for n in range(1, 17))), is_layered=True, source="stated for a test",
)  # fmt: skip
ROW_BYTES, NEW = 9216, 8

#: Schedules that between them prefetch, copy on demand, stream whole layers and compute on the CPU.
QUICK = ("on-demand", "streaming", "hybrimoe", "presched")


@pytest.fixture(scope="module")
def runs():
    """Engine on a virtual clock; its run on demand and what an oracle that errs says of it, by batch."""
    with virtual_clock(COSTS), prescope.attach(tiny_moe(), device="null", decode="layered") as engine:
        assert engine.shape.row_bytes == ROW_BYTES
        traces = {}
        for batch in (1, 3, 8):
            traces[batch] = engine.generate(prompt(batch=batch), max_new_tokens=NEW).trace
        simulators = {
            batch: Simulator(
                trace, COSTS, row_bytes=ROW_BYTES, predictor=NoisyOracle(trace, {1: 0.8, 2: 0.6}), lookahead=2
            )
            for batch, trace in traces.items()
        }
        yield engine, simulators


def compare(engine, simulator, batch, schedule, **settings):
    """The layer tables of both, and the ms they took."""
    frequencies, cpu = simulator.trace.expert_counts(), settings.pop("cpu", False)
    engine.force_routing(None)
    engine.configure(
        schedule=schedule, costs=COSTS, frequencies=frequencies, predictor=simulator.predictor,
        cpu_threads=None if cpu else 0, **settings,
    )  # fmt: skip
    engine.force_routing(simulator.trace, simulator.predicted.forced())
    run = engine.generate(prompt(batch=batch), max_new_tokens=NEW)
    engine.force_routing(None)
    replayed = simulator.run(schedule, cpu=cpu, frequencies=frequencies, least_bytes=0, **settings)
    measured = run.layers[run.layers["phase"] == "decode"].reset_index(drop=True)
    for column in LAYER_DTYPES.keys() - {"phase"}:
        assert replayed.layers[column].tolist() == measured[column].tolist(), (column, batch, settings)
    assert replayed.total_us / 1e3 == pytest.approx(run.metrics.decode.wall_ms, rel=2e-3)
    return replayed


@pytest.mark.parametrize(
    "schedule",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in SCHEDULES],
)
def test_the_simulator_finds_each_expert_where_the_engine_does(runs, schedule):
    """With and without CPU lane, at any batch and number of slots: what is in its slot, late, missing, prefetched."""
    engine, simulators = runs
    late = 0
    for batch, simulator in simulators.items():
        for slots in (6, 14):
            for cpu in {False, SCHEDULES[schedule].uses_cpu}:
                late += compare(engine, simulator, batch, schedule, slots=slots, cpu=cpu).counts.late
    has_prefetches = schedule in ("streaming", "klotski", "fate", "hybrimoe", "moe-infinity", "presched")
    assert (late > 0) == has_prefetches, "some prefetches come late, or the clocks were not compared"


@pytest.mark.parametrize("cache", ["lfu", "score", "static", "next-use", "shallow", "arc"])
def test_so_it_does_under_any_cache_policy(runs, cache):
    engine, simulators = runs
    for batch, simulator in simulators.items():
        compare(engine, simulator, batch, "presched", slots=8, cache=cache, cpu=True)
