"""Schedules in the engine: the same tokens whoever decides, layer by layer and from a graph; honest accounts."""

import ctypes
import os
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import prescope
from prescope.core.machine import this_place
from prescope.core.native import address_of
from prescope.core.types import MoEShape, NeedOutcome
from prescope.engine.graph.loop import DecodeLoop
from prescope.engine.schedule import ScheduleRunner
from prescope.errors import BadProfile, ForeignProfile, TransferFailed, UnsupportedOption
from prescope.predictor import Chance, EarlyRouter, NoisyOracle, Routers
from prescope.profile import HardwareProfile
from prescope.scheduler import SCHEDULES
from prescope.scheduler.costs import LayerCosts
from prescope.simulator.prepare import predictions_of
from prescope.traces.synthetic import SyntheticSpec
from prescope.training import Inverted
from tests.support.models import EXPERTS, LAYERS, TOP_K, plain_tokens, prompt, tiny_moe

# The compiled kernel of the CPU lane takes 16-bit floats; tokens can be compared in float32 only.
pytestmark = pytest.mark.filterwarnings("ignore:experts on the CPU run on torch")
TOTAL = LAYERS * EXPERTS
SHAPE = MoEShape(LAYERS, EXPERTS, TOP_K)
#: The link costs so much, and the CPU so little more than nothing, that both are used.
COSTS = LayerCosts(
    link_us=100.0, gpu_us=5.0, rest_us=200.0, cpu_us=(0.0, 80.0, 120.0, 160.0), cpu_base_us=10.0, decide_us=30.0,
    source="made up for a test",
)  # fmt: skip


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    """Where other processes use the GPU too, answers are late, and not by the predictor's fault."""
    monkeypatch.setattr("prescope.engine.predicting.SLOW_US", 1e9)


@pytest.fixture(scope="module")
def model():
    return tiny_moe()


@pytest.fixture(scope="module")
def early(model):
    weights = torch.stack([layer.mlp.gate.weight for layer in model.model.layers])
    return EarlyRouter(SHAPE, Routers.of_weights(weights), LAYERS - 1)


@pytest.fixture(scope="module")
def frequencies():
    return np.random.default_rng(0).random((LAYERS, EXPERTS))


def opened(model, schedule, early, frequencies, costs=COSTS, **settings):
    cache = SCHEDULES[schedule].cache
    return prescope.attach(
        model, schedule=schedule, cache=cache, predictor=early, costs=costs, frequencies=frequencies, cpu_threads=1,
        **settings,
    )  # fmt: skip


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
@pytest.mark.parametrize(("device", "batch", "slots"), [("cpu", 1, 5), ("null", 3, 9), ("null", 2, TOTAL)])
def test_tokens_are_the_plain_models_under_every_schedule(
    model, early, frequencies, schedule, device, batch, slots
):
    ids = prompt(batch=batch)
    expected = plain_tokens(model, ids, new=8)
    with opened(model, schedule, early, frequencies, device=device, slots=slots) as engine:
        for _ in range(2):
            run = engine.generate(ids, max_new_tokens=8)
            assert run.tokens == expected
            engine.check_integrity()
    layers = run.layers
    assert (layers["hits"] + layers["late"] + layers["misses"] == layers["needed"]).all()
    assert (layers["on_cpu"] <= layers["misses"]).all()
    decode = layers[layers["phase"] == "decode"]
    copies = run.events[(run.events["lane"] == "h2d") & (run.events["phase"] == "decode")]
    on_demand = int((copies["reason"] == "on_demand").sum())
    assert on_demand == int((decode["misses"] - decode["on_cpu"]).sum()), "a miss is copied or computed, once"
    if not SCHEDULES[schedule].uses_cpu:
        assert not decode["on_cpu"].any()


