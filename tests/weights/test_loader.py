"""Laws of AsyncIO: demand before prefetch, few bytes ahead, each expert copied once, nothing left of dropped ones."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prescope.cache.policies import LRU
from prescope.cache.prefetch import most_on_wire
from prescope.cache.residency import NOTHING, ResidencyTable
from prescope.core.types import MoEShape, Reason
from prescope.device import CudaDevice, EmulatedLinkDevice, NullDevice
from prescope.errors import TransferFailed
from prescope.weights.host_pool import HostLayer, HostPool
from prescope.weights.layout import Run, adjacent_runs, row_layout
from prescope.weights.loader import Loader

LAYERS, EXPERTS, ROW_BYTES = 3, 8, 1024
SHAPE = MoEShape(num_layers=LAYERS, num_experts=EXPERTS, top_k=2, row_bytes=ROW_BYTES)
LINK_GB_PER_S = 0.001  # 1024 bytes take 1024 us
ROW_US = ROW_BYTES / (LINK_GB_PER_S * 1e3)


class Bench:
    """A loader with its table and rows, on a device of choice."""

    def __init__(self, device, num_slots: int = 12, most_on_wire: int = 2) -> None:
        self.device = device
        self.copied: list[tuple[int, int, Reason]] = []
        layers = []
        for seed in range(LAYERS):
            generator = torch.Generator().manual_seed(seed)
            weights = {
                "w": torch.randint(0, 255, (EXPERTS, ROW_BYTES), dtype=torch.uint8, generator=generator)
            }
            layers.append(HostLayer(row_layout(weights), EXPERTS, device))
            layers[-1].fill(weights)
        self.host = HostPool(layers)
        self.table = ResidencyTable(SHAPE, num_slots, LRU(SHAPE))
        self.loader = Loader(device, self.host, self.table, ROW_BYTES)
        self.loader.most_on_wire = most_on_wire

    def note(self, transfers):
        self.copied += [(t.moe_layer, t.expert, t.reason) for t in transfers]
        return transfers

    def prefetch(self, layer: int, experts: list[int]):
        keys = list(dict.fromkeys([*self.loader.held, *(layer * EXPERTS + expert for expert in experts)]))
        return self.note(
            self.loader.hold(np.asarray(keys, dtype=np.int64), NOTHING, Reason.PREFETCH, timed=True)
        )

    def pump(self):
        return self.note(self.loader.pump(timed=True))

    def demand(self, layer: int, experts: list[int]):
        """What the engine does with one layer: copy what is missing, wait, use, release."""
        wanted = np.asarray(experts)
        missing = wanted[self.table.slots_for(layer, wanted) < 0]
        self.table.protect(self.table.slots_for(layer, wanted[self.table.slots_for(layer, wanted) >= 0]))
        transfers = []
        if len(missing):
            slots = self.table.take(layer, missing)
            transfers = self.note(self.loader.load(layer, missing, slots, Reason.ON_DEMAND, timed=True))
        slots = self.table.slots_for(layer, wanted)
        self.loader.wait(slots)
        for slot, expert in zip(slots.tolist(), experts, strict=True):
            row = self.host.row(layer, expert)
            assert torch.equal(self.loader.pool[slot], row), "bytes in the slot differ from the host row's"
        self.loader.release(slots, self.device.mark(True))
        self.table.unprotect()
        return transfers

    def check(self) -> None:
        self.table.check_integrity()
        self.device.synchronize()
        for slot, key in enumerate(self.table.key_of.tolist()):
            if key >= 0:
                assert torch.equal(self.loader.pool[slot], self.host.row(*divmod(key, EXPERTS)))


@pytest.fixture(params=["null", "emulated"])
def device(request):
    opened = (
        NullDevice(LINK_GB_PER_S, seed=1) if request.param == "null" else EmulatedLinkDevice(LINK_GB_PER_S)
    )
    yield opened
    opened.close()


def test_demand_overtakes_prefetches_that_are_held(device):
    """Ten prefetches asked for first, yet the miss is the third copy on the link."""
    bench = Bench(device)
    bench.prefetch(1, [0, 1, 2, 3, 4])
    bench.prefetch(2, [0, 1, 2, 3, 4])
    bench.demand(0, [7])
    bench.pump()
    assert [entry[:2] for entry in bench.copied[:3]] == [(1, 0), (1, 1), (0, 7)]
    assert bench.loader.num_held > 0
    bench.check()


@pytest.mark.parametrize("most", [1, 2, 3])
@pytest.mark.parametrize("seed", range(5))
def test_no_more_prefetches_than_stated_are_ahead_of_a_demand(most, seed):
    """By the virtual clock: a miss ends within the copies allowed ahead of it and its own."""
    bench = Bench(NullDevice(LINK_GB_PER_S, seed=seed), most_on_wire=most)
    rng = np.random.default_rng(seed)
    for step in range(20):
        bench.prefetch((step + 1) % LAYERS, rng.permutation(EXPERTS)[:4].tolist())
        before_us = bench.device.now_us
        missing = [e for e in range(EXPERTS) if bench.table.slot_of[step % LAYERS * EXPERTS + e] < 0]
        for transfer in bench.demand(step % LAYERS, missing[:1]):
            waited_rows = (transfer.end.time_us - before_us) / ROW_US
            assert waited_rows <= most + 1 + 1e-6
        bench.pump()
    bench.check()


def test_one_of_a_kind_goes_after_the_other(device):
    """With one on the link at most the next goes when that one is there."""
    bench = Bench(device, most_on_wire=1)
    bench.prefetch(0, [3, 4])
    assert bench.copied == [(0, 3, Reason.PREFETCH)]
    device.synchronize()
    bench.pump()
    assert bench.copied[1:] == [(0, 4, Reason.PREFETCH)]


@pytest.mark.parametrize(
    ("row_bytes", "num_slots", "most"),
    [
        (352 << 20, 64, 1),
        (9 << 20, 512, 2),
        (1 << 20, 512, 4),
        (64 << 10, 512, 64),
        (64 << 10, 40, 10),
        (1, 2, 1),
    ],
)
def test_the_link_has_work_while_slots_are_left_to_demand(row_bytes, num_slots, most):
    assert most_on_wire(row_bytes, num_slots) == most
    assert most_on_wire(row_bytes, num_slots, least_bytes=0) == min(2, most)


def test_a_needed_prefetch_is_copied_once_and_at_once(device):
    """Held: it becomes an on-demand copy. On the wire: it is waited for, not copied again."""
    bench = Bench(device)
    bench.prefetch(1, [0, 1, 2, 3])
    bench.demand(1, [3, 0])
    assert bench.copied == [
        (1, 0, Reason.PREFETCH),
        (1, 1, Reason.PREFETCH),
        (1, 3, Reason.ON_DEMAND),
    ]
    device.synchronize()
    bench.pump()
    assert bench.copied[3:] == [(1, 2, Reason.PREFETCH)]
    bench.check()


def test_cancel_leaves_no_slot_owned(device):
    bench = Bench(device)
    bench.prefetch(1, [0, 1, 2, 3])
    bench.prefetch(2, [5])
    assert (bench.table.key_of >= 0).sum() == 2, "only what is on the wire has a slot"
    assert bench.loader.held.tolist() == [EXPERTS + 2, EXPERTS + 3, 2 * EXPERTS + 5]
    bench.loader.cancel()
    device.synchronize()
    assert bench.pump() == []
    assert sorted(bench.table.key_of[bench.table.key_of >= 0].tolist()) == [EXPERTS, EXPERTS + 1]
    bench.check()


def test_prefetching_what_is_here_on_its_way_or_asked_for_copies_nothing(device):
    bench = Bench(device)
    bench.demand(0, [1])
    bench.prefetch(0, [1])
    bench.prefetch(1, [0, 1, 2])
    bench.prefetch(1, [0, 1, 2])
    device.synchronize()
    bench.pump()
    assert len(bench.copied) == len({entry[:2] for entry in bench.copied}) == 4


def test_a_prefetch_takes_no_protected_slot(device):
    bench = Bench(device, num_slots=3)
    bench.demand(0, [0, 1, 2])
    bench.table.protect(np.arange(3))
    bench.prefetch(1, [0])
    assert bench.loader.num_held == 1
    assert len(bench.copied) == 3
    bench.table.unprotect()
    bench.pump()
    assert bench.copied[-1] == (1, 0, Reason.PREFETCH)
    bench.check()


def test_clear_forgets_held_prefetches(device):
    bench = Bench(device)
    bench.prefetch(1, [0, 1, 2, 3])
    device.synchronize()
    bench.table.clear()
    bench.loader.clear()
    assert bench.loader.num_held == 0
    assert bench.pump() == []


@pytest.mark.parametrize("touch", ["pump", "poll", "wait", "demand"])
def test_a_failed_copy_surfaces_at_the_next_touch(touch):
    """A prefetch that failed silently would be served as garbage later."""
    device = EmulatedLinkDevice(50.0)
    bench = Bench(device)
    bench.host.layers[1]._views = [torch.zeros(3, dtype=torch.uint8)] * EXPERTS  # does not fit its slot
    bench.prefetch(1, [0, 2, 4, 6])
    bench.loader._ready[bench.table.slots_for(1, np.asarray([0]))[0]].wait(10.0)
    with pytest.raises(TransferFailed):
        if touch == "wait":
            bench.loader.wait(bench.table.slots_for(1, np.asarray([0])))
        elif touch == "demand":
            bench.demand(0, [0])
        elif touch == "poll":
            bench.loader.poll()
        else:
            bench.pump()
    device.recover()
    bench.table.clear()
    bench.loader.clear()
    bench.demand(0, [0])
    bench.check()
    device.close()


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    num_slots=st.integers(8, LAYERS * EXPERTS),
    most=st.integers(1, 6),
)
def test_any_mix_of_prefetch_cancel_and_demand_serves_the_right_bytes(seed, num_slots, most):
    """On the device that lands copies in any order; reads before a wait would find poison."""
    rng = np.random.default_rng(seed)
    bench = Bench(NullDevice(LINK_GB_PER_S, seed=seed), num_slots, most)
    for _ in range(25):
        layer = int(rng.integers(LAYERS))
        bench.prefetch(int(rng.integers(LAYERS)), rng.permutation(EXPERTS)[: rng.integers(0, 5)].tolist())
        if rng.random() < 0.3:
            bench.loader.cancel()
        on_wire = int(bench.table.in_flight.sum())
        room = min(EXPERTS, max(1, num_slots - on_wire))
        wanted = rng.permutation(EXPERTS)[: rng.integers(1, room + 1)].tolist()
        bench.demand(layer, wanted[: max(1, num_slots - on_wire - 1)])
        bench.loader.poll()
        bench.pump()
        bench.table.check_integrity()
    bench.check()


@given(
    pairs=st.lists(
        st.tuples(st.integers(0, 30), st.integers(0, 30)), unique_by=(lambda p: p[0], lambda p: p[1])
    ),
    most=st.integers(1, 5),
)
def test_runs_cover_each_pair_once_and_stay_adjacent(pairs, most):
    runs = adjacent_runs([e for e, _ in pairs], [s for _, s in pairs], most)
    covered = [(run.expert + i, run.slot + i) for run in runs for i in range(run.num)]
    assert sorted(covered) == sorted(pairs)
    assert all(1 <= run.num <= most for run in runs)
    if most == 1:
        assert covered == pairs, "the order is the caller's"


def test_small_neighbours_travel_in_one_copy(device):
    """Rows of 1 KiB into an empty pool: one copy, whose time and bytes the transfers add up to."""
    device.small_copies_are_slow = True  # as on a GPU: else there is no need
    bench = Bench(device, num_slots=LAYERS * EXPERTS, most_on_wire=100)
    transfers = bench.prefetch(1, [2, 3, 4])
    assert [t.expert for t in transfers] == [2, 3, 4]
    assert len({id(t.end) for t in transfers}) == 1
    device.synchronize()
    times_us = [device.elapsed_us(t.start, t.end) for t in transfers]
    assert times_us[1:] == [0.0, 0.0]
    assert times_us[0] >= 3 * ROW_US * 0.99
    assert sum(t.nbytes for t in transfers) == 3 * ROW_BYTES
    bench.check()


def test_where_small_copies_have_the_full_rate_each_lands_by_itself():
    """Joined prefetches would land together, the first of them later than need be."""
    bench = Bench(NullDevice(LINK_GB_PER_S), num_slots=LAYERS * EXPERTS, most_on_wire=100)
    assert len({id(transfer.end) for transfer in bench.prefetch(1, [2, 3, 4])}) == 3


def test_runs_by_hand():
    assert adjacent_runs([4, 2, 3], [9, 7, 8], 8) == [Run(2, 7, 3)]
    assert adjacent_runs([4, 2, 3], [9, 7, 8], 2) == [Run(2, 7, 2), Run(4, 9, 1)]
    assert adjacent_runs([4, 2, 3], [9, 8, 7], 8) == [Run(2, 8, 1), Run(3, 7, 1), Run(4, 9, 1)]
    assert adjacent_runs([], [], 8) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: runs on a machine that has one")
@pytest.mark.parametrize("timed", [False, True])
@pytest.mark.parametrize("copies", ["torch", "driver"])
def test_both_ways_of_copying_on_cuda_move_the_same_bytes(copies, timed):
    """Through torch and by the driver alone; marks of each copy and one for all; joined and single rows."""
    bench = Bench(CudaDevice(copies=copies), num_slots=LAYERS * EXPERTS)
    for layer, experts in enumerate([[0, 1, 2, 5], [7, 3], [0, 2, 4, 6]]):
        bench.prefetch(layer, [1, 7])
        wanted = np.asarray(experts)
        missing = wanted[bench.table.slots_for(layer, wanted) < 0]
        slots = bench.table.take(layer, missing)
        bench.loader.load(layer, missing, slots, Reason.ON_DEMAND, timed)
        slots = bench.table.slots_for(layer, wanted)
        bench.loader.wait(slots)
        on_stream = bench.loader.pool[slots].cpu()  # on the compute stream, which waits; the host did not
        assert torch.equal(on_stream, bench.host.layers[layer].rows[wanted])
        bench.loader.release(slots, bench.device.mark(timed))
    bench.loader.close()
    bench.host.close()
    bench.device.close()
