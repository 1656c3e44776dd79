"""Which way a run's decode steps go, and why; keeps the captured steps of an engine."""

import warnings
from collections.abc import Collection
from typing import TYPE_CHECKING

from ...cache.policies import POLICIES
from ...errors import UnsupportedOption
from ...hf import addresses_of, has_hooks
from ...kernels import MOST_PAIRS, make_device_table
from ..config import EngineConfig
from ..layered import LayeredRunner
from ..stopping import Progress
from .loop import DecodeLoop
from .step import COPY, GPU, HOST, GraphStep

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ...kernels.graph_buffers import DeviceTable

#: Captured steps that are kept, of different batch sizes.
MOST_STEPS = 4
#: Reasons that whoever set the engine up has chosen: they need not be told.
ASKED_FOR = {"as given", "graphs need CUDA", "router inputs are recorded"}
#: Settings of `generate` that captured steps understand; with others transformers' own loop runs.
KEYWORDS = {
    "do_sample", "max_length", "max_new_tokens", "min_length", "min_new_tokens", "bos_token_id", "pad_token_id",
    "eos_token_id", "temperature", "top_k", "top_p", "min_p", "repetition_penalty",
}  # fmt: skip


class Decoder:
    """The captured steps of one engine.

    Args:
        model: attached.
        serving: serves its MoE layers.
    """

    def __init__(self, model: "PreTrainedModel", runner: LayeredRunner) -> None:
        self._model, self._runner = model, runner
        self._steps: dict[int, GraphStep] = {}  # by batch
        self._addresses = 0  # of the model they were captured from
        self._table: DeviceTable | None = None
        self._said: set[str] = set()

    def loop(
        self,
        config: EngineConfig,
        batch: int,
        length: int | None,
        names: Collection[str],
        progress: Progress,
    ) -> DecodeLoop | str:
        """A loop that runs captured steps, or the reason why transformers' own loop runs, layer by layer.

        Args:
            length: most tokens of a sequence, prompt included; None if the call does not say.
            names: of all settings of `model.generate` that are not its defaults, and of its other arguments.
        """
        reason = self._why_layered(config, batch, length, names)
        if not reason:
            assert length is not None
            drivers, only = self._drivers(config)
            try:
                step = self._step(config, batch, length, drivers)
                reason = step.problem
            except UnsupportedOption as error:
                reason = str(error)
        if reason:
            self._say(config.decode, reason)
            return f"layered: {reason}"
        if self._table is None:
            runner = self._runner
            self._table = make_device_table(
                runner.shape, runner.residency.num_slots, runner.device.torch_device
            )
        step.cache.reset()
        return DecodeLoop(step, self._runner, self._table, only, progress)

    def _say(self, decode: str, reason: str) -> None:
        """Warn that steps do not run from a graph, which costs most of the speed: once, unless it was asked for."""
        if decode == "layered" or (decode == "auto" and reason in ASKED_FOR | self._said):
            return
        self._said.add(reason)
        warnings.warn(f"decode={decode!r}: decode steps run layer by layer: {reason}", stacklevel=9)

    def _step(self, config: EngineConfig, batch: int, length: int, drivers: list[str]) -> GraphStep:
        """The step for this batch, made anew if the one there is too short or of other settings."""
        if (addresses := addresses_of(self._model)) != self._addresses:
            self._steps.clear()
            self._addresses = addresses
        step = self._steps.get(batch)
        if step is not None and step.length >= length and step.timed == config.events:
            return step
        self._steps.pop(batch, None)
        if len(self._steps) >= MOST_STEPS:
            self._steps.pop(next(iter(self._steps)))
        self._steps[batch] = step = GraphStep(
            self._model,
            self._runner,
            batch=batch,
            length=length,
            drivers=drivers,
            timed=config.events,
            compiled=config.compiled,
        )
        return step

    def _drivers(self, config: EngineConfig) -> tuple[list[str], str]:
        """Which drivers to capture steps for, and why it is one only."""
        if self._runner.schedule_runner is not None:
            return [HOST], f"schedule={config.schedule!r} is the host's"
        if config.decode in (GPU, COPY, HOST):
            return [config.decode], "as given"
        if not POLICIES[config.cache].runs_on_gpu:
            return [HOST], f"cache={config.cache!r} needs the host"
        if config.link_factor > 1:
            return [COPY], f"link_factor={config.link_factor} is the copy engine's"
        if self._runner.residency.num_slots >= sum(layer.num_experts for layer in self._runner.layers):
            return [GPU], "all experts have slots"
        return [GPU, COPY], ""

    def _why_layered(
        self, config: EngineConfig, batch: int, length: int | None, names: Collection[str]
    ) -> str:
        """Why decode steps cannot run from a graph in this run; "" if they can."""
        shape, num_slots = self._runner.shape, self._runner.residency.num_slots
        needed = min(shape.num_experts, batch * shape.top_k)
        other = sorted(set(names) - KEYWORDS)
        schedule_runner = self._runner.schedule_runner
        has_norms = any(layer.spec.post_norm is not None for layer in self._runner.layers)
        checks = [
            (
                schedule_runner is not None and schedule_runner.cpu is not None and has_norms,
                "a norm follows the experts, and those on the CPU would miss it",
            ),
            (config.decode == "layered", "as given"),
            (not self._runner.device.captures_steps, "graphs need CUDA"),
            (config.kernels != "triton", f"kernels={config.kernels!r} cannot be captured"),
            (config.record_inputs, "router inputs are recorded"),
            (has_hooks(self._model), "hooks are registered on modules, and graphs do not call them"),
            (
                config.decode in (GPU, COPY) and not POLICIES[config.cache].runs_on_gpu,
                f"cache={config.cache!r} needs the host",
            ),
            (needed > num_slots, f"a layer may need {needed} experts at once, there are {num_slots} slots"),
            (batch * shape.top_k > MOST_PAIRS, f"more than {MOST_PAIRS} pairs of token and expert"),
            (length is None, "max_new_tokens is not given"),
            (bool(other), f"generate has {', '.join(other)}"),
        ]
        return next((reason for holds, reason in checks if holds), "")

    def forget(self) -> None:
        """Drop all graphs: they hold the addresses of slots that are about to go."""
        self._steps.clear()
        self._table = None
