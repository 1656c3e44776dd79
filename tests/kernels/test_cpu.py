"""The CPU lane against float64: every layout, gate and dtype, both implementations; threads, failures, the end.

The tiles of AMX are emulated in C here, so that what is around them runs on any machine.
"""

import gc
import os
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import CancelledError
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from prescope.errors import UnsupportedOption
from prescope.kernels import ExpertsSpec
from prescope.kernels.cpu import (
    CpuExperts,
    CpuLayer,
    ExpertBatch,
    Flag,
    default_threads,
    expert_batch_of,
    physical_cores,
)
from prescope.kernels.cpu import lane as lane_module
from prescope.kernels.cpu.build import CannotBuild, find_compiler, load
from prescope.kernels.cpu.native import NativeLane
from prescope.kernels.cpu.threads import may_stay_awake
from prescope.kernels.cpu.with_torch import TorchLane
from prescope.kernels.gates import activation_tables, gate_tables
from prescope.weights.layout import row_layout
from tests.support.distances import norm_distance
from tests.support.gates import alternating, silu_gate


def has_compiler() -> bool:
    try:
        find_compiler()
    except CannotBuild:
        return False
    return sys.platform.startswith("linux")


needs_compiler = pytest.mark.skipif(not has_compiler(), reason="no C compiler, or not Linux")


def native(layers, threads):
    return NativeLane(layers, threads, spin_us=0)


def tiles(layers, threads):
    return NativeLane(layers, threads, spin_us=0, defines=("AMX_EMULATED",))


LANES = [
    pytest.param(native, marks=needs_compiler, id="native"),
    pytest.param(tiles, marks=needs_compiler, id="tiles"),
    pytest.param(TorchLane, id="torch"),
]
HALVES = [torch.bfloat16, torch.float16]


def gelu(h):
    g, u = h.chunk(2, dim=-1)
    return functional.gelu(g, approximate="tanh") * u


def clamped(h):
    """As of step3p7: clamps after the activation."""
    g, u = h.chunk(2, dim=-1)
    return functional.silu(g).clamp(max=2.0) * u.clamp(min=-2.0, max=2.0)


def fused(h):
    """Rounded once only: not a product of tables of rounded numbers."""
    g, u = h.chunk(2, dim=-1)
    return (functional.silu(g.float()) * u.float()).to(h.dtype)


def mixing(h):
    """Not elementwise."""
    g, u = h.chunk(2, dim=-1)
    return g.softmax(dim=-1) * u


def relu2(h):
    return functional.relu(h).square()


GATES = [silu_gate, gelu, clamped, alternating]


def make_layer(
    dtype, *, experts=5, d=64, f=64, gate=silu_gate, bias=False, transposed=False, seed=0
) -> CpuLayer:
    """A layer with rows of noise where no field is, so that a read past a field shows."""
    rng = torch.Generator().manual_seed(seed)
    up_dim = f if gate is relu2 else 2 * f
    shapes = {"up": (d, up_dim) if transposed else (up_dim, d), "down": (f, d) if transposed else (d, f)}
    if bias:
        shapes |= {"up_bias": (up_dim,), "down_bias": (d,)}
    tensors = {
        name: (torch.randn(experts, *shape, generator=rng) * (d**-0.5 if "bias" not in name else 0.5)).to(
            dtype
        )
        for name, shape in shapes.items()
    }
    layout = row_layout(tensors)
    rows = torch.full((experts, layout.row_bytes), 0x7F, dtype=torch.uint8)
    for name, tensor in tensors.items():
        layout.view(rows, name).copy_(tensor)
    spec = ExpertsSpec(
        up="up", down="down", up_bias="up_bias" if bias else None, down_bias="down_bias" if bias else None,
        is_transposed=transposed, gate=gate, post_norm=None,
    )  # fmt: skip
    return CpuLayer(rows, layout, spec)


