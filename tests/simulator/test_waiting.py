"""Requests that wait for a batch: by hand for a few, by laws for many."""

import numpy as np
import pytest

from prescope.errors import UnsupportedOption
from prescope.simulator import Pace, serve
from prescope.traces.arrivals import Arrivals, Requests

PACE = Pace(step_ms={1: 100.0, 4: 160.0}, prompt_ms=500.0)


def requests(arrive_s, new_tokens):
    return Requests(np.array(arrive_s, float), np.array(new_tokens))


def test_whoever_comes_while_a_batch_runs_waits_for_its_longest_text():
    """The first alone: prompt 0.5 s, ten steps of 0.1 s, free at 1.5. Then the two that came, in steps of 0.12 s."""
    served = serve(requests([0.0, 0.2, 1.4, 9.0], [11, 3, 6, 1]), PACE)
    np.testing.assert_allclose(served.begin_s, [0.0, 1.5, 1.5, 9.0])
    np.testing.assert_allclose(served.first_s, [0.5, 2.0, 2.0, 9.5])
    np.testing.assert_allclose(served.end_s, [1.5, 2.24, 2.6, 9.5])
    np.testing.assert_array_equal(served.batch, [1, 2, 2, 1])
    np.testing.assert_allclose(served.wait_s, [0.0, 1.3, 0.1, 0.0])
    np.testing.assert_allclose(served.ttft_s, [0.5, 1.8, 0.6, 0.5])
    assert served.free_s == 9.5


def test_a_batch_has_a_limit_and_the_order_is_kept():
    served = serve(requests([0, 0, 0, 0, 0], [2, 2, 2, 2, 2]), PACE, most=2)
    np.testing.assert_array_equal(served.batch, [2, 2, 2, 2, 1])
    assert (np.diff(served.begin_s) >= 0).all()


@pytest.mark.parametrize("rate", [0.05, 0.5, 3.0])
@pytest.mark.parametrize("most", [1, 4, 16])
def test_nobody_is_served_before_they_come_and_one_batch_runs_at_a_time(rate, most):
    drawn = Arrivals.load().draw(400, rate_per_s=rate)
    served = serve(drawn, PACE, most)
    assert (served.wait_s >= 0).all() and (served.end_s >= served.first_s).all()
    begins = np.unique(served.begin_s)
    ends = np.array([served.end_s[served.begin_s == begin].max() for begin in begins])
    assert (begins[1:] >= ends[:-1] - 1e-9).all()
    sizes = np.array([(served.begin_s == begin).sum() for begin in begins])
    assert sizes.max() <= most
    idle = np.flatnonzero(begins[1:] > ends[:-1] + 1e-9) + 1
    assert set(begins[idle]) <= set(drawn.arrive_s), "it rests only while nobody waits"


def test_more_requests_wait_longer_and_too_many_are_told():
    """The line is short below what can be served and grows without end above it."""
    trace = Arrivals.load()
    by_rate = [serve(trace.draw(1000, rate_per_s=rate), PACE, 4) for rate in (0.01, 0.03, 0.05, 1.0)]
    waits = [one.wait_s.mean() for one in by_rate]
    assert waits == sorted(waits)
    assert [one.keeps_pace for one in by_rate] == [True, True, True, False]


def test_a_step_s_time_lies_between_the_batches_that_are_known():
    assert [PACE.of(batch) for batch in (1, 2, 4, 8)] == pytest.approx([100, 120, 160, 320])


@pytest.mark.parametrize(
    ("step_ms", "prompt_ms"), [({}, 1.0), ({0: 1.0}, 1.0), ({1: 0.0}, 1.0), ({1: 1.0}, 0.0)]
)
def test_a_pace_without_times_is_refused(step_ms, prompt_ms):
    with pytest.raises(UnsupportedOption):
        Pace(step_ms=step_ms, prompt_ms=prompt_ms)


def test_an_empty_batch_is_refused():
    with pytest.raises(UnsupportedOption, match="most is 0"):
        serve(requests([0], [1]), PACE, most=0)
