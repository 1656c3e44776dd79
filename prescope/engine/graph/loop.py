"""The decoding loop that runs captured steps, at most one ahead of what the host has seen.

While a step runs, the host takes down what the one before said and launches the next one: in small parts, between the
layers that it serves. Behind the last layer that kept the GPU waiting for 430 us a step, before the first up to as long
(H100, docs/log/engine.md). `kernels.graph_kernels._await_served` keeps the next step's messages from overwriting this
one's.
"""

import time
import warnings
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ...core.jit import warming_up
from ...core.worker import PATIENCE_S, despite_interrupts
from ...errors import TransferFailed, UnsupportedOption, WaitTimedOut
from ...kernels import StepLog
from ..layered import LayeredRunner
from ..stopping import RunProgress
from .copy_driver import CopyDriver, SideTasks
from .host_driver import HostDriver
from .sampler import Sampler
from .step import CONTEST, COPY, GPU, HOST, Captured, GraphStep

if TYPE_CHECKING:
    from ...kernels.graph_buffers import DeviceTable

#: Polls between two looks at whether the GPU is still running.
POLLS = 20_000


class Launched(NamedTuple):
    """A step on its way."""

    driver: str
    captured: Captured
    number: int  # in the messages of its buffers
    row: int  # its step in the recording
    started_s: float


