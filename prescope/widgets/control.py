"""One control with its name, what it means, and, where it does nothing, the reason."""

from html import escape

import ipywidgets as ipw

from .style import boxed, label


def rebound(slider: ipw.IntSlider, low: int, high: int) -> None:
    """Give a slider other ends; its value stays, or becomes the nearer end."""
    # No moment at which an end lies beyond the value: the widget would refuse it.
    slider.min, slider.max = min(low, slider.min), max(high, slider.max)
    slider.value = min(max(low, slider.value), high)
    slider.min, slider.max = low, high


class Control:
    """A labelled control on the grid of a panel.

    Args:
        name: at its left. `help_text`: one sentence, on hover and for screen readers.
        control: without a description of its own.

    Attributes:
        view: the row.
    """

    def __init__(self, name: str, control: ipw.Widget, help_text: str) -> None:
        self.name, self.control, self.help_text = name, control, help_text
        control.tooltip = help_text
        self._note = ipw.HTML()
        self._note.add_class("ps-note")
        self._note.add_class("ps-empty")
        self.view = boxed(ipw.Box([label(name, help_text), control, self._note]), "ps-field")

    @property
    def note(self) -> str:
        """What stands below the control."""
        return str(self._note.value)

    def say(self, html: str) -> None:
        """Put a line below the control, or none."""
        if self._note.value != html:
            self._note.value = html
            (self._note.remove_class if html else self._note.add_class)("ps-empty")

    def allow(self, reason_not: str = "", note: str = "") -> None:
        """Enable the control, or disable it and say in place why.

        Args:
            reason_not: why it does nothing now; "" enables it. `note`: what stands there otherwise.
        """
        off = bool(reason_not)
        if self.control.disabled != off:
            self.control.disabled = off
            (self.view.add_class if off else self.view.remove_class)("ps-off")
        self.say(escape(reason_not) if off else note)
