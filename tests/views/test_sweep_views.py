"""The figures of a sweep, by their data."""

import pandas as pd
import plotly.graph_objects as go
import pytest

from prescope import tuning, views
from prescope.errors import UnsupportedOption
from prescope.tuning.points import COLUMNS
from prescope.views.sweep_front import sweep_front_info
from prescope.views.sweep_heat import plot_sweep_heat, sweep_heat_info
from prescope.views.sweep_history import sweep_history_info
from prescope.views.sweep_importances import sweep_importances_info
from prescope.views.sweep_parallel import brushed, plot_sweep_parallel, sweep_parallel_info
from prescope.views.sweep_points import (
    MOST_CELLS,
    OBJECTIVES,
    RECORD,
    cells_of,
    moved_in,
    points_frame,
    setting_axis,
)
from tests.support.sweeps import importances, sweep_points


def test_figures_and_sweeps_know_the_same_objectives_and_columns():
    """Figures do without the extra that sweeps need, so each has a list of its own."""
    assert {name: one.more_is_better for name, one in OBJECTIVES.items()} == {
        name: one.sign > 0 for name, one in tuning.OBJECTIVES.items()
    }
    assert RECORD == COLUMNS


@pytest.fixture(scope="module")
def points():
    return sweep_points()


def test_every_figure_says_its_origin_its_units_and_what_came_to_nothing(points):
    figures = [
        views.sweep_parallel(points),
        views.sweep_heat(points, "slots", "schedule"),
        views.sweep_importances(points, importances()),
        views.sweep_front(points),
        views.sweep_history(points),
    ]
    for figure in figures:
        assert type(figure) is go.Figure
        title = figure.layout.title.text
        assert "<b>simulated</b>: 22 points, a made-up machine · 1 infeasible · 1 failed · 1 running" in title
    labels = [one.label for one in figures[0].data[0].dimensions]
    assert labels == [
        "slots, experts", "schedule", "lookahead, layers", "tokens/s", "ms per token, p95", "GPU memory, GiB",
    ]  # fmt: skip
    for figure in figures[1:]:
        assert figure.layout.xaxis.title.text and figure.layout.yaxis.title.text


def test_measured_and_simulated_points_are_counted_apart(points):
    mixed = pd.concat([points, points.head(2).assign(origin="measured", machine="H200")])
    title = views.sweep_history(mixed).layout.title.text
    assert "<b>simulated</b>: 22 points" in title
    assert "<b>measured</b>: 2 points, H200" in title


def test_a_setting_that_was_not_moved_has_no_axis(points):
    assert moved_in(points) == ["slots", "schedule", "lookahead"]


def test_lines_of_points_that_came_to_nothing_are_not_drawn(points):
    info = sweep_parallel_info(points)
    assert len(info.numbers) == 22
    assert not {4, 5, 24} & set(info.numbers)
    assert info.axes[0].values[0] == 16
    assert info.axes[-1].values[0] == pytest.approx(16 * 100 / 1024)


def test_a_brush_leaves_the_points_within_all_its_ranges(points):
    info = sweep_parallel_info(points)
    assert brushed(info, {}) == info.numbers
    best = brushed(info, {0: [90, 100], 1: [[1.7, 2.3]]})  # 96 slots, presched
    assert [int(points["slots"][n]) for n in best] == [96, 96]
    assert {points["schedule"][n] for n in best} == {"presched"}
    assert len(brushed(info, {0: [[10, 20], [90, 100]]})) == 4 + 6, (
        "two ranges on one axis are either of them"
    )


def test_the_strongest_colour_is_the_best_whichever_way_that_is(points):
    more = plot_sweep_parallel(sweep_parallel_info(points)).data[0].line
    less = plot_sweep_parallel(sweep_parallel_info(points, "p95_ms")).data[0].line
    assert (more.reversescale, less.reversescale) == (False, True)


def test_heads_of_axes_that_would_lie_over_each_other_are_turned(points):
    """Six axes were held to fit, whatever they are called: "lookahead, layers" ran into "threshold, least ..."."""
    threshold = [0.1 * (i % 4) for i in range(len(points))]
    long = points.drop(columns="schedule").assign(threshold=threshold)
    assert [one.label for one in sweep_parallel_info(long).axes[1:3]] == [
        "lookahead, layers", "threshold, least probability",
    ]  # fmt: skip
    assert views.sweep_parallel(long).data[0].labelangle != 0
    assert views.sweep_parallel(points).data[0].labelangle == 0
    assert len(sweep_parallel_info(long).axes) == len(sweep_parallel_info(points).axes)


