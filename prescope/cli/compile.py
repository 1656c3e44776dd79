"""`prescope compile`: what decides, before a first run or a first slider waits for it."""

from .terminal import StatusLine


def compile_now() -> None:
    """Compile what engine and simulator decide by: a minute or two, once.

    Otherwise the first run and the first simulation do it. The code is kept on
    disk, for this machine and version; `make setup` does this by itself.
    """
    import torch

    from ..device import resolve_device
    from ..engine.graph import compile_host_parts

    with StatusLine() as status:
        status.show("compiling what the engine decides by, once on this machine")
        _run()
        status.show("compiling the simulator, once on this machine")
        _simulate()
        if resolve_device("auto", None, torch.device("cpu"))[0] == "cuda":
            status.show("compiling what the host does beside a GPU, once on this machine")
            compile_host_parts()


def _run() -> None:
    """A few tokens of the embedded model. On the CPU: what a GPU calls as well is the same."""
    from ..engine import load
    from ..profile import HardwareProfile

    # By the costs of any machine: before it was set up, this one cannot have been calibrated.
    profile = HardwareProfile.load("test_machine")
    with load(slots=0.5, device="cpu") as engine:
        _, width, expert_width = engine.expert_size
        costs = profile.costs(engine.shape, width=width, expert_width=expert_width)
        engine.configure(schedule="presched", costs=costs)
        engine.generate("The", max_new_tokens=3)


def _simulate() -> None:
    """A recording that comes with prescope, as the dashboard replays it."""
    from ..simulator import Recording, Scenario, shipped_recordings

    for name in shipped_recordings()[:1]:
        recording = Recording.load(name)
        scenarios = recording.scenarios()
        scenario = Scenario(machine=recording.machine.name, slots=scenarios.num_experts // 2)
        scenarios.run(scenario)
        scenarios.bounds(scenario)
