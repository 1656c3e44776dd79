"""Is the best of a search better than the default? By arithmetic on made-up machines, and once for real."""

import math
import re
from concurrent.futures import CancelledError
from threading import Event
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from prescope.engine import attach
from prescope.engine.turn import Turn
from prescope.errors import UnsupportedOption
from prescope.scheduler.costs import LayerCosts
from prescope.traces.synthetic import SyntheticSpec
from prescope.tuning import (
    Choices,
    EngineRunner,
    Measured,
    Range,
    SimulatorRunner,
    Space,
    open_sweep,
    prove,
    verdict,
)
from prescope.tuning.engine_runner import Timed
from prescope.tuning.prompts import checksum_of_prompt, texts_of
from prescope.tuning.timings import CONFIDENCE, LEAST_GAIN
from tests.support.bars import watch_bars
from tests.support.models import tiny_moe

PROMPTS = [[5, 9, 2, 7], [1, 1, 2, 3, 5, 8]]
COSTS = LayerCosts(link_us=100.0, gpu_us=5.0, rest_us=50.0, cpu_us=(0.0, 300.0, 400.0), source="made up")


def blocks(default_ms, candidate_ms, count=4, noise=0.01, drift=0.0, seed=0):
    """Times of A-B-B-A runs on a machine that is so fast, so noisy, and slows down by so much with each run."""
    rng, clock = np.random.default_rng(seed), 0
    default, candidate = [], []
    for _ in range(count):
        for ms, times in (
            (default_ms, default), (candidate_ms, candidate), (candidate_ms, candidate), (default_ms, default)
        ):  # fmt: skip
            times.append(ms * (1 + drift * clock) * math.exp(noise * rng.standard_normal()))
            clock += 1
    return default, candidate


# -- the verdict -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_blocks", "quantile"), [(2, 12.7062), (3, 4.3027), (5, 2.7764), (10, 2.2622)])
def test_the_interval_is_students_over_the_blocks(num_blocks, quantile):
    """The quantiles are those of the printed tables, for 95 % on both sides."""
    candidate_ms = np.linspace(9.0, 11.0, num_blocks)
    said = verdict([10.0] * (2 * num_blocks), np.repeat(candidate_ms, 2).tolist())
    logs = np.log(10.0 / candidate_ms)
    margin = quantile * logs.std(ddof=1) / math.sqrt(num_blocks)
    assert math.log1p(said.low) == pytest.approx(logs.mean() - margin, abs=1e-4)
    assert math.log1p(said.high) == pytest.approx(logs.mean() + margin, abs=1e-4)


@pytest.mark.parametrize("noise", [0.0, 0.01, 0.05, 0.2])
def test_where_the_default_is_best_it_is_kept(noise):
    """Three candidates, 2 % slower, equal and 2 % faster: in 1,000 proofs the interval's promise allows 50 mistakes."""
    wrong = 0
    for seed in range(1000):
        judged = [
            verdict(*blocks(10, ms, noise=noise, seed=3 * seed + i), candidates=3)
            for i, ms in enumerate((10.2, 10, 9.8))
        ]
        wrong += any(one.kept for one in judged)
    assert wrong <= 1000 * (1 - CONFIDENCE)


def test_where_a_candidate_is_clearly_faster_it_is_kept():
    kept = [verdict(*blocks(11, 10, noise=0.01, seed=seed), candidates=3) for seed in range(200)]
    assert sum(one.kept for one in kept) > 190
    assert np.mean([one.gain for one in kept]) == pytest.approx(0.10, abs=0.005)
    inside = [one.low <= 0.1 <= one.high for one in kept]
    assert np.mean(inside) > CONFIDENCE


def test_a_machine_that_slows_down_favours_nobody():
    """A-B-B-A: without the order the candidate, always second, would look 2 % slower here."""
    equal = verdict(*blocks(10, 10, noise=0, drift=0.02))
    assert equal.gain == pytest.approx(0, abs=1e-12)
    assert not equal.kept