def test_a_cell_holds_the_best_of_its_points_and_which_it_is(points):
    info = sweep_heat_info(points, "slots", "lookahead")
    cell = next(c for c in info.cells if info.x_names[c.x] == "96" and info.y_names[c.y] == "1")
    assert (cell.best, cell.num_points) == (40 + 48 + 30 - 4, 3)
    assert points["schedule"][cell.number] == "presched"
    least = sweep_heat_info(points, "slots", "lookahead", "p95_ms")
    cell = next(c for c in least.cells if least.x_names[c.x] == "96" and least.y_names[c.y] == "1")
    assert points["schedule"][cell.number] == "presched", "the least time is the best"


def test_a_pair_that_came_to_nothing_says_why(points):
    info = sweep_heat_info(points, "slots", "schedule")
    [cell] = [cell for cell in info.cells if cell.best is None]
    assert cell.reason == "infeasible: 16 slots, and 20 are needed"
    figure = plot_sweep_heat(info)
    assert list(figure.data[1].x) == ["16"]
    assert "20 are needed" in figure.data[1].hovertext[0]


def test_many_values_are_cut_into_ranges_and_few_are_not():
    frame = pd.DataFrame({"threshold": [i / 100 for i in range(100)]})
    names, cells = cells_of(setting_axis(frame, "threshold"))
    assert len(names) == MOST_CELLS
    assert (cells[0], cells[-1]) == (0, MOST_CELLS - 1)
    names, cells = cells_of(setting_axis(frame.head(3), "threshold"))
    assert names == ("0", "0.01", "0.02")


def test_what_is_no_number_is_an_axis_of_names():
    frame = pd.DataFrame(
        {"cpu": [True, False], "slots": [0.25, "8GiB"], "cache": [None, "lru"]}, dtype=object
    )
    assert setting_axis(frame, "cpu").names == ("no", "yes")
    assert setting_axis(frame, "slots").label == "slots, share of the experts"
    assert setting_axis(frame, "cache").names == ("its own", "lru")
    assert setting_axis(frame, "cache").values == (0.0, 1.0)


def test_importances_are_in_percent_the_largest_first(points):
    info = sweep_importances_info(points, importances())
    assert info.settings == ("slots", "schedule", "lookahead")
    assert info.shares_pct == pytest.approx((60, 35, 5))


def test_no_point_of_the_front_is_beaten_in_both(points):
    info = sweep_front_info(points)
    assert [info.y[i] for i in info.front] == [74, 82, 98, 114]
    for i in info.front:
        assert not any(
            x <= info.x[i] and y >= info.y[i] and (x, y) != (info.x[i], info.y[i])
            for x, y in zip(info.x, info.y, strict=True)
        )


def test_the_best_so_far_never_gets_worse(points):
    more, less = sweep_history_info(points), sweep_history_info(points, "p95_ms")
    assert list(more.best) == sorted(more.best)
    assert list(less.best) == sorted(less.best, reverse=True)
    assert more.nothing == ((4, "infeasible: 16 slots, and 20 are needed"), (5, "failed: ran out"))


@pytest.mark.parametrize(
    ("draw", "words"),
    [
        (lambda p: views.sweep_history(p[p["state"] == "running"]), "no finished point"),
        (lambda p: views.sweep_heat(p, "slots", "slots"), "choose two"),
        (lambda p: views.sweep_heat(p, "slots", "colour"), "slots, schedule, lookahead"),
        (lambda p: views.sweep_front(p, "ttft_ms"), "tokens_per_s, p95_ms, gpu_bytes"),
        (lambda p: views.sweep_importances(p, {"slots": 0.0}), "that differ"),
    ],
)
def test_what_cannot_be_drawn_says_what_there_is(points, draw, words):
    with pytest.raises(UnsupportedOption, match=words):
        draw(points)


def test_a_table_of_some_points_has_the_columns_and_units_of_the_whole(points):
    few = points_frame(points[points["slots"] == 96], ["tokens_per_s", "gpu_bytes"], 3, like=points)
    assert list(few.columns) == [
        "tokens/s", "GPU memory, GiB", "slots, experts", "schedule", "lookahead, layers", "origin",
    ]  # fmt: skip
    assert list(few["tokens/s"]) == [114.0, 110.0, 96.0]
    small = points.assign(gpu_bytes=points["gpu_bytes"] / 1024)
    assert "GPU memory, MiB" in points_frame(small, ["gpu_bytes"], 1)
