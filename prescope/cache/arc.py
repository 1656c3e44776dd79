"""ARC, the adaptive replacement cache, over experts (N. Megiddo, D. S. Modha: ARC, FAST 2003).

Experts in slots stand in one of two lists: T1, used once of late, and T2, used again since. B1 and B2 are the ghosts of
those that gave up their slots. A use of a ghost says that its list should have been longer, and moves the target of T1.
While T1 is longer than its target its oldest gives up the slot, else T2's oldest.

Two things differ from a cache that is asked for one page at a time, and neither changes what such a cache would hold. A
layer asks for several experts at once: those that are there count first. And slots are given up by the residency table,
by score, so the rule is written into scores, and what was given up since is found when the next layer comes. What a
prefetch brought stands in no list until it is used; of such experts the one last used goes first, unless the schedule
keeps them.

Shapes: n experts needed, N = L * E experts of the model. Keys are flat: moe_layer * E + expert.
"""

from typing import Self

import numpy as np

from ..core.jit import jit
from ..core.types import FloatArray, IntArray, MoEShape

#: Numbers in compiled code: over all layers alike, and with the first layers favoured.
ARC_KIND, SHALLOW_ARC_KIND = 7, 8
#: Where an expert stands; the two ghosts last.
NOWHERE, T1, T2, B1, B2 = range(5)
#: Places in the last numbers of the state: how long T1 should be, slots, and uses so far.
TARGET, NUM_SLOTS, USES = range(3)
#: Scores of what goes first, second, ... are this far apart; uses stay below.
STEP = 1e12


@jit
def learn_arc(
    scores: FloatArray, moe_layer: int, num_experts: int, experts: IntArray, slot_of: IntArray, favours: bool
) -> None:
    """Learn one layer's needs: experts (n,), distinct.

    Args:
        scores: (5 * N + 18,), changed: what is evicted by; where each expert stands; its last use; the next older one
            and the next newer one of its list, whose two ends are one more place for each list; how long each list is;
            target, slots and uses. In one array, as `next_use` has it.
        slot_of: (N,) by key, -1 for none; as it was before the layer's copies.
        favours: experts of deeper layers go first, whatever their list.
    """
    N = len(slot_of)
    lengths, state = scores[5 * N + 10 : 5 * N + 15], scores[5 * N + 15 :]
    for which in (T1, T2):
        key = _oldest(scores, N, which)
        while key >= 0:
            newer = _newer(scores, N, key, which)
            if slot_of[key] < 0:
                _move(scores, N, key, which + 2)
            key = newer
    _trim(scores, N)
    is_new, was_frequent = False, False
    for is_there in (True, False):
        for expert in experts:
            key = moe_layer * num_experts + expert
            stood = int(scores[N + key])
            if (stood in (T1, T2) and slot_of[key] >= 0) != is_there:
                continue
            if stood == B1:
                more = max(1.0, lengths[B2] / lengths[B1])
                state[TARGET] = min(state[NUM_SLOTS], state[TARGET] + more)
            elif stood == B2:
                more = max(1.0, lengths[B1] / lengths[B2])
                state[TARGET] = max(0.0, state[TARGET] - more)
                was_frequent = True
            if stood == NOWHERE:
                is_new = True
                _make_room(scores, N)
            _move(scores, N, key, T1 if stood == NOWHERE else T2)
            state[USES] += 1.0
            scores[2 * N + key] = state[USES]
    # The last of T1's new ones comes when the others have made their room.
    beyond = lengths[T1] - (1.0 if is_new else 0.0) - state[TARGET]
    most = 1 if beyond == 0.0 and was_frequent else int(np.ceil(max(0.0, beyond)))
    _rank(scores, N, num_experts, most, favours)


