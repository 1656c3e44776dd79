"""A menu of the sweeps that lie where they lie by default."""

from collections.abc import Callable
from itertools import count

import ipywidgets as ipw

from ..tuning.record import FOLDER

NEW = "a new one"


class SweepStudies:
    """Which study is open.

    Args:
        chosen: called with the name that a person chose, or None for a new one.

    Attributes:
        menu: the control.
    """

    def __init__(self, chosen: Callable[[str | None], None]) -> None:
        self._chosen = chosen
        self._is_quiet = False
        self.menu = ipw.Dropdown(
            options=[NEW], tooltip="A study that is there: its points are shown, Start goes on"
        )
        self.menu.layout.width = "170px"
        self.menu.observe(self._on_choice, "value")

    def show(self, name: str | None) -> None:
        """Offer all that are there, and show this one as open; None: a new one."""
        former, self._is_quiet = self._is_quiet, True
        names, mine = studies_here(), NEW if name is None else name
        options = [NEW, *names, *([] if mine in (NEW, *names) else [mine])]
        if list(self.menu.options) != options:
            self.menu.options = options
        self.menu.value = mine
        self._is_quiet = former

    def _on_choice(self, _change: object) -> None:
        if not self._is_quiet:
            self._chosen(None if self.menu.value == NEW else self.menu.value)


def studies_here() -> list[str]:
    """Names of the sweeps in the folder where they lie by default, the newest first."""
    files = FOLDER.glob("*.db") if FOLDER.is_dir() else []
    return [path.stem for path in sorted(files, key=lambda path: -path.stat().st_mtime)]


def free_name() -> str:
    """A name that none of them has."""
    there = set(studies_here())
    return next(name for i in count(1) if (name := f"sweep {i}") not in there)
