"""Measure this machine from a panel: a button, how far it is, how it ended, and what is known of the machine."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from dataclasses import dataclass
from html import escape
from statistics import median

import ipywidgets as ipw

from ..calibration import calibrate
from ..calibration.calibrate import ENGINE_SHARE
from ..core.machine import this_place
from ..core.units import digits
from ..engine.engine import Engine
from ..engine.job import Job
from ..errors import NoProfile, PrescopeError
from ..profile import HardwareProfile, own_file
from .figures import is_headless
from .job_controls import JobControls, JobWords
from .style import boxed, label

SECONDS = 45.0
MEASURE, AGAIN = "Measure this machine", "Measure again"
#: How often the button looks whether the engine is free.
LOOK_S = 0.5
#: How often the page is told how far a measurement is; each time disturbs it a little.
SHOW_S = 0.5
#: From this share of the points on, their pace says what is left.
KNOWN_PACE = 0.05
#: How notes of a profile begin that say what is doubtful, or lacking.
DOUBTS = ("the machine was busy", "not believed", "the engine records no events")
HELP = "Copies, experts on CPU and GPU, and this model's layers are timed here; the profile is kept for all sessions."
#: What a calibration calls its measurements -> what a person calls them.
NAMES = {
    "h2d": "copies to the GPU", "cpu": "CPU", "gpu": "GPU", "dram": "reading host memory", "batch": "batches of copies",
    "enqueue": "enqueueing a copy", "handover": "handing over a copy", "read": "reading back",
    "message": "a word from the GPU",
}  # fmt: skip


@dataclass
class CalibrationProgress:
    """How far a calibration is, by what it tells: an engine's layers come first, which are not counted, so time is.

    Attributes:
        share: of the bar. left_s: seconds until the end, about.
    """

    seconds: float = SECONDS
    share: float = 0.0
    left_s: float = SECONDS
    _begun: tuple[float, float] = (0.0, 0.0)  # share and time when the first point began

    def at(self, counted: float, elapsed_s: float) -> None:
        """Told that a share of the points is done."""
        self.left_s = max(0.0, self.seconds - elapsed_s)
        if counted <= 0.0:
            self.share = min(ENGINE_SHARE, elapsed_s / self.seconds)
            self._begun = (self.share, elapsed_s)
            return
        share, since_s = self._begun
        self.share = share + (1.0 - share) * counted
        if counted >= KNOWN_PACE:
            self.left_s = (elapsed_s - since_s) * (1.0 - counted) / counted


class MeasureJob(Job[HardwareProfile]):
    """A calibration for an engine, which runs nothing else meanwhile; cancelled, it keeps what it has for an hour.

    Attributes:
        what: is measured now.
    """

    def __init__(self, engine: Engine) -> None:
        super().__init__(self._measure, engine.turn, {}, what="the measurement of this machine")
        self._engine, self._pace, self.what = engine, CalibrationProgress(), "beginning"

    @property
    def progress(self) -> float:
        """Share that is done, 0 to 1."""
        return 1.0 if self.is_done else self._pace.share

    @property
    def left_s(self) -> float:
        """Seconds until it ends, about."""
        return self._pace.left_s

    def _measure(self, on_step: Callable[[int], None]) -> HardwareProfile:
        begin, counted, is_over = time.monotonic(), [0.0], threading.Event()

        def told(what: str, share: float) -> None:
            if self._engine.is_cancelled:
                raise CancelledError("the measurement was cancelled")
            self.what, counted[0] = what, share

        def show() -> None:
            # By the clock: a layer's runs tell nothing for seconds, and points come faster than a page should be told.
            while not is_over.wait(SHOW_S):
                self._pace.at(counted[0], time.monotonic() - begin)
                on_step(0)

        showing = threading.Thread(target=show, name="prescope-pace", daemon=True)
        showing.start()
        try:
            return calibrate(self._engine, seconds=SECONDS, on_progress=told)
        finally:
            is_over.set()
            showing.join()


class MeasureMachine:
    """A button that measures the engine's machine, and what was measured of it before.

    Args:
        measured: told when a new profile is saved, in the job's thread.

    Attributes:
        controls: button, bar, status. words: what is known of the machine. view: all of it.
    """

    def __init__(self, engine: Engine, measured: Callable[[], None]) -> None:
        self._engine, self._measured = engine, measured
        self._lock, self._is_closed = threading.Lock(), threading.Event()
        words = JobWords(
            under_way_words,
            lambda job: (),
            "cancelled; within the hour the next measurement goes on from here",
            "What was known of the machine stands.",
        )
        self.controls = JobControls(MEASURE, self.start, self._shown, words)
        self.controls.run_button.icon, self.controls.run_button.tooltip = "tachometer", HELP
        self.words = ipw.HTML()
        # No `Field`: Lab cannot draw a box that has a tooltip.
        self.controls.view.add_class("ps-unused")
        shown = ipw.VBox([self.controls.view, self.words])
        self.view = boxed(ipw.Box([label("this machine", HELP), shown]), "ps-field", "ps-wide")
        self._say()
        self.offer()
        if not is_headless():
            threading.Thread(target=self._look, name="prescope-measure", daemon=True).start()

    def start(self) -> Job[HardwareProfile] | None:
        """Measure, in the background; None while the engine runs something else, which is said beside the button."""
        self.offer()
        if self.controls.run_button.disabled:
            return None
        job = MeasureJob(self._engine)
        job.on_done(lambda _: self.offer())
        with self._lock:
            self.controls.view.remove_class("ps-unused")
            self.controls.watch(job, waits=False)
            self.controls.run_button.disabled = True
        return job

    def offer(self) -> None:
        """Enable the button, or say beside it why not."""
        with self._lock:
            if self.controls.is_running:
                self.controls.run_button.disabled = True
                return
            holder = self._engine.turn.holder
            self.controls.allow(reason_not("" if holder is None else holder.what, self._engine.is_closed))

    def close(self) -> None:
        """Cancel, and look no more."""
        self._is_closed.set()
        self.controls.close()

    def _look(self) -> None:
        while not self._is_closed.wait(LOOK_S):
            self.offer()

    def _shown(self, job: Job[HardwareProfile]) -> str:
        self._say()
        self._measured()
        return "with a doubt, see below" if any(map(_is_doubt, job.result().notes)) else ""

    def _say(self) -> None:
        """What is known of the machine, and what the button would do."""
        described = self._engine.hardware()
        is_own = own_file(this_place(described)).is_file()
        self.controls.run_button.description = f"{AGAIN if is_own else MEASURE} (up to {SECONDS:.0f} s)"
        try:
            profile = HardwareProfile.of_this_machine(described)
        except NoProfile:
            self.words.value = (
                "<span class='ps-soft'>Not measured yet: the machines to choose come with prescope, or are typed in."
                "</span>"
            )
        except PrescopeError as error:
            self.words.value = (
                f"<span class='ps-error'><b>{type(error).__name__}</b>: {escape(str(error))}</span>"
            )
        else:
            self.words.value = profile_words(profile, is_own=is_own)


def under_way_words(job: Job[HardwareProfile]) -> str:
    """How far a measurement is, what is left, and what is measured now."""
    assert isinstance(job, MeasureJob)
    return f"{100 * job.progress:.0f} %, {job.left_s:.0f} s left: {measured_now(job.what)}"


def measured_now(what: str) -> str:
    """What a calibration says it measures, in a person's words."""
    kind = what.partition(":")[0].partition(" ")[0]
    return NAMES.get(kind, kind) + what.removeprefix(kind)


