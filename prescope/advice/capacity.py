"""`advise`: sizes and a machine in, made-up routing in between, advice out. Pure but for reading the config."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..cache.prefetch import LEAST_BYTES_ON_WIRE
from ..core.numbers import is_count, is_number
from ..core.paths import user_path
from ..core.units import GIB, count_of, digits
from ..device import describe_auto
from ..engine import Engine
from ..errors import BadProfile, NoProfile, TraceMismatch, UnsupportedOption
from ..predictor import NoisyOracle
from ..profile import HardwareProfile
from ..profile.files import shipped_files
from ..scheduler import SCHEDULES
from ..scheduler.costs import Spread
from ..simulator import HERE, NONE, ORACLE, Machine, Scenario, Scenarios, SimResult, in_batches
from ..simulator.verdict import limit_of, name_of
from ..traces.routing import RoutingTrace
from ..traces.synthetic import SyntheticSpec
from .advice import Advice, CapacityPoint, Kind
from .machine_spec import KNOWN, MachineSpec
from .model_size import ModelSize

#: Fitted to tiny-moe's routing, where tests hold them: the habits of a trained model.
HABITS: dict[str, Any] = {"zipf": 1.05, "persistence": 0.07, "correlation": 0.29, "diversity": 1.0}
#: Recall of LLaPor by lookahead, on the medium trained model (benchmarks/results/predictor_medium_h200_2026-11-28.md).
RECALL = {1: 0.88, 2: 0.85, 4: 0.81}
#: One prediction at Qwen3-30B-A3B's shape on an H200, in a captured step, us a layer.
PREDICT_US = 19.0
#: CUDA's context, work space and the largest logits.
RESERVE_GIB = 1.5
#: Share of host memory that experts may take.
HOST_SHARE = 0.9
#: Least gain for which another part in the machine (a predictor, a schedule) is advised.
WORTH_IT = 0.05
#: Layer-steps that are simulated: some 50 us each.
LAYER_STEPS = 1200
#: Tokens of the made-up prompt: it leaves in the slots what a run finds there after some seconds.
PROMPT_TOKENS = 192
#: Least spread of a layer's times: those of sizes that nobody measured are scaled, or typed in. With what the
#: simulator may be wrong by it makes `INTERVAL`.
GUESSED = 0.3
#: How far tokens/s of engine runs may lie from a point, as a share of it: of tiny-moe on a shared machine of two cores
#: calibrated minutes before they did (tests/advice). With a recorded trace hit rates are the engine's own.
INTERVAL = 0.35
#: Shipped profile that is taken where this machine has none.
INSTEAD = "h200"
SHARES = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 1.0)


class _Ways(NamedTuple):
    """Replays of one number of slots."""

    on_demand: SimResult
    split: SimResult  # a static split: what is not resident is the CPU's
    ahead: SimResult  # PreSched with a predictor
    perfect: SimResult

    @property
    def without(self) -> SimResult:
        return max(self.on_demand, self.split, key=lambda one: one.tokens_per_s)

    @property
    def best(self) -> SimResult:
        return max(self.without, self.ahead, key=lambda one: one.tokens_per_s)


def advise(
    model: str | Path | dict[str, Any] | Engine | ModelSize,
    machine: MachineSpec | HardwareProfile | str | Path | None = None,
    *,
    batch: int = 1,
    context: int = 4096,
    gpu_gib: float | None = None,
    trace: RoutingTrace | None = None,
    shares: Sequence[float] = SHARES,
    experts: str = "auto",
) -> Advice:
    """Whether and how a model runs on a machine, before anything of it is downloaded.

    Args:
        model: a folder with a config.json, a hub id that was downloaded before, the name of a shape in `data/configs`,
            a config as a dict, or an engine.
        machine: numbers typed in (`MachineSpec`), a profile or its file, or the name of one that comes with prescope;
            None: the profile that `prescope.calibrate` saved on this machine, else the H200's, which the advice begins
            with.
        batch: sequences side by side. context: tokens of each, for keys and values.
        gpu_gib: GPU memory that may be used; all of it when not given.
        trace: of this model's routing, whose sequences are served at this batch. Without one, or with fewer of them, it
            is made up, with the habits of a small trained model, and the advice says so.
        experts: as `load` takes it: "int8", "fp8", "int4" or "mxfp4" for a model that is packed while it is loaded.
        shares: of all experts that have a slot, for the curve.

    Raises:
        BadModelFolder, NotAMoE, UnsupportedExperts: there is no config, no experts in it, or some that `load` refuses.
        UnsupportedOption: a number that cannot be.
        BadProfile: the profile named, or the one saved here, cannot be read.
        TraceMismatch: the trace is of a model with other layers, experts or top-k.
    """
    _check_numbers(batch, context, gpu_gib, shares)
    size = _size_of(model, experts)
    spec, instead = _machine_of(machine)
    if trace is not None and trace.shape[:3] != size.shape[:3]:
        raise TraceMismatch(
            f"the trace is of {trace.model} with (layers, experts, top-k) = {trace.shape[:3]}, {size.name} has "
            f"{size.shape[:3]}; record one of this model, or leave trace out"
        )
    budget = spec.gpu_gib if gpu_gib is None else min(gpu_gib, spec.gpu_gib)
    fixed = size.dense_bytes + batch * context * size.kv_token_bytes + RESERVE_GIB * GIB
    trace, told = _at_batch(trace, batch)
    assumptions = [*size.notes, *told, *_assumed(spec, trace)]
    scenarios = _scenarios(size, spec, batch, trace)
    fitting = int((budget * GIB - fixed) // size.shape.row_bytes)
    needed = _needs_of_a_step(scenarios)
    least = min(size.shape.total_experts, max(size.shape.top_k, int(needed / size.shape.num_layers) + 1))
    counts = {max(least, round(share * size.shape.total_experts)) for share in shares}
    if least <= fitting < size.shape.total_experts:
        counts.add(fitting)
    ways = {slots: _replays(scenarios, slots) for slots in sorted(counts)}
    points = tuple(_point(slots, one, size, spec, fixed) for slots, one in ways.items())
    usable = [slots for slots in ways if slots <= fitting]
    slots = usable[-1] if usable else None
    kind, words = _choice(size, spec, budget, fixed, None if slots is None else ways[slots], slots)
    best = next((p for p in points if p.slots == slots), None) if kind != "not with this machine" else None
    return Advice(
        model=size, machine=spec, batch=batch, context=context, budget_gib=budget, points=points, best=best, kind=kind,
        words=instead + words, cliff_gib=(fixed + needed * size.shape.row_bytes) / GIB,
        settings={} if best is None or slots is None else _settings(kind, ways[slots], slots),
        assumptions=tuple(assumptions),
    )  # fmt: skip


def _at_batch(trace: RoutingTrace | None, batch: int) -> tuple[RoutingTrace | None, list[str]]:
    """A trace's sequences at this batch, and what must be said where there are not as many: routing is guessed then."""
    if trace is None:
        return None, []
    there = len(np.unique(trace.sequence[trace.position >= 0]))
    if batch <= there:
        return in_batches(trace, batch)[0], []
    return None, [
        f"the trace has {count_of(there, 'sequence')}, fewer than a batch of {batch}: it is not used"
    ]


