"""A predictor at work. Whatever it does, the run goes on and the text is the model's own.

It is asked in the way of each layer, or inside a graph, or in a thread of its own beside one (`graph/beside.py`). One
that raises, answers something else than probabilities, or takes too much of a layer's time is not asked any more until
the next prompt; a warning says so, and so does the run.

Shapes: T tokens, D model width, K top-k, E experts, d layers ahead.
"""

import time
import warnings
from collections.abc import Callable
from statistics import median

import numpy as np
import torch
from numpy.typing import NDArray

from ..core.bell import Bell
from ..core.numbers import is_count
from ..core.worker import Worker
from ..errors import UnsupportedOption
from ..predictor import Prediction, Predictor
from ..predictor.base import FastPath, Learns
from ..predictor.checked import BadPrediction, apart_from_draws, ask, check_values, prepared
from .forced_routing import ForcedRouting
from .observing import Observing
from .positions import Forward

#: Expected tokens and probability of use, (d, E) each.
Predicted = tuple[NDArray[np.floating], NDArray[np.floating]]
#: Calls that say how long a predictor takes; the first one warms it up.
WATCHED_CALLS = 9
#: A call that takes longer, and this share of the time between two of them, is in the layers' way: what a prefetch can
#: save is a part of the other layers' stalls.
SLOW_US, SLOW_SHARE = 2000.0, 0.2
#: Notes that are kept while nobody makes a result of them.
MOST_NOTES = 8
#: Predictors that stay known, with different lookaheads.
MOST_KNOWN = 4


class Aside:
    """A thread that asks a predictor beside captured steps, and the bell that wakes it."""

    def __init__(self) -> None:
        self.bell = Bell()
        self._worker = Worker("prescope-predictor")

    def submit(self, job: Callable[[], None]) -> None:
        """Do a job behind all others."""
        self._worker.submit(job)

    def close(self) -> None:
        """End the thread behind the call of the predictor that it is in, without waiting for that."""
        self._worker.leave()
        self.bell.ring()


