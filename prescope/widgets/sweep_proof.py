"""Prove the best three: run them against the default, said run by run, and what it showed."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from html import escape
from typing import Any

import ipywidgets as ipw

from ..errors import PrescopeError, UnsupportedOption
from ..tuning import Proof, Sweep
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
        button, words: widgets. proof: the latest, or None.
    """

    def __init__(self, prover: Prover | str) -> None:
        self._prover = prover
        self._cancel = threading.Event()
        self._is_running = False
        self._begun_s = 0.0
        self.sweep: Sweep | None = None
        self.proof: Proof | None = None
        self.button = ipw.Button(
            description=LABEL, icon="balance-scale", layout={"width": "auto"}, disabled=True
        )
        self.words = ipw.HTML()
        self.button.on_click(lambda _: self._on_click())

    def use(self, prover: Prover | str) -> None:
        """Another engine or trace."""
        self._prover = prover

    def offer(self, sweep: Sweep | None, reason_not: str) -> None:
        """What would be proved now, or why there is nothing; another sweep's verdict goes."""
        if sweep is None or self.sweep is None or sweep.name != self.sweep.name:
            self.proof, self.words.value = None, ""
        self.sweep = sweep
        refused = self._prover if isinstance(self._prover, str) else reason_not
        if not self._is_running:
            self.button.disabled = bool(refused)
            self.button.tooltip = (
                refused or "Run them against the default on the device, A-B-B-A, on other prompts"
            )

    def run(self) -> Proof:
        """Run the best three of the sweep against the default, and wait for it.

        Raises:
            UnsupportedOption: nothing can be run here, or there is no point.
            CancelledError: ended by the button.
        """
        if isinstance(self._prover, str) or self.sweep is None:
            raise UnsupportedOption(
                self._prover if isinstance(self._prover, str) else "there is no point to prove"
            )
        self._cancel.clear()
        self._is_running = True
        self.button.description, self.button.icon = "End the proof", "stop"
        begin = time.monotonic()

        def told(done: int, total: int) -> None:
            left_s = (time.monotonic() - begin) * (total / done - 1)
            self.words.value = f"<span class='ps-soft'>run {done} of {total}, {left_s:.0f} s left</span>"

        self.words.value = "<span class='ps-soft'>warming up</span>"
        try:
            self.proof = self._prover(self.sweep, on_progress=told, cancel=self._cancel)
            self.words.value = proof_html(self.proof)
            return self.proof
        finally:
            self._is_running = False
            self.button.description, self.button.icon = LABEL, "balance-scale"

    def close(self) -> None:
        """End a proof that is under way."""
        self._cancel.set()

    def _on_click(self) -> None:
        if self._is_running:
            if time.monotonic() - self._begun_s > DOUBLE_CLICK_S:
                self._cancel.set()
            return
        # Here: the thread may be late for a second click.
        self._is_running, self._begun_s = True, time.monotonic()
        threading.Thread(target=self._try, name="prescope-proof", daemon=True).start()

    def _try(self, **_: Any) -> None:
        try:
            self.run()
        except PrescopeError as error:
            self.words.value = error_html(error)
        except CancelledError:
            self.words.value = (
                f"<span class='ps-soft'>{escape('the proof was ended; nothing was changed')}</span>"
            )
        finally:
            self._is_running = False