def _check_numbers(batch: int, context: int, gpu_gib: float | None, shares: Sequence[float]) -> None:
    for name, value in (("batch", batch), ("context", context)):
        if not is_count(value) or value < 1:
            raise UnsupportedOption(f"{name} is {value!r}; it is a whole number of 1 or more")
    if gpu_gib is not None and not (is_number(gpu_gib) and gpu_gib > 0):
        raise UnsupportedOption(f"gpu_gib is {gpu_gib!r}; it is a number of GiB, or None for all there is")
    if not len(shares) or not all(is_number(share) and 0 <= share <= 1 for share in shares):
        raise UnsupportedOption(f"shares are {shares!r}; they are shares of all experts, 0.0 to 1.0")


def _size_of(model: str | Path | dict[str, Any] | Engine | ModelSize, experts: str) -> ModelSize:
    if experts != "auto" and isinstance(model, ModelSize | Engine):
        raise UnsupportedOption(f"experts={experts!r} is for a model by its config; this one has its sizes")
    if isinstance(model, ModelSize):
        return model
    if isinstance(model, Engine):
        return ModelSize.of_engine(model)
    return ModelSize.of(model, experts)


def _machine_of(given: MachineSpec | HardwareProfile | str | Path | None) -> tuple[MachineSpec, str]:
    """The machine, and what must be said first if it is not the one that was meant."""
    if isinstance(given, MachineSpec):
        return given, ""
    if isinstance(given, HardwareProfile):
        return MachineSpec.of_profile(given), ""
    if given is not None:
        return _machine_named(given), ""
    try:
        return MachineSpec.of_profile(HardwareProfile.of_this_machine(describe_auto()), HERE), ""
    except NoProfile:
        spec = MachineSpec.of_profile(HardwareProfile.load(INSTEAD))
        return spec, (
            f"Not of this machine, which has not been calibrated (prescope.calibrate() takes a minute), but of a "
            f"shipped profile, {spec.name}: "
        )


