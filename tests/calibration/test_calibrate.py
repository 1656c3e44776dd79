"""Calibration: everything planned is measured, known rates are found again, and an interrupt loses nothing."""

import threading
import time
import weakref
from concurrent.futures import CancelledError
from dataclasses import replace
from math import inf

import numpy as np
import pandas as pd
import pytest
import torch

import prescope
from prescope.advice import MachineSpec
from prescope.calibration import ExpertForm, graphs, layers, silu_form
from prescope.calibration.bench import Bench
from prescope.calibration.busy import repeating
from prescope.calibration.calibrate import point_of_samples
from prescope.calibration.experts import random_rows
from prescope.calibration.layers import _before_first_copy
from prescope.calibration.plan import Sizes, expert_plan, host_plan, sizes_of
from prescope.calibration.unfinished import Unfinished
from prescope.core.machine import this_place
from prescope.core.types import ExpertSize
from prescope.device import EmulatedLinkDevice, NullDevice
from prescope.engine import attach
from prescope.errors import UnsupportedOption, WaitTimedOut
from prescope.profile import Circumstances, HardwareProfile, own_file
from prescope.profile.points import KINDS
from tests.support.models import tiny_moe

# The machine that runs the tests may well be busy, and is told so.
pytestmark = pytest.mark.filterwarnings("ignore:the machine was busy")

