import math

import numpy as np
import pandas as pd
import pytest

from prescope.core.types import Lane
from prescope.traces.events import LayerRow, event_frame, layer_frame, step_frame
from prescope.traces.metrics import METRIC_DEFINITIONS, Intervals, compute_metrics, overlap_us, union
from tests.support.small_run import LAYERS, STEPS, TEN_EVENTS, small_run
from tests.support.speed import assert_within, taken_ms


@pytest.fixture
def metrics():
    return compute_metrics(event_frame(TEN_EVENTS), layer_frame(LAYERS), step_frame(STEPS), 2, 6)


def test_ten_events_give_exactly_these_run_figures(metrics):
    assert metrics.ttft_ms == 1.0
    assert metrics.tpot_ms == pytest.approx(0.4)  # 800 us / 2 decode steps
    assert metrics.tokens_per_s == pytest.approx(5000.0)  # 4 tokens / 800 us
    assert metrics.end_to_end_s == pytest.approx(1.8e-3)
    assert (metrics.needed, metrics.hits, metrics.late, metrics.misses) == (15, 9, 1, 5)
    assert metrics.hit_rate == pytest.approx(0.6)
    assert (metrics.on_demand_transfers, metrics.prefetch_transfers) == (2, 1)
    assert (metrics.prefetched, metrics.prefetch_accuracy) == (
        2,
        2.0,
    )  # two used, one of them not in the events
    assert metrics.prefetch_coverage == pytest.approx(2 / 7)
    assert metrics.decode.prefetch_coverage == pytest.approx(2 / 4)
    assert metrics.prefetch_timeliness == pytest.approx(1 / 2)
    assert math.isnan(metrics.prefill.prefetch_accuracy) and math.isnan(metrics.prefill.prefetch_timeliness)
    assert metrics.h2d_bytes == 9_000_000
    assert metrics.h2d_busy_ms == pytest.approx(0.9)  # 600 + union of 1100-1300 and 1200-1400
    assert metrics.link_gb_per_s == pytest.approx(10.0)
    assert metrics.link_use_frac == pytest.approx(0.5)
    assert metrics.stall_frac == pytest.approx(630 / 1800)


def test_ten_events_give_exactly_these_phase_figures(metrics):
    prefill, decode = metrics.prefill, metrics.decode
    assert (prefill.wall_ms, decode.wall_ms) == (1.0, pytest.approx(0.8))
    assert (prefill.num_steps, decode.num_steps) == (1, 2)
    assert (prefill.stall_ms, decode.stall_ms) == (pytest.approx(0.48), pytest.approx(0.15))
    assert (prefill.host_wait_ms, decode.host_wait_ms) == (pytest.approx(0.02), 0.0)
    assert (prefill.dense_gpu_ms, prefill.experts_gpu_ms) == (pytest.approx(0.1), pytest.approx(0.4))
    assert (decode.dense_gpu_ms, decode.experts_gpu_ms) == (pytest.approx(0.25), pytest.approx(0.3))
    assert prefill.overlap_frac == pytest.approx(100 / 600)
    assert decode.overlap_frac == pytest.approx(150 / 300)  # 1100-1250 of 1100-1400
    assert decode.h2d_bytes == 3_000_000
    assert (decode.step_p50_ms, decode.step_p95_ms) == (pytest.approx(0.4), pytest.approx(0.49))
    assert decode.miss_rate + decode.late_rate + decode.hit_rate == pytest.approx(1.0)


def test_figures_are_read_with_their_units(metrics):
    rows = {line[:20].strip(): line[20:].split() for line in str(metrics).splitlines()[2:]}
    shown = {name: " ".join(cells) for name, cells in rows.items()}
    assert shown["wall time"].endswith("1 ms 0.8 ms 1.8 ms")
    assert shown["hit rate"].endswith("60.0 %")
    assert shown["copied H2D"].endswith("5.72 MiB 2.86 MiB 8.58 MiB")
    assert shown["experts needed"].endswith("5 10 15") and shown["link bandwidth"].endswith("10 GB/s")


def test_without_events_the_counts_still_stand_and_the_rest_is_nan():
    metrics = compute_metrics(event_frame([]), layer_frame(LAYERS), step_frame(STEPS), 2, 6)
    assert (metrics.hits, metrics.hit_rate, metrics.tpot_ms) == (9, pytest.approx(0.6), pytest.approx(0.4))
    for name in (
        "stall_ms",
        "h2d_bytes",
        "link_gb_per_s",
        "overlap_frac",
        "dense_gpu_ms",
        "prefetch_transfers",
    ):
        assert math.isnan(getattr(metrics, name)), name
        assert math.isnan(getattr(metrics.decode, name)), name


