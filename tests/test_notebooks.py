"""The notebooks, executed as `make report` does, and opened offline."""

import colorsys
import json
import re
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest

from prescope import RoutingTrace
from prescope.core.paths import embedded_model
from prescope.report import PAPER_PX, execute_notebook
from prescope.simulator import ORACLE, Recording, Scenario, shipped_machines
from prescope.views.theme import GAIN_SCALE
from tests.support.browser import count_plots, offline_page
from tests.support.damaged_files import write_tokenizer
from tests.support.packed_checkpoints import write as write_packed

# `make test` runs those here that train or measure, with less; `make test-all` all of them, as they stand.
NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
PREDICTOR = NOTEBOOKS / "02_predictor.ipynb"
TUNING = NOTEBOOKS / "04_tune_my_machine.ipynb"
QUICKSTART = NOTEBOOKS / "00_quickstart.ipynb"
SCHEDULING = NOTEBOOKS / "03_scheduling.ipynb"
SWEEPS = NOTEBOOKS / "05_sweeps.ipynb"
PAPER = NOTEBOOKS / "06_paper_experiments.ipynb"
#: Its figures, in order.
PAPER_QUESTIONS = [
    "How well is each layer predicted?",
    "Which MoEs can be predicted?",
    "How busy is PCIe?",
    "What does the link's time go to?",
    "When does the GPU idle?",
    "How much of the copying is hidden?",
    "What if prefetches could not be held back?",
    "On which machine does prediction pay?",
    "What would published models gain?",
    "Does it depend on the text?",
    "How many requests can be served?",
    "What does hostile routing cost?",
    "What do wrong predictions cost?",
    "What does each failure cost?",
    "What does the link's time go to?",
]
NUM_FIGURES = 8  # timeline, layers, hit rate, latency, the panel's three, slots curve


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart")
    lines: list[str] = []
    page = execute_notebook(
        QUICKSTART,
        folder / "quickstart.html",
        parameters={"max_new_tokens": 8, "device": "cpu", "out": str(folder)},
        log=lines.append,
    )
    return page, lines


def test_the_quickstart_runs_and_its_page_holds_every_figure_once(executed):
    page, lines = executed
    text = page.read_text()
    assert len(re.findall(r'Plotly\.newPlot\("', text)) == NUM_FIGURES
    assert text.count("plotly.js v") == 1
    assert "application/vnd.jupyter.widget-view+json" not in text
    assert "emulated link of " in text
    assert "What this does not show" in text
    assert len(text) < 7_000_000
    assert "cdn" not in re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL).lower()
    assert lines[-1].startswith(str(page))


@pytest.mark.slow
def test_the_quickstart_runs_on_a_packed_model_with_slots_in_bytes(tmp_path):
    """A folder in the layout of openai/gpt-oss-20b, made small."""
    write_packed("gpt-oss mxfp4", tmp_path / "model")
    write_tokenizer(tmp_path / "model")
    parameters = {"model": str(tmp_path / "model"), "slots": "60KiB", "max_new_tokens": 6, "device": "cpu"}
    page = execute_notebook(
        QUICKSTART,
        tmp_path / "page.html",
        parameters=parameters | {"out": str(tmp_path)},
        log=lambda line: None,
    )
    text = page.read_text()
    assert "mxfp4 experts" in text and "3 of 3 MoE layers stay packed in mxfp4" in text
    assert len(re.findall(r'Plotly\.newPlot\("', text)) == NUM_FIGURES


def test_the_quickstart_leaves_a_trace_and_a_timeline(executed):
    folder = executed[0].parent
    trace = RoutingTrace.load(folder / "trace.safetensors")
    assert [prompt["domain"] for prompt in trace.prompts] == ["story", "code", "maths"]
    assert len(trace.steps) == 8
    assert (folder / "timeline.json.gz").stat().st_size > 1_000


@pytest.mark.browser
def test_the_quickstart_page_opens_offline(executed):
    with offline_page(executed[0]) as (page, requests, errors):
        assert count_plots(page, NUM_FIGURES) == NUM_FIGURES
        assert (requests, errors) == ([], [])