def make_routing(seed, tokens, experts, top_k) -> np.ndarray:
    """(T, K) distinct experts of each token, and sentinels of both kinds."""
    rng = np.random.default_rng(seed)
    ids = np.stack([rng.permutation(experts)[:top_k] for _ in range(tokens)])
    if tokens > 2:
        ids[0, 0], ids[-1, -1] = -1, experts
    return ids


def expected(layer: CpuLayer, expert_batch: ExpertBatch, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """In float64, rounded to the dtype after each linear, each bias and the gate, as the GPU's kernels round."""
    out = out.clone()
    spec, dtype = layer.spec, layer.dtype

    def linear(a, weight, bias, expert):
        w = layer.layout.view(layer.rows, weight)[expert].double()
        y = (a.double() @ (w if spec.is_transposed else w.T)).to(dtype)
        return y if bias is None else y + layer.layout.view(layer.rows, bias)[expert]

    for i, expert in enumerate(expert_batch.experts.tolist()):
        pairs = slice(expert_batch.first[i], expert_batch.first[i + 1])
        h = linear(x[expert_batch.tokens[pairs]], spec.up, spec.up_bias, expert)
        out[expert_batch.places[pairs]] = linear(spec.gate(h), spec.down, spec.down_bias, expert)
    return out


def run(make, layer, expert_batch, x, threads=2, rows=None) -> torch.Tensor:
    out = torch.full((rows or max(1, len(expert_batch.places)), layer.out_dim), 7.0, dtype=layer.dtype)
    lane = make([layer], threads)
    try:
        lane.submit(0, expert_batch, x, out, None).wait(60)
    finally:
        lane.close()
    return out


#: Relative error allowed: roundings that fall to the other side by another order of sums; a wrong weight gives 1e-1.
ALLOWED = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 2e-6}


@pytest.mark.parametrize("make", LANES)
@pytest.mark.parametrize("dtype", HALVES, ids=["bf16", "fp16"])
@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("gate", [*GATES, relu2], ids=lambda gate: gate.__name__)
@pytest.mark.parametrize("shape", [(64, 96), (53, 37)], ids=["even", "odd"])
@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_a_lane_equals_float64(make, dtype, transposed, bias, gate, shape, tokens):
    """Odd shapes have ends of rows and of columns in every loop; 40 tokens give each expert several groups."""
    layer = make_layer(dtype, d=shape[0], f=shape[1], gate=gate, bias=bias, transposed=transposed)
    ids = make_routing(tokens, tokens, 5, 3)
    expert_batch = expert_batch_of(ids, [4, 0, 2])
    x = torch.randn(tokens, shape[0], generator=torch.Generator().manual_seed(tokens)).to(dtype)
    got = run(make, layer, expert_batch, x, rows=ids.size)
    want = expected(layer, expert_batch, x, torch.full_like(got, 7.0))
    assert norm_distance(got, want) < ALLOWED[dtype]
    others = np.setdiff1d(np.arange(ids.size), expert_batch.places)
    assert (got[others] == 7.0).all(), "rows of other experts and of nobody must stay as they are"


def test_torch_computes_float32_and_any_gate():
    for gate in (silu_gate, mixing):
        layer = make_layer(torch.float32, gate=gate, bias=True)
        expert_batch = expert_batch_of(make_routing(0, 9, 5, 2), range(5))
        x = torch.randn(9, 64)
        got = run(TorchLane, layer, expert_batch, x, rows=18)
        assert (
            norm_distance(got, expected(layer, expert_batch, x, torch.full_like(got, 7.0)))
            < ALLOWED[torch.float32]
        )


