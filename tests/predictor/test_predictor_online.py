"""Online tuning: it notices when predictions get worse, learns, and can be undone."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch

import prescope
from prescope.engine import predicting
from prescope.engine.graph import beside
from prescope.errors import TraceMismatch, UnsupportedOption
from prescope.predictor import LlaporConfig, OnlineConfig, OnlineTuner
from prescope.scheduler.costs import LayerCosts
from prescope.training import TrainConfig, domain_shift, record_trace, routers_of, rows_of, train
from tests.support.models import EXPERTS, VOCABULARY, plain_tokens, prompt, tiny_moe

EAGER = OnlineConfig(steps=12, learning_rate=0.02, pull=0.0)


@pytest.fixture(scope="module")
def recorded():
    """A predictor, text like that of its training, and text whose experts have all changed their names: the hardest
    shift there is, since the early router is as wrong as what was learned.
    """
    prompts = np.random.default_rng(0).integers(0, VOCABULARY, (40, 32)).tolist()
    with prescope.attach(tiny_moe(), slots=1.0, device="null") as engine:
        trace = record_trace(engine, prompts)
        routers = routers_of(engine, trace)
    config = LlaporConfig(lookahead=2, hidden=64, block=16)
    training = TrainConfig(epochs=6, batch_tokens=128)
    predictor = train(trace, config=config, training=training, routers=routers).predictor
    renamed = np.random.default_rng(1).permutation(EXPERTS)
    after = replace(trace, expert_ids=renamed[trace.expert_ids])
    return predictor, rows_of(trace, np.arange(256)), after


def test_tuning_recovers_what_a_shift_took(recorded):
    predictor, before, after = recorded
    shift = domain_shift(predictor, before, after, online=EAGER)
    assert shift.cycles > 0
    assert shift.drop > 0.1
    assert shift.after_tuned > shift.after_fixed + shift.drop / 2
    assert shift.recovery_tokens is not None and shift.recovery_tokens < len(after)
    assert len(shift.fixed) == len(shift.tuned) == len(before) // 64 + len(after) // 64


def test_the_trained_predictor_is_left_alone_and_reset_goes_back_to_it(recorded):
    predictor, _, after = recorded
    former = {name: tensor.clone() for name, tensor in predictor.tensors.items()}
    tuner = OnlineTuner(predictor, EAGER)
    tuner.replay(after, 1)
    assert all(torch.equal(former[name], tensor) for name, tensor in predictor.tensors.items())
    assert not torch.equal(tuner.predictor.tensors["head"], predictor.tensors["head"])
    tuner.reset()
    np.testing.assert_array_equal(tuner.predictor.replay(after, 1), predictor.replay(after, 1))


def test_it_does_not_tune_while_predictions_are_as_good_as_held_out(recorded):
    predictor, before, _ = recorded
    tuner = OnlineTuner(predictor, OnlineConfig(margin=0.5))
    scores = tuner.replay(before, 1)
    assert tuner.cycles == 0
    np.testing.assert_allclose(scores, predictor.replay(before, 1), atol=1e-6)


@pytest.mark.parametrize("made_for", [2, 3, 4])
@pytest.mark.parametrize("tuned", [(True, False), (False, True)])
def test_each_lookahead_has_its_own_heads_in_a_model_of_few_layers_too(monkeypatch, made_for, tuned):
    """A predictor made for four layers ahead, in a model with two ahead at most: only those two can answer."""
    prompts = np.random.default_rng(0).integers(0, VOCABULARY, (4, 16)).tolist()
    with prescope.attach(tiny_moe(), slots=1.0, device="null") as engine:
        trace = record_trace(engine, prompts)
        routers = routers_of(engine, trace)
    config = LlaporConfig(lookahead=made_for, hidden=32, block=16)
    predictor = train(trace, config=config, training=TrainConfig(epochs=1), routers=routers).predictor
    monkeypatch.setattr(OnlineTuner, "is_tuned", np.array(tuned))
    tuner = OnlineTuner(predictor, OnlineConfig(margin=9.0))
    for ahead, scores in tuner.replay_all(trace, (1, 2)).items():
        np.testing.assert_allclose(scores, predictor.replay(trace, ahead), atol=1e-6)
    inputs, ids = (
        torch.from_numpy(trace.inputs[:1, 0].astype(np.float32)),
        torch.zeros(1, 2, dtype=torch.long),
    )
    live = tuner.predict(0, inputs, ids, torch.full((1, 2), 0.5))
    assert [one.lookahead for one in live] == [1, 2]


def test_live_it_learns_as_in_a_replay(recorded):
    """One token a step, layer by layer: predict, then observe what was used."""
    predictor, _, after = recorded
    few = rows_of(after, np.arange(96))
    live, replayed = OnlineTuner(predictor, EAGER), OnlineTuner(predictor, EAGER)
    expected = replayed.replay_all(few, (1, 2), chunk=1)
    inputs = torch.from_numpy(few.inputs.astype(np.float32))
    ids, weights = torch.from_numpy(few.expert_ids.astype(np.int64)), torch.from_numpy(few.weights)
    for row in range(len(few)):
        for layer in range(few.num_layers):
            at = slice(row, row + 1)
            for one in live.predict(layer, inputs[at, layer], ids[at, layer], weights[at, layer]):
                np.testing.assert_allclose(
                    one.scores_TE[0].numpy(), expected[one.lookahead][row, layer], atol=1e-3
                )
            live.observe(layer, ids[at, layer])
    assert live.cycles == replayed.cycles > 0
    assert live.tuning_ms > 0


def padded(trace, seed=0):
    """The trace with a third of padding among its rows, of other states and experts."""
    rng = np.random.default_rng(seed)
    at = np.sort(rng.choice(len(trace), len(trace) // 2, replace=False))
    rows = np.sort(np.concatenate([np.arange(len(trace)), at]))
    is_padding = np.r_[False, rows[1:] == rows[:-1]]
    other = rng.permutation(len(trace))[: len(rows)]
    found = trace.take(rows)
    ids, inputs = found.expert_ids.copy(), found.inputs.copy()
    ids[is_padding], inputs[is_padding] = (
        array[other[: is_padding.sum()]] for array in (trace.expert_ids, 3 * trace.inputs)
    )
    position = np.where(is_padding, -1, found.position)
    return replace(found, expert_ids=ids, inputs=inputs, position=position), ~is_padding


def test_padding_teaches_nothing(recorded):
    """As tokens their experts would be learned; and where they count as none, every prediction would be an error."""
    predictor, before, after = recorded
    few = rows_of(after, np.arange(200))
    with_padding, is_real = padded(few)
    tuner, alone = OnlineTuner(predictor, EAGER), OnlineTuner(predictor, EAGER)
    scores, expected = tuner.replay(with_padding, 1, chunk=1), alone.replay(few, 1, chunk=1)
    np.testing.assert_allclose(scores[is_real], expected, atol=1e-5)
    assert tuner.cycles == alone.cycles > 0 and tuner.error == pytest.approx(alone.error)
    shifts = [
        domain_shift(predictor, *pair) for pair in ((padded(before)[0], padded(after)[0]), (before, after))
    ]
    np.testing.assert_allclose(shifts[0].fixed, shifts[1].fixed)
    assert shifts[0].shift_at == shifts[1].shift_at


def test_live_padding_teaches_nothing(recorded):
    """Rows of padding are observed as -1."""
    predictor, _, after = recorded
    tuner = OnlineTuner(predictor, replace(EAGER, window=8, ring=16, pause=8))
    inputs = torch.from_numpy(after.inputs[:64].astype(np.float32))
    ids = torch.from_numpy(after.expert_ids[:64].astype(np.int64))
    weights = torch.from_numpy(after.weights[:64])
    for first in range(0, 64, 4):
        at = slice(first, first + 4)
        for layer in range(after.num_layers):
            tuner.predict(layer, inputs[at, layer], ids[at, layer], weights[at, layer])
            seen = ids[at, layer].clone()
            seen[1:3] = -1
            tuner.observe(layer, seen)
    real = np.arange(64).reshape(-1, 4)[:, [0, 3]].ravel()
    alone = OnlineTuner(predictor, replace(EAGER, window=8, ring=16, pause=8))
    alone.replay(after.take(real), 1, chunk=2)
    assert tuner.error == pytest.approx(alone.error) and tuner.cycles == alone.cycles > 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"window": 1.5}, {"window": "64"}, {"ring": None}, {"steps": True}, {"pause": 0}, {"margin": float("nan")},
        {"margin": "0.1"}, {"learning_rate": 0.0}, {"learning_rate": float("inf")}, {"pull": -1.0}, {"pull": "1"},
    ],
    ids=str,
)  # fmt: skip
def test_settings_that_are_none_are_told_by_name(recorded, wrong):
    with pytest.raises(UnsupportedOption, match=next(iter(wrong))):
        OnlineConfig(**wrong)
    predictor = recorded[0]
    with pytest.raises(UnsupportedOption, match="is a OnlineTuner"):
        OnlineTuner(OnlineTuner(predictor))
    for call in (
        lambda: OnlineTuner(predictor).replay(recorded[1], 1, chunk=0),
        lambda: domain_shift(predictor, recorded[1], recorded[1], window=0),
    ):
        with pytest.raises(UnsupportedOption, match="whole number, at least 1"):
            call()


def test_each_lookahead_is_answered_by_the_heads_that_were_better_at_it(recorded):
    """One learns at a lookahead what it forgets at another; the answer need not follow the mean."""
    predictor, _, after = recorded
    tuner = OnlineTuner(predictor, EAGER)
    tuner.replay(after, 1)
    as_trained, as_tuned = 0, 1
    tuner._errors[as_trained] = [[0.2, 0.9]]
    tuner._errors[as_tuned] = [[0.3, 0.1]]
    assert tuner.is_tuned.tolist() == [False, True]
    assert tuner.error == pytest.approx((0.2 + 0.1) / 2)
    inputs = torch.from_numpy(after.inputs[:5, 0].astype(np.float32))
    ids, weights = (
        torch.from_numpy(after.expert_ids[:5, 0].astype(np.int64)),
        torch.from_numpy(after.weights[:5, 0]),
    )
    near, far = tuner.predict(0, inputs, ids, weights)
    trained_near, trained_far = predictor.predict(0, inputs, ids, weights)
    tuned_near, tuned_far = tuner.predictor.predict(0, inputs, ids, weights)
    torch.testing.assert_close(near.scores_TE, trained_near.scores_TE)
    torch.testing.assert_close(far.scores_TE, tuned_far.scores_TE)
    assert not torch.allclose(trained_near.scores_TE, tuned_near.scores_TE)
    assert not torch.allclose(trained_far.scores_TE, tuned_far.scores_TE)


def test_wrong_settings_are_refused(recorded):
    predictor, before, after = recorded
    with pytest.raises(UnsupportedOption, match="ring holds a window"):
        OnlineConfig(ring=8)
    with pytest.raises(TraceMismatch, match="64 tokens"):
        domain_shift(predictor, rows_of(before, np.arange(9)), after)


def test_in_an_engine_it_learns_from_the_steps_that_run(recorded, monkeypatch):
    """It is asked and told in every layer; a prompt, which it was not asked about, teaches nothing."""
    predictor, _, _ = recorded
    monkeypatch.setattr(predicting, "SLOW_US", 1e9)  # on a busy machine it would be given up
    tuner = OnlineTuner(predictor, OnlineConfig(window=8, ring=16, pause=8, margin=-1.0))
    costs = LayerCosts(link_us=100.0, gpu_us=5.0, rest_us=200.0, source="made up for a test")
    given = {"schedule": "presched", "slots": 9, "cpu_threads": 0, "costs": costs, "device": "null"}
    ids = prompt(batch=2)
    with prescope.attach(tiny_moe(), predictor=tuner, **given) as engine:
        run = engine.generate(ids, max_new_tokens=13)
    assert run.tokens == plain_tokens(tiny_moe(), ids, new=13)
    assert not any("without predictions" in note for note in run.notes)
    assert tuner._seen == 2 * 12
    assert tuner.cycles > 0 and tuner.predictor is not predictor


@pytest.mark.filterwarnings("ignore:.* cannot be part of the graph:UserWarning")
@pytest.mark.parametrize("decode", ["auto", "layered"])
def test_a_run_says_that_beside_a_graph_it_does_not_learn(recorded, gpu, monkeypatch, decode):
    """Only the newest of the layers that wait is asked about there, and never the last one."""
    pytest.importorskip("triton", reason="Triton exists for Linux only")
    predictor, _, _ = recorded
    monkeypatch.setattr(predicting, "SLOW_US", 1e9)
    monkeypatch.setattr(beside, "MOST_KEPT_SHARE", 2.0)
    tuner = OnlineTuner(predictor.to(gpu["device"]))
    costs = LayerCosts(link_us=100.0, gpu_us=5.0, rest_us=200.0, source="made up for a test")
    given = {"schedule": "presched", "slots": 9, "cpu_threads": 0, "costs": costs, "decode": decode, **gpu}
    with prescope.attach(tiny_moe(), predictor=tuner, **given) as engine:
        run = engine.generate(prompt(), max_new_tokens=4)
    said = [re.search(r"learned nothing from (\d) steps.*decode='layered'", note) for note in run.notes]
    not_learned = [int(found[1]) for found in said if found]
    assert len(not_learned) == (decode == "auto"), run.notes
    assert tuner._seen == 3 - sum(not_learned)
