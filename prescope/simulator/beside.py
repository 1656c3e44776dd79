"""What experts on the CPU took in runs of an engine, and copies beside them.

A calibration wakes the CPU's threads for each job: 84 us on one H200 machine, 258 on the next. In an engine's steps
they are awake: on the latter 4.7 experts took 467 us, of which the experts alone are 424 (docs/log/simulator.md).
"""

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ..profile.curves import fit_line
from ..scheduler.costs import LayerCosts, spread_of
from ..traces.result import RunResult

#: Jobs, and copies beside them, that say something.
FEWEST = 16
KEYS = ["step", "moe_layer"]


def beside_as_in(runs: Iterable[RunResult], known: LayerCosts, merge_us: float) -> LayerCosts:
    """Costs whose CPU lane is as it was in some runs; as they are where too few experts were computed on the CPU.

    Args:
        known: how times grow with tokens stays as it is there, and what a busy link makes of them where no run says.
        merge_us: merging a job's result, which is no part of the job.
    """
    tables = [_jobs_and_copies(run) for run in runs if run.metrics.decode.on_cpu]
    jobs = (
        pd.concat([jobs for jobs, _ in tables], keys=range(len(tables)), names=["run"])
        if tables
        else pd.DataFrame()
    )
    if len(jobs) < FEWEST or len(known.cpu_us) < 2:
        return known
    beside_us, alone_us = known.cpu_us[1], (known.cpu_alone_us or known.cpu_us)[1]
    expected_us = jobs["experts"] * np.where(jobs["is_beside"], beside_us, alone_us)
    # Jobs of nearly as many experts tell little of a submission by itself: one is not longer than from sleep.
    base_us = min(
        fit_line(expected_us.tolist(), jobs["dur_us"].tolist()).base_us,
        max(0.0, known.cpu_base_us - merge_us),
    )
    times = (jobs["dur_us"] - base_us).clip(lower=0.0) / expected_us
    each = {
        is_beside: float(part.median())
        for is_beside, part in times.groupby(jobs["is_beside"])
        if len(part) >= FEWEST
    }
    if not each or min(each.values()) <= 0:
        return known
    beside, alone = (each.get(is_beside, next(iter(each.values()))) for is_beside in (True, False))
    fitted = base_us + np.where(jobs["is_beside"], beside, alone) * expected_us
    by_step = jobs.assign(fitted_us=fitted).groupby(["run", "step"])[["dur_us", "fitted_us"]].sum()
    copies = np.concatenate([us for _, us in tables])
    return replace(
        known,
        link_busy_us=max(known.link_us, float(np.median(copies)))
        if len(copies) >= FEWEST
        else known.link_busy_us,
        cpu_us=tuple(beside * us for us in known.cpu_us),
        cpu_alone_us=tuple(alone * us for us in known.cpu_alone_us),
        cpu_base_us=base_us + merge_us,
        spread=known.spread._replace(cpu=spread_of(by_step["dur_us"] / by_step["fitted_us"])),
        source=f"{known.source}, as fast as in {len(tables)} run{'s' * (len(tables) > 1)} of the engine",
    )


def _jobs_and_copies(run: RunResult) -> tuple[pd.DataFrame, NDArray[np.float64]]:
    """Jobs of the decode steps (columns step, experts, dur_us, is_beside: the link copied for most of it), and what
    copies took that the CPU computed beside all along, us.
    """
    events = run.events[run.events["phase"] == "decode"]
    jobs = events[(events["lane"] == "cpu") & (events["kind"] == "experts")].set_index(KEYS)
    layers = run.layers[run.layers["phase"] == "decode"].set_index(KEYS)
    jobs = jobs.join(layers["on_cpu"].rename("experts"), how="inner").reset_index()
    jobs = jobs[(jobs["experts"] > 0) & (jobs["dur_us"] > 0)].sort_values("start_us")
    copies = events[events["kind"] == "transfer"].sort_values("start_us")
    share = _covered(copies, jobs) / copies["dur_us"].clip(lower=1e-3)
    is_beside = _covered(jobs, copies) > 0.5 * jobs["dur_us"]
    return jobs.assign(is_beside=is_beside), copies.loc[share > 0.99, "dur_us"].to_numpy(float)


def _covered(spans: pd.DataFrame, others: pd.DataFrame) -> pd.Series:
    """How long each span has one of the others beside it, us; these do not overlap one another."""
    if others.empty:
        return pd.Series(0.0, index=spans.index)
    begin = others["start_us"].to_numpy(float)
    end = np.maximum.accumulate(begin + others["dur_us"].to_numpy(float))
    begin = np.maximum(begin, np.r_[begin[0], end[:-1]])
    at = np.ravel(np.column_stack([begin, end]))
    total = np.ravel(np.column_stack([np.r_[0.0, np.cumsum(end - begin)[:-1]], np.cumsum(end - begin)]))
    first, last = spans["start_us"].to_numpy(float), (spans["start_us"] + spans["dur_us"]).to_numpy(float)
    return pd.Series(np.interp(last, at, total) - np.interp(first, at, total), index=spans.index)
