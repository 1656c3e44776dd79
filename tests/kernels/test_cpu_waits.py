"""Threads of the CPU lane that do not end are waited for as long as stated, and named."""

from types import SimpleNamespace

import pytest

from prescope.errors import WaitTimedOut
from prescope.kernels.cpu import native


def test_closing_a_lane_whose_threads_do_not_end_is_said(monkeypatch):
    asked = []
    calls = SimpleNamespace(is_here=True, close=lambda pool, most_ns: asked.append(most_ns) or 2)
    monkeypatch.setattr(native, "MOST_JOB_S", 10 * native._WAIT_NS / 1e9)
    with pytest.raises(WaitTimedOut, match="2 threads of the CPU lane have not ended within"):
        native._close_pool(calls, 1)
    assert asked == [native._WAIT_NS] * 10


def test_closing_ends_when_the_last_thread_has_ended():
    left = [3, 1, 0]
    native._close_pool(SimpleNamespace(is_here=True, close=lambda pool, most_ns: left.pop(0)), 1)
    assert not left
