"""The figures of the paper's experiments: their numbers are those of results, cards and committed files."""

import json
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from prescope import views
from prescope.errors import BadTrace
from prescope.predictor import Chance, Transition
from prescope.simulator import ORACLE, Machine, Scenario, Scenarios
from prescope.training import score
from prescope.views.cases import MARKS, cases_info, marks_of
from prescope.views.link_time import link_time_info
from prescope.views.recall_by_layer import recall_by_layer_info
from prescope.views.recall_by_shape import recall_by_shape_info
from tests.support.small_run import small_run, small_trace
from tests.training.test_score_card import SHAPE, made_trace
from tests.views.test_scheduling_views import COSTS

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


@pytest.fixture(scope="module")
def results():
    trace = small_trace(steps=9, batch=3)
    scenarios = Scenarios(trace, [Machine("test", COSTS, 1_500_000, 30.0, 2)])
    base = Scenario(slots=10, machine="test", predictor=ORACLE, cpu=False)
    return {
        name: scenarios.run(replace(base, schedule=name)) for name in ("on-demand", "klotski", "presched")
    }


@pytest.mark.parametrize("by", ["purpose", "overlap"])
def test_the_parts_of_the_link_s_time_make_up_a_step(results, by):
    """A part that is lost or counted twice would make one schedule look better than another."""
    info = link_time_info({**results, "measured": small_run(steps=9)}, by)
    parts = [sum(values) for values in zip(*info.ms.values(), strict=True)]
    wanted = [one.step_ms for one in results.values()]
    assert parts[:3] == pytest.approx(wanted, rel=1e-6)
    assert parts == pytest.approx(info.step_ms)
    assert min(min(values) for values in info.ms.values()) >= 0
    assert "others measured, link emulated" in info.told


def test_what_was_prefetched_for_nothing_is_told_apart(results):
    info = link_time_info(results)
    used, wasted = info.ms["used"], info.ms["wasted"]
    assert used[0] == wasted[0] == 0, "on demand nothing is prefetched"
    assert used[2] > 0, "an oracle's prefetches are used"
    accuracy = results["presched"].metrics.decode.prefetch_accuracy
    assert used[2] / (used[2] + wasted[2]) == pytest.approx(accuracy)


def test_copies_on_demand_are_not_hidden(results):
    hidden = link_time_info(results, "overlap").ms["hidden"]
    assert hidden[0] == pytest.approx(0, abs=1e-9)


def test_cases_shows_times_as_they_are_or_against_the_first_variant(results):
    table = views.steps_ms({"one": {"on demand": results["on-demand"], "PreSched": results["presched"]}})
    assert table.loc["one", "PreSched"] == pytest.approx(results["presched"].step_ms)
    assert cases_info(table, title="?", told="").values[1] == (table.loc["one", "PreSched"],)
    ratio = results["on-demand"].step_ms / results["presched"].step_ms
    relative = cases_info(table, title="?", told="", relative=True)
    assert relative.values == ((1.0,), (pytest.approx(ratio),))
    assert relative.axis == "times as fast as on demand"


def test_a_variant_looks_the_same_in_every_figure_and_no_two_look_alike():
    assert marks_of(["Klotski-like", "PreSched", "on demand"])[1:] == [MARKS[1], MARKS[0]]
    assert marks_of(["PreSched, perfect prediction"]) == [MARKS[2]]
    for names in (["a", "b", "c", "d", "e"], ["on demand", "a", "PreSched", "b", "perfect prediction"]):
        assert len(set(marks_of(names))) == 5


def test_cases_takes_no_more_variants_than_there_are_marks():
    with pytest.raises(BadTrace, match="5 variants at most"):
        cases_info(pd.DataFrame([[1.0] * 6]), title="?", told="")
    with pytest.raises(BadTrace, match="one case at least"):
        views.cases(pd.DataFrame(columns=["a"]), title="?", told="")


def test_an_axis_over_two_orders_has_whole_numbers_as_ticks():
    figure = views.cases(pd.DataFrame({"a": [2.0, 30.0], "b": [3.0, 300.0]}), title="?", told="")
    assert figure.layout.xaxis.type == "log"
    assert figure.layout.xaxis.ticktext[:3] == ("1", "2", "5")


def test_recall_by_layer_is_the_card_s_over_depth():
    trace = made_trace()
    cards = {"transition": score(Transition(trace, 2), trace), "chance": score(Chance(SHAPE, 2), trace)}
    first, second, file = recall_by_layer_info({"made": cards, "file": {"llapor": [0.5, 0.7]}})
    frame = cards["transition"].to_frame().query("lookahead == 1 and moe_layer == 1")
    assert first.recall[1] == pytest.approx((frame.recall * frame.used).sum() / frame.used.sum())
    assert sum(first.recall) / len(first.recall) == pytest.approx(cards["transition"].recall(1))
    assert first.depth[0] == 0 and first.depth[-1] == 1 and second.predictor == "chance"
    assert (file.predictor, file.depth) == ("LLaPor", (0.0, 1.0))


def test_the_committed_shapes_are_drawn_with_their_intervals():
    rows = json.loads((RESULTS / "predictor_by_shape_cpu_2026-11-29.json").read_text())["rows"]
    assert len({(row["layers"], row["experts"], row["top_k"]) for row in rows}) >= 4
    info = recall_by_shape_info(rows)
    assert len(info.recall) == len(rows)
    assert (info.low <= info.recall).all(axis=None) and (info.recall <= info.high).all(axis=None)
    assert (info.recall["LLaPor"] > info.recall["early router"]).all()
    assert len(recall_by_shape_info(rows, 4).recall) < len(rows), "four layers ahead of three there is none"
    figure = views.recall_by_shape(rows)
    assert figure.layout.title.text.startswith("<b>Which MoEs can be predicted?")