def _machine_named(given: str | Path) -> MachineSpec:
    """A profile's file, or a machine that comes with prescope, in capitals or not."""
    if not isinstance(given, str | Path):
        raise UnsupportedOption(
            f"machine is {given!r:.80}; give a MachineSpec(link_gb_per_s=..., ...), a profile, or a name"
        )
    name = str(given).lower()
    shipped = [file.stem for file in shipped_files()]
    if user_path(given).is_file():
        return MachineSpec.of_profile(HardwareProfile.load(given))
    if name not in KNOWN and name not in shipped:
        names = ", ".join(sorted([*KNOWN, *shipped]))
        raise BadProfile(f"there is no machine {str(given)!r}: give the file of a profile, or one of {names}")
    return KNOWN.get(name) or MachineSpec.of_profile(HardwareProfile.load(name))


def _assumed(spec: MachineSpec, trace: RoutingTrace | None) -> list[str]:
    told = []
    if trace is None:
        told.append(
            "guessed routing: the habits of a small trained model (Zipf 1.05, persistence 0.07, correlation 0.29); "
            "record a trace of yours and pass trace=..."
        )
    told.append(
        f"a predictor of recall {' / '.join(map(str, RECALL.values()))} at {' / '.join(map(str, RECALL))} layers "
        f"ahead, {PREDICT_US:.0f} us a layer, as LLaPor has on a trained model of 1.7 G parameters"
    )
    told.append(
        f"tokens/s are good to {100 * INTERVAL:.0f} %: a machine that does other work, too, scatters as much"
    )
    told.append(f"{RESERVE_GIB} GiB of GPU memory for CUDA's context and work space")
    if spec.origin == "assumed":
        told.append(
            f"the machine's numbers are typed in; a layer's launches take {spec.launches_us:.0f} us, a decision "
            f"reaches the link after 21 us, as on an H200"
        )
    else:
        told.append(
            "GPU memory and its rate are its maker's figures; sizes that were not measured are scaled by bytes"
        )
    return told


