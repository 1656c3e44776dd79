"""The looks of all panels: one grid for controls, one table of numbers, colours of the page's own theme.

Lab, VS Code and Voila name their colours by the same variables; where there are none, those behind the commas hold.
A panel's root carries the class `prescope`; ipywidgets marks it as disconnected when the kernel has gone.
"""

from html import escape

import ipywidgets as ipw

from ..views.theme import FONT, figures_css
from .names import LABEL, Names

#: Below this width of a cell controls stand above the figures, from it on beside them; px.
WIDE_PX = 1100

#: Lab's own arrow of a menu is as dark as its dark ground.
ARROW = (
    "data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 18 18'%3E"
    "%3Cpath fill='%23ddd' d='M5.2 5.9 9 9.7l3.8-3.8 1.2 1.2-5 4.9-5-4.9z'/%3E%3C/svg%3E"
)

CSS = f"""
.prescope {{ --ps-text: var(--jp-ui-font-color1, #222); --ps-soft: var(--jp-ui-font-color2, #555);
  --ps-ground: var(--jp-layout-color1, #fff); --ps-line: var(--jp-border-color2, #ddd); --ps-good: #00694c;
  --ps-bad: #a33e00; --ps-focus: var(--jp-brand-color1, #1976d2); font: 13px/1.45 {FONT}; color: var(--ps-text);
  container: prescope / inline-size; overflow: visible; }}
[data-jp-theme-light="false"] .prescope {{ --ps-good: #3ecf9f; --ps-bad: #ff9a57; }}
[data-jp-theme-light="false"] .prescope {{ --jp-widgets-dropdown-arrow: url("{ARROW}"); }}
.prescope .widget-html, .prescope .widget-html-content, .prescope .jupyter-widgets {{ color: var(--ps-text);
  font-size: 13px; line-height: 1.45; }}
.prescope .jupyter-button.mod-primary {{ color: var(--jp-ui-inverse-font-color1, #fff); }}
.prescope .widget-html-content {{ overflow: visible; }}
.prescope :is(select, input, button, .lm-TabBar-tab) {{ font-family: {FONT}; }}
{figures_css(".prescope", "var(--ps-text)")}
.prescope :is(a, button, select, input, textarea, .noUi-handle, .widget-readout, .lm-TabBar-tab):focus-visible {{
  outline: 2px solid var(--ps-focus) !important; outline-offset: 1px; }}
.prescope.jupyter-widgets-disconnected::before {{ content: "The session is gone: run the notebook's first cells again.";
  display: block; padding: 8px 12px; border: 1px solid var(--ps-bad); border-radius: 4px; color: var(--ps-bad);
  font: 600 14px {FONT}; }}
.prescope.jupyter-widgets-disconnected .jupyter-widgets-disconnected::before {{ display: none; }}
.prescope.jupyter-widgets-disconnected > * {{ opacity: .55; pointer-events: none; }}
.prescope.jupyter-widgets-disconnected .ps-job {{ display: none; }}
.ps-row {{ display: flex; flex-flow: row wrap; align-items: center; gap: 6px 12px; overflow: visible; }}
.ps-top {{ align-items: flex-start; }}
.ps-named {{ display: flex; align-items: center; gap: 12px; overflow: visible; max-width: 100%; }}
.ps-named > .ps-label {{ flex: none; }}
.ps-run {{ flex: 1 1 500px; }} .ps-job {{ display: flex !important; flex: 1 1 200px; align-items: center; gap: 12px;
  overflow: visible; }} .ps-job > .widget-html {{ flex: 1 1 0; min-width: 0; }}
.ps-side {{ display: grid !important; grid-template-columns: minmax(0, 1fr); gap: 8px 20px; overflow: visible; }}
.ps-controls {{ display: grid !important; grid-template-columns: repeat(auto-fill, minmax(250px, 1fr));
  gap: 6px 20px; align-content: start; align-items: start; overflow: visible; }}
.ps-copy.widget-button {{ width: auto; }} .ps-holds-wide {{ grid-auto-flow: row dense; }}
.ps-field.ps-wide {{ grid-column: 1 / -1; align-items: start; padding: 4px 0 6px; }}
.prescope .ps-wide > .ps-label .widget-html-content {{ line-height: 32px; }} .ps-wide .ps-run {{ flex: none; }}
.ps-wide .ps-job {{ flex: 1 1 100%; order: 1; }} .ps-unused .ps-job {{ display: none !important; }}
@container prescope (min-width: {WIDE_PX}px) {{
  .ps-side .ps-field.ps-wide {{ grid-template-columns: minmax(0, 1fr); }}
  .ps-side .ps-wide > .ps-label {{ display: none; }}
  .ps-side .ps-wide .ps-run {{ column-gap: 4px; }} .ps-side .ps-wide .ps-run button {{ padding: 0 6px; }}
  .ps-side .ps-wide .ps-job {{ flex-wrap: wrap; gap: 2px; }}
  .ps-side .ps-wide .ps-job > .widget-html {{ flex: 1 1 100%; }} }}
@container prescope (min-width: {WIDE_PX}px) {{
  .ps-side {{ grid-template-columns: 300px minmax(0, 1fr); }} .ps-side .ps-controls {{ grid-template-columns: 1fr; }}
  .ps-side .ps-figures .ps-controls {{ grid-template-columns: minmax(0, 1fr) minmax(0, 1fr) auto; }} }}
.ps-field {{ display: grid !important; grid-template-columns: 92px minmax(0, 1fr); align-items: center;
  gap: 0 10px; overflow: visible; min-height: 30px; }}
.ps-field > .ps-label {{ text-align: right; margin: 0; }}
.ps-field > .ps-label span {{ border-bottom: 1px dotted var(--ps-soft); cursor: help; }}
.ps-field > .widget-inline-hbox, .ps-field > .jupyter-widgets {{ margin: 0; width: 100%; min-width: 0; }}
.ps-field > .ps-note {{ grid-column: 2; color: var(--ps-soft); font-size: 12.5px; min-height: 0; }}
.ps-field > .ps-note:empty, .ps-field > .ps-empty {{ display: none; }}
.ps-field .widget-readout {{ font-variant-numeric: tabular-nums; min-width: 44px; color: var(--ps-text); }}
.ps-field .widget-slider .noUi-target {{ margin-left: 6px; }}
.ps-off .ps-label, .ps-off .widget-readout {{ color: var(--ps-soft); }}
.ps-off .noUi-target, .ps-off select {{ opacity: .5; }}
/* A hidden handle is no stop of Tab, which ipywidgets leaves it; what is drawn in its place is none either. */
.ps-off .noUi-handle {{ visibility: hidden; }}
.ps-off .noUi-origin::after {{ content: ""; position: absolute; right: -8px; top: -6px; width: 14px; height: 14px;
  border: 1px solid var(--ps-soft); border-radius: 50%; background: var(--jp-layout-color1, #fff); }}
.ps-move {{ display: grid !important; grid-template-columns: 22px minmax(0, 1fr); align-items: start;
  overflow: visible; }} .ps-move > .jupyter-widgets {{ margin: 0; width: 100%; min-width: 0; }}
.ps-move > .ps-tick.jupyter-widgets {{ width: 20px; min-width: 20px; }}
.ps-field > .ps-move + .ps-note {{ margin-bottom: 2px; }} .ps-sweep p {{ margin: 4px 0 2px; }}
.ps-sweep .ps-field {{ align-items: start; }} .ps-sweep .ps-field > .ps-label {{ line-height: 28px; }}
.ps-sweep .ps-move .widget-html-content {{ line-height: 28px; }} .ps-sweep .ps-move > .ps-tick {{ margin-top: 0; }}
.ps-rule {{ border: 0; border-top: 1px solid var(--ps-line); margin: 8px 0; }}
.ps-hidden {{ display: none !important; }} .prescope > .ps-unseen {{ height: 0; margin: 0; }}
.ps-copy {{ width: auto !important; }}
.ps-pairs {{ display: grid !important; grid-template-columns: repeat(auto-fit, minmax(380px, 1fr)); gap: 8px 20px;
  overflow: visible; }} .ps-pairs > * {{ min-width: 0; overflow: visible; justify-content: flex-end; }}
.ps-figures {{ min-width: 0; overflow: visible; }}
.ps-figures > * {{ min-width: 0; }} .ps-figures > .ps-controls {{ align-items: center; }}
.prescope table.ps-numbers, .prescope table.ps-table {{ border-collapse: collapse; font-variant-numeric: tabular-nums;
  font-size: 13px; margin: 0; width: auto; table-layout: auto; }}
.prescope table.ps-numbers {{ width: 100%; }} .prescope table.ps-table {{ margin-bottom: 8px; }}
.prescope .ps-numbers th, .prescope .ps-numbers td, .prescope .ps-table th, .prescope .ps-table td {{
  padding: 3px 14px 3px 0; text-align: right; border: 0; white-space: nowrap; color: var(--ps-text);
  background: none; vertical-align: baseline; }}
.prescope .ps-numbers thead th {{ font-weight: 500; color: var(--ps-soft); font-size: 12.5px; white-space: normal; }}
.prescope .ps-numbers th:first-child, .prescope .ps-numbers td:first-child, .prescope .ps-table td:first-child,
.prescope .ps-table th:first-child, .prescope .ps-table .ps-words {{
  text-align: left; }}
.prescope .ps-table td.ps-long {{ white-space: normal; min-width: 240px; max-width: 520px; }}
.prescope .ps-table .ps-first td {{ font-weight: 600; }}
.prescope .ps-table tbody tr {{ border-top: 1px solid var(--ps-line); background: none; }}
.prescope .ps-table thead th {{ vertical-align: bottom; white-space: normal; font-weight: 500; color: var(--ps-soft); }}
.prescope .ps-numbers tbody tr {{ border-top: 1px solid var(--ps-line); background: none; }}
.prescope .ps-numbers td:first-child {{ white-space: normal; }}
.prescope .ps-numbers td:first-child > span {{ white-space: nowrap; }}
.prescope .ps-numbers .ps-first td {{ font-weight: 600; }}
.prescope .ps-numbers td:nth-child(2) {{ font-size: 15px; }}
.ps-soft {{ color: var(--ps-soft); }} .ps-good {{ color: var(--ps-good); font-weight: 600; }}
.ps-bad {{ color: var(--ps-bad); font-weight: 600; }}
.ps-verdict {{ padding: 6px 0 2px; font-size: 14px; }}
.ps-badge {{ border: 1px solid var(--ps-line); border-radius: 9px; padding: 0 8px; font-size: 12px;
  white-space: nowrap; }}
.ps-error {{ border-left: 3px solid var(--ps-bad); padding: 2px 10px; }}
.ps-stale {{ opacity: .45; }}
.ps-text {{ white-space: pre-wrap; max-height: 11em; overflow: auto; border: 1px solid var(--ps-line);
  border-radius: 4px; padding: 6px 10px; font-size: 13px; }}
.ps-head {{ display: flex; flex-wrap: wrap; gap: 4px 14px; justify-content: space-between; }}
.ps-scroll {{ overflow-x: auto; }} .prescope textarea {{ box-sizing: border-box; }}
.prescope .lm-TabBar-tab {{ font-size: 13px; color: var(--ps-text) !important; flex: 0 1 auto !important;
  min-width: 60px !important; }}
.prescope .widget-tab > .widget-tab-contents, .prescope .jupyter-widget-tab > .widget-tab-contents {{
  padding: 10px 0; border: 0; border-top: 1px solid var(--ps-line); overflow: visible; }}
.ps-advice {{ max-width: 900px; }} .ps-advice h4 {{ margin: 4px 0; font-size: 15px; }}
@media print {{ .prescope, .prescope * {{ overflow: visible !important; }} .ps-side {{ display: block !important; }} }}
"""


