"""`train_predictor` from end to end on the model that comes along: it must learn, and say so truly."""

import json

import numpy as np
import pytest
import torch

import prescope
from prescope.core import paths
from prescope.core.paths import embedded_model
from prescope.errors import BadTrace, PrescopeError, TraceMismatch, UnsupportedOption
from prescope.predictor import BadState, Llapor, LlaporConfig, TooFewPrompts
from prescope.predictor.llapor import ALWAYS_TRUST, NEVER_TRUST
from prescope.training import (
    TrainConfig,
    early_router,
    own_prompts,
    own_text,
    read_prompts,
    record_trace,
    router_agreement,
    routers_of,
    score,
)
from tests.support.bars import watch_bars
from tests.support.models import VOCABULARY, tiny_moe

SMALL = LlaporConfig(hidden=192, block=48)


@pytest.fixture(scope="module")
def engine():
    with prescope.load(embedded_model(), slots=1.0, device="null") as engine:
        yield engine


@pytest.fixture(scope="module")
def result(engine, tmp_path_factory):
    """112 prompts of about 25 tokens, and 4,096 tokens of own text: 7,000 tokens, the least that shows anything."""
    path = tmp_path_factory.mktemp("predictor") / "llapor.safetensors"
    training = TrainConfig(epochs=4, batch_tokens=256, hold_out=0.3)
    return prescope.train_predictor(
        engine, own_prompts(), config=SMALL, training=training, own_tokens=4096, path=path
    ), path


def test_it_beats_the_early_router_on_held_out_prompts(result):
    """At every lookahead, with the whole 95 % interval over prompts above zero."""
    trained, _ = result
    table = trained.table().set_index(["predictor", "lookahead"])
    for ahead in (1, 2, 4):
        row = table.loc[("llapor", ahead)]
        assert row["gain_low"] > 0, row
        assert row["low"] <= row["recall"] <= row["high"]


def test_the_controls_score_what_they_must(result):
    trained, _ = result
    assert all(trained.cards["oracle"].recall(ahead) == 1.0 for ahead in (1, 2, 4))
    assert all(abs(trained.cards["chance"].recall(ahead) - 2 / 16) < 0.03 for ahead in (1, 2, 4))


def test_its_scores_are_probabilities(result):
    trained, _ = result
    assert trained.predictor.is_calibrated
    assert trained.card.ece(1) < 0.02


def test_scores_of_faded_states_are_probabilities_too(result):
    """Each token uses K experts, so its scores add up to about K, known or strange; their level is the correction's,
    and was lost with it: the few known tokens of a batch decided which experts are hot.
    """
    trained, _ = result
    for share in (ALWAYS_TRUST, 0.3, 0.1, NEVER_TRUST):
        for ahead in (1, 4):
            sums = trained.predictor.trusting(share).replay(trained.test, ahead).sum(-1)
            assert abs(sums.mean() - 2) < 0.2, (share, ahead)


def test_groups_are_measured_and_their_reason_is_kept(result):
    trained, _ = result
    assert trained.groups.reason.startswith(("one group", "three groups"))
    assert trained.predictor.tag.notes["groups"] == trained.groups.reason
    assert len(trained.cues.correlation_L) == 8


def test_the_saved_file_serves_this_model_only(engine, result):
    trained, path = result
    loaded = Llapor.load(path, fingerprint=engine.fingerprint)
    np.testing.assert_array_equal(loaded.replay(trained.test, 2), trained.predictor.replay(trained.test, 2))
    with pytest.raises(TraceMismatch, match="train one for it"):
        Llapor.load(path, fingerprint="of another model")


def test_the_routers_taken_out_are_the_ones_that_decide(engine, result):
    trained, _ = result
    assert router_agreement(routers_of(engine, trained.trace), trained.trace) > 0.98


