"""One decode step of a fixed batch over its own static cache, captured once for each driver."""

import threading
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from ...cache.residency import NOTHING
from ...hf import (
    cache_bytes,
    cache_length,
    cached_tokens,
    compiled_layers,
    slides,
    sliding_window,
    static_cache,
)
from ...kernels import make_host_options
from ..layered import LayeredRunner
from ..predicting import Predicting
from .capturable import why_not_in_graph
from .inputs import fits, own, refill
from .prompt import PromptGraphs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ...kernels.graph_buffers import DeviceTable, GraphBuffers, HostOptions

#: Who serves the misses of a captured step: see `prescope.engine.graph`.
GPU, COPY, HOST = "gpu-driven", "copy-engine", "host-driven"
#: Order in which two drivers are tried against each other, a step each; the first step of each warms up.
CONTEST = (GPU, COPY, GPU, COPY, COPY, GPU, GPU, COPY, COPY, GPU)


class Captured(NamedTuple):
    """A step captured for one driver."""

    buffers: "GraphBuffers"
    replay: Callable[[], None]
    logits: torch.Tensor  # (B, V), of the last replay


#: Forms of inputs (with padding or without, say) whose captured steps are kept; they share one cache.
MOST_FORMS = 2


class CapturedForm(NamedTuple):
    """Inputs at fixed addresses, and the step captured over them, by driver."""

    inputs: dict[str, Any]
    captured: dict[str, Captured]