@pytest.mark.parametrize(
    ("candidate_ms", "noise", "kept", "said"),
    [
        (10 / 1.1, 0.0, True, r"\+10.0 % .*: keep it"),
        (10 / 1.02, 0.0, False, "not surely more than 3 %: keep the default"),
        (10 / 1.06, 0.05, False, "keep the default"),
        (10, 0.02, False, "no difference beyond the spread: keep the default"),
        (12, 0.0, False, "-16.7 %.*: keep the default"),
    ],
)
def test_the_verdict_in_words(candidate_ms, noise, kept, said):
    found = verdict(*blocks(10, candidate_ms, noise=noise))
    assert found.kept is kept
    assert found.kept == (found.low > LEAST_GAIN)
    assert re.search(said, found.words), found.words


@pytest.mark.parametrize(
    ("default", "candidate"),
    [
        ([1, 1], [1, 1]),
        ([1, 1, 1], [1, 1, 1]),
        ([1, 1, 1, 1], [1, 1]),
        ([1, 1, 1, 0], [1, 1, 1, 1]),
        ([], []),
    ],
)
def test_times_that_say_nothing_are_refused(default, candidate):
    with pytest.raises(UnsupportedOption):
        verdict(default, candidate)


# -- the order of runs, on a made-up machine -------------------------------------------------------------------------


class MadeUp:
    """A device whose settings are as fast as a table says, and that notes what it ran."""

    speeds: dict = {}  # noqa: RUF012 - set by each test
    ran: list = []  # noqa: RUF012

    def __init__(self, engine, predictors):
        self.engine, self.default = (
            engine,
            {"slots": 10, "cpu_threads": 0, "cache": "auto", "predictor": "none"},
        )

    def keywords(self, settings):
        return dict(settings)

    def configure(self, settings):
        if settings.get("slots", 10) not in self.speeds:
            raise UnsupportedOption("it is refused")

    def restore(self):
        self.ran.append("restored")

    def measure(self, settings, texts, new_tokens, is_cancelled):
        if is_cancelled():
            raise CancelledError("cancelled")
        slots = settings.get("slots", 10)
        self.ran.append(slots)
        values = {"tokens_per_s": self.speeds[slots], "gpu_bytes": 100.0 * slots}
        return Timed(Measured(values, "measured", "made up"), [[slots]] * len(texts), {}, "made up")


@pytest.fixture
def made_up(monkeypatch):
    monkeypatch.setattr("prescope.tuning.proof.TunedEngine", MadeUp)
    MadeUp.ran = []
    return SimpleNamespace(turn=Turn(), shape=None)


def test_the_best_of_several_is_kept_and_each_is_run_against_the_default(made_up):
    MadeUp.speeds = {10: 100.0, 20: 120.0, 30: 110.0}
    proof = prove([{"slots": 20}, {"slots": 30}], made_up, PROMPTS, repeats=2)
    assert proof.kept and dict(proof.settings) == {"slots": 20}
    assert proof.best.verdict.gain == pytest.approx(0.2)
    assert MadeUp.ran == [10, *[10, 20, 20, 10] * 2, *[10, 30, 30, 10] * 2, "restored"]
    assert list(proof.table()["gain %"]) == pytest.approx([20, 10])
    assert "keep it" in str(proof)


def test_a_candidate_that_the_engine_refuses_is_told_before_anything_runs(made_up):
    MadeUp.speeds = {10: 100.0, 20: 120.0}
    with pytest.raises(UnsupportedOption, match="it is refused"):
        prove([{"slots": 20}, {"slots": 40}], made_up, PROMPTS, repeats=2)
    assert MadeUp.ran == ["restored"]


def test_where_nothing_beats_the_default_the_default_is_the_answer(made_up):
    MadeUp.speeds = {10: 100.0, 20: 99.0, 30: 102.0}
    proof = prove([{"slots": 20}, {"slots": 30}], made_up, PROMPTS, default={"slots": 10}, repeats=3)
    assert not proof.kept and dict(proof.settings) == {"slots": 10}
    assert "keep the default" in proof.words


def test_other_texts_and_more_memory_are_never_passed_over_in_silence(made_up):
    MadeUp.speeds = {10: 100.0, 20: 120.0}
    proof = prove({"slots": 20}, made_up, PROMPTS, repeats=2)
    assert not proof.is_lossless and proof.best.texts_differ == 2
    assert any("not the same texts: 2 of 2" in note for note in proof.notes)
    assert any("more GPU memory" in note for note in proof.notes)


