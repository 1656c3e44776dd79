"""Short prompts from a graph, where all experts have slots: nobody is asked on the way, and launching takes longest.

On an H200 a prompt of 64 tokens keeps the GPU busy for 8 ms in 16 layers, and took 36 ms: 1,336 kernels launched from
Python (docs/log/engine.md). A graph has fixed shapes, so prompts are filled up on the right, to powers of two. No token
sees one behind it, no expert is chosen for what was filled up, and the next tokens take its places in the cache.

Shapes: B sequences, T tokens of the prompt, F of a filled one, L MoE layers, E experts, K top-k, V vocabulary.
"""

import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional
from transformers import StaticCache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import ModelOutput

from ...core.jit import warming_up
from ...core.units import format_bytes
from ...device import Mark
from ...errors import UnsupportedOption
from ...hf import longest_prompt
from ...kernels import CannotLaunch, ExpertsSpec, LayerWeights, combine
from ..layered import LayeredRunner, Unread
from ..positions import Forward
from ..recorder import Recorder
from .inputs import fits, own, refill

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Tokens of a filled prompt: fewer are filled up to the least. At the most, B * F, launching and computing take alike.
LEAST_FILLED, MOST_FILLED = 16, 2048
#: Bytes that must be free on the device: a graph keeps what a prompt's intermediate tensors take, some hundred MB.
LEAST_ROOM = 1 << 30
#: Graphs of one cache that are kept; the one used longest ago goes first.
MOST_PROMPTS = 4
#: What a prompt's forward may be given besides tokens, for it to be known what filling up does to it.
KNOWN = {
    "input_ids",
    "attention_mask",
    "position_ids",
    "past_key_values",
    "use_cache",
    "logits_to_keep",
    "return_dict",
}
#: Of those, what has nothing to do with tokens, and the only value that is taken.
FIXED = {"use_cache": True, "logits_to_keep": 1, "return_dict": True}


def filled_length(length: int) -> int:
    """Tokens F that a prompt of T is filled up to."""
    return max(LEAST_FILLED, 1 << (length - 1).bit_length())


class PromptBuffers:
    """What the MoE layers of one filled prompt read and write at fixed addresses.

    Args:
        runner: serves them.
        batch, length: B and F.
        timed: leave marks for the timeline.

    Attributes:
        marks: of each layer in turn: its number, when it was routed, when it was computed.
    """

    def __init__(self, runner: LayeredRunner, batch: int, length: int, timed: bool) -> None:
        shape, device = runner.shape, runner.device.torch_device
        self._runner, self._timed, self._batch, self._length = runner, timed, batch, length
        tokens = batch * length
        self._ids_LTK = torch.empty((shape.num_layers, tokens, shape.top_k), dtype=torch.int64, device=device)
        self._weights: dict[int, torch.Tensor] = {}  # (B * F, K) by layer, in the dtype that its router gives
        self._slots_LE = torch.empty((shape.num_layers, shape.num_experts), dtype=torch.int32, device=device)
        self._versions = np.full(shape.num_layers, -1)
        self.is_filling = torch.zeros((tokens, 1), dtype=torch.bool, device=device)
        self.marks: list[tuple[int, Mark, Mark]] = []

    def prepare(self, length: int) -> None:
        """Take over where the experts are, and how many of the tokens are real (T of F)."""
        table = self._runner.residency
        if (self._versions != table.versions).any():
            rows = np.stack([table.row(layer) for layer in range(len(self._slots_LE))]).astype(np.int32)
            self._slots_LE.copy_(torch.from_numpy(rows))
            self._versions = table.versions.copy()
        is_filling = self.is_filling.view(self._batch, self._length)
        is_filling[:, :length], is_filling[:, length:] = False, True

    def begin(self) -> None:
        """The forward pass begins, or its launches are taken down."""
        self.marks = []

    def layer(
        self,
        moe_layer: int,
        num_experts: int,
        x_TD: torch.Tensor,
        ids_TK: torch.Tensor,
        weights_TK: torch.Tensor,
        spec: ExpertsSpec,
        slots: LayerWeights,
        pool: torch.Tensor,
        host_rows: torch.Tensor,
    ) -> torch.Tensor:
        """All launches of one MoE layer; as `GraphBuffers.layer`, but nothing is fetched. Returns (B * F, D)."""
        routed = self._mark()
        ids = self._ids_LTK[moe_layer]
        ids.copy_(ids_TK)
        ids.masked_fill_(self.is_filling, num_experts)
        if moe_layer not in self._weights:
            self._weights[moe_layer] = torch.empty_like(weights_TK)
        self._weights[moe_layer].copy_(weights_TK)
        out_PD = self._runner.kernel.run_unread(
            x_TD, ids, spec, slots, self._slots_LE[moe_layer, :num_experts]
        )
        out = combine(out_PD, weights_TK, x_TD.dtype)
        if routed is not None:
            self.marks.append((moe_layer, routed, self._runner.device.graph_mark()))
        return out

    def _mark(self) -> Mark | None:
        return self._runner.device.graph_mark() if self._timed else None

    def unread(self, length: int) -> list[Unread]:
        """The routing of the real tokens, T of F, in the order of the layers."""

        def real(of_tokens: torch.Tensor) -> torch.Tensor:
            parted = of_tokens.view(self._batch, self._length, -1)[:, :length]
            return parted.reshape(self._batch * length, -1)

        return [
            Unread(layer, real(self._ids_LTK[layer]), real(weights))
            for layer, weights in sorted(self._weights.items())
        ]


