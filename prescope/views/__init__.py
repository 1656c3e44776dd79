"""One figure a file: `x_info(run)` computes, `plot_x(info)` draws, `x(run)` joins them.

The info is a NamedTuple of plain numbers, so tests compare it by `==` and never look at pixels.
"""

from .hit_rate import hit_rate
from .latency import latency
from .layers import layers
from .load import load
from .slots_curve import slots_curve
from .timeline import timeline, timeline_info

__all__ = ["hit_rate", "latency", "layers", "load", "slots_curve", "timeline", "timeline_info"]
