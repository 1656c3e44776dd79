"""What is written past Optuna is what Optuna would have written."""

import time
from datetime import datetime, timedelta

import optuna
import pytest
import sqlalchemy
from optuna.storages import InMemoryStorage, RDBStorage
from optuna.trial import TrialState

from prescope.tuning import Choices, Range, Space
from prescope.tuning.points import Asked, Asking, Outcome
from prescope.tuning.quiet import quiet
from prescope.tuning.rows import SCHEMA, DatabaseRows, StudyRows

SPACE = Space(
    slots=Range(0.1, 0.9), width=Range(1, 9, step=2), cache=Choices(None, "lru", 3), cpu=Choices(True, False)
)
POINTS = [
    Asked(0, {"slots": 0.25, "width": 3, "cache": None, "cpu": False}, 11),
    Asked(1, {"slots": 0.5, "width": 9, "cache": 3, "cpu": True}, 12, {"nsga2:generation": 1}),
    Asked(2, {"slots": 0.75, "width": 1, "cache": "lru", "cpu": True}, 13),
    Asked(3, {"slots": 0.1, "width": 1, "cache": "lru", "cpu": True}, 14),
]
OUTCOMES = [
    Outcome(2, "infeasible", {}, "too few", 0.5),
    Outcome(0, "finished", {"tokens_per_s": 10.5, "gpu_bytes": 3e9}, "", 0.25, "simulated", "a machine"),
    Outcome(1, "failed", {}, "broke", 0.125),
]
NAMES = ("tokens_per_s", "gpu_bytes")
FIELDS = (
    "number",
    "state",
    "params",
    "distributions",
    "values",
    "user_attrs",
    "system_attrs",
    "datetime_start",
)


def written(way, tmp_path):
    url = f"sqlite:///{tmp_path / way}.db"
    storage = InMemoryStorage() if way == "memory" else RDBStorage(url)
    with quiet():
        study = optuna.create_study(study_name="s", storage=storage, directions=["maximize", "minimize"])
    if way == "database":
        rows = DatabaseRows(sqlalchemy.create_engine(url), "s", SPACE.distributions)
    else:
        rows = StudyRows(study, storage, SPACE.distributions)
    asking = Asking("abc", datetime(2026, 11, 1, 12, 30))
    rows.add(POINTS[:1], asking)
    rows.add(POINTS[1:], asking)
    told = [rows.finish(OUTCOMES, NAMES), rows.finish(OUTCOMES, NAMES)]
    return study.get_trials(), told


@pytest.fixture(params=["UTC", "Pacific/Kiritimati"])
def zone(request, monkeypatch):
    """Where this machine stands: a database keeps times in UTC, a trial has those of its own clock."""
    if not hasattr(time, "tzset"):
        pytest.skip("the time zone cannot be set here")
    with monkeypatch.context() as here:
        here.setenv("TZ", request.param)
        time.tzset()
        yield
    time.tzset()


@pytest.mark.usefixtures("zone")
@pytest.mark.parametrize("way", ["database", "memory"])
def test_both_ways_write_the_same_trials(way, tmp_path):
    expected, told = written("optuna", tmp_path)
    found, again = written(way, tmp_path)
    assert told == again == [3, 0], "what was told once is not told again"
    for one, other in zip(expected, found, strict=True):
        for field in FIELDS:
            assert getattr(one, field) == getattr(other, field), field
        for trial in (one, other):
            done = trial.datetime_complete
            assert (done is None) == (trial.state == TrialState.RUNNING)
            assert done is None or abs(datetime.now() - done) < timedelta(minutes=5)


def test_the_tables_are_those_of_this_optuna(tmp_path):
    """A newer Optuna with other tables is written through its own functions, which is slower; then look here."""
    url = f"sqlite:///{tmp_path / 'a.db'}"
    RDBStorage(url)
    with sqlalchemy.create_engine(url).connect() as connection:
        assert (
            connection.execute(sqlalchemy.text("SELECT schema_version FROM version_info")).scalar_one()
            == SCHEMA
        )
