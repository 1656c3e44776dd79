"""A bar for whoever waits: on a terminal, when it takes long, and gone when it is over."""

import io
import sys

import pytest
from tqdm.std import tqdm

from prescope.core import waiting
from prescope.core.waiting import waiting_bar


class Terminal(io.StringIO):
    def __init__(self, is_one: bool) -> None:
        super().__init__()
        self._is_one = is_one

    def isatty(self) -> bool:
        return self._is_one


@pytest.mark.parametrize(
    ("is_terminal", "after_s", "is_shown"), [(True, 0.0, True), (True, 60.0, False), (False, 0.0, False)]
)
def test_it_is_shown_where_somebody_waits_and_sees_it(monkeypatch, is_terminal, after_s, is_shown):
    """Behind a pipe, as in a job's log, a line that is written over itself is a thousand lines."""
    monkeypatch.setattr(waiting, "tqdm", tqdm)
    monkeypatch.setattr(sys, "stderr", shown := Terminal(is_terminal))
    with waiting_bar(3, "counting", "sheep", after_s) as bar:
        for _ in range(3):
            bar.update()
    assert ("counting" in shown.getvalue()) == is_shown
    assert shown.getvalue().rpartition("\r")[2].strip() == "", "nothing is left of it"