@pytest.mark.parametrize("schedule", ["presched", "hybrimoe", "streaming", "fate", "fiddler"])
@pytest.mark.parametrize(("batch", "slots"), [(1, 7), pytest.param(3, 13, marks=pytest.mark.slow)])
def test_a_graph_step_gives_the_plain_models_tokens_under_a_schedule(
    model,
    early,
    frequencies,
    gpu,
    schedule,
    batch,
    slots,
):
    ids = prompt(batch=batch, length=5)
    expected = plain_tokens(model, ids, new=6)
    with opened(model, schedule, early, frequencies, slots=slots, **gpu) as engine:
        for _ in range(2):
            run = engine.generate(ids, max_new_tokens=6)
            assert run.config["reasons"]["decode"].startswith("host-driven"), run.config["reasons"]["decode"]
            assert run.tokens == expected
            engine.check_integrity()
        counted = sum(engine.needs[kind] for kind in NeedOutcome)
        assert len(run.layers[run.layers["phase"] == "decode"]) == 5 * LAYERS
        assert (run.layers["hits"] + run.layers["late"] + run.layers["misses"] == run.layers["needed"]).all()
        assert counted >= run.layers["needed"].sum()


@pytest.mark.parametrize("late_link", [0, pytest.param(1, marks=pytest.mark.slow)], indirect=True)
@pytest.mark.parametrize("schedule", ["presched", "fate", "streaming"])
def test_a_graph_step_whose_copies_come_late_gives_the_plain_models_tokens(
    model, early, frequencies, gpu, late_link, schedule
):
    """The GPU runs ahead of copies that are under way, the host ahead of the GPU: no one computes with other bytes."""
    ids = prompt(length=5)
    expected = plain_tokens(model, ids, new=10)
    with opened(model, schedule, early, frequencies, slots=7, **gpu) as engine:
        for _ in range(2):
            assert engine.generate(ids, max_new_tokens=10).tokens == expected
            engine.check_integrity()
    assert late_link is None or late_link.asked_too_early, "no copy was late"


def test_a_step_does_not_begin_before_the_host_has_read_what_the_one_before_asked(
    model, early, frequencies, gpu, monkeypatch
):
    """All experts are there, so the GPU waits for nobody; the host launches the next step before it serves the last
    layer, and is slow.
    """
    ids = prompt(length=5)
    expected = plain_tokens(model, ids, new=6)
    launch = DecodeLoop._launch

    def slowly(self):
        launched = launch(self)
        time.sleep(0.5)
        return launched

    monkeypatch.setattr(DecodeLoop, "_launch", slowly)
    with opened(model, "on-demand", early, frequencies, slots=TOTAL, **gpu) as engine:
        engine.generate(ids, max_new_tokens=6)
        engine.configure(schedule="presched")
        for _ in range(2):
            run = engine.generate(ids, max_new_tokens=6)
            assert run.tokens == expected
    decode = run.layers[run.layers["phase"] == "decode"]
    assert len(decode) == 5 * LAYERS and (decode["hits"] == decode["needed"]).all()


@pytest.mark.parametrize(("decode", "count"), [("layered", 0), ("auto", 1)])
def test_threads_of_the_cpu_lane_stay_awake_in_captured_steps_only(
    model, early, frequencies, gpu, decode, count, monkeypatch
):
    told = []
    monkeypatch.setattr(ScheduleRunner, "awake", lambda self: told.append(self) or nullcontext())
    with opened(model, "presched", early, frequencies, slots=7, decode=decode, **gpu) as engine:
        engine.generate(prompt(length=5), max_new_tokens=4)
    assert len(told) == count


@pytest.mark.parametrize("decode", ["layered", "auto"])
def test_the_cache_that_knows_the_layers_order_serves_a_schedule(model, early, frequencies, gpu, decode):
    ids = prompt(batch=2, length=5)
    expected = plain_tokens(model, ids, new=5)
    with prescope.attach(
        model, schedule="presched", cache="next-use", predictor=early, costs=COSTS, cpu_threads=1, slots=9,
        decode=decode, **gpu,
    ) as engine:  # fmt: skip
        for _ in range(2):
            assert engine.generate(ids, max_new_tokens=5).tokens == expected
        engine.check_integrity()