def test_a_run_of_one_token_has_a_ttft_but_no_tpot():
    """0 would claim that later tokens are free."""
    metrics = compute_metrics(
        event_frame(TEN_EVENTS[:5]), layer_frame(LAYERS[:1]), step_frame(STEPS[:1]), 2, 2
    )
    assert metrics.ttft_ms == 1.0
    assert math.isnan(metrics.tpot_ms)
    assert math.isnan(metrics.tokens_per_s)
    assert math.isnan(metrics.decode.hit_rate)
    assert str(metrics).count("–") > 3


def test_no_tables_at_all_give_nan_and_zero_counts():
    metrics = compute_metrics(event_frame([]), layer_frame([]), step_frame([]), 1, 0)
    assert metrics.needed == 0
    assert math.isnan(metrics.ttft_ms)
    assert "hit rate" in metrics._repr_html_()


def test_a_run_that_copies_nothing_has_no_bandwidth():
    events = [event for event in TEN_EVENTS if event.lane != "h2d"]
    metrics = compute_metrics(event_frame(events), layer_frame(LAYERS), step_frame(STEPS), 2, 6)
    assert (metrics.h2d_bytes, metrics.h2d_busy_ms, metrics.link_use_frac) == (0, 0.0, 0.0)
    assert math.isnan(metrics.link_gb_per_s)
    assert math.isnan(metrics.overlap_frac)


def test_a_table_that_loses_a_need_is_a_bug_and_says_so():
    with pytest.raises(AssertionError, match="!= needed"):
        compute_metrics(
            event_frame([]), layer_frame([LayerRow(0, "prefill", 0, 1, 3, 1, 0, 1, 1)]), step_frame([]), 1, 1
        )


def test_phases_add_up_to_the_run():
    metrics = small_run().metrics
    for name in ("wall_ms", "needed", "hits", "late", "misses", "stall_ms", "h2d_bytes", "dense_gpu_ms"):
        parts = getattr(metrics.prefill, name) + getattr(metrics.decode, name)
        assert parts == pytest.approx(getattr(metrics, name)), name


def test_compute_stall_and_host_wait_fill_the_wall_time_of_a_serial_lane():
    metrics = small_run().metrics
    parts = metrics.dense_gpu_ms + metrics.experts_gpu_ms + metrics.stall_ms + metrics.host_wait_ms
    assert parts == pytest.approx(metrics.wall_ms)


def test_every_figure_has_a_definition_and_every_definition_a_figure():
    metrics = small_run().metrics
    assert set(metrics.to_dict()) == set(METRIC_DEFINITIONS)
    assert list(metrics.to_frame().columns) == ["run", "prefill", "decode", "definition"]


def test_union_and_overlap_equal_counting_on_a_grid():
    """Whole microseconds, so that a grid of them is exact."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        grids, unions = [], []
        for _ in range(2):
            starts = rng.integers(0, 60, size=rng.integers(0, 9))
            ends = starts + rng.integers(1, 12, size=len(starts))
            grid = np.zeros(100, dtype=bool)
            for start, end in zip(starts, ends, strict=True):
                grid[start:end] = True
            grids.append(grid)
            unions.append(union(starts.astype(float), ends.astype(float)))
        assert [u.total_us for u in unions] == [grid.sum() for grid in grids]
        assert overlap_us(*unions) == pytest.approx((grids[0] & grids[1]).sum())


def test_copies_that_only_touch_compute_overlap_by_nothing_and_not_by_less():
    """Rounding said -1e-14 us, and a figure "-0 % of that hidden"."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        edges = np.cumsum(rng.random(40))
        copies, compute = (union(edges[at:-1:2], edges[at + 1 :: 2]) for at in (0, 1))
        assert 0.0 <= overlap_us(copies, compute) < 1e-9
        assert 0.0 <= overlap_us(compute, copies) < 1e-9


def test_intervals_that_touch_become_one():
    starts, ends = union(np.array([5.0, 0.0]), np.array([9.0, 5.0]))
    assert (starts.tolist(), ends.tolist()) == ([0.0], [9.0])
    assert overlap_us(Intervals(starts, ends), union(np.empty(0), np.empty(0))) == 0.0


def test_the_order_of_events_does_not_matter():
    run = small_run()
    shuffled = run.events.sample(frac=1, random_state=0)
    again = compute_metrics(shuffled, run.layers, run.steps, 2, 12)
    assert again.overlap_frac == pytest.approx(run.metrics.overlap_frac)
    assert again.h2d_busy_ms == pytest.approx(run.metrics.h2d_busy_ms)


def test_two_hundred_thousand_events_take_well_under_a_second():
    """0.1 s on one core."""
    run = small_run(steps=200)
    copies = 200_000 // len(run.events) + 1
    shift = run.events["start_us"].max() + 100
    parts = [run.events.assign(start_us=run.events["start_us"] + i * shift) for i in range(copies)]
    events = pd.concat(parts, ignore_index=True)
    assert len(events) >= 200_000
    assert set(events["lane"]) <= set(Lane)
    assert_within(300.0, lambda: taken_ms(lambda: compute_metrics(events, run.layers, run.steps, 2, 400)))
