"""Anybody may write a predictor: what is wrong with it is said by its name, wherever it is given."""

import numpy as np
import pytest
import torch

import prescope
from prescope.engine.predicting import Predictings
from prescope.errors import UnsupportedOption
from prescope.predictor import BadPrediction, Chance, Frequency, NoisyOracle, Oracle, PreviousToken
from prescope.predictor.baselines import Baseline
from prescope.scheduler.costs import LayerCosts
from prescope.simulator import Machine, Scenarios, Simulator, as_decode
from prescope.simulator.prepare import in_batches
from prescope.training import Inverted, savings, schedule_cards, split_by_prompt
from prescope.training.score_card import score
from prescope.tuning import SimulatorRunner
from tests.support.models import EXPERTS, LAYERS, TOP_K, prompt, tiny_moe
from tests.support.small_run import small_trace

COSTS = LayerCosts(link_us=100.0, gpu_us=5.0, rest_us=200.0, source="made up for a test")
LOOKAHEAD = 2


@pytest.fixture(scope="module")
def trace():
    return small_trace()


class Replaying(Baseline):
    """The oracle's scores of a whole trace, changed."""

    name = "somebody's own"

    def __init__(self, trace, change):
        super().__init__(trace.shape, LOOKAHEAD)
        self._change, self._oracle = change, Oracle(trace.shape, LOOKAHEAD)

    def _scorer(self, at):
        raise AssertionError("nobody asks it live")

    def replay(self, trace, lookahead):
        return self._change(self._oracle.replay(trace, lookahead))


class ReplayingRows(Replaying):
    """One that scores rows by themselves."""

    def replay_rows(self, trace, lookahead, rows):
        return self._change(self._oracle.replay_rows(trace, lookahead, rows))


def fails(scores):
    raise ZeroDivisionError("a replay broke")


def one_is_nan(scores):
    scores = scores.copy()
    scores[-1, 0, 0] = np.nan
    return scores


WRONG = {
    "raises": (fails, "ZeroDivisionError: a replay broke"),
    "NaN": (one_is_nan, "NaN or infinity in 1 row"),
    "infinity": (lambda scores: np.where(scores > 0, np.inf, 0.0), "infinity"),
    "logits": (lambda scores: 10.0 * scores - 5.0, "sigmoid"),
    "above 1": (lambda scores: 2.0 * scores, "answers 2;"),
    "rows": (lambda scores: scores[:-1], "it has to be"),
    # Numpy repeats these: they were taken for all layers, or for all experts.
    "a layer for all": (lambda scores: scores[:, :1], "it has to be"),
    "an expert for all": (lambda scores: scores[..., :1], "it has to be"),
    "a row for all": (lambda scores: scores[:1], "it has to be"),
    "layers": (lambda scores: np.concatenate([scores, scores[:, :1]], axis=1), "it has to be"),
    "experts": (lambda scores: scores[..., 1:], "it has to be"),
    "nothing": (lambda scores: None, "NoneType"),
    "a list": (lambda scores: scores.tolist(), "a list"),
    "objects": (lambda scores: scores.astype(object), "object"),
}


@pytest.mark.parametrize("kind", [Replaying, ReplayingRows])
@pytest.mark.parametrize(("change", "said"), WRONG.values(), ids=WRONG)
def test_a_wrong_replay_is_told_by_name_and_nothing_is_simulated_by_it(trace, kind, change, said):
    predictor = kind(trace, change)
    with pytest.raises(BadPrediction, match="replay of somebody's own") as error:
        Simulator(trace, COSTS, row_bytes=1, predictor=predictor).run(slots=8)
    assert said in str(error.value)


@pytest.mark.parametrize(("change", "said"), WRONG.values(), ids=WRONG)
def test_a_wrong_replay_gets_no_score_card(trace, change, said):
    with pytest.raises(BadPrediction, match="replay of somebody's own") as error:
        score(Replaying(trace, change), trace)
    assert said in str(error.value)


@pytest.mark.parametrize("kind", [Replaying, ReplayingRows])
@pytest.mark.parametrize(
    "change",
    [
        lambda scores: scores.astype(np.float64),
        lambda scores: scores > 0.5,
        lambda scores: scores.astype(np.uint8),
        lambda scores: torch.from_numpy(scores).bfloat16(),
        np.asfortranarray,
    ],
    ids=["float64", "bool", "bytes", "a tensor", "another order"],
)
def test_right_numbers_are_right_in_every_form(trace, kind, change):
    """Negated bytes are no order: a perfect predictor's recall was 0.0."""
    predictor, oracle = kind(trace, change), Oracle(trace.shape, LOOKAHEAD)
    runs = [Simulator(trace, COSTS, row_bytes=1, predictor=one).run(slots=8) for one in (predictor, oracle)]
    assert runs[0].counts == runs[1].counts and runs[0].total_us == runs[1].total_us
    card = score(predictor, trace)
    assert card.recall(1) == card.recall(2) == 1.0


