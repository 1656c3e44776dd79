"""A sweep from Python: opened, run, interrupted, gone on with, read; on made-up figures, in this process."""

import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import optuna
import pandas as pd
import pytest

from prescope.errors import BadSweep, UnsupportedOption
from prescope.tuning import Choices, Range, Space, load_sweep, open_sweep
from prescope.tuning.estimate import Estimate
from prescope.tuning.points import COLUMNS
from prescope.tuning.record import shown
from tests.support.bars import watch_bars
from tests.support.sweep_runners import Hill

SPACE = Space(slots=Range(1, 40), schedule=Choices("slow", "fast"))
ROOT = Path(__file__).resolve().parents[2]
METHODS = ["grid", "random", "tpe", "nsga"]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("method", "limit", "total"), [("random", {"points": 12}, 12), ("grid", {}, 80)])
def test_whoever_waits_for_a_sweep_sees_how_far_it_is(monkeypatch, method, limit, total):
    """Unless the caller shows it; one that goes on counts what was there."""
    bars = watch_bars(monkeypatch)
    sweep = open_sweep("a", SPACE, Hill(), method=method, seed=0)
    for _ in range(2):
        sweep.run(**limit)
    sweep.run(**limit, on_progress=lambda at: None)
    assert [(bar.n, bar.total) for bar in bars] == [(total, total), (total, total), (0, total)]


class StopsAfter(Hill):
    """Sets `cancel` in the middle of its n-th try."""

    def __init__(self, count, **more):
        super().__init__(**more)
        self.left, self.cancel = count, threading.Event()

    def run(self, settings, seed=0, is_cancelled=lambda: False):
        self.left -= 1
        if not self.left:
            self.cancel.set()
        return super().run(settings, seed)


def run_until(count, name="a", log="", **arguments):
    """Cancelled after so many points."""
    runner = StopsAfter(count, log=log)
    return open_sweep(name, SPACE, runner, **arguments).run(points=40, cancel=runner.cancel)


# -- points ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("objectives", [("tokens_per_s",), ("tokens_per_s", "gpu_bytes")])
def test_every_point_is_a_row_with_all_that_is_known_of_it(method, objectives):
    sweep = open_sweep("a", SPACE, Hill(), method=method, objectives=objectives, seed=3)
    done = sweep.run(points=30)
    points = sweep.points()
    assert list(points.columns) == [*COLUMNS, "slots", "schedule", *objectives]
    assert list(points["number"]) == list(range(30))
    assert done.done == 30 and done.finished + done.infeasible == 30
    assert set(points["state"]) <= {"finished", "infeasible"}
    finished = points[points["state"] == "finished"]
    assert (finished["machine"] == "a hill").all() and (finished["origin"] == "simulated").all()
    assert (points["commit"] != "").all() and points["seed"].is_unique
    assert pd.api.types.is_datetime64_any_dtype(points["started"])
    assert (finished["tokens_per_s"] <= 100).all()


@pytest.mark.parametrize("method", METHODS)
def test_refused_settings_are_rows_with_their_reason(method):
    """Fewer than 4 slots: the library's own refusal, not an error of the sweep."""
    sweep = open_sweep("a", Space(slots=Range(1, 8)), Hill(), method=method, seed=1)
    sweep.run(points=8)
    points = sweep.points()
    few = points[points["slots"] < 4]
    assert len(few) and (few["state"] == "infeasible").all()
    assert few["reason"].str.contains("SlotPoolTooSmall.*use 4 or more").all()
    assert few["tokens_per_s"].isna().all()
    assert (points[points["slots"] >= 4]["state"] == "finished").all()


def test_a_point_that_breaks_is_kept_and_the_others_go_on():
    sweep = open_sweep("a", Space(width=Range(10, 15)), Hill(), method="grid")
    done = sweep.run()
    assert (done.failed, done.finished) == (1, 5)
    broken = sweep.points().query("state == 'failed'")
    assert list(broken["width"]) == [13]
    assert broken["reason"].iloc[0] == "ZeroDivisionError: unlucky"


