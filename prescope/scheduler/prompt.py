"""What a prompt's layer has copied: the experts of most tokens. The CPU computes the rare ones beside the link.

A short prompt needs nearly all experts of a layer, most of them for a few tokens each: 63 copies of 9.4 MB took 11 ms a
layer where the CPU reads an expert sooner than the link does (Qwen3-30B-A3B's shape, half in slots, H200). A long one
has so many tokens for each that the CPU is no help, and all are copied.
"""

import numpy as np

from ..cache.residency import LayerNeed
from ..core.types import FloatArray, IntArray
from .plan import PRESCHED
from .types import Costs, ScheduleSettings


def copies_of_prompt(settings: ScheduleSettings, costs: Costs, need: LayerNeed) -> int:
    """How many of a layer's misses (the first, with most tokens) are copied, so that link and CPU are done soonest.

    Late ones come first on the link, and are waited for. As in `presched.split`, the CPU is slower beside a busy link.
    The other schedules copy all: that is how they are known.
    """
    if settings.schedule != PRESCHED or len(costs.cpu_us) <= 1:
        return need.num_misses
    tokens = need.tokens[need.num_hits + need.num_late :]
    copied = np.arange(len(tokens) + 1)
    is_beside = copied < len(tokens)
    link_us = need.num_late * costs.link_us + copied * np.where(is_beside, costs.link_busy_us, costs.link_us)
    base_us = costs.cpu_base_us * is_beside
    beside_us = _rest(costs.cpu_us, tokens) + base_us
    alone_us = np.minimum(_rest(costs.cpu_alone_us, tokens) + base_us, beside_us)
    share = np.divide(alone_us, beside_us, out=np.ones(len(copied)), where=beside_us > 0)
    cpu_us = np.where(beside_us <= link_us, beside_us, link_us + share * (beside_us - link_us))
    return int(np.argmin(np.maximum(link_us, cpu_us)))


def _rest(cpu_us: FloatArray, tokens: IntArray) -> FloatArray:
    """(n + 1,) what the CPU takes for the experts behind the first k, by `types.cpu_time`."""
    low = np.minimum(tokens, len(cpu_us) - 2)
    each = cpu_us[low] + (tokens - low) * (cpu_us[low + 1] - cpu_us[low])
    return np.append(np.cumsum(each[::-1])[::-1], 0.0)