SMALL = (64, 32)  # D, F
LINK_GB_PER_S = 10.0
NULL = {"device": "null", "link_gb_per_s": LINK_GB_PER_S, "cpu": "torch", "seconds": 0.1}
DESCRIBED = {"device": "null device", "link": "virtual"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """No test reads or writes the user's own profile."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "prescope"


@pytest.fixture(autouse=True)
def no_thread_is_left():
    before = set(threading.enumerate())
    yield
    left = [t.name for t in threading.enumerate() if t not in before and t.name.startswith("prescope")]
    assert not left, left


def ignore(what: str, share: float) -> None:
    """Progress that nobody reads."""


# -- what is planned -------------------------------------------------------------------------------------------------


def test_a_plan_names_each_circumstance_once_and_only_known_kinds():
    expert = ExpertSize(9_437_184, 2048, 768)
    plan = [*host_plan([expert], 768 << 20, device_kind="cuda"), *expert_plan(expert, 8)]
    assert len(set(plan)) == len(plan)
    assert {of.kind for of in plan} == KINDS.keys() - {"rest", "decide"}
    assert Circumstances("h2d", True, nbytes=expert.nbytes) in plan  # its own size, beside the CPU
    assert len(plan) < 60  # each costs half a second


@pytest.mark.parametrize("together", [1, 2, 3, 8])
def test_base_and_growth_can_be_told_apart_from_what_is_planned(together):
    plan = expert_plan(ExpertSize(1000, 10, 10), together)
    for busy in (False, True):
        alone = {of.experts for of in plan if (of.kind, of.busy, of.tokens) == ("cpu", busy, 1)}
        assert len(alone) > 1 or together == 1
        assert max(of.tokens for of in plan if (of.kind, of.busy) == ("cpu", busy)) == 64
    assert max(of.experts for of in plan) == together


def test_no_copy_is_planned_that_does_not_fit_or_takes_seconds():
    for rate in (None, 0.01):
        plan = host_plan([ExpertSize(1 << 20, 1, 1)], 2 << 20, device_kind="cpu", link_gb_per_s=rate)
        sizes = [of.nbytes for of in plan if of.kind == "h2d"]
        assert sizes and max(sizes) <= (2 << 20 if rate is None else 300_000)
        assert not any(of.kind in ("batch", "message") for of in plan)


def test_rows_take_a_quarter_of_the_memory_at_most_but_are_enough_to_measure():
    expert = ExpertSize(1 << 20, 1, 1)
    assert sizes_of(expert, "cuda", 1 << 30) == Sizes(256, 8)
    assert sizes_of(ExpertSize(1 << 30, 1, 1), "cuda", 1 << 30) == Sizes(4, 2)


# -- what is measured ------------------------------------------------------------------------------------------------


def test_the_rate_of_a_known_link_is_found_again_and_everything_planned_is_measured():
    told: list[float] = []
    profile = prescope.calibrate(
        SMALL, **NULL, save=False, on_progress=lambda what, share: told.append(share)
    )
    link = profile.lanes.link
    assert link.rate_gb_per_s == pytest.approx(LINK_GB_PER_S)
    assert link.line.base_us == pytest.approx(0.0, abs=1e-6) and link.line.error.worst < 1e-6
    expert = silu_form(*SMALL).expert
    assert set(profile.lanes.experts_of("cpu")) == set(profile.lanes.experts_of("gpu")) == {expert}
    assert profile.cpu_us(64, expert) > 0 and profile.gpu_us(4, expert) > 0
    assert profile.lanes.small_us("enqueue") > 0 and profile.lanes.small_us("read") > 0
    assert profile.dram_gb_per_s() > 0 and profile.dram_gb_per_s(busy_link=True) > 0
    assert told == sorted(told) and told[0] == 0.0 and told[-1] == 1.0
    assert profile.cpu_backend == "torch" and profile.label == "virtual clock (null device)"


def test_an_emulated_link_is_never_faster_than_it_says_and_the_profile_says_emulated():
    """A profile faster than its link would promise what no run can give."""
    profile = prescope.calibrate(
        SMALL, device="cpu", link_gb_per_s=2.0, seconds=0.1, save=False, on_progress=ignore, cpu="torch"
    )
    for of, us, *_ in profile.points:
        if of.kind == "h2d" and of.nbytes >= 1 << 20:
            assert us > 0.98 * of.nbytes / 2e3
    assert "emulated" in profile.label and profile.link_gb_per_s == 2.0 and profile.place.link == "emulated"
    assert "emulated" in profile.describe().attrs["label"]


def test_an_engine_is_measured_in_its_own_layers():
    with prescope.attach(tiny_moe(), slots=0.25, device="cpu", link_gb_per_s=0.5) as engine:
        engine.name = "tiny"
        for _ in range(
            5
        ):  # what an expert adds is a few microseconds: beside other programs a tenth of a second hides it
            profile = prescope.calibrate(engine, seconds=0.1, save=False, on_progress=ignore, cpu="torch")
            costs = profile.costs(engine.shape, width=32, expert_width=24, batch=1)
            if costs.gpu_us > 0:
                break
    assert costs.rest_us > 0 and costs.gpu_us > 0 and len(costs.cpu_us) > 1
    assert profile.link_gb_per_s == 0.5
    assert costs.link_us >= engine.shape.row_bytes / 0.5e3
    assert any("tiny" in note for note in profile.notes)


def test_what_the_device_says_of_its_memory_is_kept_for_advice(monkeypatch):
    """A profile measures neither; CUDA tells both."""
    said = {"device": "a GPU", "device_memory_gib": 23.5, "device_memory_gb_per_s": 1008}
    described = NullDevice.describe
    monkeypatch.setattr(NullDevice, "describe", lambda device: described(device) | said)
    profile = prescope.calibrate(SMALL, **NULL, save=False, on_progress=lambda what, share: None)
    assert {name: profile.machine[name] for name in said} == said
    assert MachineSpec.of_profile(profile).gpu_gib == 23.5


def test_a_model_that_is_not_attached_gives_its_sizes():
    profile = prescope.calibrate(tiny_moe(torch.bfloat16), **NULL, save=False, on_progress=ignore)
    (expert,) = profile.lanes.experts_of("cpu")
    assert (expert.width, expert.expert_width) == (32, 24)


def test_a_sample_is_the_median_of_the_faster_half_and_must_take_time():
    of = Circumstances("read")
    assert point_of_samples(of, [5.0, 1.0, 3.0, 100.0]).us == 2.0
    assert point_of_samples(of, [7.0]) == (of, 7.0, 0.0, 1)
    with pytest.raises(UnsupportedOption, match="clock"):
        point_of_samples(of, [0.0])


def test_the_wait_before_the_first_copy_is_what_does_not_grow_with_the_misses():
    misses = np.repeat([1, 2, 4], 50)
    rng = np.random.default_rng(0)
    waits = pd.DataFrame({"misses": misses, "us": 40.0 + 200.0 * misses + rng.normal(0, 2, len(misses))})
    assert _before_first_copy(waits) == pytest.approx(40.0, abs=6.0)
    assert _before_first_copy(waits[waits["misses"] == 1]) == 0.0  # nothing to tell it from a copy


class Driven:
    """An engine whose decode steps the GPU decides, unless the host is told to."""

    def __init__(self, engine, fails_at: int = 99) -> None:
        self.engine, self.told, self.num, self.fails_at = engine, [], 0, fails_at
        self.model, self.name, self.config = engine.model, "driven", engine.config

    def configure(self, decode: str) -> None:
        self.told.append(decode)
        self.config = replace(self.config, decode=decode)

    def generate(self, *arguments, **keywords):
        self.num += 1
        if self.num > self.fails_at:
            raise KeyboardInterrupt
        run = self.engine.generate(*arguments, **keywords)
        driver = "host-driven" if self.config.decode == "host-driven" else "copy-engine"
        reasons = run.config["reasons"] | {"decode": f"{driver}: it fits"}
        return replace(run, config=run.config | {"reasons": reasons})


def test_where_the_gpu_decides_the_host_is_timed_by_runs_that_it_decides(monkeypatch):
    """What a layer waits for a schedule's decisions cannot be seen in steps that wait for none."""
    monkeypatch.setattr(layers, "BATCHES", (1, 3))
    with attach(tiny_moe(), slots=6, device="cpu", decode="auto") as engine:
        expert, former = engine.expert_size, engine.config.decode
        plain = layers.layer_points(engine, expert, deadline=inf, tell=lambda what: None)
        driven, stopped = Driven(engine), Driven(engine, fails_at=5)
        points = layers.layer_points(driven, expert, deadline=inf, tell=lambda what: None)
        with pytest.raises(KeyboardInterrupt):
            layers.layer_points(stopped, expert, deadline=inf, tell=lambda what: None)
    assert driven.told == stopped.told == ["host-driven", former]
    assert [(p.of.kind, p.of.tokens) for p in points] == [
        ("rest", 1),
        ("rest", 3),
        ("decide", 1),
        ("decide", 3),
    ]
    assert {(p.of.kind, p.of.tokens) for p in plain} <= {(p.of.kind, p.of.tokens) for p in points}
    assert all(p.us > 0 and p.of.expert == expert for p in points)


class Capturing(NullDevice):
    """Replays by calling again; like a graph, it keeps nothing of what it works on."""

    def capture(self, run):
        held = weakref.ref(run)
        return lambda: held()(), run()


def test_the_gpu_lane_launches_the_captured_steps_kernels(monkeypatch):
    """In Triton's interpreter; on a GPU the same code is captured (benchmarks/calibrate.py)."""
    pytest.importorskip("triton", reason="Triton exists for Linux only")
    if torch.cuda.is_available():
        pytest.skip("kernels are not interpreted where there is a GPU")
    monkeypatch.setattr(
        graphs, "REPLAYS", 1
    )  # the interpreter takes seconds for what a GPU does in microseconds
    form, device = silu_form(32, 16, torch.float32), Capturing()
    host = random_rows(form, 4, device)
    lane = graphs.GraphLane(form, host, host.rows.clone(), device)
    for num, tokens in ((2, 1), (2, 4)):  # pairs, and tiles
        assert lane.us(num, tokens) > 0
    host.close()


# -- interrupts and files --------------------------------------------------------------------------------------------


def interrupt_at(number: int, error: type[BaseException] = KeyboardInterrupt):
    calls = iter(range(number + 1))

    def on_progress(what: str, share: float) -> None:
        if next(calls) == number:
            raise error

    return on_progress


def test_a_profile_is_saved_and_found_again_with_what_an_older_one_knows():
    first = prescope.calibrate(SMALL, **NULL, on_progress=ignore)
    assert HardwareProfile.of_this_machine(DESCRIBED) == first
    second = prescope.calibrate((96, 32), **NULL, on_progress=ignore)
    found = HardwareProfile.of_this_machine({**DESCRIBED, "link_gb_per_s": LINK_GB_PER_S})
    assert found == second
    assert {expert.width for expert in found.lanes.experts_of("gpu")} == {64, 96}
    found.require_this_machine(DESCRIBED)


@pytest.mark.parametrize("error", [KeyboardInterrupt, CancelledError])
def test_ctrl_c_or_a_cancel_leaves_the_saved_profile_alone_and_the_next_call_goes_on(error):
    saved = prescope.calibrate(SMALL, **NULL, on_progress=ignore)
    with pytest.raises(error):
        prescope.calibrate(SMALL, **NULL, on_progress=interrupt_at(20, error))
    assert HardwareProfile.of_this_machine(DESCRIBED) == saved
    kept = own_file(this_place(DESCRIBED)).with_suffix(".unfinished")
    assert kept.exists()
    visits: list[str] = []
    again = prescope.calibrate(SMALL, **NULL, on_progress=lambda what, share: visits.append(what))
    planned = len(again.points)
    assert len(visits) - 1 == 2 * (planned - 20)  # each of the others twice, and "done"
    assert not kept.exists()


def test_what_an_interrupt_left_is_not_taken_for_another_machine_or_day(tmp_path, monkeypatch):
    point = point_of_samples(Circumstances("read"), [3.0])
    unfinished = Unfinished(tmp_path / "u.json", "here")
    unfinished.keep([point])
    assert unfinished.points() == {point.of: point}
    assert Unfinished(tmp_path / "u.json", "elsewhere").points() == {}
    later = time.time() + 7200
    monkeypatch.setattr(time, "time", lambda: later)
    assert unfinished.points() == {}
    (tmp_path / "u.json").write_text('{"points": [[')
    assert unfinished.points() == {}
    assert Unfinished(None, "here").points() == {}


def test_a_busy_lane_ends_with_its_block_and_its_errors_are_heard():
    counted = []
    with repeating(lambda: counted.append(1)):
        assert counted  # it is at work before the block begins
    number = len(counted)
    time.sleep(0.01)
    assert len(counted) == number

    def fail() -> None:
        raise ValueError("no such expert")

    with pytest.raises(ValueError, match="no such expert"), repeating(fail):
        pass


def test_memory_is_given_back_when_a_bench_cannot_be_made():
    device = EmulatedLinkDevice(1.0)
    with pytest.raises(UnsupportedOption, match="implementation"):
        Bench(device, silu_form(*SMALL), Sizes(4, 2), "no such", 1.0)
    device.close()


def test_the_usual_expert_is_three_matrices():
    form = silu_form(2048, 768)
    assert isinstance(form, ExpertForm) and form.expert == ExpertSize(9_437_184, 2048, 768)
    rows = random_rows(silu_form(*SMALL), 3, NullDevice())
    assert torch.equal(rows.rows[0], rows.rows[2]) and rows.tensor("down_proj").float().std() > 0
    rows.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: runs on a machine that has one")
def test_a_gpu_is_measured_in_all_kinds():
    profile = prescope.calibrate(SMALL, device="cuda", seconds=5.0, save=False, on_progress=ignore)
    kinds = {point.of.kind for point in profile.points}
    assert kinds == KINDS.keys() - {"rest", "decide"}
    assert profile.lanes.small_us("message") > 1.0
    # The difference of two times: it can be next to nothing where other tests keep the host busy.
    assert 0.0 < profile.lanes.small_us("batch") < 100.0
    assert profile.place.device == torch.cuda.get_device_name()


def test_work_beside_a_measurement_that_never_begins_or_ends_is_said(monkeypatch):
    monkeypatch.setattr("prescope.core.worker.PATIENCE_S", 0.3)
    release, calls = threading.Event(), []

    def first() -> None:
        release.wait(20.0)

    def later() -> None:
        calls.append(1)
        if len(calls) > 1:
            release.wait(20.0)

    try:
        with pytest.raises(WaitTimedOut, match="round of work that ke"), repeating(first):
            pytest.fail("it has not begun")
        with (
            pytest.raises(WaitTimedOut, match="the last round of work that kept the other lane busy"),
            repeating(later),
        ):
            time.sleep(0.1)
    finally:
        release.set()
        for thread in threading.enumerate():
            if thread.name == "prescope-calibration":
                thread.join(20.0)
