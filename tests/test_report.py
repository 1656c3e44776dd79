import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from html import escape
from pathlib import Path

import nbformat
import pandas as pd
import plotly.graph_objects as go
import pytest
from nbclient.exceptions import CellExecutionError
from plotly.offline import get_plotlyjs

from prescope import views
from prescope.cli import main as shell
from prescope.report import NotebookFailed, badge, execute_notebook, parse_parameter, write_report
from prescope.report.__main__ import main
from prescope.report.notebook import _failure, _notebook_page
from tests.support.browser import count_plots, offline_page
from tests.support.small_run import LABEL, small_run

ROOT = Path(__file__).resolve().parent.parent
HOSTILE = "</script><script>document.title = 'owned'</script>"


def write_notebook(path: Path, *sources: str) -> Path:
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


def provenance(page: str) -> dict:
    found = re.search(r'<script[^>]*id="provenance"[^>]*>(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found[1])


@pytest.fixture(scope="module")
def run():
    return small_run(steps=6)


@pytest.fixture(scope="module")
def report(run, tmp_path_factory):
    figures = [
        views.timeline(run),
        views.layers(run),
        views.hit_rate(run),
        views.latency(run),
        views.load(run),
    ]
    path = tmp_path_factory.mktemp("report") / "report.html"
    tables = {f"All {HOSTILE}": run.metrics.to_frame()}
    return write_report(figures, tables, path, title=f"A run {HOSTILE}", runs=[run], verdict="Stalls rule.")


def test_plotly_stands_in_the_report_once(report):
    """It is 4.8 MB: once a figure would make a report nobody can mail."""
    page = report.read_text()
    assert page.count("plotly.js v") == 1
    assert len(page) < 6_000_000
    assert set(re.findall(r'<table border="([^"]*)"', page)) <= {"0"}, "lines are the style sheet's"


def test_the_report_says_where_its_figures_come_from(report, run):
    page = report.read_text()
    assert badge(run) == "emulated link"
    assert "emulated link</span>" in page
    assert LABEL in page
    facts = provenance(page)
    assert facts["runs"][0]["config"] == run.config
    assert facts["machine"]["python"]
    assert facts["created"]


def test_notes_and_titles_are_text_and_never_markup(run, tmp_path):
    noted = replace(run, notes=[f"note {HOSTILE}", "<img src=x onerror=alert(1)>"])
    noted = replace(noted, hardware=run.hardware | {"label": f"label {HOSTILE}"})
    path = write_report(
        [f"why {HOSTILE}"],
        {},
        tmp_path / "r.html",
        title=f"t {HOSTILE}",
        runs=[noted],
        verdict=f"v {HOSTILE}",
    )
    page = path.read_text(encoding="utf-8")
    assert HOSTILE not in page and "<img" not in page.replace(get_plotlyjs(), "")
    for word in ("note", "label", "t", "v", "why"):
        assert f"{word} {escape(HOSTILE)}" in page
    assert provenance(page)["runs"][0]["notes"] == noted.notes


@pytest.mark.parametrize(
    "text", ["<!--<script>", "<!-- <script> --> </script>", "]]><", "\u2028", "\ud800 half a pair"]
)
def test_no_text_makes_the_provenance_unreadable(run, tmp_path, text):
    """Inside a script "<!--<script>" hides the next end tag: the rest of the page would be part of it."""
    noted = replace(run, notes=[text])
    cell = text.encode("utf-8", "replace").decode()  # pandas itself takes no half pairs
    table = pd.DataFrame({cell: [cell]})
    figure = go.Figure(go.Bar(y=[1], name=text))
    path = write_report([figure], {text: table}, tmp_path / "r.html", title=text, runs=[noted], verdict=text)
    page = path.read_text(encoding="utf-8")
    block = page[page.index('id="provenance">') :]
    assert "<" not in block[len('id="provenance">') : block.index("</script>")]
    assert provenance(page)["runs"][0]["notes"] == [text]


def test_a_page_that_needs_a_kernel_is_refused(run, tmp_path):
    with pytest.raises(TypeError, match=r"plain go\.Figure"):
        write_report([go.FigureWidget()], {}, tmp_path / "r.html", title="t", runs=[run])
    assert not list(tmp_path.iterdir())


@pytest.mark.browser
def test_the_report_opens_offline_with_all_figures_and_no_errors(report):
    with offline_page(report) as (page, requests, errors):
        assert count_plots(page, 5) == 5
        assert page.title() == f"A run {HOSTILE}"
        assert page.locator(".badge").first.inner_text() == "emulated link"
        assert (requests, errors) == ([], [])


@pytest.mark.browser
def test_an_executed_notebook_opens_offline_with_its_figure(tmp_path):
    notebook = write_notebook(
        tmp_path / "n.ipynb",
        "depth = 1",
        f"import plotly.graph_objects as go\ngo.Figure(go.Bar(y=[depth], name={HOSTILE!r}))",
    )
    out = execute_notebook(notebook, tmp_path / "n.html", parameters={"depth": 7}, log=lambda line: None)
    with offline_page(out) as (page, requests, errors):
        assert count_plots(page, 1) == 1
        assert page.evaluate("document.querySelector('.js-plotly-plot').data[0].name") == HOSTILE
        assert page.title() == "n"
        assert (requests, errors) == ([], [])
    assert provenance(out.read_text())["parameters"] == {"depth": 7}


def test_a_bar_that_is_over_leaves_no_words_on_the_page():
    bar = {"application/vnd.jupyter.widget-view+json": {}, "text/plain": "compiling the simulator"}
    outputs = [
        nbformat.v4.new_output("display_data", data=data) for data in (bar, {"text/plain": "an answer"})
    ]
    cell = nbformat.v4.new_code_cell("1", outputs=outputs)
    page = _notebook_page(nbformat.v4.new_notebook(cells=[cell]), "one", {})
    assert "an answer" in page
    assert "compiling the simulator" not in page


def test_the_kernel_is_this_interpreter_headless_and_in_the_notebooks_folder(tmp_path):
    source = (
        "import os, sys\nimport prescope\n"
        f"assert sys.executable == {sys.executable!r}, sys.executable\n"
        f"assert os.getcwd() == {str(tmp_path)!r}, os.getcwd()\n"
        "assert os.environ['PRESCOPE_HEADLESS'] == '1'\n"
    )
    lines: list[str] = []
    notebook = write_notebook(tmp_path / "n.ipynb", "pass", source)
    before = notebook.read_bytes()
    execute_notebook(notebook, tmp_path / "deep" / "n.html", log=lines.append)
    assert notebook.read_bytes() == before, "the notebook is not changed"
    assert [line[:7] for line in lines[:2]] == ["[ 1/2] ", "[ 2/2] "]


def test_a_failing_cell_is_named_with_its_traceback_and_nothing_is_written(tmp_path, capsys):
    notebook = write_notebook(tmp_path / "n.ipynb", "pass", "1 / 0")
    with pytest.raises(NotebookFailed, match="cell 2 of 2 raised ZeroDivisionError"):
        execute_notebook(notebook, tmp_path / "n.html", log=lambda line: None)
    assert main([str(notebook), "--out", str(tmp_path / "n.html")]) == 1
    captured = capsys.readouterr()
    assert "1 / 0" in captured.err
    assert "\x1b[" not in captured.err, "no colours where nobody sees them"
    assert not (tmp_path / "n.html").exists()


def test_a_page_that_cannot_be_written_is_said_in_a_line_before_anything_runs(tmp_path, capsys):
    notebook, blocked = write_notebook(tmp_path / "n.ipynb", "1 + 1"), tmp_path / "a file"
    blocked.write_text("")
    assert main([str(notebook), "--out", str(blocked / "n.html")]) == 1
    said = capsys.readouterr()
    assert "cannot be written" in said.err and len(said.err.splitlines()) == 1 and not said.out


def test_from_the_shell_a_failing_cell_is_one_last_line_behind_its_traceback(tmp_path, capsys):
    """It was one line with the whole traceback and its colours in it."""
    notebook = write_notebook(tmp_path / "n.ipynb", "pass", "1 / 0")
    assert shell(["report", str(notebook), "-o", str(tmp_path / "n.html")]) == 1
    said = capsys.readouterr().err
    assert "\x1b[" not in said, "no colours where nobody sees them"
    assert said.splitlines()[-1] == "prescope: cell 2 of 2 raised ZeroDivisionError: division by zero"
    assert "----> 1 1 / 0" in said.splitlines(), "the traceback keeps its lines"


@pytest.mark.parametrize("start", ["raise SystemExit(3)", "import a_package_that_is_missing"])
def test_a_kernel_that_does_not_start_is_said_with_what_to_install(tmp_path, start):
    """jupyter_client says no more than that it died, and nbclient's tidying failed at exit with a traceback."""
    (tmp_path / "ipykernel_launcher.py").write_text(start)
    notebook, page = write_notebook(tmp_path / "n.ipynb", "pass"), tmp_path / "n.html"
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-m", "prescope.report", str(notebook), "--out", str(page)],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1 and not page.exists()
    assert re.search(r"no kernel started .*pip install 'prescope\[lab\]'", done.stderr.splitlines()[-1])


def test_a_cell_that_hangs_is_ended(tmp_path):
    notebook = write_notebook(tmp_path / "n.ipynb", "pass", "import time; time.sleep(60)")
    with pytest.raises(NotebookFailed, match="CellTimeoutError"):
        execute_notebook(notebook, tmp_path / "n.html", timeout_s=2, log=lambda line: None)


@pytest.mark.parametrize("text", ["=3", "a b=3", "3=a", "depth", "depth: 3", ""])
def test_what_is_no_parameter_is_refused(text):
    with pytest.raises(ValueError, match="is not name=value"):
        parse_parameter(text)


def test_the_cell_that_ended_it_is_named_and_not_one_that_was_let_fail():
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text) for text in ("a", "b", "c")])
    for cell, name in zip(notebook.cells, ("First", "Second"), strict=False):
        cell.outputs = [nbformat.v4.new_output("error", ename=name, evalue="", traceback=[f"in {name}"])]
    error = CellExecutionError("", "Second", "why")
    assert _failure(notebook, error) == "cell 2 of 3 raised Second: why\nin Second"


def test_an_unknown_parameter_is_refused_with_the_known_ones(tmp_path, capsys):
    notebook = write_notebook(tmp_path / "n.ipynb", "slots = 1\nmodel = None", "slots")
    assert main([str(notebook), "--out", str(tmp_path / "n.html"), "--param", "slot=2"]) == 2
    assert "it has slots, model" in capsys.readouterr().err
    assert main([str(tmp_path / "none.ipynb"), "--out", str(tmp_path / "n.html")]) == 2


@pytest.mark.slow
def test_ctrl_c_ends_the_kernel_and_says_so(tmp_path):
    """A kernel left behind would keep the GPU's memory."""
    notebook = write_notebook(
        tmp_path / "n.ipynb", "import os\nfrom pathlib import Path\nPath('pid').write_text(str(os.getpid()))",
        "import time; time.sleep(60)",
    )  # fmt: skip
    command = [sys.executable, "-m", "prescope.report", str(notebook), "--out", str(tmp_path / "n.html")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=tmp_path
    )
    assert process.stdout is not None
    assert process.stdout.readline().startswith("[ 1/2]")
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "cancelled" in errors
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
