"""`calibrate`: plan, measure within the time given, keep what was measured, make a profile of it."""

import os
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import CancelledError
from contextlib import closing
from datetime import UTC, datetime
from statistics import median
from typing import Any, NamedTuple

import torch

from ..core.machine import available_memory_bytes, machine_facts, this_place
from ..core.units import digits
from ..device import Device, emulated_link_gb_per_s, open_device, resolve_device
from ..engine.config import EngineConfig
from ..engine.engine import Engine
from ..errors import BadProfile, UnsupportedOption
from ..hf import find_moe_layers
from ..profile import Circumstances, HardwareProfile, Point, own_file
from .bench import Bench
from .doubts import busy_note, impossible
from .experts import ExpertForm, silu_form
from .layers import layer_points
from .plan import Sizes, expert_plan, host_plan, sizes_of
from .progress import OnProgress, ProgressBar
from .unfinished import Unfinished

#: Measured without a model: Qwen3-30B-A3B (9.4 MB), OLMoE-1B-7B (12.6 MB), the embedded model.
USUAL_FORMS = ((2048, 768), (2048, 1024), (256, 80))
#: Samples of one point and pass: at least, at most, and at most so many seconds of them.
LEAST_RUNS, MOST_RUNS, MOST_SECONDS = 2, 8, 0.3
#: Times each point is visited.
PASSES = 2
#: Share of the time for an engine's own layers, which need generated tokens.
ENGINE_SHARE = 0.4
#: Sizes of experts of one model that are measured.
MOST_FORMS = 3
#: What a device says of itself that a profile keeps.
OF_DEVICE = ("device", "device_memory_gib", "device_memory_gb_per_s")


class Subject(NamedTuple):
    """What is calibrated for."""

    engine: Engine | None
    forms: list[ExpertForm]
    name: str


def calibrate(
    model_or_engine: Any = None,
    *,
    device: str = "auto",
    seconds: float = 45.0,
    on_progress: OnProgress | None = None,
    save: bool = True,
    link_gb_per_s: float | None = None,
    cpu: str = "auto",
) -> HardwareProfile:
    """Measure link, CPU experts, device experts and host costs of this machine, alone and beside each other.

    A point that no memory can give is left out, and a machine that was busy meanwhile is said: both as a warning and in
    the profile's notes.

    Ctrl-C ends it at once, and so does a `CancelledError` that `on_progress` raises; a saved profile stays as it was,
    and a call within the hour goes on where this one stopped.

    Args:
        model_or_engine: an engine, which is also asked what the rest of a layer takes; a transformers MoE; one expert
            as (D, F) or `ExpertForm`; None: some published sizes.
        device: as in `EngineConfig`; an engine's own by default.
        seconds: to spend, about; kernels that have to be compiled first come on top. Less time gives fewer samples.
        on_progress: told what is measured and the share that is done; None shows a bar.
        save: keep the profile where `HardwareProfile.of_this_machine` finds it, with what an older one knows of
            other sizes of experts.
        link_gb_per_s: of the emulated link, as in `EngineConfig`.
        cpu: what computes experts on the CPU: "native", "torch" or "auto", as in `CpuExperts`.

    Raises:
        UnsupportedOption: there is nothing of these settings here.
        NotAMoE, UnsupportedExperts: the model has no experts to measure for.
    """
    deadline = time.perf_counter() + seconds
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    subject = _subject(model_or_engine)
    kind, rate = _where(subject, device, link_gb_per_s)
    with closing(open_device(kind, rate, subject.forms[0].layout.row_bytes)) as opened, opened.as_current():
        described = opened.describe()
        run = _CalibrationRun(opened, subject, deadline, described.get("link_gb_per_s"), cpu)
        place = this_place(described)
        unfinished = Unfinished(
            own_file(place).with_suffix(".unfinished") if save else None,
            repr((place, rate, cpu, subject.name)),
        )
        run.take(unfinished.points())
        try:
            run.measure(on_progress)
        except (KeyboardInterrupt, CancelledError):
            unfinished.keep(run.points)
            raise
    points = _believed(run, described.get("device_memory_gb_per_s"), load)
    profile = HardwareProfile(
        place=place,
        label=described["label"],
        measured=datetime.now(UTC).date().isoformat(),
        points=tuple(points),
        machine={
            **machine_facts(),
            **{name: described[name] for name in OF_DEVICE if name in described},
            "cpu_threads": run.cpu_threads,
        },
        cpu_backend=run.cpu_backend,
        link_gb_per_s=run.link_gb_per_s,
        origin=f"prescope.calibrate({subject.name}seconds={seconds:g})",
        notes=tuple(run.notes),
    )
    if save:
        profile = _beside_older(profile)
        profile.save()
        unfinished.forget()
    return profile


