"""The model tab: advice on models that nobody has loaded, on machines that are known."""

from dataclasses import replace

import pytest

from prescope.profile import HardwareProfile
from prescope.simulator import HERE
from prescope.widgets.capacity_panel import CapacityPanel, _known_machines


@pytest.mark.parametrize("noted", [{}, {"device_memory_gib": 23.5, "device_memory_gb_per_s": 1008}])
def test_it_opens_whether_or_not_the_profile_of_this_machine_notes_the_gpus_memory(noted, monkeypatch):
    """Older calibrations on most GPUs do not; the tab, and the dashboard with it, did not open there."""
    profile = HardwareProfile.load("h200")
    here = replace(profile, machine=profile.machine | {"device": "NVIDIA GeForce RTX 4090"} | noted)
    monkeypatch.setattr(HardwareProfile, "of_this_machine", classmethod(lambda cls, described=None: here))
    known = _known_machines("olmoe-1b-7b")
    assert (HERE in known) == bool(noted)
    assert {"h200", "h100"} <= known.keys()
    CapacityPanel({"OLMoE": "olmoe-1b-7b"}).close()
