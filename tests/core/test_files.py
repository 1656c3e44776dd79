"""One way to write a file: the old one or the new one, never half of it, and nothing beside it."""

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from prescope.core.files import (
    checksum,
    parse_object,
    read_object,
    require_checksum,
    require_file,
    require_memory,
    write_file,
    write_text,
)
from prescope.errors import BadProfile, CannotWrite
from tests.support.damaged_files import small_predictor
from tests.support.small_run import small_run

ROOT = Path(__file__).resolve().parents[2]
posix = pytest.mark.skipif(os.name != "posix", reason="modes, links and pipes as POSIX has them")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@posix
@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_a_new_file_has_the_users_mode(tmp_path, umask, mode):
    former = os.umask(umask)
    try:
        path = write_text(tmp_path / "f", "x")
    finally:
        os.umask(former)
    assert stat.S_IMODE(path.stat().st_mode) == mode


@posix
def test_a_file_that_is_replaced_keeps_its_mode(tmp_path):
    path = write_text(tmp_path / "f", "x")
    path.chmod(0o640)
    write_text(path, "y")
    assert (stat.S_IMODE(path.stat().st_mode), path.read_text()) == (0o640, "y")


def replaces(unfinished: Path) -> None:
    """Writes as safetensors does: a file of its own takes the place of the one that is given."""
    own = unfinished.with_name(".tmpXXXXXX")
    own.touch(0o600)
    own.write_text("new")
    os.replace(own, unfinished)


@posix
@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o027, 0o640)])
def test_whatever_writes_it_the_mode_is_the_users(tmp_path, umask, mode):
    """Every kind of file that prescope saves, and a writer that replaces what it is given."""
    run = small_run(steps=2)
    saves = {
        "t.safetensors": run.trace.save,
        "t.parquet": run.trace.save_parquet,
        "p.json": run.save_perfetto,
        "e.parquet": run.save_events,
        "run": run.save,
        "predictor.safetensors": small_predictor().save,
        "other": lambda path: write_file(path, replaces),
    }
    former = os.umask(umask)
    try:
        for name, save in saves.items():
            save(tmp_path / name)
        found = {
            path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*") if path.is_file()
        }
        assert set(found.values()) == {mode}, found
        kept = tmp_path / "t.safetensors"
        kept.chmod(0o604)
        run.trace.save(kept)
    finally:
        os.umask(former)
    assert stat.S_IMODE(kept.stat().st_mode) == 0o604


@posix
def test_a_link_stays_and_what_it_points_to_is_replaced(tmp_path):
    target = tmp_path / "elsewhere" / "real"
    write_text(target, "old")
    (tmp_path / "link").symlink_to(target)
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and target.read_text() == "new"
    (tmp_path / "dangling").symlink_to(tmp_path / "elsewhere" / "none-yet")
    write_text(tmp_path / "dangling", "made")
    assert (tmp_path / "elsewhere" / "none-yet").read_text() == "made"
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(CannotWrite):
        write_text(tmp_path / "loop", "x")


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    path = write_text(tmp_path / "f", "old")

    def fail_half_way(unfinished: Path) -> None:
        unfinished.write_text("half")
        raise OSError("no space left on device")

    with pytest.raises(CannotWrite, match="no space left"):
        write_file(path, fail_half_way)
    assert (names(tmp_path), path.read_text()) == (["f"], "old")


def test_an_interrupt_leaves_the_old_file_and_nothing_else(tmp_path):
    path = write_text(tmp_path / "f", "old")

    def interrupted(unfinished: Path) -> None:
        unfinished.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_file(path, interrupted)
    assert (names(tmp_path), path.read_text()) == (["f"], "old")


WRITE_FOR_EVER = """
import sys, time
from prescope.core.files import write_file

def write(unfinished):
    unfinished.write_text("half")
    unfinished.with_name(".tmpXXXXXX").write_text("what a library writes on its way")
    print("writing", flush=True)
    time.sleep(60)

write_file(sys.argv[1], write)
"""


@posix
def test_what_a_killed_save_left_is_removed_by_the_next_and_one_under_way_is_not(tmp_path):
    path = write_text(tmp_path / "f", "old")
    command = [sys.executable, "-c", WRITE_FOR_EVER, str(path)]
    saves = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(2)]
    try:
        for save in saves:
            assert save.stdout.readline() == "writing\n"
        saves[0].send_signal(signal.SIGKILL)
        saves[0].wait()
        assert len(names(tmp_path)) == 3
        write_text(path, "new")
        left = [name for name in names(tmp_path) if name != "f"]
        assert len(left) == 1, "the one that is being written stays"
        assert path.read_text() == "new"
    finally:
        for save in saves:
            save.kill()
            save.wait()
            save.stdout.close()
    write_text(path, "newer")
    assert names(tmp_path) == ["f"]


