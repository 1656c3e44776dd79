"""What a figure's part of the page does until plotly has come: nothing that Python says is lost."""

import pytest

from prescope.widgets.figures import SlimFigureWidget
from tests.support.browser import chromium

#: Of anywidget's and plotly's parts what the stub uses; the bundle comes when `come()` is called.
PAGE = """
async (stub) => {
  class Model {
    values = { _bundle_ref: "IPY_MODEL_7" }; ears = {};
    get(name) { return this.values[name]; }
    set(name, value) {
      if (this.values[name] === value) return;
      this.values[name] = value;
      (this.ears[`change:${name}`] ?? []).slice().forEach((f) => f());
    }
    on(event, f) { (this.ears[event] ??= []).push(f); }
    off(event, f) { this.ears[event] = (this.ears[event] ?? []).filter((g) => g !== f); }
  }
  globalThis.heard = [];
  const code = `export default () => ({
    initialize({ model }) {
      model.on("change:_py2js_update", () => globalThis.heard.push(model.get("_py2js_update")));
    },
    render({ el }) { el.textContent = JSON.stringify(globalThis.heard); },
  })`;
  const model = new Model(), bundle = new Model();
  bundle.values = { code };
  let come;
  const comes = new Promise((done) => { come = () => done(bundle); });
  model.widget_manager = { get_model: async (id) => (id === "7" ? comes : null) };
  const url = URL.createObjectURL(new Blob([stub], { type: "text/javascript" }));
  const figure = (await import(url)).default();
  const begun = await Promise.race([
    Promise.resolve(figure.initialize({ model })).then(() => "at once"),
    new Promise((done) => setTimeout(() => done("after plotly"), 500)),
  ]);
  for (const value of [{ n: 1 }, null, { n: 2 }, null]) model.set("_py2js_update", value);
  const el = document.body.appendChild(document.createElement("div"));
  el.className = "lm-Widget ps-hidden";
  model.values._dom_classes = ["ps-hidden"];
  const rendered = figure.render({ model, el });
  come();
  await rendered;
  const hidden = el.className;
  model.set("_dom_classes", []);
  for (let i = 0; i < 100 && !el.textContent; i++) await new Promise((done) => setTimeout(done, 20));
  model.set("_py2js_update", { n: 3 });
  return [begun, el.textContent, JSON.stringify(globalThis.heard), [hidden, el.className]];
}
"""


@pytest.mark.browser
@pytest.mark.slow
def test_what_is_said_before_plotly_has_come_is_drawn():
    """anywidget 0.11 drops all messages of a model that takes two seconds to begin: the lanes came out empty on a busy
    machine, and no slider could fill them.
    """
    with chromium() as (page, _, errors):
        begun, drawn, heard, classes = page.evaluate(PAGE, SlimFigureWidget._esm)
    assert begun == "at once"
    assert drawn == '[{"n":1},null,{"n":2},null]'
    assert heard == '[{"n":1},null,{"n":2},null,{"n":3}]', "later messages are heard once"
    assert classes == ["lm-Widget ps-hidden", "lm-Widget"], "anywidget itself follows no class that changes"
    assert errors == []