def _scenarios(size: ModelSize, spec: MachineSpec, batch: int, trace: RoutingTrace | None) -> Scenarios:
    shape = size.shape
    if trace is None:
        steps = int(np.clip(LAYER_STEPS // shape.num_layers, 16, 64))
        made = SyntheticSpec(
            num_layers=shape.num_layers, num_experts=shape.num_experts, top_k=shape.top_k, **HABITS
        )
        trace = made.generate(prompt_tokens=PROMPT_TOKENS, new_tokens=steps, batch=batch, seed=1)
    depth = min(4, shape.num_layers - 1)
    recall = {ahead: value for ahead, value in RECALL.items() if ahead <= depth} or {1: RECALL[1]}
    predictor = NoisyOracle(trace, recall)
    predictor.name = "llapor"  # stands in for it: a schedule asks for it by this name
    known = spec.costs(shape, size.expert, size.layer_bytes, batch)
    costs = replace(known, spread=Spread(*(max(share, GUESSED) for share in known.spread)))
    machine = Machine(spec.name, costs, shape.row_bytes, _head_us(size, spec), LEAST_BYTES_ON_WIRE)
    return Scenarios(trace, [machine], [predictor], predict_us={"llapor": PREDICT_US}, label=size.name)


def _head_us(size: ModelSize, spec: MachineSpec) -> float:
    """A step besides its layers: the logits."""
    head = max(0, size.dense_bytes - size.shape.num_layers * size.layer_bytes) / 2
    return 60.0 + head / (0.6 * spec.gpu_gb_per_s) / 1e3


def _needs_of_a_step(scenarios: Scenarios) -> float:
    """Mean of distinct experts that a decode step needs, all layers."""
    needs = scenarios.simulator(Scenario(slots=1, machine=scenarios.first_machine)).needs
    return len(needs.experts) / len(needs.steps)


def _replays(scenarios: Scenarios, slots: int) -> _Ways:
    machine = scenarios.first_machine
    plain = Scenario(schedule="on-demand", slots=slots, machine=machine)
    on_demand = scenarios.run(plain)
    has_cpu = len(scenarios.machine(plain).costs.cpu_us) > 1
    split = Scenario(schedule="fiddler", slots=slots, machine=machine, predictor=NONE)
    ahead = Scenario(schedule="presched", slots=slots, machine=machine)
    perfect = Scenario(schedule="presched", slots=slots, machine=machine, predictor=ORACLE)
    return _Ways(
        on_demand,
        scenarios.run(split) if has_cpu else on_demand,
        scenarios.run(ahead),
        scenarios.run(perfect),
    )


def _point(slots: int, ways: _Ways, size: ModelSize, spec: MachineSpec, fixed: float) -> CapacityPoint:
    best = ways.best
    limit, share = _ruler(best, spec)
    perfect = max(ways.perfect.tokens_per_s, best.tokens_per_s)
    return CapacityPoint(
        slots, slots / size.shape.total_experts, (fixed + slots * size.shape.row_bytes) / GIB, best.counts.hit_rate,
        best.tokens_per_s, name_of(best), ways.on_demand.tokens_per_s, ways.on_demand.counts.hit_rate,
        ways.without.tokens_per_s, perfect, limit, share,
    )  # fmt: skip


def _ruler(result: SimResult, spec: MachineSpec) -> tuple[str, float]:
    """What is busy longest; of a GPU that mostly starts kernels, the launches."""
    limit, share = limit_of(result)
    launches = spec.launches_us * result.trace.num_layers / (1e3 * result.step_ms)
    return ("launches", launches) if limit == "GPU" and launches > 0.5 * share else (limit, share)


def _choice(
    size: ModelSize, spec: MachineSpec, budget: float, fixed: float, ways: _Ways | None, slots: int | None
) -> tuple[Kind, str]:
    """Which of the four, and why."""
    total = size.shape.total_experts
    if slots == total and ways is not None:
        need = (fixed + size.experts_bytes) / GIB
        return "all on the GPU", (
            f"All {total:,} experts fit: {digits(need)} of {digits(budget)} GiB, {ways.best.speed}. There is "
            f"nothing to offload."
        )
    if ways is None or slots is None:
        return "not with this machine", (
            f"Before the first expert {digits(fixed / GIB)} GiB of {digits(budget)} GiB GPU memory are taken; what is "
            f"left does not hold the experts of one layer of a step. A smaller context, batch or format would help."
        )
    if size.experts_bytes > HOST_SHARE * spec.host_gib * GIB:
        return "not with this machine", (
            f"The experts take {digits(size.experts_bytes / GIB)} GiB and host memory is {spec.host_gib:,.0f} GiB: "
            f"they have to lie there. {size.experts_bytes / HOST_SHARE / GIB:,.0f} GiB, or experts of fewer bits, "
            f"would do."
        )
    limit, share = _ruler(ways.best, spec)
    at = (
        f"{slots:,} of {total:,} experts in slots ({100 * slots / total:.0f} %, "
        f"{digits(slots * size.shape.row_bytes / GIB)} GiB)"
    )
    rules = {"waiting": "layers mostly wait", "launches": "kernel launches rule"}.get(
        limit, f"the {limit} rules"
    )
    gain = ways.ahead.tokens_per_s / ways.without.tokens_per_s - 1
    most = max(ways.perfect.tokens_per_s / ways.without.tokens_per_s - 1, gain, 0.0)
    if ways.without is ways.split and gain < WORTH_IT:
        return "static split", (
            f"With {at} about {ways.split.speed}: the most used experts on the GPU, the others "
            f"computed where they lie. Prediction would add {100 * gain:+.0f} %, a perfect one {100 * most:.0f} % at "
            f"most; {rules}, {100 * share:.0f} % of the time."
        )
    who = "PreSched with a trained predictor" if gain >= WORTH_IT else SCHEDULES["on-demand"].title
    chosen = ways.ahead if gain >= WORTH_IT else ways.without
    return "offload", (
        f"With {at} and {who} about {chosen.speed}, {100 * gain:+.0f} % by prediction and {100 * most:.0f} % at "
        f"most by a perfect one; {rules}, {100 * share:.0f} % of the time. On demand it is "
        f"{digits(ways.on_demand.tokens_per_s)}."
    )


def _settings(kind: Kind, ways: _Ways, slots: int) -> dict[str, Any]:
    if kind == "all on the GPU":
        return {"slots": 1.0}
    if kind == "static split":
        return {"slots": slots, "schedule": "fiddler"}
    pays = ways.ahead.tokens_per_s >= (1 + WORTH_IT) * ways.without.tokens_per_s
    return {"slots": slots, "schedule": "presched" if pays else "on-demand"}
