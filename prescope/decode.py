"""Decode steps that run from one CUDA graph: no launches from Python, no host in the way.

A `DecodeStep` is one decode step of a fixed batch over its own static cache. Its first run is served layer by layer;
then it is captured, once for each *driver*: GPU-driven (the GPU decides and fetches misses itself), copy-engine (the
GPU decides, the host hands its orders to the copy engine) and host-driven (the host decides while the step runs; every
cache policy can). `DecodeLoop` stands in for transformers' decoding loop in
`model.generate` and runs at most one step ahead of what the host has seen.
"""

import time
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from .core import Reason
from .errors import TransferFailed, UnsupportedOption
from .hf import cache_length, compiled_layers, static_cache
from .kernels import DEVICE_POLICIES, StepLog
from .residency import IntArray
from .serving import Serving

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .kernels.captured import CapturedStep, DeviceTable

GPU, COPY, HOST = "gpu-driven", "copy-engine", "host-driven"
#: Order in which two drivers are tried against each other, a step each; the first step of each warms up.
CONTEST = (GPU, COPY, GPU, COPY, COPY, GPU, GPU, COPY, COPY, GPU)
#: Polls between two looks at whether the GPU is still running.
POLLS = 20_000


class Captured(NamedTuple):
    """A step captured for one driver."""

    buffers: "CapturedStep"
    replay: Callable[[], None]
    logits: torch.Tensor  # (B, V), of the last replay


class Launched(NamedTuple):
    """A step on its way."""

    captured: Captured
    number: int  # in the messages of its buffers
    row: int  # its step in the recording


