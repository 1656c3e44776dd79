"""Machines that a recorded trace can be replayed on: the one at hand, and those whose profiles come with prescope."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from statistics import median
from typing import NamedTuple

from ..cache.policies import POLICIES
from ..cache.prefetch import LEAST_BYTES_ON_WIRE
from ..core.types import DEVICE_DRIVERS, ExpertSize, MoEShape
from ..core.units import count_of, digits
from ..errors import BadProfile
from ..profile import SLOWER_LINKS, HardwareProfile
from ..profile.files import shipped_files
from ..scheduler import schedule_named
from ..scheduler.costs import (
    ASSUMED_HANDOVER,
    DECIDE_US,
    HANDOVER_US,
    LayerCosts,
    costs_of_run,
    decide_us_of,
    has_times,
)
from ..scheduler.plan import ON_DEMAND
from ..traces.events import COMPUTE_LANES
from ..traces.result import RunResult
from .beside import beside_as_in

HERE = "this machine"


class Machine(NamedTuple):
    """What a layer costs somewhere.

    Attributes:
        name: as a menu shows it.
        costs: `cpu_us` empty where no CPU experts were measured.
        row_bytes: of one expert there.
        step_us: of a step besides its MoE layers.
        least_bytes: on the link, for its full rate (`prefetch.most_on_wire`).
        is_here: the engine at hand runs on it, so that what was simulated can be run.
        on_demand: costs where nothing is decided ahead, if they differ: on CUDA the device then decides by itself, if
            it can run the cache policy, and no layer waits for the host. None: as `costs`.
    """

    name: str
    costs: LayerCosts
    row_bytes: int
    step_us: float
    least_bytes: int
    is_here: bool = False
    on_demand: LayerCosts | None = None

    def costs_of(self, schedule: str, cache: str | None = None) -> LayerCosts:
        """What a layer costs under a schedule and a cache policy; None: the schedule's own."""
        named = schedule_named(schedule)
        is_alone = named.number == ON_DEMAND and POLICIES[cache or named.cache].runs_on_gpu
        return self.on_demand if is_alone and self.on_demand is not None else self.costs

    def costs_with(self, cpu: bool) -> LayerCosts:
        """Costs for an engine's decisions, with the CPU lane or without."""
        return (
            self.costs
            if cpu
            else replace(self.costs, link_busy_us=None, cpu_us=(), cpu_alone_us=(), cpu_base_us=0.0)
        )


def machine_of_run(
    run: RunResult,
    shape: MoEShape,
    expert: ExpertSize,
    profile: HardwareProfile | None = None,
    others: Iterable[RunResult] = (),
) -> Machine:
    """The machine at hand, its layers as they were in a recorded run.

    Args:
        run: with events, on demand or under a schedule: the wait for the host is its own, unless the GPU decided. Then
            it is what others waited, or as calibrated, where a schedule decides; and where the GPU decided in others,
            on demand waits as little as they did. `shape`, `expert`: of the engine that made it.
        profile: of this machine, for experts on the CPU; without one there is no CPU lane.
        others: runs of this machine too; those of other models are left out. Those like this one say how far it drifts
            from run to run, those of this batch what the host's decisions took, and, with as many CPU threads as the
            newest of them, experts on the CPU.

    Raises:
        BadTrace: the run holds no such times.
        ForeignProfile: the profile is of another machine.
    """
    others = tuple(others)
    costs = costs_of_run(run).drifting(costs_of_run(one) for one in others if _is_alike(one, run))
    rest_us, step_us = _of_steps(run, shape.num_layers)
    costs = replace(costs, rest_us=rest_us, decide_us=decide_us_of(run), is_layered=run.driver == "layered")
    if profile is not None:
        profile.require_this_machine(run.hardware)
        if profile.link_gb_per_s is not None:
            profile = profile.with_link(float(run.hardware["link_gb_per_s"]))
        known = profile.costs(
            shape,
            width=expert.width,
            expert_width=expert.expert_width,
            batch=run.metrics.batch,
            rest_us=costs.rest_us,
        )
        beside = known.link_us if known.link_busy_us is None else known.link_busy_us
        costs = replace(
            costs,
            link_busy_us=costs.link_us * max(1.0, beside / known.link_us),
            cpu_us=known.cpu_us,
            cpu_base_us=known.cpu_base_us,
            cpu_alone_us=known.cpu_alone_us,
            spread=costs.spread._replace(cpu=known.spread.cpu),
            source=f"{costs.source}; CPU experts calibrated",
        )
        merge_us = known.cpu_base_us - profile.base_us("cpu", expert)
        costs = beside_as_in(_with_lane(run, others), costs, merge_us)
    on_demand = None
    alone = [decide_us_of(one) for one in others if _is_here(one, run) and one.driver in DEVICE_DRIVERS]
    if run.driver in DEVICE_DRIVERS:
        on_demand, costs = costs, _decided_by_host(costs, run, others, profile, expert)
    elif run.driver == "host-driven" and alone:
        source = f"{costs.source}; on demand the GPU decides, as in {count_of(len(alone), 'run')}"
        on_demand = replace(costs, decide_us=median(alone), source=source)
    return Machine(
        HERE,
        costs if costs.is_layered else _handed_over(costs, profile),
        shape.row_bytes,
        step_us,
        LEAST_BYTES_ON_WIRE if run.hardware["link"] == "measured" else 0,
        is_here=True,
        on_demand=on_demand,
    )


def _handed_over(costs: LayerCosts, profile: HardwareProfile | None) -> LayerCosts:
    """The same where the host hands over each copy: what that takes it was calibrated, or is assumed."""
    enqueue_us, us = (0.0, 0.0) if profile is None else map(profile.lanes.small_us, ("enqueue", "handover"))
    origin = "hand-overs calibrated" if us else ASSUMED_HANDOVER
    return replace(
        costs, copy_us=enqueue_us, handover_us=us or HANDOVER_US, source=f"{costs.source}; {origin}"
    )


