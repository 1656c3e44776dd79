import json
import re
import time

import plotly.graph_objects as go
import pytest

from prescope import views
from prescope.engine.job import Job
from prescope.engine.turn import Turn
from prescope.errors import TransferFailed
from prescope.session import Session
from prescope.widgets import SlimFigureWidget, figures, showing, slots_panel
from prescope.widgets.job_controls import JobControls
from tests.support.browser import chromium, jupyterlab, run_all
from tests.support.small_run import small_run

PROMPTS = ["Once upon a time", "def add(a, b):"]


@pytest.fixture(scope="module")
def session():
    with Session(slots=32, device="cpu", link_gb_per_s=50.0) as session:
        session.run(PROMPTS, max_new_tokens=6)
        yield session


@pytest.fixture
def panel(session):
    panel = session.panel(PROMPTS, max_new_tokens=6)
    yield panel
    panel.close()


def settled(panel):
    panel.job.result(60)
    return panel.state()


def test_a_figure_widget_sends_kilobytes_not_plotly():
    """The stock class sends 5 MB for every figure."""
    widget = SlimFigureWidget(go.Figure(go.Bar(y=[1, 2])))
    assert len(widget._esm) < 5_000
    assert (
        len(json.dumps({k: v for k, v in widget.get_state().items() if k != "_py2js_addTraces"}, default=str))
        < 50_000
    )
    bundle = figures._bundle()
    assert widget._bundle_ref == f"IPY_MODEL_{bundle.model_id}"
    assert SlimFigureWidget()._bundle_ref == widget._bundle_ref
    assert len(bundle.code) > 1_000_000
    assert re.search(r"export\{[^}]* as default\}", bundle.code), "the stub imports its default export"


def test_the_page_does_not_report_what_python_told_it():
    """Before each repaint plotly's part merged the whole figure twice, and sent what it found to be dropped here."""
    plain = figures._BUNDLE.read_text("utf-8")
    silent = figures.without_reports(plain)
    assert re.findall(r"(_send\w+)\(\w+\)\{return;", silent) == ["_sendLayoutDelta", "_sendTraceDeltas"]
    assert silent.replace("{return;", "{") == plain.replace("{return;", "{"), "nothing else is changed"
    assert figures.without_reports("another plotly") == "another plotly"
    done = []
    widget = SlimFigureWidget(go.Figure(go.Bar(y=[1])))
    widget.data[0].y = [2]
    widget.on_edits_completed(lambda: done.append(1))
    assert done == [1], "nobody would say that the edit is done"


def test_a_reload_gets_the_figure_as_it_is_now():
    """The stock class answers with its first state: after a reload the figure and the slider disagreed."""
    widget = SlimFigureWidget(go.Figure(go.Bar(y=[1, 2])))
    widget.data[0].y = [5, 6]
    widget.layout.title = "now"
    state = widget.get_state()
    assert list(state["_widget_data"][0]["y"]) == [5, 6]
    assert state["_widget_layout"]["title"] == {"text": "now"}


def test_an_edit_of_some_traces_leaves_the_others_as_they_are():
    """The page took "_undefined_", which plotly sends for those, for their value: "trace 14" stood in a legend."""
    marker, sent = {"color": ["red", "blue"]}, []
    bars = [go.Bar(y=[1, 2], name="a", marker=marker, showlegend=False), go.Bar(y=[3], name="b")]
    widget = SlimFigureWidget(go.Figure([*bars, go.Scatter(y=[4])]))
    widget.observe(lambda change: sent.append(change["new"]), "_py2js_update")
    with widget.batch_update():
        widget.data[0].y = [5, 6]
        widget.data[1].marker.color = "green"
        widget.data[1].showlegend = True
        widget.data[1].name = "c"
    message = sent[0]
    assert message["style_traces"] == [0, 1], "who is not touched is not sent"
    assert {path: [*values] for path, values in message["style_data"].items()} == {
        "y": [[5, 6], [3]],
        "marker.color": [["red", "blue"], "green"],
        "showlegend": [False, True],
        "name": ["a", "c"],
    }


