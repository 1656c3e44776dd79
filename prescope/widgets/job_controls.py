"""Run, Cancel, a bar, what is left and how it ended: the same for every panel that runs something."""

from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from html import escape
from typing import NamedTuple

import ipywidgets as ipw

from ..engine.job import Job
from .style import boxed, row


def tokens_left(job: Job) -> str:
    """Tokens so far, and the seconds until the last one."""
    count = f"{job.num_tokens} token{'s' if job.num_tokens != 1 else ''}"
    return count if job.left_s is None else f"{count}, {job.left_s:.1f} s left"


class JobWords(NamedTuple):
    """What is said of a job.

    Attributes:
        under_way: how far it is. notes: of a job that went well, what its result must be read with.
        cancelled: of one without a result. failed: added to its error.
    """

    under_way: Callable[[Job], str] = tokens_left
    notes: Callable[[Job], Sequence[str]] = lambda job: job.result().notes
    cancelled: str = "cancelled before the first token; what is shown is the former run"
    failed: str = "What is shown is the former run."


class JobControls:
    """Watches one job at a time; a job that a newer one has replaced shows nothing.

    Args:
        label: of the button. `start`: begins a job with what the panel says; called by the button.
        shown: told of the job's end when its result is there, before the status says so; runs in the job's thread.
            Returns what a person must know about it, or "".
        words: what the status says; by default of a run.

    Attributes:
        view: the row. job: the latest, or None.
    """

    def __init__(
        self,
        label: str,
        start: Callable[[], object],
        shown: Callable[[Job], str],
        words: JobWords = JobWords(),  # noqa: B008 - immutable
    ) -> None:
        self._shown, self._words = shown, words
        self._on_token: Callable[[Job], None] | None = None
        self.job: Job | None = None
        self.run_button = ipw.Button(description=label, icon="play", button_style="primary")
        self.run_button.layout.width = "auto"
        self.cancel_button = ipw.Button(description="Cancel", icon="stop", disabled=True)
        self.cancel_button.layout.width = "auto"
        self.bar = ipw.FloatProgress(min=0, max=1, layout={"width": "160px"})
        self.status = ipw.HTML()
        self.reason = ipw.HTML()
        busy = boxed(ipw.Box([self.bar, self.status]), "ps-job")
        # The buttons stay where they are, whatever the status says: one that moves is missed.
        self.view = boxed(row(self.run_button, self.cancel_button, busy, self.reason), "ps-run")
        self.run_button.on_click(lambda _: start())
        self.cancel_button.on_click(lambda _: self.cancel())

    @property
    def is_running(self) -> bool:
        """Whether its job has begun and not ended."""
        return self.job is not None and not self.job.is_done

    def allow(self, reason_not: str) -> None:
        """Enable the button, or disable it and say beside it why."""
        self.run_button.disabled = bool(reason_not)
        self.reason.value = f"<span class='ps-soft'>{escape(reason_not)}</span>" if reason_not else ""

    def watch(self, job: Job, waits: bool, on_token: Callable[[Job], None] | None = None) -> Job:
        """Show a job from its start on, and start it.

        Args:
            waits: another run is under way, which this one waits for.
            on_token: called while tokens come, ten times a second at most, from another thread.
        """
        self.cancel()
        self.job, self._on_token = job, on_token
        self.cancel_button.disabled = False
        self.bar.value, self.bar.bar_style = 0.0, "info"
        self.status.value = "waiting for the former run" if waits else "running"
        job.on_progress(self._progress)
        job.on_done(self._done)
        return job.start()

    def cancel(self) -> None:
        """End the job after the token it is at."""
        if self.job is not None:
            self.job.cancel()

    def close(self) -> None:
        """Cancel the job and show nothing of it any more."""
        self.cancel()
        self.job = None

    def forget(self, text: str = "") -> None:
        """What the status said is no longer about what is shown."""
        if not self.is_running:
            self.bar.value, self.bar.bar_style, self.status.value = 0.0, "", text

    def _progress(self, job: Job) -> None:
        if job is not self.job:
            return
        self.bar.value = job.progress
        self.status.value = escape(self._words.under_way(job))
        if self._on_token is not None:
            self._on_token(job)

    def _done(self, job: Job) -> None:
        if job is not self.job:
            return
        error, told = job.error, ""
        if error is None:
            try:
                told = self._shown(job)
            except Exception as failure:  # noqa: BLE001 - lost in a callback, it would leave "running" for ever
                error = failure
        if error is None:
            notes = [escape(note) for note in (told, *self._words.notes(job)) if note]
            word = "cancelled" if job.is_cancelled else "done"
            if any(note.startswith(word) for note in notes):  # and after how many steps
                word = ""
            look = "warning" if job.is_cancelled or told else "success"
            self.status.value = "; ".join(filter(None, [word, *notes]))
        elif isinstance(error, CancelledError):
            look = "warning"
            self.status.value = self._words.cancelled
        else:
            look = "danger"
            self.status.value = (
                f"<span class='ps-error'><b>{escape(type(error).__name__)}</b>: {escape(str(error))} "
                f"{self._words.failed}</span>"
            )
        self.bar.value, self.bar.bar_style = 1.0, look
        self.cancel_button.disabled = True
