"""Any predictor: inside the graph, beside it or in the layers' way, the text is the plain model's and no step waits."""

import sys
import threading
import time

import numpy as np
import pytest
import torch

import prescope
from prescope.engine.graph.beside import SCORES_SHIFT, Listening, write_answers
from prescope.engine.graph.capturable import why_not_in_graph
from prescope.engine.graph.host_messages import has_all, read_predictions
from prescope.engine.predicting import WATCHED_CALLS, Predicting, of_step
from prescope.errors import UnsupportedOption
from prescope.predictor import Chance, EarlyRouter, Prediction, Routers
from prescope.scheduler.costs import LayerCosts
from prescope.training import Inverted
from tests.support.models import EXPERTS, LAYERS, plain_tokens, prompt, tiny_moe
from tests.support.predictors import SHAPE, WRONG, Answering, Gate, OnHost, scores_by, sleeps

pytest.importorskip("triton", reason="Triton exists for Linux only")
from triton.runtime.errors import OutOfResources

NEW = 5
COSTS = LayerCosts(link_us=100.0, gpu_us=5.0, rest_us=200.0, source="made up for a test")
ASIDE = pytest.mark.filterwarnings("ignore:.* cannot be part of the graph:UserWarning")


@pytest.fixture(scope="module")
def model():
    return tiny_moe()


@pytest.fixture(scope="module")
def early(model):
    weights = torch.stack([layer.mlp.gate.weight for layer in model.model.layers])
    return EarlyRouter(SHAPE, Routers.of_weights(weights), LAYERS - 1)


def opened(model, predictor, **settings):
    given = {"schedule": "presched", "cache": "lru", "costs": COSTS, "slots": 7, "cpu_threads": 0, **settings}
    return prescope.attach(model, predictor=predictor, **given)


#: Of a run in which a predictor beside the graph has to answer once.
MOST_TRIES = 20


def generate(engine, ids):
    run = engine.generate(ids, max_new_tokens=NEW)
    engine.check_integrity()
    return run


def answers_of(run):
    """Answers that came beside the graph, and layers that were decided with one, as the run notes them."""
    note = next(note for note in run.notes if "were decided with one" in note)
    return (int(text.split()[0]) for text in note.rpartition(": ")[2].split(" answers, and "))


@pytest.mark.parametrize(
    ("kind", "schedule", "batch"),
    [
        ("early", "presched", 1),
        ("inverted", "fate", 2),
        pytest.param("chance", "presched", 1, marks=pytest.mark.slow),
        pytest.param("inverted", "presched", 1, marks=pytest.mark.slow),
    ],
)
def test_a_predictor_on_the_host_runs_beside_the_graph_and_is_said_to(
    model, early, gpu, kind, schedule, batch
):
    """An interpreted layer takes longer than a prediction, so that many come in time."""
    inner = {"early": early, "inverted": Inverted(early), "chance": Chance(SHAPE, LAYERS - 1)}[kind]
    ids = prompt(batch=batch, length=5)
    with opened(model, OnHost(inner), schedule=schedule, slots=7 if batch == 1 else 11, **gpu) as engine:
        with pytest.warns(UserWarning, match="cannot be part of the graph .*reads a number back"):
            first = generate(engine, ids)
        answers, num_tries = 0, 0
        while not answers and num_tries < MOST_TRIES:  # a real GPU may be done before the first one
            again, num_tries = generate(engine, ids), num_tries + 1
            answers, decided = answers_of(again)
    for run in (first, again):
        assert run.tokens == plain_tokens(model, ids, new=NEW)
        reasons = run.config["reasons"]
        assert reasons["decode"].startswith("host-driven")
        assert reasons["predictor"].startswith("beside the graph: it reads a number back")
    assert answers > 0
    assert decided > 0 or torch.cuda.is_available(), "a real GPU is done with these layers before"


@ASIDE
def test_no_step_waits_for_a_predictor_that_never_answers(model, early, gpu):
    """It is held in its first call behind the trial's until the run is over, and the run comes to its end."""
    ids, gate = prompt(length=5), Gate()
    predictor = OnHost(early)
    with opened(model, predictor, **gpu) as engine:
        generate(engine, ids)
        predictor.before = gate
        begin = time.perf_counter()
        run = generate(engine, ids)
        took_s, held = time.perf_counter() - begin, gate.held
        gate.open()
    assert run.tokens == plain_tokens(model, ids, new=NEW)
    assert held == 1 and took_s < 50.0, "held calls end after 60 s"


