"""What the laboratory's cells say: where PreSched is behind, by how much, and why."""

import numpy as np
import pandas as pd

CELL = ["shape", "batch", "link", "slots", "predictor"]
#: A cell counts as lost when another schedule is faster by more than this.
TOLERANCE = 0.02
#: Parts of a step, ms, whose difference to the faster schedule is a cause.
CAUSES = {
    "late_ms": "waits for late copies",
    "demand_ms": "waits for on-demand copies",
    "cpu_ms": "waits for the CPU",
}


def ratios(rows: pd.DataFrame) -> pd.DataFrame:
    """One row a cell: PreSched over the best other schedule, and what each of the two waited for."""
    ours = rows[rows["schedule"] == "presched"].set_index(CELL)
    others = rows[rows["schedule"] != "presched"]
    best = others.loc[others.groupby(CELL)["tokens_per_s"].idxmax()].set_index(CELL)
    table = ours.join(best, rsuffix="_best")
    table["ratio"] = table["tokens_per_s"] / table["tokens_per_s_best"]
    return table.sort_values(["ratio"])


def cause(row: pd.Series) -> str:
    """Why PreSched was behind the best schedule in a cell: what it waited for longer, and what it copied in vain."""
    more = {words: row[name] - row[f"{name}_best"] for name, words in CAUSES.items()}
    words, ms = max(more.items(), key=lambda pair: pair[1])
    hits = 100 * (row["hits"] - row["hits_best"])
    text = f"{words} +{ms:.2f} ms a step"
    if words == CAUSES["cpu_ms"]:
        text += f", hits {hits:+.1f} points, {row['prefetches']:.1f} copies ahead beside the CPU"
    if row["wasted"] > row["wasted_best"] + 0.05:
        mb = (row["wasted"] - row["wasted_best"]) * row["row_bytes"] / 1e6
        text += f", {mb:,.0f} MB a step more copied and not used"
    return text


def report(rows: pd.DataFrame) -> str:
    """Markdown: how many cells are behind, the worst, each lost cell with its cause, and who else is how far behind."""
    table = ratios(rows)
    lost = table[table["ratio"] < 1.0 - TOLERANCE]
    mean = float(np.exp(np.log(table["ratio"]).mean()))
    lines = [
        f"{len(table)} cells; PreSched is behind the best other schedule by more than {100 * TOLERANCE:.0f} % in "
        f"{len(lost)}; worst ratio {table['ratio'].min():.3f}, geometric mean {mean:.3f}.",
        "",
        "| model's shape | batch | link | cells | behind | worst | mean |",
        "|---|--:|---|--:|--:|--:|--:|",
    ]
    for (shape, batch, link), group in table.groupby(["shape", "batch", "link"]):
        behind = int((group["ratio"] < 1.0 - TOLERANCE).sum())
        mean = float(np.exp(np.log(group["ratio"]).mean()))
        lines.append(
            f"| {shape} | {batch} | {link} | {len(group)} | {behind} | {group['ratio'].min():.3f} | {mean:.3f} |"
        )
    lines += ["", *_losses(lost), "", *_others(rows)]
    return "\n".join(lines)


def _losses(lost: pd.DataFrame) -> list[str]:
    if not len(lost):
        return ["No cell is lost."]
    lines = [
        "Cells behind, the worst first, and the cause:",
        "",
        "| shape | batch | link | slots | predictor | ratio | ahead | tokens/s | cause |",
        "|---|--:|---|--:|---|--:|---|--:|---|",
    ]
    for (shape, batch, link, slots, predictor), row in lost.iterrows():
        lines.append(
            f"| {shape} | {batch} | {link} | {100 * slots:.0f} % | {predictor} | {row['ratio']:.3f} | "
            f"{row['schedule_best']} | {row['tokens_per_s']:.1f} of {row['tokens_per_s_best']:.1f} | {cause(row)} |"
        )
    return lines


def _others(rows: pd.DataFrame) -> list[str]:
    """Each schedule over the best of all in the same cell."""
    speed = rows.pivot_table("tokens_per_s", CELL, "schedule")
    share = speed.div(speed.max(axis=1), axis=0)
    lines = [
        "Each schedule over the fastest of all in the same cell:",
        "",
        "| schedule | within 2 % | mean | worst |",
        "|---|--:|--:|--:|",
    ]
    for name in share.columns[np.argsort(-np.log(share).mean().to_numpy())]:
        column = share[name]
        near = int((column >= 1.0 - TOLERANCE).sum())
        lines.append(
            f"| {name} | {near} of {len(column)} | {np.exp(np.log(column).mean()):.3f} | {column.min():.3f} |"
        )
    return lines
