"""Run, Cancel, a bar, what is left and how it ended: the same for every panel that runs something."""

import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from html import escape

import ipywidgets as ipw

from ..engine.job import Job
from .figures import UPDATE_S
from .style import boxed, row


class JobControls:
    """Watches one job at a time; a job that a newer one has replaced shows nothing.

    Args:
        label: of the button. `start`: begins a job with what the panel says; called by the button.
        shown: told of the job's end when its result is there, before the status says so; runs in the job's thread.

    Attributes:
        view: the row. job: the latest, or None.
    """

    def __init__(self, label: str, start: Callable[[], object], shown: Callable[[Job], None]) -> None:
        self._shown = shown
        self._on_token: Callable[[Job], None] | None = None
        self.job: Job | None = None
        self._started = self._updated = 0.0
        self.run_button = ipw.Button(description=label, icon="play", button_style="primary")
        self.run_button.layout.width = "auto"
        self.cancel_button = ipw.Button(description="Cancel", icon="stop", disabled=True)
        self.cancel_button.layout.width = "auto"
        self.bar = ipw.FloatProgress(min=0, max=1, layout={"width": "160px"})
        self.status = ipw.HTML()
        self.reason = ipw.HTML()
        busy = boxed(ipw.Box([self.bar, self.status]), "ps-row", "ps-job")
        self.view = row(self.run_button, self.cancel_button, busy, self.reason)
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
            on_token: called from the job's thread, ten times a second at most.
        """
        self.cancel()
        self.job, self._on_token = job, on_token
        self._started = time.monotonic()
        self._updated = 0.0
        self.cancel_button.disabled = False
        self.bar.value, self.bar.bar_style = 0.0, "info"
        self.status.value = "waiting for the former run" if waits else "running"
        job.on_step(self._step)
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

    def _step(self, job: Job) -> None:
        now = time.monotonic()
        if job is not self.job or now - self._updated < UPDATE_S:
            return
        self._updated = now
        self.bar.value = job.progress
        count = f"{job.num_tokens} token{'s' if job.num_tokens != 1 else ''}"
        left_s = (now - self._started) * (1 / job.progress - 1) if job.progress else None
        self.status.value = count if left_s is None else f"{count}, {left_s:.1f} s left"
        if self._on_token is not None:
            self._on_token(job)

    def _done(self, job: Job) -> None:
        if job is not self.job:
            return
        error = job.error
        if error is None:
            self._shown(job)
            notes = [escape(note) for note in job.result().notes]
            word, look = ("cancelled", "warning") if job.is_cancelled else ("done", "success")
            self.status.value = "; ".join([word, *notes])
        elif isinstance(error, CancelledError):
            look = "warning"
            self.status.value = "cancelled before the first token; what is shown is the former run"
        else:
            look = "danger"
            self.status.value = (
                f"<span class='ps-error'><b>{escape(type(error).__name__)}</b>: {escape(str(error))} "
                f"What is shown is the former run.</span>"
            )
        self.bar.value, self.bar.bar_style = 1.0, look
        self.cancel_button.disabled = True