@ASIDE
@pytest.mark.slow
def test_a_slow_predictor_is_asked_less_often_and_not_waited_for(model, early, gpu, monkeypatch):
    # The first step runs layer by layer, where it would be given up on a quick machine: another law.
    monkeypatch.setattr("prescope.engine.predicting.SLOW_US", 1e9)
    ids = prompt(length=5)
    expected = plain_tokens(model, ids, new=NEW)  # not of the attached model: each of its layers would wait
    predictor = OnHost(early, before=sleeps)
    with opened(model, predictor, **gpu) as engine:
        for _ in range(2):
            assert generate(engine, ids).tokens == expected


@ASIDE
@pytest.mark.parametrize("wrong", ["raises", pytest.param("NaN", marks=pytest.mark.slow)])
def test_what_goes_wrong_beside_the_graph_ends_the_predictions_and_not_the_run(model, early, gpu, wrong):
    ids, (change, words) = prompt(length=5), WRONG[wrong]
    predictor = Answering(early, change, begin=10**6)
    with opened(model, predictor, **gpu) as engine:
        generate(engine, ids)
        predictor._begin = 0
        with pytest.warns(UserWarning, match=f"failed at MoE layer .*{words}"):
            run = generate(engine, ids)
        predictor._begin = 10**6
        mended = generate(engine, ids)
    assert run.tokens == mended.tokens == plain_tokens(model, ids, new=NEW)
    assert "not all steps with predictions" in run.label and words in run.config["reasons"]["predictor"]
    assert any("without predictions" in note for note in run.notes)
    assert mended.label == run.label.replace(", not all steps with predictions", "")


@pytest.mark.parametrize("wrong", ["raises", "NaN", "rows", "experts", "layers", "too few", "logits"])
def test_the_same_layer_by_layer(model, early, wrong, monkeypatch):
    monkeypatch.setattr(
        "prescope.engine.predicting.SLOW_US", 1e9
    )  # it errs; on a busy machine it is slow as well
    ids, (change, words) = prompt(length=5), WRONG[wrong]
    predictor = Answering(early, change, begin=8)
    with opened(model, predictor, device="null") as engine:
        with pytest.warns(UserWarning, match=words):
            run = generate(engine, ids)
        predictor._begin = 10**6
        assert generate(engine, ids).tokens == run.tokens == plain_tokens(model, ids, new=NEW)
    assert "not all steps with predictions" in run.label and words in run.config["reasons"]["predictor"]


@pytest.mark.parametrize("wrong", WRONG)
def test_a_predictor_that_answers_wrongly_is_refused_before_any_run(model, early, wrong):
    change, words = WRONG[wrong]
    with pytest.raises(UnsupportedOption, match=words):
        opened(model, Answering(early, change), device="null")
    with opened(model, early, device="null") as engine:
        with pytest.raises(UnsupportedOption, match=words):
            engine.configure(predictor=Answering(early, change))
        assert generate(engine, prompt()).tokens == plain_tokens(model, prompt(), new=NEW)


def test_a_slow_predictor_in_the_layers_way_is_given_up(model, early):
    ids, predictor = prompt(length=5), OnHost(early, before=sleeps)
    with opened(model, predictor, device="null", decode="layered") as engine:
        predictor.calls = 0
        with pytest.warns(UserWarning, match="ms a layer"):
            run = generate(engine, ids)
    assert run.tokens == plain_tokens(model, ids, new=NEW) and predictor.calls == WATCHED_CALLS
    assert "ms a layer" in run.config["reasons"]["predictor"]


def test_a_predictor_that_remembers_in_python_is_not_captured(gpu, early):
    """A graph would repeat for ever what it answered when it was captured."""
    if torch.cuda.is_available():
        pytest.skip("runs on the interpreted GPU, which needs no engine here")
    from tests.support.interpreted_gpu import InterpretedGpu

    class Counting(OnHost):
        def predict(self, *case):
            self.calls += 1
            made = self.inner.predict(*case)
            return [one._replace(scores_TE=one.scores_TE / self.calls) for one in made]

    def why(predictor):
        case = Predicting(predictor, LAYERS - 1), InterpretedGpu(), range(LAYERS), 1, 32, torch.float32
        return why_not_in_graph(*case)

    assert why(early) == ""
    assert "in Python" in why(Counting(early))
    assert "reads a number back" in why(OnHost(early))