class GraphStep:
    """One decode step of fixed shapes.

    Args:
        model: attached.
        runner: serves its MoE layers.
        batch: sequences.
        length: tokens the cache must hold.
        drivers: which to capture.
        timed: write stamps for the timeline. keeps_inputs: log what each router saw.
        compiled: whether to compile the decoder layers around the experts.

    Attributes:
        inputs, captured: of the run under way, see `CapturedForm`.
        prompts: that fill its cache.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        runner: LayeredRunner,
        *,
        batch: int,
        length: int,
        drivers: Iterable[str],
        timed: bool,
        keeps_inputs: bool,
        compiled: bool,
    ) -> None:
        self._model, self._runner = model, runner
        self.batch, self.timed = batch, timed
        self._drivers, self.compiled, self._keeps_inputs = list(drivers), compiled, keeps_inputs
        self.cache = static_cache(model, length, batch)
        self.prompts = PromptGraphs(model, runner, self.cache, timed)
        self.inputs: dict[str, Any] = {}
        self.captured: dict[str, Captured] = {}
        self._forms: list[CapturedForm] = []
        self.driver = ""  # whose graph runs; both are tried in turn while it is not decided
        self.why = ""
        self.problem = ""  # why it could not be captured
        self.aside = ""  # why the predictor runs beside the graph, if it does
        self.times_s: dict[str, list[float]] = {driver: [] for driver in self._drivers}

    @property
    def length(self) -> int:
        """Tokens the cache has room for."""
        return cache_length(self.cache)

    @property
    def nbytes(self) -> int:
        """Memory of its cache."""
        return cache_bytes(self.cache)

    def load(self, inputs: dict[str, Any]) -> None:
        """Take over what `prepare_inputs_for_generation` gives for one new token per sequence.

        Inputs of another form than the captured ones are taken too; the step is then captured for them as well.
        """
        form = next((form for form in self._forms if fits(form.inputs, inputs)), None)
        if form is None:
            form = CapturedForm(own(inputs), {})
            self._forms = [*self._forms[1 - MOST_FORMS :], form]
        else:
            refill(form.inputs, inputs)
        self.inputs, self.captured = form

    def run(self) -> torch.Tensor:
        """Run the step now, layer by layer; returns logits (B, V) and advances the inputs to the next token."""
        with compiled_layers(self._model, self._runner.layers, self.compiled, progress=True):
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
        for is_sliding, mask in self._masks():
            following = cached_tokens(self.cache).clamp(max=mask.shape[-1] - 1).view(1)
            mask.index_fill_(-1, following, True if mask.dtype == torch.bool else 0.0)
            if is_sliding:
                _close(mask, following - sliding_window(self._model))

    def _masks(self) -> list[tuple[bool, torch.Tensor]]:
        """Masks of the inputs, and whether each is of layers with a sliding window."""
        given = self.inputs.get("attention_mask")
        if given is None:
            return []
        if not isinstance(given, dict):
            return [(slides(self.cache), given)]
        return [(name == "sliding_attention", mask) for name, mask in given.items() if mask is not None]

    def capture(self, table: "DeviceTable", reason: str) -> None:
        """Capture the step for each driver; call after a `run`, when everything is compiled and warm.

        Args:
            reason: why there is one driver only, if so.

        Raises:
            UnsupportedOption, RuntimeError: something in it cannot be captured.
        """
        runner = self._runner
        captured: dict[str, Captured] = {}
        for driver in self._drivers:
            policy = runner.residency.policy.kind if driver != HOST else 0
            step = table.new_step(
                self.batch, runner.shape.top_k, policy=policy, orders=driver == COPY, timed=self.timed,
                scheduled=self._scheduled() if driver == HOST else None,
                keeps=self._input_form() if self._keeps_inputs else None,
            )  # fmt: skip
            self._warm_up(step)
            with compiled_layers(self._model, runner.layers, self.compiled):
                replay, logits = runner.device.capture(partial(self._whole, step))
            captured[driver] = Captured(step, replay, logits)
        self.captured.update(captured)  # all or none, whatever interrupts
        if len(self._drivers) == 1:
            self.driver, self.why = self._drivers[0], reason

    def _input_form(self) -> tuple[int, torch.dtype]:
        """Width and dtype of what a router sees."""
        slots, spec = self._runner.weights[0], self._runner.layers[0].spec
        return slots.widths(spec.is_transposed)[0], slots.up.dtype

    def _scheduled(self) -> "HostOptions":
        schedule_runner = self._runner.schedule_runner
        width, dtype = self._input_form()
        predicting = schedule_runner.predicting if schedule_runner is not None else None
        if predicting is not None and not predicting.lookahead:
            predicting = None
        if predicting is not None:
            self._place(predicting, width, dtype)
        return make_host_options(
            lookahead=0 if predicting is None else predicting.lookahead,
            scores=None if predicting is None or self.aside else predicting.scores,
            has_cpu=schedule_runner is not None and schedule_runner.cpu is not None,
            width=width,
            dtype=dtype,
            is_predicted_aside=bool(self.aside),
        )

    def _place(self, predicting: Predicting, width: int, dtype: torch.dtype) -> None:
        """Find out whether the predictor can be part of the graph, and say so if it cannot."""
        layers = range(len(self._runner.layers))
        self.aside = why_not_in_graph(predicting, self._runner.device, layers, self.batch, width, dtype)
        if self.aside:
            predicting.say_aside(self.aside)

    def _whole(self, step: "GraphBuffers") -> torch.Tensor:
        self._runner.captured, self._runner.capturing_thread = step, threading.get_ident()
        try:
            step.begin()
            if self._runner.forced is not None:
                self._runner.forced.advance()
            logits, tokens = self._forward()
            step.finish(tokens)
        finally:
            self._runner.captured = None
        return logits

    def _warm_up(self, step: "GraphBuffers") -> None:
        """Tune and compile all kernels: that cannot be done while a graph is captured. Needs nobody's experts."""
        runner, device = self._runner, self._runner.device.torch_device
        for layer, slots, rows in zip(runner.layers, runner.weights, runner.host.layers, strict=True):
            width, _, _ = slots.widths(layer.spec.is_transposed)
            x = torch.zeros((self.batch, width), dtype=slots.up.dtype, device=device)
            nobody = torch.full((self.batch, step.top_k), -1, dtype=torch.int64, device=device)
            if step.scheduled is not None:  # nobody is asked, so the answer is there before
                step.reply(layer.moe_layer, 0, NOTHING, last_copy=0, num_on_cpu=0)
            # Weights in both dtypes that routers give: the kernels differ.
            for dtype in {x.dtype, torch.float32}:
                weights = torch.zeros((self.batch, step.top_k), dtype=dtype, device=device)
                step.tune(x, layer.spec, slots, layer.num_experts)
                step.layer(
                    layer.moe_layer, layer.num_experts, x, nobody, weights, layer.spec, slots, runner.loader.pool,
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


def _close(mask: torch.Tensor, leaving: torch.Tensor) -> None:
    """Hide a token (1,) from all queries of a mask, if it is one (below 0: none leaves yet); without the host."""
    place = leaving.clamp(min=0)
    former = mask.index_select(-1, place)
    closed = torch.full_like(former, False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min)
    mask.index_copy_(-1, place, torch.where(leaving >= 0, closed, former))