def test_a_grid_has_every_point_once_in_an_order_that_the_seed_draws():
    orders = []
    for seed in (0, 0, 1):
        sweep = open_sweep(f"seed {seed} {len(orders)}", SPACE, Hill(), method="grid", seed=seed)
        assert sweep.run().done == 80
        assert len(sweep.points()[["slots", "schedule"]].drop_duplicates()) == 80
        orders.append(list(sweep.points()["slots"]))
    assert orders[0] == orders[1] != orders[2]


def test_a_grid_without_steps_says_which_setting_has_none():
    with pytest.raises(UnsupportedOption, match=r"threshold has none; say Range\(0.0, 1.0, step="):
        open_sweep("a", Space(threshold=Range(0.0, 1.0)), Hill(), method="grid")
    with pytest.raises(BadSweep, match="no sweep"):
        load_sweep("a")  # nothing was left behind


@pytest.mark.parametrize("method", ["tpe", "nsga"])
def test_a_search_that_learns_beats_chance(method):
    wide = Space(slots=Range(1, 1000), schedule=Choices("slow", "fast"))
    learned = open_sweep("a", wide, Hill(), method=method, seed=2)
    chance = open_sweep("b", wide, Hill(), method="random", seed=2)
    for sweep in (learned, chance):
        sweep.run(points=150)
    late = [sweep.points()["tokens_per_s"].tail(50).mean() for sweep in (learned, chance)]
    assert late[0] > late[1] + 50


# -- going on --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_cancelled_sweep_goes_on_to_the_same_number(method, tmp_path):
    runner = Hill(log=tmp_path / "log")
    assert run_until(11, log=runner.log, method=method).done == 11
    again = open_sweep("a", SPACE, runner, method=method)
    before = again.points()
    assert len(before) == 11
    assert again.run(points=40).done == 40
    after = again.points()
    pd.testing.assert_frame_equal(after.head(len(before)), before)
    assert len(runner.tries()) == 40, "each point was tried once"
    assert again.run(points=40).done == 40
    assert len(runner.tries()) == 40


@pytest.mark.parametrize("method", ["grid", "random"])
def test_an_interruption_changes_no_point(method):
    """Grid and chance know their points by number, so that a sweep can be repeated whatever happened to the first."""
    whole = open_sweep("whole", SPACE, Hill(), method=method, seed=5)
    whole.run(points=40)
    for count in (4, 17):
        run_until(count, "parts", method=method, seed=5)
    parts = open_sweep("parts", SPACE, Hill(), method=method, seed=5)
    parts.run(points=40)
    columns = ["number", "slots", "schedule", "seed", "tokens_per_s"]
    pd.testing.assert_frame_equal(parts.points()[columns], whole.points()[columns])


def test_another_space_under_the_same_name_is_refused_with_the_way_round():
    open_sweep("a", SPACE, Hill())
    for wanted, said in (
        ({"space": Space(slots=Range(1, 41), schedule=Choices("slow", "fast"))}, "space .*41.*another name"),
        ({"space": Space(slots=Range(1, 40))}, "space"),
        ({"objectives": ("gpu_bytes",)}, "objectives"),
        ({"fixed": {"width": 3}}, "fixed"),
        ({"runner": Hill(version=2)}, "about .*version.*load that recording again.*load_sweep"),
        ({"method": "random"}, "method"),
        ({"seed": 1}, "seed"),
    ):
        arguments = {"space": SPACE, "runner": Hill()} | wanted
        with pytest.raises(BadSweep, match=said):
            open_sweep("a", **arguments)
    assert open_sweep("a", SPACE, Hill()).run(points=3).done == 3


def test_two_runs_of_one_sweep_at_once_are_refused():
    """Two processes that ask would number two points alike."""
    sweep, other = open_sweep("a", SPACE, Hill()), open_sweep("a", SPACE, Hill())
    errors = []

    def second(progress):
        if not errors:
            with pytest.raises(BadSweep, match="under way in this process") as caught:
                other.run(points=20)
            errors.append(caught.value)

    sweep.run(points=20, on_progress=second)
    assert errors
    assert other.run(points=30).done == 30


# -- jobs ------------------------------------------------------------------------------------------------------------