def test_a_late_answer_counts_for_the_layers_that_are_still_to_come():
    L, d, number = 5, 3, 7
    scores = np.zeros((L, d * 2 * EXPERTS), dtype=np.int64)
    values = np.random.default_rng(0).random((d, 2, EXPERTS)).astype(np.float32)
    write_answers(scores, number, 1, values)
    for layer in range(L):
        is_there = has_all(scores[layer], SCORES_SHIFT, number)
        assert is_there == (layer in (1, 2, 3))
        if is_there:
            tokens, used = np.zeros((d, EXPERTS)), np.zeros((d, EXPERTS))
            read_predictions(scores[layer], tokens, used)
            gone = layer - 1
            assert (tokens[: d - gone] == values[gone:, 0]).all() and (
                used[: d - gone] == values[gone:, 1]
            ).all()
            assert not tokens[d - gone :].any() and not used[d - gone :].any()


@ASIDE
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.* waits for .*:UserWarning")
def test_interrupts_and_other_threads_find_an_engine_that_works(model, early, gpu):
    ids = prompt(length=5)
    expected = plain_tokens(model, ids, new=NEW)
    with opened(model, OnHost(early, before=sleeps), **gpu) as engine:
        generate(engine, ids)

        def interrupt(tokens: int) -> None:
            if tokens == 3:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            engine.generate(ids, max_new_tokens=20, on_step=interrupt)
        runs = {}
        threads = [
            threading.Thread(
                target=lambda name=name: runs.update({name: engine.generate(ids, max_new_tokens=NEW)})
            )
            for name in "ab"
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        engine.check_integrity()
    assert [runs[name].tokens for name in "ab"] == [expected, expected]


@ASIDE
@pytest.mark.parametrize("where", ["host_driver.compile_first", "host_driver.Listening.begin"])
def test_an_interrupt_before_the_first_step_leaves_a_predictor_that_answers(
    model, early, gpu, monkeypatch, where
):
    """Its thread went on listening to the run that was given up, and never heard of another."""
    ids, switch_s = prompt(length=5), sys.getswitchinterval()
    with opened(model, OnHost(early), **gpu) as engine:
        generate(engine, ids)
        with monkeypatch.context() as patch:
            genuine = Listening.begin

            def interrupted(*arguments):
                if isinstance(arguments[0], Listening):
                    genuine(*arguments)
                raise KeyboardInterrupt

            patch.setattr(f"prescope.engine.graph.{where}", interrupted)
            with pytest.raises(KeyboardInterrupt):
                engine.generate(ids, max_new_tokens=NEW)
        assert sys.getswitchinterval() == switch_s
        answers, num_tries = 0, 0
        while not answers and num_tries < MOST_TRIES:
            run, num_tries = generate(engine, ids), num_tries + 1
            answers, _ = answers_of(run)
    assert answers > 0
    assert run.tokens == plain_tokens(model, ids, new=NEW)


@ASIDE
@pytest.mark.parametrize(
    "answer", [(1, 2, EXPERTS), (2, 1, EXPERTS), (2, 2, 1), (0, 2, EXPERTS), (EXPERTS,), None]
)
def test_a_fast_path_that_answers_of_another_shape_is_told_so(model, early, gpu, answer):
    """Compiled decisions read as many numbers as they expect: with fewer they would read foreign memory."""

    def scores(*arguments):
        return None if answer is None else torch.zeros(answer)

    scores.most_tokens = 4
    predictor, ids = OnHost(early), prompt(length=5)
    expected = plain_tokens(model, ids, new=NEW)
    predictor.fast_path = lambda lookahead: scores
    with opened(model, predictor, decode="layered", **gpu) as engine:
        with pytest.warns(UserWarning, match="fast_path of .* answers a (Tensor|NoneType) of shape"):
            run = generate(engine, ids)
        assert run.tokens == expected
        assert any("decoded without predictions" in note for note in run.notes)


@ASIDE
@pytest.mark.filterwarnings("ignore:.* failed at MoE layer 0. OutOfResources:UserWarning")
def test_a_fast_path_that_cannot_run_here_leaves_the_predictor_beside_the_graph(model, early, gpu):
    """Once it has failed in the way of the first step's layers, its capture was a foreign error that ended the run."""
    ids, asked = prompt(length=5), []

    class NoRoom:
        most_tokens = 4

        def __call__(self, *arguments):
            asked.append(arguments[0])
            raise OutOfResources(300_000, 232_448, "shared memory")

    predictor = OnHost(early)
    predictor.fast_path = lambda lookahead: NoRoom()
    with opened(model, predictor, **gpu) as engine:
        generate(engine, ids)
        run = generate(engine, ids)
    assert asked and run.tokens == plain_tokens(model, ids, new=NEW)
    reasons = run.config["reasons"]
    assert reasons["decode"].startswith("host-driven")
    assert reasons["predictor"].startswith("beside the graph: out of resource: shared memory")


# -- what it is given is the model's ---------------------------------------------------------------------------


def writes(x_TD, ids_TK, weights_TK):
    for one in (x_TD, ids_TK, weights_TK):
        one.zero_()


def writes_unseen(x_TD, ids_TK, weights_TK):
    """Torch does not count these."""
    for one in (x_TD, ids_TK, weights_TK):
        one.data.zero_()


class Writing(OnHost):
    """Answers as another one, then writes into what it was given, from some call on."""

    def __init__(self, inner, write, begin):
        super().__init__(inner)
        self._write, self._begin, self.name = write, begin, "a writing one"

    def predict(self, moe_layer, x_TD, ids_TK=None, weights_TK=None):
        made = super().predict(moe_layer, x_TD, ids_TK, weights_TK)
        if self.calls > self._begin:
            self._write(x_TD, ids_TK, weights_TK)
        return made


@pytest.mark.parametrize("part", range(3), ids=["x", "ids", "weights"])
def test_one_that_writes_into_what_it_is_given_is_refused_before_a_run(model, early, part):
    predictor = Writing(early, lambda *given: given[part].zero_(), 0)
    with pytest.raises(UnsupportedOption, match="a writing one writes into the tensors"):
        opened(model, predictor, device="cpu")


@pytest.mark.parametrize(("write", "is_said"), [(writes, True), (writes_unseen, False)])
@pytest.mark.parametrize("batch", [1, 3])
def test_what_it_writes_later_changes_no_token_and_no_recorded_expert(
    model, early, batch, write, is_said, monkeypatch
):
    monkeypatch.setattr("prescope.engine.predicting.SLOW_US", 1e9)  # on a busy machine it is slow as well
    ids = prompt(batch)
    with opened(model, None, device="cpu") as engine:
        plain = generate(engine, ids)
    with opened(model, Writing(early, write, 4), device="cpu") as engine:
        if is_said:
            with pytest.warns(UserWarning, match="writes into the tensors"):
                run = generate(engine, ids)
        else:
            run = generate(engine, ids)
    assert run.tokens == plain.tokens == plain_tokens(model, ids, NEW)
    assert (run.trace.expert_ids == plain.trace.expert_ids).all()
    assert (run.trace.weights == plain.trace.weights).all()


class Drawing(OnHost):
    """Draws when it is asked and when it is told, as a network with dropout does."""

    def __init__(self, inner, draw):
        super().__init__(inner, lambda call: draw())
        self._draw = draw

    def begin(self, num_sequences):
        pass

    def observe(self, moe_layer, ids_TK):
        self._draw()


@pytest.mark.parametrize("draw", [lambda: torch.rand(3), lambda: torch.manual_seed(7)], ids=["rand", "seed"])
@pytest.mark.parametrize("decode", ["auto", "layered"])
def test_one_that_draws_leaves_a_sampled_text_as_it_is(model, early, draw, decode, monkeypatch):
    monkeypatch.setattr("prescope.engine.predicting.SLOW_US", 1e9)  # on a busy machine it is slow as well
    ids = prompt()
    torch.manual_seed(3)
    plain = model.generate(ids, max_new_tokens=12, do_sample=True)
    torch.manual_seed(3)  # what attaching tries out draws too
    with opened(model, Drawing(early, draw), device="cpu", decode=decode) as engine:
        run = engine.generate(ids, max_new_tokens=12, do_sample=True)
    assert run.tokens == plain[:, ids.shape[1] :].tolist()


# -- numbers of many tokens ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.float8_e5m2])
def test_tokens_are_added_up_in_float32_whatever_scores_are_in(dtype):
    """514 times a half: bfloat16 has no 257, and in 8 bits torch adds nothing up."""
    scores = torch.full((514, EXPERTS), 0.5, dtype=dtype)
    scores[1:, 0] = 0.0
    made = of_step([Prediction(1, 1, scores)], 2, EXPERTS, torch.device("cpu"))
    assert made[0, 0].tolist() == [0.5, *[257.0] * (EXPERTS - 1)]
    assert made[0, 1].tolist() == [0.5, *[1.0] * (EXPERTS - 1)]


@pytest.mark.parametrize("batch", [1, 3, 32])
def test_a_little_below_0_is_rounding_however_many_tokens_there_are(model, early, batch, monkeypatch):
    monkeypatch.setattr("prescope.engine.predicting.SLOW_US", 1e9)  # on a busy machine it is slow as well
    predictor = Answering(early, scores_by(lambda scores: torch.full_like(scores, -0.002)))
    with opened(model, predictor, device="cpu", slots=24) as engine:
        assert not generate(engine, prompt(batch)).notes