def looks() -> ipw.HTML:
    """The style sheet, as the first child of a panel's root."""
    return ipw.HTML(f"<style>{CSS}</style>", layout={"display": "none"})


def panel(*children: ipw.Widget) -> ipw.VBox:
    """A panel's root with its looks, and with a name for each control that stands beside a `label`."""
    names = Names()
    names.add_class("ps-unseen")
    root = ipw.VBox([looks(), names, *children])
    root.add_class("prescope")
    return root


def label(name: str, help_text: str = "") -> ipw.HTML:
    """What the control in the same box is called, and what that means: on hover, and for who hears the page."""
    title = f" title='{escape(help_text, quote=True)}'" if help_text else ""
    found = ipw.HTML(f"<span{title}>{escape(name)}</span>")
    found.add_class(LABEL)
    return found


def named(name: str, control: ipw.Widget, help_text: str = "") -> ipw.Box:
    """A control behind its name, off the grid."""
    return boxed(ipw.Box([label(name, help_text), control]), "ps-named")


def boxed(box: ipw.Box, *classes: str) -> ipw.Box:
    """The same box with these classes."""
    for name in classes:
        box.add_class(name)
    return box


def row(*children: ipw.Widget) -> ipw.Box:
    """Children side by side, wrapped where the page is narrow."""
    return boxed(ipw.Box(list(children)), "ps-row")