def test_a_job_is_watched_paused_resumed_and_cancelled():
    sweep = open_sweep("a", Space(slots=Range(4, 400)), Hill(seconds=0.002), method="random")
    reached, paused, going = threading.Event(), threading.Event(), threading.Event()

    def watch(progress):
        if progress.done >= 20:
            reached.set()
        if progress.is_paused and not progress.running:
            paused.set()
        if progress.done > 60:
            going.set()

    job = sweep.prepare(points=100_000, on_progress=watch)
    job.start()
    assert reached.wait(60)
    job.pause()
    assert paused.wait(60)
    held = job.status.done
    assert job.is_paused and len(sweep.points()) == held == job.status.done
    job.resume()
    assert going.wait(60)
    job.cancel()
    done = job.result(60)
    assert 60 < done.done < 100_000
    assert job.progress == 1.0 and job.error is None
    assert list(done.best["tokens_per_s"]) == list(sweep.best(5)["tokens_per_s"])
    assert not sweep.is_running


def test_a_setting_that_was_tried_again_is_one_of_the_best_once():
    """A search that has found the best asks for it again and again: five lines of one setting tell nothing."""
    sweep = open_sweep("a", Space(slots=Range(28, 31)), Hill(), method="random")
    last = sweep.run(points=40)
    for best in (sweep.best(5), last.best):
        assert sorted(best["slots"]) == [28, 29, 30, 31] and best["slots"].iloc[0] == 30
    points = sweep.points()
    assert list(best["number"]) == [points.query("slots == @n")["number"].min() for n in best["slots"]]
    assert len(points) == 40


def test_progress_says_what_is_left_and_the_best_so_far():
    seen = []
    sweep = open_sweep("a", SPACE, Hill(), method="grid")
    sweep.run(on_progress=seen.append)
    last = seen[-1]
    assert (last.done, last.total, last.remaining_s) == (80, 80, 0.0)
    assert list(last.best["tokens_per_s"]) == [100, 99, 99, 98, 98]
    assert list(last.best.columns) == ["number", "slots", "schedule", "tokens_per_s"]
    assert "80 of 80 points, 6 infeasible" in str(last)


def test_time_ends_a_sweep_and_nothing_that_was_begun_is_lost():
    sweep = open_sweep("a", Space(slots=Range(4, 400)), Hill(), method="random")
    done = sweep.run(minutes=1e-6)
    assert done.total is None
    assert len(sweep.points()) == done.done


@pytest.mark.parametrize(
    "arguments",
    [
        {}, {"points": 0}, {"points": 2.5}, {"points": 1e3}, {"points": "5"}, {"points": True}, {"minutes": -1},
        {"minutes": "5"}, {"minutes": float("nan")}, {"points": 3, "workers": 0}, {"points": 3, "workers": 1.5},
    ],
    ids=str,
)  # fmt: skip
def test_a_run_without_an_end_is_refused(arguments):
    sweep = open_sweep("a", Space(threshold=Range(0.0, 1.0)), Hill())
    with pytest.raises(
        UnsupportedOption, match=([*arguments, "say when"] if not arguments else [*arguments])[-1]
    ):
        sweep.run(**arguments)
    assert sweep.points().empty


@pytest.mark.parametrize("seed", [-1, 1.7, None, "3", True])
def test_a_seed_is_a_whole_number(seed):
    with pytest.raises(UnsupportedOption, match="seed"):
        open_sweep("a", SPACE, Hill(), seed=seed)


def test_numpys_numbers_count_as_pythons():
    sweep = open_sweep("a", SPACE, Hill(), method="random", seed=np.int64(3), fixed={"width": np.int64(2)})
    assert sweep.estimate(np.int64(4)).points == 4
    sweep.run(points=np.int64(4), workers=np.int32(1))
    again = open_sweep("a", SPACE, Hill(), method="random", seed=3, fixed={"width": 2})
    assert list(again.points()["number"]) == [0, 1, 2, 3]
    assert again.settings_of(np.int64(1))["width"] == 2
    for number in (-1, 1.0, "1"):
        with pytest.raises(UnsupportedOption, match="there is no point"):
            again.settings_of(number)


