"""Which weights of a checkpoint an experts' parameter is made of."""

from collections.abc import Iterable, Mapping
from itertools import chain
from typing import NamedTuple

from ...errors import BadModelFolder, UnsupportedExperts
from .checkpoint import Checkpoint
from .places import STACKED, STACKED_PAIRS, WeightPlace, in_order
from .published import FLOATS


class Origin(NamedTuple):
    """Where one of a layer's parameters comes from.

    Attributes:
        parts: what is put one behind the other, each the names of E weights, or of one that has all experts.
        is_stacked: whether they are weights of single experts.
        is_ours: see `WeightPlace`.
    """

    parts: tuple[tuple[str, ...], ...]
    is_stacked: bool
    is_ours: bool = False

    @classmethod
    def of(cls, target: str, weights: Mapping[str, WeightPlace], num_experts: int) -> "Origin":
        """Of the weights that belong to a parameter, with the place of each.

        Raises:
            UnsupportedExperts: it is made of them in a way that packed weights cannot go through.
            BadModelFolder: some are missing.
        """
        steps = {place.steps for place in weights.values()}
        if steps == {()} and len(weights) == 1:
            return cls((tuple(weights),), False)
        cls.require_stacked(target, weights.values())
        if len(steps) != 1 or steps == {()}:
            raise UnsupportedExperts(
                f"{target} is made by several weights, which packed weights cannot go through"
            )
        num_parts = 1 + max(place.part for place in weights.values())
        parts = tuple(
            tuple(in_order(name for name, place in weights.items() if place.part == part))
            for part in range(num_parts)
        )
        if any(len(part) != num_experts for part in parts):
            found = ", ".join(str(len(part)) for part in parts)
            raise BadModelFolder(
                f"{target} needs the weights of {num_experts} experts, the files have {found}; fetch them again"
            )
        return cls(parts, True, any(place.is_ours for place in weights.values()))

    @staticmethod
    def require_stacked(target: str, places: Iterable[WeightPlace]) -> None:
        """Raise UnsupportedExperts if weights are put together by another way than one behind the other."""
        for place in places:
            if place.steps not in ((), STACKED, STACKED_PAIRS):
                names = ", ".join(name for name, _ in place.steps)
                raise UnsupportedExperts(
                    f"{target} is made by {names}, which packed weights cannot go through"
                )

    def require_shapes(
        self, checkpoint: Checkpoint, wanted: tuple[int, ...], where: str, is_turned: bool = False
    ) -> None:
        """Raise BadModelFolder if a weight is no float, or not as wide as the configuration says.

        Args:
            wanted: of the parameter, (E, N, K) or (E, N).
            is_turned: it has the inputs first, where weights of single experts have them last.
        """
        each = wanted
        if self.is_stacked:
            rows = wanted[1:][::-1] if is_turned else wanted[1:]
            each = (rows[0] // len(self.parts), *rows[1:])
        for name in chain(*self.parts):
            found = checkpoint.entries[name]
            if found.shape != each or found.dtype not in FLOATS:
                raise BadModelFolder(
                    f"{where} is made of {name}, which is {found.dtype} of shape {found.shape} in the files and by the "
                    f"config {each}; fetch it again"
                )
