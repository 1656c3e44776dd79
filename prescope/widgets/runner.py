"""What panels ask of whoever runs a model for them; `prescope.session.Session` does."""

from typing import Any, Protocol

from ..engine import Engine
from ..engine.job import Job, NamedPrompts
from ..traces.result import RunResult


class RealRunner(Protocol):
    """Runs prompts on an engine, one run at a time."""

    engine: Engine
    runs: list[RunResult]  # oldest first

    @property
    def is_running(self) -> bool:
        """Whether a run is under way."""
        ...

    def prepare(self, prompts: NamedPrompts, **keywords: Any) -> Job:
        """A job that has not begun; `keywords` as `Session.run`."""
        ...