# -- what is no predictor ------------------------------------------------------------------------------------


def refuses(given):
    raise RuntimeError("it cannot")


#: What is wrong with a predictor, and words of what is said of it.
NONE = {
    "shape is a tuple": ({"shape": (LAYERS, EXPERTS, TOP_K)}, "shape of a Changed"),
    "shape is nothing": ({"shape": None}, "shape of a Changed"),
    "lookahead is nothing": ({"lookahead": None}, "lookahead of a Changed"),
    "lookahead is negative": ({"lookahead": -1}, "lookahead of a Changed"),
    "lookahead is no count": ({"lookahead": 1.5}, "lookahead of a Changed"),
    "name is nothing": ({"name": None}, "name of a Changed"),
}
NONE_LIVE = {
    "to raises": ({"to": refuses}, "raised RuntimeError"),
    "to gives nothing": ({"to": lambda device: None}, "NoneType"),
}


def changed(trace, changes):
    class Changed(Frequency):
        pass

    made = Changed(trace, LOOKAHEAD)
    for name, value in changes.items():
        setattr(made, name, value)
    return made


@pytest.fixture(scope="module")
def attached():
    with prescope.attach(
        tiny_moe(), schedule="presched", costs=COSTS, slots=7, cpu_threads=0, device="cpu"
    ) as engine:
        yield engine, engine.generate(prompt(), max_new_tokens=4).trace


@pytest.mark.parametrize(("changes", "said"), (NONE | NONE_LIVE).values(), ids=NONE | NONE_LIVE)
def test_an_engine_says_what_is_wrong_with_a_predictor_and_stays_as_it_was(attached, changes, said):
    engine, trace = attached
    with pytest.raises(UnsupportedOption, match=said):
        engine.configure(predictor=changed(trace, changes))
    engine.generate(prompt(), max_new_tokens=2)
    engine.check_integrity()


@pytest.mark.parametrize(
    ("fast_path", "said"),
    [(refuses, "raised RuntimeError"), (lambda lookahead: lookahead, "without most_tokens")],
)
def test_a_fast_path_that_is_none_is_told_when_it_is_made(trace, fast_path, said):
    """Kernels of torch do not ask for it, so no engine on a CPU does either."""
    predictor = changed(trace, {"fast_path": fast_path})
    with pytest.raises(UnsupportedOption, match=said):
        Predictings().of(predictor, predictor, LOOKAHEAD, has_fast_path=True)


@pytest.mark.parametrize(("changes", "said"), NONE.values(), ids=NONE)
def test_simulator_and_score_card_say_the_same(trace, changes, said):
    predictor = changed(trace, changes)
    with pytest.raises(UnsupportedOption, match=said):
        Simulator(trace, COSTS, row_bytes=1, predictor=predictor)
    with pytest.raises(UnsupportedOption, match=said):
        score(predictor, trace)


@pytest.mark.parametrize(
    ("given", "said"), [(Frequency, "Frequency itself, a class"), (object(), "lacks .* name, shape")]
)
def test_a_class_or_another_object_is_no_predictor(attached, trace, given, said):
    with pytest.raises(UnsupportedOption, match=said):
        attached[0].configure(predictor=given)
    with pytest.raises(UnsupportedOption, match=said):
        Simulator(trace, COSTS, row_bytes=1, predictor=given)
    with pytest.raises(UnsupportedOption, match=said):
        score(given, trace)


# -- settings of what goes by predictors -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def machine():
    return Machine("a machine", COSTS, 1, 0.0, 0)


@pytest.mark.parametrize("make", [Scenarios, SimulatorRunner])
def test_predictors_are_a_list_and_each_has_a_name_of_its_own(trace, machine, make):
    """Of two predictors of one name the first was silently never asked."""
    first, second = Frequency(trace, LOOKAHEAD), Frequency(trace, LOOKAHEAD)
    with pytest.raises(UnsupportedOption, match="a list"):
        make(trace, [machine], first)
    with pytest.raises(UnsupportedOption, match="lacks"):
        make(trace, [machine], [Nameless()])
    with pytest.raises(UnsupportedOption, match="'frequency' is taken"):
        make(trace, [machine], [first, second])
    make(trace, [machine], [first, first])
    second.name = "another"
    make(trace, [machine], [first, second])
    second.name = "none"
    with pytest.raises(UnsupportedOption, match="'none' is taken"):
        make(trace, [machine], [first, second])


