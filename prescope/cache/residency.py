"""Which expert is in which slot, who may be evicted, and in how many rounds a layer is served.

Pure numpy and shared by engine and simulator. Knows nothing of bytes, streams or clocks: it only knows that a slot
holds one expert at most and that a slot in use or in flight is protected.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..core.types import FloatArray, IntArray, MoEShape
from .frequencies import Repeats, behind_prompt, repeats_of, scatter_of
from .policies import CachePolicy, by_frequency
from .prefetch import Waiting, next_prefetch, on_the_way
from .slots import Slots, SortedNeed, sort_need, take_slots, use_prefetched

#: Misses of one layer that are copied before their compute starts. More lets the link run ahead, fewer lets the
#: GPU start earlier; only prefill and large batches miss more than this in one layer.
ROUND_EXPERTS = 16
NOTHING = np.empty(0, dtype=np.int64)


class LayerNeed(NamedTuple):
    """What one layer needs in one step, and where it was found."""

    moe_layer: int
    experts: IntArray  # (n,) distinct experts: hits and late ones first, then misses, each by token count
    tokens: IntArray  # (n,) tokens of each
    num_hits: int
    num_late: int
    num_prefetched: int = 0  # of hits and late ones: brought by a prefetch and not used since

    @classmethod
    def of(cls, moe_layer: int, need: SortedNeed, num_prefetched: int) -> "LayerNeed":
        """What compiled code found."""
        return cls(
            moe_layer, need.experts, need.tokens, int(need.num_hits), int(need.num_late), int(num_prefetched)
        )

    @property
    def num_misses(self) -> int:
        return len(self.experts) - self.num_hits - self.num_late

    def without(self, num: int) -> "LayerNeed":
        """The same without its last `num` misses, which are served elsewhere."""
        end = len(self.experts) - num
        return self._replace(experts=self.experts[:end], tokens=self.tokens[:end])


class ResidencyTable:
    """The (layer, expert) -> slot table with its inverse.

    Args:
        shape: sizes of the model's MoE part.
        num_slots: places for experts.
        policy: chooses who gives up a slot.
    """

    def __init__(self, shape: MoEShape, num_slots: int, policy: CachePolicy) -> None:
        self.shape = shape
        self.num_slots = num_slots
        self.policy = policy
        self.slot_of = np.full(shape.total_experts, -1, dtype=np.int64)
        self.key_of = np.full(num_slots, -1, dtype=np.int64)
        self.in_flight = np.zeros(num_slots, dtype=bool)
        self.prefetched = np.zeros(num_slots, dtype=bool)  # by a prefetch, and not used since
        #: Counts the changes of each layer's row of `slot_of`, so that copies of it know when they are stale.
        self.versions = np.zeros(shape.num_layers, dtype=np.int64)
        self.protected = np.zeros(num_slots, dtype=bool)
        policy.serves(self.slot_of, num_slots)
        #: Keys that belong into slots from the start (`put_back`).
        self.placed = NOTHING
        #: Uses of a recorded run (L, E), if they and those of each prompt say which keys these are.
        self.known_LE: FloatArray | None = None
        #: (L * E,) experts that the model has, of layers with fewer than E.
        self.exists = np.ones(shape.total_experts, dtype=bool)
        self._prompt_LE = np.zeros((shape.num_layers, shape.num_experts))
        self._repeats: list[Repeats] = []  # of its layers
        #: The same arrays, for compiled code; they are changed in place only.
        self.arrays = Slots(
            self.slot_of, self.key_of, self.in_flight, self.prefetched, self.protected, policy.scores,
            np.zeros(num_slots + 1, dtype=np.int64),
        )  # fmt: skip

    def need(
        self, moe_layer: int, experts: IntArray, tokens: IntArray, weights: NDArray[np.float64]
    ) -> LayerNeed:
        """Sort a layer's distinct experts (n,) into hits, late and misses; the policy learns the need."""
        self.policy.use(moe_layer, experts, weights)
        slots = self.slots_for(moe_layer, experts)
        need = sort_need(experts, tokens, slots, self.in_flight)
        return LayerNeed.of(moe_layer, need, use_prefetched(self.prefetched, slots))

    def row(self, moe_layer: int) -> IntArray:
        """A layer's row (E,) of the table: the slot of each expert, -1 for none. A view."""
        first = moe_layer * self.shape.num_experts
        return self.slot_of[first : first + self.shape.num_experts]

    def free_share(self, moe_layer: int) -> int:
        """Free slots for each of the layers from this one on, if all get as many."""
        return int((self.key_of < 0).sum()) // (self.shape.num_layers - moe_layer)

    def keeps(self, moe_layer: int, num_experts: int) -> bool:
        """Whether a layer's experts are all in slots, and stay there: there are slots for all experts of the model."""
        if self.num_slots < self.shape.total_experts:
            return False
        slots = self.row(moe_layer)[:num_experts]
        return bool((slots >= 0).all()) and not self.in_flight[slots].any()

    def slots_for(self, moe_layer: int, experts: IntArray) -> IntArray:
        """Slots (n,) of experts, -1 for those that have none."""
        return self.slot_of[moe_layer * self.shape.num_experts + experts]

    def take(
        self, moe_layer: int, experts: IntArray, keep: IntArray = NOTHING, ahead: bool = False
    ) -> IntArray:
        """Give a slot to each of `experts` (n,), evicting where none is free; they are in flight then.

        Slots protected or in flight are never given up, those of the keys `keep` only when there are no others.
        `ahead`: for a prefetch.
        """
        keys = moe_layer * self.shape.num_experts + experts
        fixed = self.protected | self.in_flight
        free = self.num_slots - int(fixed.sum())
        assert free >= len(keys), (
            f"{len(keys)} slots wanted, {free} of {self.num_slots} free or evictable "
            f"({int(self.protected.sum())} protected, {int(self.in_flight.sum())} in flight)"
        )
        before = self.key_of.copy()
        slots = take_slots(keys, fixed, keep, self.arrays)
        evicted = before[slots]
        self.versions[evicted[evicted >= 0] // self.shape.num_experts] += 1
        self.versions[moe_layer] += 1
        self.in_flight[slots] = True
        self.prefetched[slots] = ahead
        return slots

    def take_prefetch(self, waiting: Waiting, num_on_wire: int, most: int) -> tuple[int, int]:
        """Key and slot of the next prefetch, (-1, -1) for none; see `prefetch.next_prefetch`."""
        key, slot, evicted = next_prefetch(waiting, self.arrays, num_on_wire, most)
        if key >= 0:
            on_the_way(self.arrays, slot)
        for changed in (key, evicted):
            if changed >= 0:
                self.versions[changed // self.shape.num_experts] += 1
        return key, slot

    def begin_prompt(self) -> None:
        """What is needed from now on is a prompt's, until it is put back."""
        self._prompt_LE[:] = 0.0
        self._repeats.clear()

    def saw_prompt(self, moe_layer: int, ids_TK: NDArray[np.integer]) -> None:
        """Keep what a prompt's tokens (T,) chose in a layer, if that says which experts are `placed`."""
        if self.known_LE is not None:
            experts, counts = distinct(ids_TK, self.shape.num_experts)
            self._prompt_LE[moe_layer, experts] += counts
            self._repeats.append(repeats_of(ids_TK, self.shape.num_experts))

    def _choose_placed(self, known_LE: FloatArray) -> None:
        keys = by_frequency(behind_prompt(known_LE, self._prompt_LE, scatter_of(self._repeats)))
        self.placed = keys[self.exists[keys]][-self.num_slots :]

    def put_back(self) -> Iterator[tuple[int, IntArray, IntArray]]:
        """Give a slot to each of the experts that are `placed` and have none: layer, experts (n,), slots (n,).

        They are in flight then, and make room among the others. All that was in flight must have landed.
        """
        if self.known_LE is not None:
            self._choose_placed(self.known_LE)
        keys = self.placed[self.slot_of[self.placed] < 0]
        for layer in np.unique(keys // self.shape.num_experts).tolist():
            first = layer * self.shape.num_experts
            experts = np.sort(keys[(keys >= first) & (keys < first + self.shape.num_experts)]) - first
            yield layer, experts, self.take(layer, experts, self.placed)

    def can_take(self, count: int) -> bool:
        """Whether `count` slots are free or may be evicted now."""
        return count <= self.num_slots - int((self.protected | self.in_flight).sum())

    def landed(self, slots: IntArray) -> None:
        """The copies into `slots` are known to be complete (or ordered before any later use)."""
        self.in_flight[slots] = False

    def protect(self, slots: IntArray) -> None:
        """Forbid evicting `slots` until `unprotect`."""
        self.protected[slots] = True

    def is_protected(self, slots: IntArray) -> NDArray[np.bool_]:
        """Whether each of `slots` (n,) may not be evicted."""
        return self.protected[slots]

    def unprotect(self, slots: IntArray | None = None) -> None:
        """Lift the protection of `slots`, or all protection."""
        self.protected[slice(None) if slots is None else slots] = False

    def adopt(self, slot_of: IntArray, key_of: IntArray, scores: NDArray[np.float64], tick: int) -> None:
        """Take over what a step that ran on the GPU made of the table: (L * E,) slots and scores, (S,) keys."""
        self.slot_of[:], self.key_of[:] = slot_of, key_of
        self.policy.scores[:] = scores
        self.policy.tick = tick
        self.versions += 1
        self.in_flight[:] = self.prefetched[:] = self.protected[:] = False

    def clear(self) -> None:
        """No expert has a slot any more; every slot is free."""
        self.slot_of[:] = -1
        self.versions += 1
        self.key_of[:] = -1
        self.in_flight[:] = self.prefetched[:] = self.protected[:] = False
        self.begin_prompt()

    def rounds(self, need: LayerNeed) -> list[IntArray]:
        """Experts of each round. One round when all fit; otherwise what is here first, then misses in chunks.

        Two consecutive chunks fit into the pool together, so that one is copied while the other is computed.
        """
        num_found = need.num_hits + need.num_late
        # Prefetches for other layers that are still on the wire cannot be evicted.
        capacity = self.num_slots - (int(self.in_flight.sum()) - need.num_late)
        assert capacity >= 1, f"all {self.num_slots} slots are in flight for other layers"
        chunk = max(1, min(ROUND_EXPERTS, capacity // 2))
        if need.num_misses <= ROUND_EXPERTS and len(need.experts) <= capacity:
            return [need.experts]
        found, misses = need.experts[:num_found], need.experts[num_found:]
        chunks = [misses[i : i + chunk] for i in range(0, len(misses), chunk)]
        return [found, *chunks] if len(found) else chunks

    def check_integrity(self) -> None:
        """Every slot is free or owned once, and both directions of the table agree."""
        owned = np.flatnonzero(self.key_of >= 0)
        keys = self.key_of[owned]
        assert len(np.unique(keys)) == len(keys), f"an expert owns two slots: {keys.tolist()}"
        assert (self.slot_of[keys] == owned).all(), "the table and the slots disagree"
        assert int((self.slot_of >= 0).sum()) == len(owned), "an expert points to a slot it does not own"
        assert not self.in_flight[self.key_of < 0].any(), "a free slot is in flight"


def distinct(expert_ids: NDArray[np.integer], num_experts: int) -> tuple[IntArray, IntArray]:
    """Distinct experts (n,) of an id array of any shape and the uses of each (n,); ids outside [0, E) are none."""
    flat = expert_ids.ravel()
    if flat.size and (flat.min() < 0 or flat.max() >= num_experts):
        flat = flat[(flat >= 0) & (flat < num_experts)]
    counts = np.bincount(flat, minlength=num_experts)
    experts = counts.nonzero()[0]
    return experts, counts[experts]
