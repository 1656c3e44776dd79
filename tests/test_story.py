"""What a page says of a run and of a setting: the answer, its numbers, figures or why not, and how to get it again."""

from dataclasses import replace

import plotly.graph_objects as go
import pytest

from prescope.predictor import Frequency
from prescope.report import story_of_run, story_of_setting, write_story
from prescope.scheduler.costs import LayerCosts
from prescope.simulator import HERE, Machine, Scenario, Scenarios
from prescope.traces.metrics import compute_metrics
from prescope.traces.result import RunResult
from prescope.views.numbers import numbers, run_in_words
from tests.support.small_run import LABEL, ROW_BYTES, small_run, small_trace

COSTS = LayerCosts(link_us=60.0, gpu_us=12.0, rest_us=25.0, decide_us=6.0, source="made for this test")
SETTING = Scenario(schedule="on-demand", slots=12, cache="lru")
THERE = {
    "schedule": "on-demand", "num_slots": 12, "cache": "lru", "cpu": False, "tokens_per_s": 1234.0,
    "tokens_per_s_runs": [1234.0], "p50_ms": 1.0, "p95_ms": 2.0, "hit_rate": 0.25, "link_use_frac": 0.5,
    "bytes_per_token": 3e6,
}  # fmt: skip


@pytest.fixture(scope="module")
def run():
    return small_run(steps=6)


@pytest.fixture(scope="module")
def scenarios():
    trace = small_trace(steps=6)
    machine = Machine(HERE, COSTS, ROW_BYTES, 25.0, 2)
    return Scenarios(trace, [machine], [Frequency(trace, 2)], label="a small one", measured=[THERE])


def of_phase(run: RunResult, phase: str) -> RunResult:
    """Only its steps of one phase."""
    kept = {name: getattr(run, name)[getattr(run, name)["phase"] == phase] for name in ("layers", "steps")}
    events = run.events[run.events["phase"] == phase]
    return replace(
        run, events=events, **kept, metrics=compute_metrics(events, **kept, batch=2, output_tokens=2)
    )


def drawn(figures) -> list[bool]:
    return [isinstance(figure, go.Figure) for figure in figures]


def test_a_run_has_its_words_its_numbers_and_all_five_figures(run):
    story = story_of_run(run)
    assert story.verdict == run_in_words(run)
    assert story.numbers == [numbers(run)]
    assert drawn(story.figures) == [True] * 5
    assert story.runs == [run] and story.trace is run.trace and story.commands == ()
    assert LABEL in story.about["machine"] and "commit" in story.about
    assert "12 slots" in story.about["settings"] and story.about["settings"].endswith("batch 2")


def test_a_run_that_can_be_simulated_says_so_first_and_stands_beside_its_bound(run, scenarios):
    story = story_of_run(run, scenarios)
    assert story.verdict.endswith(run_in_words(run)) and story.verdict != run_in_words(run)
    assert [row.row for row in story.numbers] == ["simulated", numbers(run).row, "bound"]
    simulated, measured, bound = story.numbers
    assert measured == numbers(run)
    assert simulated.tokens_per_s <= bound.tokens_per_s * (1 + 1e-9)
    other = replace(run, config=run.config | {"num_slots": 30})
    assert story_of_run(other, scenarios).numbers[0].slots_gib == pytest.approx(simulated.slots_gib * 30 / 12)


def test_figures_are_of_the_decode_phase_where_there_is_one(run):
    def title(story):
        return [figure.layout.title.text for figure in story.figures[1:3]]

    prefill, whole = story_of_run(of_phase(run, "prefill")), story_of_run(run)
    assert drawn(prefill.figures)[:3] == [True] * 3
    assert title(prefill) != title(whole)
    assert all("prefill" in text for text in title(prefill)) and not any(
        "prefill" in text for text in title(whole)
    )


def test_a_figure_that_cannot_be_drawn_says_why_and_the_others_stand(run):
    without = replace(run, events=run.events.iloc[:0])
    figures = story_of_run(without).figures
    assert drawn(figures).count(False) >= 1 and drawn(figures)[2]
    assert all(text.startswith("No figure of the ") for text in figures if isinstance(text, str))
    assert str(figures[0]).startswith("No figure of the timeline: ")


