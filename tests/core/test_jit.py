"""Compiled functions under signals, for Ctrl-C may come at any moment; and what is said while they are compiled."""

import runpy
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest

from prescope.core.jit import IS_COMPILED, said_if_compiled_first, warm_up_us

ROOT = Path(__file__).resolve().parents[2]
INTERRUPTS = 10_000


@pytest.mark.skipif(
    not hasattr(signal, "setitimer"), reason="no interval timer here to raise interrupts with"
)
@pytest.mark.skipif(not IS_COMPILED, reason="nothing is compiled here")
def test_an_interrupt_of_a_compiled_call_is_noticed_after_it():
    """Formerly the process was gone within some tens of them: numba went on with the NULL of code that had raised."""
    code = f"from tests.support.interrupted_calls import compiled; compiled({INTERRUPTS})"
    child = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=150
    )
    assert child.returncode == 0, f"ended with {child.returncode}: {child.stderr[-2000:]}"
    assert f"{INTERRUPTS} survived" in child.stdout


@pytest.mark.skipif(not IS_COMPILED, reason="nothing is compiled here")
def test_a_thread_is_told_of_its_own_compiling_alone():
    """A run's warm-up would be what another thread compiles meanwhile."""
    from numba.core.compiler_lock import global_compiler_lock

    def compile_for_a_while() -> None:
        before_us = warm_up_us()
        with global_compiler_lock, global_compiler_lock:
            time.sleep(0.02)
        spent_us.append(warm_up_us() - before_us)

    spent_us: list[float] = []
    before_us = warm_up_us()
    other = threading.Thread(target=compile_for_a_while)
    other.start()
    other.join()
    assert warm_up_us() == before_us
    compile_for_a_while()
    assert min(spent_us) >= 20_000 and warm_up_us() - before_us == spent_us[1]


@pytest.mark.skipif(not IS_COMPILED, reason="nothing is compiled here")
def test_a_thread_that_compiles_leaves_the_users_filters_alone(monkeypatch):
    """It put back the filters that it had found, and with them went what a notebook had set meanwhile."""
    import numba

    def compile_one() -> None:
        numba.njit(lambda x: x + 1)(1)
        done.append(True)

    caught_in: list[str] = []
    catch = warnings.catch_warnings

    class Watched(catch):
        def __enter__(self):
            caught_in.append(threading.current_thread().name)
            return super().__enter__()

    done: list[bool] = []
    monkeypatch.setattr(warnings, "catch_warnings", Watched)
    thread = threading.Thread(target=compile_one, name="compiles")
    thread.start()
    thread.join()
    assert done and "compiles" not in caught_in
    compile_one()
    assert threading.current_thread().name in caught_in, (
        "numba does not catch any more: this is needed no longer"
    )


@pytest.mark.skipif(not IS_COMPILED, reason="nothing is compiled here")
def test_whoever_waits_for_the_first_compilation_is_told_and_nobody_else(capsys, tmp_path, monkeypatch):
    """A first dashboard came after two minutes without a word: it looked as if it hung."""
    monkeypatch.setattr("prescope.core.jit.cache_dir", lambda: str(tmp_path))
    new = SimpleNamespace(signatures=[], __name__="replay", py_func=len_of)
    with said_if_compiled_first(new, "the simulator"):
        pass
    assert "compiling the simulator: a minute or two" in capsys.readouterr().err
    (tmp_path / "test_jit.replay-1.py311.nbi").touch()
    for known in (new, SimpleNamespace(signatures=["(int64,)"])):
        with said_if_compiled_first(known, "the simulator"):
            pass
    assert capsys.readouterr().err == ""


def len_of(_things):
    """Stands for a function whose file names what is kept of it."""


@pytest.mark.skipif(not IS_COMPILED, reason="nothing is compiled here")
@pytest.mark.parametrize("kind", ["nbi", "nbc"])
@pytest.mark.parametrize("kept_bytes", [0, 40])
def test_compiled_code_that_is_damaged_on_disk_is_said_and_compiled_anew(
    kind, kept_bytes, tmp_path, monkeypatch
):
    """A machine that lost power leaves files without their end; numba raised pickle's error at every run after."""
    source, compiled = tmp_path / "doubling.py", tmp_path / "compiled"
    source.write_text("from prescope.core.jit import jit\n\n\n@jit\ndef double(x):\n    return 2 * x\n")
    monkeypatch.setattr("prescope.core.jit.cache_dir", lambda: str(compiled))
    double = runpy.run_path(str(source))["double"]
    assert double(3) == 6
    (damaged,) = compiled.rglob(f"*.{kind}")
    damaged.write_bytes(damaged.read_bytes()[:kept_bytes])
    with pytest.warns(UserWarning, match="is damaged"):
        assert runpy.run_path(str(source))["double"](3) == 6
    again = runpy.run_path(str(source))["double"]
    assert again(3) == 6 and sum(again.stats.cache_hits.values()) == 1
