"""The artefact's recipe stands in tables like any predictor."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import prescope
from prescope.errors import BadTrace, UnsupportedOption
from prescope.predictor import Chance, Frequency
from prescope.training import record_trace, score, split_by_prompt, train_artefact
from prescope.training.artefact import INPUT, MIDDLE, OUTPUT, recipe_of
from tests.support.models import VOCABULARY, tiny_moe


@pytest.fixture(scope="module")
def trace():
    prompts = np.random.default_rng(0).integers(0, VOCABULARY, (24, 30)).tolist()
    with prescope.attach(tiny_moe(), slots=1.0, device="null") as engine:
        return record_trace(engine, prompts)


def test_its_groups_are_shares_of_the_depth():
    """Below 8 of 27, up to 20, and above."""
    groups = [recipe_of(layer, 27) for layer in range(27)]
    assert groups == [INPUT] * 8 + [MIDDLE] * 13 + [OUTPUT] * 6


def test_it_learns_says_probabilities_and_answers_live_as_replayed(trace):
    split, told = split_by_prompt(trace, 0.3, 0), []
    predictor = train_artefact(trace, split, epochs=3, on_layer=lambda *at: told.append(at))
    assert [layer for layer, _ in told] == list(range(trace.num_layers - 1))
    held = prescope.training.rows_of(trace, np.concatenate(split[1:]))
    card = score(predictor, held)
    assert card.lookaheads == (1,)
    assert (
        card.recall(1)
        > 0.1 + score(Frequency(trace, 1), held).recall(1)
        > score(Chance(trace.shape, 1), held).recall(1)
    )
    assert card.ece(1) < 0.03
    rows = np.arange(6)
    x, ids = torch.from_numpy(trace.inputs[rows, 1]), torch.from_numpy(trace.expert_ids[rows, 1])
    (live,) = predictor.predict(1, x, ids)
    np.testing.assert_allclose(live.scores_TE.numpy(), predictor.replay(trace, 1)[rows, 1], atol=1e-6)
    with pytest.raises(UnsupportedOption, match="choose 1 to 1"):
        predictor.replay(trace, 2)
    with pytest.raises(BadTrace, match="record_inputs"):
        train_artefact(replace(trace, inputs=None), split)


def test_the_same_seed_gives_the_same_scores(trace):
    split = split_by_prompt(trace, 0.3, 0)
    first, again, other = (train_artefact(trace, split, epochs=1, seed=s).replay(trace, 1) for s in (0, 0, 1))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