@pytest.mark.parametrize(
    "view", [views.timeline, views.hit_rate, views.latency], ids=lambda view: view.__name__
)
def test_a_figure_taken_over_equals_the_new_one(view):
    widget = SlimFigureWidget(view(small_run(steps=5)))
    for run in (small_run(steps=9, seed=3), small_run(steps=9, slots=32)):
        figure = view(run)
        widget.show_figure(figure)
        assert [trace.name for trace in widget.data] == [trace.name for trace in figure.data]
        for mine, new in zip(widget.data, figure.data, strict=True):
            assert mine.to_plotly_json()["x"] == pytest.approx(new.to_plotly_json()["x"])
        assert widget.layout.title.text == figure.layout.title.text
        assert len(widget.layout.shapes) == len(figure.layout.shapes)


def test_a_new_panel_shows_the_last_run(panel, session):
    state = panel.state()
    assert state["slots"] == session.engine.num_slots
    assert state["shown_slots"] == session.last.config["num_slots"]
    assert not state["running"]
    assert len(panel._figure_box.children) == 3
    assert all(figure.data for figure in panel.figures.values())


def test_slots_are_shown_as_share_count_and_memory(panel):
    panel.slots.value = 64
    assert panel._slots_field.note == "<b>50 %</b> = 64 of 128 experts = 7.5 MiB"
    state = settled(panel)
    assert state["slots_frac"] == 0.5
    assert state["slots_gib"] == 64 * 122_880 / 2**30


def test_moving_the_slider_runs_again_and_updates_the_figures_in_place(panel):
    figures = dict(panel.figures)
    panel.slots.value = 48
    panel.job.result(60)
    assert settled(panel)["shown_slots"] == 48
    panel.slots.value = 96
    assert settled(panel)["shown_slots"] == 96
    assert panel.figures == figures, "the same widgets"
    assert all("96 slots" in f.layout.title.text for f in panel.figures.values())
    assert panel.controls.bar.value == 1.0
    assert panel.controls.status.value.startswith("done")
    assert panel.controls.cancel_button.disabled


def test_the_latest_setting_wins(panel):
    """Every release of the slider cancels the run before; the figures show the last, whatever finished first."""
    for slots in (40, 56, 72):
        panel.slots.value = slots
    assert settled(panel)["shown_slots"] == 72


def test_cancel_keeps_what_there_is(session):
    panel = session.panel(PROMPTS, max_new_tokens=400)
    job = panel.start()
    job.on_step(lambda job: panel.controls.cancel_button.click() if job.num_tokens == 2 else None)
    settled(panel)
    assert len(panel.result.steps) < 50
    assert "cancelled" in panel.controls.status.value
    panel.close()


def test_a_run_cancelled_at_its_first_token_leaves_the_figures(session):
    """They vanished, and the slider of steps could not be moved any more."""
    panel = session.panel(PROMPTS, max_new_tokens=400)
    former, last_step = panel.result, panel.step.max
    job = panel.start()
    job.on_step(lambda job: panel.cancel() if job.num_tokens == 1 else None)
    settled(panel)
    if len(job.result().steps) == 1:
        assert panel.result is former
        assert panel.step.max == last_step
    assert len(panel._figure_box.children) == 3
    assert "cancelled" in panel.controls.status.value
    panel.step.value = panel.step.max
    assert panel.figures["timeline"].data
    panel.close()


def test_a_cancelled_run_says_so_once(session):
    panel = session.panel(PROMPTS, max_new_tokens=400)
    job = panel.start()
    while job.num_tokens < 3:
        assert not job.is_done
        time.sleep(0.01)
    panel.cancel()
    job.result(60)
    assert re.match(r"cancelled after \d+ steps(;|$)", panel.controls.status.value), (
        panel.controls.status.value
    )
    panel.close()