@jit
def _rank(scores: FloatArray, N: int, num_experts: int, most: int, favours: bool) -> None:
    """Write the order of eviction into the scores: `most` of T1, the oldest first, then T2, then the rest of T1."""
    for which in (T1, T2):
        key, seen = _oldest(scores, N, which), 0
        while key >= 0:
            rank = 1.0 if which == T2 else (0.0 if seen < most else 2.0)
            scores[key] = rank * STEP + scores[2 * N + key]
            if favours:
                scores[key] -= 4.0 * STEP * (key // num_experts)
            key, seen = _newer(scores, N, key, which), seen + 1


@jit
def _trim(scores: FloatArray, N: int) -> None:
    """Forget the oldest ghosts: T1 and B1 together are as many as there are slots, all lists twice as many."""
    lengths, slots = scores[5 * N + 10 : 5 * N + 15], scores[5 * N + 15 + NUM_SLOTS]
    while lengths[B1] > 0 and lengths[T1] + lengths[B1] > slots:
        _move(scores, N, _oldest(scores, N, B1), NOWHERE)
    while lengths[B2] > 0 and lengths[1:].sum() > 2.0 * slots:
        _move(scores, N, _oldest(scores, N, B2), NOWHERE)


@jit
def _make_room(scores: FloatArray, N: int) -> None:
    """Forget a ghost for an expert that comes into T1. Where T1 alone fills the slots its oldest leaves no ghost: that
    is found, as one too many, when the next layer comes.
    """
    lengths, slots = scores[5 * N + 10 : 5 * N + 15], scores[5 * N + 15 + NUM_SLOTS]
    if lengths[T1] + lengths[B1] >= slots:
        if lengths[B1] > 0:
            _move(scores, N, _oldest(scores, N, B1), NOWHERE)
    elif lengths[B2] > 0 and lengths[1:].sum() >= 2.0 * slots:
        _move(scores, N, _oldest(scores, N, B2), NOWHERE)


@jit
def _oldest(scores: FloatArray, N: int, which: int) -> int:
    """Of a list, -1 if it is empty."""
    return _newer(scores, N, N + which, which)


@jit
def _newer(scores: FloatArray, N: int, place: int, which: int) -> int:
    """The next newer key of a list, -1 behind the newest."""
    key = int(scores[4 * N + 5 + place])
    return key if key < N else -1


@jit
def _move(scores: FloatArray, N: int, key: int, to: int) -> None:
    """Take a key out of its list, if it stands in one, and put it behind the newest of another, or nowhere."""
    stood, older, newer = scores[N : 2 * N], scores[3 * N : 4 * N + 5], scores[4 * N + 5 : 5 * N + 10]
    lengths = scores[5 * N + 10 : 5 * N + 15]
    if stood[key] != NOWHERE:
        newer[int(older[key])], older[int(newer[key])] = newer[key], older[key]
        lengths[int(stood[key])] -= 1
    stood[key] = to
    if to not in (T1, T2):  # should a prefetch bring it back, it goes before all that stand
        scores[key] = scores[2 * N + key] - 1e6 * STEP
    if to != NOWHERE:
        newest = older[N + to]
        older[key], newer[key] = newest, N + to
        newer[int(newest)] = older[N + to] = key
        lengths[to] += 1


class ARC:
    """Evict by ARC's rule; see the module."""

    name, kind, runs_on_gpu = "arc", ARC_KIND, False
    favours = False

    @classmethod
    def make(cls, shape: MoEShape, frequencies: FloatArray | None) -> Self:
        """It needs no frequencies."""
        return cls(shape)

    def __init__(self, shape: MoEShape) -> None:
        self._shape = shape
        self.scores = np.zeros(5 * shape.total_experts + 18)
        self._slot_of = np.full(shape.total_experts, -1, np.int64)
        self.reset()

    def serves(self, slot_of: IntArray, num_slots: int) -> None:
        """The slots it decides about: its lists are as long as they are many."""
        self._slot_of = slot_of
        self.scores[5 * len(slot_of) + 15 + NUM_SLOTS] = num_slots

    def use(self, moe_layer: int, experts: IntArray, weights: FloatArray) -> None:
        """Learn one layer's needs; it looks at no weights."""
        self.tick += 1
        learn_arc(self.scores, moe_layer, self._shape.num_experts, experts, self._slot_of, self.favours)

    def reset(self) -> None:
        """Forget everything but the number of slots."""
        N = self._shape.total_experts
        num_slots = self.scores[5 * N + 15 + NUM_SLOTS]
        self.scores[:] = 0.0
        self.scores[:N] = -1e6 * STEP
        for which in (T1, T2, B1, B2):
            self.scores[3 * N + N + which] = self.scores[4 * N + 5 + N + which] = N + which
        self.scores[5 * N + 15 + NUM_SLOTS] = num_slots
        self.tick = 0


class ShallowARC(ARC):
    """Evict from the deepest layers first, there by ARC's rule (after Fate's: the first layers' predictions are the
    weakest).
    """

    name, kind, favours = "shallow-arc", SHALLOW_ARC_KIND, True
