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
#: What tools call a linear of one expert -> which of the experts' parameters it is a part of, and which part.
LINEARS = {
    "gate_proj": (("gate_up_proj", 0),), "w1": (("gate_up_proj", 0),),
    "up_proj": (("gate_up_proj", 1), ("up_proj", 0)), "w3": (("gate_up_proj", 1),),
    "down_proj": (("down_proj", 0),), "w2": (("down_proj", 0),),
}  # fmt: skip
_LINEAR = re.compile(rf"(.+)\.\d+\.({'|'.join(LINEARS)})\.(weight|bias)")


class WeightPlace(NamedTuple):
    """What becomes of a weight of a checkpoint.

    Attributes:
        target: name of the model's parameter.
        part: which of several that are put one behind the other in it: 0 gate, 1 up.
        steps: how the parameter is made of such weights; none where it is the weight itself.
        is_ours: by no rule of transformers, see `Places.of`: gate and up then lie one behind the other whatever the
            family does, and its plain weights have to be put together here.
    """

    target: str
    part: int
    steps: tuple[tuple[str, int | None], ...]  # kind and dimension
    is_ours: bool = False


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

    def of(self, weight: str) -> WeightPlace:
        """The place of a weight by its name in the checkpoint; its own name where no rule holds.

        Families that publish all experts of a layer in one tensor (Qwen3-VL, Gemma 4, gpt-oss, ...) have no rule for
        single ones. Tools that pack linears take such a tensor apart, and call its parts as other families do.
        """
        if weight in self._known:
            return WeightPlace(weight, 0, ())
        target, pattern = self._renamed(weight)
        if pattern is None:
            is_known = target in self._known
            return (None if is_known else self._of_one_expert(weight)) or WeightPlace(target, 0, ())
        rule = self._by_pattern[pattern]
        steps = tuple((type(step).__name__, getattr(step, "dim", None)) for step in rule.operations)
        return WeightPlace(target, rule.source_patterns.index(pattern), steps)

    def _of_one_expert(self, weight: str) -> WeightPlace | None:
        """The place of a linear of one expert in the tensor of all of them, if the model has that; else None."""
        if (found := _LINEAR.fullmatch(weight)) is None:
            return None
        experts, linear, kind = found.groups()
        for parameter, part in LINEARS[linear]:
            whole = f"{experts}.{parameter}{'' if kind == 'weight' else '_bias'}"
            target, _ = self._renamed(whole)
            if target in self._known:
                steps = STACKED_PAIRS if parameter == "gate_up_proj" else STACKED
                return WeightPlace(target, part, steps, is_ours=True)
        return None

    def _renamed(self, weight: str) -> tuple[str, str | None]:
        """A name in the model, and the pattern of the rule that makes something else of the weight."""
        return rename_source_key(weight, self._renamings, self._converters, self._prefix, self._known)


def in_order(names: Iterable[str]) -> list[str]:
    """Names as people count: expert 2 before expert 10."""
    return sorted(names, key=lambda name: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", name)])
