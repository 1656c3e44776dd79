"""Compiled code is run as it lies there: what others could have written is not, and that is said."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from prescope.core.private_folders import private_folder, why_unsafe
from prescope.kernels.cpu import build
from prescope.kernels.cpu.build import CannotBuild

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(not hasattr(os, "getuid"), reason="owners and modes are POSIX's")
SOURCE = "int answer(void) { return ANSWER; }\n"


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "cache"
    folder.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


def test_a_folder_is_made_for_this_user_alone_and_used_again(tmp_path):
    folder = private_folder([tmp_path / "a" / "b"], "code")
    assert folder == tmp_path / "a" / "b" and folder.stat().st_mode & 0o777 == 0o700
    assert private_folder([folder], "code") == folder


@pytest.mark.parametrize("mode", [0o770, 0o702, 0o777])
def test_a_folder_that_others_can_write_is_not_used_and_that_is_said(tmp_path, mode):
    shared, other = tmp_path / "shared", tmp_path / "other"
    shared.mkdir()
    shared.chmod(mode)
    with pytest.warns(UserWarning, match=r"code is kept in .*other: .*shared can be written by others"):
        assert private_folder([shared, other], "code") == other
    with pytest.warns(UserWarning, match="can be written by others"):
        alone = private_folder([shared], "code")
    assert not why_unsafe(alone) and alone.stat().st_mode & 0o777 == 0o700


def test_a_folder_anybody_may_replace_is_not_used(tmp_path):
    inside = tmp_path / "open" / "mine"
    inside.mkdir(parents=True, mode=0o700)
    inside.parent.chmod(0o777)
    assert "can be replaced by anybody" in why_unsafe(inside)
    inside.parent.chmod(0o1777)  # as /tmp: only owners remove there
    assert not why_unsafe(inside)


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="only root can give files away")
def test_what_belongs_to_another_user_is_unsafe(tmp_path):
    file = tmp_path / "theirs"
    file.touch(mode=0o644)
    os.chown(file, 12345, 12345)
    assert "belongs to user 12345" in why_unsafe(file)


def test_where_nothing_can_be_written_a_process_keeps_its_own_folder(tmp_path):
    blocked = tmp_path / "file"
    blocked.touch()
    code = (
        "import warnings; warnings.simplefilter('ignore')\n"
        "from pathlib import Path; from prescope.core.private_folders import private_folder\n"
        f"print(private_folder([Path({str(blocked)!r}) / 'x'], 'code'))"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    folder = Path(out.stdout.strip())
    assert folder.name.startswith("prescope-") and not folder.exists(), "left behind by a process that ended"


@pytest.mark.skipif(not shutil.which("gcc"), reason="no C compiler")
@pytest.mark.parametrize("place", ["file", "folder"])
def test_a_foreign_kernel_in_the_cache_is_not_run(home, tmp_path, place):
    """Formerly whatever lay there under the right name was loaded, which runs it."""
    source = tmp_path / "answer.c"
    source.write_text(SOURCE)
    defines = ("ANSWER=42",)
    assert build.load(source, defines).answer() == 42
    (built,) = home.rglob("answer_*.so")
    assert built.stat().st_mode & 0o077 == 0

    foreign = tmp_path / "foreign.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-DANSWER=666", str(source), "-o", str(foreign)], check=True)
    os.replace(foreign, built)
    (built if place == "file" else built.parent).chmod(0o777)
    with pytest.warns(UserWarning, match="can be written by others"):
        library = build.load(source, defines)
    # The loader keeps one library a path: a name of its own shows which file it is.
    code = f"import ctypes; print(ctypes.CDLL({library._name!r}).answer())"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "42"


def test_without_a_compiler_nothing_of_a_foreign_folder_is_loaded_either(home, monkeypatch):
    monkeypatch.setenv("CC", "there-is-no-such-compiler")
    with pytest.raises(CannotBuild, match="there is no C compiler"):
        build.load()


def decisions_folder(environment: dict[str, str], package_root: Path = ROOT) -> tuple[Path, str]:
    """Where a process keeps its compiled decisions, and what it says about it."""
    code = "from prescope.core.jit import cache_dir; print(cache_dir())"
    out = subprocess.run(
        [sys.executable, "-c", code],
        cwd=package_root,
        env={**os.environ, "PYTHONPATH": str(package_root), **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return Path(out.stdout.strip()), out.stderr


def test_decisions_are_not_unpickled_from_a_shared_numba_folder(tmp_path):
    pytest.importorskip("numba")
    shared = tmp_path / "numba"
    shared.mkdir()
    shared.chmod(0o777)
    folder, said = decisions_folder({"NUMBA_CACHE_DIR": str(shared)})
    assert shared not in folder.parents and "can be replaced by anybody" in said
    shared.chmod(0o700)
    folder, said = decisions_folder({"NUMBA_CACHE_DIR": str(shared)})
    assert shared in folder.parents and not said


def test_a_read_only_installation_keeps_compiled_decisions_in_the_users_folder(tmp_path):
    pytest.importorskip("numba")
    package = tmp_path / "site"
    shutil.copytree(
        ROOT / "prescope", package / "prescope", ignore=shutil.ignore_patterns("__pycache__", "*.so")
    )
    (package / "prescope" / "__pycache__").touch()  # root writes where modes forbid it, but not into a file
    home = tmp_path / "cache"
    folder, said = decisions_folder({"XDG_CACHE_HOME": str(home)}, package)
    assert home in folder.parents and not said
