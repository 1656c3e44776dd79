"""Run the settings for real: prompts, length, the run as it goes, its text, and its lanes under the simulated ones."""

import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

import ipywidgets as ipw
import plotly.graph_objects as go

from ..core.types import NeedOutcome
from ..core.units import digits
from ..engine.job import RECENT, Job, NamedPrompts
from ..errors import UnsupportedOption
from ..traces.result import RunResult
from ..views.theme import COLORS, style
from .busy import IS_BUSY, OthersWork
from .figures import SlimFigureWidget
from .job_controls import JobControls
from .runner import RealRunner
from .showing import take_off
from .style import boxed, label, named, row

#: Characters of text that are shown of each sequence.
MOST_TEXT = 4000
#: What a tokenizer writes for bytes that are no whole character yet.
HALF = "\ufffd"
#: Stands between two prompts.
_BETWEEN = re.compile(r"^[ \t]*---[ \t]*\r?$", re.MULTILINE)
#: Tokens that are drawn while a run goes on: all of a long one would be sent ten times a second.
MOST_BARS = 500


class RealRun:
    """Starts runs of the settings that it is told, and shows them while they go on.

    Args:
        begin: called at the start. Returns keywords for `Engine.configure`, and what is told of that very run once it
            has decode steps, in the job's thread: it returns what a person must know about it, or "".

    Attributes:
        view: everything below one another. controls: button, bar, status. prompts, tokens: what is run.
    """

    def __init__(
        self,
        runner: RealRunner,
        prompts: NamedPrompts,
        keywords: dict[str, Any],
        begin: Callable[[], tuple[dict[str, Any], Callable[[RunResult], str]]],
    ) -> None:
        self._runner, self._begin = runner, begin
        # By the job: one may end while the next one is begun.
        self._finished = WeakKeyDictionary[Job, Callable[[RunResult], str]]()
        self._given, self._keywords = prompts, keywords
        self._needs: dict[NeedOutcome, int] = {}
        self._others = OthersWork()
        self._given_text = _as_text(prompts)
        self.prompts = ipw.Textarea(
            value=self._given_text,
            rows=6,
            layout={"width": "auto"},
            placeholder="prompts, with a line of --- between them",
        )
        self.tokens = ipw.BoundedIntText(
            value=int(keywords.get("max_new_tokens", 32)), min=2, max=10**6, layout={"width": "90px"}
        )
        self.controls = JobControls("Run it for real", self.start, self._shown)
        self.live = ipw.HTML()
        self.text = ipw.HTML()
        self.figure = SlimFigureWidget(_live_figure())
        self.figure.add_class("ps-hidden")  # axes without a token say nothing
        words = label("prompts", "One prompt, or several with a line of --- between them")
        why = "Two or more: the first comes with the prompt, what is simulated are the others"
        length = named("new tokens", self.tokens, why)
        self.view = ipw.VBox(
            [
                ipw.VBox([words, self.prompts]),
                row(length, self.controls.view),
                self.live,
                self.text,
                boxed(ipw.VBox([self.figure]), "ps-figures"),
            ]
        )

    @property
    def job(self) -> Job | None:
        """The latest run, or None."""
        return self.controls.job

    def start(self) -> Job:
        """Run with the settings as they stand, in the background.

        Raises:
            UnsupportedOption: they can only be simulated.
        """
        settings, finished = self._begin()
        keywords = {**self._keywords, "max_new_tokens": int(self.tokens.value)}
        self.controls.cancel()
        self._others = OthersWork()
        job = self._runner.prepare(self._what(), configure=settings, **keywords)
        self._finished[job] = finished
        job.on_step(self._note_begin)
        self.live.value = (
            "<span class='ps-soft'>some tokens to warm up, then the run from empty slots …</span>"
        )
        job.on_done(self._forget_unless_shown)
        return self.controls.watch(job, self._runner.is_running, self._show_live)

    def close(self) -> None:
        """Stop, and take the figure off the page."""
        self.controls.close()
        take_off(self.view)

    def _what(self) -> NamedPrompts:
        """The prompts of the text field; their names too, while nobody has changed them. An empty field is filled with
        those that were given, so that it shows what is run.
        """
        texts = [text.strip("\r\n") for text in _BETWEEN.split(self.prompts.value) if text.strip()]
        if not texts:
            self.prompts.value = self._given_text
        return self._given if self.prompts.value == self._given_text else texts

    def _forget_unless_shown(self, job: Job) -> None:
        """Of a job that ended without a result nothing goes on any more."""
        if job is self.job and job.error is not None:
            self.live.value = ""

    def _note_begin(self, job: Job) -> None:
        if job.num_tokens == 1:  # what the prompt needed is not counted
            self._needs = dict(self._runner.engine.needs)

    def _show_live(self, job: Job) -> None:
        """Text, rate and hit rate so far."""
        if job is not self.job:
            return
        engine, times = self._runner.engine, job.token_times_s[:]
        texts = (
            []
            if engine.tokenizer is None
            else engine.tokenizer.batch_decode(job.tokens, skip_special_tokens=True)
        )
        if texts:
            self.text.value = _text_html(texts, is_running=True)
        gaps = [1e3 * (b - a) for a, b in pairwise(times)]
        if not gaps:
            return
        last = gaps[-RECENT:]
        recent = sorted(last)[len(last) // 2]
        self.live.value = (
            f"<b>running</b>: {digits(recent)} ms per token, {digits(1e3 * len(job.tokens) / recent)} tokens/s (median "
            f"of the last {len(last)}, between two tokens on the host's clock){_hits(self._needs, engine.needs)}"
        )
        self._draw(gaps[-MOST_BARS:], max(0, len(gaps) - MOST_BARS))

    def _shown(self, job: Job) -> str:
        run = job.result()
        self.text.value = _text_html(run.text)
        self.live.value = f"<span class='ps-soft'>{escape(run.label)}{_busy(self._others.frac())}</span>"
        if not (run.steps["phase"] == "decode").any():
            return "before the second token; the figures show the former run"
        steps = run.steps[run.steps["phase"] == "decode"]["dur_us"].to_numpy() / 1e3
        self._draw(steps.tolist())
        return self._finished[job](run)

    def _draw(self, ms: list[float], first: int = 0) -> None:
        self.figure.show_parts(_live_traces(ms, first), {})
        self.figure.remove_class("ps-hidden")


def _as_text(prompts: NamedPrompts) -> str:
    """All prompts in one text, with a line of --- between them.

    Raises:
        UnsupportedOption: some are no texts, so that they cannot be shown in a field.
    """
    listed = (
        [prompts]
        if isinstance(prompts, str)
        else list(prompts.values() if isinstance(prompts, Mapping) else prompts)
    )
    if not all(isinstance(text, str) for text in listed):
        raise UnsupportedOption(
            f"a panel's prompts are texts, to be seen and changed, not {prompts!r:.80}; run token ids and chats with "
            f"session.run(...)"
        )
    return "\n---\n".join(listed)


def _text_html(texts: Sequence[str], is_running: bool = False) -> str:
    # Half of a character ends in a mark that the next token takes away.
    shown = [f"{text.rstrip(HALF)}▍" if is_running else text for text in texts]
    parts = "\n".join(f"… {text[-MOST_TEXT:]}" for text in shown)
    return f"<div class='ps-text'>{escape(parts)}</div>"


def _hits(before: Mapping[NeedOutcome, int], now: Mapping[NeedOutcome, int]) -> str:
    """Share of the experts that decode steps have needed so far and found in their slots."""
    since = {outcome: now[outcome] - before.get(outcome, 0) for outcome in now}
    needed = sum(since.values())
    return f"; hit rate so far {100 * since[NeedOutcome.HIT] / needed:.0f} %" if needed else ""


def _busy(share: float | None) -> str:
    if share is None or share < IS_BUSY:
        return ""
    return f"; <b class='ps-bad'>machine busy</b>: other work took {100 * share:.0f} % of its cores, so times scatter"


def _live_traces(ms: list[float], first: int = 0) -> list[dict[str, Any]]:
    return [{"type": "bar", "x": list(range(first + 1, first + len(ms) + 1)), "y": ms}]


def _live_figure() -> go.Figure:
    fig = go.Figure(_live_traces([]))
    style(fig, title="", subtitle="", height=210, top=12, bottom=44)
    fig.update_layout(title=None, bargap=0.12, barcornerradius=0)
    fig.update_traces(marker={"color": COLORS["measured"], "line": {"width": 0}})
    fig.update_xaxes(title_text="token", showgrid=False)
    fig.update_yaxes(title_text="ms per token", rangemode="tozero")
    return fig