class Nameless:
    name = "somebody's own"


def test_scenarios_need_a_machine(trace):
    with pytest.raises(UnsupportedOption, match="machine"):
        Scenarios(trace, [])


@pytest.mark.parametrize("lookahead", [-1, 1.5, None, True])
def test_a_simulators_lookahead_is_a_number_of_layers(trace, lookahead):
    with pytest.raises(UnsupportedOption, match="lookahead"):
        Simulator(trace, COSTS, row_bytes=1, predictor=Frequency(trace, LOOKAHEAD), lookahead=lookahead)


@pytest.mark.parametrize(
    "wrong",
    [{"believed": 3}, {"resident": [[True]]}, {"resident": np.full((4, 8), np.nan)}, {"resident": "all"}],
    ids=str,
)
def test_what_a_run_is_given_has_to_be_what_it_is_named(trace, wrong):
    with pytest.raises(UnsupportedOption, match=next(iter(wrong))):
        Simulator(trace, COSTS, row_bytes=1).run(slots=8, **wrong)


@pytest.mark.parametrize("wrong", [{"lookaheads": 1}, {"lookaheads": []}, {"batch_tokens": 0}], ids=str)
def test_a_score_card_is_of_a_lookahead_and_a_token_at_least(trace, wrong):
    with pytest.raises(UnsupportedOption, match=next(iter(wrong))):
        score(Frequency(trace, LOOKAHEAD), trace, **wrong)


@pytest.mark.parametrize("figure", ["recall", "recalls", "recall_interval", "exact_frac", "hot", "ece"])
def test_a_card_names_the_lookaheads_that_it_has(trace, figure):
    card = score(Frequency(trace, LOOKAHEAD), trace, lookaheads=np.array([1, 2]))
    with pytest.raises(UnsupportedOption, match="no lookahead 3; it has 1, 2"):
        getattr(card, figure)(3)


@pytest.mark.parametrize("value", ["2", 1.5, None, True, 0, -1], ids=repr)
def test_counts_that_are_none_are_told_wherever_they_are_given(trace, value):
    """1.5 prompts side by side were regrouped somehow; texts and None ended in Python's TypeError."""
    oracle = Oracle(trace.shape, 2)
    calls = [
        lambda: as_decode(trace, value),
        lambda: in_batches(trace, value),
        lambda: score(oracle, trace, lookaheads=[value]),
        lambda: schedule_cards(oracle, trace, COSTS, row_bytes=1, lookahead=value),
        lambda: schedule_cards(oracle, trace, COSTS, row_bytes=1, batch=value),
        lambda: savings(oracle, trace, COSTS, batch=value),
        lambda: oracle.replay(trace, value),
    ]
    if value not in (None, 0):
        calls.append(lambda: savings(oracle, trace, COSTS, width=value))
    if value != 0:
        calls += [lambda: Chance(trace.shape, value), lambda: NoisyOracle(trace, {value: 0.9})]
        calls += [
            lambda: Chance(trace.shape, 1, seed=value),
            lambda: NoisyOracle(trace, {1: 0.9}, seed=value),
        ]
        calls += [lambda: split_by_prompt(trace, 0.2, value)]
    for call in calls:
        with pytest.raises(UnsupportedOption):
            call()


@pytest.mark.parametrize("decay", [-0.1, 0.75, float("nan"), "0.2", None])
def test_a_decay_that_makes_no_probabilities_is_told(trace, decay):
    with pytest.raises(UnsupportedOption, match="decay"):
        PreviousToken(trace.shape, 1, decay=decay)


def test_what_is_no_predictor_cannot_be_inverted(trace):
    with pytest.raises(UnsupportedOption, match="make one of it"):
        Inverted(Oracle)


@pytest.mark.parametrize("slots", [0.5, "8MiB", 8])
def test_one_number_of_slots_makes_one_card(trace, slots):
    (card,) = schedule_cards(Oracle(trace.shape, 2), trace, COSTS, row_bytes=1 << 20, slots=slots)
    (listed,) = schedule_cards(Oracle(trace.shape, 2), trace, COSTS, row_bytes=1 << 20, slots=[slots])
    assert card.row() == listed.row()