def test_remaining_time_is_shown_and_one_token_is_one_token():
    job = Job(lambda: None, Turn(), {"max_new_tokens": 5})
    shown = JobControls("Run", lambda: None, lambda job: "")
    shown.job = job
    job.token_times_s = [100.0]
    shown._progress(job)
    assert shown.status.value == "1 token"
    job.token_times_s = [100.0, 101.5, 102.0]
    shown._progress(job)
    assert shown.status.value == "3 tokens, 2.0 s left"


def test_a_failed_run_shows_its_error_and_loses_nothing(panel, session, monkeypatch):
    former = panel.result

    def fail(*_args: object, **_keywords: object) -> None:
        raise TransferFailed("the cable <is> out")

    monkeypatch.setattr(session.engine, "generate", fail)
    panel.controls.run_button.click()
    with pytest.raises(TransferFailed):
        panel.job.result(60)
    assert panel.result is former
    assert "TransferFailed" in panel.controls.status.value
    assert "the cable &lt;is&gt; out" in panel.controls.status.value
    assert not panel.state()["running"]
    monkeypatch.undo()
    panel.controls.run_button.click()
    assert settled(panel)["status"].startswith("done")


def test_the_step_slider_moves_the_timeline(panel):
    panel.step.value = 0
    assert "prefill" in panel.figures["timeline"].layout.annotations[0].text
    panel.step.value = 3
    assert panel.figures["timeline"].layout.annotations[0].text.startswith("step 3")


def test_a_second_panel_closes_the_first(session):
    first = session.panel(PROMPTS, max_new_tokens=2)
    second = session.panel(PROMPTS, max_new_tokens=2)
    assert first.view.comm is None
    assert second.view.comm is not None
    second.close()


def test_without_a_browser_a_panel_shows_plain_figures(panel, monkeypatch):
    """An exported FigureWidget is blank."""
    shown: list[object] = []
    monkeypatch.setattr(slots_panel, "display", shown.append)
    monkeypatch.setenv("PRESCOPE_HEADLESS", "1")
    panel._ipython_display_()
    assert [type(item) for item in shown[1:]] == [go.Figure] * 3
    monkeypatch.delenv("PRESCOPE_HEADLESS")
    live: list[dict[str, object]] = []
    monkeypatch.setattr(showing, "display", lambda data, raw: live.append(data))
    panel._ipython_display_()
    assert live[0]["application/vnd.jupyter.widget-view+json"]["model_id"] == panel.view.model_id
    assert "Plotly.newPlot(" in live[0]["text/html"]


LAB_CELLS = [
    "from prescope.session import Session\n"
    "session = Session(slots=32, device='cpu', link_gb_per_s=50.0)\n"
    "run = session.run(['Once upon a time'], max_new_tokens=6)",
    "panel = session.panel(['Once upon a time'], max_new_tokens=6)\npanel",
]


@pytest.fixture
def lab(tmp_path):
    with jupyterlab(tmp_path, LAB_CELLS) as url:
        yield url


@pytest.mark.browser
@pytest.mark.slow
def test_in_jupyterlab_the_slider_runs_the_model_and_a_reload_keeps_the_figures(lab):
    title = "[...document.querySelectorAll('.gtitle')].map(t => t.textContent).join('|')"
    with chromium(lab) as (page, requests, errors):
        run_all(page, lab)
        page.wait_for_function(
            "document.querySelectorAll('.js-plotly-plot .main-svg').length >= 9", timeout=120_000
        )
        assert "32 slots" in page.evaluate(title)
        page.locator(".noUi-handle").first.focus()
        page.keyboard.press("ArrowRight")
        page.wait_for_function(f"({title}).split('33 slots').length === 4", timeout=60_000)
        page.keyboard.press("Control+s")
        page.wait_for_timeout(2_000)
        page.reload()
        page.wait_for_function(f"({title}).split('33 slots').length === 4", timeout=60_000)
        assert requests == []
        assert [error for error in errors if "prescope" in error.lower() or "plotly" in error.lower()] == []