@pytest.mark.parametrize(
    ("given", "texts"),
    [
        ("a", ["a"]), (["a", "b"], ["a", "b"]), ({"x": "a", "y": ["b", "c"]}, ["a", "b", "c"]), ([[1, 2]], [[1, 2]]),
        ({"x": [[1, 2], [3]]}, [[1, 2], [3]]), (("a", [1]), ["a", [1]]), (iter("ab"), ["a", "b"]),
        (np.array([[1, 2], [3, 4]]), [[1, 2], [3, 4]]), (torch.tensor([[1, 2]]), [[1, 2]]),
    ],
    ids=["text", "texts", "by name", "ids", "ids by name", "mixed", "iterator", "array", "tensor"],
)  # fmt: skip
def test_prompts_are_texts_or_token_ids_of_any_kind(given, texts):
    found = texts_of(given)
    assert [one if isinstance(one, str) else [int(token) for token in one] for one in found] == texts


def test_whoever_waits_for_a_proof_sees_how_far_it_is(made_up, monkeypatch):
    """It takes minutes; unless the caller shows it."""
    MadeUp.speeds = {10: 100.0, 20: 120.0, 30: 110.0}
    bars, told = watch_bars(monkeypatch), []
    prove([{"slots": 20}, {"slots": 30}], made_up, PROMPTS, repeats=2)
    prove({"slots": 20}, made_up, PROMPTS, repeats=2, on_progress=lambda *at: told.append(at))
    assert [(bar.n, bar.total) for bar in bars] == [(17, 17), (0, 9)]
    assert told == [(done, 9) for done in range(1, 10)]


def test_a_cancelled_proof_gives_the_settings_back(made_up):
    MadeUp.speeds = {10: 100.0, 20: 120.0}
    cancel = Event()
    with pytest.raises(CancelledError):
        prove({"slots": 20}, made_up, PROMPTS, on_progress=lambda *_: cancel.set(), cancel=cancel)
    assert MadeUp.ran == [10, "restored"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"prompts": []}, {"prompts": ["", "a"]}, {"prompts": [[]]}, {"prompts": None}, {"prompts": [5]},
        {"prompts": {"a": [1, 2]}}, {"prompts": [[1.5]]}, {"prompts": [[{"role": "user", "content": "a"}]]},
        {"repeats": 1}, {"repeats": 2.5}, {"repeats": "3"}, {"sweep": []}, {"new_tokens": 1}, {"new_tokens": 0},
        {"new_tokens": 2.5},
    ],
    ids=str,
)  # fmt: skip
def test_a_proof_of_nothing_is_refused(made_up, wrong):
    arguments = {"sweep": {"slots": 20}, "prompts": PROMPTS, "repeats": 2} | wrong
    with pytest.raises(UnsupportedOption):
        prove(arguments.pop("sweep"), made_up, **arguments)


# -- for real --------------------------------------------------------------------------------------------------------


@pytest.fixture
def engine():
    with attach(tiny_moe(), slots=6, device="cpu", link_gb_per_s=0.01, schedule="on-demand") as engine:
        yield engine