@pytest.mark.parametrize("lookahead", [1, 4])
def test_the_routers_applied_early_predict_without_training(engine, lookahead):
    """As probabilities, and as good as those that a training makes on real prompts: tiny-moe's have 0.78, 0.61."""
    early = early_router(engine, lookahead)
    assert (early.lookahead, early.shape, early.is_calibrated) == (lookahead, engine.shape.routing, True)
    trace = record_trace(engine, own_prompts("prose"), max_tokens=32)
    card = score(early, trace)
    assert card.recall(lookahead) > {1: 0.7, 4: 0.5}[lookahead]
    assert card.ece(lookahead) < 0.05


def test_own_text_is_the_same_for_a_seed_and_leaves_the_generator_alone(engine):
    torch.manual_seed(5)
    first = torch.rand(1)
    torch.manual_seed(5)
    texts = [own_text(engine, 96, length=16, seed=seed) for seed in (3, 3, 4)]
    assert torch.equal(torch.rand(1), first)
    assert np.array_equal(texts[0].expert_ids, texts[1].expert_ids)
    assert not np.array_equal(texts[0].expert_ids, texts[2].expert_ids)
    assert {prompt["domain"] for prompt in texts[0].prompts} == {"own text"}


def test_an_engine_keeps_its_settings(engine):
    former = engine.config
    record_trace(engine, ["a few words"])
    assert engine.config == former


@pytest.mark.parametrize("prompts", ["one text", ["a", "b", "c"], {"x": ["a"], "y": ["b"]}, []])
def test_too_few_prompts_are_refused_before_anything_runs(prompts):
    with pytest.raises(TooFewPrompts, match="4 or more"):
        prescope.train_predictor("no model is loaded for this", prompts)


FEW = [[1, 2, 3], [4, 5], [6, 7, 8, 9], [10], [11, 12]]


@pytest.mark.parametrize(
    "prompts",
    [
        lambda: iter(FEW), lambda: {"a": iter(FEW[:2]), "b": tuple(FEW[2:]), "none": []}, lambda: [*FEW, []],
        lambda: [np.array(row) for row in FEW], lambda: [torch.tensor(row) for row in FEW],
        lambda: [{"input_ids": row, "attention_mask": [1] * len(row)} for row in FEW],
    ],
)  # fmt: skip
def test_token_ids_in_every_form_are_the_same_prompts(prompts):
    with prescope.attach(tiny_moe(), slots=1.0, device="null") as engine:
        found, expected = record_trace(engine, prompts()), record_trace(engine, FEW)
        np.testing.assert_array_equal(found.expert_ids, expected.expert_ids)
        assert [known["tokens"] for known in found.prompts] == [known["tokens"] for known in expected.prompts]
        config = LlaporConfig.paper(lookahead=1, hidden=8, block=4)
        few = {"config": config, "own_tokens": 0, "training": TrainConfig(epochs=1)}
        assert prescope.train_predictor(engine, prompts(), **few).history


