"""Every file that a caller names may begin with `~`, as in a shell: no folder of that name is made, nothing is missed.

`Path` takes `~` as a name like any other: a save would make such a folder, and a load would say that nothing is there.
"""

import os
from pathlib import Path

import numpy as np
import pytest

import prescope
from prescope.advice import ModelSize
from prescope.core.files import write_text
from prescope.core.paths import cache_dir, user_path
from prescope.errors import BadModelFolder
from prescope.profile import HardwareProfile
from prescope.report import execute_notebook
from prescope.traces.perfetto import write_perfetto
from prescope.traces.routing import RoutingTrace
from prescope.training import read_prompts
from prescope.tuning import Choices, Space, load_sweep, open_sweep
from tests.support import foreign_traces
from tests.support.damaged_files import KINDS
from tests.support.small_run import small_run
from tests.support.sweep_runners import Hill

pytestmark = pytest.mark.skipif(os.name != "posix", reason="a home folder by another name")
OWN = [name for name in KINDS if "trace" not in name.split()[1:] and not name.endswith(", old")]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    """A home folder, and another one to work in."""
    home, work = tmp_path / "home", tmp_path / "work"
    home.mkdir()
    work.mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache_dir().parent))  # or all decisions would be compiled again
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(work)
    return home


@pytest.mark.parametrize("kind", [kind for kind in OWN if kind != "model"])
def test_what_was_saved_at_home_is_read_from_there(kind, home):
    KINDS[kind].make(Path("~/saved"))
    assert list((home / "saved").iterdir())
    assert KINDS[kind].read(Path("~/saved")) == KINDS[kind].read(home / "saved")
    assert os.listdir() == []


@pytest.mark.parametrize("name", ["~/deep/er.json.gz", Path("~/flat.json")])
def test_a_writer_returns_where_the_file_is(name, home):
    written = write_perfetto(small_run(steps=3), name)
    assert written.is_file() and home in written.parents
    assert os.listdir() == []


def test_a_model_its_config_a_profile_and_prompts_are_found_at_home(home):
    KINDS["model"].make(home / "model")
    with prescope.load("~/model", slots=6, device="null") as engine:
        shape = engine.shape
    assert ModelSize.of("~/model").shape.total_experts == shape.total_experts
    assert ModelSize.of(Path("~/model/config.json")).shape.total_experts == shape.total_experts
    HardwareProfile.load("test_machine").save("~/mine.json")
    assert prescope.advise("~/model", "~/mine.json").machine.name == "CPU (standing in for the GPU)"
    (home / "prompts.txt").write_text("one\ntwo\n")
    assert read_prompts("~/prompts.txt") == {"all": ["one", "two"]}
    assert os.listdir() == []


def test_a_trace_of_another_program_is_found_at_home(home):
    of = foreign_traces.known()
    np.savez(home / "t.npz", expert_ids=of.ids[0])
    foreign_traces.write_router_trace(home / "router", of)
    for source in ("~/t.npz", Path("~/router")):
        assert isinstance(prescope.read_trace(source, shape=foreign_traces.SHAPE), RoutingTrace)


def test_a_sweep_is_kept_at_home(home):
    open_sweep("one", Space(slots=Choices(1, 2, 3)), Hill(), method="grid", storage="~/sweeps/one.db").run(
        points=3
    )
    assert (home / "sweeps" / "one.db").is_file()
    assert len(load_sweep("~/sweeps/one.db").points()) == 3
    assert os.listdir() == []


def test_a_notebook_at_home_is_read(home):
    (home / "no.ipynb").write_text("{}")
    with pytest.raises(prescope.report.NotebookFailed, match="is no notebook"):
        execute_notebook("~/no.ipynb", "~/page.html")


def test_a_user_who_has_no_home_here_is_a_name_like_any_other():
    with pytest.raises(BadModelFolder, match="~nobody-of-this-name"):
        prescope.load("~nobody-of-this-name/model")


def test_a_folder_that_is_really_called_so_can_be_named():
    """A path is looked at at every door it passes, so the second look must not change what the first one gave."""
    written = write_text("./~/note.txt", "x")
    assert Path(os.path.join(".", "~", "note.txt")).is_file()
    assert written == user_path(written) == user_path(user_path("./~/note.txt"))
    small_run(steps=3).save("./~/run")
    assert sorted(os.listdir(Path("~").absolute())) == ["note.txt", "run"]
