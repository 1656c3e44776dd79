"""Pages that open offline: a report of runs, and an executed notebook, each one HTML file without requests.

plotly.js stands in the page once (4.8 MB). Every page carries a JSON block with its provenance
(`<script type="application/json" id="provenance">`). Widgets need a kernel, so a notebook runs with
PRESCOPE_HEADLESS=1 and its panels show plain figures.

    python -m prescope.report notebooks/00_quickstart.ipynb --out reports/quickstart.html --param slots=0.25
"""

import argparse
import ast
import asyncio
import json
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd

from .core.extras import missing_extra

try:
    import nbformat
    import plotly.graph_objects as go
    import plotly.io as pio
    from jinja2 import DictLoader
    from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
    from jupyter_client.manager import AsyncKernelManager
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
    from nbconvert.exporters import HTMLExporter
    from plotly.offline import get_plotlyjs
    from traitlets.config import Config
except ImportError as error:
    raise missing_extra("prescope.report", "lab", error) from error

from .core.files import write_text
from .core.machine import machine_facts
from .errors import PrescopeError
from .traces.metrics import METRIC_DEFINITIONS
from .traces.result import RunResult
from .views.theme import CONFIG, FONT, figures_css

_BADGES = {"measured": "measured", "emulated": "emulated link", "virtual": "simulated"}
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_PLOTLY_MIME = "application/vnd.plotly.v1+json"


class NotebookFailed(PrescopeError):
    """A cell of a notebook raised, its kernel died, or it took too long."""


def badge(run: RunResult) -> str:
    """How a run's times came about: "measured", "emulated link" or "simulated"."""
    return _BADGES.get(str(run.hardware.get("link")), "origin unknown")


def write_report(
    figures: Sequence[go.Figure | str],
    tables: Mapping[str, pd.DataFrame],
    path: str | Path,
    *,
    title: str,
    runs: Sequence[RunResult],
    verdict: str = "",
) -> Path:
    """Write one HTML page that opens without network.

    Args:
        figures: plain figures, in order; FigureWidgets need a kernel and would come out blank. A text stands for a
            figure that cannot be drawn and says why.
        tables: heading -> frame.
        title, verdict: heading, and the finding in one sentence.
        runs: where the figures come from: their summaries and provenance are in the page.

    Raises:
        CannotWrite: no space, or no permission.
    """
    badges = " ".join(f'<span class="badge">{text}</span>' for text in dict.fromkeys(map(badge, runs)))
    summaries = "".join(
        f"<h2>{escape(run.label)}</h2>{run.metrics._repr_html_()}{_notes(run)}" for run in runs
    )
    body = (
        f"<h1>{escape(title)}</h1><p>{badges}</p><p class='verdict'>{escape(verdict)}</p>{summaries}"
        + "".join(f"<figure>{_div(figure)}</figure>" for figure in figures)
        + "".join(
            f"<h2>{escape(heading)}</h2><div class='table'>{table.to_html(border=0)}</div>"
            for heading, table in tables.items()
        )
        + _definitions()
    )
    provenance = _provenance(
        runs=[{"config": r.config, "hardware": r.hardware, "notes": r.notes} for r in runs]
    )
    return write_text(path, _page(title, body, provenance))


def _notes(run: RunResult) -> str:
    return "".join(f"<p class='note'>{escape(note)}</p>" for note in run.notes)


def _div(figure: go.Figure | str) -> str:
    if isinstance(figure, str):
        return f"<p class='note'>{escape(figure)}</p>"
    if isinstance(figure, go.FigureWidget):
        raise TypeError(f"{type(figure).__name__} needs a kernel; pass a plain go.Figure")
    return pio.to_html(figure, full_html=False, include_plotlyjs=False, include_mathjax=False, config=CONFIG)


def _definitions() -> str:
    pairs = METRIC_DEFINITIONS.items()
    rows = "".join(f"<tr><td><code>{name}</code></td><td>{escape(text)}</td></tr>" for name, text in pairs)
    return f"<details><summary>What each figure means</summary><table>{rows}</table></details>"


