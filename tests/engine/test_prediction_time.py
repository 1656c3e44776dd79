"""What a prediction takes: captured where steps run from a graph, from Python where it cannot be, or they do not."""

from contextlib import contextmanager

import pytest
import torch

from prescope.core.types import MoEShape
from prescope.device import NullDevice
from prescope.engine.graph.prediction_time import REPLAYS, prediction_us
from prescope.predictor.base import Prediction, targets_of

SHAPE = MoEShape(num_layers=8, num_experts=4, top_k=2, row_bytes=1)
REPLAY_US = 700.0


class Graphs(NullDevice):
    """A device whose graphs take a stated time."""

    captures_steps = True
    depth = 0

    @contextmanager
    def as_current(self):
        self.depth += 1
        yield
        self.depth -= 1

    def synchronize(self) -> None:
        assert self.depth, "on another GPU"
        super().synchronize()

    def capture(self, run):
        result = run()

        def replay() -> None:
            self.now_us += REPLAY_US

        return replay, result


class Predictor:
    name, shape, lookahead = "made up", SHAPE, 2

    def __init__(self, is_captured: bool, fast_tokens: int = 0) -> None:
        self._is_captured, self._fast_tokens = is_captured, fast_tokens
        self.asked: list[tuple[str, int]] = []

    def to(self, device):
        return self

    def fast_path(self, lookahead):
        if not self._fast_tokens:
            return None

        def scores(layer, x_TD, ids_TK, weights_TK):
            self.asked.append(("fast", layer))
            return torch.zeros(lookahead, 2, SHAPE.num_experts)

        scores.most_tokens = self._fast_tokens
        return scores

    def predict(self, layer, x_TD, ids_TK, weights_TK):
        self.asked.append(("plain", layer))
        if not self._is_captured and len(self.asked) == 1:
            raise RuntimeError("it reads a number back")
        scores_TE = torch.zeros(len(x_TD), SHAPE.num_experts)
        return [
            Prediction(target, ahead, scores_TE) for ahead, target in targets_of(layer, SHAPE, self.lookahead)
        ]


@pytest.mark.parametrize(("fast_tokens", "way"), [(0, "plain"), (1, "plain"), (4, "fast")])
def test_a_graph_of_all_layers_is_timed_by_the_path_that_the_engine_takes(fast_tokens, way):
    predictor = Predictor(True, fast_tokens)
    us = prediction_us(predictor, Graphs(), 3, 16, is_captured=True)
    assert us == pytest.approx(REPLAY_US / 7, rel=50.0 / (REPLAYS * REPLAY_US) + 1e-9)  # and a mark takes 50
    assert predictor.asked == 2 * [(way, layer) for layer in range(7)]


@pytest.mark.parametrize(("can_be", "is_captured"), [(False, True), (True, False)])
def test_from_python_where_it_is_not_captured(can_be, is_captured):
    predictor, device, depths = Predictor(can_be), Graphs(), set()
    asked = predictor.predict
    predictor.predict = lambda *arguments: depths.add(device.depth) or asked(*arguments)
    us = prediction_us(predictor, device, 3, 16, is_captured=is_captured)
    assert depths == {1} and device.depth == 0, "a kernel of Triton's is launched on the thread's current GPU"
    assert 0 < us < 1e5 and us != pytest.approx(REPLAY_US / 7, rel=0.01)
    assert len({layer for _, layer in predictor.asked[1:]}) == 1
