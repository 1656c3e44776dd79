"""A recorded run at another batch: the same tokens of the same sequences, in steps of other sizes."""

import numpy as np
import pytest

from prescope.errors import UnsupportedOption
from prescope.simulator import ORACLE, Recording, Scenario, code_of, in_batches
from prescope.traces.routing import RoutingTrace
from prescope.traces.synthetic import SyntheticSpec

SPEC = SyntheticSpec(num_layers=3, num_experts=8, top_k=2)


def trace_of(*lengths: tuple[int, int]) -> RoutingTrace:
    """One sequence for each (tokens of its prompt, new tokens), one after the other."""
    return RoutingTrace.concat(
        [SPEC.generate(prompt_tokens=p, new_tokens=n, seed=i) for i, (p, n) in enumerate(lengths)]
    )


def tokens_of(trace: RoutingTrace) -> set[tuple[int, int, bytes]]:
    rows = zip(trace.sequence, trace.position, trace.expert_ids, strict=True)
    return {(int(s), int(p), ids.tobytes()) for s, p, ids in rows if p >= 0}


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_each_token_is_there_once_and_a_step_has_one_of_each_sequence(batch):
    trace = trace_of((3, 5), (6, 2), (1, 7))
    made, rows = in_batches(trace, batch)
    assert tokens_of(made) == tokens_of(trace)
    assert len(rows) == len(set(rows)) == len(made)
    assert (np.diff(made.step) >= 0).all()
    for step in made.steps:
        here = made.step == step
        assert len(set(made.phase[here])) == 1
        if made.phase[here][0]:
            assert here.sum() == len(set(made.sequence[here])) <= batch
    for sequence in (0, 1, 2):
        assert (np.diff(made.position[made.sequence == sequence]) == 1).all(), "prompt first, then in order"
    longest = [max(n for n in group) for group in np.split([5, 2, 7], range(batch, 3, batch))]
    assert len(set(made.step[made.phase == 1])) in (sum(longest), sum(longest) - len(longest))


def test_the_batch_as_recorded_is_the_trace_as_it_was():
    trace = SPEC.generate(prompt_tokens=4, new_tokens=6, batch=3, seed=2)
    made, _ = in_batches(trace, 3)
    for name in ("step", "phase"):
        assert (getattr(made, name) == getattr(trace, name)).all()
    assert tokens_of(made) == tokens_of(trace)
    assert tokens_of(in_batches(in_batches(trace, 1)[0], 3)[0]) == tokens_of(trace)


@pytest.mark.parametrize("batch", [0, 4, -1])
def test_more_sequences_than_there_are_cannot_be_served(batch):
    with pytest.raises(UnsupportedOption, match="1 to 3"):
        in_batches(trace_of((2, 2), (2, 2), (2, 2)), batch)


def test_recorded_predictions_go_with_their_tokens():
    """At a recall that stays: the same scores for the same tokens, and an oracle is one of the new steps."""
    scenarios = Recording.load("medium.b1").scenarios()
    assert scenarios.at_batch(1) is scenarios
    three = scenarios.at_batch(3)
    one, other = scenarios.predictors["llapor"], three.predictors["llapor"]
    mine, its = one.replay(scenarios.trace, 1), other.replay(three.trace, 1)
    assert mine.sum() == pytest.approx(its.sum())
    used = [
        np.take_along_axis(scores[:, 0], trace.expert_ids[:, 1].astype(np.int64), axis=1)[
            trace.phase == 1
        ].mean()
        for scores, trace in ((mine, scenarios.trace), (its, three.trace))
    ]
    assert used[0] == pytest.approx(used[1])
    scenario = Scenario(slots=128, machine=three.first_machine)
    assert three.run(scenario).batch == 3
    perfect = three.run(Scenario(slots=128, machine=scenario.machine, predictor=ORACLE))
    known = three.predictors[ORACLE].replay(three.trace, 1)
    assert (np.take_along_axis(known, three.trace.expert_ids[:, 1:].astype(np.int64), axis=2) == 1.0).all()
    assert any("batch 1" in note for note in perfect.notes)
    assert three.measured_there(scenario) is None
    assert "scenarios.at_batch(3)" in code_of(three, scenario)
    assert three.at_batch(1) is scenarios, "with what was measured there"
    assert any("those of batch 1" in note for note in three.at_batch(2).run(scenario).notes)