def _believed(run: "_CalibrationRun", device_gb_per_s: float | None, load: float | None) -> list[Point]:
    """The points that can be true; what cannot, and a busy machine, is said and noted in the profile."""
    refused = impossible(run.points, device_gb_per_s)
    doubts = [f"not believed: {_in_words(of)}: {reason}" for of, reason in refused.items()]
    doubts += [note] if (note := busy_note(run.points, load, os.cpu_count() or 1)) else []
    for doubt in doubts:
        warnings.warn(doubt, stacklevel=3)
    run.notes += doubts
    return [point for point in run.points if point.of not in refused]


def _beside_older(profile: HardwareProfile) -> HardwareProfile:
    try:
        return profile.with_experts_of(HardwareProfile.load(own_file(profile.place)))
    except BadProfile:  # there is none, or none that can be read: this one takes its place
        return profile


def _subject(given: Any) -> Subject:
    """What `calibrate` was called for, the largest experts first."""
    if given is None:
        forms = [silu_form(*sizes) for sizes in USUAL_FORMS]
        return Subject(None, sorted(forms, key=lambda form: -form.layout.row_bytes), "")
    if isinstance(given, ExpertForm):
        return Subject(None, [given], f"{given.expert}, ")
    if isinstance(given, tuple) and len(given) == 2:
        width, expert_width = map(int, given)
        return Subject(None, [silu_form(width, expert_width)], f"{given}, ")
    engine = given if isinstance(given, Engine) else None
    layers = engine.layers if engine is not None else find_moe_layers(given)
    forms_by_size = {form.expert: form for form in (ExpertForm(layer.spec, layer.layout) for layer in layers)}
    largest = sorted(forms_by_size, reverse=True)[:MOST_FORMS]
    name = engine.name if engine is not None else type(given).__name__
    return Subject(engine, [forms_by_size[expert] for expert in largest], f"<{name}>, ")


def _where(subject: Subject, device: str, link_gb_per_s: float | None) -> tuple[str, float | None]:
    """Kind of device and rate of its link, if emulated."""
    engine = subject.engine
    if engine is not None and device == "auto":
        device, link_gb_per_s = engine.config.device, link_gb_per_s or engine.config.link_gb_per_s
        if device == "cuda":  # the GPU that was current when the engine was made
            device = str(engine.runner.device.torch_device)
        if not device.startswith("cuda") and link_gb_per_s is None:
            link_gb_per_s = emulated_link_gb_per_s(engine.shape.row_bytes)
    config = EngineConfig(device=device, link_gb_per_s=link_gb_per_s)
    return resolve_device(config.device, config.link_gb_per_s, torch.device("cpu"))[0], link_gb_per_s


