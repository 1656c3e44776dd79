"""What a sweep will take, said before it starts: by itself where points are simulated, on demand on a device."""

import threading
from collections.abc import Callable
from html import escape

import ipywidgets as ipw

from .figures import is_headless
from .style import row

#: Controls at rest for so long are asked about: a few points are tried for it.
REST_S = 0.6


class SweepEstimate:
    """A line with time and memory.

    Args:
        estimate: what the controls ask for, in words; tries a few points, so it takes a moment.
        is_cheap: whether it may be asked without being told to.

    Attributes:
        view: the line and its button. text: what it says.
    """

    def __init__(self, estimate: Callable[[], str], is_cheap: Callable[[], bool]) -> None:
        self._estimate, self._is_cheap = estimate, is_cheap
        self._timer: threading.Timer | None = None
        self._asked = 0
        self.button = ipw.Button(description="How long?", icon="clock-o", layout={"width": "auto"})
        self.button.tooltip = "Try three points now, without recording them, and say what all will take"
        self._line = ipw.HTML()
        self.view = row(self.button, self._line)
        self.button.on_click(lambda _: self._in_background())

    @property
    def text(self) -> str:
        """What the line says, as html."""
        return str(self._line.value)

    def moved(self) -> None:
        """What was said holds no longer; ask again when the controls rest."""
        self.stop()
        self._asked += 1
        self._line.value = ""
        if self._is_cheap() and not is_headless():
            self._timer = threading.Timer(REST_S, self.ask)
            self._timer.daemon = True
            self._timer.start()

    def ask(self) -> None:
        """Ask now, and wait for it."""
        asked = self._asked
        self._line.value = "<span class='ps-soft'>trying three points …</span>"
        try:
            text = escape(self._estimate())
        except Exception as error:  # noqa: BLE001 - lost in a thread, "trying" would stand for ever
            text = escape(str(error))
        if asked == self._asked:  # nothing was moved meanwhile
            self._line.value = f"<span class='ps-soft'>{text}</span>"

    def stop(self) -> None:
        """Ask no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _in_background(self) -> None:
        threading.Thread(target=self.ask, name="prescope-estimate", daemon=True).start()