def reason_not(busy_with: str, is_closed: bool) -> str:
    """Why nothing can be measured now; "" if it can.

    Args:
        busy_with: what the engine does now, or "".
    """
    if is_closed:
        return "the engine is closed"
    if not busy_with:
        return ""
    what = "a run" if busy_with == "a job" else busy_with
    return f"{what} is under way; wait for its end"


def profile_words(profile: HardwareProfile, *, is_own: bool) -> str:
    """When a machine was measured, the rates that were found, how far samples differ, and what is doubtful.

    Args:
        is_own: here, by its owner; else it comes with prescope.
    """
    rates = [f"link {digits(profile.lanes.link.rate_gb_per_s)} GB/s"]
    if (dram := profile.dram_gb_per_s()) == dram:
        rates.append(f"host memory {digits(dram)} GB/s")
    if threads := profile.machine.get("cpu_threads"):
        rates.append(f"CPU experts with {threads} thread{'s' if threads != 1 else ''}")
    spread = median(point.spread for point in profile.points)
    origin = "" if is_own else " for prescope, on a machine like this"
    doubts = "".join(
        f"<div class='ps-error'>{escape(note[:1].upper() + note[1:])}.</div>"
        for note in profile.notes
        if _is_doubt(note)
    )
    return (
        f"Measured <b>{escape(profile.measured)}</b>{origin}: {', '.join(rates)}. <span class='ps-soft'>"
        f"{len(profile.points)} points, samples differ by {100 * spread:.0f} % (median).</span>{doubts}"
    )


def _is_doubt(note: str) -> bool:
    return note.startswith(DOUBTS)
