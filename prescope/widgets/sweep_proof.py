"""Prove the best three: run them against the default, said run by run, and what it showed."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from functools import partial
from html import escape

import ipywidgets as ipw

from ..errors import UnsupportedOption
from ..tuning import Proof, Sweep
from .background import in_background
from .sweep_words import error_html, proof_html

LABEL = "Prove the best three"
#: A click so soon after the one that began a proof is the second half of a double click, seconds.
DOUBLE_CLICK_S = 0.6
#: Runs a proof: gets the sweep, and `on_progress` and `cancel` of `prescope.tuning.prove`.
Prover = Callable[..., Proof]


class SweepProof:
    """A button that runs the proof in the background and, meanwhile, ends it.

    Args:
        prover: runs it; a text says why nothing can be run.

    Attributes:
        button, words: widgets. sweep: what would be proved. proof: its latest, or None.
    """

    def __init__(self, prover: Prover | str) -> None:
        self._prover = prover
        self._cancel = threading.Event()
        self._proving: Sweep | None = None  # while a proof is under way
        self._begun_s = 0.0
        self._reason_not = ""
        self._proofs: dict[str, Proof] = {}  # by the sweep's name
        self.sweep: Sweep | None = None
        self.button = ipw.Button(
            description=LABEL, icon="balance-scale", layout={"width": "auto"}, disabled=True
        )
        self.words = ipw.HTML()
        self.button.on_click(lambda _: self._on_click())

    @property
    def proof(self) -> Proof | None:
        """Of the sweep that is shown: one that was begun before another was opened is the former's."""
        return None if self.sweep is None else self._proofs.get(self.sweep.name)

    def use(self, prover: Prover | str) -> None:
        """Another engine or trace."""
        self._prover = prover

    def offer(self, sweep: Sweep | None, reason_not: str) -> None:
        """What would be proved now, or why there is nothing; another sweep's verdict goes, and comes back with it."""
        is_other = _name(sweep) != _name(self.sweep)
        self.sweep, self._reason_not = sweep, reason_not
        if is_other:
            self.words.value = "" if self.proof is None else proof_html(self.proof)
        if self._proving is None:
            self._allow()

    def run(self) -> Proof:
        """Run the best three of the sweep against the default, and wait for it.

        Raises:
            UnsupportedOption: nothing can be run here, or there is no point.
            CancelledError: ended by the button.
        """
        return self._begin()()

    def close(self) -> None:
        """End a proof that is under way."""
        self._cancel.set()

    def _allow(self) -> None:
        refused = self._prover if isinstance(self._prover, str) else self._reason_not
        self.button.disabled = bool(refused)
        self.button.tooltip = (
            refused or "Run them against the default on the device, A-B-B-A, on other prompts"
        )

    def _begin(self) -> Callable[[], Proof]:
        """From now on the button ends the proof; returns what runs it. Errors as `run`."""
        if isinstance(self._prover, str) or self.sweep is None:
            raise UnsupportedOption(
                self._prover if isinstance(self._prover, str) else "there is no point to prove"
            )
        self._cancel.clear()
        self._proving, self._begun_s = self.sweep, time.monotonic()
        self.button.description, self.button.icon = "End the proof", "stop"
        self._say(self.sweep, "warming up")
        return partial(self._prove, self._prover, self.sweep)

    def _prove(self, prover: Prover, sweep: Sweep) -> Proof:
        def told(done: int, total: int) -> None:
            left_s = (time.monotonic() - self._begun_s) * (total / done - 1)
            self._say(sweep, f"run {done} of {total}, {left_s:.0f} s left")

        try:
            proof = self._proofs[sweep.name] = prover(sweep, on_progress=told, cancel=self._cancel)
        finally:
            self._proving = None
            self.button.description, self.button.icon = LABEL, "balance-scale"
            self._allow()
        if self._is_shown(sweep):
            self.words.value = proof_html(proof)
        else:
            self._say(sweep, "done; open it to read what it showed")
        return proof

    def _is_shown(self, sweep: Sweep) -> bool:
        return _name(sweep) == _name(self.sweep)

    def _say(self, sweep: Sweep, text: str) -> None:
        whose = "" if self._is_shown(sweep) else f"proof of {sweep.name}: "
        self.words.value = f"<span class='ps-soft'>{escape(whose + text)}</span>"

    def _on_click(self) -> None:
        if self._proving is not None:
            if time.monotonic() - self._begun_s > DOUBLE_CLICK_S:
                self._cancel.set()
            return
        try:
            prove = self._begin()  # here: the thread may be late for a second click
        except UnsupportedOption as error:
            self._fail(error)
            return
        in_background("proof", prove, self._fail)

    def _fail(self, error: Exception) -> None:
        ended = "<span class='ps-soft'>the proof was ended; nothing was changed</span>"
        self.words.value = ended if isinstance(error, CancelledError) else error_html(error)


def _name(sweep: Sweep | None) -> str | None:
    return None if sweep is None else sweep.name