class DecodeStep:
    """One decode step of fixed shapes.

    Args:
        model: attached.
        serving: serves its MoE layers.
        batch: sequences.
        length: tokens the cache must hold.
        drivers: which to capture.
        timed: write stamps for the timeline.
        compiled: compile the decoder layers around the experts.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        serving: Serving,
        *,
        batch: int,
        length: int,
        drivers: Iterable[str],
        timed: bool,
        compiled: bool,
    ) -> None:
        self._model, self._serving = model, serving
        self.batch, self.timed = batch, timed
        self._drivers, self._compiled = list(drivers), compiled
        self.cache = static_cache(model, length)
        self.inputs: dict[str, Any] = {}
        self.captured: dict[str, Captured] = {}
        self.driver = ""  # whose graph runs; both are tried in turn while it is not decided
        self.why = ""
        self.times_s: dict[str, list[float]] = {driver: [] for driver in self._drivers}

    @property
    def length(self) -> int:
        """Tokens the cache has room for."""
        return cache_length(self.cache)

    def load(self, inputs: dict[str, Any]) -> None:
        """Take over what `prepare_inputs_for_generation` gives for one new token per sequence."""
        if not self.inputs:
            self.inputs = {name: _own(value) for name, value in inputs.items()}
            return
        for name, value in inputs.items():
            _refill(name, self.inputs[name], value)

    def run(self) -> torch.Tensor:
        """Run the step now, layer by layer; returns logits (B, V) and advances the inputs to the next token."""
        with compiled_layers(self._model, self._serving.layers, self._compiled):
            logits, _ = self._forward()
        return logits

    def _forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        output = self._model(**self.inputs, return_dict=True)
        logits = output.logits[:, -1]
        tokens = logits.float().argmax(-1)
        self._advance(tokens)
        return logits, tokens

    def _advance(self, tokens: torch.Tensor) -> None:
        """Make the inputs those of the next step."""
        self.inputs["input_ids"].copy_(tokens[:, None])
        if "position_ids" in self.inputs:
            self.inputs["position_ids"].add_(1)
        following = self.cache.get_seq_length().clamp(max=self.length - 1).view(1)
        for mask in _masks(self.inputs.get("attention_mask")):
            mask.index_fill_(-1, following, True if mask.dtype == torch.bool else 0.0)

    def capture(self, table: "DeviceTable", reason: str) -> None:
        """Capture the step for each driver; call after a `run`, when everything is compiled and warm.

        Args:
            reason: why there is one driver only, if so.

        Raises:
            UnsupportedOption, RuntimeError: something in it cannot be captured.
        """
        serving = self._serving
        for driver in self._drivers:
            policy = DEVICE_POLICIES[serving.residency.policy.name] if driver != HOST else 0
            step = table.new_step(
                self.batch, serving.shape.top_k, policy=policy, orders=driver == COPY, timed=self.timed
            )
            self._warm_up(step)
            with compiled_layers(self._model, serving.layers, self._compiled):
                replay, logits = serving.device.capture(partial(self._whole, step))
            self.captured[driver] = Captured(step, replay, logits)
        if len(self._drivers) == 1:
            self.driver, self.why = self._drivers[0], reason

    def _whole(self, step: "CapturedStep") -> torch.Tensor:
        self._serving.captured = step
        try:
            step.begin()
            logits, tokens = self._forward()
            step.finish(tokens)
        finally:
            self._serving.captured = None
        return logits

    def _warm_up(self, step: "CapturedStep") -> None:
        """Tune and compile all kernels: that cannot be done while a graph is captured. Needs nobody's experts."""
        serving, device = self._serving, self._serving.device.torch_device
        for layer, slots, rows in zip(serving.layers, serving.weights, serving.host.layers, strict=True):
            width = slots.up.shape[1 if layer.spec.is_transposed else 2]
            x = torch.zeros((self.batch, width), dtype=slots.up.dtype, device=device)
            nobody = torch.full((self.batch, step.top_k), -1, device=device)
            # Weights in both dtypes that routers give: the kernels differ.
            for dtype in {x.dtype, torch.float32}:
                weights = torch.zeros((self.batch, step.top_k), dtype=dtype, device=device)
                step.tune(x, layer.spec, slots, layer.num_experts)
                step.layer(
                    layer.moe_layer, layer.num_experts, x, nobody, weights, layer.spec, slots, serving.loader.pool,
                    rows.rows,
                )  # fmt: skip
        step.begin()
        step.finish(torch.zeros(self.batch, dtype=torch.int64, device=device))

    def choose(self) -> None:
        """Once both drivers were tried often enough, keep the faster."""
        if sum(map(len, self.times_s.values())) < len(CONTEST):
            return
        medians = {driver: float(np.median(times[1:])) for driver, times in self.times_s.items()}
        self.driver = min(medians, key=lambda driver: medians[driver])
        self.why = " against ".join(f"{median * 1e3:.2f} ms {driver}" for driver, median in medians.items())


def _own(value: Any) -> Any:
    """A copy at an address of our own."""
    if isinstance(value, torch.Tensor):
        return value.clone(memory_format=torch.contiguous_format)
    if isinstance(value, dict):
        return {name: _own(item) for name, item in value.items()}
    return value


def _refill(name: str, target: Any, value: Any) -> None:
    if isinstance(target, torch.Tensor):
        target.copy_(value)
    elif isinstance(target, dict):
        for key, item in value.items():
            _refill(f"{name}.{key}", target[key], item)
    elif target is not value and target != value:
        raise UnsupportedOption(f"{name} is {value!r} now, the step was captured with {target!r}")


def _masks(mask: Any) -> list[torch.Tensor]:
    if mask is None:
        return []
    return [part for part in mask.values() if part is not None] if isinstance(mask, dict) else [mask]