@pytest.mark.parametrize("make", LANES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("tokens", [1, 24])
def test_results_do_not_depend_on_the_number_of_threads(make, transposed, tokens):
    layer = make_layer(torch.bfloat16, d=512, f=320, transposed=transposed, experts=4)
    expert_batch = expert_batch_of(make_routing(1, tokens, 4, 3), range(4))
    x = torch.randn(tokens, 512).bfloat16()
    one = run(make, layer, expert_batch, x, threads=1, rows=3 * tokens)
    for threads in (2, 5):
        assert torch.equal(run(make, layer, expert_batch, x, threads=threads, rows=3 * tokens), one)


@needs_compiler
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("transposed", [False, True])
def test_a_pair_does_not_depend_on_its_company(dtype, transposed):
    """Each token alone gives the bits that it gives among others: greedy tokens stay what they were in a batch."""
    layer = make_layer(dtype, d=96, f=72, transposed=transposed)
    ids = make_routing(3, 5, 5, 3)[1:-1]
    x = torch.randn(len(ids), 96).to(dtype)

    def vectors(layers, threads):
        return NativeLane(layers, threads, spin_us=0, defines=("TILE_PAIRS=1000000",))

    together = run(vectors, layer, expert_batch_of(ids, range(5)), x, rows=ids.size)
    for t in range(len(ids)):
        alone = run(vectors, layer, expert_batch_of(ids[t : t + 1], range(5)), x[t : t + 1], rows=3)
        assert torch.equal(alone, together[3 * t : 3 * t + 3])


def test_a_compact_lot_gives_the_same_rows_one_after_another():
    layer = make_layer(torch.bfloat16)
    ids = make_routing(2, 6, 5, 2)
    expert_batch = expert_batch_of(ids, [1, 3])
    x = torch.randn(6, 64).bfloat16()
    whole = run(TorchLane, layer, expert_batch, x, rows=12)
    assert torch.equal(run(TorchLane, layer, expert_batch.compact(), x), whole[expert_batch.places])


@pytest.mark.parametrize("seed", range(5))
def test_a_lot_holds_every_pair_of_its_experts_once(seed):
    ids = make_routing(seed, 7, 6, 3)
    experts = np.random.default_rng(seed).permutation(6)[:4]
    expert_batch = expert_batch_of(ids, experts)
    flat = ids.ravel()
    assert sorted(expert_batch.places) == np.flatnonzero(np.isin(flat, experts)).tolist()
    assert (np.repeat(expert_batch.experts, np.diff(expert_batch.first)) == flat[expert_batch.places]).all()
    assert (expert_batch.tokens == expert_batch.places // 3).all()


# -- gates -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("gate", GATES, ids=lambda gate: gate.__name__)
def test_tables_give_a_gate_to_the_bit(gate, dtype):
    tables = gate_tables(gate, dtype)
    assert tables is not None
    assert tables.interleaved == (gate is alternating)
    g, u = torch.randn(2, 4096, generator=torch.Generator().manual_seed(1)).to(dtype)
    product = (
        tables.gate[g.view(torch.int16).int() & 0xFFFF] * tables.value[u.view(torch.int16).int() & 0xFFFF]
    )
    rows = torch.stack([g, u], -1).view(1, -1) if tables.interleaved else torch.cat([g, u])[None]
    assert torch.equal(gate(rows)[0], product.to(dtype))


@pytest.mark.parametrize("gate", [fused, mixing], ids=lambda gate: gate.__name__)
def test_a_gate_that_is_no_product_of_tables_is_not_taken_for_one(gate):
    assert gate_tables(gate, torch.bfloat16) is None


def test_an_activation_that_is_not_elementwise_is_not_taken_for_a_table():
    assert activation_tables(relu2, torch.bfloat16) is not None
    assert activation_tables(lambda h: h.softmax(-1), torch.bfloat16) is None


# -- choice of the implementation ------------------------------------------------------------------------------------


@needs_compiler
def test_auto_compiles_where_it_can():
    with CpuExperts([make_layer(torch.bfloat16)], threads=1) as lane:
        assert (lane.implementation, lane.reason) == ("native", "compiled for this machine")


@needs_compiler
@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (make_layer(torch.float32), "float32"),
        (make_layer(torch.bfloat16, gate=fused), "product"),
        (make_layer(torch.bfloat16, gate=lambda h: h @ torch.ones(3)), "cannot be called"),
    ],
)
def test_what_the_kernel_cannot_compute_goes_to_torch_aloud(monkeypatch, layer, why):
    monkeypatch.setattr(lane_module, "_given", set())
    with pytest.warns(UserWarning, match=why), CpuExperts([layer], threads=1) as lane:
        assert lane.implementation == "torch"
        assert why in lane.reason
    with pytest.raises(UnsupportedOption, match=why):
        CpuExperts([layer], threads=1, implementation="native")