class _CalibrationRun:
    """One calibration: what is to be measured and what has been."""

    def __init__(
        self, device: Device, subject: Subject, deadline: float, link_gb_per_s: float | None, cpu: str
    ) -> None:
        self._device, self._subject, self._deadline, self._cpu = device, subject, deadline, cpu
        self.link_gb_per_s = link_gb_per_s
        self._points: dict[Circumstances, Point] = {}
        self._samples: dict[Circumstances, list[float]] = {}
        self.notes: list[str] = []
        self.cpu_backend, self.cpu_threads = "", 0
        self._left = 0  # visits to points that are still to come

    def take(self, points: dict[Circumstances, Point]) -> None:
        """Take over points that were measured before; they are not measured again."""
        self._points |= points

    @property
    def points(self) -> list[Point]:
        """What has been measured so far."""
        return [*self._points.values(), *(point_of_samples(of, us) for of, us in self._samples.items())]

    def measure(self, on_progress: OnProgress | None) -> None:
        """Everything there is to measure; `points` holds what is done, also when this is interrupted."""
        forms, kind = self._subject.forms, self._device.kind
        free = min(available_memory_bytes(), self._device.free_bytes())
        sizes = {form.expert: sizes_of(form.expert, kind, free) for form in forms}
        plans = {form.expert: expert_plan(form.expert, sizes[form.expert].together) for form in forms}
        first = forms[0].expert
        rows_bytes = sizes[first].rows * first.nbytes
        of_host = host_plan(list(sizes), rows_bytes, device_kind=kind, link_gb_per_s=self.link_gb_per_s)
        plans[first] = [*of_host, *plans[first]]
        todo = {expert: [of for of in plan if of not in self._points] for expert, plan in plans.items()}
        self._left = PASSES * sum(map(len, todo.values()))
        with ProgressBar(self._left, on_progress) as progress:
            self._measure_layers(progress)
            for form in forms:
                self._measure_form(form, sizes[form.expert], todo[form.expert], progress)

    def _measure_layers(self, progress: ProgressBar) -> None:
        engine, expert = self._subject.engine, self._subject.forms[0].expert
        if engine is None:
            return
        if not engine.config.events:
            self.notes.append("the engine records no events, so the rest of a layer was not measured")
            return
        now = time.perf_counter()
        deadline = now + ENGINE_SHARE * (self._deadline - now)
        found = layer_points(engine, expert, deadline=deadline, tell=progress.at)
        self._points |= {point.of: point for point in found}
        self.notes.append(f"rest of a layer: {engine.name}, decode {engine.reasons.get('decode', '')}")

    def _measure_form(
        self, form: ExpertForm, sizes: Sizes, plan: Sequence[Circumstances], progress: ProgressBar
    ) -> None:
        with closing(Bench(self._device, form, sizes, self._cpu, self.link_gb_per_s)) as bench:
            self.cpu_backend, self.cpu_threads = bench.cpu.implementation, bench.cpu.threads
            for visit in range(PASSES):
                # Forwards, then backwards: a disturbance of a second does not hit all samples of one point.
                for of in plan if visit % 2 == 0 else reversed(plan):
                    progress.at(_in_words(of))
                    self._sample(bench, of)
                    self._left -= 1
                    progress.done()

    def _sample(self, bench: Bench, of: Circumstances) -> None:
        """Samples of one point until its share of the time is over."""
        samples = self._samples.get(of, [])
        before = len(samples)
        if before and time.perf_counter() > self._deadline:
            return
        with bench.load(of):
            if not before:
                bench.sample(of)  # memory is allocated and kernels are compiled
            started = time.perf_counter()
            share = min(MOST_SECONDS, max(0.0, (self._deadline - started) / max(1, self._left)))
            least = LEAST_RUNS if started < self._deadline else 1
            while (num := len(samples) - before) < least or (
                num < MOST_RUNS and time.perf_counter() - started < share
            ):
                samples.append(bench.sample(of))
        self._samples[of] = samples  # now there is at least one
        bench.settle()


def point_of_samples(of: Circumstances, samples: Sequence[float]) -> Point:
    """The median of their faster half, and the spread of all: whatever else runs on a machine only ever adds time.

    Raises:
        UnsupportedOption: they took no time.
    """
    us = median(sorted(samples)[: (len(samples) + 1) // 2])
    if not us > 0:
        raise UnsupportedOption(f"{_in_words(of)} took {us} us: this device has no clock to measure by")
    return Point(of, us, (max(samples) - min(samples)) / median(samples), len(samples))


def _in_words(of: Circumstances) -> str:
    beside = " beside the other lane" if of.busy else ""
    if of.experts:
        return f"{of.kind}: {of.experts} experts of {digits(of.nbytes / 1e6)} MB, {of.tokens} tokens{beside}"
    return f"{of.kind}{f' {digits(of.nbytes / 1e6)} MB' if of.nbytes else ''}{beside}"
