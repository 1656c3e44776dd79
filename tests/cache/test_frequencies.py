"""What is hot behind a prompt: a recorded run's uses and the prompt's own, by how far they are from each other."""

import numpy as np
import pytest

from prescope.cache.frequencies import behind_prompt, repeats_of, scatter_of
from prescope.traces.synthetic import SyntheticSpec

LAYERS, EXPERTS, USES = 16, 64, 400
RNG = np.random.default_rng(0)
KNOWN = RNG.dirichlet(np.full(EXPERTS, 0.5), LAYERS) * 1e4


def worth(mixed, prompt):
    """Uses a layer that the recorded run counts for."""
    return float((mixed - prompt).sum() / LAYERS)


def prompt_of(concentration, rng):
    """A text's uses whose shares are drawn around the recorded ones."""
    shares = [rng.dirichlet(np.maximum(concentration * row / row.sum(), 1e-12)) for row in KNOWN]
    return np.array([rng.multinomial(USES, row / row.sum()) for row in shares], dtype=np.float64)


def test_no_prompt_and_one_that_is_off_by_chance_alone_say_nothing_new():
    assert behind_prompt(KNOWN, np.zeros((LAYERS, EXPERTS))) is KNOWN
    assert behind_prompt(KNOWN, KNOWN / 100) is KNOWN


@pytest.mark.parametrize("concentration", [20.0, 100.0, 500.0])
def test_the_recorded_run_is_worth_as_much_as_texts_are_near_to_it(concentration):
    """Dirichlet's concentration is found again: the prior of which the mixture is the mean behind the prompt."""
    found = []
    for seed in range(20):
        prompt = prompt_of(concentration, np.random.default_rng(seed))
        found.append(worth(behind_prompt(KNOWN, prompt), prompt))
    assert np.median(found) == pytest.approx(concentration, rel=0.35)


def test_a_prompt_that_has_nothing_to_do_with_the_recorded_run_decides_alone():
    prompt = np.zeros((LAYERS, EXPERTS))
    prompt[np.arange(LAYERS), KNOWN.argmin(axis=1)] = USES
    mixed = behind_prompt(KNOWN, prompt)
    assert worth(mixed, prompt) < 1.0
    assert (mixed.argmax(axis=1) == KNOWN.argmin(axis=1)).all()


def test_layers_and_experts_that_were_never_used_are_no_trouble():
    known = KNOWN.copy()
    known[0], known[:, -1] = 0.0, 0.0
    prompt = prompt_of(20.0, np.random.default_rng(1))
    prompt[:, -1] = 5.0
    mixed = behind_prompt(known, prompt)
    assert np.isfinite(mixed).all() and (mixed[:, -1] == 5.0).all()


def prompt_that_persists(persistence, seed, tokens=200):
    """Expert ids (T, L, K) of one sequence, and the shares that its experts are drawn by."""
    spec = SyntheticSpec(
        num_layers=8, num_experts=64, top_k=4, zipf=0.4, persistence=persistence, diversity=0.0
    )
    known = spec.generate(prompt_tokens=4000, new_tokens=1, seed=1).expert_counts()
    trace = spec.generate(prompt_tokens=tokens, new_tokens=1, seed=seed).select(phase="prefill")
    return trace.expert_ids.astype(np.int64), known.astype(float)


@pytest.mark.parametrize(("persistence", "scatter"), [(0.0, 1.0), (0.3, 1.9), (0.6, 4.0)])
def test_uses_scatter_more_where_tokens_choose_what_the_one_before_chose(persistence, scatter):
    ids_TLK, _ = prompt_that_persists(persistence, seed=2)
    repeats = [repeats_of(ids_TLK[:, layer], 64) for layer in range(8)]
    assert scatter_of(repeats) == pytest.approx(scatter, rel=0.25)


def test_experts_that_all_tokens_choose_alike_are_popular_and_repeat_nothing():
    ids_TK = np.tile([3, 7], (50, 1))
    assert scatter_of([repeats_of(ids_TK, 16)]) == 1.0
    assert scatter_of([]) == scatter_of([repeats_of(ids_TK[:1], 16)]) == 1.0
    halves = np.where(np.arange(50)[:, None] < 25, [3, 7], [1, 2])
    assert scatter_of([repeats_of(halves, 16)]) <= 50.0 + 1e-9, "a prompt says as much as one token"
    padded = np.concatenate((ids_TK, np.full((5, 2), -1)))
    assert repeats_of(padded, 16) == repeats_of(ids_TK, 16), "padding is nobody's choice"


def test_a_prompt_that_only_repeats_itself_does_not_outweigh_the_recorded_run():
    """Its counts are three times as far off as chance makes them, and its habits are the recorded ones."""
    without, found = [], []
    for seed in range(2, 12):
        ids_TLK, known = prompt_that_persists(0.6, seed, tokens=48)
        prompt = np.stack([np.bincount(ids_TLK[:, layer].ravel(), minlength=64) for layer in range(8)]) * 1.0
        scatter = scatter_of([repeats_of(ids_TLK[:, layer], 64) for layer in range(8)])
        for shares, mixed in (
            (without, behind_prompt(known, prompt)), (found, behind_prompt(known, prompt, scatter)),
        ):  # fmt: skip
            hot = np.argsort(-mixed, axis=1)[:, :16]
            shares.append(np.take_along_axis(known, hot, axis=1).sum() / known.sum())
    assert np.mean(found) > np.mean(without) + 0.02, "more of what comes is in slots"