class DecodeLoop:
    """A decoding loop for `model.generate(custom_generate=...)` that runs captured steps.

    Args:
        step: for this batch.
        table: the residency table on the GPU.
        only: why a single driver is captured, if it is.
        progress: told of each token.

    Attributes:
        reason: which driver ran, and why.
        num_recorded: graphs that this run has recorded; most find theirs.
    """

    def __init__(
        self,
        step: GraphStep,
        runner: LayeredRunner,
        table: "DeviceTable",
        only: str,
        progress: RunProgress,
    ) -> None:
        self._step, self._runner, self._table, self._only = step, runner, table, only
        self._progress = progress
        self._driver = ""  # whose turn it was last: its table is the true one
        self.reason = self._driver_reason() or "layered: the run ended before a step was captured"
        self.cache = step.cache
        self._scheduled_step = HostDriver(runner)
        self._ordered_step: CopyDriver | None = None
        self.num_recorded = 0

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
        sample = Sampler(logits_processor, generation_config, stopping_criteria, input_ids)
        self._progress.chosen_by(sample.so_far)
        sequences = self._generate(model, input_ids, sample, generation_config, kwargs)
        self._progress.lengths = sample.lengths.tolist()
        return sequences

    def _generate(
        self, model: Any, input_ids: torch.Tensor, sample: Sampler, config: Any, kwargs: dict[str, Any]
    ) -> torch.Tensor:
        outputs = self._prefill(model, input_ids, config, kwargs)
        kwargs = model._update_model_kwargs_for_generation(outputs, kwargs)
        sample.choose(outputs.logits[:, -1])
        del outputs
        is_over = sample.is_done() or self._told(1)
        self._step.prompts.record()  # behind the first token, for the next prompt
        if is_over:
            return sample.sequences()
        inputs = model.prepare_inputs_for_generation(sample.sequences(), next_sequence_length=1, **kwargs)
        self._step.load(inputs)
        num_steps = config.max_length - input_ids.shape[1] - 1
        first = 0
        if not self._step.captured:
            if num_steps == 0:
                return sample.sequences()
            with warming_up() if self._step.compiled else nullcontext():
                logits = self._step.run()
            sample.next(logits, self._step.inputs["input_ids"])
            if sample.is_done() or self._told(2):
                return sample.sequences()
            first = 1
            if num_steps > 1:
                with warming_up():
                    self._capture()
        if num_steps > first:
            self._decode(sample, first, num_steps)
        return sample.sequences()

    def _prefill(self, model: Any, input_ids: torch.Tensor, config: Any, kwargs: dict[str, Any]) -> Any:
        runner, prompts = self._runner, self._step.prompts
        try:
            runner.prompts, prompts.has_replayed = prompts, False
            return model._prefill(input_ids, config, kwargs)
        finally:
            runner.prompts = None

    @property
    def problem(self) -> str:
        """Why steps ran layer by layer though they were to run from a graph; "" if they did."""
        return self._step.problem

    @property
    def has_prompt(self) -> bool:
        """Whether the prompt came from a graph."""
        return self._step.prompts.has_replayed

    @property
    def prompt_problem(self) -> str:
        """Why prompts cannot come from a graph though they could be expected to; "" if they do."""
        return self._step.prompts.problem

    def _driver_reason(self) -> str:
        return f"{self._step.driver}: {self._step.why}" if self._step.driver else ""

    def _told(self, tokens: int) -> bool:
        return self._progress.step(tokens)

    def _capture(self) -> None:
        try:
            self._step.capture(self._table, self._only)
            self.num_recorded = len(self._step.captured)
            self.reason = self._driver_reason()
        except (UnsupportedOption, RuntimeError) as error:
            self._step.captured.clear()
            self._step.problem = f"capturing the step failed ({error})"
            self.reason = f"layered: {self._step.problem}"
            warnings.warn(f"decode steps run layer by layer: {error}", stacklevel=2)

    # -- steps -------------------------------------------------------------------------------------------------

    def _decode(self, sample: "Sampler", first: int, num_steps: int) -> None:
        """Run the steps number `first` to `num_steps` - 1."""
        if not self._step.captured:
            for i in range(first, num_steps):
                sample.next(self._step.run(), self._step.inputs["input_ids"])
                if sample.is_done() or self._told(i + 2):
                    return
            return
        recorder = self._runner.recorder
        all_buffers = [captured.buffers for captured in self._step.captured.values()]
        for buffers in all_buffers:
            buffers.restart()
        self._take_table()
        if recorder is not None and self._step.timed:
            recorder.anchor(*self._runner.device.clock(all_buffers[0].stamp))
        elif recorder is not None:
            recorder.anchor(self._runner.device.mark(True), 0)
        schedule_runner = self._runner.schedule_runner
        if schedule_runner is not None and schedule_runner.predicting is not None:
            aside = self._step.aside
            schedule_runner.predicting.where = f"beside the graph: {aside}" if aside else "in the graph"
        try:
            for buffers in all_buffers:
                if buffers.scheduled is not None:
                    self._scheduled_step.begin(buffers)
                elif buffers.orders:
                    self._ordered_step = CopyDriver(self._runner, buffers)
            # Only here: beside layers that the CPU computes, or launches, threads that wait would be in the way.
            with schedule_runner.awake() if schedule_runner is not None else nullcontext():
                self._runner.is_in_graph = True
                self._run_steps(sample, first, num_steps)
        except BaseException:
            despite_interrupts(self._let_go)
            self._runner.device.recover()
            raise
        finally:
            self._runner.is_in_graph = False
            self._scheduled_step.end()
            self._give_table()

    def _run_steps(self, sample: "Sampler", first: int, num_steps: int) -> None:
        if not sample.greedy:
            for i in range(first, num_steps):
                launched = self._launch()
                self._serve(launched, deque())
                self._finish(launched)
                self._runner.device.synchronize()  # the host chooses, so it waits anyway
                sample.next(launched.captured.logits, self._step.inputs["input_ids"])
                if sample.is_done() or self._told(i + 2):
                    return
            return
        pending: Launched | None = None
        ahead: Launched | None = None
        is_over = False

        def take(former: Launched, tokens: int) -> None:
            nonlocal is_over
            sample.take(self._tokens(former))
            is_over = sample.is_done() or self._told(tokens)

        def launch() -> None:
            nonlocal ahead
            if not is_over:
                ahead = self._launch()

        for i in range(first, num_steps):
            launched, ahead = ahead or self._launch(), None
            side_tasks: SideTasks = deque()
            if pending is not None:
                side_tasks.append(partial(take, pending, i + 1))
            if self._step.driver and i + 1 < num_steps:
                side_tasks.append(launch)
            if pending is not None:
                side_tasks.extend(self._taking_down(pending))
            self._serve(launched, side_tasks)
            if is_over:
                self._drop(launched)
                return
            pending = launched
        if pending is not None:
            sample.take(self._finish(pending))
            self._told(num_steps + 1)

    def _launch(self) -> Launched:
        """Launch the next step."""
        step, recorder = self._step, self._runner.recorder
        if not step.driver:  # a contest
            self._runner.device.synchronize()
        driver = step.driver or CONTEST[sum(map(len, step.times_s.values()))]
        self._turn(driver)
        captured = step.captured[driver]
        buffers = captured.buffers
        started = time.perf_counter()
        row = recorder.begin_logged_step(step.batch) if recorder is not None else -1
        launched = Launched(driver, captured, buffers.launched, row, started)
        buffers.launched += 1
        captured.replay()
        return launched

    def _serve(self, launched: Launched, side_tasks: SideTasks) -> None:
        """Serve a step if the host has to, and do all side tasks."""
        step, driver = self._step, launched.driver
        if driver == HOST:
            self._scheduled_step.run(launched.number, launched.row, side_tasks)
        elif driver == COPY:
            assert self._ordered_step is not None
            self._ordered_step.run(launched.number, side_tasks)
        while side_tasks:
            side_tasks.popleft()()
        if not step.driver:
            self._await(partial(launched.captured.buffers.tokens, launched.number))
            step.times_s[driver].append(time.perf_counter() - launched.started_s)
            step.choose()
            self.reason = self._driver_reason() or f"{driver}: undecided, both are tried in turn"

    def _tokens(self, launched: Launched) -> NDArray[np.int64]:
        found: NDArray[np.int64] = self._await(partial(launched.captured.buffers.tokens, launched.number))
        return found

    def _finish(self, launched: Launched) -> NDArray[np.int64]:
        """Take down what a step says; returns its tokens."""
        tokens = self._tokens(launched)
        for part in self._taking_down(launched):
            part()
        return tokens

    def _taking_down(self, launched: Launched) -> SideTasks:
        """What is to be done about a step that is over, in parts that keep a layer waiting for little."""
        buffers, recorder = launched.captured.buffers, self._runner.recorder
        is_scheduled = buffers.scheduled is not None
        logs: list[StepLog] = []

        def read() -> None:
            logs.append(buffers.log(launched.number))
            if not is_scheduled:  # where the host decides it has counted already
                self._runner.count(logs[0].needs)
            if recorder is not None:
                recorder.log(launched.row, logs[0], is_counted=is_scheduled)

        def learn() -> None:
            self._scheduled_step.learn(launched.number, logs[0])

        return deque([read, learn] if is_scheduled else [read])

    def _drop(self, launched: Launched) -> None:
        """The step launched last: before the host knew that all sequences had ended."""
        buffers = launched.captured.buffers
        self._await(partial(buffers.tokens, launched.number))
        if buffers.scheduled is not None:
            self._scheduled_step.undo(launched.number)
        if self._runner.recorder is not None:
            self._runner.recorder.drop_step()

    def _await(self, poll: Callable[[], Any]) -> Any:
        """Poll a message of the GPU until it is there."""
        begin = time.monotonic()
        while True:
            for _ in range(POLLS):
                if (found := poll()) is not None:
                    return found
            if self._runner.device.is_idle() and poll() is None:
                raise TransferFailed(
                    "the GPU stopped without a message; the CUDA error is above, if there is one"
                )
            if time.monotonic() - begin > PATIENCE_S:
                raise WaitTimedOut(
                    f"the GPU was not done with a decode step within {PATIENCE_S:.0f} s; run again"
                )

    def _let_go(self) -> None:
        """Let steps that still wait for the host run to their end, with whatever weights there are.

        An interrupt in here would leave the GPU waiting for ever, and Ctrl-C is pressed twice: see
        `despite_interrupts`.
        """
        for buffers in (captured.buffers for captured in self._step.captured.values()):
            if buffers.launched and buffers.scheduled is not None:
                self._scheduled_step.abandon(buffers.launched - 1)
            elif buffers.launched and buffers.orders:
                assert self._ordered_step is not None
                self._ordered_step.abandon(buffers.launched - 1)

    # -- whose table is the true one ---------------------------------------------------------------------------

    def _turn(self, driver: str) -> None:
        # In a contest both decide on the GPU, by one table.
        assert HOST not in (self._driver, driver) or self._driver in ("", driver)
        self._driver = driver

    def _take_table(self) -> None:
        self._table.take(self._runner.residency)

    def _give_table(self) -> None:
        """The host's table was not kept while the GPU decided."""
        if self._driver in (GPU, COPY):
            self._table.give(self._runner.residency)
