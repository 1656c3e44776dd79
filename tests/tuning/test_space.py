"""What may move: ranges, choices, and what a person is told who asks for what is not there."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prescope.core.types import MoEShape
from prescope.errors import UnsupportedOption
from prescope.tuning import Choices, Range, Space
from prescope.tuning.settings import engine_settings, simulator_settings

SHAPE = MoEShape(num_layers=8, num_experts=32, top_k=4, row_bytes=1000)
KNOWN = simulator_settings(SHAPE, ["this machine"], ["a trace"], ["none", "llapor"])


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Range(3, 2),
        lambda: Range(0, 1, step=0),
        lambda: Range(0, 1, step=-1),
        lambda: Range(0, 8, log=True),
        lambda: Range(1, 8, step=2, log=True),
        lambda: Range(float("nan"), 1),
        lambda: Range(0, float("inf")),
        lambda: Range(True, 3),
        lambda: Range("1", 3),
        lambda: Choices(),
        lambda: Choices("a", "a"),
        lambda: Choices(1, True),
        lambda: Choices(["a", "b"]),
        lambda: Choices(object()),
        lambda: Choices(float("nan")),
        lambda: Space(),
        lambda: Space(slots=0.5),
    ],
)
def test_what_holds_nothing_is_refused_when_it_is_written(wrong):
    with pytest.raises(UnsupportedOption):
        wrong()


@given(st.integers(-50, 50), st.integers(0, 60), st.integers(1, 9), st.sampled_from([1, 0.1, 0.05, 0.3]))
def test_a_grid_and_optuna_mean_the_same_values(low, width, step, unit):
    """If a step does not meet the upper end, both stop before it; Optuna would warn, and a grid must not reach over."""
    one = Range(low * unit, (low + width) * unit, step=step * unit)
    values, distribution = one.values(), one.distribution()
    assert values[0] == distribution.low
    assert values[-1] == pytest.approx(distribution.high)
    assert values[-1] <= one.high + 1e-9
    assert len(values) == 1 + round((distribution.high - distribution.low) / distribution.step)
    assert all(distribution._contains(distribution.to_internal_repr(value)) for value in values)


def test_whole_numbers_stay_whole():
    assert Range(1, 4).values() == [1, 2, 3, 4]
    assert Range(1, 8, step=3).values() == [1, 4, 7]
    assert all(isinstance(value, int) for value in Range(1, 8, step=3).values())
    assert Range(0.1, 1).values() is None
    assert Space(a=Range(1, 4), b=Choices("x", None)).size == 8
    assert Space(a=Range(1, 4), b=Range(0.0, 1.0)).size is None


def test_a_space_comes_back_from_a_study_as_it_was():
    space = Space(slots=Range(0.1, 0.9, step=0.1), width=Range(1, 64, log=True), cache=Choices(None, "lru"))
    back = Space.of_plain(space.to_plain())
    assert dict(back) == dict(space)
    assert list(back) == list(space)


@pytest.mark.parametrize(
    ("space", "said"),
    [
        (Space(slot=Range(1, 2)), "no setting 'slot'.*slots.*schedule"),
        (Space(threshold=Range(0.0, 2.0)), r"threshold.*\[0, 1\]"),
        (Space(lookahead=Range(0, 4)), r"lookahead.*\[1, "),
        (Space(lookahead=Range(1.0, 4.0)), "lookahead.*whole number"),
        (Space(lookahead=Range(1, 4, step=0.5)), "lookahead.*whole number"),
        (Space(slots=Range(0.5, 4)), r"slots.*share.*\(0, 1\]"),
        (Space(slots=Range(0, 1, step=0.5)), "slots"),
        (Space(lookahead=Range(8, 9)), "lookahead.*none above 7"),
        (Space(width=Range(40, 64)), "width.*none above 32"),
        (Space(schedule=Choices("fifo")), "schedule.*'on-demand'.*'presched'"),
        (Space(schedule=Range(1, 3)), "schedule.*'on-demand'"),
        (Space(slots=Range(0.0, 1.0)), "slots"),
        (Space(slots=Range(0.5, 2.0)), "slots"),
        (Space(slots=Choices("8 parsecs")), "slots"),
        (Space(cpu=Choices(1, 0)), "cpu.*True"),
        (Space(machine=Choices("h100")), "machine.*'this machine'"),
        (Space(recall=Range(0.0, 1.0)), "recall"),
        (Space(decode=Choices("layered")), "no setting 'decode'"),
    ],
)
def test_a_setting_or_range_that_is_not_there_is_said_with_those_that_are(space, said):
    with pytest.raises(UnsupportedOption, match=said):
        space.checked(KNOWN, {})


@pytest.mark.parametrize(
    "space",
    [
        Space(slots=Range(0.05, 1.0), cache=Choices(None, "lru", "next-use")),
        Space(slots=Range(1, 300)),
        Space(slots=Choices("8GiB", 0.5, 40)),
        Space(lookahead=Choices(None, 1, 2), width=Range(0, 40), batch=Range(1, 8), cpu=Choices(True, False)),
    ],
)
def test_what_can_be_is_let_in(space):
    """Part of a range may lie beyond the model: these points are infeasible, and say so in the table."""
    space.checked(KNOWN, {"schedule": "presched"})


@pytest.mark.parametrize("ends", [(0, 1), (np.int64(0), np.int64(1)), (0.0, 1), (0, np.float32(1.0))])
def test_a_share_has_more_values_than_its_whole_ends(ends):
    """`--vary threshold=0:1` tried 0 and 1 and nothing between them; slots are a count where they are whole."""
    space = Space(threshold=Range(*ends), slots=Range(1, 8)).checked(KNOWN, {})
    assert space["threshold"] == Range(0.0, 1.0)
    assert space["threshold"].values() is None
    assert len(space["slots"].values()) == 8
    assert Space(threshold=Range(0, 1, step=0.25)).checked(KNOWN, {})["threshold"].values() == [
        0,
        0.25,
        0.5,
        0.75,
        1,
    ]


def test_numpys_numbers_are_pythons():
    """They come of arange and of a table's columns; a study holds them as JSON, a page shows them as code."""
    space = Space(
        lookahead=Range(np.int64(1), np.int16(3), np.int8(1)),
        threshold=Range(np.float32(0.5), np.float64(0.75)),
        width=Choices(*np.arange(2, 8, 2)),
        cpu=Choices(*np.array([True, False])),
        cache=Choices(*np.array(["lru", "lfu"])),
    )
    plain = Space(
        lookahead=Range(1, 3, 1), threshold=Range(0.5, 0.75), width=Choices(2, 4, 6), cpu=Choices(True, False),
        cache=Choices("lru", "lfu"),
    )  # fmt: skip
    assert repr(space.checked(KNOWN, {})) == repr(plain)
    assert json.dumps(space.to_plain()) == json.dumps(plain.to_plain())


def test_fixed_settings_are_checked_too_and_do_not_move():
    with pytest.raises(UnsupportedOption, match="both"):
        Space(slots=Range(1, 4)).checked(KNOWN, {"slots": 3})
    with pytest.raises(UnsupportedOption, match="fixed threshold=2"):
        Space(slots=Range(1, 4)).checked(KNOWN, {"threshold": 2})


def test_simulator_and_engine_share_what_both_know():
    engine = engine_settings(SHAPE, ["none"], ["auto", "layered"])
    assert {"slots", "schedule", "cache", "predictor", "lookahead", "width", "threshold", "batch", "cpu"} <= (
        engine.keys() & KNOWN.keys()
    )
    assert {"decode", "compiled", "cpu_threads"} <= engine.keys()
