"""What Windows and macOS lack is not asked for: tried here by taking it away from a process before prescope comes."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """
import ctypes, mmap, os, pathlib, shutil, signal, sys, types, warnings
import psutil, torch, transformers, numba  # they may use what they find
from tests.support.models import plain_tokens, prompt, tiny_moe
from transformers import Qwen3MoeForCausalLM

model, ids = tiny_moe(), prompt(batch=2)
expected = plain_tokens(model, ids)

for module, names in (
    (os, "fork register_at_fork sysconf getuid geteuid sched_getaffinity uname getloadavg nice"),
    (signal, "setitimer SIGALRM SIGHUP SIGKILL pthread_sigmask alarm"),
    (mmap, "MAP_PRIVATE MAP_ANONYMOUS MADV_HUGEPAGE MADV_DONTFORK"),
):
    for name in names.split():
        if hasattr(module, name):
            delattr(module, name)
for name in ("fcntl", "resource", "pwd", "grp"):
    sys.modules[name] = None

opened = ctypes.CDLL
class CDLL(opened):
    def __init__(self, name, *args, **keywords):
        if name is None:
            raise TypeError("a library has a name on Windows")
        super().__init__(name, *args, **keywords)
ctypes.CDLL = CDLL

exists = pathlib.Path.exists
pathlib.Path.exists = lambda path, **keywords: not str(path).startswith(("/proc", "/sys")) and exists(path, **keywords)
sys.platform = PLATFORM
shutil._winapi = types.SimpleNamespace(NeedCurrentDirectoryForExePath=lambda name: False)  # asked from Python 3.12 on

import prescope
from prescope.core.machine import MEMINFO, available_memory_bytes, machine_facts, this_place
from prescope.core.native import clock_address, now_us
from prescope.scheduler.costs import LayerCosts
import numpy as np, time

assert not MEMINFO.exists() and available_memory_bytes() > 1 << 20 and machine_facts()["host_memory_gib"] > 0.1
assert this_place().cores >= 1
assert abs(now_us(clock_address(), np.zeros(2, np.int64)) - time.perf_counter() * 1e6) < 1e6
costs = LayerCosts(link_us=100.0, gpu_us=5.0, rest_us=200.0, cpu_us=(0.0, 80.0, 120.0), source="made up")
warnings.filterwarnings("ignore", "experts on the CPU run on torch")
for schedule in ("on-demand", "presched"):
    with prescope.attach(
        model, slots=5, device="cpu", link_gb_per_s=50.0, schedule=schedule, costs=costs, cpu_threads=1
    ) as engine:
        assert engine.generate(ids, max_new_tokens=12).tokens == expected, schedule
        engine.check_integrity()
assert plain_tokens(model, ids) == expected
print("fine")
"""


@pytest.mark.parametrize("platform", ["win32", pytest.param("darwin", marks=pytest.mark.slow)])
def test_import_and_run_without_what_only_linux_has(platform):
    pytest.importorskip("psutil")
    code = PROGRAM.replace("PLATFORM", repr(platform))
    child = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert child.returncode == 0 and "fine" in child.stdout, child.stderr[-3000:]
