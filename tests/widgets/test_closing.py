"""A panel that is closed leaves nothing behind that would keep the others from coming back after a reload."""

from collections import Counter

import ipywidgets as ipw
import pytest
from ipywidgets.widgets.widget import _instances

from prescope.widgets.figures import _bundle
from prescope.widgets.showing import take_off
from tests.support.panels import KINDS, opened, two_runs

session = pytest.fixture(two_runs, scope="module", name="session")


def alive() -> dict[str, int]:
    """Models by kind, with plotly.js among them, which stays for the next figure."""
    _bundle()
    return Counter(type(widget).__name__ for widget in _instances.values())


def broken() -> list[str]:
    """Boxes that live and name a closed widget: after a reload Lab shows no widget at all, it waits for that one."""
    boxes = [box for box in _instances.values() if isinstance(box, ipw.Box)]
    return [repr(box) for box in boxes if any(child.comm is None for child in box.children)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_panel_opened_again_leaves_no_box_with_a_closed_widget(session, kind):
    before = alive()
    first = opened(session, kind)
    assert broken() == []
    second = opened(session, kind)  # the session closes the first
    assert first.view.comm is None
    assert broken() == []
    second.close()
    assert broken() == []
    second.close()  # as the session does once more, when it makes another one
    assert alive() == before, "nor a model of anything in it"


def test_what_stands_in_a_box_goes_with_it_the_outer_ones_first():
    inner = ipw.HBox([ipw.IntSlider()])
    outer, beside = ipw.Tab([inner, ipw.HTML()]), ipw.HTML()
    gone: list[ipw.Widget] = []
    for widget in (outer, inner, inner.children[0]):
        widget.comm.close = lambda *_, widget=widget, **__: gone.append(widget)
    slider = inner.children[0]
    take_off(outer)
    assert gone == [outer, inner, slider]
    assert beside.comm is not None
    beside.close()
