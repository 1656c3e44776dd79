"""A predictor that cannot be part of a graph, asked in a thread of its own beside the steps. No step waits for it.

The host's part of a step (`host_loop.serve`) rings when a layer has been answered, and goes on. The thread asks the
predictor about the newest layer that has asked; those that came meanwhile are left out. What it answers counts for each
coming layer that is not decided yet: a late answer serves the later ones of the layers it is for, or none. One that
learns is told first what the steps before have used, as far as that was read.

Shapes: L MoE layers, T tokens, K top-k, D model width, E experts, d layers ahead.
"""

import sys
import time
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ...core.bell import Bell
from ...core.types import IntArray
from ...predictor import LearnsWhereAsked
from ...predictor.checked import ask, check_values
from ..predicting import Predicting, of_step
from . import host_state as at

if TYPE_CHECKING:
    from ...kernels.graph_buffers import GraphBuffers, Messages

#: Word of an asked pair: step << 48 | expert << 32 | bits of the router weight; of a prediction: step << 32 | bits.
ASK_SHIFT, SCORES_SHIFT = 48, 32
NO_EXPERT = 0xFFFF
#: The interpreter changes threads so often while a predictor runs beside: whoever serves a step comes back to it some
#: times a step, and would wait for as long. Python's own is 5 ms.
SWITCH_S = 1e-4
#: A predictor whose calls keep the interpreter for this share of the time, over so many steps at least, is given up.
MOST_KEPT_SHARE, LEAST_STEPS = 0.05, 16


class Question(NamedTuple):
    """One layer's routing, copied from the messages of a step."""

    number: int  # of the step, as in messages
    moe_layer: int
    x_TD: torch.Tensor
    ids_TK: torch.Tensor
    weights_TK: torch.Tensor


