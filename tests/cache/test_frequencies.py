"""What is hot behind a prompt: a recorded run's uses and the prompt's own, by how far they are from each other."""

import numpy as np
import pytest

from prescope.cache.frequencies import behind_prompt

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