@pytest.mark.parametrize("decode", ["layered", pytest.param("auto", marks=pytest.mark.slow)])
def test_what_the_cpu_computes_comes_into_a_slot_where_choices_last(model, gpu, decode):
    """Nothing is predicted, and the CPU is so fast that nothing is loaded on demand: hits come from such copies."""
    spec = SyntheticSpec(
        num_layers=LAYERS,
        num_experts=EXPERTS,
        top_k=TOP_K,
        zipf=0.3,
        persistence=0.97,
        correlation=0.0,
        diversity=1.0,
    )
    forced = spec.generate(prompt_tokens=5, new_tokens=24, batch=1, seed=3)
    costs = replace(COSTS, link_us=40.0, cpu_us=(0.0, 5.0, 6.0), cpu_base_us=1.0)
    tokens, layers = {}, {}
    for schedule, settings in (
        ("on-demand", {}),
        ("presched", {"costs": costs, "cpu_threads": 1, "cache": "score"}),
    ):
        with prescope.attach(model, schedule=schedule, slots=9, decode=decode, **settings, **gpu) as engine:
            engine.force_routing(forced)
            run = engine.generate(prompt(length=5), max_new_tokens=24)
            engine.check_integrity()
        tokens[schedule] = run.tokens
        layers[schedule] = run.layers[run.layers["phase"] == "decode"]
    assert tokens["presched"] == tokens["on-demand"]
    decode_layers = layers["presched"]
    assert (decode_layers["on_cpu"] == decode_layers["misses"]).all()
    steps = decode_layers.groupby("step")["hits"].sum().to_numpy()
    assert steps[-8:].mean() > steps[:4].mean() and steps[-8:].mean() > 0.75 * LAYERS * TOP_K


def test_the_cpu_lane_computes_misses_and_its_time_is_in_the_table(model, early, frequencies):
    """A link that takes forever leaves everything that is missing to the CPU."""
    ids = prompt()
    slow = LayerCosts(link_us=1e6, gpu_us=5.0, rest_us=200.0, cpu_us=(0.0, 10.0, 12.0), source="made up")
    with prescope.attach(
        model, schedule="presched", slots=5, device="cpu", costs=slow, cpu_threads=1, cache="lru"
    ) as engine:
        run = engine.generate(ids, max_new_tokens=8)
    assert run.tokens == plain_tokens(model, ids, new=8)
    decode = run.metrics.decode
    assert decode.on_cpu == decode.misses > 0
    assert decode.experts_cpu_ms > 0
    cpu = run.events[run.events["lane"] == "cpu"]
    assert set(cpu["reason"]) == {"cpu"} and (cpu["dur_us"] > 0).all()


@pytest.mark.parametrize("wrong", ["inverted", "chance"])
def test_a_hostile_predictor_changes_no_token(model, early, frequencies, wrong):
    ids = prompt(batch=2)
    predictor = Inverted(early) if wrong == "inverted" else Chance(SHAPE, LAYERS - 1)
    with opened(model, "presched", predictor, frequencies, device="null", slots=6) as engine:
        run = engine.generate(ids, max_new_tokens=8)
        engine.check_integrity()
    assert run.tokens == plain_tokens(model, ids, new=8)


def test_a_schedule_is_changed_between_runs_and_refused_without_what_it_needs(model, early):
    ids = prompt()
    expected = plain_tokens(model, ids, new=4)
    with prescope.attach(model, slots=6, device="null") as engine:
        with pytest.raises(UnsupportedOption, match="costs"):
            engine.configure(schedule="presched")
        with pytest.raises(UnsupportedOption, match="predictor"):
            engine.configure(schedule="fate", costs=COSTS)
        with pytest.raises(UnsupportedOption, match="no setting 'lookahed'"):
            engine.configure(lookahed=2)
        with pytest.raises(UnsupportedOption, match="leaves decisions to the GPU"):
            engine.configure(schedule="presched", costs=COSTS, decode="gpu-driven")
        assert engine.config.schedule == "on-demand"
        assert engine.generate(ids, max_new_tokens=4).tokens == expected
        engine.configure(
            schedule="presched", predictor=early, costs=COSTS, lookahead=2, width=3, threshold=0.3
        )
        run = engine.generate(ids, max_new_tokens=4)
        assert run.tokens == expected
        assert run.config["schedule"] == "presched" and run.config["width"] == 3
        assert run.config["predictor"] == early.name and run.config["threshold"] == 0.3
        with pytest.raises(UnsupportedOption, match="leaves decisions to the GPU"):
            engine.configure(decode="copy-engine")  # alone it says nothing of the schedule that is there
        engine.configure(predictor="none")
        assert engine.generate(ids, max_new_tokens=4).config["predictor"] == "none"
        engine.configure(schedule="on-demand")
        assert engine.generate(ids, max_new_tokens=4).tokens == expected


