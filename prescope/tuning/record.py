"""The study that a sweep is kept in: made, found again, compared with what is asked for, written to."""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import optuna
import sqlalchemy
from optuna.exceptions import DuplicatedStudyError, StorageInternalError
from optuna.storages import BaseStorage, RDBStorage
from optuna.trial import FrozenTrial, TrialState

from .. import __version__
from ..core.machine import commit
from ..core.paths import user_path
from ..errors import BadSweep
from .objectives import OBJECTIVES, Objective
from .points import Asked, Asking, Outcome
from .quiet import quiet
from .rows import BUSY_S, DatabaseRows, Rows, StudyRows, is_known
from .space import Space

#: Attribute of the study that says what is swept.
KEY = "prescope"
VERSION = 1
#: Where a sweep lies that was given no storage, below the folder one works in.
FOLDER = Path("runs") / "sweeps"
#: Instead of the file of a database that has none.
IN_MEMORY = Path(":memory:")
#: What to do where a sweep of this name is about something else.
REMEDIES = {
    "about": "It goes on with what it was begun with: the same recording, machines and predictors, or the same model "
    "and tokens. After a restart of the kernel load that recording again (a run made anew is another one), or give "
    "this sweep another name",
}
_NAME = re.compile(r"[\w][\w .,+=-]{0,119}")


class StudyPlan(NamedTuple):
    """What a sweep is about: a study that is opened again must agree in all of it.

    Attributes:
        fixed: settings that do not move. `about`: what the runner's figures depend on besides settings.
        prompts: checksums of those used.
    """

    space: Space
    fixed: dict[str, Any]
    objectives: tuple[Objective, ...]
    method: str
    seed: int
    about: dict[str, Any]
    prompts: tuple[str, ...]

    def to_plain(self) -> dict[str, Any]:
        """For JSON."""
        names = [one.name for one in self.objectives]
        whole = {**self._asdict(), "space": self.space.to_plain(), "objectives": names, "version": VERSION}
        plain: dict[str, Any] = json.loads(json.dumps(whole))  # as it is read back: lists, no tuples
        return plain

    @classmethod
    def of_plain(cls, plain: dict[str, Any]) -> "StudyPlan":
        """What `to_plain` gave."""
        return cls(
            Space.of_plain(plain["space"]), plain["fixed"], tuple(OBJECTIVES[name] for name in plain["objectives"]),
            plain["method"], plain["seed"], plain["about"], tuple(plain["prompts"]),
        )  # fmt: skip


class Record:
    """One sweep's study, open.

    Attributes:
        study: Optuna's. `plan`: what is swept. `url`: of its storage.
        file: the SQLite file that it is; None where it lies in memory or in another database.
    """

    def __init__(self, study: optuna.Study, storage: BaseStorage, plan: StudyPlan, url: str) -> None:
        self.study, self.plan, self.url = study, plan, url
        file = _file_of(url)
        self.file = None if file == IN_MEMORY else file
        self._rows = _rows_of(study, storage, plan.space, url)
        self._names = [one.name for one in plan.objectives]

    def trials(self) -> list[FrozenTrial]:
        """All points, by number; not copies.

        Raises:
            BadSweep: the storage cannot be used any more, of this and of what writes to it.
        """
        with in_words(self.url):
            found: list[FrozenTrial] = self.study.get_trials(deepcopy=False)
        return found

    def add(self, points: Sequence[Asked]) -> None:
        """Write down that points are tried now, before they are."""
        code = commit() or __version__  # of an installed package there is no checkout
        with in_words(self.url):
            self._rows.add(points, Asking(code, datetime.now()))

    def finish(self, outcomes: Sequence[Outcome]) -> None:
        """Write down what became of points; one that was told already stays as it is."""
        with in_words(self.url):
            self._rows.finish(outcomes, self._names)


def open_points(trials: Sequence[FrozenTrial]) -> list[Asked]:
    """Points that were given out and never told."""
    return [
        Asked(one.number, one.params, one.user_attrs["seed"], one.system_attrs)
        for one in trials
        if one.state == TrialState.RUNNING
    ]


def _rows_of(study: optuna.Study, storage: BaseStorage, space: Space, url: str) -> Rows:
    # A database in memory is that of one connection, which is Optuna's.
    if isinstance(storage, RDBStorage) and _file_of(url) != IN_MEMORY:
        engine = sqlalchemy.create_engine(url, **_how_to_connect(url))
        if is_known(engine):
            return DatabaseRows(engine, study.study_name, space.distributions)
    return StudyRows(study, storage, space.distributions)


# -- opening ---------------------------------------------------------------------------------------------------------