class Prompt(NamedTuple):
    """A prompt of fixed shapes; `replays` holds how to replay it and its logits (B, 1, V), once it is recorded."""

    inputs: dict[str, Any]
    length: torch.Tensor  # () T
    buffers: PromptBuffers
    replays: list[tuple[Callable[[], None], torch.Tensor]]


class PromptGraphs:
    """The prompts of one cache.

    Args:
        model: attached.
        runner: serves its MoE layers.
        cache: filled by the prompts.
        timed: leave marks for the timeline.

    Attributes:
        problem: why prompts are launched from Python though they could come from a graph; "" if nothing is known.
        has_replayed: whether the last one came from a graph.
    """

    def __init__(
        self, model: "PreTrainedModel", runner: LayeredRunner, cache: StaticCache, timed: bool
    ) -> None:
        self._model, self._runner, self._filled_cache, self._timed = model, runner, cache, timed
        self._prompts: list[Prompt] = []
        self._longest = min(longest_prompt(model), *(layer.max_cache_len for layer in cache.layers))
        #: Of the last one, and its routing; none if plain torch had to compute it.
        self._ran: tuple[PromptBuffers, list[Unread]] | None = None
        self.problem = ""
        self.has_replayed = False

    def takes(self, forward: Forward, given: Mapping[str, Any]) -> bool:
        """Whether a forward pass with these arguments is a prompt that can come from a graph."""
        runner, filled = self._runner, filled_length(forward.length)
        return (
            not self.problem
            and forward.past == 0
            and given.get("past_key_values") is self._filled_cache
            and forward.batch * filled <= MOST_FILLED
            and filled <= self._longest
            and _named(given) <= KNOWN
            and all(
                type(given.get(name)) is type(value) and given[name] == value for name, value in FIXED.items()
            )
            and runner.forced is None
            and not runner.is_interrupted
            and not torch.is_autocast_enabled(runner.device.torch_device.type)
            and all(map(runner.needs_nobody, runner.layers))
        )

    def run(self, forward: Forward, given: Mapping[str, Any]) -> ModelOutput:
        """The forward pass: from its graph, or launched from Python where there is none yet (`record`)."""
        length, filled = forward.length, filled_length(forward.length)
        named = _named(given) - FIXED.keys()
        inputs = _filled({name: given[name] for name in sorted(named)}, length, filled)
        prompt = self._prompt(inputs, forward.batch, filled)
        prompt.length.fill_(length)
        prompt.buffers.prepare(length)
        self.has_replayed = bool(prompt.replays)
        if prompt.replays:
            replay, logits = prompt.replays[0]
            replay()
        else:
            try:
                logits = self._forward(prompt)
            except CannotLaunch as problem:
                self._runner.use_reference(problem)
                self._filled_cache.reset()
                self._prompts, self._ran = [], None
                output: ModelOutput = self._model(**given)
                return output
        unread = prompt.buffers.unread(length)
        self._ran = prompt.buffers, unread
        self._runner.were_computed(unread)
        return CausalLMOutputWithPast(logits=logits, past_key_values=self._filled_cache)

    def tell(self, recorder: Recorder | None) -> None:
        """Let recorder and predictor know of the layers of the last one, once its routing was read."""
        if self._ran is None:
            return
        buffers, unread = self._ran
        if self._runner.schedule_runner is not None:
            for each in unread:
                self._runner.schedule_runner.observe(each.moe_layer, each.ids_TK)
        if recorder is not None:
            for layer, routed, computed in buffers.marks:
                recorder.routed(layer, routed)
                recorder.computed(layer, computed)

    def _prompt(self, inputs: dict[str, Any], batch: int, filled: int) -> Prompt:
        """The prompt of this form with these inputs, the newest from now on."""
        prompt = next((prompt for prompt in self._prompts if fits(prompt.inputs, inputs)), None)
        if prompt is None:
            length = torch.zeros((), dtype=torch.int64, device=self._runner.device.torch_device)
            prompt = Prompt(own(inputs), length, PromptBuffers(self._runner, batch, filled, self._timed), [])
        else:
            refill(prompt.inputs, inputs)
        others = [one for one in self._prompts if one is not prompt]
        self._prompts = [*others[1 - MOST_PROMPTS :], prompt]
        return prompt

    def _forward(self, prompt: Prompt) -> torch.Tensor:
        runner = self._runner
        runner.captured, runner.capturing_thread = prompt.buffers, threading.get_ident()
        try:
            prompt.buffers.begin()
            last = prompt.length.view(1) - 1
            output = self._model(**prompt.inputs, **{**FIXED, "logits_to_keep": last})
            for layer in self._filled_cache.layers:  # what was filled up is not there
                if layer.is_initialized:  # some layers use another one's keys and values
                    layer.cumulative_length.copy_(prompt.length)
        finally:
            runner.captured = None
        logits: torch.Tensor = output.logits
        return logits

    def record(self) -> None:
        """Record the graph of the prompt that ran last, for the next one of its form. It must have run."""
        if not self._prompts or self._prompts[-1].replays or self.problem:
            return
        if self._runner.device.free_bytes() < LEAST_ROOM:
            self.problem = f"less than {format_bytes(LEAST_ROOM)} of the GPU's memory are free for its graph"
            return
        prompt = self._prompts[-1]
        try:
            with warming_up():
                captured = self._runner.device.capture(partial(self._forward, prompt), shares_memory=True)
        except (UnsupportedOption, RuntimeError) as error:
            self._prompts, self.problem = [], f"a prompt could not be recorded as a graph ({error})"
            warnings.warn(f"prompts are launched kernel by kernel, which takes longer: {error}", stacklevel=2)
        else:
            prompt.replays.append(captured)