@pytest.mark.browser
def test_on_paper_every_figure_is_drawn_for_its_width(executed):
    """A4 cut layers from 5 and tokens from 15: figures kept the screen's width."""
    with offline_page(executed[0]) as (page, _, _):
        count_plots(page, NUM_FIGURES)
        page.emulate_media(media="print")
        page.evaluate("dispatchEvent(new Event('beforeprint'))")
        page.wait_for_timeout(1_500)
        widths = page.evaluate(
            "[...document.querySelectorAll('.js-plotly-plot .main-svg')].map(s => s.getBoundingClientRect().width)"
        )
        assert PAPER_PX / 2 < max(widths) < PAPER_PX + 0.1
        layers = page.evaluate(
            "[...document.querySelectorAll('.js-plotly-plot')].map(p => p._fullLayout.xaxis.range)"
        )
        assert all(low < high for low, high in layers)


def test_the_predictor_notebook_runs_small_and_shows_each_answer(tmp_path):
    """Recall by layer and lookahead, cues, domains, the change of text, what it saves, what recall is worth."""
    small = {
        "new_tokens": 8,
        "own_tokens": 256,
        "epochs": 1,
        "device": "cpu",
        "out": str(tmp_path / "predictor"),
    }
    page = execute_notebook(PREDICTOR, tmp_path / "predictor.html", parameters=small, log=lambda line: None)
    assert len(re.findall(r"const figure = (\{.*?\});\n", page.read_text())) == 6
    assert (tmp_path / "predictor" / "llapor.safetensors").stat().st_size > 1_000


def test_the_tuning_notebook_runs_small_and_writes_its_report(tmp_path):
    small = {
        "max_new_tokens": 4,
        "calibrate_s": 1,
        "repeats": 2,
        "device": "cpu",
        "out": str(tmp_path / "t.html"),
    }
    page = execute_notebook(TUNING, tmp_path / "tuning.html", parameters=small, log=lambda line: None)
    assert "tokens/s" in page.read_text() and "tokens/s" in (tmp_path / "t.html").read_text()
    assert re.search(r">0\.250?<", page.read_text()), "a quarter of the experts, not 0.2 of them"


@pytest.mark.slow
def test_the_sweeps_of_a_small_model_are_shown_in_units_of_its_size(tmp_path):
    """In GiB its front read 0.01, 0.00, 0.00."""
    small = {"model": str(embedded_model()), "points": 12, "max_new_tokens": 5, "device": "cpu"}
    parameters = small | {"out": str(tmp_path / "sweep.html")}
    page = execute_notebook(SWEEPS, tmp_path / "page.html", parameters=parameters, log=lambda line: None)
    assert re.search(r"<td[^>]*>[\d.]+ MiB</td>", page.read_text())


@pytest.mark.slow
def test_the_scheduling_notebook_runs_small_and_never_mixes_its_sources(tmp_path):
    """Three figures of the panel, three of the real run, GPU idle, link, the pair."""
    small = {"own_tokens": 256, "epochs": 1, "calibrate_s": 3, "max_new_tokens": 6, "device": "cpu"}
    page = execute_notebook(SCHEDULING, tmp_path / "scheduling.html", parameters=small, log=lambda line: None)
    text = page.read_text()
    figures = re.findall(r"const figure = (\{.*?\});\n", text)
    assert len(figures) == 9
    titles = [json.loads(figure)["layout"]["title"]["text"] for figure in figures]
    assert all("<b>simulated</b>: " in title or "<b>measured, link emulated</b>" in title for title in titles)
    assert sum("<b>measured, link emulated</b>" in title for title in titles) == 3
    assert "application/vnd.jupyter.widget-view+json" not in text
    assert "in host memory" in text, "the table of reasons"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_paper_s_experiments_run_small_and_say_where_each_number_is_from(tmp_path):
    small = {"own_tokens": 256, "epochs": 1, "calibrate_s": 3, "max_new_tokens": 5, "device": "cpu"}
    page = execute_notebook(PAPER, tmp_path / "paper.html", parameters=small, log=lambda line: None)
    text = page.read_text()
    figures = [json.loads(one) for one in re.findall(r"const figure = (\{.*?\});\n", text)]
    titles = [figure["layout"]["title"]["text"] for figure in figures]
    assert len(titles) == len(PAPER_QUESTIONS)
    for title, question in zip(titles, PAPER_QUESTIONS, strict=True):
        assert title.startswith(f"<b>{question}</b>")
    told = [title for title in titles if "simulated" in title or "measured" in title]
    assert len(told) == len(titles) - 1, "all but the recall by layer, which has no times"
    assert text.count("Committed, H200") >= 5


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_paper_s_experiments_run_on_a_model_of_few_experts(tmp_path):
    """Twelve in all: a sixteenth of them, for layers that want the same slots, was none."""
    write_packed("gpt-oss mxfp4", tmp_path / "model")
    write_tokenizer(tmp_path / "model")
    small = {"own_tokens": 0, "epochs": 1, "calibrate_s": 1, "max_new_tokens": 5, "device": "cpu"}
    parameters = small | {"model": str(tmp_path / "model")}
    page = execute_notebook(PAPER, tmp_path / "paper.html", parameters=parameters, log=lambda line: None)
    figures = re.findall(r"const figure = (\{.*?\});\n", page.read_text())
    assert len(figures) == len(PAPER_QUESTIONS)
    assert "medium" not in json.loads(figures[0])["layout"]["title"]["text"], "it is not there"


