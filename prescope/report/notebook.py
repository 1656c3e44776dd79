"""An executed notebook as one HTML page.

Widgets need a kernel, so a notebook runs with PRESCOPE_HEADLESS=1 and its panels show plain figures.
"""

import ast
import asyncio
import atexit
import json
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import nbformat
from jinja2 import DictLoader
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbconvert.exporters import HTMLExporter
from plotly.offline import get_plotlyjs
from traitlets.config import Config

from ..core.files import require_file, require_writable, write_text
from ..core.paths import user_path
from ..errors import PrescopeError
from ..views.theme import CONFIG, FONT
from .page import PRINT_JS, SHARED_CSS, json_script, provenance

#: Of the line that says what the numbers mean, as panels write it.
VERDICT_CLASS = "class='ps-verdict'"
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_PLOTLY_MIME = "application/vnd.plotly.v1+json"
_WIDGET_MIME = "application/vnd.jupyter.widget-view+json"


class NotebookFailed(PrescopeError):
    """A cell of a notebook raised, its kernel did not start or died, it took too long, or the file is no notebook."""


def for_stderr(text: str) -> str:
    """A text for stderr: without the colours of a traceback where no terminal shows them."""
    return text if sys.stderr.isatty() else _ANSI.sub("", text)


_TEMPLATE = """{%- extends 'lab/index.html.j2' -%}
{%- block html_head_js -%}
<link rel="icon" href="data:,">
<script>{{ resources.plotlyjs }}</script>
{%- endblock -%}
{%- block html_head_js_mathjax -%}{%- endblock -%}
{%- block html_head_js_mermaidjs -%}{%- endblock -%}
{%- block jupyter_widgets -%}{%- endblock -%}
{%- block html_head_css -%}<style>{{ resources.prescope_css }}</style>{%- endblock -%}
{%- block body_header -%}{{ super() }}
{%- if resources.in_short -%}<section class="in-short">{{ resources.in_short }}</section>{%- endif -%}
{%- endblock -%}
{%- block input_group -%}
<details class="code"><summary>Code</summary>{{ super() }}</details>
{%- endblock -%}
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
_NOTEBOOK_CSS = f"""{SHARED_CSS}
body.jp-Notebook {{ max-width: 1080px; margin: 0 auto; padding: 1em; --jp-content-font-family: {FONT}; }}
details.code > summary {{ cursor: pointer; opacity: .6; font: 12.5px {FONT}; padding: 2px 0 2px 8px; }}
.in-short {{ border: 1px solid #8886; border-radius: 6px; padding: 10px 16px; margin: 0 0 1.2em; }}
.in-short .ps-verdict {{ font-size: 16px; font-weight: 600; }}
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
        NotebookFailed: a cell raised (the message holds its number and, behind the first line, its traceback), took
            too long, the kernel did not start or died, or the file is no notebook. Nothing is written.
        ValueError: a parameter that the notebook does not have.
        CannotWrite: the page; said before the first cell runs.
    """
    path = user_path(path)
    notebook = _read(path)
    _inject(notebook, parameters or {})
    require_writable(out)
    begin = time.monotonic()
    asyncio.run(_execute(notebook, path.resolve().parent, timeout_s, log))
    facts = provenance(notebook=path.name, parameters=dict(parameters or {}))
    written = write_text(out, _notebook_page(notebook, path.stem, facts))
    log(f"{written}: {written.stat().st_size / 2**20:.1f} MiB, {time.monotonic() - begin:.0f} s")
    return written


def _read(path: Path) -> nbformat.NotebookNode:
    require_file(path, NotebookFailed)
    try:
        return nbformat.read(path, as_version=4)
    except (
        ValueError,
        AttributeError,
        KeyError,
        TypeError,
        nbformat.ValidationError,
    ) as error:  # of other JSON too
        what = next(iter(str(error).splitlines()), type(error).__name__)[:200]
        raise NotebookFailed(f"{path} is no notebook ({what}); give an .ipynb") from error


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


def parse_parameter(text: str) -> tuple[str, Any]:
    """A parameter from a command line: name=value, the value a Python literal or a plain text.

    Raises:
        ValueError: it is not.
    """
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise ValueError(f"{text!r} is not name=value")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value  # a plain text needs no quotes


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
        except RuntimeError as error:  # jupyter_client's, before the first cell
            atexit.unregister(
                client._cleanup_kernel
            )  # nbclient forgets to: it would fail, with a traceback, at exit
            raise NotebookFailed(
                f"no kernel started ({error}); what it said stands above. It is {sys.executable} -m "
                f"ipykernel_launcher: pip install 'prescope[lab]' brings ipykernel, and what IPython runs at its start "
                f"may end it"
            ) from error


def _import_paths() -> list[str]:
    """What the kernel, started in the notebook's folder, needs to import this prescope, installed or not."""
    given = os.environ.get("PYTHONPATH", "")
    checkout = Path(__file__).resolve().parents[2]
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


def _notebook_page(notebook: nbformat.NotebookNode, name: str, facts: dict[str, Any]) -> str:
    _drop_widgets(notebook)
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
        "print_js": PRINT_JS,
        "provenance": json_script(facts),
        "in_short": _in_short(notebook),
    }
    page, _ = exporter.from_notebook_node(notebook, resources=resources)
    return page


def _drop_widgets(notebook: nbformat.NotebookNode) -> None:
    """Nothing drives a widget on a page: of a bar that is over ("compiling the simulator") its words would stay."""
    for cell in notebook.cells:
        if "outputs" in cell:
            cell.outputs = [output for output in cell.outputs if _WIDGET_MIME not in output.get("data", {})]


def _in_short(notebook: nbformat.NotebookNode) -> str:
    """Numbers and the line of advice of the first panel, to stand before everything else; "" without one."""
    shown = (
        str(output.data["text/html"])
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "text/html" in output.get("data", {})
    )
    return next((html for html in shown if VERDICT_CLASS in html), "")
