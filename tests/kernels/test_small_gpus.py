"""The kernels on GPUs that are not an H200: compiled for them by Triton, which needs none."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton exists for Linux only")

ROOT = Path(__file__).resolve().parents[2]
#: What a program may have of shared memory on GeForce cards, compute capability 8.6, 8.9 and 12.0 (CUDA C++ guide).
GEFORCE_BYTES = 99 << 10


@pytest.mark.slow
def test_tiles_that_nobody_tuned_fit_into_a_geforce_card() -> None:
    """Two stages of float32 weights were three: 112 KiB, and a launch that fails."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.compiled_for", "86"],
        cwd=ROOT, env=env, check=True, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    shared = json.loads(done.stdout.splitlines()[-1])
    assert {name.split()[0] for name in shared} == {"_grouped_linear", "packed_tiles", "_skinny_linear"}
    assert {name.split()[1] for name in shared} == {"torch.bfloat16", "torch.float16", "torch.float32"}
    assert {name: size for name, size in shared.items() if size > GEFORCE_BYTES} == {}
