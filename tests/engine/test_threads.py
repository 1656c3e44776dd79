"""Threads that share an attached model: each gets its own text, its own recording, and its turn."""

import threading
import time
from concurrent.futures import CancelledError

import pytest
import torch
from transformers.generation.streamers import BaseStreamer

import prescope
from prescope.errors import NotAttached, UnsupportedOption
from tests.support.models import EXPERTS, LAYERS, plain_tokens, prompt, tiny_moe

FAST_LINK = {"device": "cpu", "link_gb_per_s": 50.0}
TOTAL = LAYERS * EXPERTS
NEW = 10


def session_of(model):
    """A notebook's; its figures need the extra "lab"."""
    sessions = pytest.importorskip("prescope.session", reason="of the extra lab", exc_type=ImportError)
    return sessions.Session(prescope.attach(model, slots=4, **FAST_LINK))


@pytest.fixture(scope="module")
def model():
    return tiny_moe()


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    """Nine runs on a busy machine may take more than two seconds, and a warning is an error here."""
    monkeypatch.setattr("prescope.engine.turn.PATIENCE_S", 60.0)


def at_once(*works, timeout_s=60.0):
    """Run functions in threads of their own, begun together; returns what each returned or raised."""
    gate, found = threading.Barrier(len(works)), [None] * len(works)

    def call(i):
        gate.wait()
        try:
            found[i] = works[i]()
        except BaseException as error:  # noqa: BLE001 - the test looks at it
            found[i] = error

    threads = [threading.Thread(target=call, args=(i,)) for i in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout_s)
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    return found


# How a thread gets tokens; each returns new tokens by sequence.


def by_engine(engine, ids):
    return engine.generate(ids, max_new_tokens=NEW).tokens


def by_model(engine, ids):
    return plain_tokens(engine.model, ids, new=NEW)


@torch.no_grad()
def by_forward(engine, ids):
    """A loop of one's own."""
    output, rows = engine.model(ids), []
    for _ in range(NEW):
        tokens = output.logits[:, -1:].argmax(-1)
        rows.append(tokens)
        output = engine.model(tokens, past_key_values=output.past_key_values)
    return torch.cat(rows, dim=1).tolist()


@torch.no_grad()
def by_base_model(engine, ids):
    """The decoder alone, without its head, called directly."""
    rows = []
    for _ in range(NEW):
        hidden = engine.model.model(ids, use_cache=False).last_hidden_state
        tokens = engine.model.lm_head(hidden[:, -1:]).argmax(-1)
        rows.append(tokens)
        ids = torch.cat([ids, tokens], dim=1)
    return torch.cat(rows, dim=1).tolist()


WAYS = {"engine": by_engine, "model": by_model, "forward": by_forward, "base": by_base_model}


@pytest.mark.parametrize("slots", [3, 7, TOTAL])
@pytest.mark.parametrize("ways", [("engine",) * 3, ("model",) * 3, tuple(WAYS)], ids="-".join)
def test_every_thread_gets_the_plain_models_tokens(model, slots, ways):
    prompts = [prompt(batch=1 + i % 2, length=6 + 5 * i, seed=i) for i in range(len(ways))]
    expected = [plain_tokens(model, ids, new=NEW) for ids in prompts]
    with prescope.attach(model, slots=slots, **FAST_LINK) as engine:

        def work(i):
            return [WAYS[ways[i]](engine, prompts[i]) for _ in range(3)]

        found = at_once(*(lambda i=i: work(i) for i in range(len(ways))))
        engine.check_integrity()
    for i, texts in enumerate(found):
        assert texts == [expected[i]] * 3, f"thread {i}, by {ways[i]}"


def test_settings_changed_from_another_thread_wait_for_the_run(model):
    ids = prompt()
    expected = plain_tokens(model, ids, new=NEW)
    with prescope.attach(model, slots=4, **FAST_LINK) as engine:

        def change():
            for slots in (3, TOTAL, 5):
                engine.configure(slots=slots)
                engine.clear_cache()
                engine.check_integrity()
            return engine.num_slots

        found = at_once(lambda: [by_engine(engine, ids) for _ in range(6)], change)
    assert found == [[expected] * 6, 5]


def test_a_recording_holds_the_forwards_of_its_own_thread_alone(model):
    ids, other_ids = prompt(), prompt(batch=2, seed=5)
    with prescope.attach(model, slots=6, **FAST_LINK) as engine:
        alone = engine.generate(ids, max_new_tokens=4).trace
        with engine.record() as results:
            assert plain_tokens(model, ids, new=2) == [
                alone_tokens[:2] for alone_tokens in plain_tokens(model, ids, new=4)
            ]
            found = at_once(lambda: by_engine(engine, other_ids), lambda: by_model(engine, other_ids))
            with pytest.raises(UnsupportedOption, match="one thread records one run"):
                engine.generate(ids, max_new_tokens=2)
        run = results[0]
    assert found[0] == found[1] == plain_tokens(model, other_ids, new=NEW)
    assert set(run.trace.sequence.tolist()) == {0}
    assert len(run.steps) == 2 + 4
    assert run.trace.expert_ids[: len(ids[0])].tolist() == alone.expert_ids[: len(ids[0])].tolist()
    assert any("20 forward passes of other threads" in note for note in run.notes), run.notes


