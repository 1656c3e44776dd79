"""Every forward pass of an attached model, whoever calls it: its turn, what it is, and who records it.

The model's own forward is wrapped, since a hook behind it is not called when it ends in a `KeyboardInterrupt`. So are
the modules between the model and its MoE layers that can be called alone, such as `model.model`.
"""

import inspect
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial, wraps
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.generation.continuous_batching import PagedAttentionCache

from ..errors import UnsupportedOption
from ..hf import MoELayer
from .layered import LayeredRunner
from .positions import Forward, forward_of
from .recorder import Recorder
from .stopping import RunProgress


class Forwards:
    """Takes a turn for each forward pass of a model, and tells the runner and the recorder what it is.

    Args:
        runner: serves its MoE layers.

    Attributes:
        recorders: of the recordings that are open, by the thread that opened each; it records that thread's forwards.
        progress: of the `Engine.generate` that has the turn, if one has.
    """

    def __init__(self, runner: LayeredRunner) -> None:
        self._runner = runner
        self.recorders: dict[int, Recorder] = {}
        self.progress: RunProgress | None = None
        self._is_inside = False
        self._is_open = True
        self._wrapped: list[tuple[nn.Module, MethodType, Any]] = []
        self._depth: Callable[[], int | None] = lambda: None
        self._whole_depth: int | None = None

    def open(self, model: PreTrainedModel, layers: list[MoELayer]) -> None:
        """Wrap an attached model's forward; `close` undoes it, also when this was interrupted."""
        self._depth = partial(depth_of, model)
        self._whole_depth = self._depth()
        for name in _callable_alone(layers):
            self._wrap(model.get_submodule(name))

    def _wrap(self, module: nn.Module) -> None:
        plain = type(module).forward
        former = module.__dict__.get("forward")  # one that accelerate has put there, say
        names = list(inspect.signature(plain).parameters)[1:]

        # A method and not a closure over the module: a copy of the module must run its own.
        @torch.compiler.disable(recursive=False)
        @wraps(plain)
        def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            inner = former or partial(plain, module)
            if not self._is_open or self._runner.is_capturing:
                return inner(*args, **kwargs)
            return self._runner.turn.run("a forward pass", self._run, (inner, names, args, kwargs))

        wrapper = MethodType(forward, module)
        self._wrapped.append((module, wrapper, former))
        module.__dict__["forward"] = wrapper

    @torch.compiler.disable(recursive=False)
    def _run(
        self,
        inner: Callable[..., Any],
        names: Sequence[str],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        if self._is_inside or not self._is_open:
            return inner(*args, **kwargs)
        former = self._runner.recorder
        self._is_inside = True
        try:
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            forward, prompts = self._begin(given), self._runner.prompts
            if forward is not None and prompts is not None and prompts.takes(forward, given):
                output = prompts.run(forward, given)
                self._runner.read_routing()
                prompts.tell(self._runner.recorder)
            else:
                output = inner(*args, **kwargs)
                self._runner.read_routing()
            if self._runner.is_prefill:
                self._runner.put_back()
            return output
        finally:
            self._is_inside = False
            self._runner.recorder = former
            if self._runner.schedule_runner is not None:
                self._runner.schedule_runner.end_forward()

    @torch.compiler.disable
    def _begin(self, given: Mapping[str, Any]) -> Forward | None:
        runner = self._runner
        if runner.is_in_graph:
            raise UnsupportedOption(
                "the model was called from on_step while its decode steps run from a graph; attach it with "
                "decode='layered' for that"
            )
        runner.forget_unread()
        runner.recorder = recorder = self.recorders.get(threading.get_ident())
        forward = forward_of(
            given,
            None if self.progress is None else self.progress.num_tokens > 0,
            None if recorder is None else recorder.rereading,
            is_draft=self._depth() != self._whole_depth,
        )
        if forward is None:
            runner.recorder = None
            return None
        if self.progress is not None:
            self.progress.has_run = True
        # Who keeps no cache reads the whole text again for every token: that is a prompt to the schedules.
        runner.is_prefill = forward.phase == "prefill" or forward.past == 0
        if runner.is_prefill:
            runner.residency.begin_prompt()
        if runner.schedule_runner is not None:
            runner.schedule_runner.begin_forward(forward, runner.is_prefill)
        if not runner.is_prefill and runner.forced is not None:
            if forward.length > 1:
                raise UnsupportedOption(
                    "decode steps are routed by a trace, one token of each sequence at a time; a draft's tokens "
                    "cannot be verified with it: end it with force_routing(None)"
                )
            runner.forced.require(forward.batch)
            runner.forced.advance()
        if recorder is not None:
            recorder.begin_step(forward)
        for other in list(self.recorders.values()):  # other threads open theirs meanwhile
            if other is not recorder:
                other.num_foreign += 1
                other.num_batched += isinstance(given.get("cache"), PagedAttentionCache)
        return forward

    @property
    def is_closed(self) -> bool:
        """Whether the modules have their own forward back."""
        return not self._is_open

    def close(self) -> None:
        """Give the modules their own forward back; called again, it does nothing."""
        self._is_open = False
        for module, wrapper, former in self._wrapped:
            if module.__dict__.get("forward") is not wrapper:
                continue  # somebody has wrapped it since, and ours does nothing any more
            if former is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = former
        self._wrapped = []


def depth_of(model: PreTrainedModel) -> int | None:
    """Layers that a forward goes through: transformers says fewer there while the first ones make a draft."""
    depth: int | None = getattr(model.base_model.config, "num_hidden_layers", None)
    return depth


def restore_depth(model: PreTrainedModel, depth: int | None) -> None:
    """Put back what `depth_of` was before a run: transformers leaves it when a draft is interrupted."""
    if depth is not None and depth_of(model) != depth:
        model.base_model.config.num_hidden_layers = depth


def _callable_alone(layers: list[MoELayer]) -> list[str]:
    """Names of the modules above the lists of decoder layers, "" for the model itself."""
    names = {""}
    for layer in layers:
        above = layer.name.partition(f".{layer.decoder_layer}.")[
            0
        ]  # "model.layers", or the experts' own name
        parts = above.split(".")[:-1]
        names.update(".".join(parts[: i + 1]) for i in range(len(parts)))
    return sorted(names)