# -- tables ----------------------------------------------------------------------------------------------------------


def test_the_front_is_what_no_other_point_beats():
    both = ("tokens_per_s", "gpu_bytes")
    sweep = open_sweep("a", SPACE, Hill(), method="grid", objectives=both)
    sweep.run()
    front = sweep.front()
    assert sorted(front["slots"]) == list(range(4, 31))
    assert (front["schedule"] == "fast").all()
    assert front["tokens_per_s"].is_monotonic_decreasing
    assert len(sweep.study.best_trials) == len(front), "Optuna's own front"
    assert list(sweep.best(3)["slots"]) == [30, 29, 31]


def test_importances_are_shares_and_say_what_matters():
    sweep = open_sweep("a", Space(slots=Range(4, 400), width=Range(20, 40)), Hill(), method="random")
    for done in ("0 finished points with 0 different values", "1 finished point with 1 different value"):
        with pytest.raises(UnsupportedOption, match=f"{done}: that does not tell settings apart; run more"):
            sweep.importances()
        sweep.run(points=1)
    sweep.run(points=120)
    shares = sweep.importances()
    assert list(shares) == ["slots", "width"]
    assert sum(shares.values()) == pytest.approx(1)
    with pytest.raises(UnsupportedOption, match="'tokens_per_s'"):
        sweep.importances("p95_ms")


def test_importances_of_one_objective_of_several_are_optunas_own():
    both = ("tokens_per_s", "gpu_bytes")
    sweep = open_sweep("a", SPACE, Hill(), method="random", objectives=both)
    sweep.run(points=60)
    targets = (lambda t: -t.values[0], lambda t: t.values[1])  # it asks for what is to be low
    for name, target in zip(both, targets, strict=True):
        with pytest.warns(UserWarning, match="computes the importances"):
            own = optuna.importance.get_param_importances(sweep.study, target=target)
        assert sweep.importances(name) == pytest.approx(own)


def test_a_sweeps_own_thread_leaves_the_users_filters_of_warnings_alone(monkeypatch):
    """They are the process's: what a notebook set while a sweep ran behind it was gone."""
    caught_by: list[str] = []

    class Watched(warnings.catch_warnings):
        def __init__(self, *arguments, **keywords):
            caught_by.append(sys._getframe(1).f_globals["__name__"])
            super().__init__(*arguments, **keywords)

    def work() -> None:
        sweep.run(points=20)
        shares.update(sweep.importances())

    sweep, shares = open_sweep("a", SPACE, Hill(), method="tpe"), {}
    monkeypatch.setattr(warnings, "catch_warnings", Watched)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert shares and not [name for name in caught_by if name.startswith("prescope")]


def test_all_settings_of_a_point_can_be_had():
    sweep = open_sweep("a", SPACE, Hill(), method="grid", fixed={"width": 3})
    sweep.run(points=4)
    point = sweep.points().iloc[2]
    assert sweep.settings_of(2) == {"width": 3, "slots": point["slots"], "schedule": point["schedule"]}
    with pytest.raises(UnsupportedOption, match="there are 4"):
        sweep.settings_of(4)


def test_a_missing_extra_is_named(tmp_path):
    code = "import sys; sys.modules['optuna'] = None; import prescope; prescope.tuning"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "prescope.tuning needs optuna" in out.stderr and "pip install 'prescope[sweep]'" in out.stderr


def test_generations_go_on_after_an_interruption():
    """NSGA-II finds its generations again in the study, or it would begin with chance each time."""
    space = Space(slots=Range(4, 400))
    for points in (60, 120):
        sweep = open_sweep("a", space, Hill(), method="nsga", objectives=("tokens_per_s", "gpu_bytes"))
        sweep.run(points=points)
    generations = [trial.system_attrs["NSGAIISampler:generation"] for trial in sweep.study.get_trials()]
    assert generations[0] == 0 and max(generations) >= 1
    assert generations == sorted(generations)


def test_empty_tables_have_their_columns():
    sweep = open_sweep("a", SPACE, Hill())
    for table in (sweep.points(), sweep.best(), sweep.front()):
        assert table.empty and list(table.columns) == [*COLUMNS, "slots", "schedule", "tokens_per_s"]