class DecodeLoop:
    """A decoding loop for `model.generate(custom_generate=...)` that runs captured steps.

    Args:
        step: for this batch.
        table: the residency table on the GPU.
        only: why a single driver is captured, if it is.
        on_step: told the number of new tokens after each.
        is_cancelled: asked after each.

    Attributes:
        reason: which driver ran, and why.
    """

    def __init__(
        self,
        step: DecodeStep,
        serving: Serving,
        table: "DeviceTable | None",
        only: str,
        on_step: Callable[[int], None],
        is_cancelled: Callable[[], bool],
    ) -> None:
        self._step, self._serving, self._table, self._only = step, serving, table, only
        self._on_step, self._is_cancelled = on_step, is_cancelled
        self._driver = ""  # whose turn it was last: its table is the true one
        self.reason = self._driver_reason()
        self.cache = step.cache

    @torch.no_grad()
    def __call__(
        self,
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        **kwargs: Any,
    ) -> torch.Tensor:
        config = generation_config
        outputs = model._prefill(input_ids, config, kwargs)
        kwargs = model._update_model_kwargs_for_generation(outputs, kwargs)
        sample = _Sampler(logits_processor, config, stopping_criteria, input_ids)
        sample.choose(outputs.logits[:, -1])
        del outputs
        if sample.is_done() or self._told(1):
            return sample.sequences()
        inputs = model.prepare_inputs_for_generation(sample.sequences(), next_sequence_length=1, **kwargs)
        self._step.load(inputs)
        num_steps = config.max_length - input_ids.shape[1] - 1
        first = 0
        if not self._step.captured:
            if num_steps == 0:
                return sample.sequences()
            sample.next(self._step.run(), self._step.inputs["input_ids"])
            if sample.is_done() or self._told(2):
                return sample.sequences()
            first = 1
            if self._table is not None and num_steps > 1:
                self._capture()
        if num_steps > first:
            self._decode(sample, first, num_steps)
        return sample.sequences()

    def _driver_reason(self) -> str:
        return f"{self._step.driver}: {self._step.why}" if self._step.driver else ""

    def _told(self, tokens: int) -> bool:
        self._on_step(tokens)
        return self._is_cancelled()

    def _capture(self) -> None:
        assert self._table is not None
        try:
            self._step.capture(self._table, self._only)
            self.reason = self._driver_reason()
        except (UnsupportedOption, RuntimeError) as error:
            self._step.captured.clear()
            self.reason = f"layered: capturing the step failed ({error})"
            warnings.warn(f"decode steps run layer by layer: {error}", stacklevel=2)

    # -- steps -------------------------------------------------------------------------------------------------

    def _decode(self, sample: "_Sampler", first: int, num_steps: int) -> None:
        """Run the steps number `first` to `num_steps` - 1."""
        if not self._step.captured:
            for i in range(first, num_steps):
                sample.next(self._step.run(), self._step.inputs["input_ids"])
                if sample.is_done() or self._told(i + 2):
                    return
            return
        recorder = self._serving.recorder
        for captured in self._step.captured.values():
            captured.buffers.restart()
        self._take_table()
        if recorder is not None and self._step.timed:
            recorder.anchor(*self._serving.device.clock(captured.buffers.stamp))
        elif recorder is not None:
            recorder.anchor(self._serving.device.mark(True), 0)
        try:
            self._run_steps(sample, first, num_steps)
        except BaseException:
            self._abandon()
            raise
        finally:
            self._give_table()

    def _run_steps(self, sample: "_Sampler", first: int, num_steps: int) -> None:
        pending: Launched | None = None
        for i in range(first, num_steps):
            launched = self._launch()
            if not sample.greedy:
                self._finish(launched)
                self._serving.device.synchronize()  # the host chooses, so it waits anyway
                sample.next(launched.captured.logits, self._step.inputs["input_ids"])
                if sample.is_done() or self._told(i + 2):
                    return
                continue
            if pending is not None:
                sample.take(self._finish(pending).tokens)
                if sample.is_done() or self._told(i + 1):
                    self._drop(launched)
                    return
            pending = launched
        if pending is not None:
            sample.take(self._finish(pending).tokens)
            self._told(num_steps + 1)

    def _launch(self) -> Launched:
        """Launch the next step, and serve it if the host has to."""
        step, recorder = self._step, self._serving.recorder
        contest = not step.driver
        if contest:
            self._serving.device.synchronize()
        driver = step.driver or CONTEST[sum(map(len, step.times_s.values()))]
        self._turn(driver)
        captured = step.captured[driver]
        buffers = captured.buffers
        started = time.perf_counter()
        row = recorder.begin_logged_step(step.batch) if recorder is not None else -1
        launched = Launched(captured, buffers.launched, row)
        buffers.launched += 1
        captured.replay()
        if driver == HOST:
            self._answer(buffers, launched.number)
        elif driver == COPY:
            self._obey(buffers, launched.number)
        if contest:
            self._await(partial(buffers.tokens, launched.number))
            step.times_s[driver].append(time.perf_counter() - started)
            step.choose()
            self.reason = self._driver_reason() or f"{driver}: undecided, both are tried in turn"
        return launched

    def _finish(self, launched: Launched) -> StepLog:
        buffers = launched.captured.buffers
        self._await(partial(buffers.tokens, launched.number))
        log = buffers.log(launched.number)
        if buffers.policy:  # where the host decides it has counted already
            self._serving.count(log.needs)
        if self._serving.recorder is not None:
            self._serving.recorder.log(launched.row, log)
        return log

    def _drop(self, launched: Launched) -> None:
        """A step that was launched before the host knew that all sequences had ended."""
        self._await(partial(launched.captured.buffers.tokens, launched.number))
        if self._serving.recorder is not None:
            self._serving.recorder.drop_step()

    def _await(self, poll: Callable[[], Any]) -> Any:
        """Poll a message of the GPU until it is there."""
        while True:
            for _ in range(POLLS):
                if (found := poll()) is not None:
                    return found
            if self._serving.device.is_idle() and poll() is None:
                raise TransferFailed(
                    "the GPU stopped without a message; the CUDA error is above, if there is one"
                )

    # -- the host's part ---------------------------------------------------------------------------------------

    def _answer(self, captured: "CapturedStep", number: int) -> None:
        """Serve the misses of all layers of a step that is running."""
        serving = self._serving
        recorder = serving.recorder
        timed = recorder is not None and recorder.timed
        for layer in serving.layers:
            moe_layer = layer.moe_layer
            ids, weights = self._await(partial(captured.choice, moe_layer, number))
            need = serving.find(layer, ids, serving.weight_sums(layer, ids, weights))
            if not need.num_misses:
                continue
            found, missing = need.experts[: -need.num_misses], need.experts[-need.num_misses :]
            keys, slots = self._take_slots(moe_layer, found, missing)
            taken = slots[-need.num_misses :]
            # The first copy runs while the host prepares the others: the link is idle until it is issued.
            transfers = [
                transfer
                for part in (slice(0, 1), slice(1, None))
                if len(missing[part])
                for transfer in serving.loader.load(
                    moe_layer, missing[part], taken[part], Reason.ON_DEMAND, timed
                )
            ]
            serving.device.send([captured.answer(moe_layer, number, keys, slots)], None)
            serving.residency.landed(taken)
            if recorder is not None:
                recorder.transfers(transfers)

    def _obey(self, captured: "CapturedStep", number: int) -> None:
        """Copy what the GPU orders for each layer of a step that is running."""
        device, host, loader = self._serving.device, self._serving.host, self._serving.loader
        for layer in self._serving.layers:
            moe_layer = layer.moe_layer
            orders = self._await(partial(captured.order, moe_layer, number))
            if orders:
                nbytes = layer.layout.row_bytes
                # One by one, so that the first copy is under way while the others are prepared.
                pairs = ((loader.slot(slot, nbytes), host.row(moe_layer, expert)) for expert, slot in orders)
                device.send(pairs, captured.acknowledgement(moe_layer, number))

    def _take_slots(self, moe_layer: int, found: IntArray, missing: IntArray) -> tuple[IntArray, IntArray]:
        """Slots for the missing experts; returns the changed keys and their slots, evicted ones (-1) first."""
        residency = self._serving.residency
        before = residency.key_of.copy()
        residency.protect(residency.slots_for(moe_layer, found))
        slots = residency.take(moe_layer, missing)
        residency.unprotect()
        evicted = before[slots]
        evicted = evicted[evicted >= 0]
        keys = np.concatenate([evicted, residency.key_of[slots]])
        return keys, np.concatenate([np.full(len(evicted), -1), slots])

    def _abandon(self) -> None:
        """Let a host-driven step that is still waiting run to its end, with whatever weights there are."""
        nothing = np.empty(0, dtype=np.int64)
        for buffers in (captured.buffers for captured in self._step.captured.values()):
            if (buffers.orders or not buffers.policy) and buffers.launched:
                for layer in self._serving.layers:
                    answer = buffers.answer(layer.moe_layer, buffers.launched - 1, nothing, nothing)
                    self._serving.device.send([answer], None)
        self._serving.device.recover()

    # -- whose table is the true one ---------------------------------------------------------------------------

    def _turn(self, driver: str) -> None:
        # In a contest both decide on the GPU, by one table.
        assert HOST not in (self._driver, driver) or self._driver in ("", driver)
        self._driver = driver

    def _take_table(self) -> None:
        assert self._table is not None
        self._table.take(self._serving.residency)

    def _give_table(self) -> None:
        """The host's table was not kept while the GPU decided."""
        if self._driver in (GPU, COPY) and self._table is not None:
            self._table.give(self._serving.residency)