def create_or_open(name: str, plan: StudyPlan, where: str | None) -> Record:
    """A new study, or the one of this name if it is about the same.

    Raises:
        BadSweep: the name is no name, the storage cannot be read, or its study of this name is about something else.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise BadSweep(
            f"{name!r} is no name for a sweep: letters, digits, blanks and .,+=-_ , 120 at most, no folder"
        )
    url = url_of(name) if where is None else where
    if where is None:
        with in_words(url):
            FOLDER.mkdir(parents=True, exist_ok=True)
    storage = _storage(url)
    directions = [one.direction for one in plan.objectives]
    with in_words(url), quiet():
        try:
            study = optuna.create_study(storage=storage, study_name=name, directions=directions)
        except DuplicatedStudyError:
            study = optuna.load_study(storage=storage, study_name=name)
        else:
            study.set_metric_names([one.name for one in plan.objectives])
            study.set_user_attr(KEY, plan.to_plain())
        found = _plan_in(study, url)
    _require_same(name, found, plan)
    return Record(study, storage, found, url)


def open_existing(where: str, study_name: str | None) -> Record:
    """A study that is there, by the sweep's name, the path of its file, or a URL.

    Raises:
        BadSweep: there is none, several are in the storage, or it is no sweep.
    """
    url, is_name = _url_of_existing(where)
    _require_studies(url)
    storage = _storage(url)
    with in_words(url), quiet():
        names = [one.study_name for one in storage.get_all_studies()]
        wanted = study_name or (where if is_name or len(names) != 1 else names[0])
        if wanted not in names:
            listed = ", ".join(map(repr, names)) or "none"
            raise BadSweep(
                f"{shown(url)} has no study {wanted!r}; there are {listed}: load_sweep(where, study_name=...)"
            )
        study = optuna.load_study(storage=storage, study_name=wanted)
        return Record(study, storage, _plan_in(study, url), url)


def url_of(name: str) -> str:
    """The file of a sweep that was given no storage, as a URL."""
    return url_of_file(FOLDER / f"{name}.db")


def url_of_file(path: Path) -> str:
    """Of an SQLite file: a question mark or a per cent sign in its name means something else in a URL."""
    return str(sqlalchemy.URL.create("sqlite", database=path.as_posix()).render_as_string())


def shown(url: str) -> str:
    """For people and for logs: without the password that it may hold."""
    try:
        return str(sqlalchemy.engine.make_url(url).render_as_string(hide_password=True))
    except sqlalchemy.exc.ArgumentError:
        return url


def _url_of_existing(where: str) -> tuple[str, bool]:
    if "://" in where:
        return where, False
    for path, is_name in ((FOLDER / f"{where}.db", True), (user_path(where), False)):
        if path.is_file():
            return url_of_file(path), is_name
    there = ", ".join(sorted(repr(path.stem) for path in FOLDER.glob("*.db"))) if FOLDER.is_dir() else ""
    raise BadSweep(
        f"there is no sweep {where!r}; in {FOLDER} there are: {there or 'none'}. A path or URL works too"
    )


def _storage(url: str) -> BaseStorage:
    """Optuna's; one of a database is asked for itself, so that it can be told what it is."""
    with in_words(url), quiet():
        return RDBStorage(url, engine_kwargs=_how_to_connect(url))


def _file_of(url: str) -> Path | None:
    """Of an SQLite database; `IN_MEMORY` where it has none, None where it is another database."""
    if not url.startswith("sqlite"):
        return None
    database = sqlalchemy.engine.make_url(url).database
    return Path(database) if database and database != ":memory:" else IN_MEMORY


def _how_to_connect(url: str) -> dict[str, Any]:
    """A file is opened for each transaction: nobody holds it while nothing is written."""
    if _file_of(url) in (None, IN_MEMORY):
        return {}
    return {"connect_args": {"timeout": BUSY_S}, "poolclass": sqlalchemy.NullPool}


def _require_studies(url: str) -> None:
    """Raise BadSweep where there are none; opening them would make their tables."""
    file = _file_of(url)
    if file is not None and not file.is_file():
        raise BadSweep(f"there is no file {file}")
    with in_words(url):
        engine = sqlalchemy.create_engine(url, poolclass=sqlalchemy.NullPool)
        if not sqlalchemy.inspect(engine).has_table("studies"):
            raise BadSweep(f"{shown(url)} holds no study of Optuna's")


def _plan_in(study: optuna.Study, url: str) -> StudyPlan:
    plain = study.user_attrs.get(KEY)
    if plain is None or plain.get("version") != VERSION:
        raise BadSweep(
            f"the study {study.study_name!r} in {shown(url)} is no sweep of this version of prescope; choose "
            f"another name"
        )
    return StudyPlan.of_plain(plain)


def _require_same(name: str, found: StudyPlan, wanted: StudyPlan) -> None:
    there, asked = found.to_plain(), wanted.to_plain()
    for key, value in there.items():
        if value == asked[key]:
            continue
        if isinstance(value, dict):
            keys = sorted(k for k in value.keys() | asked[key].keys() if value.get(k) != asked[key].get(k))
            was, now = ({k: one.get(k) for k in keys} for one in (value, asked[key]))
        else:
            was, now = value, asked[key]
        remedy = REMEDIES.get(key, f"Give this one another name, or the same {key}")
        raise BadSweep(
            f"the sweep {name!r} is there already with {key} {was}, now it is {now}: its points could not be compared. "
            f"{remedy}; load_sweep({name!r}) opens the old one"
        )


@contextmanager
def in_words(url: str) -> Iterator[None]:
    """Troubles with a storage as a BadSweep that says which it is."""
    try:
        yield
    except (
        sqlalchemy.exc.SQLAlchemyError,
        StorageInternalError,
        RuntimeError,
        ImportError,
        OSError,
    ) as error:
        cause = error.__cause__ or error
        raise BadSweep(
            f"the storage {shown(url)} cannot be used: {cause}. Give the URL of a database that Optuna can use, or "
            f"another name"
        ) from error