# -- estimates -------------------------------------------------------------------------------------------------------


def test_an_estimate_comes_before_the_first_point_and_records_none():
    sweep = open_sweep("a", SPACE, Hill(seconds=0.05), method="grid")
    said = sweep.estimate(1000)
    assert said.points == 80, "the grid has no more"
    assert said.seconds >= 80 * 0.05
    assert said.bytes == 1000 and said.disk_bytes > 0 and said.is_measured
    assert sweep.points().empty
    assert sweep.estimate(10, workers=4).bytes > 4 * 1000
    sweep.run(points=70)
    assert sweep.estimate(1000).points == 10


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "1,200 points of 20 ms in this process: about 99 s, 8 KiB of memory, 4 KiB in the study"),
        ({"points": 1, "bytes": 0}, "1 point of 20 ms in this process: about 99 s, 4 KiB in the study"),
        ({"seconds": 72_360.0}, "about 20.1 h, "),
        ({"points": 0, "seconds": 0.0}, "no point is left to try"),
        (
            {"points": 1, "is_measured": False, "reason": "no slots"},
            "1 point; what one takes is not known: no slots",
        ),
    ],
)
def test_an_estimate_says_what_there_is_to_say(changes, words):
    """An engine's said "0 B of memory", a finished study's "0 points of 16 ms", a long one's "1206 min"."""
    known = Estimate(1200, 99.0, 8 << 10, 0.02, 0.0, 4 << 10, 1, True)
    assert words in str(known._replace(**changes))


def test_an_estimate_of_nothing_but_refusals_says_why():
    said = open_sweep("a", Space(slots=Range(1, 3)), Hill()).estimate(100)
    assert not said.is_measured and "SlotPoolTooSmall" in said.reason
    assert "not known" in str(said)


# -- storages --------------------------------------------------------------------------------------------------------


def test_a_sweep_is_found_by_name_path_and_url(tmp_path):
    sweep = open_sweep("mine", SPACE, Hill())
    sweep.run(points=5)
    path = tmp_path / "runs" / "sweeps" / "mine.db"
    for where in ("mine", path, f"sqlite:///{path}"):
        found = load_sweep(where)
        pd.testing.assert_frame_equal(found.points(), sweep.points())
        assert dict(found.space) == dict(SPACE)
        with pytest.raises(BadSweep, match="opened for reading"):
            found.run(points=9)
    with pytest.raises(BadSweep, match="'mine'"):
        load_sweep("yours")
    assert (
        optuna.load_study(study_name="mine", storage=f"sqlite:///{path}").best_value
        == sweep.best(1)["tokens_per_s"][0]
    )


class TakesTheFile(Hill):
    """The disk is gone in the middle of its third try."""

    def __init__(self, path):
        super().__init__()
        self.path, self.left = path, 3

    def run(self, settings, seed=0, is_cancelled=lambda: False):
        self.left -= 1
        if not self.left:
            self.path.unlink()
        return super().run(settings, seed)


def test_a_storage_that_is_lost_in_the_middle_is_said(tmp_path):
    """Full, unmounted, deleted, or a server that goes away: which storage it is, and no database's own error."""
    path = tmp_path / "gone.db"
    sweep = open_sweep("a", SPACE, TakesTheFile(path), storage=path, method="random")
    for use in (
        lambda: sweep.run(points=40),
        lambda: sweep.run(points=40),
        sweep.points,
        lambda: sweep.is_running,
    ):
        with pytest.raises(BadSweep, match=r"gone\.db cannot be used"):
            use()