def test_two_recordings_of_two_threads_are_two(model):
    prompts = [prompt(length=5), prompt(length=8, seed=1)]
    with prescope.attach(model, slots=6, **FAST_LINK) as engine:

        def recorded(ids):
            with engine.record() as results:
                by_model(engine, ids)
            return results[0]

        runs = at_once(*(lambda ids=ids: recorded(ids) for ids in prompts))
    for ids, run in zip(prompts, runs, strict=True):
        assert (run.trace.position[: ids.shape[1] + 2]).tolist() == [*range(ids.shape[1] + 2)]
        assert len(run.trace) == ids.shape[1] + NEW - 1


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, CancelledError])
@pytest.mark.parametrize("where", ["before", "inside", "behind"])
def test_a_forward_that_raises_gives_its_turn_back(model, error, where):
    """torch calls no hook behind a forward that a KeyboardInterrupt ended."""
    ids = prompt()
    expected = plain_tokens(model, ids, new=NEW)

    def fail(*_):
        raise error

    with prescope.attach(model, slots=4, **FAST_LINK) as engine:
        layer = model.model.layers[1]
        hook = {
            "before": lambda: model.register_forward_pre_hook(fail),
            "inside": lambda: layer.mlp.experts.register_forward_pre_hook(fail),
            "behind": lambda: model.register_forward_hook(fail),
        }[where]()
        with pytest.raises(error):
            by_model(engine, ids)
        hook.remove()
        assert at_once(lambda: by_model(engine, ids), lambda: by_engine(engine, ids)) == [expected] * 2
        engine.check_integrity()


def test_who_waits_when_the_engine_is_closed_is_told_or_gets_the_plain_model(model):
    ids = prompt()
    expected = plain_tokens(model, ids, new=NEW)
    engine = prescope.attach(model, slots=4, **FAST_LINK)
    is_inside, may_go = threading.Event(), threading.Event()

    def stop(tokens):
        is_inside.set()
        assert may_go.wait(20)

    def let_go():
        time.sleep(0.3)
        may_go.set()

    def behind(work):
        assert is_inside.wait(20)
        return work()

    def late_run():
        time.sleep(0.15)
        return by_engine(engine, ids)

    found = at_once(
        lambda: engine.generate(ids, max_new_tokens=NEW, on_step=stop).tokens,
        lambda: behind(engine.close),
        lambda: behind(late_run),
        lambda: behind(lambda: by_model(engine, ids)),
        lambda: behind(let_go),
    )
    assert found[0] == [row[: len(found[0][0])] for row in expected], "close ends the run after a token"
    assert found[1] is None
    assert isinstance(found[2], NotAttached)
    assert found[3] == expected
    assert plain_tokens(model, ids, new=NEW) == expected
    assert "forward" not in model.__dict__ and "forward" not in model.model.__dict__


def test_a_recording_whose_engine_another_thread_closes_says_so(model):
    engine = prescope.attach(model, slots=4, **FAST_LINK)
    with pytest.raises(NotAttached, match="while it recorded"), engine.record():
        at_once(engine.close)
    with prescope.attach(model, slots=4, **FAST_LINK) as engine, engine.record() as results:
        by_model(engine, prompt())
        engine.close()  # its own recording is finished first
        assert engine.is_closed
    assert len(results[0].steps) == NEW
    assert plain_tokens(model, prompt(), new=NEW) and "forward" not in model.__dict__


def test_cancel_ends_the_run_and_those_that_wait_for_it(model):
    with prescope.attach(model, slots=4, **FAST_LINK) as engine:
        begun = threading.Event()

        def run():
            return engine.generate(prompt(), max_new_tokens=2000, on_step=lambda _: begun.set())

        def waiting():
            assert begun.wait(20)
            return engine.generate(prompt(seed=1), max_new_tokens=5)

        def cancelling():
            assert begun.wait(20)
            time.sleep(0.3)
            engine.cancel()

        first, second, _ = at_once(run, waiting, cancelling)
        assert any("cancelled" in note for note in first.notes)
        assert isinstance(second, CancelledError)
        assert len(by_engine(engine, prompt())[0]) == NEW


class Calling(BaseStreamer):
    """A streamer that calls the model from within its run."""

    def __init__(self, call):
        self._call, self.found = call, []

    def put(self, value):
        self.found.append(self._call())

    def end(self):
        pass


@torch.no_grad()
def test_the_model_may_be_called_from_within_a_run(model):
    ids, other = prompt(), prompt(seed=3)
    expected, logits = plain_tokens(model, ids, new=5), model(other).logits
    with prescope.attach(model, slots=4, **FAST_LINK) as engine:
        streamer = Calling(lambda: model(other).logits)
        run = engine.generate(ids, max_new_tokens=5, streamer=streamer)
    assert run.tokens == expected
    assert all(torch.allclose(found, logits, atol=1e-5) for found in streamer.found)


def test_a_job_and_a_cell_wait_for_one_another(model):
    """The session's runs, jobs and the model's own forwards go by one turn."""
    ids = prompt()
    expected = plain_tokens(model, ids, new=NEW)
    with session_of(model) as session:
        jobs = [session.job(ids, max_new_tokens=NEW) for _ in range(2)]
        assert by_model(session.engine, ids) == expected
        assert session.run(ids, max_new_tokens=NEW).tokens == expected
        assert [job.result(30).tokens for job in jobs] == [expected] * 2
        assert not session.is_running and len(session.runs) == 3


def test_a_job_that_waits_can_be_cancelled_and_the_run_goes_on(model):
    ids = prompt()
    with session_of(model) as session:
        begun, go = threading.Event(), threading.Event()

        def hold(tokens):
            begun.set()
            assert go.wait(20)

        def cancel():
            assert begun.wait(20)
            job = session.job(ids, max_new_tokens=NEW)
            time.sleep(0.1)
            job.cancel()
            with pytest.raises(CancelledError):
                job.result(5)
            go.set()

        run, error = at_once(lambda: session.engine.generate(ids, max_new_tokens=NEW, on_step=hold), cancel)
    assert error is None
    assert len(run.tokens[0]) == NEW and run.notes == []
