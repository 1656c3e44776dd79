"""Start, pause, go on, cancel; how far a sweep is, how long it still takes, and how it ended."""

from collections.abc import Callable
from html import escape

import ipywidgets as ipw

from ..core.units import count_of
from ..engine.job import Job
from ..tuning import Progress, SweepJob
from .style import boxed, row


class SweepRun:
    """Watches one run of a sweep at a time.

    Args:
        start: begins a run with what the panel says; called by the button.
        shown: told of a run's progress, in the run's thread; with `is_last` before the status says how it ended.
        is_open: whether the study of this name is the one that is shown: of another one the status says which.

    Attributes:
        view: the row. job: the latest, or None. status: in words.
    """

    def __init__(
        self,
        start: Callable[[], object],
        shown: Callable[[Progress | None, bool], None],
        is_open: Callable[[str], bool],
    ) -> None:
        self._start, self._shown, self._is_open = start, shown, is_open
        self._name, self._said = "", ""
        self.job: SweepJob | None = None
        self.start_button = ipw.Button(description="Start", icon="play", button_style="primary")
        self.pause_button = ipw.Button(description="Pause", icon="pause", disabled=True)
        self.cancel_button = ipw.Button(description="Cancel", icon="stop", disabled=True)
        for button in (self.start_button, self.pause_button, self.cancel_button):
            button.layout.width = "auto"
        self.pause_button.tooltip = "Begin no new point; what is under way is finished"
        self.cancel_button.tooltip = "End; every finished point is kept, and Start goes on from there"
        self.bar = ipw.FloatProgress(min=0, max=1, layout={"width": "140px"})
        self.status, self.reason = ipw.HTML(), ipw.HTML()
        busy = boxed(ipw.Box([self.bar, self.status]), "ps-job")
        self.view = row(self.start_button, self.pause_button, self.cancel_button, busy, self.reason)
        self.start_button.on_click(lambda _: self._start())
        self.pause_button.on_click(lambda _: self.pause_or_go_on())
        self.cancel_button.on_click(lambda _: self.cancel())

    @property
    def is_running(self) -> bool:
        """Whether its run has begun and not ended."""
        return self.job is not None and not self.job.is_done

    def allow(self, reason_not: str, label: str = "Start") -> None:
        """Enable the button, or disable it and say beside it why."""
        self.start_button.disabled = bool(reason_not) or self.is_running
        self.start_button.description = label
        self.reason.value = f"<span class='ps-soft'>{escape(reason_not)}</span>" if reason_not else ""

    def watch(self, job: SweepJob, name: str) -> None:
        """Show a run of the study of this name from its start on, and start it."""
        self.job, self._name = job, name
        self.bar.value, self.bar.bar_style = 0.0, "info"
        self.say("starting")
        self.start_button.disabled, self.start_button.description = True, "Running"
        self.pause_button.disabled = self.cancel_button.disabled = False
        self._name_pause(False)
        job.on_step(self._step)
        job.on_done(self._done)
        job.start()

    def pause_or_go_on(self) -> None:
        """Begin no new point, or begin them again."""
        if self.job is None or self.job.is_done:
            return
        (self.job.resume if self.job.is_paused else self.job.pause)()
        self._name_pause(self.job.is_paused)

    def cancel(self) -> None:
        """End; what is finished is kept."""
        if self.job is not None and not self.job.is_done:
            self.job.cancel()
            self.cancel_button.disabled = True
            self.say("ending")

    def say(self, text: str) -> None:
        """Put words where the progress stands."""
        self._tell(f"<span class='ps-soft'>{escape(text)}</span>")

    def say_again(self) -> None:
        """Another study is shown."""
        self._tell(self._said)

    def _tell(self, html: str) -> None:
        self._said = html
        whose = "" if not html or self._is_open(self._name) else f"{escape(self._name)}: "
        self.status.value = whose + html

    def fail(self, error: BaseException) -> None:
        """Put an error there."""
        self.bar.bar_style = "danger"
        words = f"<b>{escape(type(error).__name__)}</b>: {escape(str(error))}"
        self._said, self.status.value = "", f"<span class='ps-error'>{words}</span>"

    def close(self) -> None:
        """End the run and show nothing of it any more."""
        job, self.job = self.job, None
        if job is not None and not job.is_done:
            job.cancel()

    def _name_pause(self, is_paused: bool) -> None:
        self.pause_button.description = "Go on" if is_paused else "Pause"
        self.pause_button.icon = "play" if is_paused else "pause"

    def _step(self, job: Job[Progress]) -> None:
        progress = self._status_of(job)
        if progress is None:
            return
        if progress.total:
            self.bar.value = min(1.0, progress.done / progress.total)
        self._tell(escape(str(progress)))
        self._shown(progress, False)

    def _status_of(self, job: Job[Progress]) -> Progress | None:
        """How far a run is; None of one that a newer one has replaced."""
        return self.job.status if job is self.job and self.job is not None else None

    def _done(self, job: Job[Progress]) -> None:
        if job is not self.job:
            return
        self.pause_button.disabled = self.cancel_button.disabled = True
        self._name_pause(False)
        self._shown(self._status_of(job), True)
        if job.error is not None:
            self.fail(job.error)
            return
        word, look = ("cancelled", "warning") if job.is_cancelled else ("done", "success")
        self.bar.value, self.bar.bar_style = 1.0, look
        self._tell(f"{word}: {_summary(job.result())}")


def _summary(progress: Progress) -> str:
    """How a run ended."""
    bad = [(progress.infeasible, "infeasible"), (progress.failed, "failed")]
    parts = [count_of(progress.done, "point"), *(f"{count:,} {what}" for count, what in bad if count)]
    took = (
        f" in {progress.seconds:.3g} s" if progress.seconds < 100 else f" in {progress.seconds / 60:.3g} min"
    )
    return ", ".join(parts) + took
