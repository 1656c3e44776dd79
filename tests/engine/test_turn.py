"""A turn is one thread's at a time, comes back whatever ends it, and can be waited for, told of and given up."""

import asyncio
import signal
import threading
import time
import warnings
from concurrent.futures import CancelledError
from contextlib import nullcontext

import pytest

from prescope.engine import turn as turn_module
from prescope.engine.turn import Turn
from prescope.errors import WaitTimedOut


@pytest.fixture
def turn():
    return Turn()


class Held:
    """A turn held by another thread, until `end`."""

    def __init__(self, turn: Turn, what: str = "a long run") -> None:
        self._go, begun = threading.Event(), threading.Event()

        def hold():
            begun.set()
            assert self._go.wait(30)

        self._thread = threading.Thread(target=turn.run, args=(what, hold), name="the-other")
        self._thread.start()
        assert begun.wait(10)

    def end(self) -> None:
        self._go.set()
        self._thread.join(10)
        assert not self._thread.is_alive()


@pytest.fixture
def held(turn):
    other = Held(turn)
    yield other
    other.end()


def is_free(turn: Turn) -> bool:
    """As another thread finds it."""
    found = []
    thread = threading.Thread(target=lambda: turn.run("a look", found.append, (True,)))
    thread.start()
    thread.join(5)
    return bool(found) and turn.holder is None


def test_one_thread_is_inside_at_a_time_and_all_get_in(turn):
    inside, most, done = 0, 0, []

    def work(name):
        nonlocal inside, most
        for _ in range(50):
            inside += 1
            most = max(most, inside)
            time.sleep(0.0002)
            inside -= 1
        done.append(name)

    def enter(name):
        for _ in range(4):
            turn.run("work", work, (name,))

    threads = [threading.Thread(target=enter, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert most == 1
    assert sorted(done) == sorted([*range(4)] * 4)


def test_who_comes_back_at_once_does_not_keep_others_out(turn):
    """A thread that runs one thing after another was awake when the turn came back, and took it every time."""
    turns, ends = [0, 0], time.monotonic() + 1.0

    def work(i):
        while time.monotonic() < ends:
            turn.run("work", time.sleep, (0.005,))
            turns[i] += 1

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert min(turns) > max(turns) / 4, turns


def test_who_has_the_turn_may_take_it_again_and_keeps_it_until_the_first_ends(turn):
    def inner():
        assert turn.is_mine
        return 1

    def outer():
        first = turn.run("inner", inner)
        assert turn.is_mine and turn.holder.what == "outer"
        return first + 1

    assert turn.run("outer", outer) == 2
    assert not turn.is_mine and turn.holder is None


@pytest.mark.parametrize(
    "error",
    [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit, asyncio.CancelledError, CancelledError],
)
@pytest.mark.parametrize("depth", [1, 2])
def test_whatever_ends_it_gives_the_turn_back(turn, error, depth):
    def fail():
        raise error

    def deeper():
        turn.run("inner", fail)

    with pytest.raises(error):
        turn.run("outer", fail if depth == 1 else deeper)
    assert is_free(turn)


def test_an_interrupt_between_any_two_instructions_gives_the_turn_back(turn):
    """A signal strikes after 100 us, again and again, also while the turn is waited for; one lost turn would hang the
    other thread.
    """
    wanted, rounds, others, is_armed = True, 0, 0, False

    def other():
        nonlocal others
        while wanted:
            others += 1
            time.sleep(0.0001)
            turn.run("other", lambda: None)

    def strike(_, frame):
        # Only inside the turn: one that strikes in this test's own handling would end the whole run of tests.
        while frame is not None:
            if frame.f_code.co_filename == turn_module.__file__:
                raise KeyboardInterrupt
            frame = frame.f_back
        if is_armed:
            signal.setitimer(signal.ITIMER_REAL, 0.0001)

    thread = threading.Thread(target=other)
    former = signal.signal(signal.SIGALRM, strike)
    thread.start()
    struck, begin = 0, time.monotonic()

    def is_enough() -> bool:
        """After two seconds, or as long as a busy machine takes for as much."""
        return time.monotonic() - begin > (2.0 if min(struck, others) > 200 else 60.0)

    try:
        while not is_enough():
            try:
                is_armed = True
                signal.setitimer(signal.ITIMER_REAL, 0.0001)
                for _ in range(100):
                    rounds += 1
                    turn.run("mine", lambda: turn.run("inner", lambda: None))
            except KeyboardInterrupt:
                struck += 1
            finally:
                is_armed = False  # first, or a handler that comes between would set it again
                signal.setitimer(signal.ITIMER_REAL, 0)
            assert not turn.is_mine
    finally:
        signal.signal(signal.SIGALRM, former)
        wanted = False
        thread.join(10)
    assert not thread.is_alive()
    assert struck > 200 and others > 200
    assert is_free(turn)


def test_a_long_wait_is_said_once_with_whom_it_is_for(turn, held, monkeypatch):
    monkeypatch.setattr(turn_module, "PATIENCE_S", 0.1)
    threading.Timer(0.6, held.end).start()
    with pytest.warns(
        UserWarning, match="a run in thread 'MainThread' waits for a long run in thread 'the-other'"
    ) as said:
        assert turn.run("a run", lambda: 5) == 5
    assert len(said) == 1


def test_a_short_wait_is_not_said(turn, held):
    threading.Timer(0.3, held.end).start()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert turn.run("a run", lambda: 5) == 5


@pytest.fixture
def ctrl_c():
    """Ctrl-C interrupts, also where the tests were started in the background of a shell, which ignores it."""
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, former)


@pytest.mark.parametrize("by", ["cancel", "own sign", "Ctrl-C"])
def test_a_wait_can_be_given_up(turn, held, ctrl_c, by):
    sign = threading.Event()
    ways = {
        "cancel": turn.cancel,
        "own sign": sign.set,
        "Ctrl-C": lambda: signal.pthread_kill(threading.main_thread().ident, signal.SIGINT),
    }
    threading.Timer(0.2, ways[by]).start()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt if by == "Ctrl-C" else CancelledError):
        turn.run("a run", lambda: pytest.fail("it ran"), was_told=sign.is_set)
    assert time.monotonic() - started < 2.0
    assert turn.holder.what == "a long run", "the other goes on"
    held.end()
    assert is_free(turn)


