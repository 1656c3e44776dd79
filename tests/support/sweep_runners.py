"""Runners of made-up figures, to test sweeps without a simulator: picklable, and as fast as they say."""

import os
import signal
import threading
import time
from pathlib import Path

from prescope.errors import SlotPoolTooSmall
from prescope.tuning.evaluate import Measured
from prescope.tuning.settings import Setting

SETTINGS = {
    "slots": Setting(what="a count", kind="int", low=1, high=1000),
    "width": Setting(what="a number", kind="int", low=0, high=100),
    "threshold": Setting(what="a share", kind="share", high=1),
    "schedule": Setting(what="a way", kind="choice", choices=("slow", "fast")),
}


class Hill:
    """Best at slots=30, schedule="fast"; refuses fewer than 4 slots, and breaks at width=13.

    Args:
        log: file that each try is written into, one line "<slots> <process>".
        last: with so many tries in the log it stays in the middle of one, until it is killed.
        kills: folder; a point whose slots are in `deadly` kills its process the first time it is tried.
    """

    objectives = ("tokens_per_s", "gpu_bytes")
    prompts = ("0123456789abcdef",)
    is_here = takes_gpu = False
    nbytes = 1000
    settings = SETTINGS

    def __init__(self, log="", kills="", deadly=(), fatal=(), seconds=0.0, version=1, last=0):
        self.log, self.kills, self.seconds, self.version = str(log), str(kills), seconds, version
        self.last = last
        self.deadly, self.fatal = frozenset(deadly), frozenset(fatal)

    def about(self):
        return {"runner": "hill", "version": self.version}

    def run(self, settings, seed=0, is_cancelled=lambda: False):
        slots = settings.get("slots", 10)
        if self.log:
            with open(self.log, "a", encoding="utf-8") as file:  # one short write: whole, whoever else writes
                file.write(f"{slots} {os.getpid()}\n")
        if self.last and len(self.tries()) >= self.last:
            threading.Event().wait()
        if slots in self.fatal or (slots in self.deadly and self._is_first(slots)):
            os.kill(os.getpid(), signal.SIGKILL)
        if slots < 4:
            raise SlotPoolTooSmall(f"{slots} slots; use 4 or more")
        if settings.get("width") == 13:
            raise ZeroDivisionError("unlucky")
        if self.seconds:
            time.sleep(self.seconds)
        speed = 100.0 - abs(slots - 30) - 50 * (settings.get("schedule") == "slow")
        return Measured({"tokens_per_s": speed, "gpu_bytes": float(slots)}, "simulated", "a hill")

    def _is_first(self, slots):
        try:
            (Path(self.kills) / str(slots)).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def restore(self):
        pass

    def tries(self):
        """Slots of each try, in order."""
        return [int(line.split()[0]) for line in Path(self.log).read_text("utf-8").splitlines()]


class OnGpu(Hill):
    """Says of each try which GPU its process sees: lines "<slots> <process> <GPU>"."""

    takes_gpu = True

    def run(self, settings, seed=0, is_cancelled=lambda: False):
        with open(f"{self.log}.gpus", "a", encoding="utf-8") as file:
            file.write(f"{settings['slots']} {os.getpid()} {os.environ.get('CUDA_VISIBLE_DEVICES')}\n")
        return super().run(settings, seed, is_cancelled)