def _decided_by_host(
    costs: LayerCosts,
    run: RunResult,
    others: tuple[RunResult, ...],
    profile: HardwareProfile | None,
    expert: ExpertSize,
) -> LayerCosts:
    """A run's costs where the host decides, for which its layers did not wait: as others did, or as was calibrated.

    On an H200 notebook 03 said 2,666 tokens/s of a schedule that then made 1,520: simulated with no wait but the GPU's.
    """
    asked = [decide_us_of(one) for one in others if _is_here(one, run) and one.driver == "host-driven"]
    asked = [us for us in asked if us > 0.0]  # without events, or misses, a run tells nothing of it
    if asked:
        us, origin = median(asked), f"of {count_of(len(asked), 'run')} that the host decided"
    elif profile is not None and (known := profile.lanes.layer_us("decide", expert, run.metrics.batch)):
        us, origin = known, "calibrated"
    else:
        us, origin = DECIDE_US, f"assumed to be {DECIDE_US:.0f} us"
    return replace(costs, decide_us=us, source=f"{costs.source}; the host's decisions {origin}")


def _of_steps(run: RunResult, num_layers: int) -> tuple[float, float]:
    """Microseconds: the rest of a layer, and a step besides its layers.

    Medians of the decode steps: an H200's host once stopped for 90 ms in 23 steps, which made 249 us a layer of 30.
    """
    decode = run.events["phase"] == "decode"
    compute = run.events[decode & run.events["lane"].isin(COMPUTE_LANES)]
    inside = compute[compute["moe_layer"] >= 0]
    rest = inside[inside["kind"] == "dense"].groupby("step")["dur_us"].sum()
    steps = run.steps[run.steps["phase"] == "decode"].set_index("step")
    besides = steps["dur_us"] - inside.groupby("step")["dur_us"].sum()
    return float(rest.median()) / num_layers, float(besides.median())


def _is_alike(one: RunResult, run: RunResult) -> bool:
    """Whether the layers of two runs do the same, so that they differ by the machine's speed alone: copies beside the
    CPU take longer, so both compute on it or neither.
    """
    return (
        one is not run
        and has_times(one)
        and _is_here(one, run)
        and (one.metrics.decode.on_cpu > 0) == (run.metrics.decode.on_cpu > 0)
        and all(one.config[name] == run.config[name] for name in ("schedule", "compiled"))
        and one.config["reasons"]["decode"] == run.config["reasons"]["decode"]
    )


def _with_lane(run: RunResult, others: tuple[RunResult, ...]) -> list[RunResult]:
    """Runs of this machine and batch that computed experts on the CPU, with as many threads as the newest of them."""
    found = [one for one in (run, *others) if _is_here(one, run) and one.metrics.decode.on_cpu]
    return [one for one in found if one.config["cpu_threads"] == found[-1].config["cpu_threads"]]


def _is_here(one: RunResult, run: RunResult) -> bool:
    """Whether two runs are of one machine, model and batch."""
    return (
        one.label == run.label
        and one.metrics.batch == run.metrics.batch
        and one.config.get("fingerprint") == run.config.get("fingerprint")
    )


def machine_of_profile(
    profile: HardwareProfile, name: str, shape: MoEShape, expert: ExpertSize, batch: int
) -> Machine:
    """Another machine, with experts of some size that were measured there.

    Raises:
        BadProfile: the rest of a layer beside such experts is not known.
    """
    costs = profile.costs(
        shape._replace(row_bytes=expert.nbytes),
        width=expert.width,
        expert_width=expert.expert_width,
        batch=batch,
    )
    return Machine(
        f"{name}, experts of {digits(expert.nbytes / 1e6)} MB",
        costs,
        expert.nbytes,
        0.0,
        LEAST_BYTES_ON_WIRE if profile.link_gb_per_s is None else 0,
    )


def machine_with_link(machine: Machine, factor: float) -> Machine:
    """A machine with its link so many times as fast, all else the same."""
    return machine._replace(
        name=f"{machine.name}, link {factor:g} times as fast",
        costs=_with_link(machine.costs, factor),
        on_demand=None if machine.on_demand is None else _with_link(machine.on_demand, factor),
        is_here=False,
    )


def _with_link(costs: LayerCosts, factor: float) -> LayerCosts:
    return replace(
        costs,
        link_us=costs.link_us / factor,
        link_busy_us=None if costs.link_busy_us is None else costs.link_busy_us / factor,
        source=f"link emulated {factor:g} times as fast, {costs.source}",
    )


def shipped_machines(shape: MoEShape, batch: int) -> list[Machine]:
    """All machines whose profiles come with prescope, with each size of experts that whole layers are known of.

    Machines with a GPU behind PCIe 5 also behind the slower links that they can emulate.
    """
    found = []
    for file in shipped_files():
        profile = HardwareProfile.load(file)
        for expert in profile.lanes.gpu:
            for name, seen in _behind_links(profile, file.stem):
                try:
                    found.append(machine_of_profile(seen, name, shape, expert, batch))
                except BadProfile:  # experts alone were measured, no engine with them
                    continue
    return found


def _behind_links(profile: HardwareProfile, name: str) -> Iterator[tuple[str, HardwareProfile]]:
    yield name, profile
    # What a link that is slower by half or three quarters stands for is known of this one alone.
    is_fast = profile.place.link.startswith("PCIe 5")
    if is_fast and profile.link_gb_per_s is None and profile.link_factor == 1:
        for factor, link in SLOWER_LINKS.items():
            yield f"{name} behind emulated {link}", profile.emulated(factor, link)
