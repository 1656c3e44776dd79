"""Which way a run's decode steps go, and why; keeps the captured steps of an engine."""

import warnings
from collections.abc import Collection
from typing import TYPE_CHECKING, Any, NamedTuple

from ...cache.policies import POLICIES
from ...errors import UnsupportedOption
from ...hf import addresses_of, bucket_of, has_hooks
from ...kernels import MOST_PAIRS, make_device_table
from ..config import EngineConfig
from ..layered import LayeredRunner
from ..stopping import RunProgress
from .loop import DecodeLoop
from .step import COPY, GPU, HOST, GraphStep

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ...kernels.graph_buffers import DeviceTable

#: Captured steps that are kept, and the memory that caches of those not in use may take together, bytes. The one used
#: longest ago goes first.
MOST_STEPS, MOST_BYTES = 6, 2 << 30
#: A step whose cache is at most so many times as long as needed is used rather than another one captured: that takes
#: about as long as some ten tokens, but attention reads the whole cache in each step.
MOST_TOO_LONG = 2
#: Reasons that whoever set the engine up has chosen: they need not be told.
ASKED_FOR = {"as given", "graphs need CUDA"}
#: Settings of `generate` that captured steps understand; with others transformers' own loop runs.
KEYWORDS = {
    "do_sample", "max_length", "max_new_tokens", "min_length", "min_new_tokens", "bos_token_id", "pad_token_id",
    "eos_token_id", "temperature", "top_k", "top_p", "min_p", "repetition_penalty",
}  # fmt: skip


class Baked(NamedTuple):
    """What a captured step holds for good, besides its cache's length and the addresses of the slots.

    Whatever else is set (costs, threads of the CPU lane, width, threshold, the cache policy where the host decides)
    is read by the host while steps run.
    """

    batch: int
    drivers: tuple[str, ...]
    timed: bool
    keeps_inputs: bool
    compiled: bool
    policy: int  # of the cache, where the GPU decides; else 0
    has_cpu: bool
    predicting: int  # its id, 0 for none
    forced: int  # the same of the trace that routes


class Kept(NamedTuple):
    """A captured step, what it holds, and the objects behind that, so that their ids stay theirs."""

    baked: Baked
    step: GraphStep
    behind: tuple[Any, ...]


class Decoder:
    """The captured steps of one engine: by what is baked into them, the one used last at the end.

    Args:
        model: attached.
        runner: serves its MoE layers.
    """

    def __init__(self, model: "PreTrainedModel", runner: LayeredRunner) -> None:
        self._model, self._runner = model, runner
        self._kept: list[Kept] = []
        self._addresses = 0  # of the model they were captured from
        self._table: DeviceTable | None = None
        self._said: set[str] = set()

    def loop(
        self,
        config: EngineConfig,
        batch: int,
        length: int | None,
        names: Collection[str],
        progress: RunProgress,
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
        """The shortest step that there is for such a run, or a new one."""
        if (addresses := addresses_of(self._model)) != self._addresses:
            self._kept.clear()
            self._addresses = addresses
        baked, behind = self._baked(config, batch, drivers)
        most = MOST_TOO_LONG * bucket_of(length, batch)
        fitting = [kept for kept in self._kept if kept.baked == baked and length <= kept.step.length <= most]
        if fitting:
            kept = min(fitting, key=lambda kept: kept.step.length)
        else:
            step = GraphStep(
                self._model,
                self._runner,
                batch=batch,
                length=length,
                drivers=drivers,
                timed=config.events,
                keeps_inputs=config.record_inputs,
                compiled=config.compiled,
            )
            kept = Kept(baked, step, behind)
        self._kept = [*self._within_bounds(kept), kept]
        return kept.step

    def _within_bounds(self, used: Kept) -> list[Kept]:
        """The steps that stay beside the one that is used, in their order."""
        others, room, stay = [kept for kept in self._kept if kept is not used], MOST_BYTES, list[Kept]()
        for kept in reversed(others[1 - MOST_STEPS :]):
            room -= kept.step.nbytes
            if room < 0:
                break
            stay.insert(0, kept)
        return stay

    def _baked(self, config: EngineConfig, batch: int, drivers: list[str]) -> tuple[Baked, tuple[Any, ...]]:
        schedule_runner, forced = self._runner.schedule_runner, self._runner.forced
        is_host = drivers == [HOST]
        predicting = schedule_runner.predicting if schedule_runner is not None and is_host else None
        baked = Baked(
            batch=batch,
            drivers=tuple(drivers),
            timed=config.events,
            keeps_inputs=config.record_inputs,
            compiled=config.compiled,
            policy=0 if is_host else self._runner.residency.policy.kind,
            has_cpu=is_host and schedule_runner is not None and schedule_runner.cpu is not None,
            predicting=0 if predicting is None else id(predicting),
            forced=0 if forced is None else id(forced),
        )
        return baked, (predicting, forced)

    def describe(self) -> dict[str, int]:
        """Captured steps that are kept, and the memory of their caches."""
        return {"kept": len(self._kept), "cache_bytes": sum(kept.step.nbytes for kept in self._kept)}

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
        self._kept.clear()
        self._table = None

    def forget_problems(self) -> None:
        """Settings have changed: what could not be captured is tried again."""
        self._kept = [kept for kept in self._kept if not kept.step.problem]