@needs_compiler
def test_a_lane_that_is_opened_again_and_again_says_its_problem_once(monkeypatch):
    """A proof takes up 16 settings one after the other, and a notebook showed 16 red blocks: Python forgets which
    warnings it has given as soon as anyone touches its filters."""
    monkeypatch.setattr(lane_module, "_given", set())
    layers = [make_layer(torch.float32), make_layer(torch.bfloat16, gate=fused)]
    with warnings.catch_warnings(record=True) as given:
        for layer in layers * 3:
            warnings.simplefilter("default")
            with CpuExperts([layer], threads=1) as lane:
                assert lane.implementation == "torch"
    assert len(given) == len(layers)


def test_without_a_compiler_the_lane_runs_on_torch_and_says_so(monkeypatch):
    monkeypatch.setattr(lane_module, "_given", set())
    monkeypatch.setenv("CC", "no-such-compiler")
    with (
        pytest.warns(UserWarning, match="no-such-compiler"),
        CpuExperts([make_layer(torch.bfloat16)], threads=1) as lane,
    ):
        assert lane.implementation == "torch"


@needs_compiler
def test_a_source_that_does_not_compile_says_the_compilers_first_line(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = tmp_path / "broken.c"
    source.write_text("int f( {")
    with pytest.raises(CannotBuild, match=r"broken\.c"):
        load(source)
    assert not list((tmp_path / "prescope").glob("*.so")), "nothing half-built may be left in the cache"


@needs_compiler
def test_a_kernel_is_built_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = tmp_path / "one.c"
    source.write_text("int one(void) { return 1; }")
    assert load(source).one() == 1
    (built,) = (tmp_path / "prescope").iterdir()
    before = built.stat().st_mtime_ns
    assert load(source).one() == 1
    assert built.stat().st_mtime_ns == before
    source.write_text("int one(void) { return 2; }")
    assert load(source).one() == 2


def test_threads_leave_cores_to_others(tmp_path):
    """Four CPUs on two cores: hyperthreads count once."""
    for cpu in os.sched_getaffinity(0):
        folder = tmp_path / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text("0-1\n")
    assert physical_cores(tmp_path) == 1
    assert physical_cores(tmp_path / "nothing") == len(os.sched_getaffinity(0))
    assert 1 <= default_threads() <= max(1, physical_cores() - 2)


# -- asynchrony ------------------------------------------------------------------------------------------------------


def small_case(tokens=4):
    layer = make_layer(torch.bfloat16)
    expert_batch = expert_batch_of(make_routing(0, tokens, 5, 2), range(5))
    x = torch.randn(tokens, 64).bfloat16()
    return layer, expert_batch, x, torch.zeros(2 * tokens, 64).bfloat16()


@pytest.mark.parametrize("make", LANES)
def test_many_jobs_at_once_are_all_right(make):
    """More jobs than threads, of different sizes and layers, submitted before any is waited for."""
    layers = [make_layer(torch.bfloat16, seed=seed, d=128, f=96) for seed in range(3)]
    lane = make(layers, 3)
    try:
        cases = []
        for i in range(60):
            tokens = 1 + i * 7 % 23
            expert_batch = expert_batch_of(make_routing(i, tokens, 5, 2), [i % 5, (i + 2) % 5])
            x, out = torch.randn(tokens, 128).bfloat16(), torch.zeros(2 * tokens, 128).bfloat16()
            cases.append((i % 3, expert_batch, x, out, lane.submit(i % 3, expert_batch, x, out, None)))
        for layer, expert_batch, x, out, job in reversed(cases):
            job.wait(60)
            assert job.done()
            start, end = job.span_ns()
            assert 0 < start <= end <= time.perf_counter_ns()
            want = expected(layers[layer], expert_batch, x, torch.zeros_like(out))
            assert torch.equal(out, want) or norm_distance(out, want) < ALLOWED[torch.bfloat16]
    finally:
        lane.close()


@pytest.mark.parametrize("make", LANES)
def test_a_job_may_be_forgotten(make):
    """Nobody waits; its tensors live on until it is over, and its memory is used again."""
    layer, expert_batch, x, out = small_case()
    lane = make([layer], 2)
    try:
        for _ in range(200):
            lane.submit(0, expert_batch, x.clone(), torch.zeros_like(out), None)
            gc.collect(0)
        job = lane.submit(0, expert_batch, x, out, None)
        job.wait(60)
        assert (
            norm_distance(out, expected(layer, expert_batch, x, torch.zeros_like(out)))
            < ALLOWED[torch.bfloat16]
        )
    finally:
        lane.close()


@pytest.mark.parametrize("make", LANES)
def test_a_lot_of_nothing_is_over_and_sets_its_flag(make):
    layer, _, x, out = small_case()
    word = torch.zeros(1, dtype=torch.int32)
    lane = make([layer], 1)
    try:
        lane.submit(0, expert_batch_of(np.zeros((4, 2), dtype=np.int64), []), x, out, Flag(word, 3)).wait(10)
        assert word.item() == 3
        lane.submit(0, expert_batch_of(np.full((4, 2), -1), [0, 1]), x, out, Flag(word, 4)).wait(10)
        assert word.item() == 4
        assert (out == 0).all()
    finally:
        lane.close()


@pytest.mark.parametrize("make", LANES)
def test_the_flag_comes_after_the_outputs(make):
    """What a GPU does: spin on the word, then read."""
    layer, expert_batch, x, out = small_case(40)
    want = expected(layer, expert_batch, x, torch.zeros_like(out))
    word = torch.zeros(1, dtype=torch.int32)
    seen = word.numpy()
    lane = make([layer], 2)
    try:
        for value in range(1, 50):
            out.zero_()
            lane.submit(0, expert_batch, x, out, Flag(word, value))
            while seen[0] != value:
                pass
            assert norm_distance(out, want) < ALLOWED[torch.bfloat16]
    finally:
        lane.close()


def test_an_exception_surfaces_in_wait_and_the_flag_is_set():
    """The gate is the family's code; a lane that swallowed its error would leave wrong outputs, or a GPU waiting."""

    def broken(h):
        raise ArithmeticError("gate is broken")

    layer, expert_batch, x, out = small_case()
    layer = layer._replace(spec=replace(layer.spec, gate=broken))
    word = torch.zeros(1, dtype=torch.int32)
    lane = TorchLane([layer], 2)
    try:
        job = lane.submit(0, expert_batch, x, out, Flag(word, 1))
        with pytest.raises(ArithmeticError, match="gate is broken"):
            job.wait(10)
        assert word.item() == 1
        assert job.done()
    finally:
        lane.close()


def large_case():
    """Some 100 ms of work: 40 experts of 2 MB for 64 tokens each."""
    layer = make_layer(torch.bfloat16, experts=40, d=512, f=672)
    ids = np.tile(np.arange(40), (64, 1))
    return (
        layer,
        expert_batch_of(ids, range(40)),
        torch.randn(64, 512).bfloat16(),
        torch.zeros(64 * 40, 512).bfloat16(),
    )


@pytest.mark.parametrize("make", LANES)
def test_a_cancelled_job_ends_soon_and_says_so(make):
    layer, expert_batch, x, out = large_case()
    lane = make([layer], 1)
    word = torch.zeros(1, dtype=torch.int32)
    try:
        jobs = [lane.submit(0, expert_batch, x, out, Flag(word, i)) for i in range(1, 9)]
        for job in jobs:
            job.cancel()
        with pytest.raises(CancelledError):
            jobs[-1].wait(10)
        assert all(job.done() for job in jobs)
        assert word.item() == 8
        assert not (out[expert_batch.places] != 0).any(dim=1).all(), (
            "eight jobs were computed to the end all the same"
        )
        small = expert_batch_of(np.array([[0]]), [0])
        lane.submit(0, small, x[:1], out[:1], None).wait(10)
        assert norm_distance(out[:1], expected(layer, small, x[:1], out[:1])) < ALLOWED[torch.bfloat16]
    finally:
        lane.close()


@pytest.mark.parametrize("make", LANES)
def test_close_does_not_hang_and_ends_waits(make):
    layer, expert_batch, x, out = large_case()
    lane = make([layer], 2)
    jobs = [lane.submit(0, expert_batch, x, out, None) for _ in range(8)]
    outcome: list[BaseException | None] = []

    def wait() -> None:
        try:
            jobs[-1].wait(30)
            outcome.append(None)
        except CancelledError as error:
            outcome.append(error)

    waiter = threading.Thread(target=wait)
    waiter.start()
    lane.close()
    waiter.join(10)
    assert isinstance(outcome[0], CancelledError)
    assert all(job.done() for job in jobs)
    with pytest.raises(CancelledError, match="closed"):
        lane.submit(0, expert_batch, x, out, None)
    lane.close()


@pytest.mark.parametrize("make", LANES)
def test_a_wait_may_end_before_the_job(make):
    layer, expert_batch, x, out = large_case()
    lane = make([layer], 1)
    try:
        jobs = [lane.submit(0, expert_batch, x, out, None) for _ in range(4)]
        with pytest.raises(TimeoutError):
            jobs[-1].wait(0.0)
        jobs[-1].cancel()
    finally:
        lane.close()


@needs_compiler
def test_threads_end_with_the_lane():
    def become(number: int) -> bool:
        """Threads that were joined are in the kernel's list for a moment more."""
        for _ in range(500):
            names = [task.joinpath("comm").read_text() for task in Path("/proc/self/task").iterdir()]
            if names.count("prescope-cpu\n") == number:
                return True
            time.sleep(0.01)
        return False

    lane = NativeLane([make_layer(torch.bfloat16)], 4)
    assert become(4)
    lane.close()
    assert become(0)
    lane = NativeLane([make_layer(torch.bfloat16)], 4)
    del lane
    gc.collect()
    assert become(0), "a lane that was dropped leaves threads behind"


def states_of_lane() -> str:
    """R for each thread of a lane that runs or would, S for each that sleeps."""
    stats = [task.joinpath("stat").read_text() for task in Path("/proc/self/task").iterdir()]
    return "".join(stat.rpartition(") ")[2][0] for stat in stats if "(prescope-cpu)" in stat)


@needs_compiler
def test_threads_stay_awake_only_as_long_as_they_are_told(monkeypatch):
    layer, expert_batch, x, out = small_case()

    def becomes(states: str) -> bool:
        return any(states_of_lane() == states or time.sleep(0.01) for _ in range(500))

    with CpuExperts([layer], threads=2, implementation="native") as lane:
        assert becomes("SS")
        monkeypatch.setattr("prescope.kernels.cpu.lane.may_stay_awake", lambda threads: True)
        with pytest.raises(KeyError), lane.awake():
            for _ in range(3):
                assert becomes("RR")
                time.sleep(0.05)  # longer than they stay awake of their own accord
                assert states_of_lane() == "RR"
                lane.submit(0, expert_batch, x, out).wait(60)
            raise KeyError
        assert becomes("SS")
        with lane.awake():
            lane.close()  # as a setting changed in the middle of a recording does
    with CpuExperts([layer], threads=1000, implementation="torch") as lane, lane.awake():
        pass
    assert may_stay_awake(0) is (physical_cores() >= 2) and not may_stay_awake(physical_cores())


@needs_compiler
def test_a_job_begins_when_it_is_submitted():
    """Not when a thread has woken up for it: that is what it costs."""
    layer, expert_batch, x, out = small_case()
    lane = NativeLane([layer], 1, spin_us=0)
    try:
        for _ in range(20):
            time.sleep(0.002)
            before = time.perf_counter_ns()
            job = lane.submit(0, expert_batch, x, out, None)
            after = time.perf_counter_ns()
            job.wait(60)
            assert before <= job.span_ns()[0] <= after
    finally:
        lane.close()


@needs_compiler
def test_a_process_with_a_busy_lane_ends_and_a_forked_child_too():
    code = (
        "import os, sys; sys.path.insert(0, '.')\n"
        "from tests.kernels.test_cpu import *\n"
        "layer, batch, x, out = large_case()\n"
        "lane = CpuExperts([layer], threads=2, implementation='native')\n"
        "jobs = [lane.submit(0, batch, x, out) for _ in range(20)]\n"
        "import warnings; warnings.simplefilter('ignore')\n"
        "pid = os.fork()\n"
        "if pid == 0:\n    lane.close(); sys.exit(0)\n"
        "print('child', os.waitpid(pid, 0)[1])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.split() == ["child", "0"], done.stderr


def test_torchs_own_threads_stay_as_they_were():
    """In the caller, and in threads that come later: they get the number that was set last."""

    def elsewhere() -> int:
        found: list[int] = []
        thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        return found[0]

    own = torch.get_num_threads()
    counted: list[int] = []

    def counting(h):
        counted.append(torch.get_num_threads())
        return silu_gate(h)

    layer, expert_batch, x, out = small_case()
    layer = layer._replace(spec=replace(layer.spec, gate=counting))
    try:
        torch.set_num_threads(3)
        lane = TorchLane([layer], 2)
        lane.submit(0, expert_batch, x, out, None).wait(10)
        assert set(counted) == {2}
        assert torch.get_num_threads() == 3
        assert elsewhere() == 3
        lane.close()
    finally:
        torch.set_num_threads(own)


# -- what is not taken on trust --------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", [pytest.param("native", marks=needs_compiler), "torch"])
@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"x": torch.zeros(4, 64)}, "x_TD is torch.float32"),
        ({"x": torch.zeros(4, 63).bfloat16()}, "x_TD is \\(4, 63\\)"),
        ({"out": torch.zeros(64, 8).bfloat16().t()}, "out is"),
        ({"out": torch.zeros(7, 64).bfloat16()}, "places must be from 0 to 6"),
        ({"experts": np.array([0, 1, 2, 3, 5])}, "experts must be from 0 to 4"),
        ({"tokens": np.full(8, 4)}, "tokens must be"),
        ({"first": np.array([0, 1, 2, 3, 4, 9])}, "first is"),
        ({"first": np.array([0, 3, 2, 3, 4, 8])}, "first is"),
        ({"places": np.arange(7)}, "8 tokens have 7 places"),
        ({"places": np.full(8, -1)}, "places must be from 0 to 7"),
        ({"first": np.array([0, 8])}, "5 experts have 2 bounds"),
        ({"tokens": np.zeros(8, dtype=np.int32)}, "int64"),
        ({"flag": Flag(torch.zeros(1), 1)}, "a flag is one int32"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(implementation, change, why):
    layer = make_layer(torch.bfloat16)
    expert_batch = expert_batch_of(np.array([[0, 1], [2, 3], [4, 0], [1, 2]]), range(5))
    x, out = torch.zeros(4, 64).bfloat16(), torch.zeros(8, 64).bfloat16()
    given = {"x": x, "out": out, "flag": None, **expert_batch._asdict(), **change}
    changed = ExpertBatch(*(given[name] for name in ExpertBatch._fields))
    with (
        CpuExperts([layer], threads=1, implementation=implementation) as lane,
        pytest.raises(ValueError, match=why),
    ):
        lane.submit(0, changed, given["x"], given["out"], given["flag"])
