"""Laws of the predictors that need no training, on a trace of a real (small, random) MoE."""

import numpy as np
import pytest
import torch

import prescope
from prescope.core.types import MoEShape
from prescope.device import open_device
from prescope.engine.graph.capturable import why_not_in_graph
from prescope.engine.predicting import Predicting
from prescope.errors import BadTrace, TraceMismatch, UnsupportedOption
from prescope.predictor.base import ReplaysRows, used_mask
from prescope.predictor.baselines import EarlyRouter, Frequency, PreviousToken, Routers, Transition
from prescope.predictor.controls import Chance, Oracle
from prescope.predictor.layer_groups import Cues, group_layers
from prescope.predictor.platt import fit_platt
from tests.support.models import EXPERTS, LAYERS, TOP_K, prompt, tiny_moe

SHAPE = MoEShape(LAYERS, EXPERTS, TOP_K)
D = LAYERS - 1


@pytest.fixture(scope="module")
def model():
    return tiny_moe()


@pytest.fixture(scope="module")
def trace(model):
    with prescope.attach(model, slots=1.0, device="null", record_inputs=True) as engine:
        return engine.generate(prompt(batch=6, length=40), max_new_tokens=30).trace


@pytest.fixture(scope="module")
def routers(model):
    return Routers.of_weights(torch.stack([layer.mlp.gate.weight for layer in model.model.layers]))


def recall(scores: np.ndarray, trace, lookahead: int) -> float:
    """Share of the used experts among the K best scored."""
    best = np.argsort(-scores, axis=-1, kind="stable")[..., :TOP_K]
    used = used_mask(trace.expert_ids, EXPERTS)[:, lookahead:]
    return float(np.take_along_axis(used, best, axis=-1).sum() / used.sum())


def predictors(trace, routers):
    return [
        EarlyRouter(SHAPE, routers, D),
        Frequency(trace, D),
        PreviousToken(SHAPE, D),
        Transition(trace, D),
        Chance(SHAPE, D),
    ]


@pytest.mark.parametrize("lookahead", range(1, D + 1))
def test_the_oracle_scores_one(trace, lookahead):
    assert recall(Oracle(SHAPE, D).replay(trace, lookahead), trace, lookahead) == 1.0


@pytest.mark.parametrize("lookahead", range(1, D + 1))
def test_chance_scores_chance(trace, lookahead):
    """K / E, within five standard errors of the number of uses."""
    uses = len(trace) * (LAYERS - lookahead) * TOP_K
    spread = 5 * np.sqrt(TOP_K / EXPERTS * (1 - TOP_K / EXPERTS) / uses)
    assert abs(recall(Chance(SHAPE, D).replay(trace, lookahead), trace, lookahead) - TOP_K / EXPERTS) < spread


@pytest.mark.parametrize("lookahead", range(1, D + 1))
def test_what_counts_beats_chance_on_what_it_counted(trace, routers, lookahead):
    """Popularity and transitions fitted on the very trace must help there; else they are miscounted."""
    chance = recall(Chance(SHAPE, D).replay(trace, lookahead), trace, lookahead)
    for predictor in (Frequency(trace, D), Transition(trace, D)):
        assert recall(predictor.replay(trace, lookahead), trace, lookahead) > chance + 0.05, predictor.name
    assert recall(Transition(trace, D).replay(trace, lookahead), trace, lookahead) >= recall(
        Frequency(trace, D).replay(trace, lookahead), trace, lookahead
    )


def test_scores_are_probabilities(trace, routers):
    for predictor in predictors(trace, routers):
        scores = predictor.replay(trace, 1)
        assert scores.shape == (len(trace), LAYERS - 1, EXPERTS), predictor.name
        assert scores.min() >= 0 and scores.max() <= 1, predictor.name


def test_live_predictions_equal_the_replays(trace, routers):
    """One world: what the engine asks token by token is what the simulator replays at once."""
    rows = np.flatnonzero(trace.step == 3)
    x = torch.from_numpy(trace.inputs[rows].astype(np.float32))
    ids = torch.from_numpy(trace.expert_ids[rows].astype(np.int64))
    weights = torch.from_numpy(trace.weights[rows])
    for predictor in (EarlyRouter(SHAPE, routers, D), Frequency(trace, D), Transition(trace, D)):
        for layer in range(LAYERS):
            live = predictor.predict(layer, x[:, layer], ids[:, layer], weights[:, layer])
            assert [p.moe_layer for p in live] == list(range(layer + 1, LAYERS))
            for one in live:
                replayed = predictor.replay(trace, one.lookahead)[rows, layer]
                assert np.allclose(one.scores_TE.numpy(), replayed, atol=1e-5), predictor.name


def test_some_rows_score_as_in_a_replay_of_all(trace, routers):
    """So the simulator need not hold all scores of a long trace; only the previous token needs all rows before."""
    rows = np.array([5, 6, 30, 31, 200])
    for predictor in predictors(trace, routers):
        if isinstance(predictor, ReplaysRows):
            for ahead in range(1, D + 1):
                expected = predictor.replay(trace, ahead)[rows]
                assert np.allclose(predictor.replay_rows(trace, ahead, rows), expected, atol=1e-6), (
                    predictor.name
                )
        else:
            assert isinstance(predictor, PreviousToken)