def test_a_setting_stands_beside_what_was_measured_of_it(run, scenarios):
    alone = story_of_setting(scenarios, replace(SETTING, slots=13))
    assert [row.row for row in alone.numbers] == ["simulated", "bound"]
    assert alone.runs == [] and drawn(alone.figures) == [True] * 3
    there = story_of_setting(scenarios, SETTING)
    assert [row.row for row in there.numbers] == ["simulated", "measured there", "bound"]
    assert there.numbers[1].tokens_per_s == 1234.0
    pinned = numbers(small_run(steps=4))
    older = small_run(steps=4)
    here = story_of_setting(scenarios, SETTING, [older, run], pinned, range(2, 5))
    assert [row.row for row in here.numbers] == ["simulated", numbers(run).row, "pinned", "bound"]
    assert here.numbers[1] == numbers(run), "the newest"
    assert here.numbers[2] == pinned._replace(row="pinned")
    assert here.runs == [run] and drawn(here.figures) == [True] * 4
    assert ">3 decode steps; " in here.figures[3].layout.title.text


def test_steps_that_a_run_does_not_have_are_not_drawn_beside_it(run, scenarios):
    shorter = small_run(steps=3)
    assert story_of_setting(scenarios, SETTING, [shorter], steps=range(4, 6)).figures[3:] == [""]
    none = replace(run, events=run.events.iloc[:0])
    assert len(story_of_setting(scenarios, SETTING, [none], steps=range(2, 4)).figures) == 3


def test_a_setting_says_machine_model_and_trace(run, scenarios):
    about = story_of_setting(scenarios, SETTING).about
    assert about["machine"] == f"{HERE}: made for this test"
    assert about["model"] == "a small one: 4 MoE layers, top-2 of 8 experts of 1.5 MB"
    assert "12 slots" in about["settings"] and "synthetic" in about["trace"]
    assert story_of_setting(scenarios, SETTING, [run]).about["machine"].endswith(f"; {LABEL}")


def test_the_code_of_a_run_gives_what_differs_from_the_defaults(run):
    config = {
        "model": "some/model", "slots": 12, "cache": "lru", "device": "auto", "schedule": "fate", "kernels": "triton",
        "events": True, "predictor": "early router", "lookahead": 1, "generate": {"max_new_tokens": 6},
    }  # fmt: skip
    trace = replace(run.trace, prompts=[{"text": "Once"}, {"text": "It's"}])
    code = story_of_run(replace(run, config=run.config | config, trace=trace)).code
    assert code.splitlines() == [
        "import prescope", "",
        "engine = prescope.load('some/model', slots=12, cache='lru', schedule='fate', lookahead=1)",
        "engine.configure(predictor=...)  # early router",
        'run = engine.generate([\'Once\', "It\'s"], max_new_tokens=6)',
    ]  # fmt: skip
    assert story_of_run(replace(run, trace=None)).code.endswith("run = engine.generate(prompts)")
    nameless = replace(run.trace, prompts=[{"text": "Once"}, {"domain": "none"}])
    assert "engine.generate(prompts)" in story_of_run(replace(run, trace=nameless)).code
    assert "configure" not in story_of_run(run).code


def test_the_machine_of_a_run_is_told_as_far_as_it_is_known(run):
    hardware = {
        "label": "a GPU",
        "cpu": "a CPU",
        "cores": 8,
        "torch": "2.11",
        "python": "",
        "link": "measured",
    }
    assert (
        story_of_run(replace(run, hardware=hardware)).about["machine"]
        == "a GPU, 8 cores of a CPU, torch 2.11"
    )


def test_a_story_becomes_a_page_with_all_of_it(scenarios, tmp_path):
    story = story_of_setting(scenarios, SETTING)
    page = write_story(story, tmp_path / "story.html", title="Why?").read_text()
    for words in (
        story.verdict,
        "measured there",
        "from prescope.simulator import Scenario",
        "a small one: 4 MoE",
    ):
        assert words in page
    assert f"<tr><th>machine</th><td>{HERE}: made for this test</td></tr>" in page
    assert "Download the trace" in page and page.count('class="plotly-graph-div"') == 3
