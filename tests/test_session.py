"""The session on the embedded model, over an emulated link so fast that it hardly waits."""

import base64
import re
import threading
import time
import warnings
from concurrent.futures import CancelledError
from html import unescape

import numpy as np
import plotly.graph_objects as go
import pytest

from prescope.engine.config import EngineConfig
from prescope.engine.job import Job
from prescope.errors import BadTrace, TransferFailed, UnsupportedOption
from prescope.report import runs
from prescope.session import Session
from prescope.simulator import Scenario
from prescope.traces.routing import RoutingTrace

PROMPTS = {"story": "Once upon a time", "code": "def add(a, b):"}


@pytest.fixture(scope="module")
def shared():
    with Session(slots=0.5, device="cpu", link_gb_per_s=50.0) as session:
        yield session


@pytest.fixture
def session(shared):
    shared.runs.clear()
    yield shared
    shared.engine.check_integrity()


def test_a_run_is_kept_with_its_prompts(session):
    run = session.run(PROMPTS, max_new_tokens=3)
    assert session.runs == [run]
    assert session.last is run
    assert [prompt["domain"] for prompt in run.trace.prompts] == list(PROMPTS)
    assert [len(tokens) for tokens in run.tokens] == [3, 3]
    assert session.run("Once", max_new_tokens=1).trace.prompts == [{"text": "Once"}]


def test_every_figure_of_the_session_draws(session):
    session.run(PROMPTS, max_new_tokens=4)
    for figure in (
        session.timeline(),
        session.layers(),
        session.hit_rate(),
        session.latency(),
        session.load(),
    ):
        assert type(figure) is go.Figure
    assert session.slots_curve().data
    assert list(session.compare()["slots"]) == [session.engine.num_slots]


def test_a_session_without_runs_says_what_to_do(session):
    with pytest.raises(BadTrace, match=r"session\.run"):
        session.timeline()


def test_changed_slots_are_cold_and_the_run_says_so(session):
    session.run("Once", slots=64, max_new_tokens=2)
    again = session.run("Once", slots=64, max_new_tokens=2)
    assert again.notes == []
    changed = session.run("Once", slots=40, max_new_tokens=2)
    assert changed.config["num_slots"] == 40
    assert any("cold" in note for note in changed.notes)
    assert session.run("Once", slots=0.5, cache="lfu", max_new_tokens=2).config["cache"] == "lfu"
    session.run("Once", cache="lru", max_new_tokens=2)


def test_a_share_of_one_is_not_one_slot():
    """1.0 == 1 in Python; taken for each other, a full cache would become a cache of one."""
    assert EngineConfig(slots=1.0).slots == EngineConfig(slots=1).slots
    with Session(slots=1.0, device="cpu", link_gb_per_s=50.0) as session:
        assert session._is_new(2, None)
        assert session._is_new(1, None)
        assert not session._is_new(1.0, None)
        assert not session._is_new(session.engine.num_slots, None)


def test_a_job_runs_in_the_background_and_gives_the_same_text(session):
    plain = session.run(PROMPTS, max_new_tokens=5)
    job = session.job(PROMPTS, max_new_tokens=5)
    assert job.result(60).tokens == plain.tokens
    assert (job.progress, job.is_done, job.num_tokens, job.error) == (1.0, True, 5, None)
    assert len(session.runs) == 2


def test_a_cancelled_job_ends_at_the_next_token_with_what_there_is(session):
    job = session.prepare(PROMPTS, max_new_tokens=200)
    job.on_step(lambda job: job.cancel() if job.num_tokens == 3 else None)
    run = job.start().result(60)
    assert 3 <= len(run.tokens[0]) <= 4
    assert any("cancelled" in note for note in run.notes)
    assert session.run("Once", max_new_tokens=2).tokens, "the engine works on"


def test_a_job_cancelled_before_it_began_has_no_result(session):
    job = session.prepare("Once", max_new_tokens=2)
    job.cancel()
    with pytest.raises(CancelledError):
        job.start().result(60)
    assert session.runs == []