class _Sampler:
    """Chooses tokens as transformers' `_sample` does, and keeps the sequences.

    Greedily, without processors and criteria of the user's own, the graph has chosen already (`greedy`), and the host
    only keeps what it is told.
    """

    def __init__(self, processors: Any, config: Any, criteria: Any, input_ids: torch.Tensor) -> None:
        self._processors, self._sampled, self._criteria = processors, bool(config.do_sample), criteria
        eos = config._eos_token_tensor
        self._ends = set(eos.tolist()) if eos is not None else set()
        pad = config._pad_token_tensor
        self._pad = int(pad) if pad is not None else 0
        self._prompt = input_ids
        self._rows: list[torch.Tensor] = []  # (B,) each, on the host
        self._unfinished = np.ones(input_ids.shape[0], dtype=bool)
        own = {"MaxLengthCriteria", "EosTokenCriteria"}
        self.greedy = (
            not self._sampled and not len(processors) and {type(c).__name__ for c in criteria} <= own
        )

    def next(self, logits: torch.Tensor, target: torch.Tensor) -> None:
        """Choose from logits (B, V) and write the choice where the next step reads it, (B, 1)."""
        target.copy_(self.choose(logits)[:, None])

    def choose(self, logits: torch.Tensor) -> torch.Tensor:
        """Choose tokens (B,) from logits (B, V) and keep them."""
        scores = self._processors(self.sequences(), logits.to(copy=True, dtype=torch.float32))
        if self._sampled:
            tokens = torch.multinomial(scores.softmax(-1), num_samples=1).squeeze(1)
        else:
            tokens = scores.argmax(-1)
        return self.take(tokens.cpu().numpy())

    def take(self, tokens: np.ndarray) -> torch.Tensor:
        """Keep one token per sequence (B,); sequences that have ended get padding."""
        kept = np.where(self._unfinished, tokens, self._pad)
        self._rows.append(torch.from_numpy(kept))
        self._unfinished &= ~np.isin(kept, list(self._ends)) if self._ends else True
        return self._rows[-1]

    def is_done(self) -> bool:
        """Whether all sequences have ended."""
        if not self.greedy:
            self._unfinished &= ~self._criteria(self.sequences(), None).cpu().numpy()
        return not self._unfinished.any()

    def sequences(self) -> torch.Tensor:
        """(B, prompt + new tokens) on the model's device."""
        if not self._rows:
            return self._prompt
        new = torch.stack(self._rows, dim=1).to(self._prompt.device)
        return torch.cat([self._prompt, new], dim=1)
