"""Recordings of an engine's runs, and the results they become."""

import gc
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from traceback import clear_frames
from typing import Any

import torch

from ..core.units import format_bytes
from ..errors import NotEnoughMemory, UnsupportedOption
from ..traces.metrics import compute_metrics
from ..traces.result import RunResult
from ..weights.formats import lossy_name
from .recorder import Recorder
from .served import ServedModel

#: More frozen objects than this are somebody's own; Python 3.12 itself starts with 375, and so never with none.
MOST_FROZEN_AT_START = 5_000


@contextmanager
def frozen_heap() -> Iterator[None]:
    """Keep the garbage collector from walking the whole heap meanwhile.

    A recording makes many small objects, which sets off full collections; with torch and transformers imported one
    takes 180 ms (2-core machine, Python 3.11), as long as ten tokens. Frozen objects are left out of them.
    """
    if gc.get_freeze_count() > MOST_FROZEN_AT_START:  # somebody else's: `unfreeze` would undo it
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _open(engine: ServedModel) -> Recorder:
    """A recorder for this thread, which has none.

    Raises:
        UnsupportedOption: it has one.
    """
    if threading.get_ident() in engine.forwards.recorders:
        raise UnsupportedOption(
            "a recording is under way already; one thread records one run at a time. recover() ends one that an "
            "interrupt has left open"
        )
    config = engine.config
    settings = {
        "events": config.events,
        "routing": config.record_routing,
        "inputs": config.record_inputs,
    }
    recorder: Recorder = engine.turn.run("a recording", Recorder, (engine.runner.device,), settings)
    return recorder


@contextmanager
def recording(engine: ServedModel) -> Iterator[Recorder]:
    """Record the forward passes of this thread inside; those of others are counted, and are in their own recordings.

    Raises:
        UnsupportedOption: this thread records already.
    """
    recorder = _open(engine)
    try:
        engine.forwards.recorders[recorder.thread] = recorder
        with frozen_heap():
            yield recorder
    finally:
        engine.forwards.recorders.pop(recorder.thread, None)
        engine.turn.run("close", engine.finish_closing, is_patient=True)


def recorded(engine: ServedModel, use: Callable[[Recorder], RunResult]) -> RunResult:
    """The same around a call, in a turn: without a generator, whose end an interrupt can keep from coming."""
    recorder = _open(engine)
    try:
        engine.forwards.recorders[recorder.thread] = recorder
        with frozen_heap():
            return use(recorder)
    finally:
        engine.forwards.recorders.pop(recorder.thread, None)
        engine.finish_closing()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device, or the CPU that stands in for it, could not give memory."""
    # On the CPU torch raises a plain RuntimeError, known by the allocator it names.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


def put_right(engine: ServedModel, error: BaseException) -> None:
    """Make the engine usable after a run that ended in an error; call it in a turn, or when nobody has one.

    Raises:
        NotEnoughMemory: that was the error.
    """
    if not is_out_of_memory(error):
        engine.runner.recover()
        return
    clear_frames(error.__traceback__)  # they hold activations; without them the next run has room
    engine.runner.recover()
    engine.decoder.forget()  # so do the caches of captured steps
    num_slots = engine.runner.residency.num_slots
    slots, said = (
        format_bytes(num_slots * engine.shape.row_bytes),
        next(iter(str(error).splitlines()), type(error).__name__),
    )
    raise NotEnoughMemory(
        f"memory ran out in the middle of a run ({said}). {num_slots} slots take {slots}: use fewer "
        f"(engine.configure(slots=...)), a shorter prompt, fewer prompts at once or fewer new tokens; the engine works "
        f"again"
    ) from error


def result_of(
    engine: ServedModel,
    recorder: Recorder,
    settings: Mapping[str, Any],
    *,
    batch: int,
    output_tokens: int,
    longest: int | None = None,
) -> RunResult:
    """What a recording became; call it once, in a turn.

    Args:
        settings: of `generate`.
        batch, output_tokens, longest: as `compute_metrics` takes them.
    """
    tables = recorder.tables([layer.layout.row_bytes for layer in engine.layers])
    hardware, config = engine.hardware(), engine.describe()
    # A trace goes its own way, into simulations, predictors and figures, and says there what it was recorded with.
    model = lossy_name(engine.name, str(config["expert_form"])) if config["lossy"] else engine.name
    trace = recorder.trace(
        num_experts=engine.shape.num_experts,
        decoder_layers=[layer.decoder_layer for layer in engine.layers],
        model=model,
        fingerprint=engine.fingerprint,
        versions={name: str(hardware[name]) for name in ("prescope", "torch", "transformers")},
    )
    notes = recorder.notes()
    schedule_runner = engine.runner.schedule_runner
    if schedule_runner is not None and schedule_runner.predicting is not None:
        config["reasons"]["predictor"] = schedule_runner.predicting.how
        notes += schedule_runner.predicting.take_notes()
    if packing := engine.reasons.get("experts"):
        notes.append(packing)
    if recorder.num_batched:
        notes.append(
            f"{recorder.num_batched} forward passes of generate_batch are not in it: each is over tokens of several "
            f"requests, in their prompts and behind them, and does not say which token is whose; to record prompts "
            f"together, pass them to engine.generate as a list"
        )
    if num_others := recorder.num_foreign - recorder.num_batched:
        notes.append(
            f"{num_others} forward passes of other threads meanwhile are not in it, but their time is"
        )
    return RunResult(
        text=[],
        tokens=[],
        metrics=compute_metrics(*tables, batch=batch, output_tokens=output_tokens, longest=longest),
        events=tables.events,
        layers=tables.layers,
        steps=tables.steps,
        trace=trace,
        config={**config, "generate": {name: repr(value) for name, value in settings.items()}},
        hardware=hardware,
        notes=notes,
    )
