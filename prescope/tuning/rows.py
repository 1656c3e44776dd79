"""Writes points into an Optuna storage: many at once where it is a database, one by one where it is something else.

Optuna's own `add_trial` asks the database before each value that it writes: 20 ms of one core for a point with six
settings and five attributes (optuna 5.0, SQLite). A batch here is one transaction in the same tables, some tenths of a
millisecond a point, and is there whole or not at all. The tables are those of `SCHEMA`; a database of another version
is written through Optuna.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Protocol

import optuna
import sqlalchemy
from optuna.distributions import BaseDistribution, distribution_to_json
from optuna.storages import BaseStorage
from optuna.trial import TrialState, create_trial

from .points import STATES, Asked, Asking, Outcome

#: Of Optuna's tables, as `version_info` says it.
SCHEMA = 12
#: A database that somebody else writes to is waited for this long.
BUSY_S = 60


class Rows(Protocol):
    """Points of one study in its storage."""

    def add(self, points: Sequence[Asked], asking: Asking) -> None:
        """Write down that these are tried now; their numbers go on from the last one's."""
        ...

    def finish(self, outcomes: Sequence[Outcome], objectives: Sequence[str]) -> int:
        """Write down what became of them, once: how many of them were still open."""
        ...


def _attributes(outcome: Outcome) -> dict[str, Any]:
    told = {"seconds": round(outcome.seconds, 6), "origin": outcome.origin, "machine": outcome.machine,
            "reason": outcome.reason}  # fmt: skip
    return {name: value for name, value in told.items() if value != ""}


class StudyRows:
    """Through Optuna, one by one: for any storage."""

    def __init__(
        self, study: optuna.Study, storage: BaseStorage, distributions: Mapping[str, BaseDistribution]
    ) -> None:
        self._study, self._storage, self._distributions = study, storage, dict(distributions)
        self._study_id = storage.get_study_id_from_name(study.study_name)

    def add(self, points: Sequence[Asked], asking: Asking) -> None:
        for point in points:
            trial = create_trial(
                state=TrialState.RUNNING,
                params=dict(point.settings),
                distributions=self._distributions,
                user_attrs={"seed": point.seed, "commit": asking.commit},
                system_attrs=dict(point.notes),
            )
            trial.datetime_start = asking.started
            self._study.add_trial(trial)

    def finish(self, outcomes: Sequence[Outcome], objectives: Sequence[str]) -> int:
        storage, told = self._storage, 0
        for outcome in outcomes:
            trial_id = storage.get_trial_id_from_study_id_trial_number(self._study_id, outcome.number)
            if storage.get_trial(trial_id).state.is_finished():
                continue
            for key, value in _attributes(outcome).items():
                storage.set_trial_user_attr(trial_id, key, value)
            values = [outcome.values[name] for name in objectives] if outcome.state == "finished" else None
            storage.set_trial_state_values(trial_id, STATES[outcome.state], values)
            told += 1
        return told


class DatabaseRows:
    """Straight into Optuna's tables, a batch in one transaction."""

    def __init__(
        self, engine: sqlalchemy.Engine, study_name: str, distributions: Mapping[str, BaseDistribution]
    ) -> None:
        self._engine = engine
        found = sqlalchemy.MetaData()
        found.reflect(engine, only=[
            "studies", "trials", "trial_params", "trial_user_attributes", "trial_system_attributes", "trial_values",
        ])  # fmt: skip
        self._tables = found.tables
        self._distributions = dict(distributions)
        self._json = {name: distribution_to_json(one) for name, one in distributions.items()}
        studies = self._tables["studies"]
        with engine.connect() as connection:
            wanted = sqlalchemy.select(studies.c.study_id).where(studies.c.study_name == study_name)
            self._study_id = connection.execute(wanted).scalar_one()

    def add(self, points: Sequence[Asked], asking: Asking) -> None:
        trials = self._tables["trials"]
        with self._engine.begin() as connection:
            connection.execute(
                trials.insert(),
                [
                    {
                        "study_id": self._study_id,
                        "number": one.number,
                        "state": TrialState.RUNNING.name,
                        "datetime_start": _in_utc(asking.started),
                    }
                    for one in points
                ],
            )
            id_of = self._ids(connection, [one.number for one in points])
            params = [
                {
                    "trial_id": id_of[one.number],
                    "param_name": name,
                    "param_value": self._distributions[name].to_internal_repr(value),
                    "distribution_json": self._json[name],
                }
                for one in points
                for name, value in one.settings.items()
            ]
            connection.execute(self._tables["trial_params"].insert(), params)
            self._attach(
                connection,
                "trial_user_attributes",
                {id_of[one.number]: {"seed": one.seed, "commit": asking.commit} for one in points},
            )
            self._attach(
                connection, "trial_system_attributes", {id_of[one.number]: one.notes for one in points}
            )

    def finish(self, outcomes: Sequence[Outcome], objectives: Sequence[str]) -> int:
        trials = self._tables["trials"]
        with self._engine.begin() as connection:
            id_of = self._ids(connection, [one.number for one in outcomes])
            told = [one for one in outcomes if one.number in id_of]
            if not told:
                return 0
            connection.execute(
                trials.update()
                .where(trials.c.trial_id == sqlalchemy.bindparam("of_trial"))
                .values(state=sqlalchemy.bindparam("now"), datetime_complete=sqlalchemy.bindparam("at")),
                [
                    {
                        "of_trial": id_of[one.number],
                        "now": STATES[one.state].name,
                        "at": _in_utc(datetime.now()),
                    }
                    for one in told
                ],
            )
            self._attach(
                connection, "trial_user_attributes", {id_of[one.number]: _attributes(one) for one in told}
            )
            values = [
                {
                    "trial_id": id_of[one.number],
                    "objective": i,
                    "value": one.values[name],
                    "value_type": "FINITE",
                }
                for one in told
                if one.state == "finished"
                for i, name in enumerate(objectives)
            ]
            if values:
                connection.execute(self._tables["trial_values"].insert(), values)
        return len(told)

    def _ids(self, connection: sqlalchemy.Connection, numbers: Sequence[int]) -> dict[int, int]:
        """Ids of those of these trials that are running, by number."""
        trials = self._tables["trials"]
        wanted = sqlalchemy.select(trials.c.number, trials.c.trial_id).where(
            trials.c.study_id == self._study_id,
            trials.c.state == TrialState.RUNNING.name,
            trials.c.number.in_(numbers),
        )
        return {row.number: row.trial_id for row in connection.execute(wanted)}

    def _attach(
        self, connection: sqlalchemy.Connection, table: str, attributes: Mapping[int, Mapping[str, Any]]
    ) -> None:
        rows = [
            {"trial_id": trial_id, "key": key, "value_json": json.dumps(value)}
            for trial_id, each in attributes.items()
            for key, value in each.items()
        ]
        if rows:
            connection.execute(self._tables[table].insert(), rows)


def _in_utc(local: datetime) -> datetime:
    """A time of this machine's clock as Optuna's tables keep it, which gives it back as local time."""
    return local.astimezone(UTC).replace(tzinfo=None)


def is_known(engine: sqlalchemy.Engine) -> bool:
    """Whether the tables of a database are those that are written here."""
    with engine.connect() as connection:
        version = connection.execute(sqlalchemy.text("SELECT schema_version FROM version_info")).scalar_one()
    return bool(version == SCHEMA)
