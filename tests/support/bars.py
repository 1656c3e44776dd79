"""The progress bars that a call shows to whoever waits for it."""

import io
from typing import Any

import pytest
from tqdm.std import tqdm

from prescope.core import waiting


def watch_bars(monkeypatch: pytest.MonkeyPatch) -> list[tqdm]:
    """A list of all bars from now on; they count wherever stderr goes, and keep their numbers when they are closed."""
    seen: list[tqdm] = []

    class Watched(tqdm):
        def __init__(self, *positional: Any, **named: Any) -> None:
            super().__init__(*positional, **named | {"file": io.StringIO(), "disable": False})
            seen.append(self)

    monkeypatch.setattr(waiting, "tqdm", Watched)
    return seen
