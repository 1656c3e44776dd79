"""A button that puts a text on the clipboard: only the page can."""

import anywidget
import traitlets

_ESM = """
function byHand(text, el) { // where the page may not use the clipboard: not over https, or forbidden
  const area = document.createElement("textarea");
  area.value = text;
  el.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}
export default {
  render({ model, el }) {
    const button = document.createElement("button");
    button.className = "jupyter-widgets jupyter-button widget-button ps-copy";
    const rest = () => { button.textContent = model.get("label"); button.title = model.get("text"); };
    button.onclick = async () => {
      const text = model.get("text");
      try { await navigator.clipboard.writeText(text); } catch { byHand(text, el); }
      button.textContent = "Copied";
      setTimeout(rest, 1200);
    };
    model.on("change:text", rest);
    rest();
    el.append(button);
  },
};
"""


class CopyButton(anywidget.AnyWidget):
    """Copies `text`, which its tooltip shows."""

    _esm = _ESM
    label = traitlets.Unicode("Copy as code").tag(sync=True)
    text = traitlets.Unicode().tag(sync=True)
