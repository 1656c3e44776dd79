"""A predictor that learns is told what layers used: live it predicts what it predicts in a replay."""

import numpy as np
import pytest
import torch

import prescope
from prescope.engine import predicting
from prescope.errors import UnsupportedOption
from prescope.predictor import Learns, OnlineTuner, PreviousToken
from prescope.scheduler.costs import LayerCosts
from prescope.simulator import Simulator
from prescope.traces.events import LAYER_DTYPES
from prescope.training import Inverted
from tests.support.models import LAYERS, plain_tokens, prompt, tiny_moe
from tests.support.predictors import SHAPE
from tests.support.virtual_clock import virtual_clock

COSTS = LayerCosts(
    link_us=1000.0, gpu_us=50.0, rest_us=700.0, decide_us=100.0, is_layered=True, source="stated for a test"
)  # fmt: skip
NEW, AHEAD = 8, LAYERS - 1


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """On a busy machine a predictor would be given up."""
    monkeypatch.setattr(predicting, "SLOW_US", 1e9)


class Heard(PreviousToken):
    """Keeps what it was asked and has answered."""

    def __init__(self) -> None:
        super().__init__(SHAPE, AHEAD)
        self.answers = {}  # (layer, lookahead) -> scores (B, E) of each step

    def predict(self, moe_layer, x_TD, ids_TK=None, weights_TK=None):
        made = super().predict(moe_layer, x_TD, ids_TK, weights_TK)
        for one in made:
            self.answers.setdefault((moe_layer, one.lookahead), []).append(one.scores_TE.clone())
        return made


def attached(predictor, **settings):
    given = {"schedule": "presched", "costs": COSTS, "slots": 9, "cpu_threads": 0, **settings}
    return prescope.attach(tiny_moe(), predictor=predictor, **{"device": "null", **given})


def assert_as_replayed(predictor, trace):
    """All live answers to the decode steps are those of a replay of the trace, row by row."""
    decode = np.flatnonzero(trace.phase == 1)
    assert len(decode), "no decode step was recorded"
    for (layer, ahead), answers in predictor.answers.items():
        expected = predictor.replay(trace, ahead)[decode, layer]
        np.testing.assert_allclose(torch.cat(answers).numpy(), expected, atol=1e-6)


def test_only_predictors_with_a_memory_are_told():
    early = prescope.predictor.Chance(SHAPE, 1)
    assert isinstance(PreviousToken(SHAPE, 1), Learns) and issubclass(OnlineTuner, Learns)
    assert not isinstance(early, Learns) and not isinstance(Inverted(early), Learns)
    with pytest.raises(UnsupportedOption, match="learns from what layers used"):
        Inverted(PreviousToken(SHAPE, 1))


@pytest.mark.parametrize("slots", [9, 1.0])
def test_layer_by_layer_it_answers_as_in_a_replay_of_the_same_text(slots):
    """Prompts of different lengths: padding is nobody's past. With all experts in slots no routing is read for it."""
    ids = [row[: 3 + 2 * i] for i, row in enumerate(prompt(batch=3, length=8).tolist())]
    predictor = Heard()
    with attached(predictor, slots=slots) as engine:
        for _ in range(2):  # a second text begins anew
            predictor.answers.clear()
            run = engine.generate(ids, max_new_tokens=NEW)
            assert not any("without predictions" in note for note in run.notes)
            assert_as_replayed(predictor, run.trace)


def test_a_prompt_read_in_parts_is_one_past():
    ids, predictor = prompt(length=9), Heard()
    with attached(predictor) as engine:
        predictor.answers.clear()  # a trial's
        run = engine.generate(ids, max_new_tokens=NEW, prefill_chunk_size=4)
        assert_as_replayed(predictor, run.trace)


def test_a_module_that_is_called_alone_is_nobodys_past():
    predictor = Heard()
    with attached(predictor) as engine:
        engine.generate(prompt(), max_new_tokens=2)
        before = predictor._recent_SLE.clone()
        layer = engine.model.model.layers[0].mlp
        layer(torch.randn(1, 1, engine.model.config.hidden_size))
        assert torch.equal(predictor._recent_SLE, before)


def test_engine_and_simulator_go_by_the_same_predictions():
    """On the clock of stated times: each expert is where the simulator has it, prefetches by the live predictor too."""
    with (
        virtual_clock(COSTS),
        prescope.attach(tiny_moe(), device="null", decode="layered") as engine,
    ):
        for batch in (1, 3):
            predictor = PreviousToken(SHAPE, AHEAD)
            engine.configure(schedule="fate", costs=COSTS, predictor=predictor, slots=9, cpu_threads=0)
            engine.clear_cache()
            run = engine.generate(prompt(batch=batch), max_new_tokens=NEW)
            replayed = Simulator(run.trace, COSTS, row_bytes=engine.shape.row_bytes, predictor=predictor).run(
                "fate", slots=9, cache=engine.config.cache, cpu=False, least_bytes=0
            )
            measured = run.layers[run.layers["phase"] == "decode"].reset_index(drop=True)
            for column in LAYER_DTYPES.keys() - {"phase"}:
                assert replayed.layers[column].tolist() == measured[column].tolist(), (column, batch)
            assert replayed.counts.late + int(measured["prefetched"].sum()) > 0, "nothing was predicted"


def test_one_that_fails_when_it_is_told_ends_its_predictions_and_not_the_run():
    class Forgetful(PreviousToken):
        def observe(self, moe_layer, ids_TK):
            raise ZeroDivisionError("a memory broke")

    ids = prompt()
    with (
        attached(Forgetful(SHAPE, AHEAD)) as engine,
        pytest.warns(UserWarning, match="failed at MoE layer .*a memory broke"),
    ):
        run = engine.generate(ids, max_new_tokens=NEW)
    assert run.tokens == plain_tokens(tiny_moe(), ids, new=NEW)
    assert any("without predictions" in note for note in run.notes)


@pytest.mark.filterwarnings("ignore:.* cannot be part of the graph:UserWarning")
def test_steps_from_a_graph_tell_it_beside_them(gpu):
    """It is told each step that is over, in order, however seldom it is asked."""
    pytest.importorskip("triton", reason="Triton exists for Linux only")
    told = {}

    class Listening(PreviousToken):
        def observe(self, moe_layer, ids_TK):
            told.setdefault(moe_layer, []).append(ids_TK.clone())
            super().observe(moe_layer, ids_TK)

    ids = prompt(length=5)
    with attached(Listening(SHAPE, AHEAD), cache="lru", slots=7, **gpu) as engine:
        engine.generate(ids, max_new_tokens=NEW)
        told.clear()
        run = engine.generate(ids, max_new_tokens=NEW)
        assert run.config["reasons"]["predictor"].startswith("beside the graph: it learns from")
    assert run.tokens == plain_tokens(tiny_moe(), ids, new=NEW)
    for layer, chosen in told.items():
        found = torch.cat(chosen).numpy()
        assert found.tolist() == run.trace.expert_ids[: len(found), layer].tolist()
        assert len(found) > 5 + 1, "steps of the graph are among them"
