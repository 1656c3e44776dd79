"""Slots that are given up while the GPU runs ahead: hide, look whether the layer has looked, only then overwrite."""

import numpy as np
import pytest

pytest.importorskip("triton", reason="Triton exists for Linux only")

from prescope.cache.prefetch import NUM_WAITING, Waiting, want
from prescope.cache.slots import Slots
from prescope.core.native import address_of, clock_address
from prescope.device import LinkFunctions
from prescope.engine.graph import host_state as at
from prescope.engine.graph.host_link import land, pump
from prescope.engine.graph.host_messages import reply
from prescope.kernels.cpu import LaneFunctions
from prescope.scheduler.plan import FATE
from prescope.scheduler.types import Costs, Memory, ScheduleSettings
from tests.support.interpreted_gpu import _create_event, _memcpy, _query_event, _record_event

L, E, SLOTS, ROW = 3, 4, 6, 16
NUMBER = 5  # of the step under way
#: The expert that is wanted, and the one with the lowest score, which gives up its slot.
WANTED, VICTIM = 2 * E + 3, 1 * E + 2


def numbers(*shape):
    return np.zeros(shape, dtype=np.int64)


class Host:
    """What `serve` keeps, all slots full, one prefetch held."""

    def __init__(self, decided: int, has_looked: list[int]) -> None:
        self.pool = np.zeros((SLOTS, ROW), np.uint8)
        self.rows = [
            np.full((E, ROW), 10 * (layer + 1), np.uint8) + np.arange(E)[:, None] for layer in range(L)
        ]
        self.rows = [rows.astype(np.uint8) for rows in self.rows]
        self.landed = np.zeros(1, np.int32)
        self.key_of = np.array([0, 1, VICTIM, E, 2 * E, 2 * E + 1])
        self.slot_of = np.full(L * E, -1)
        self.slot_of[self.key_of] = np.arange(SLOTS)
        scores = np.where(np.arange(L * E) == VICTIM, 1.0, 2.0)
        flags = np.zeros(SLOTS, np.bool_)
        self.slots = Slots(
            self.slot_of, self.key_of, flags, flags.copy(), flags.copy(), scores, numbers(SLOTS + 1)
        )
        looked = numbers(L)
        looked[has_looked] = NUMBER
        self.addresses = at.Addresses(
            ask=numbers(L, 2), scores=numbers(L, 0), answers=numbers(L, 2 + E), shown=self.slot_of.astype(np.int32),
            looked=looked, served=np.zeros(1, np.int32), numbers=np.zeros(64, np.int32),
            landed=self.landed.ctypes.data, head=2, num_experts_L=np.full(L, E), row_bytes_L=np.full(L, ROW),
            rows_L=np.array([rows.ctypes.data for rows in self.rows]), inputs_L=numbers(L),
            outputs_L=numbers(L), flags_L=numbers(L), cpu_layers_L=numbers(L), top_k=2, width=1,
            pool=self.pool.ctypes.data, slot_bytes=ROW, uses_weights=0, policy=0, most_on_wire=2, on_demand=0,
            prefetch=1, timed=0, ask_shift=48, scores_shift=32,
        )  # fmt: skip
        self.state = at.HostState(
            counts=numbers(at.NUM_COUNTS), times=np.zeros(at.NUM_TIMES), shown_in=self.key_of.copy(),
            loaded=numbers(E), copy_of=numbers(SLOTS), waiting=Waiting.none(L * E), wire_slot=numbers(3),
            wire_event=numbers(3), events=numbers(8), needs=numbers(L, at.NEED_COLUMNS),
            copies=numbers(0, at.COPY_COLUMNS), jobs=numbers(L + 1, at.JOB_COLUMNS),
            expert_batch=numbers(at.BATCH_WORDS), indices=numbers(32), words=numbers(4),
        )  # fmt: skip
        counts = self.state.counts
        counts[at.LAYER], counts[at.NUMBER] = decided, NUMBER
        want(self.state.waiting, np.array([WANTED]), numbers(0))
        addresses = map(address_of, (_memcpy, _create_event, _record_event, _query_event))
        link = LinkFunctions(*addresses, stream=0, repeats=1)
        self.functions = at.Functions(link, LaneFunctions.without().addresses, clock_address())
        costs = Costs(1.0, 1.0, 1.0, 1.0, 0.0, 1.0, 0.0, np.zeros(0), np.zeros(0))
        self.planner = at.PlannerState(
            ScheduleSettings(FATE, 1, E, 0.5), costs, 0.0, np.zeros(0), Memory.fresh(0, L, E)
        )

    def pump(self) -> None:
        assert pump(self.functions, self.addresses, self.state, self.planner, self.slots)

    def land(self) -> None:
        assert land(self.functions, self.addresses, self.state, self.slots)


@pytest.mark.parametrize(
    ("decided", "has_looked"),
    [(1, [0]), (0, []), (2, [0, 1])],
    ids=["not there yet", "a new step", "decided: what it uses would be protected"],
)
def test_an_expert_that_nobody_can_be_using_gives_up_its_slot(decided, has_looked):
    host = Host(decided, has_looked)
    host.pump()
    assert host.slot_of[WANTED] == 2 and host.slot_of[VICTIM] == -1
    assert host.addresses.shown[VICTIM] == -1, "the GPU would read another expert's weights"
    assert host.addresses.shown[WANTED] == -1, "its bytes may not be there yet"
    assert (host.pool[2] == host.rows[2][3]).all()
    host.land()
    assert host.addresses.shown[WANTED] == 2 and not host.slots.in_flight.any()
    assert np.flatnonzero(host.slots.prefetched).tolist() == [2]


@pytest.mark.parametrize("decided", [0, 1], ids=["two layers ahead", "one layer ahead"])
def test_an_expert_whose_layer_has_looked_keeps_its_slot(decided):
    """The GPU found all experts of the layers before, and is ahead of the host."""
    host = Host(decided, has_looked=[0, 1])
    before = host.pool.copy(), host.slot_of.copy(), host.key_of.copy(), host.addresses.shown.copy()
    host.pump()
    for old, new in zip(before, (host.pool, host.slot_of, host.key_of, host.addresses.shown), strict=True):
        assert (old == new).all()
    assert not host.slots.prefetched.any()
    assert host.state.waiting.counts[NUM_WAITING] == 0, (
        "every look for a message would hide and show the expert again"
    )


def test_prefetches_are_handed_over_one_at_a_time():
    """Handing one over takes microseconds, in which the next layer may have asked."""
    host = Host(2, has_looked=[0, 1])
    want(host.state.waiting, np.array([WANTED, WANTED - 1]), numbers(0))
    for on_wire in (1, 2, 2):
        host.pump()
        assert host.state.counts[at.WIRE_COUNT] == on_wire
    assert host.state.waiting.counts[NUM_WAITING] == 0


def test_another_steps_look_keeps_nothing():
    host = Host(0, has_looked=[1])
    host.addresses.looked[1] = NUMBER - 1
    host.pump()
    assert host.slot_of[WANTED] == 2


def test_what_the_cpu_computes_has_no_slot_for_its_layer():
    """Its copy may be on the way: the GPU would read a slot whose bytes are not there."""
    host = Host(1, [0])
    reply(host.addresses, 1, NUMBER, host.slot_of, 7, np.array([2]))
    words = host.addresses.answers[1]
    assert (words >> 32 == NUMBER + 1).all()
    assert words.astype(np.int32).tolist() == [7, 1, 3, -1, -1, -1]
    assert host.slot_of[VICTIM] == 2, "the table still knows"