def test_a_profile_of_this_machine_gives_the_costs_and_another_ones_is_refused(tmp_path):
    shipped = HardwareProfile.load("test_machine")
    with prescope.load(slots=0.5, device="cpu", link_gb_per_s=9.0, cpu_threads=0) as engine:
        here = replace(shipped, place=this_place(engine.hardware()), label="made here")
        expected = engine.generate("Once", max_new_tokens=3).tokens
        for error, given, words in [
            (ForeignProfile, {"profile": "h200"}, "calibrate"),
            (UnsupportedOption, {"profile": here, "costs": COSTS}, "one of them"),
            (BadProfile, {"profile": tmp_path / "none.json"}, "no profile at"),
        ]:
            with pytest.raises(error, match=words):
                engine.configure(schedule="presched", **given)
            assert engine.config.schedule == "on-demand", "a refused setting changes nothing"
        _, width, expert_width = engine.expert_size
        wanted = here.with_link(9.0).costs(engine.shape, width=width, expert_width=expert_width)
        for given in (here, here.save(tmp_path / "p.json"), str(tmp_path / "p.json")):
            engine.configure(schedule="presched", profile=given)
            assert engine._costs == wanted
            assert "made here" in engine.describe()["reasons"]["schedule"]
        assert engine.generate("Once", max_new_tokens=3).tokens == expected


def test_an_exception_on_the_cpu_lane_surfaces_and_the_engine_works_again(
    model, early, frequencies, monkeypatch
):
    ids = prompt()
    with opened(model, "fiddler", early, frequencies, device="null", slots=5) as engine:
        good = engine.runner.schedule_runner.cpu.submit

        def broken(*arguments, **keywords):
            raise RuntimeError("a thread broke")

        monkeypatch.setattr(engine.runner.schedule_runner.cpu, "submit", broken)
        with pytest.raises(RuntimeError, match="a thread broke"):
            engine.generate(ids, max_new_tokens=6)
        monkeypatch.setattr(engine.runner.schedule_runner.cpu, "submit", good)
        assert engine.generate(ids, max_new_tokens=6).tokens == plain_tokens(model, ids, new=6)


def test_routing_can_be_forced_from_a_trace(model):
    ids = prompt(batch=2)
    with prescope.attach(model, slots=TOTAL, device="null") as engine:
        trace = engine.generate(prompt(batch=2, seed=7), max_new_tokens=6).trace
        engine.force_routing(trace)
        run = engine.generate(ids, max_new_tokens=6)
        engine.force_routing(None)
        assert engine.generate(ids, max_new_tokens=6).tokens == plain_tokens(model, ids, new=6)
    for step in trace.select(phase="decode").steps:
        assert (run.trace.step_routing(step)[0] == trace.step_routing(step)[0]).all()
    assert any("routed by a trace" in note for note in run.notes)


@pytest.mark.parametrize("lookahead", [1, 2])
def test_forced_predictions_may_reach_further_than_the_schedule_looks(
    model, early, frequencies, gpu, lookahead
):
    """Each layer's message has room for what is looked at: more would be the next layer's predictions."""
    with prescope.attach(model, slots=TOTAL, device="null", decode="layered") as engine:
        trace = engine.generate(prompt(batch=1, seed=3), max_new_tokens=5).trace
    oracle = predictions_of(NoisyOracle(trace, {1: 1.0, 2: 1.0}), trace)
    used = [
        oracle.used_dSLE[a, :, layer + a + 1]
        for layer in range(LAYERS)
        for a in range(2)
        if layer + a + 1 < LAYERS
    ]
    assert all(part.any() for part in used)
    scores = np.zeros((len(trace.select(phase="decode").steps), LAYERS, 2, 2, EXPERTS), dtype=np.float32)
    for ahead in (1, 2):
        scores[:, : LAYERS - ahead, ahead - 1, 0] = oracle.expected_dSLE[ahead - 1][:, ahead:]
        scores[:, : LAYERS - ahead, ahead - 1, 1] = oracle.used_dSLE[ahead - 1][:, ahead:]
    with opened(model, "fate", early, frequencies, slots=7, lookahead=lookahead, **gpu) as engine:
        engine.force_routing(trace, scores)
        for _ in range(2):
            run = engine.generate(prompt(), max_new_tokens=5)
        decode = run.layers[(run.layers["phase"] == "decode") & (run.layers["moe_layer"] > 0)]
        engine.check_integrity()
        planner = engine.runner.schedule_runner.planner
    # All that was likely was used: the predictions were those of the layers they were read for.
    trust = planner.memory.trust
    assert (trust[:, 1] == trust[:, 0]).all() and (trust[:, 0] > 0).all()
    assert len(decode) > 0


