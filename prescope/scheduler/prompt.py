"""What a prompt's layer has copied: the experts of most tokens. The CPU computes the rare ones beside the link.

A short prompt needs nearly all experts of a layer, most of them for a few tokens each, and the CPU reads an expert
sooner than the link does: of 64 tokens the first token came after 145 ms instead of 216 (Qwen3-30B-A3B's shape, 16
layers, half of the experts in slots, H200). In a long one each has so many tokens that the CPU is no help.
"""

import numpy as np

from ..cache.residency import LayerNeed
from ..core.types import FloatArray, IntArray
from .plan import PRESCHED
from .types import Costs, ScheduleSettings


def copies_of_prompt(settings: ScheduleSettings, costs: Costs, need: LayerNeed, num_free: int) -> int:
    """How many of a layer's misses (the first, with most tokens) are copied, so that link and CPU are done soonest.

    Late ones come first on the link, and are waited for. As in `presched.split`, the CPU is slower beside a busy link.
    Experts of more tokens than its time is known for are copied: their inputs and outputs take long to move, too (8 x
    1024 tokens came after 1.5 s instead of 0.4). The other schedules copy all: that is how they are known.

    Args:
        num_free: free slots that are this layer's share: so many are copied at least, for the steps that follow.
            Without them a run of 190 tokens from cold slots was 3.5 % slower (simulated, medium model, 75 % of the
            slots).
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
    least = max(min(num_free, need.num_misses), int((tokens >= len(costs.cpu_us)).sum()))
    return least + int(np.argmin(np.maximum(link_us, cpu_us)[least:]))


def _rest(cpu_us: FloatArray, tokens: IntArray) -> FloatArray:
    """(n + 1,) what the CPU takes for the experts behind the first k, by `types.cpu_time`."""
    low = np.minimum(tokens, len(cpu_us) - 2)
    each = cpu_us[low] + (tokens - low) * (cpu_us[low + 1] - cpu_us[low])
    return np.append(np.cumsum(each[::-1])[::-1], 0.0)
