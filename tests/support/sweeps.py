"""A sweep's table of points made by arithmetic, for tests of its figures and panels."""

from itertools import product

import pandas as pd

SCHEDULES = ("on-demand", "presched", "fate")


def sweep_points(*, running: bool = True) -> pd.DataFrame:
    """24 points over slots, schedule and lookahead: more slots are faster and larger; two came to nothing."""
    rows = []
    for number, (slots, schedule, lookahead) in enumerate(product((16, 32, 64, 96), SCHEDULES, (1, 2))):
        rate = 40 + slots / 2 + {"on-demand": 0, "presched": 30, "fate": 12}[schedule] - 4 * lookahead
        state, reason = "finished", ""
        if (slots, schedule) == (16, "fate"):
            state, reason = (
                ("infeasible", "16 slots, and 20 are needed") if lookahead == 1 else ("failed", "ran out")
            )
        rows.append(
            {
                "number": number, "state": state, "reason": reason, "seed": 0, "seconds": 0.02, "origin": "simulated",
                "machine": "a made-up machine", "commit": "abc1234", "started": "2026-11-29T12:00:00+00:00",
                "slots": slots, "schedule": schedule, "lookahead": lookahead, "cache": None,
                "tokens_per_s": rate if state == "finished" else None,
                "p95_ms": 1500 / rate if state == "finished" else None,
                "gpu_bytes": slots * 2**20 * 100.0 if state == "finished" else None,
            }
        )  # fmt: skip
    if running:
        rows.append({**rows[-1], "number": len(rows), "state": "running", "tokens_per_s": None, "p95_ms": None,
                     "gpu_bytes": None})  # fmt: skip
    return pd.DataFrame(rows)


def importances() -> dict[str, float]:
    """As `Sweep.importances()` gives them."""
    return {"lookahead": 0.05, "slots": 0.6, "schedule": 0.35}
