"""Settings that a person comes back to, one button each, and the setting shown as Python."""

from collections.abc import Callable

import ipywidgets as ipw

from ..simulator import Scenario, Scenarios, best_found, code_of
from .copy_button import CopyButton
from .style import row


class Presets:
    """Buttons that put all controls where a well-known setting has them; slots and machine stay as they are.

    Args:
        scenarios, scenario: asked for what is simulated, and for what the controls say.
        choose: takes the setting.

    Attributes:
        buttons: by name. view: the row.
    """

    def __init__(
        self,
        scenarios: Callable[[], Scenarios],
        scenario: Callable[[], Scenario],
        choose: Callable[[Scenario], None],
    ) -> None:
        self._scenarios, self._scenario, self._choose = scenarios, scenario, choose
        self._pinned: Scenario | None = None
        ways = {
            "Default": (self._default, "PreSched with its own settings"),
            "On demand": (self._on_demand, "No prediction, LRU: what everything else is held against"),
            "Best found": (
                self._best,
                "The fastest of all schedules and of some two dozen settings, simulated",
            ),
            "Pinned": (self._back, "Back to the setting that was pinned as baseline"),
        }
        self.buttons = {}
        for name, (find, why) in ways.items():
            button = ipw.Button(description=name, tooltip=why, layout={"width": "auto"})
            button.on_click(lambda _, find=find: self._choose(find()))
            self.buttons[name] = button
        self.buttons["Pinned"].disabled = True
        self.copy = CopyButton()
        self.view = row(*self.buttons.values(), self.copy)

    def pin(self, scenario: Scenario) -> None:
        """Remember a setting to come back to."""
        self._pinned = scenario
        self.buttons["Pinned"].disabled = False

    def forget(self) -> None:
        """Another trace is simulated: its slots and machines are others."""
        self._pinned = None
        self.buttons["Pinned"].disabled = True

    def show(self) -> None:
        """Take up what the controls say."""
        self.copy.text = code_of(self._scenarios(), self._scenario())

    def _default(self) -> Scenario:
        return self._scenarios().as_published(self._scenario(), "presched")

    def _on_demand(self) -> Scenario:
        return self._scenarios().as_published(self._scenario(), "on-demand")

    def _best(self) -> Scenario:
        return best_found(self._scenarios(), self._scenario())

    def _back(self) -> Scenario:
        assert self._pinned is not None, "the button is off before"
        return self._pinned