def _named(given: Mapping[str, Any]) -> set[str]:
    """Names of the arguments that say something: models for images are given many that do not, where there are none."""
    return {name for name, value in given.items() if _says(value)}


def _says(value: Any) -> bool:
    return any(map(_says, value.values())) if isinstance(value, dict) else value is not None


def _filled(inputs: Mapping[str, Any], length: int, filled: int) -> dict[str, Any]:
    """Inputs of T tokens as those of F: the last token again, at the positions that follow, seeing what it sees."""
    more = filled - length
    result = dict(inputs)
    result["input_ids"] = functional.pad(inputs["input_ids"], (0, more))
    positions = inputs.get("position_ids")
    if positions is not None:
        following = positions[..., -1:] + torch.arange(1, more + 1, device=positions.device)
        result["position_ids"] = torch.cat([positions, following], dim=-1)
    if "attention_mask" in inputs:
        result["attention_mask"] = _filled_mask(inputs["attention_mask"], more)
    return result


def _filled_mask(mask: Any, more: int) -> Any:
    """A mask (B, T) of keys or (B, 1, T, ...) of queries, or several by kind, with `more` tokens behind the last."""
    if mask is None:
        return None
    if isinstance(mask, dict):
        return {kind: _filled_mask(one, more) for kind, one in mask.items()}
    axis = 1 if mask.dim() == 2 else 2
    last = mask.narrow(axis, mask.shape[axis] - 1, 1)
    repeats: Sequence[int] = [more if i == axis else -1 for i in range(mask.dim())]
    return torch.cat([mask, last.expand(*repeats)], dim=axis)