def test_a_search_on_the_device_and_its_proof_on_other_prompts(engine, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    engine.generate(PROMPTS[0], max_new_tokens=2)  # from now on it knows how it decodes
    before = engine.describe()
    runner = EngineRunner(engine, PROMPTS, new_tokens=4)
    space = Space(slots=Choices(1, 4, 24))
    sweep = open_sweep(
        "real", space, runner, method="grid", objectives=("tokens_per_s", "ttft_ms", "gpu_bytes")
    )
    done = sweep.run()
    points = sweep.points()
    assert (done.finished, done.infeasible) == (2, 1)
    assert points.query("slots == 1")["reason"].str.contains("SlotPoolTooSmall").all()
    finished = points[points["state"] == "finished"]
    assert (finished["origin"] == "emulated").all()
    assert (finished["gpu_bytes"] == finished["slots"] * engine.shape.row_bytes).all()
    assert (finished[["tokens_per_s", "ttft_ms"]] > 0).all(axis=None)
    assert engine.describe() == before, "the engine has its own settings again"

    with pytest.raises(UnsupportedOption, match="1 of 2 prompts were used in the search"):
        prove(sweep, engine, [PROMPTS[0], [3, 3, 3]])
    proof = prove(sweep, engine, [[3, 3, 3], [2, 4, 6, 8]], repeats=2, new_tokens=4)
    assert engine.describe() == before
    assert [one.number for one in proof.candidates] == list(sweep.best(2)["number"])
    for one in proof.candidates:
        assert len(one.default_ms) == len(one.candidate_ms) == 4
        assert one.verdict == verdict(one.default_ms, one.candidate_ms, candidates=2)
    assert proof.kept == any(one.verdict.kept for one in proof.candidates)
    engine.configure(**proof.keywords)  # the default as well as a setting that is kept
    assert proof.is_lossless, "float32: the tokens are the plain model's under every setting"
    assert proof.origin == "emulated" and "emulated" in proof.label


@pytest.mark.parametrize("is_another", [True, False])
def test_the_simulator_is_not_blamed_for_another_models_speed(engine, is_another, tmp_path, monkeypatch):
    """A search on the recording of a large model, proved on a small one, said the simulator was 788 % off."""
    monkeypatch.chdir(tmp_path)
    shape = engine.shape
    L, E, K = (shape.num_layers + is_another, shape.num_experts, shape.top_k)
    trace = SyntheticSpec(num_layers=L, num_experts=E, top_k=K).generate(new_tokens=6, prompt_tokens=4)
    runner = SimulatorRunner(trace, COSTS, row_bytes=1000)
    sweep = open_sweep("one", Space(slots=Choices(4, 6)), runner, method="grid")
    sweep.run()
    proof = prove(sweep, engine, PROMPTS, repeats=2, new_tokens=3)
    said = " ".join(proof.notes)
    assert ("run of another model" in said) is is_another
    assert ("the simulator said" in said) is not is_another
    assert proof.table()["simulator off %"].isna().all() == is_another
    assert all(math.isnan(one.simulated_gain) == is_another for one in proof.candidates)


@pytest.mark.parametrize(
    "settings",
    [
        {"slots": 8, "cpu": False, "cache": None, "predictor": None},
        {"schedule": "on-demand", "cpu": True, "predictor": "none", "lookahead": None},
        {"slots": 0.5, "batch": 2, "cache": "lfu", "cpu": None, "threshold": 0.5},
    ],
)
def test_what_was_proved_can_be_configured(engine, settings):
    """In a sweep's names it cannot: `cpu` and `batch` are no settings of an engine, None means the schedule's own."""
    proof = prove(settings, engine, [[3, 3, 3]], default=settings, repeats=2, new_tokens=2)
    engine.configure(**proof.keywords)
    assert engine.config.slots == settings.get("slots", 6) and engine.config.schedule == "on-demand"
    if settings["cpu"] is False:
        assert engine.config.cpu_threads == 0
    assert len(engine.generate([3, 3, 3], max_new_tokens=3).tokens[0]) == 3


def test_a_point_on_the_device_can_be_cancelled_in_its_middle(engine):
    runner = EngineRunner(engine, PROMPTS, new_tokens=8)
    asked = []

    def is_cancelled():
        asked.append(len(asked))
        return len(asked) > 4

    with pytest.raises(CancelledError):
        runner.run({"slots": 8}, is_cancelled=is_cancelled)
    runner.restore()
    assert engine.num_slots == 6
    assert runner.run({}).values["tokens_per_s"] > 0


def test_settings_of_a_sweep_are_those_of_configure(engine):
    runner = EngineRunner(engine, PROMPTS, new_tokens=2)
    keywords = runner.device.keywords
    assert keywords({"cpu": False})["cpu_threads"] == 0
    assert keywords({"cpu": True})["cpu_threads"] is None
    assert keywords({"cache": None})["cache"] == "auto"
    assert keywords({"lookahead": None, "slots": None})["slots"] == 6
    assert "batch" not in keywords({"batch": 3})
    with pytest.raises(UnsupportedOption, match="'none'"):
        keywords({"predictor": "oracle"})
    assert runner.is_here
    assert runner.prompts == sorted(map(checksum_of_prompt, PROMPTS))
    groups = runner.run({"batch": 2}).values
    assert groups["tokens_per_s"] > 0
    with pytest.raises(UnsupportedOption):
        EngineRunner(engine, PROMPTS, new_tokens=1)
    with pytest.raises(UnsupportedOption, match="'ttft_ms'"):
        open_sweep("a", Space(slots=Range(2, 4)), runner, objectives=("hits",))
