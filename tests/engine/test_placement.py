"""Experts that a schedule has in slots from the start: there before a run, put back behind each prompt."""

import numpy as np
import pytest

import prescope
from prescope.cache.frequencies import behind_prompt, repeats_of, scatter_of
from prescope.cache.policies import by_frequency
from prescope.scheduler.costs import LayerCosts
from prescope.simulator import Simulator
from prescope.traces.events import LAYER_DTYPES
from tests.support.models import EXPERTS, LAYERS, plain_tokens, prompt, tiny_moe

pytestmark = pytest.mark.filterwarnings("ignore:experts on the CPU run on torch")
#: The CPU is so much sooner done that nothing is worth a copy.
COSTS = LayerCosts(
    link_us=1e6, gpu_us=5.0, rest_us=200.0, cpu_us=(0.0, 10.0, 12.0, 14.0), source="made up for a test"
)
SLOTS = 9


@pytest.fixture(scope="module")
def model():
    return tiny_moe()


@pytest.fixture(scope="module")
def frequencies():
    return np.random.default_rng(0).random((LAYERS, EXPERTS))


def hot(engine) -> set[int]:
    return set(by_frequency(engine.frequencies)[-engine.num_slots :].tolist())


def held(engine) -> set[int]:
    return set(engine.runner.residency.key_of.tolist())


@pytest.mark.parametrize("schedule", ["static-split", "fiddler"])
@pytest.mark.parametrize(("device", "batch"), [("null", 1), ("null", 3), ("cpu", 1)])
def test_the_hot_experts_are_there_from_the_start_and_decode_steps_leave_them(
    model, frequencies, schedule, device, batch
):
    """Layer by layer the accounts are the simulator's, since nothing depends on time."""
    ids = prompt(batch=batch)
    with prescope.attach(
        model,
        schedule=schedule,
        slots=SLOTS,
        device=device,
        costs=COSTS,
        cpu_threads=1,
        frequencies=frequencies,
    ) as engine:
        assert held(engine) == hot(engine)
        run = engine.generate(ids, max_new_tokens=8)
        assert run.tokens == plain_tokens(model, ids, new=8)
        assert held(engine) == hot(engine)
        engine.check_integrity()
    decode = run.layers[run.layers["phase"] == "decode"].reset_index(drop=True)
    copies = run.events[(run.events["lane"] == "h2d") & (run.events["phase"] == "decode")]
    assert len(copies) == 0 and (decode["on_cpu"] == decode["misses"]).all() and decode["on_cpu"].any()
    simulated = Simulator(run.trace, COSTS, row_bytes=engine.shape.row_bytes).run(
        schedule, slots=SLOTS, frequencies=frequencies
    )
    for column in LAYER_DTYPES.keys() - {"phase"}:
        assert simulated.layers[column].tolist() == decode[column].tolist(), column
    assert simulated.notes == []


def test_presched_begins_with_the_hot_experts_where_they_are_known_and_with_none_elsewhere(
    model, frequencies
):
    """In the simulator alike, which tells it of no future: only what lives on a fixed set is told the trace's own."""
    ids = prompt()
    for known in (frequencies, None):
        with prescope.attach(
            model,
            schedule="presched",
            slots=SLOTS,
            device="null",
            costs=COSTS,
            cpu_threads=1,
            frequencies=known,
        ) as engine:
            assert held(engine) == ({-1} if known is None else hot(engine))
            run = engine.generate(ids, max_new_tokens=8)
            assert run.tokens == plain_tokens(model, ids, new=8)
            engine.check_integrity()
            simulator = Simulator(run.trace, COSTS, row_bytes=engine.shape.row_bytes)
        simulated = simulator.run("presched", slots=SLOTS, frequencies=known)
        assert not any("hindsight" in note for note in simulated.notes)
        decode = run.layers[run.layers["phase"] == "decode"].reset_index(drop=True)
        first = decode["step"] == decode["step"].min()
        assert simulated.layers.loc[first, "hits"].sum() == decode.loc[first, "hits"].sum()