@pytest.mark.parametrize("new_tokens", [0, 3])
def test_whoever_waits_for_a_training_sees_how_far_it_is(monkeypatch, new_tokens):
    """Recording takes as long as training: a minute or two on a small model, and nothing was said in it."""
    bars, epochs = watch_bars(monkeypatch), []
    config = LlaporConfig.paper(lookahead=1, hidden=8, block=4)
    with prescope.attach(tiny_moe(), slots=1.0, device="null") as engine:
        for more in ({}, {"on_progress": epochs.append}):
            prescope.train_predictor(
                engine,
                FEW,
                new_tokens=new_tokens,
                own_tokens=0,
                config=config,
                training=TrainConfig(epochs=2),
                **more,
            )
        own_text(engine, 256)
    tokens = sum(map(len, FEW)) + new_tokens * len(FEW)
    done = [(bar.desc, bar.n, bar.total) for bar in bars]
    recording = ("recording", tokens, tokens)
    assert done[0] == done[2] == recording
    assert done[1] == ("training", 2, 2) and done[3] == ("training", 0, 2) and len(epochs) == 2
    assert done[4] == ("writing text to learn from", 256, 256)


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        ([*FEW, [1, VOCABULARY]], "token id"), ([*FEW, [-1]], "token id"), ([*FEW, [1.5, 2.0]], "prompt 5"),
        ([*FEW, [True]], "prompt 5"), ([*FEW, None], "prompt 5"), ([*FEW, [[1, 2]]], "prompt 5"),
        (range(9), "prompt 0"), ({"a": "a text whose letters are no prompts"}, "domain 'a' are a str"),
        (7, "are a int"), ({"input_ids": FEW, "attention_mask": FEW}, "tokenizer"), ([*FEW, "text"], "no tokenizer"),
    ],
    ids=str,
)  # fmt: skip
def test_prompts_that_are_none_are_told_by_their_place(prompts, said):
    with prescope.attach(tiny_moe(), slots=1.0, device="null") as engine:
        for call in (
            lambda: record_trace(engine, prompts),
            lambda: prescope.train_predictor(engine, prompts, own_tokens=0),
            lambda: prescope.train_predictor(engine, FEW, test_prompts=prompts, own_tokens=0),
        ):
            with pytest.raises(UnsupportedOption, match=said):
                call()


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": 0}, {"max_tokens": -1}, {"max_tokens": 1.5}, {"max_tokens": None}, {"new_tokens": -1},
        {"new_tokens": "4"}, {"own_tokens": -5}, {"own_tokens": 0.5}, {"own_tokens": "many"},
    ],
    ids=str,
)  # fmt: skip
def test_numbers_of_tokens_that_are_none_are_told(wrong):
    with (
        prescope.attach(tiny_moe(), slots=1.0, device="null") as engine,
        pytest.raises(UnsupportedOption, match=f"{next(iter(wrong))} is .* whole number"),
    ):
        prescope.train_predictor(engine, FEW, **{"own_tokens": 0, **wrong})


@pytest.mark.parametrize("test_prompts", [[], [[]], ["a text"], {"new": []}])
def test_test_prompts_that_cannot_be_recorded_are_told_before_training(test_prompts):
    prompts = np.random.default_rng(0).integers(0, 128, (6, 8)).tolist()
    epochs = []
    with prescope.attach(tiny_moe(), slots=1.0, device="null") as engine, pytest.raises(PrescopeError):
        prescope.train_predictor(
            engine, prompts, test_prompts=test_prompts, own_tokens=0, on_progress=epochs.append
        )
    assert not epochs


def test_states_that_are_nan_end_training_and_overwrite_nothing(tmp_path):
    """As a float16 model that overflows gives them."""
    model = tiny_moe()
    with torch.no_grad():
        model.model.norm.weight.fill_(1.0)
        model.model.layers[1].post_attention_layernorm.weight[0] = float("nan")
    path = tmp_path / "predictor.safetensors"
    path.write_text("what was there")
    prompts = np.random.default_rng(0).integers(0, VOCABULARY, (6, 12)).tolist()
    with pytest.raises((BadState, BadTrace), match="NaN"):
        prescope.train_predictor(model, prompts, path=path)
    assert path.read_text() == "what was there"


def test_text_without_a_tokenizer_and_unknown_domains_are_refused():
    with pytest.raises(UnsupportedOption, match="no tokenizer"):
        prescope.train_predictor(tiny_moe(), ["a", "b", "c", "d"])
    with pytest.raises(UnsupportedOption, match="poetry"):
        own_prompts("poetry")


def test_the_prompts_that_come_along_are_ours():
    lines = paths.embedded_prompts().read_text(encoding="utf-8").splitlines()
    assert {json.loads(line)["license"] for line in lines} == {"CC0-1.0"}
    assert len(own_prompts("code", "ood_rust")["code"]) == 16


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("letter", ["\u2028", "\u2029", "\x85"])
def test_a_separator_within_a_prompt_ends_no_line(letter, mark, tmp_path):
    """Data sets have them in their texts; only a line feed ends a line of JSON Lines."""
    texts = [f"one{letter}two", "three"]
    (tmp_path / "p.jsonl").write_text(
        mark + "\r\n".join(json.dumps({"prompt": text}, ensure_ascii=False) for text in texts), "utf-8"
    )
    (tmp_path / "p.txt").write_text(mark + "\n\n".join(texts) + "\n", "utf-8")
    for name in ("p.jsonl", "p.txt"):
        assert [text for group in read_prompts(tmp_path / name).values() for text in group] == texts
