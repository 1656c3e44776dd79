"""`make` sets up in .venv whatever the user's shell, pip and folder are called; the installation itself is made up."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = [
    pytest.mark.skipif(shutil.which("make") is None, reason="there is no make"),
    pytest.mark.skipif(not (ROOT / "Makefile").is_file(), reason="not in a checkout"),
]
#: Stands in for .venv's interpreter and writes down how it was called. It has a pip unless `no-pip` is there.
PYTHON = """#!/bin/sh
echo "PYTHONPATH=${PYTHONPATH-none} $*" >> calls
case "$*" in
"-m pip "*) test ! -e no-pip ;;
"-m venv .venv") rm no-pip ;;
esac
"""


@pytest.fixture(params=["plain", "two words", "Grüße", "it's mine"])
def checkout(request, tmp_path) -> Path:
    """A folder that is set up but for the installation."""
    folder = tmp_path / request.param
    python = folder / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    python.write_text(PYTHON)
    python.chmod(0o755)
    return folder


def calls_of(folder: Path, target: str = "setup") -> list[str]:
    """What `make` calls the interpreter with."""
    (folder / "calls").write_text("")
    env = {**os.environ, "PYTHONPATH": "/of/another/python"}
    for name in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL"):  # of the make that runs the tests
        env.pop(name, None)
    done = subprocess.run(["make", target], cwd=folder, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return (folder / "calls").read_text().splitlines()


def test_setup_runs_once_in_a_folder_of_any_name_and_again_where_the_folder_has_moved(checkout):
    assert len(calls_of(checkout)) == 4  # is it new enough, has it pip; pip, compile
    assert calls_of(checkout) == []
    moved = checkout.rename(checkout.with_name(f"{checkout.name}, moved"))
    assert len(calls_of(moved)) == 4
    assert calls_of(moved) == []


def test_a_venv_without_pip_gets_one(checkout):
    """Ctrl-C while it was made leaves such a one, and so does uv; "No module named pip" stood there for ever."""
    (checkout / "no-pip").touch()
    assert any(call.endswith(" -m venv .venv") for call in calls_of(checkout))
    assert calls_of(checkout) == []


def test_what_a_user_has_set_for_other_pythons_does_not_reach_the_installation(checkout):
    """PYTHONPATH shadows what lies in .venv; `user = true` among pip's settings is an error there."""
    calls = calls_of(checkout)
    assert all(call.startswith("PYTHONPATH=none ") for call in calls), calls
    assert any("-m pip install " in call and " --no-user " in call for call in calls), calls


def test_lab_opens_its_notebook_whatever_folder_a_users_settings_name(checkout):
    """With a `c.ServerApp.root_dir` of the user's, Jupyter ends: it and the notebook "are incompatible"."""
    *_, lab = calls_of(checkout, "lab")
    assert " -m jupyter lab " in lab and lab.endswith(" notebooks/00_quickstart.ipynb")
    assert " --ServerApp.root_dir=notebooks/ " in lab


@pytest.mark.parametrize("target", ["test", "test-all"])
def test_no_tests_time_is_a_compilers(checkout, target):
    """On a machine that did other work, it took five minutes: the test that came first ended there, and the 13 behind
    it met what it had left.
    """
    *_, first, tests = calls_of(checkout, target)
    assert first.endswith(" -m tests.support.compile_first") and " -m pytest " in tests
