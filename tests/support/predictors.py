"""Predictors as anybody may write them: on the host, slow, hostile, broken. None is part of a graph."""

import threading
import time
from collections.abc import Callable

import torch

from prescope.core.types import MoEShape
from prescope.predictor import Prediction, Predictor
from prescope.predictor.baselines import Baseline, LayerInput
from tests.support.models import EXPERTS, LAYERS, TOP_K

SHAPE = MoEShape(LAYERS, EXPERTS, TOP_K)


class OnHost(Baseline):
    """Another predictor's answers, with a number read back from the device in between; and what is done before each."""

    def __init__(self, inner: Predictor, before: Callable[[int], None] = lambda call: None) -> None:
        super().__init__(inner.shape, inner.lookahead)
        self.inner, self.before, self.calls, self.name = inner, before, 0, f"{inner.name} on the host"
        # It is itself on every device, so that a test can change it while an engine has it.
        self._inner_on: dict[torch.device, Predictor] = {}

    def predict(self, moe_layer, x_TD, ids_TK=None, weights_TK=None):
        assert x_TD.sum().item() == x_TD.sum().item()
        self.calls += 1
        self.before(self.calls)
        if x_TD.device not in self._inner_on:
            self._inner_on[x_TD.device] = self.inner.to(x_TD.device)
        return self._inner_on[x_TD.device].predict(moe_layer, x_TD, ids_TK, weights_TK)

    def _scorer(self, at: LayerInput):
        raise AssertionError("predict does not ask for it")

    def replay(self, trace, lookahead):
        return self.inner.replay(trace, lookahead)


class Answering(OnHost):
    """Answers as another one, until a call from which on it answers as a function makes of that."""

    def __init__(
        self, inner: Predictor, change: Callable[[list[Prediction]], object], begin: int = 0
    ) -> None:
        super().__init__(inner)
        self._change, self._begin, self.name = change, begin, "a broken one"

    def predict(self, moe_layer, x_TD, ids_TK=None, weights_TK=None):
        made = super().predict(moe_layer, x_TD, ids_TK, weights_TK)
        return made if self.calls <= self._begin else self._change(made)


def nothing_like_it(made):
    raise ZeroDivisionError("a predictor broke")


def scores_by(change: Callable[[torch.Tensor], torch.Tensor]):
    """The same answers with other scores."""
    return lambda made: [one._replace(scores_TE=change(one.scores_TE)) for one in made]


#: What may be wrong with an answer, and words of what is said of it.
WRONG = {
    "raises": (nothing_like_it, "ZeroDivisionError"),
    "NaN": (scores_by(lambda scores: scores * float("nan")), "NaN"),
    "rows": (scores_by(lambda scores: scores[:1].expand(5, -1)), "shape"),
    "experts": (scores_by(lambda scores: scores[:, 1:]), "shape"),
    "layers": (
        lambda made: [one._replace(moe_layer=one.moe_layer + 1) for one in made],
        "has to be for layer",
    ),
    "too few": (lambda made: made[:-1], "there are"),
    "logits": (scores_by(lambda scores: 10.0 * scores - 5.0), "probabilities"),
    "integers": (scores_by(lambda scores: (scores > 0.5).long()), "float32"),
    "no tensor": (scores_by(lambda scores: scores.tolist()), "float32"),
    "none": (lambda made: None, "list of Prediction"),
}


class Gate:
    """Holds a predictor's calls until it is opened."""

    def __init__(self) -> None:
        self._open, self.held = threading.Event(), 0

    def __call__(self, call: int) -> None:
        self.held += not self._open.is_set()
        self._open.wait(60.0)

    def open(self) -> None:
        self._open.set()


def sleeps(call: int) -> None:
    time.sleep(0.01)