class Listening:
    """One run's questions and answers; the predictor's thread works on it from `begin` to `end`.

    Args:
        captured: buffers of the steps that run. `messages`: theirs.

    Attributes:
        scores: (L, d * 2 * E) answers, as messages of a captured predictor are laid out.
        step, number: of the step under way; the latter as in messages.
    """

    def __init__(self, predicting: Predicting, captured: "GraphBuffers", messages: "Messages") -> None:
        self._predicting, self._predictor = predicting, predicting.on_host()
        self._asked, self._served = messages.ask, messages.served
        self._inputs, self._top_k = captured.inputs, captured.top_k
        L, d, E = len(self._asked), predicting.lookahead, predicting.predictor.shape.num_experts
        # This run's own: what comes when the run is over is written where nobody reads.
        self.scores = np.zeros((L, d * 2 * E), dtype=np.int64)
        self._counts = np.zeros(at.NUM_COUNTS, dtype=np.int64)
        self._used: deque[NDArray[np.int32]] = deque()  # (L, T, K) of steps that it is not told yet
        self.step = self.number = -1
        self.bell: Bell = predicting.aside().bell
        self.num_answers = self._num_steps = 0
        self._kept_us = self._began_us = 0.0
        self._switch_s = sys.getswitchinterval()
        self._is_over = False
        self._failure: tuple[int, Exception] | None = None

    def begin(self, counts: IntArray) -> None:
        """Steps follow.

        Args:
            counts: the host's (`host_state`), which say which layer has asked last.
        """
        self._counts = counts
        self._predicting.aside().submit(self._follow)
        sys.setswitchinterval(min(SWITCH_S, self._switch_s))

    def begin_step(self, step: int, number: int) -> None:
        """A step begins; `number`: its number in messages."""
        self.step, self.number = step, number
        self._num_steps += 1
        if self._num_steps == 1:
            self._began_us = time.perf_counter() * 1e6

    def came_back(self, left_us: float) -> None:
        """The interpreter has gone on, which compiled code left at that time: a predictor may have kept it."""
        now_us = time.perf_counter() * 1e6
        if self._predicting.is_busy:
            self._kept_us += now_us - left_us
        if self._num_steps >= LEAST_STEPS and self._kept_us > MOST_KEPT_SHARE * (now_us - self._began_us):
            self._is_over = True

    def observe(self, ids_LTK: NDArray[np.int32]) -> None:
        """What a step has used that is over, for a predictor that learns; it is told when it is asked next."""
        if self._predicting.observing is not None:
            self._used.append(ids_LTK)

    def end(self) -> None:
        """No step follows. An answer that is on its way is dropped; nobody waits for it."""
        sys.setswitchinterval(self._switch_s)
        if self._is_over:
            kept_ms = self._kept_us / 1e3 / self._num_steps
            self._predicting.stop(f"{self._predictor.name} kept Python to itself for {kept_ms:.1f} ms a step")
        elif self._num_steps and isinstance(self._predictor, LearnsWhereAsked):
            self._predicting.note(
                f"{self._predictor.name} learned nothing from {self._num_steps} steps: they ran from a graph, beside "
                f"which the newest layer alone is asked about, and it learns where it is asked about every layer; for "
                f"that attach with decode='layered'"
            )
        self._is_over = True
        self.bell.ring()
        if self._failure is not None:
            self._predicting.fail(*self._failure)

    def _follow(self) -> None:
        """Answer until the run is over or the predictor fails."""
        while not self._is_over and self._failure is None:
            self.bell.wait()
            question = self._newest()
            if question is None or self._is_over:
                continue
            self._predicting.is_busy = True
            try:
                with torch.no_grad():
                    self._tell()
                    self._answer(question)
            except Exception as error:  # noqa: BLE001 - it may be anybody's code; the run says so when it is over
                if bool(torch.isfinite(question.x_TD).all()):
                    self._failure = question.moe_layer, error
            finally:
                self._predicting.is_busy = False

    def _tell(self) -> None:
        observing = self._predicting.observing
        while observing is not None and self._used:
            observing.step(torch.from_numpy(self._used.popleft().astype(np.int64)))

    def _newest(self) -> Question | None:
        """The newest layer that has asked; None if there is none, or its step has ended while it was copied."""
        step, number = self.step, self.number
        layer = int(self._counts[at.ASKED]) - 1
        if layer < 0 or layer + 1 == len(self._asked):  # behind the last one nothing comes
            return None
        words = self._asked[layer].copy()
        x_TD = self._inputs[layer].clone()
        # The GPU writes there again in the next step, which does not begin before this one is served.
        if self.step != step or self._served[0] > step or not (words >> ASK_SHIFT == number).all():
            return None
        experts = (words >> 32) & 0xFFFF
        ids = torch.from_numpy(np.where(experts == NO_EXPERT, -1, experts))
        weights = torch.from_numpy(words.view(np.float32)[::2].copy())
        shape = (-1, self._top_k)
        return Question(number, layer, x_TD, ids.view(shape), weights.view(shape))

    def _answer(self, question: Question) -> None:
        name, layer = self._predictor.name, question.moe_layer
        lookahead, E = self._predicting.lookahead, self._predictor.shape.num_experts
        made = ask(self._predictor, layer, question.x_TD, question.ids_TK, question.weights_TK, lookahead)
        values = of_step(made, lookahead, E, torch.device("cpu")).numpy()
        check_values(values, name, layer, len(question.x_TD))
        self.num_answers += 1
        if self.number == question.number:
            write_answers(self.scores, question.number, layer, values)


def write_answers(scores: IntArray, number: int, moe_layer: int, values_d2E: NDArray[np.float32]) -> None:
    """Let each layer from this one on find what was said of those behind it, however late it is.

    Args:
        scores: (L, d * 2 * E) messages, changed. `number`: of the step.
        values_d2E: of the d layers behind `moe_layer`.
    """
    d, _, E = values_d2E.shape
    bits = np.ascontiguousarray(values_d2E, dtype=np.float32).view(np.uint32).astype(np.int64).reshape(-1)
    words, unknown = bits | (number << SCORES_SHIFT), number << SCORES_SHIFT
    for later in range(moe_layer, min(moe_layer + d, len(scores))):
        known = (d - (later - moe_layer)) * 2 * E
        scores[later, :known] = words[len(words) - known :]
        scores[later, known:] = unknown