class Predicting:
    """Asks one predictor, and answers "nothing is known" in its place where it cannot.

    Args:
        predictor: on the tokens' device. `given`: as it was given, before it was brought there.
        lookahead: layers ahead that it is asked about.
        fast_path: its answers for a few tokens in fewer launches, where there is such.

    Attributes:
        forced: routing from a trace whose predictions are used instead of the predictor's.
        observing: tells it what layers used, if it learns from that.
        problem: why it is not asked any more in this text; "" while it is.
        where: how it is asked, in words.
        is_busy: a thread beside the graph is asking it.
    """

    def __init__(
        self,
        predictor: Predictor,
        lookahead: int,
        fast_path: FastPath | None = None,
        given: Predictor | None = None,
    ) -> None:
        self.predictor, self.lookahead, self._fast_path = predictor, lookahead, fast_path
        self.given = predictor if given is None else given
        self.forced: ForcedRouting | None = None
        self.observing = Observing(predictor) if isinstance(predictor, Learns) else None
        self.problem, self.where = "", "not asked yet"
        self.is_busy = self._is_aside_said = False
        self._on_host: Predictor | None = None
        self._aside: Aside | None = None
        self._notes: list[str] = []
        E = predictor.shape.num_experts
        self._nothing = np.zeros((lookahead, 2, E), dtype=np.float32)
        self._took_us: list[float] = []
        self._between_us: list[float] = []
        self._asked_us = 0.0

    @property
    def is_forced(self) -> bool:
        """Whether a trace's predictions are used and the predictor is not asked."""
        return self.forced is not None and self.forced.scores is not None

    @property
    def most_fast_tokens(self) -> int:
        """Tokens that the fast path takes at most; 0 without one."""
        return 0 if self._fast_path is None else self._fast_path.most_tokens

    def on_host(self) -> Predictor:
        """The predictor for tokens in host memory."""
        if self._on_host is None:
            self._on_host = self.predictor.to("cpu")
        return self._on_host

    def aside(self) -> Aside:
        """The thread for a predictor that is not part of the graph."""
        if self._aside is None:
            self._aside = Aside()
        return self._aside

    def close(self) -> None:
        """End the thread, if there is one."""
        if self._aside is not None:
            self._aside.close()
            self._aside = None

    def begin_text(self) -> None:
        """A prompt is read: a predictor that was not asked any more is asked again."""
        self.problem = ""
        self._took_us, self._between_us, self._asked_us = [], [], 0.0

    # -- telling -----------------------------------------------------------------------------------------------

    def begin_forward(self, forward: Forward) -> None:
        """A forward pass begins, a prompt's too, for a predictor that learns."""
        if self.observing is None or self.is_forced:
            return
        if self.is_busy:
            self.stop(f"{self.predictor.name} is still busy with what it was asked in the text before")
        if not self.problem:
            try:
                self.observing.begin(forward)
            except Exception as error:  # noqa: BLE001 - as in `_values`
                self.fail(0, error)

    def end_forward(self) -> None:
        """The forward pass is over."""
        if self.observing is not None:
            self.observing.end()

    def observe(self, moe_layer: int, ids_TK: torch.Tensor) -> None:
        """What a layer of the forward pass has used."""
        if self.observing is None or self.is_forced or self.problem or self.is_busy:
            return
        try:
            with apart_from_draws(ids_TK.device):
                self.observing.layer(moe_layer, ids_TK)
        except Exception as error:  # noqa: BLE001 - as in `_values`
            self.fail(moe_layer, error)

    # -- asking ------------------------------------------------------------------------------------------------

    def scores(
        self, moe_layer: int, x_TD: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> torch.Tensor:
        """(d, 2, E) float32 on the tokens' device: expected tokens, and probability that any uses the expert.

        Raises:
            BadPrediction, and whatever the predictor raises.
        """
        forced = self.forced
        if forced is not None and forced.scores is not None:
            # Compiled decisions read all layers that are looked at: those the trace says nothing of have zeros. A copy,
            # for the next step's are put into the place of these.
            given = forced.scores[moe_layer, : self.lookahead]
            return torch.cat([given, given.new_zeros(self.lookahead - len(given), *given.shape[1:])])
        if self._fast_path is not None and len(x_TD) <= self._fast_path.most_tokens:
            answer = self._fast_path(moe_layer, x_TD, ids_TK, weights_TK)
            wanted = (self.lookahead, 2, self.predictor.shape.num_experts)
            # Compiled decisions read so many numbers, whatever there is.
            if not isinstance(answer, torch.Tensor) or answer.shape != wanted:
                raise BadPrediction(
                    f"fast_path of {self.predictor.name} answers a {type(answer).__name__} of shape "
                    f"{tuple(getattr(answer, 'shape', ()))}; it is a tensor (layers ahead, 2, experts) = {wanted}"
                )
            return answer
        made = ask(self.predictor, moe_layer, x_TD, ids_TK, weights_TK, self.lookahead)
        return of_step(made, self.lookahead, self.predictor.shape.num_experts, x_TD.device)

    def predict(
        self, moe_layer: int, x_TD: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> Predicted:
        """The same, read by the host, in the layer's way; zeros if the predictor fails, or did in this text."""
        values = self._nothing
        if self.lookahead and not self.problem and not self.is_busy:
            self.where = "in the layers' way"
            begin_us = _now_us()
            values = self._values(moe_layer, x_TD, ids_TK, weights_TK)
            self._watch(begin_us)
        return values[:, 0], values[:, 1]

    def _values(
        self, moe_layer: int, x_TD: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> NDArray[np.float32]:
        try:
            given = (x_TD, ids_TK, weights_TK)
            if len(x_TD) > self.most_fast_tokens and not self.is_forced:
                # The model computes with these, and anybody's code may write into what it is given.
                given = (x_TD.clone(), ids_TK.clone(), weights_TK.clone())
            with apart_from_draws(x_TD.device):
                values: NDArray[np.float32] = self.scores(moe_layer, *given).cpu().numpy()
            check_values(values, self.predictor.name, moe_layer, len(x_TD))
        except Exception as error:  # noqa: BLE001 - it may be anybody's code, and the text does not depend on it
            if bool(torch.isfinite(x_TD).all()):
                self.fail(moe_layer, error)
            return self._nothing  # of hidden states that are not finite nothing can be said
        return values

    def _watch(self, begin_us: float) -> None:
        """Give up a predictor that takes more of the layers' time than it can save."""
        if len(self._took_us) >= WATCHED_CALLS or self.is_forced:
            return
        if self._asked_us:
            self._between_us.append(begin_us - self._asked_us)
        self._took_us.append(_now_us() - begin_us)
        self._asked_us = begin_us
        if len(self._took_us) < WATCHED_CALLS:
            return
        took_us, between_us = median(self._took_us[1:]), median(self._between_us)
        if took_us > SLOW_US and took_us > SLOW_SHARE * between_us:
            self.stop(
                f"{self.predictor.name} takes {took_us / 1e3:.1f} ms a layer, {100 * took_us / between_us:.0f} % of "
                f"its time"
            )

    # -- what went wrong ---------------------------------------------------------------------------------------

    def fail(self, moe_layer: int, error: BaseException) -> None:
        """It raised, or answered something else than probabilities."""
        self.stop(f"{self.predictor.name} failed at MoE layer {moe_layer}: {type(error).__name__}: {error}")

    def stop(self, problem: str) -> None:
        """Do not ask it any more in this text, and say so: aloud, and in the run."""
        if self.problem:
            return
        self.problem = problem
        text = f"{problem}; the rest of the text is decoded without predictions, and is the same"
        self.note(text)
        warnings.warn(text, stacklevel=2)

    def say_aside(self, reason: str) -> None:
        """Say once that the predictor is not part of the graph, and what to do about it."""
        if not self._is_aside_said:
            self._is_aside_said = True
            warnings.warn(
                f"{self.predictor.name} cannot be part of the graph that decode steps run from: {reason}. It runs in a "
                f"thread beside it, and an answer that comes late is used for later layers or not at all. A predict of "
                f"torch operations on its tokens' own device, without reading numbers back, runs inside the graph",
                stacklevel=2,
            )

    def note(self, text: str) -> None:
        """Have the run's result say something."""
        if text not in self._notes:
            self._notes = [*self._notes[1 - MOST_NOTES :], text]

    @property
    def how(self) -> str:
        """Where it was asked last, and why it is not any more, if so."""
        return f"{self.where}; {self.problem}" if self.problem else self.where

    def take_notes(self) -> list[str]:
        """What there is to say, once."""
        notes, self._notes = self._notes, []
        return notes


class Predictings:
    """The predictors that an engine was given last, brought to its device: graphs they are part of hold them.

    One that is changed in place afterwards is seen as far as its tensors lie on the device.
    """

    def __init__(self) -> None:
        self._known: list[Predicting] = []

    def known(self, given: Predictor) -> Predictor | None:
        """A predictor on the device, if it was brought there."""
        return next((one.predictor for one in reversed(self._known) if one.given is given), None)

    def of(self, given: Predictor, predictor: Predictor, lookahead: int, has_fast_path: bool) -> Predicting:
        """Asks a predictor about so many layers.

        Args:
            predictor: the same on the device.

        Raises:
            UnsupportedOption: its `fast_path` raised, or gave something else.
        """
        found = [one for one in self._known if one.given is given and one.lookahead == lookahead]
        if found:
            made = found[-1]
        else:
            fast_path = prepared(predictor, "fast_path", lookahead) if lookahead and has_fast_path else None
            if fast_path is not None and not is_count(getattr(fast_path, "most_tokens", None)):
                raise UnsupportedOption(
                    f"fast_path of {predictor.name} gives a {type(fast_path).__name__} without most_tokens; it gives "
                    f"a prescope.predictor.base.FastPath, or None"
                )
            made = Predicting(predictor, lookahead, fast_path, given)
        made.begin_text()
        self._known = [*[one for one in self._known if one is not made][1 - MOST_KNOWN :], made]
        return made


def of_step(made: list[Prediction], lookahead: int, num_experts: int, device: torch.device) -> torch.Tensor:
    """(d, 2, E) of a step's tokens together; rows beyond the last layer are zero."""
    out = torch.zeros((lookahead, 2, num_experts), dtype=torch.float32, device=device)
    if made:
        # Sums of tokens in 16 bits would be off by whole tokens, and in 8 bits there are none.
        scores_dTE = torch.stack([prediction.scores_TE.float() for prediction in made])
        out[: len(made), 0] = scores_dTE.sum(1)
        out[: len(made), 1] = 1.0 - (1.0 - scores_dTE).prod(1)
    return out


def _now_us() -> float:
    return time.perf_counter() * 1e6
