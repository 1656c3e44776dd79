"""What each control is called by whoever hears a page instead of seeing it.

On a panel's grid a control's name is a widget of its own, and ipywidgets (8.1.9) ties nothing to it: a screen reader
says "slider" and a number. A description would name menus and fields, but takes their tooltip away, and never reaches
the handles of a slider. So the page does it, for all controls of a panel in one place.
"""

import anywidget

#: Class of the name of what stands in the same box.
LABEL = "ps-label"

_ESM = f"""
const CONTROLS = ":is(select, input, textarea, [role=slider]):not([aria-label])";
const ENDS = [", from", ", to"];
function name(control, label) {{
  const handles = [...control.closest(".noUi-target")?.querySelectorAll("[role=slider]") ?? []];
  const end = handles.length > 1 ? ENDS[handles.indexOf(control)] : "";
  control.setAttribute("aria-label", label.textContent + end);
  const help = control.title || label.title;
  if (help) control.setAttribute("aria-description", help);
}}
function nameAll(panel) {{ // label by label: a search for controls reads all marks of all figures, ten times a move
  for (const label of panel.querySelectorAll(".{LABEL} span"))
    for (const control of label.closest(".{LABEL}").parentElement.querySelectorAll(CONTROLS)) name(control, label);
}}
export default {{
  render({{ el }}) {{
    let later;
    // Before it has a width it stands in no panel. What tabs hold comes later, when they are first opened.
    const placed = new ResizeObserver(() => {{
      const panel = el.closest(".prescope");
      if (later || !panel) return;
      later = new MutationObserver(() => nameAll(panel));
      later.observe(panel, {{ childList: true, subtree: true }});
      nameAll(panel);
    }});
    placed.observe(el);
    return () => {{ placed.disconnect(); later?.disconnect(); }};
  }},
}};
"""


class Names(anywidget.AnyWidget):
    """Names the controls of the panel that it stands in; nothing of it is seen."""

    _esm = _ESM
