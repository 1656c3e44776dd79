"""Replays a recorded routing trace on a virtual clock through the engine's own decisions, and writes the same events.

`replay` is the compiled loop over decode steps, `prepare` brings trace and predictions into its form, `prefill` its
slots into the state that a prompt leaves, `tables` its log into events; `simulator` is the door. `scenarios` replays
one recorded run under any settings on any of the `machines`, and `explain` says of each expert why it went where it
went.
"""

from .explain import WHERE, LayerExplanation, explain_layer
from .machines import HERE, Machine, machine_of_profile, machine_of_run, machine_with_link, shipped_machines
from .prepare import as_decode
from .result import Bounds, Counts, SimResult
from .scenario import NOISY, NONE, ORACLE, Scenario
from .scenarios import Scenarios
from .simulator import Simulator

__all__ = [
    "HERE",
    "NOISY",
    "NONE",
    "ORACLE",
    "WHERE",
    "Bounds",
    "Counts",
    "LayerExplanation",
    "Machine",
    "Scenario",
    "Scenarios",
    "SimResult",
    "Simulator",
    "as_decode",
    "explain_layer",
    "machine_of_profile",
    "machine_of_run",
    "machine_with_link",
    "shipped_machines",
]
