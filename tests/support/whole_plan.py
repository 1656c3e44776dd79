"""A layer's plan and its prefetches together, as nothing takes a slot between them."""

from typing import NamedTuple

from prescope.core.types import IntArray
from prescope.scheduler.layer import as_served
from prescope.scheduler.plan import Situation, make_plan, make_prefetches


class WholePlan(NamedTuple):
    """As `Plan` and `Prefetches`."""

    num_wait: int
    num_load: int
    prefetch: IntArray
    keep: IntArray


def whole_plan(now: Situation) -> WholePlan:
    """Decide about one layer."""
    plan = make_plan(now)
    ahead = make_prefetches(now._replace(need=as_served(now.need, plan), num_load=plan.num_load))
    return WholePlan(*plan, *ahead)
