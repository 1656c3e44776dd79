"""Requests that are drawn have the gaps and lengths of the trace that they stand for."""

import json

import numpy as np
import pytest

from prescope.errors import BadTrace
from prescope.traces import arrivals
from prescope.traces.arrivals import NAMES, Arrivals


@pytest.mark.parametrize("name", NAMES)
def test_what_is_drawn_is_what_the_trace_was(name):
    """Rate, percentiles of gaps and lengths, and the bursts; of the heavy tail one number is known, its mean."""
    trace = Arrivals.load(name)
    drawn = trace.draw(300_000, seed=1)
    gaps = np.diff(drawn.arrive_s)
    assert 1 / gaps.mean() == pytest.approx(trace.rate_per_s, rel=0.06)
    assert gaps.std() / gaps.mean() == pytest.approx(trace.cv, rel=0.35)
    for percent in (10, 50, 90, 95):
        assert np.percentile(gaps, percent) == pytest.approx(trace.gaps_s[percent], rel=0.06)
        assert np.percentile(drawn.new_tokens, percent) == pytest.approx(trace.new_tokens[percent], rel=0.06)
    assert "Microsoft" in trace.source and "CC-BY-4.0" in trace.source


def test_another_rate_is_the_same_requests_closer_together():
    """So that curves over the load are not curves over the luck of a draw."""
    trace = Arrivals.load()
    slow, fast = (trace.draw(50, rate_per_s=rate, seed=3) for rate in (0.5, 2.0))
    assert slow.arrive_s[0] == 0
    np.testing.assert_allclose(slow.arrive_s, 4 * fast.arrive_s)
    np.testing.assert_array_equal(slow.new_tokens, fast.new_tokens)
    other = trace.draw(50, rate_per_s=0.5, seed=4)
    assert (other.new_tokens != slow.new_tokens).any()


@pytest.mark.parametrize(
    ("count", "rate", "seed"),
    [
        (0, 1.0, 0), (5, 0.0, 0), (5, -1.0, 0), (5, float("nan"), 0), (5, float("inf"), 0), (2.5, 1.0, 0),
        ("5", 1.0, 0), (True, 1.0, 0), (5, "1", 0), (5, 1.0, -1), (5, 1.0, 0.5),
    ],
)  # fmt: skip
def test_nothing_to_draw_is_refused(count, rate, seed):
    with pytest.raises(BadTrace, match="above 0"):
        Arrivals.load().draw(count, rate_per_s=rate, seed=seed)


@pytest.mark.parametrize("harm", ["gone", "percentiles", "a name"])
def test_a_damaged_file_and_an_unknown_name_say_what_to_do(tmp_path, monkeypatch, harm):
    whole = json.loads((arrivals.data_dir() / "arrivals" / arrivals.FILE).read_text("utf-8"))
    monkeypatch.setattr(arrivals, "data_dir", lambda: tmp_path)
    (tmp_path / "arrivals").mkdir()
    if harm != "gone":
        if harm == "percentiles":
            whole["traces"]["conv"]["interarrival"]["percentiles_s"]["50"] = 99.0
        (tmp_path / "arrivals" / arrivals.FILE).write_text(json.dumps(whole), "utf-8")
    with pytest.raises(
        BadTrace, match="choose one of 'conv', 'code'" if harm == "a name" else "install it again"
    ):
        Arrivals.load("chat" if harm == "a name" else "conv")
