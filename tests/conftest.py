"""What must be settled before any test module is imported."""

import os
import sys

import pytest
import torch

# Triton decides when it is first imported whether to interpret kernels; torch alone does not import it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_configure(config):
    """Without a C compiler the CPU lane runs on torch and says so: no failure of the test that comes first."""
    from prescope.kernels.cpu.build import CannotBuild, find_compiler

    try:
        find_compiler()
        is_compiled = sys.platform.startswith("linux")
    except CannotBuild:
        is_compiled = False
    if not is_compiled:
        config.addinivalue_line("filterwarnings", "ignore:experts on the CPU run on torch")


@pytest.fixture(scope="session")
def host_parts():
    """What an engine on a GPU compiles in a thread is compiled before: no test's time is a compiler's."""
    from prescope.engine.graph.warm import compile_host_parts

    compile_host_parts()


@pytest.fixture(autouse=True)
def compiled_before_gpu(request):
    if request.node.get_closest_marker("gpu") is not None:
        request.getfixturevalue("host_parts")


@pytest.fixture(scope="module")
def one_thread():
    """Matrices this small run faster on one thread, and those of a shared machine wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def gpu(host_parts, monkeypatch):
    """`attach(device="cpu")` gives the interpreted GPU."""
    # They import Triton's neighbours: after the lines above.
    from prescope.kernels.packed_linear import PackedConfig
    from prescope.kernels.triton_experts import PairConfig
    from tests.support.interpreted_gpu import (
        InterpretedGpu,
        sleepy_clock_address,
    )

    if torch.cuda.is_available():
        return {"device": "cuda"}
    monkeypatch.setattr("prescope.engine.engine.open_device", lambda *_: InterpretedGpu())
    monkeypatch.setattr("prescope.kernels._triton_problem", lambda *_: "")
    monkeypatch.setattr("prescope.kernels.graph_buffers.FETCH_PROGRAMS", 2)
    # The interpreter takes a program for a program, however wide: a few wide ones for the narrow ones of a GPU.
    monkeypatch.setattr("prescope.kernels.triton_experts.DEFAULT_PAIRS", PairConfig(64, 64, 4))
    monkeypatch.setattr("prescope.kernels.packed_linear.default_pairs", lambda _: PackedConfig(64, 64, 4, 1))
    # The host looks for messages now and then: it would spin beside a GPU.
    monkeypatch.setattr("prescope.engine.graph.loop.POLLS", 1)
    for driver in ("host_driver", "copy_driver"):
        monkeypatch.setattr(f"prescope.engine.graph.{driver}.clock_address", sleepy_clock_address)
    return {"device": "cpu", "kernels": "triton", "events": False}


@pytest.fixture
def late_link(gpu, monkeypatch, request):
    """The same with a link whose copies take their time; where there is a GPU, its own."""
    if torch.cuda.is_available():
        yield None
        return
    from tests.support.interpreted_gpu import InterpretedGpu, LateLink

    late = LateLink(seed=getattr(request, "param", 0))
    monkeypatch.setattr("prescope.engine.engine.open_device", lambda *_: InterpretedGpu(late))
    yield late
    late.close()
