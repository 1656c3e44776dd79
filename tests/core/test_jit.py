"""Compiled functions under signals: Ctrl-C may come at any moment, and a notebook sends it often."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from prescope.core.jit import IS_COMPILED

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
