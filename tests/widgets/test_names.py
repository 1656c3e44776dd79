"""Every control of every panel has a name, for who sees it and for who hears it."""

import ipywidgets as ipw
import pytest

from prescope.widgets.names import LABEL, Names
from tests.support.browser import CONTROLS, chromium, heard
from tests.support.panels import KINDS, opened, two_runs

#: Controls that hold a value.
HOLDS = (
    ipw.Dropdown, ipw.SelectMultiple, ipw.Checkbox, ipw.Textarea, ipw.Text, ipw.BoundedIntText, ipw.BoundedFloatText,
    ipw.IntSlider, ipw.FloatSlider, ipw.IntRangeSlider, ipw.FloatRangeSlider,
)  # fmt: skip
#: A panel as ipywidgets puts it together: the name of a field, and what it is drawn with, come when they come.
PAGE = """
async (code) => {
  const add = (to, html) => { to.insertAdjacentHTML("beforeend", html); return to.lastElementChild; };
  const label = (text, why = "") => `<div class="widget-html ps-label"><label style="display:none" title="null"></label>
    <div class="widget-html-content"><span title="${why}">${text}</span></div></div>`;
  const handle = (n) => `<div class="noUi-handle" role="slider" tabindex="0" data-handle="${n}">|</div>`;
  const slider = (...handles) => `<div class="widget-inline-hbox"><label style="display:none"></label>
    <div class="noUi-target">${handles.map(handle).join("")}</div><div class="widget-readout">3</div></div>`;
  const panel = document.createElement("div"), el = document.createElement("div");
  panel.className = "prescope";
  const url = URL.createObjectURL(new Blob([code], { type: "text/javascript" }));
  const end = (await import(url)).default.render({ el });
  add(panel, `<div class="ps-field">${label("slots", "Places for experts")}${slider(0)}</div>`);
  add(panel, `<div class="ps-field">${label("steps")}${slider(0, 1)}</div>`);
  add(panel, `<div class="ps-row"><div class="ps-row">${label("study")}
    <div><label for="a" style="display:none"></label><select id="a" title="One of those that are there"></select></div>
    </div><div><button>Start</button></div></div>`);
  panel.append(el); // drawn before it stands in the page, and before the page stands
  document.body.append(panel);
  const frame = () => new Promise((done) => requestAnimationFrame(() => setTimeout(done, 30)));
  await frame();
  const field = add(panel, `<div class="ps-field">${slider(0)}</div>`); // a tab that is opened: its name comes last
  await frame();
  field.insertAdjacentHTML("afterbegin", label("layer"));
  await frame();
  end();
  add(panel, `<div class="ps-field">${label("gone")}${slider(0)}</div>`);
  await frame();
}
"""


session = pytest.fixture(two_runs, scope="module", name="session")


def named(widget: ipw.Widget, name: str = "") -> list[tuple[ipw.Widget, str]]:
    """Controls in a widget, each with the label that stands in the nearest box around it."""
    if isinstance(widget, HOLDS):
        return [(widget, name)]
    inner = widget.children if isinstance(widget, ipw.Box) else ()
    labels = [child.value for child in inner if LABEL in child._dom_classes]
    name = labels[0] if labels else name
    return [found for child in inner for found in named(child, name)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_control_stands_beside_its_name(session, kind):
    panel = opened(session, kind)
    found = named(panel.view)
    assert len(found) >= 2
    assert [control for control, name in found if not name] == []
    assert any(isinstance(child, Names) for child in panel.view.children)
    panel.close()


@pytest.mark.browser
@pytest.mark.slow
def test_what_stands_beside_a_control_is_its_name_for_who_hears_the_page():
    with chromium() as (page, _, errors):
        page.evaluate(PAGE, Names._esm)
        names = [name for role, name in heard(page, ".prescope") if role in CONTROLS]
        helps = [help_text for role, help_text in heard(page, ".prescope", "description") if role in CONTROLS]
    assert sorted(names) == ["", "layer", "slots", "steps, from", "steps, to", "study"], (
        "a closed panel names no more"
    )
    assert sorted(filter(None, helps)) == ["One of those that are there", "Places for experts"]
    assert errors == []