def _provenance(**facts: Any) -> dict[str, Any]:
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(sys.argv),
        "machine": machine_facts(),
        **facts,
    }


def _json_script(facts: dict[str, Any]) -> str:
    # "<!--" and "<script" inside a script make the browser look for another end of it; "<" stands only in texts here.
    text = json.dumps(facts, default=str, indent=1).replace("<", "\\u003c")
    return f'<script type="application/json" id="provenance">{text}</script>'


#: On paper figures are drawn anew for its width: as wide as the screen's they lost their last layers and tokens.
PAPER_PX = 640
_PRINT_JS = f"""<script>
const figures = () => [...document.querySelectorAll(".js-plotly-plot")];
addEventListener("beforeprint", () => figures().forEach((f) => Plotly.relayout(f, {{ width: {PAPER_PX} }})));
addEventListener("afterprint", () => figures().forEach((f) => Plotly.relayout(f, {{ width: null, autosize: true }})));
</script>"""
_SHARED_CSS = (
    figures_css("", "CanvasText")
    + """
@media print { figure, .plotly-figure, table { break-inside: avoid; } body { max-width: none; margin: 0; }
  .table, .ps-scroll, .jp-OutputArea-output { overflow: visible !important; } }
"""
)
_CSS = f"""{_SHARED_CSS}
:root {{ color-scheme: light dark; }}
body {{ font: 15px/1.5 {FONT}; max-width: 1080px; margin: 2em auto; padding: 0 1em; }}
h1 {{ font-size: 1.7em; margin-bottom: .2em; }} h2 {{ font-size: 1.15em; margin: 1.6em 0 .4em; }}
figure {{ margin: 1.6em 0; }} .verdict {{ font-size: 1.15em; }} .note {{ opacity: .75; }}
.badge {{ border: 1px solid currentColor; border-radius: 1em; padding: .1em .7em; font-size: .85em; }}
.table {{ overflow-x: auto; }} table {{ border-collapse: collapse; font-size: .92em; }}
td, th {{ padding: .2em .8em .2em 0; text-align: left; vertical-align: top; }}
details {{ margin: 1.5em 0; }} summary {{ cursor: pointer; }} pre {{ overflow-x: auto; font-size: .85em; }}
"""


def _page(title: str, body: str, provenance: dict[str, Any]) -> str:
    shown = escape(json.dumps(provenance, default=str, indent=1))
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_CSS}</style>'
        f'<link rel="icon" href="data:,"><script>{get_plotlyjs()}</script></head><body>{body}'
        f"<details><summary>Provenance</summary><pre>{shown}</pre></details>{_json_script(provenance)}{_PRINT_JS}"
        f"</body></html>"
    )


# -- notebooks -----------------------------------------------------------------------------------------------

_TEMPLATE = """{%- extends 'lab/index.html.j2' -%}
{%- block html_head_js -%}
<link rel="icon" href="data:,">
<script>{{ resources.plotlyjs }}</script>
{%- endblock -%}
{%- block html_head_js_mathjax -%}{%- endblock -%}
{%- block html_head_js_mermaidjs -%}{%- endblock -%}
{%- block jupyter_widgets -%}{%- endblock -%}
{%- block html_head_css -%}<style>{{ resources.prescope_css }}</style>{%- endblock -%}
{%- block data_other scoped -%}
{%- if resources.plotly_mime in output.data -%}
{%- set id = uuid4() -%}
<div id="{{ id }}" class="plotly-figure"></div>
<script>(() => {
const figure = {{ output.data[resources.plotly_mime] | json_dumps | escape_html_script }};
const config = {{ resources.plotly_config }};
Plotly.newPlot("{{ id }}", figure.data, figure.layout, config).then(
  (plot) => figure.frames && Plotly.addFrames(plot, figure.frames));
})();</script>
{%- endif -%}
{%- endblock -%}
{%- block body_footer -%}{{ resources.provenance }}{{ resources.print_js }}{{ super() }}{%- endblock -%}
"""
_NOTEBOOK_CSS = f"""{_SHARED_CSS}
body.jp-Notebook {{ max-width: 1080px; margin: 0 auto; padding: 1em; --jp-content-font-family: {FONT}; }}
.plotly-figure {{ width: 100%; }} .jp-OutputArea-child > .jp-OutputArea-output {{ width: 100%; }}
"""