def test_the_text_of_the_paper_s_experiments_says_what_its_figure_of_machines_shows():
    """On all machines that come with prescope, half of the experts in slots: as the notebook has it."""
    medium = Recording.load("medium.b1")
    there = medium.scenarios(shipped_machines(medium.trace.shape, 1))
    base = Scenario(slots=round(0.5 * there.num_experts), machine=there.first_machine)

    def gain(machine: str, first: Scenario, second: Scenario) -> float:
        """How much faster the first is, %."""
        steps = [there.run(replace(one, machine=machine)).step_ms for one in (first, second)]
        return 100 * (steps[1] / steps[0] - 1)

    fiddler, oracle = replace(base, schedule="fiddler"), replace(base, predictor=ORACLE)
    ahead = {name: gain(name, base, fiddler) for name in there.machines}
    slow = [name for name in ahead if name.startswith(("paper_machine", "test_machine"))]
    behind_pcie3 = {name: percent for name, percent in ahead.items() if "emulated PCIe 3" in name}
    assert all(percent > 5 for name, percent in ahead.items() if name not in (*slow, *behind_pcie3))
    assert (round(min(behind_pcie3.values())), round(max(behind_pcie3.values()))) == (-2, 2)
    assert (round(-max(ahead[name] for name in slow)), round(-min(ahead.values()))) == (4, 18)
    assert all(gain(name, oracle, base) < 0 for name in slow), "perfect prediction does not help there"
    for name in slow[:-1]:
        costs = there.machines[name].costs
        assert 3 < costs.link_us / costs.cpu_us[1] < 8.5


def test_the_predictor_notebook_calls_the_colours_of_gains_by_their_names():
    hues = [colorsys.rgb_to_hls(*(int(part) / 255 for part in re.findall(r"\d+", color)[:3]))[0] * 360
            for color in (GAIN_SCALE[0][1], GAIN_SCALE[-1][1])]  # fmt: skip
    assert 15 < hues[0] < 45 and 190 < hues[1] < 250, "orange, blue"
    assert "Blue gains on the early router, orange loses" in " ".join(PREDICTOR.read_text().split())


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_asks_one_question_takes_parameters_and_says_what_it_does_not_show(path):
    cells = nbformat.read(path, as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    headings = [line for cell in cells if cell.cell_type == "markdown" for line in cell.source.splitlines()]
    titles = [line for line in headings if line.startswith("# ")]
    assert len(titles) == 1
    assert titles[0].endswith("?")
    assert "parameters" in code[0].metadata["tags"]
    assert not any("assert " in cell.source for cell in code), "checks belong to the tests"
    assert not any(".close()" in cell.source for cell in code), "Run All would take the panels away"
    assert "## What this does not show" in cells[-1].source
    assert not any(line.startswith(("def ", "class ")) for cell in code for line in cell.source.splitlines())