def test_jobs_wait_for_one_another(session):
    """One engine records one run at a time; a second one is queued, not refused."""
    jobs = [session.job("Once", max_new_tokens=4) for _ in range(3)]
    assert len({tuple(job.result(60).tokens[0]) for job in jobs}) == 1
    assert len(session.runs) == 3


def test_a_failed_job_hands_its_error_to_who_asks(session, monkeypatch):
    def fail(*_args: object, **_keywords: object) -> None:
        raise TransferFailed("the cable is out")

    monkeypatch.setattr(session.engine, "generate", fail)
    job = session.job("Once")
    with pytest.raises(TransferFailed, match="cable"):
        job.result(60)
    assert isinstance(job.error, TransferFailed)
    assert not session.is_running


def test_a_run_is_shown_while_it_goes_on_and_never_after_its_end(session):
    """What a viewer shows comes from another thread: late, it would overwrite the result."""
    seen: list[tuple[float, bool, str, list[list[int]]]] = []
    job = session.prepare(PROMPTS, max_new_tokens=24)

    def view(job: Job) -> None:
        name = threading.current_thread().name
        seen.append((time.monotonic(), job.is_done, name, [list(row) for row in job.tokens]))
        time.sleep(0.15)  # slower than the tokens come

    job.on_progress(view)
    ended: list[int] = []
    job.on_done(lambda job: ended.append(len(seen)))
    run = job.start().result(60)
    assert 1 <= len(seen) < 24
    assert ended == [len(seen)]
    assert {name for _, _, name, _ in seen} == {"prescope-progress"}
    assert not any(is_done for _, is_done, _, _ in seen)
    for _, _, _, rows in seen:
        assert rows == [tokens[: len(row)] for tokens, row in zip(run.tokens, rows, strict=True)]
    assert len(job.token_times_s) == 24


def test_remaining_time_goes_by_the_tokens_not_by_what_came_before_them(session):
    job = session.prepare("Once", max_new_tokens=10)
    job.token_times_s = [7.0, 7.5]
    assert job.left_s == pytest.approx(4.0)
    job.token_times_s = [7.0]
    assert job.left_s is None


def test_watchers_have_run_when_result_returns(session):
    seen: list[str] = []
    job = session.prepare("Once", max_new_tokens=2)
    job.on_done(lambda job: seen.append(threading.current_thread().name + str(job.is_done)))
    job.start().result(60)
    assert seen == ["prescope-runTrue"]


def test_the_report_of_a_session_is_one_page(session, tmp_path):
    session.run(PROMPTS, max_new_tokens=3)
    page = session.report(tmp_path / "r.html", title="Two prompts").read_text()
    assert page.count("Plotly.newPlot(") >= 5
    assert "emulated link</span>" in page


def test_an_engine_keeps_its_settings(session):
    with pytest.raises(UnsupportedOption, match="slots"):
        Session(session.engine, slots=0.25)
    assert Session(session.engine).engine is session.engine


def test_a_report_answers_first_and_says_how_to_get_it_again(session, tmp_path):
    session.run(PROMPTS, slots=0.25, max_new_tokens=6)
    page = session.report(tmp_path / "r.html").read_text()
    body = page[page.index("<body>") :]
    order = [
        body.index(part)
        for part in ("class='verdict'>Prediction", "class='table numbers'", "<figure>", "How to")
    ]
    assert order == sorted(order)
    for row in ("simulated", "measured, link emulated", "bound"):
        assert f"<th>{row}</th>" in body
    for what in ("machine", "model", "settings"):
        assert f"<th>{what}</th>" in body
    assert "prescope.load(&#x27;tiny-moe&#x27;, slots=0.25" in body
    shown = re.sub(r"<script.*?</script>", "", body, flags=re.DOTALL)
    assert ">NaN<" not in shown and "e+02" not in shown
    assert len(page) < 10_000_000


