"""Every panel of a session, opened as a person would."""

from collections.abc import Iterator

from prescope.session import Session
from prescope.simulator import Scenario
from prescope.widgets.dashboard import TABS

PROMPTS = ["Once upon a time"]
KINDS = ["dashboard", "slots", "capacity", "schedule", "pair", "sweep"]


def two_runs() -> Iterator[Session]:
    """A session that has made two runs, for a fixture."""
    with Session(slots=32, device="cpu", link_gb_per_s=50.0) as session:
        for _ in range(2):
            session.run(PROMPTS, max_new_tokens=6)
        yield session


def opened(session: Session, kind: str):
    """A panel of this kind, everything in it shown once; the session has made two runs."""
    if kind == "dashboard":
        board = session.dashboard(PROMPTS, scenarios=session.scenarios(session.runs[1]), max_new_tokens=6)
        for index in (*range(len(TABS)), TABS.index("Schedules")):
            board.tabs.selected_index = index
            board.live.settings.slots.value += 1
        board.live.start().result(60)
        return board
    if kind == "slots":
        return session.panel(PROMPTS, max_new_tokens=6)
    if kind == "capacity":
        return session.capacity_panel()
    scenarios = session.scenarios(session.runs[1])
    makers = {
        "schedule": lambda: session.schedule_panel(scenarios, PROMPTS, max_new_tokens=6),
        "pair": lambda: session.pair_panel(scenarios, Scenario(slots=32)),
        "sweep": lambda: session.sweep_panel(scenarios, PROMPTS, max_new_tokens=6),
    }
    return makers[kind]()