@pytest.mark.parametrize("storage", [None, "runs/a.db", "runs/deep/a.db"])
def test_a_folder_that_cannot_be_made_for_a_sweep_is_said(storage, tmp_path, monkeypatch):
    """A folder that is read-only said "Permission denied: 'runs'", which a panel did not take for the user's error."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").touch()
    with pytest.raises(BadSweep, match=r"storage sqlite:///runs/.*\.db cannot be used: .*Give the URL"):
        open_sweep("a", SPACE, Hill(), storage=storage)
    (tmp_path / "runs").unlink()
    open_sweep("a", SPACE, Hill(), storage=storage).run(points=1)
    assert list((tmp_path / "runs").rglob("*.db"))


def test_two_sweeps_may_share_a_storage(tmp_path):
    url = f"sqlite:///{tmp_path / 'both.db'}"
    for name in ("one", "two"):
        open_sweep(name, SPACE, Hill(), storage=url, method="grid").run(points=7)
    for name in ("one", "two"):
        assert len(load_sweep(url, study_name=name).points()) == 7
    with pytest.raises(BadSweep, match="'one', 'two'"):
        load_sweep(url)


@pytest.mark.parametrize(
    "name", ["a?b.db", "50%.db", "a%20b.db", "a#b.db", "with blanks, \u00fc.db", "no suffix"]
)
def test_a_file_keeps_its_name_whatever_letters_are_in_it(name, tmp_path):
    """What stands behind a question mark is no part of a URL's file: another file was written, under another name."""
    path = tmp_path / "made for it" / name
    open_sweep("mine", SPACE, Hill(), storage=path).run(points=3)
    assert [one.name for one in path.parent.iterdir()] == [name]
    assert len(load_sweep(path).points()) == 3
    assert load_sweep(path).file == path
    assert len(optuna.load_study(study_name="mine", storage=load_sweep(path).url).trials) == 3


@pytest.mark.parametrize(
    "url",
    [
        "redis://127.0.0.1:1/0",
        "mysql+nothing://a@b/c",
        "postgresql+psycopg://a:s3cret@127.0.0.1:1/c",
        "sqlite:////no/x.db",
    ],
)
def test_a_storage_that_cannot_be_used_is_said_without_its_password(url):
    """A driver that is not installed, a server that is not there, a kind that Optuna has not."""
    for opened in (lambda: open_sweep("a", SPACE, Hill(), storage=url), lambda: load_sweep(url)):
        with pytest.raises(BadSweep) as raised:
            opened()
        assert "s3cret" not in str(raised.value)


@pytest.mark.parametrize(
    "storage", [5, b"a.db", optuna.storages.InMemoryStorage()], ids=["number", "bytes", "storage"]
)
def test_a_storage_is_a_url_or_a_path(storage, tmp_path):
    with pytest.raises(UnsupportedOption, match="storage is"):
        open_sweep("a", SPACE, Hill(), storage=storage)
    assert not list(tmp_path.iterdir())


def test_a_password_is_not_shown():
    assert shown("postgresql://me:s3cret@host/studies") == "postgresql://me:***@host/studies"


@pytest.mark.parametrize("name", ["", "../up", "a/b", "a\\b", ".hidden", "x" * 300, 5, None])
def test_a_name_that_is_a_path_is_refused(name):
    with pytest.raises(BadSweep, match="no name"):
        open_sweep(name, SPACE, Hill())


@pytest.mark.parametrize("content", [b"", b"not a database at all, really not" * 100])
def test_a_file_that_is_no_study_is_said(tmp_path, content):
    path = tmp_path / "broken.db"
    path.write_bytes(content)
    with pytest.raises(BadSweep):
        load_sweep(path)
    assert path.read_bytes() == content, "looking changes nothing"
    with pytest.raises(BadSweep, match="no file"):
        load_sweep(f"sqlite:///{tmp_path / 'nowhere.db'}")
    assert not (tmp_path / "nowhere.db").exists()


def test_a_sweep_that_is_tried_out_needs_no_file(tmp_path):
    sweep = open_sweep("a", SPACE, Hill(), storage="sqlite:///:memory:", method="random")
    assert sweep.run(points=5).done == len(sweep.points()) == 5
    assert not list(tmp_path.iterdir())


def test_a_study_of_somebody_else_is_no_sweep(tmp_path):
    url = f"sqlite:///{tmp_path / 'other.db'}"
    optuna.create_study(study_name="other", storage=url)
    with pytest.raises(BadSweep, match="no sweep of this version"):
        open_sweep("other", SPACE, Hill(), storage=url)
    with pytest.raises(BadSweep, match="no sweep of this version"):
        load_sweep(url)
