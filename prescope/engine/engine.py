"""Run a transformers MoE model with its experts in host memory: `load`, `attach`, `generate`.

The engine owns the pieces and their lifetimes; `runner` serves its MoE layers, `decode` runs whole steps from one
graph, `recorder` takes down what happened.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NoReturn, Self

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..cache.frequencies import require_frequencies
from ..cache.policies import CachePolicy, by_frequency, make_policy
from ..cache.residency import NOTHING
from ..core.html import facts_html
from ..core.jit import IS_COMPILED, behind
from ..core.machine import machine_facts
from ..core.types import ExpertSize, IntArray, NeedOutcome
from ..core.units import format_bytes
from ..core.worker import despite_interrupts, process_id, require_process
from ..device import Device, open_device, resolve_device
from ..errors import (
    AlreadyAttached,
    BadProfile,
    NoProfile,
    NotAttached,
    PrescopeError,
    SlotPoolTooLarge,
    UnsupportedOption,
)
from ..hf import Attachment, MoELayer, find_moe_layers, owner_of, require_whole, top_k_of
from ..kernels import make_kernel
from ..predictor import Predictor
from ..profile import HardwareProfile
from ..scheduler import schedule_named
from ..scheduler.costs import LayerCosts
from ..traces.result import RunResult
from ..traces.routing import RoutingTrace
from ..weights.host_pool import require_host_memory
from .config import EngineConfig
from .forced_routing import ForcedRouting
from .forwards import Forwards
from .generate import generate
from .graph import Decoder, compile_host_parts
from .layered import LayeredRunner
from .predicting import Predictings
from .prompts import Prompts
from .recorder import Recorder
from .recording import recording, result_of
from .resolve import cache_of, count_slots, form_of, require_kinds, shape_of, unpacked_by
from .schedule import open_schedule_runner
from .turn import in_turn

#: Until a run's next token, for which `close` waits: a long prompt on a slow link takes minutes.
MOST_TOKEN_S = 600.0
#: Settings of a schedule, as `Engine.configure` takes them.
SCHEDULE_SETTINGS = {"schedule", "lookahead", "width", "threshold", "cpu_threads"}


def _freed_bytes(model: PreTrainedModel, layers: list[MoELayer], device: torch.device) -> int:
    """Device memory that attaching frees: experts that are there now, less the rest of the model that is not."""
    experts = {id(tensor) for layer in layers for tensor in layer.tensors().values()}
    freed = 0
    for tensor in [*model.parameters(), *model.buffers()]:
        is_here = tensor.device.type == device.type
        if is_here and id(tensor) in experts:
            freed += tensor.nbytes
        elif not is_here and id(tensor) not in experts:
            freed -= tensor.nbytes
    return freed if device.type != "cpu" else 0  # on the CPU the rows take the experts' place


class Engine:
    """A model that runs with its experts in host memory.

    Use `load` or `attach` to make one. As a context manager it detaches on exit.

    Attributes:
        model: the transformers model; its own `generate` works.
        tokenizer: or None.
        layers: its MoE layers, in order. `shape`: sizes of its MoE part.
        num_slots: places for experts on the device.
        form: of packed experts, "" where they are as they are computed with; `is_lossy`: packing has changed them.
        frequencies: (L, E) uses per expert that cache="static" goes by, and schedules that have the most frequent in
            slots from the start; or None.
        fingerprint: identity of the model, written into traces.
        turn: whose it is to run; a job of several calls keeps it over all of them.
    """

    # Of what is made here nothing may be an inference tensor, which could not be written outside that mode.
    @torch.inference_mode(False)
    def __init__(
        self,
        model: PreTrainedModel,
        config: EngineConfig,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        name: str = "",
        frequencies: np.ndarray | None = None,
        predictor: Predictor | None = None,
        costs: LayerCosts | None = None,
        layers: list[MoELayer] | None = None,
        packing: str = "",
    ) -> None:
        layers = find_moe_layers(model) if layers is None else layers
        require_kinds(predictor=predictor, costs=costs, tokenizer=tokenizer)
        self.model = model
        self.tokenizer = tokenizer
        self.name = name
        self.shape = shape_of(layers, top_k_of(model))
        if frequencies is not None:
            frequencies = require_frequencies(self.shape, frequencies)
        self.num_slots, slots_reason = count_slots(config, self.shape, layers)
        kind, device_reason = resolve_device(config.device, config.link_gb_per_s, model.device)
        self.chosen_cache = config.cache
        cache, cache_reason = cache_of(config, frequencies)
        policy = make_policy(cache, self.shape, frequencies)
        self._dtype = layers[0].tensors()[layers[0].weight_names[0]].dtype
        self.form, self.is_lossy = form_of(layers)
        kernel, kernel_reason = make_kernel(
            config.kernels, kind.partition(":")[0], self._dtype, [layer.layout for layer in layers]
        )
        self.config = replace(config, device=kind, kernels=kernel.name, cache=cache)
        self.reasons = {
            "slots": slots_reason, "device": device_reason, "kernels": kernel_reason, "cache": cache_reason
        }  # fmt: skip
        if packing:
            on_gpu = kind.startswith("cuda") and bool(self.form)
            self.reasons["experts"] = packing + (unpacked_by(kernel.name, kernel_reason) if on_gpu else "")
        self.frequencies = frequencies
        self._is_entered = False
        self._owner = process_id()
        self._is_closing = self._is_closed = False
        self._num_undone = 0  # steps of closing
        former: Engine | None = owner_of(layers)
        if former is not None:
            former._give_way()
        require_whole(model, layers)
        self._device: Device = open_device(
            kind, config.link_gb_per_s, self.shape.row_bytes, config.link_factor
        )
        if self._device.captures_steps:  # while the experts are copied to host rows
            behind.start(compile_host_parts)
        self._attachment = Attachment(model, layers, self._device)
        with self._device.as_current():
            try:
                self.runner = LayeredRunner(self._device, layers, self.shape, kernel.name, self._dtype)
                self._require_memory(self.num_slots, _freed_bytes(model, layers, self._device.torch_device))
                require_host_memory(
                    sum(layer.nbytes for layer in layers),
                    taken_bytes=sum(
                        min(
                            tensor.nbytes, tensor.untyped_storage().nbytes()
                        )  # a weight left out is one number
                        for layer in layers
                        for tensor in layer.tensors().values()
                        if tensor.device.type == "cpu"
                    ),
                    ahead_bytes=max(layer.nbytes for layer in layers),
                )
                self._attachment.attach(self.runner.serve, self)
                self.layers = layers
                self.decoder = Decoder(model, self.runner)
                self.runner.host = self._attachment.host
                self._predictor, self._costs = predictor, costs
                self._predictings = Predictings()
                self.runner.open_slots(self.num_slots, policy)
                self._open_schedule(config, predictor, costs)
                self._place(self._placed(config, frequencies, self.num_slots), config, frequencies)
                self.turn = self.runner.turn
                self.forwards = Forwards(self.runner)
                self.forwards.open(model, layers)
                self.fingerprint = self._attachment.host.fingerprint(
                    repr((type(model).__name__, self.shape, [layer.layout for layer in layers]))
                )
            except BaseException:
                despite_interrupts(self._undo)
                raise

    def _undo(self) -> None:
        """Of an engine that could not be made, or was interrupted on the way; called again, it does what is left."""
        if hasattr(self, "forwards"):
            self.forwards.close()
        self._attachment.detach()
        self._device.close()

    @property
    def expert_size(self) -> ExpertSize:
        """Bytes and sizes of its largest experts."""
        return max(self.layers, key=lambda layer: layer.layout.row_bytes).expert_size

    @property
    def predictor(self) -> Predictor | None:
        """What schedules prefetch by; None without."""
        return self._predictor

    @in_turn("a change of settings")
    @torch.inference_mode(False)
    def configure(
        self,
        *,
        slots: int | float | str | None = None,
        cache: str | None = None,
        decode: str | None = None,
        compiled: bool | None = None,
        frequencies: np.ndarray | None = None,
        predictor: Predictor | Literal["none"] | None = None,
        costs: LayerCosts | None = None,
        profile: HardwareProfile | str | Path | None = None,
        **schedule: Any,
    ) -> None:
        """Change settings between two runs (see `EngineConfig`); after new slots or another cache, slots are cold.
        A schedule brings its own cache, unless one was chosen.

        Args:
            frequencies, predictor, costs: as `load` takes them; those there are stay if none are given. "none" takes
                the predictor away.
            profile: of this machine, its file, or the name of one that comes with prescope: the costs by it, instead
                of those that `prescope.calibrate` saved.
            schedule: schedule, lookahead, width, threshold, cpu_threads; None for the schedule's own.

        Raises: as `load`, and BadProfile or ForeignProfile (it is another machine's); the engine then goes on with its
            former settings.
        """
        self._require_attached()
        if self.forwards.recorders:
            raise UnsupportedOption(
                "a run is under way; change settings after it, or cancel() it first; recover() ends a recording that "
                "an interrupt has left open"
            )
        unknown = schedule.keys() - SCHEDULE_SETTINGS
        if unknown:
            raise UnsupportedOption(
                f"there is no setting {sorted(unknown)[0]!r} to configure; there are slots, cache, decode, compiled, "
                f"frequencies, predictor, costs, profile, {', '.join(sorted(SCHEDULE_SETTINGS))}"
            )
        if profile is not None:
            if costs is not None:
                raise UnsupportedOption(
                    "costs and profile both say what a layer costs here; give one of them"
                )
            costs = self._costs_by(profile)
        given: dict[str, Any] = {"slots": slots, "cache": cache, "decode": decode, "compiled": compiled}
        given = {name: value for name, value in given.items() if value is not None}
        config = replace(self.config, **({"cache": self.chosen_cache} | given), **schedule)
        require_kinds(predictor=None if predictor == "none" else predictor, costs=costs)
        hot = self.frequencies if frequencies is None else require_frequencies(self.shape, frequencies)
        chosen = config.cache
        cache, cache_reason = cache_of(config, hot)
        config = replace(config, cache=cache)
        count, reason = count_slots(config, self.shape, self.layers)
        policy = make_policy(config.cache, self.shape, hot)
        placed = self._placed(config, hot, count)
        if slots is not None:
            self._require_memory(count, self.num_slots * self.shape.row_bytes)
        self._device.synchronize()
        self.decoder.forget_problems()
        if schedule or predictor is not None or costs is not None:
            kept = self._predictor if predictor is None else None if predictor == "none" else predictor
            self._open_schedule(config, kept, costs or self._costs)
        is_new = (
            slots is not None or frequencies is not None or "cache" in given or cache != self.config.cache
        )
        self.config, self.frequencies, self.chosen_cache = config, hot, chosen
        self.reasons["cache"] = cache_reason
        if is_new:
            self._renew_slots(count, reason, policy)
        self._place(placed, config, hot)

    def _renew_slots(self, count: int, reason: str, policy: CachePolicy) -> None:
        """Free all slots, or take another number of them; the former number if so many cannot be had."""
        if count == self.num_slots:
            self.runner.renew_slots(policy)
            self.reasons["slots"] = reason
            return
        self.decoder.forget()
        former = self.num_slots, self.runner.residency.policy
        try:
            self._reopen_slots(count, policy)
            self.num_slots, self.reasons["slots"] = count, reason
        except BaseException:  # an interrupt too: without slots nothing runs
            self.num_slots = former[0]
            despite_interrupts(partial(self._reopen_slots, *former))
            raise

    def _reopen_slots(self, count: int, policy: CachePolicy) -> None:
        self.runner.close_slots()
        self.runner.open_slots(count, policy)

    def _placed(self, config: EngineConfig, frequencies: np.ndarray | None, num_slots: int) -> IntArray:
        """Keys of the experts that are in slots from the start: all if there is room on a GPU, as a model is that fits;
        else those that the schedule places, none where nothing is known of them.
        """
        if self._device.captures_steps and num_slots >= self.shape.total_experts:
            keys = np.arange(self.shape.total_experts)
        elif frequencies is None or not schedule_named(config.schedule).places:
            return NOTHING
        else:
            keys = by_frequency(frequencies)
        layer, expert = np.divmod(keys, self.shape.num_experts)
        num_experts = np.array([one.num_experts for one in self.layers])
        return keys[expert < num_experts[layer]][-num_slots:]

    def _place(self, placed: IntArray, config: EngineConfig, frequencies: np.ndarray | None) -> None:
        """Copy them before a run; they, or what a prompt says beside them, are put back behind each prompt."""
        table = self.runner.residency
        table.placed = placed
        table.begin_prompt()
        table.known_LE = frequencies if schedule_named(config.schedule).heeds_prompt else None
        num_experts = np.array([[layer.num_experts] for layer in self.layers])
        table.exists = (np.arange(self.shape.num_experts) < num_experts).ravel()
        self.runner.put_back()
        self._device.synchronize()

    def _open_schedule(
        self, config: EngineConfig, predictor: Predictor | None, costs: LayerCosts | None
    ) -> None:
        """Take up a schedule; the former one goes on if that fails."""
        former = self.runner.schedule_runner
        if config.schedule == "on-demand":
            self.runner.schedule_runner, self.reasons["schedule"] = None, "as given"
        else:
            known = costs or self._costs_here(config.schedule)
            opened = open_schedule_runner(
                config,
                self.shape,
                self.layers,
                self._attachment.host,
                predictor,
                known,
                self._device.torch_device,
                self._dtype,
                self._predictings,
            )
            opened.force(self.runner.forced)
            self.runner.schedule_runner = opened
            self.reasons["schedule"] = f"as given, by {known.source}"
            if opened.cpu is not None:
                lane = opened.cpu
                self.reasons["cpu"] = f"{lane.implementation}, {lane.threads} threads: {lane.reason}"
        self._predictor, self._costs = predictor, costs
        if former is not None:
            former.close()

    def _costs_here(self, schedule: str) -> LayerCosts:
        """What a layer costs by this machine's profile, at batch 1; from there the planner follows its steps."""
        try:
            return self._costs_by(HardwareProfile.of_this_machine(self._device.describe()))
        except (NoProfile, BadProfile) as error:
            raise UnsupportedOption(
                f"schedule={schedule!r} weighs what copying and computing cost here: {error}. With an engine of "
                f"schedule='on-demand' run prescope.calibrate(engine) once (from a shell: prescope calibrate MODEL), "
                f"or give costs=..."
            ) from error

    def _costs_by(self, profile: HardwareProfile | str | Path) -> LayerCosts:
        """What a layer costs by a profile of this machine."""
        if not isinstance(profile, HardwareProfile | str | Path):
            raise UnsupportedOption(
                f"profile is a {type(profile).__name__}; give a HardwareProfile, its file, or the name of a shipped one"
            )
        found = profile if isinstance(profile, HardwareProfile) else HardwareProfile.load(profile)
        _, width, expert_width = self.expert_size
        return found.behind(self._device.describe()).costs(self.shape, width=width, expert_width=expert_width)

    def _require_memory(self, num_slots: int, freed_bytes: int) -> None:
        """Raise SlotPoolTooLarge unless the slots fit, given what will be freed (or taken, if negative) before."""
        wanted, free = num_slots * self.shape.row_bytes, max(0, self._device.free_bytes() + freed_bytes)
        if wanted > free:
            raise SlotPoolTooLarge(
                f"{num_slots} slots take {format_bytes(wanted)}, the device has {format_bytes(free)} for them; "
                f"use slots={free // self.shape.row_bytes} or fewer"
            )

    # -- runs --------------------------------------------------------------------------------------------------

    @in_turn("a run", is_patient=False)
    @torch.inference_mode(False)
    def generate(
        self,
        prompts: Prompts | None = None,
        *,
        attention_mask: Any = None,
        inputs_embeds: Any = None,
        on_step: Callable[[int], None] | None = None,
        **keywords: Any,
    ) -> RunResult:
        """Generate greedily (or as `keywords` say) and return the text with all evidence.

        One run at a time: another thread's is waited for, until `cancel` or Ctrl-C ends the wait.

        Args:
            prompts: a text or texts; token ids as a list, lists, or an array or tensor (T,) or (B, T); a chat (messages
                with "role" and "content") or chats, by the tokenizer's template; or what a tokenizer returns. Texts
                and lists are padded on the left; a tensor's padding is told by its mask, or as `model.generate` does.
            attention_mask: (B, T), 0 where a token of `prompts` is padding.
            inputs_embeds: (B, T, D) embeddings, instead of ids or beside them.
            on_step: called with the number of tokens so far after each one. It must not wait for the GPU (`.item()`,
                `.cpu()`, `synchronize`): from a graph the next step is under way, and may wait for the host meanwhile.
            keywords: for `model.generate`: max_new_tokens, do_sample, generation_config, stop_strings, ...

        Raises:
            UnsupportedOption: the prompts have none of these forms, one is empty, text comes without a tokenizer, or
                the model has no `generate` of the usual kind.
            CancelledError: `cancel` came while another run was waited for.
            TransferFailed, NotEnoughMemory: a copy failed, or memory ran out; the engine works again afterwards, with
                cold slots.
        """
        self._require_attached()
        return generate(self, prompts, attention_mask, inputs_embeds, on_step, keywords)

    @contextmanager
    def record(self) -> Iterator[list[RunResult]]:
        """Record what this thread does with the model meanwhile; the list holds the `RunResult` (without text) on exit.

        For a model that is driven by its own `generate` or forward:

            with engine.record() as results:
                model.generate(**inputs)
            results[0].metrics
        """
        self._require_attached()
        results: list[RunResult] = []
        with recording(self) as recorder:
            try:
                yield results
            except BaseException:
                is_free = self.turn.holder is None or self.turn.is_mine
                # Else the next forward puts right what this one left; a forked process has nothing to put right.
                if is_free and self._owner == process_id():
                    with self._device.as_current():
                        self.runner.recover()
                raise
            results.append(self.turn.run("the end of a recording", _recorded, (self, recorder)))

    @contextmanager
    def without_events(self, off: bool = True) -> Iterator[None]:
        """Runs inside leave no timeline (counts and routing stay): to measure what the timeline costs."""
        former = self.config
        self.config = replace(former, events=former.events and not off)
        try:
            yield
        finally:
            self.config = former

    # -- state -------------------------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """The settings as resolved, with the reason of each, and the cap on the experts' memory."""
        schedule_runner, problem = self.runner.schedule_runner, self.runner.kernel_problem
        return {
            **self.config.to_dict(),
            **({} if schedule_runner is None else schedule_runner.describe()),
            "num_slots": self.num_slots,
            "slots_gib": self.num_slots * self.shape.row_bytes / 2**30,
            "slots_frac": self.num_slots / sum(layer.num_experts for layer in self.layers),
            "expert_bytes": self.shape.row_bytes,
            "expert_form": self.form or str(self._dtype).removeprefix("torch."),
            "lossy": self.is_lossy,
            "moe": self.shape._asdict(),
            "model": self.name,
            "fingerprint": self.fingerprint,
            "reasons": self.reasons | ({"kernels": f"torch, layer by layer: {problem}"} if problem else {}),
        }

    def hardware(self) -> dict[str, Any]:
        """The machine, its device and link, the weights' dtype and the versions that decide speed."""
        return {
            **machine_facts(),
            **self._device.describe(),
            "label": self._label,
            "decisions": "compiled" if IS_COMPILED else "plain Python, numba is missing",
            "dtype": str(self._dtype).removeprefix("torch."),
        }

    @property
    def _label(self) -> str:
        """Where figures come from, in one line: of packed experts they say so."""
        return f"{self._device.describe()['label']}{self.form_said}"

    @property
    def form_said(self) -> str:
        """What is said of packed experts behind the name of whatever they run on; nothing of plain ones."""
        form = f", {self.form} experts" if self.form else ""
        return f"{form} (lossy)" if self.is_lossy else form

    @in_turn("clear_cache")
    def clear_cache(self) -> None:
        """Empty all slots and forget what cache policy and schedule learned of a text: the next run starts cold. What
        they learned of the machine stays."""
        self._require_attached()
        self._device.synchronize()
        despite_interrupts(self.runner.clear)

    @in_turn("recover")
    def recover(self) -> None:
        """Make the engine usable after an interrupt or a failed copy; the slots are cold afterwards. A recording of
        this thread whose block an interrupt has left without its end is over.

        Raises:
            NotAttached: it is closed, or this process was forked from its own.
            WaitTimedOut: copies that were under way do not end.
        """
        self._require_attached()
        if self.forwards.progress is None:  # else it is that of the run under way, which calls this
            self.forwards.recorders.pop(threading.get_ident(), None)
        self.runner.recover()

    @in_turn("force_routing")
    def force_routing(self, trace: RoutingTrace | None, scores: np.ndarray | None = None) -> None:
        """Route decode steps as a trace does instead of by the model's routers; None ends it.

        For shapes with random weights. Results say so in their notes.

        Args:
            trace: its decode steps hold as many tokens as the batch that is generated.
            scores: (S, L, d, 2, E) predictions of these steps to be used instead of a predictor's own: expected tokens
                and probability of use by layers ahead.

        Raises:
            TraceMismatch: the trace or its scores are of another shape, or it has no decode steps; of a run, that its
                steps have another number of tokens.
            UnsupportedOption: what is given is no trace, or no array.
        """
        self._require_attached()
        forced = None
        if trace is not None:
            forced = ForcedRouting.of_trace(trace, self.shape, self._device.torch_device, scores)
        self.runner.forced = forced
        if self.runner.schedule_runner is not None:
            self.runner.schedule_runner.force(forced)

    def tokens_so_far(self) -> list[list[int]]:
        """New tokens of each sequence of the `generate` under way, for its `on_step`; none when there is none.

        In steps that run layer by layer it waits until the GPU has chosen them.
        """
        progress = self.forwards.progress
        return [] if progress is None else progress.tokens_so_far()

    def cancel(self) -> None:
        """End the running `generate` after the token it is at, which then returns what there is, and give up all waits
        for the engine (they raise CancelledError).
        """
        self.turn.cancel()

    @property
    def is_cancelled(self) -> bool:
        """Whether the run under way was told to end."""
        return self.turn.holder is not None and self.turn.holder.is_cancelled

    @property
    def needs(self) -> dict[NeedOutcome, int]:
        """Hits, late ones and misses since the engine was made."""
        return self.runner.needs

    @property
    def is_closed(self) -> bool:
        """Whether the model has been given back, or is about to be when the run under way has ended."""
        return self._is_closing

    @in_turn("check_integrity")
    def check_integrity(self) -> None:
        """Assert that slots and table agree and that each resident expert's bytes equal its host row's.

        Raises:
            NotAttached: the engine is closed, or this process was forked from its own.
        """
        self._require_attached()
        self.runner.residency.check_integrity()
        self._device.synchronize()
        for slot, key in enumerate(self.runner.residency.key_of.tolist()):
            if key >= 0:
                moe_layer, expert = divmod(key, self.shape.num_experts)
                row = self._attachment.host.row(moe_layer, expert)
                assert torch.equal(self.runner.loader.pool[slot, : len(row)].cpu(), row), (
                    f"slot {slot} does not hold the bytes of expert {expert} of MoE layer {moe_layer}"
                )

    @torch.inference_mode(False)
    def detach(self) -> None:
        """Give the model back as it was, bit for bit; the engine cannot be used afterwards. A second time does nothing.

        While a run is under way, that run ends after the token it is at, and then the model is given back: at once for
        a caller in another thread, who waits for it; behind the run for its own callbacks.

        Raises:
            ForkedProcess: the model's experts are in the process that this one was forked from.
            WaitTimedOut: the run in another thread does not end.
        """
        if self._is_closed:
            return
        require_process(self._owner, "this engine")
        self._is_closing = True
        self.turn.tell()
        if threading.get_ident() in self.forwards.recorders:
            return  # the end of the recording gives back
        if self.turn.is_mine:
            self.turn.afterwards(self.finish_closing)
        else:
            self.turn.run("close", self.finish_closing, is_patient=True, most_s=MOST_TOKEN_S)

    close = detach

    def finish_closing(self) -> None:
        """Give the model back if `close` was called and could not yet; call it when nobody runs."""
        if self._is_closing and not self._is_closed:
            despite_interrupts(self._close_rest)

    def _close_rest(self) -> None:
        """Undo everything, in this order, also if a step fails; interrupted, the next call begins with that step."""
        schedule_runner = self.runner.schedule_runner
        steps: tuple[Callable[[], object], ...] = (
            self._device.recover,
            self.forwards.close,
            self.decoder.forget,
            self.runner.close_slots,
            _ignore if schedule_runner is None else schedule_runner.close,
            self._attachment.detach,
            self._device.close,
        )
        error, is_again = None, False
        while self._num_undone < len(steps):
            try:
                steps[self._num_undone]()
            except Exception as failed:  # noqa: BLE001 - raised behind the last step
                error = failed
                # Once more where it may have been a signal's handler that raised.
                if is_again := not (is_again or isinstance(failed, PrescopeError)):
                    continue
            is_again = False
            self._num_undone += 1
        self._is_closed = True
        if error is not None:
            raise error

    def _give_way(self) -> None:
        """Detach for a new engine of the same model: a cell that attaches was run twice."""
        if self._is_entered or self.forwards.recorders or self.turn.holder is not None:
            what = "inside its 'with' block" if self._is_entered else "in the middle of a run"
            raise AlreadyAttached(
                f"this model already runs through an engine that is {what}; call detach() on that one first"
            )
        self.detach()

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise UnsupportedOption(
            "an engine, and a model while it is attached, cannot be copied or pickled: its slots are this device's. "
            "Call detach() and copy the model, or save it with model.save_pretrained(...)"
        )

    def _require_attached(self) -> None:
        if self._is_closing:
            raise NotAttached(
                "this engine is detached (by detach(), or since its model was attached again); make a new one with "
                "prescope.attach(model) or prescope.load"
            )
        require_process(self._owner, "this engine")

    def __enter__(self) -> Self:
        self._is_entered = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_entered = False
        if self._owner == process_id():  # a process forked inside the block has nothing to give back
            self.detach()

    def _repr_html_(self) -> str:
        shape, size = self.shape, self.shape.row_bytes
        state = "" if self._attachment.host.layers else " (detached)"
        facts = [
            (
                "experts",
                f"{shape.num_layers} MoE layers x {shape.num_experts} of {format_bytes(size)}, top-{shape.top_k}",
            ),
            (
                "slots",
                f"{self.num_slots} = {100 * self.num_slots / shape.total_experts:.0f} % = "
                f"{format_bytes(self.num_slots * size)}",
            ),
            ("schedule", f"{self.config.schedule}, cache {self.config.cache}"),
            ("device", self._label),
        ]
        notes = [self.reasons["experts"]] if "experts" in self.reasons else []
        return facts_html(f"{self.name}{state}", facts, notes)

    def __repr__(self) -> str:
        state = ", detached" if self._is_closing else ""
        packing = f"; {self.reasons['experts']}" if "experts" in self.reasons else ""
        return (
            f"Engine({self.name}: {self.shape.num_layers} MoE layers x {self.shape.num_experts} experts, "
            f"{self.num_slots} slots = {format_bytes(self.num_slots * self.shape.row_bytes)}, "
            f"{self.config.cache}, {self._label}{packing}{state})"
        )


def _ignore() -> None:
    """Nothing is to be undone."""


def _recorded(engine: Engine, recorder: Recorder) -> RunResult:
    """What was recorded of forward passes that nobody told the tokens of.

    Raises:
        NotAttached: another thread has closed the engine meanwhile.
    """
    if engine.forwards.is_closed:
        raise NotAttached(
            "the engine was closed by another thread while it recorded; what was recorded is lost"
        )
    return result_of(
        engine, recorder, {}, batch=recorder.batch, output_tokens=recorder.batch * recorder.num_steps
    )
