"""One figure a file: `x_info(run)` computes, `plot_x(info)` draws, `x(run)` joins them.

The info is a NamedTuple of plain numbers, so tests compare it by `==` and never look at pixels.
"""

from .hit_rate import hit_rate
from .latency import latency
from .layer_groups import layer_groups
from .layers import layers
from .load import load
from .savings import savings
from .score_map import domain_map, score_map
from .slots_curve import slots_curve
from .text_shift import text_shift
from .timeline import timeline, timeline_info

__all__ = [
    "domain_map",
    "hit_rate",
    "latency",
    "layer_groups",
    "layers",
    "load",
    "savings",
    "score_map",
    "slots_curve",
    "text_shift",
    "timeline",
    "timeline_info",
]
