"""Where in a model the tensors of a checkpoint belong, by the rules with which transformers itself loads it."""

import re
from collections.abc import Iterable
from typing import NamedTuple

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

#: Steps by which an experts' parameter is made of weights of single experts: stacked; and first gate, then up.
STACKED = (("MergeModulelist", 0),)
STACKED_PAIRS = (*STACKED, ("Concatenate", 1))


class Place(NamedTuple):
    """What becomes of a weight of a checkpoint.

    Attributes:
        target: name of the model's parameter.
        part: which of several that are put one behind the other in it: 0 gate, 1 up.
        steps: how the parameter is made of such weights; none where it is the weight itself.
    """

    target: str
    part: int
    steps: tuple[tuple[str, int | None], ...]  # kind and dimension


class Places:
    """The places in one model.

    Args:
        model: without weights.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        rules = get_model_conversion_mapping(model)
        self._renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        self._by_pattern = {pattern: rule for rule in self._converters for pattern in rule.source_patterns}
        self._prefix, self._known = model.base_model_prefix, model.state_dict()

    def of(self, weight: str) -> Place:
        """The place of a weight by its name in the checkpoint; its own name where no rule holds."""
        if weight in self._known:
            return Place(weight, 0, ())
        target, pattern = rename_source_key(
            weight, self._renamings, self._converters, self._prefix, self._known
        )
        if pattern is None:
            return Place(target, 0, ())
        rule = self._by_pattern[pattern]
        steps = tuple((type(step).__name__, getattr(step, "dim", None)) for step in rule.operations)
        return Place(target, rule.source_patterns.index(pattern), steps)


def in_order(names: Iterable[str]) -> list[str]:
    """Names as people count: expert 2 before expert 10."""
    return sorted(names, key=lambda name: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", name)])