def test_behind_a_prompt_presched_has_in_slots_what_the_prompt_says_too(model, frequencies):
    """Each prompt says it anew; the simulator finds each expert of the first step where the engine does."""
    with prescope.attach(
        model,
        schedule="presched",
        slots=SLOTS,
        device="null",
        costs=COSTS,
        cpu_threads=1,
        frequencies=frequencies,
    ) as engine:
        seen = []
        for seed in (1, 2):
            ids = prompt(length=1, seed=seed).repeat(1, 30)
            run = engine.generate(ids, max_new_tokens=8)
            trace = run.trace.select(phase="prefill")
            layers = trace.expert_ids.transpose(1, 0, 2)
            scatter = scatter_of([repeats_of(ids_TK, trace.num_experts) for ids_TK in layers])
            mixed = behind_prompt(engine.frequencies, trace.expert_counts().astype(float), scatter)
            belong = set(by_frequency(mixed)[-SLOTS:].tolist())
            assert set(engine.runner.residency.placed.tolist()) == belong != hot(engine)
            seen.append(belong)
            simulator = Simulator(run.trace, COSTS, row_bytes=engine.shape.row_bytes)
            for _ in range(2):  # remembered or walked through again
                simulated = simulator.run("presched", slots=SLOTS, frequencies=frequencies)
                decode = run.layers[run.layers["phase"] == "decode"].reset_index(drop=True)
                first = decode["step"] == decode["step"].min()
                assert simulated.layers.loc[first, "hits"].tolist() == decode.loc[first, "hits"].tolist()
        assert seen[0] != seen[1]
        engine.configure(slots=SLOTS)
        assert held(engine) == hot(engine), "before a run no prompt has said anything"


def test_what_a_prompt_has_pushed_out_is_put_back_behind_it(model, frequencies):
    with prescope.attach(
        model,
        schedule="static-split",
        slots=SLOTS,
        device="null",
        costs=COSTS,
        cpu_threads=1,
        frequencies=frequencies,
    ) as engine:
        engine.clear_cache()
        assert held(engine) == {-1}, "cold is cold"
        run = engine.generate(prompt(batch=4, length=30), max_new_tokens=2)
        assert held(engine) == hot(engine)
        back = run.events[(run.events["lane"] == "h2d") & (run.events["reason"] == "stream")]
        assert len(back) and (back["phase"] == "prefill").all()


def test_another_schedule_has_nothing_put_back(model, frequencies):
    ids = prompt(batch=4, length=30)
    with prescope.attach(
        model,
        schedule="fiddler",
        slots=SLOTS,
        device="null",
        costs=COSTS,
        cpu_threads=1,
        frequencies=frequencies,
    ) as engine:
        engine.configure(schedule="on-demand", cache="lru")
        engine.generate(ids, max_new_tokens=2)
        assert held(engine) != hot(engine)
        engine.configure(schedule="static-split", slots=SLOTS - 2)
        assert held(engine) == hot(engine) and len(hot(engine)) == SLOTS - 2


def test_without_frequencies_nothing_is_placed_and_the_run_says_why(model):
    with prescope.attach(
        model, schedule="static-split", slots=SLOTS, device="null", costs=COSTS, cpu_threads=1
    ) as engine:
        assert held(engine) == {-1}
        run = engine.generate(prompt(), max_new_tokens=3)
    assert any("frequencies" in note for note in run.notes)


def test_hindsight_is_said_where_the_simulator_was_told_no_frequencies(model, frequencies):
    with prescope.attach(model, slots=SLOTS, device="null", decode="layered") as engine:
        run = engine.generate(prompt(), max_new_tokens=3)
    simulator = Simulator(run.trace, COSTS, row_bytes=engine.shape.row_bytes)
    for cache in (None, "lru"):
        assert any("hindsight" in note for note in simulator.run("fiddler", slots=SLOTS, cache=cache).notes)
    assert simulator.run("fiddler", slots=SLOTS, frequencies=frequencies).notes == []
