"""Limits of time (`tests.support.speed`): slower code breaks them, a slower machine does not."""

import pytest

from tests.support.speed import MOST_SLOWER, REFERENCE_MS, assert_within, taken_ms


@pytest.mark.parametrize(
    ("code", "machine", "is_within"),
    [
        (0.9, 1.0, True),
        (1.1, 1.0, False),
        (1.1, 0.5, False),  # a faster machine takes nothing off
        (1.6, 1.7, True),  # both slower, as CI's machine is
        (2.0, 1.7, False),
        (1.1 * MOST_SLOWER, 100.0, False),
    ],
)
def test_the_limit_is_stretched_by_the_machine_alone(code, machine, is_within):
    def tried():
        return assert_within(10.0, lambda: 10.0 * code, reference=lambda: machine * REFERENCE_MS)

    if is_within:
        assert tried() == 10.0 * code
    else:
        with pytest.raises(AssertionError, match="10 are allowed"):
            tried()


def test_the_best_of_some_tries_counts():
    said = iter([40.0, 20.0, 9.0, 1.0])
    assert assert_within(10.0, lambda: next(said), reference=lambda: REFERENCE_MS) == 9.0
    with pytest.raises(AssertionError):
        assert_within(10.0, lambda: 30.0, tries=2, reference=lambda: REFERENCE_MS)


def test_work_takes_time_and_waiting_takes_none():
    assert taken_ms(lambda: sum(range(300_000))) > 0.5