def test_a_step_that_never_was_leaves_no_count(model, early, frequencies, gpu):
    """The step launched before the host knew that the text had ended."""
    ids = prompt(batch=2, length=5)
    with opened(model, "fiddler", early, frequencies, slots=7, **gpu) as engine:
        tokens = engine.generate(ids, max_new_tokens=8).tokens[0]
        end = next(t for i, t in enumerate(tokens) if i > 2 and t not in tokens[:i])
        before = dict(engine.needs)
        run = engine.generate(ids[:1], max_new_tokens=8, eos_token_id=end)
        counted = {kind: engine.needs[kind] - before[kind] for kind in NeedOutcome}
        engine.check_integrity()
    assert run.tokens[0][-1] == end and len(run.tokens[0]) < 8
    decode = run.layers
    assert (
        counted[NeedOutcome.HIT] == decode["hits"].sum()
        and counted[NeedOutcome.MISS] == decode["misses"].sum()
    )


@pytest.mark.parametrize("where", ["submit", "compute"])
def test_what_goes_wrong_on_the_cpu_lane_of_a_graph_step_is_raised(
    model, early, frequencies, gpu, monkeypatch, where
):
    ids = prompt(length=5)

    def broken(*arguments, **keywords):
        raise ArithmeticError("a thread broke")

    # A link that takes forever leaves everything to the CPU, however slow it turns out.
    slow = replace(COSTS, link_us=1e6)
    with opened(model, "fiddler", early, frequencies, slots=5, costs=slow, **gpu) as engine:
        expected = engine.generate(ids, max_new_tokens=5).tokens
        with monkeypatch.context() as patch:
            name = "check_batch" if where == "submit" else "_compute"
            patch.setattr(f"prescope.kernels.cpu.with_torch.{name}", broken)
            with pytest.raises(ArithmeticError, match="a thread broke"):
                engine.generate(ids, max_new_tokens=5)
        assert engine.generate(ids, max_new_tokens=5).tokens == expected
        engine.check_integrity()


@pytest.mark.slow
def test_plain_python_serves_a_step_alike():
    """Where numba is not installed the same functions run uncompiled, over ctypes."""
    test = "test_a_graph_step_gives_the_plain_models_tokens_under_a_schedule[1-7-hybrimoe]"
    one = f"tests/engine/test_host_driver.py::{test}"
    command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider", one]
    ours = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment = {**ours, "NUMBA_DISABLE_JIT": "1", "CUDA_VISIBLE_DEVICES": ""}
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout[-3000:]


@pytest.mark.parametrize("refused", [2, 5, 9])
def test_a_copy_refused_while_the_cpu_computes_leaves_no_job_behind(
    model, early, frequencies, gpu, monkeypatch, refused
):
    """What a job of the run that was given up writes late would be taken for an answer of the next run."""
    ids = prompt(batch=3, length=5)
    expected = plain_tokens(model, ids, new=6)
    memcpy, copies = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_int64] * 4), []
    with opened(model, "presched", early, frequencies, slots=13, **gpu) as engine:
        good = engine._device.link_functions()
        copy = memcpy(good.memcpy)

        @memcpy
        def sometimes(target: int, source: int, nbytes: int, stream: int) -> int:
            copies.append(nbytes)
            return (
                700 if sum(size > 4 for size in copies) == refused else copy(target, source, nbytes, stream)
            )

        way = good._replace(memcpy=address_of(sometimes))
        with monkeypatch.context() as patch:
            lane, made = engine.runner.schedule_runner.cpu, []
            functions_of = lane.functions
            patch.setattr(lane, "functions", lambda: made.append(functions_of()) or made[-1])
            patch.setattr(engine._device, "link_functions", lambda: way)
            with pytest.raises(TransferFailed, match="refused a copy"):
                engine.generate(ids, max_new_tokens=20)
            assert made and not any(functions._jobs for functions in made), (
                "each job was waited for and given back"
            )
        assert engine.generate(ids, max_new_tokens=6).tokens == expected
        engine.check_integrity()
