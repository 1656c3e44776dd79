"""One figure a file: `x_info(run)` computes, `plot_x(info)` draws, `x(run)` joins them.

The info is a NamedTuple of plain numbers, so tests compare it by `==` and never look at pixels.
"""

from ..core.extras import missing_extra

try:
    import plotly  # noqa: F401 - asked for here, so that its absence is said once for all figures
except ImportError as error:
    raise missing_extra("prescope.views", "lab", error) from error

from .capacity import capacity
from .cases import cases, steps_ms, told_of_all
from .forms import show_in_both_forms
from .gpu_idle import gpu_idle
from .hit_rate import hit_rate
from .lanes import lanes, lanes_info
from .latency import latency
from .layer_groups import layer_groups
from .layers import layers
from .link_time import link_time
from .link_use import link_use
from .load import load
from .outcomes import outcomes
from .recall_by_layer import recall_by_layer
from .recall_by_shape import recall_by_shape
from .recall_value import recall_value
from .savings import savings
from .schedule_pair import schedule_pair
from .score_map import domain_map, score_map
from .slots_curve import slots_curve
from .step_times import step_times
from .sweep_front import sweep_front
from .sweep_heat import sweep_heat
from .sweep_history import sweep_history
from .sweep_importances import sweep_importances
from .sweep_parallel import sweep_parallel
from .text_shift import text_shift
from .threshold import threshold
from .waiting import waiting

show_in_both_forms()

#: The lanes by the name that notebooks know them by.
timeline = lanes

__all__ = [
    "capacity",
    "cases",
    "domain_map",
    "gpu_idle",
    "hit_rate",
    "lanes",
    "lanes_info",
    "latency",
    "layer_groups",
    "layers",
    "link_time",
    "link_use",
    "load",
    "outcomes",
    "recall_by_layer",
    "recall_by_shape",
    "recall_value",
    "savings",
    "schedule_pair",
    "score_map",
    "slots_curve",
    "step_times",
    "steps_ms",
    "sweep_front",
    "sweep_heat",
    "sweep_history",
    "sweep_importances",
    "sweep_parallel",
    "text_shift",
    "threshold",
    "timeline",
    "told_of_all",
    "waiting",
]