def test_the_trace_in_a_page_is_the_runs_and_a_large_one_is_left_out(session, tmp_path, monkeypatch):
    run = session.run(PROMPTS, max_new_tokens=3)
    page = session.report(tmp_path / "r.html").read_text()
    content = base64.b64decode(re.search(r"octet-stream;base64,([^']+)'", page)[1])
    (tmp_path / "t.safetensors").write_bytes(content)
    assert RoutingTrace.load(tmp_path / "t.safetensors").digest() == run.trace.digest()
    monkeypatch.setattr(runs, "MOST_TRACE_BYTES", 100)
    assert "octet-stream;base64," not in session.report(tmp_path / "r.html").read_text()


def test_the_code_in_a_page_makes_the_run_again(session, tmp_path):
    run = session.run(PROMPTS, slots=40, cache="lfu", max_new_tokens=3)
    code = session_code(session.report(tmp_path / "r.html").read_text())
    names: dict[str, object] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(code, names)
    assert names["run"].tokens == run.tokens
    assert names["run"].config["num_slots"] == 40
    assert names["run"].metrics.decode.hits == run.metrics.decode.hits
    names["engine"].close()


def session_code(page: str) -> str:
    return unescape(page.split("<summary>Code</summary><pre>")[1].split("</pre>")[0])


def test_a_report_of_a_panel_is_of_its_setting(session, tmp_path):
    run = session.run(PROMPTS, slots=0.25, max_new_tokens=6)
    board = session.dashboard(PROMPTS, scenarios=session.scenarios(run), max_new_tokens=6)
    board.live.choose(Scenario(schedule="on-demand", slots=50))
    for of in (board, board.live):
        page = session.report(tmp_path / "r.html", of=of).read_text()
        assert "On demand · 50 slots" in page
        assert "<th>measured, link emulated</th>" not in page
    board.live.start().result(60)
    board.live.pin()
    page = session.report(tmp_path / "r.html", of=board).read_text()
    for row in ("simulated", "measured, link emulated", "pinned", "bound"):
        assert f"<th>{row}</th>" in page
    assert "Scenario(schedule=&#x27;on-demand&#x27;, slots=50" in page
    board.close()


def test_a_report_of_the_panel_of_slots_is_of_the_run_that_it_shows(session, tmp_path):
    run = session.run(PROMPTS, slots=40, max_new_tokens=3)
    panel = session.panel(PROMPTS, max_new_tokens=3)
    session.run(PROMPTS, slots=50, max_new_tokens=3)
    assert panel.result is run
    page = session.report(tmp_path / "r.html", of=panel).read_text()
    assert "On demand · 40 slots" in page and "On demand · 50 slots" not in page
    panel.result = None
    assert "On demand · 50 slots" in session.report(tmp_path / "r.html", of=panel).read_text(), "the last run"


def test_what_no_report_can_be_of_is_told(session, tmp_path):
    run = session.run(PROMPTS, max_new_tokens=3)
    pair = session.pair_panel(session.scenarios(run), Scenario(slots=50))
    for of in (pair, [run, run], "a run", run.metrics):
        with pytest.raises(UnsupportedOption, match="a report is of one run"):
            session.report(tmp_path / "r.html", of=of)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("last", [{"max_new_tokens": 1}, {"max_new_tokens": 4, "use_cache": False}])
def test_a_report_of_a_run_without_decode_steps_says_what_cannot_be_drawn(session, tmp_path, last):
    session.run("The old man", max_new_tokens=3)
    session.run("The old man", **last)
    page = session.report(tmp_path / "r.html").read_text(encoding="utf-8")
    assert page.count("plotly-graph-div") >= 3
    if not session.last.metrics.decode.num_steps:
        assert "No figure of the latency: there are no decode steps" in page


def test_the_frequencies_remembered_are_the_newest_runs(session):
    """They were the first run's for ever: a static cache after a change of subject went by what was asked before."""
    engine = session.engine
    for prompt in ("The old man", "def main(arguments): return 0"):
        run = session.run(prompt, max_new_tokens=4)
        session._remember_hot(run)
        assert np.array_equal(engine.frequencies, run.trace.expert_counts())
    told = np.ones_like(engine.frequencies)
    engine.configure(frequencies=told)
    session._remember_hot(session.run("The old man", max_new_tokens=3))
    assert engine.frequencies is told, "what the user said stays"
