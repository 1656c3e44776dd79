"""A sweep as one page that opens offline."""

import base64
import gzip
import re

import pandas as pd
import pytest

from prescope.errors import UnsupportedOption
from prescope.predictor import Frequency
from prescope.report import sweep as sweep_report
from prescope.report import write_sweep_report
from prescope.scheduler.costs import LayerCosts
from prescope.simulator import Machine, Scenarios
from prescope.tuning import Choices, Range, SimulatorRunner, Space, load_sweep, open_sweep
from tests.support.browser import count_plots, offline_page
from tests.support.small_run import small_trace
from tests.support.sweep_runners import Hill

HOSTILE = "</script><script>document.title = 'owned'</script>"
COSTS = LayerCosts(link_us=60.0, gpu_us=12.0, rest_us=25.0, decide_us=6.0, source="made for this test")
SPACE = Space(slots=Range(6, 30), schedule=Choices("on-demand", "presched"), width=Range(0, 4))
NUM_FIGURES = 5


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    trace = small_trace(steps=6, batch=2)
    machine = Machine(f"a machine {HOSTILE}", COSTS, 1_500_000, 30.0, 2)
    runner = SimulatorRunner.of_scenarios(Scenarios(trace, [machine], [Frequency(trace, 2)], label="a test"))
    made = open_sweep(
        "reported", SPACE, runner, objectives=("tokens_per_s", "gpu_bytes"), method="random",
        storage=tmp_path_factory.mktemp("sweep") / "reported.db",
    )  # fmt: skip
    made.run(points=12)
    return made


@pytest.fixture(scope="module")
def page(sweep, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "sweep.html"
    return write_sweep_report(sweep, path, commands=f"sweep.run() # {HOSTILE}")


def files_in(text):
    """Name -> content of what the page offers for download."""
    found = re.findall(r"<a download='([^']+)' href='data:application/octet-stream;base64,([^']+)'>", text)
    return {name: gzip.decompress(base64.b64decode(data)) for name, data in found}


def test_the_page_says_what_was_found_and_that_nothing_was_proved(page, sweep):
    text = page.read_text()
    best = sweep.best(1)
    assert f"point {best['number'][0]}, simulated" in text
    assert "Nothing was proved" in text
    assert "<b>simulated</b>: 12 points" in text
    assert "sweep.run() # &lt;/script&gt;" in text
    assert len(text) < 10_000_000
    assert text.count('class="plotly-graph-div"') == NUM_FIGURES, "two objectives have a front"
    assert "<title>reported</title>" in text


def test_the_heat_map_is_of_the_two_settings_that_matter_most(sweep):
    class Told:
        @staticmethod
        def importances():
            return {"slots": 0.1, "schedule": 0.2, "width": 0.7}

    assert sweep_report._pair(Told, sweep.points()) == ("width", "schedule")


def test_the_study_inside_is_the_study(page, sweep, tmp_path):
    files = files_in(page.read_text())
    (tmp_path / "unpacked.db").write_bytes(files["reported.db.gz"])
    again = load_sweep(tmp_path / "unpacked.db")
    pd.testing.assert_frame_equal(again.points(), sweep.points())
    assert files["reported.csv.gz"].decode().count("\n") == 13


@pytest.mark.parametrize(
    "url", ["sqlite:///{}?timeout=30", "sqlite+pysqlite:///{}", "sqlite:///:memory:", "sqlite://"]
)
def test_the_study_inside_is_of_its_own_file_however_the_url_is_written(url, tmp_path, monkeypatch):
    """Once an empty file called "a.db?timeout=30" was made and put into the page; of one in memory, nothing at all."""
    monkeypatch.chdir(tmp_path)
    made = open_sweep("a", Space(slots=Choices(30, 20)), Hill(), storage=url.format("b.db"), method="grid")
    made.run()
    files = files_in(write_sweep_report(made, tmp_path / "page.html", commands="").read_text())
    there = {one.name for one in tmp_path.iterdir()}
    if made.file is None:
        assert list(files) == ["a.csv.gz"] and there == {"page.html"}
    else:
        assert there == {"b.db", "page.html"}
        (tmp_path / "unpacked.db").write_bytes(files["a.db.gz"])
        pd.testing.assert_frame_equal(load_sweep(tmp_path / "unpacked.db").points(), made.points())


def test_a_study_that_is_too_large_is_left_out_and_said(sweep, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep_report, "MOST_STUDY", 100)
    text = write_sweep_report(sweep, tmp_path / "page.html", commands="").read_text()
    assert "too large for a page" in text
    assert list(files_in(text)) == ["reported.csv.gz"]


def test_a_proof_is_the_verdict(sweep, tmp_path):
    class Proof:
        kept, words, notes, origin, machine = (
            True,
            "+11 % (+9 to +13): keep it",
            ["a note <i>"],
            "emulated",
            "here",
        )

        def table(self):
            wide = {"to %": [190_000.0], "from %": [float("nan")], "kept": [False], "other texts": [0]}
            return pd.DataFrame({"schedule": ["presched"], "gain %": [11.123456], **wide})

    text = write_sweep_report(sweep, tmp_path / "page.html", commands="", proof=Proof()).read_text()
    assert "<p class='verdict'>+11 % (+9 to +13): keep it</p>" in text
    assert "<b>measured, link emulated</b> on here" in text
    assert "a note &lt;i&gt;" in text
    assert "11.1" in text and "11.123456" not in text
    cells = re.findall(r"<td>(.*?)</td>", text.split("<h2>The proof</h2>")[1].split("</table>")[0])
    assert cells == ["presched", "11.1", "190,000", "-", "no", "0"], (
        "no 1.9e+05, and words for True and False"
    )
    assert "Nothing was proved" not in text


def test_a_sweep_without_a_finished_point_has_no_page(sweep, tmp_path):
    empty = open_sweep("empty", SPACE, sweep.runner, storage=tmp_path / "empty.db")
    with pytest.raises(UnsupportedOption, match="no finished point"):
        write_sweep_report(empty, tmp_path / "page.html", commands="")
    assert not (tmp_path / "page.html").exists()


@pytest.mark.browser
def test_the_page_opens_offline(page):
    with offline_page(page) as (opened, requests, errors):
        assert count_plots(opened, NUM_FIGURES) == NUM_FIGURES
        assert (requests, errors) == ([], [])
        assert opened.title() != "owned"
