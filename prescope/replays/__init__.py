"""One recorded trace under any choice of settings: simulated in milliseconds, and as settings for a real run.

The glue between trace, machines, predictors and simulator; knows nothing of figures or widgets.
"""

from .choice import NOISY, NONE, ORACLE, Choice
from .machines import (
    HERE,
    Machine,
    machine_of_profile,
    machine_of_run,
    machine_with_link,
    shipped_machines,
)
from .replays import Replays
from .why import WHERE, Why, why

__all__ = [
    "HERE",
    "NOISY",
    "NONE",
    "ORACLE",
    "WHERE",
    "Choice",
    "Machine",
    "Replays",
    "Why",
    "machine_of_profile",
    "machine_of_run",
    "machine_with_link",
    "shipped_machines",
    "why",
]