def _log(line: str) -> None:
    print(line, flush=True)  # into a pipe too, cell by cell


class _SameInterpreter(KernelSpecManager):
    """The kernel is this interpreter, whatever kernel the user has installed under the notebook's name."""

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=argv, display_name=kernel_name, language="python")


def execute_notebook(
    path: str | Path,
    out: str | Path,
    *,
    parameters: Mapping[str, Any] | None = None,
    timeout_s: int | None = None,
    log: Callable[[str], None] = _log,
) -> Path:
    """Run a notebook from top to bottom without a browser and write it as one HTML page.

    The notebook file is not changed.

    Args:
        parameters: values for names that the cell tagged `parameters` assigns.
        timeout_s: longest time of one cell, seconds.
        log: gets one line for each cell.

    Raises:
        NotebookFailed: a cell raised (the message holds its number and traceback), took too long, or the
            kernel died. Nothing is written.
        ValueError: a parameter that the notebook does not have.
    """
    path = Path(path)
    notebook = nbformat.read(path, as_version=4)
    _inject(notebook, parameters or {})
    begin = time.monotonic()
    asyncio.run(_execute(notebook, path.resolve().parent, timeout_s, log))
    provenance = _provenance(notebook=path.name, parameters=dict(parameters or {}))
    written = write_text(out, _notebook_page(notebook, path.stem, provenance))
    log(f"{written}: {written.stat().st_size / 2**20:.1f} MiB, {time.monotonic() - begin:.0f} s")
    return written