@posix
def test_what_former_versions_and_saves_killed_at_once_left_is_removed_too(tmp_path):
    (tmp_path / ".f.0123456789ab.part").write_text("half")
    (tmp_path / ".f.ba9876543210.part").mkdir()
    (tmp_path / ".g.0123456789ab.part").write_text("another file's")
    write_text(tmp_path / "f", "new")
    assert names(tmp_path) == [".g.0123456789ab.part", "f"]


@pytest.mark.parametrize("name", ["a\0b", "half a pair \ud800"])
def test_a_name_that_no_file_can_have_is_said(tmp_path, name):
    with pytest.raises(CannotWrite, match="no name of a file"):
        write_text(tmp_path / name, "x")
    assert names(tmp_path) == []


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from tests.support.small_run import small_run
from prescope import views
from prescope.core.files import CannotWrite
from prescope.report import write_report
from prescope.traces.events import write_events

folder, run = Path(sys.argv[1]), small_run(steps=40)
saves = {
    "t.safetensors": run.trace.save,
    "t.parquet": run.trace.save_parquet,
    "e.parquet": lambda path: write_events(run.events, path),
    "p.json": run.save_perfetto,
    "r.html": lambda path: write_report([], {}, path, title="t", runs=[run]),
}
for name, save in saves.items():
    save(folder / name)
before = {path.name: path.read_bytes() for path in folder.iterdir()}
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
refused = []
for name, save in saves.items():
    try:
        save(folder / name)
    except CannotWrite:
        refused.append(name)
assert refused == list(saves), refused
assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
"""


@posix
def test_a_full_disk_destroys_no_file_of_ours_and_leaves_nothing(tmp_path):
    """A limit on the size of files stands for the disk: writing stops half-way with an error of the system."""
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]


@posix
def test_what_is_no_file_is_neither_written_nor_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name, kind in (("pipe", "a pipe"), ("folder", "a folder")):
        with pytest.raises(CannotWrite, match=kind) as refused:
            write_text(tmp_path / name, "x")
        assert str(refused.value).count("cannot be written") == 1
        with pytest.raises(BadProfile, match=kind):
            require_file(tmp_path / name, BadProfile)
    with pytest.raises(BadProfile, match="a device"):
        require_file("/dev/zero", BadProfile)
    with pytest.raises(CannotWrite, match="a device"):
        write_text("/dev/null", "x")
    started = time.perf_counter()
    with pytest.raises(BadProfile, match="a pipe"):
        read_object(tmp_path / "pipe", BadProfile, "do so", 100)
    assert time.perf_counter() - started < 5


@pytest.mark.parametrize(
    "content, says",
    [
        (b"", "JSON"),
        (b"{", "JSON"),
        (b"[1]", "instead of an object"),
        (b'{"a": "\xff"}', "cannot be read"),
        (b'{"a": ' + b"[" * 500 + b"]" * 500 + b"}", "deep"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "JSON"),
        (b'{"a": ' + b"9" * 100_000 + b"}", "JSON"),
        (b'{"a": 1}' + b" " * 2**20, "more than"),
    ],
)
def test_json_that_is_none_of_ours_is_refused_with_the_remedy(tmp_path, content, says):
    path = tmp_path / "f.json"
    path.write_bytes(content)
    with pytest.raises(BadProfile, match=says):
        read_object(path, BadProfile, "calibrate again", 2**20)
    assert parse_object('{"a": {"b": [1]}}', "text", BadProfile, "") == {"a": {"b": [1]}}


def test_a_checksum_tells_any_change_apart():
    whole = checksum("text", {"a": ("f4(2,)", b"12345678"), "b": ("i1(1,)", b"x")})
    assert whole == checksum("text", {"b": ("i1(1,)", b"x"), "a": ("f4(2,)", b"12345678")})
    others = [
        checksum("Text", {"a": ("f4(2,)", b"12345678"), "b": ("i1(1,)", b"x")}),
        checksum("text", {"a": ("f4(2,)", b"12345679"), "b": ("i1(1,)", b"x")}),
        checksum("text", {"a": ("f4(1,2)", b"12345678"), "b": ("i1(1,)", b"x")}),
        checksum("text", {"c": ("f4(2,)", b"12345678"), "b": ("i1(1,)", b"x")}),
        checksum("text", {"a": ("f4(2,)", b"12345678")}),
    ]
    assert whole not in others and len(set(others)) == len(others)
    require_checksum(None, whole, "f", BadProfile, "")
    require_checksum(whole, whole, "f", BadProfile, "")
    with pytest.raises(BadProfile, match=r"not what was written.*measure again"):
        require_checksum(others[0], whole, "f", BadProfile, "measure again")


def test_more_memory_than_there_is_is_not_asked_for():
    require_memory(1, "f", BadProfile)
    with pytest.raises(BadProfile, match="damaged"):
        require_memory(2**60, "f", BadProfile)