def test_the_early_router_applies_the_coming_layers_router(trace, routers, model):
    """Its best K at lookahead 1 are those of layer 1's router on layer 0's input."""
    logits = (
        torch.from_numpy(trace.inputs[:, 0].astype(np.float32))
        @ model.model.layers[1].mlp.gate.weight.detach().T
    )
    best = logits.topk(TOP_K).indices.sort().values
    scores = torch.from_numpy(EarlyRouter(SHAPE, routers, D).replay(trace, 1)[:, 0])
    assert torch.equal(scores.topk(TOP_K).indices.sort().values, best)


def test_the_previous_token_is_that_of_the_same_sequence(trace):
    scores = PreviousToken(SHAPE, D).replay(trace, 1)
    used = used_mask(trace.expert_ids, EXPERTS)[:, 1:]
    for row in np.flatnonzero(trace.step == 5):
        before = np.flatnonzero((trace.step == 4) & (trace.sequence == trace.sequence[row]))[0]
        best = np.argsort(-scores[row], axis=-1)[:, :TOP_K]
        assert np.take_along_axis(used[before], best, axis=-1).all()


def test_a_trace_without_inputs_or_of_another_shape_is_refused(trace, routers, model):
    with prescope.attach(model, slots=1.0, device="null") as engine:
        bare = engine.generate(prompt(), max_new_tokens=2).trace
    early = EarlyRouter(SHAPE, routers, D)
    with pytest.raises(BadTrace, match="record_inputs=True"):
        early.replay(bare, 1)
    with pytest.raises(UnsupportedOption, match="choose 1 to"):
        early.replay(trace, LAYERS)
    other = tiny_moe(num_experts=EXPERTS * 2)
    with prescope.attach(other, slots=1.0, device="null") as engine:
        foreign = engine.generate(prompt(), max_new_tokens=2).trace
    with pytest.raises(TraceMismatch):
        Frequency(trace, D).replay(foreign, 1)


def cues(outer: list[float], middle: list[float]) -> Cues:
    """Cues whose correlation and skew are `outer` and whose similarity is `middle`."""
    high, low = np.asarray(outer, dtype=float), np.asarray(middle, dtype=float)
    return Cues(high, high, low, high, high, high, high)


def test_layer_groups_are_found_where_the_cues_change():
    groups = group_layers(cues([9, 8, 9, 1, 2, 1, 2, 1, 1, 2, 8, 9], [1, 1, 1, 5, 6, 5, 6, 5, 5, 6, 1, 1]))
    assert (groups.input, groups.middle, groups.output) == (range(3), range(3, 10), range(10, 12)), (
        groups.reason
    )
    assert groups.name_of(0) == "input" and groups.name_of(5) == "middle" and groups.name_of(11) == "output"


def test_noise_gives_one_group_and_says_why():
    """At most 5 % of pure noise may pass for borders; 60 draws of 12 layers, allowing for luck."""
    rng = np.random.default_rng(3)
    found = [group_layers(cues(list(rng.normal(size=12)), list(rng.normal(size=12)))) for _ in range(60)]
    assert sum(groups.has_borders for groups in found) <= 8
    assert all(groups.reason.startswith(("one group", "three groups")) for groups in found)


@pytest.mark.parametrize("scale", [0.2, 1.0, 20.0, 100.0])
def test_a_platt_fit_finds_the_same_probabilities_whatever_the_scale_of_the_logits(scale):
    rng = np.random.default_rng(0)
    z = rng.normal(-3.0, 2.0, (1000, 32))
    used = rng.random(z.shape) < 1.0 / (1.0 + np.exp(-(1.3 * z + 0.4)))
    slope, offset = fit_platt(scale * z, used)
    assert slope * scale == pytest.approx(1.3, rel=0.03) and offset == pytest.approx(0.4, abs=0.1)


@pytest.mark.parametrize("predictor", [Frequency, Transition])
def test_what_was_counted_goes_to_the_device_so_that_a_prediction_can_be_captured(predictor, trace):
    """A table left on the host is copied in each prediction, which no graph can hold."""
    made = predictor(trace, 2)
    ids_TK, x_TD = torch.arange(TOP_K).expand(3, -1), torch.zeros(3, 8)
    there = made.to("meta").predict(0, x_TD.to("meta"), ids_TK.to("meta"))
    assert [one.scores_TE.device.type for one in there] == ["meta", "meta"]
    again = made.to("cpu").predict(0, x_TD, ids_TK)  # the given one stays where it was
    for one, other in zip(made.predict(0, x_TD, ids_TK), again, strict=True):
        assert torch.equal(one.scores_TE, other.scores_TE)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("predictor", [Frequency, Transition])
def test_what_was_counted_is_part_of_the_graph(predictor, trace):
    made = predictor(trace, 2)
    asked = Predicting(made.to("cuda"), 2, given=made)
    assert (
        why_not_in_graph(asked, open_device("cuda", None, row_bytes=1), range(LAYERS), 3, 8, torch.bfloat16)
        == ""
    )