def _inject(notebook: nbformat.NotebookNode, parameters: Mapping[str, Any]) -> None:
    """Assign the parameters in a cell of their own behind the one tagged `parameters`."""
    if not parameters:
        return
    tagged = [i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", [])]
    source = notebook.cells[tagged[0]].source if tagged else ""
    targets = [node.targets for node in ast.parse(source).body if isinstance(node, ast.Assign)]
    known = [target.id for group in targets for target in group if isinstance(target, ast.Name)]
    unknown = sorted(parameters.keys() - set(known))
    if unknown:
        raise ValueError(
            f"the notebook has no parameter {', '.join(unknown)}; it has {', '.join(known) or 'none'}"
        )
    lines = [f"{name} = {value!r}" for name, value in parameters.items()]
    cell = nbformat.v4.new_code_cell("\n".join(lines), metadata={"tags": ["injected-parameters"]})
    notebook.cells.insert(tagged[0] + 1, cell)


async def _execute(
    notebook: nbformat.NotebookNode, folder: Path, timeout_s: int | None, log: Callable[[str], None]
) -> None:
    code = [i for i, cell in enumerate(notebook.cells) if cell.cell_type == "code" and cell.source.strip()]
    number_of = {index: number for number, index in enumerate(code, 1)}
    started, is_interrupted = 0.0, False
    task = asyncio.current_task()
    assert task is not None

    def interrupt() -> None:
        nonlocal is_interrupted
        is_interrupted = True
        task.cancel()

    def on_notebook_start(**_: Any) -> None:
        # Instead of nbclient's, which kill the kernel but let the wait for its reply go on.
        with suppress(NotImplementedError):  # no signal handlers on Windows' loops
            for number in (signal.SIGINT, signal.SIGTERM):
                asyncio.get_running_loop().add_signal_handler(number, interrupt)

    def on_cell_execute(**_: Any) -> None:
        nonlocal started
        started = time.monotonic()

    def on_cell_executed(*, cell: Any, cell_index: int, **_: Any) -> None:
        first = cell.source.strip().splitlines()[0][:70]
        seconds = time.monotonic() - started
        log(f"[{number_of[cell_index]:>2}/{len(code)}] {seconds:6.1f} s  {first}")

    with tempfile.TemporaryDirectory(prefix="prescope-") as runtime:
        socket = Path(runtime) / "kernel.json"
        manager = AsyncKernelManager(kernel_spec_manager=_SameInterpreter(), connection_file=str(socket))
        if os.name == "posix" and len(str(socket)) < 80:  # a Unix socket's name has at most 107 bytes
            manager.transport = "ipc"
        client = NotebookClient(
            notebook,
            km=manager,
            timeout=timeout_s,
            store_widget_state=False,
            resources={"metadata": {"path": str(folder)}},
            on_notebook_start=on_notebook_start,
            on_cell_execute=on_cell_execute,
            on_cell_executed=on_cell_executed,
        )
        environment = {
            **os.environ,
            "PRESCOPE_HEADLESS": "1",
            "PLOTLY_RENDERER": "plotly_mimetype",
            "TQDM_DISABLE": "1",  # bars are widgets
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "PYTHONPATH": os.pathsep.join(_import_paths()),
        }
        try:
            await client.async_execute(cleanup_kc=True, env=environment)
        except CellExecutionError as error:
            raise NotebookFailed(_failure(notebook, error)) from error
        except (CellTimeoutError, DeadKernelError) as error:
            if is_interrupted:  # nbclient takes a cancelled task for a dead kernel
                raise KeyboardInterrupt from error
            raise NotebookFailed(f"{type(error).__name__}: {error}") from error


def _import_paths() -> list[str]:
    """What the kernel, started in the notebook's folder, needs to import this prescope, installed or not."""
    given = os.environ.get("PYTHONPATH", "")
    checkout = Path(__file__).resolve().parent.parent
    paths = [str(checkout)] if (checkout / "pyproject.toml").is_file() else []
    return paths + [os.path.abspath(path) for path in given.split(os.pathsep) if path]


def _failure(notebook: nbformat.NotebookNode, error: CellExecutionError) -> str:
    """Number of the cell that raised and its traceback."""
    found = [
        (number, output)
        for number, cell in enumerate(notebook.cells, 1)
        for output in cell.get("outputs", [])
        if output.output_type == "error"
    ]
    number, output = found[-1]
    head = f"cell {number} of {len(notebook.cells)} raised {error.ename}: {error.evalue}"
    return "\n".join([head, *output.traceback])


def _notebook_page(notebook: nbformat.NotebookNode, name: str, provenance: dict[str, Any]) -> str:
    # A figure's HTML or text stand-in comes after the figure itself.
    kinds = [_PLOTLY_MIME, "text/html", "image/svg+xml", "image/png", "text/markdown", "text/plain"]
    exporter = HTMLExporter(
        config=Config(NbConvertBase={"display_data_priority": kinds}),
        template_name="lab",
        extra_loaders=[DictLoader({"prescope.html.j2": _TEMPLATE})],
        template_file="prescope.html.j2",
        exclude_input_prompt=True,
        exclude_output_prompt=True,
        embed_images=True,
    )
    resources = {
        "metadata": {"name": name},
        "plotlyjs": get_plotlyjs(),
        "plotly_mime": _PLOTLY_MIME,
        "plotly_config": json.dumps(CONFIG),
        "prescope_css": _NOTEBOOK_CSS,
        "print_js": _PRINT_JS,
        "provenance": _json_script(provenance),
    }
    page, _ = exporter.from_notebook_node(notebook, resources=resources)
    return page


def _parameter(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} is not name=value")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value  # a plain text needs no quotes


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line. Exit status: 0, 1 when a cell failed, 2 for a wrong call, 130 when cancelled."""
    parser = argparse.ArgumentParser(
        prog="python -m prescope.report", description="Run a notebook, write one HTML."
    )
    parser.add_argument("notebook", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="the HTML file to write")
    parser.add_argument(
        "--param", action="append", default=[], type=_parameter, metavar="NAME=VALUE", help="may be repeated"
    )
    parser.add_argument("--timeout", type=int, help="longest time of one cell, seconds")
    given = parser.parse_args(arguments)
    try:
        execute_notebook(given.notebook, given.out, parameters=dict(given.param), timeout_s=given.timeout)
    except NotebookFailed as error:
        text = str(error)
        print(text if sys.stderr.isatty() else _ANSI.sub("", text), file=sys.stderr)
        return 1
    except (ValueError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 2
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("cancelled; nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