def test_cancel_tells_who_runs_and_leaves_the_patient_waiting(turn):
    """`close` waits for the run that `cancel` ends."""
    order = []

    def work():
        claim = turn.holder
        while not claim.is_cancelled:
            time.sleep(0.01)
        order.append("run")

    running = threading.Thread(target=turn.run, args=("a run", work))
    running.start()
    while turn.holder is None:
        time.sleep(0.001)
    closing = threading.Thread(
        target=turn.run, args=("close", order.append, ("close",)), kwargs={"is_patient": True}
    )
    closing.start()
    time.sleep(0.1)
    turn.cancel()
    running.join(5)
    closing.join(5)
    assert order == ["run", "close"]


def test_a_wait_with_a_limit_ends_with_whom_it_was_for(turn, held):
    with pytest.raises(WaitTimedOut, match=r"close waited 0 s for a long run in thread 'the-other'"):
        turn.run("close", lambda: pytest.fail("it ran"), is_patient=True, most_s=0.2)
    held.end()
    assert is_free(turn)


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_what_comes_afterwards_comes_before_anybody_elses_turn(turn, error):
    order = []

    def work():
        turn.afterwards(lambda: order.append("after"))
        turn.run("inner", order.append, ("inner",))
        thread.start()
        time.sleep(0.1)
        if error is not None:
            raise error

    thread = threading.Thread(target=turn.run, args=("other", order.append, ("other",)))
    with pytest.raises(error) if error else nullcontext():
        turn.run("mine", work)
    thread.join(5)
    assert order == ["inner", "after", "other"]


def test_cancel_without_a_run_is_no_threat_to_the_next(turn):
    turn.cancel()
    assert turn.run("a run", lambda: turn.holder.is_cancelled) is False
