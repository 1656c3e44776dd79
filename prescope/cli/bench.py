"""`prescope bench`: tokens/s over a grid of prompt, new tokens, batch, slots and schedule."""

import csv
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..core.files import require_writable, write_text
from ..errors import SlotPoolTooLarge, SlotPoolTooSmall
from .options import (
    DEFAULT_MODEL,
    AsJson,
    Device,
    Dtype,
    Experts,
    Link,
    Predictor,
    listed,
    loaded,
    numbers,
    slots_of,
)
from .terminal import StatusLine, tell

if TYPE_CHECKING:
    from ..engine import Engine

#: Column, its title, how it is printed. JSON and CSV hold all of a row.
COLUMNS = [
    ("prompt", "prompt", "{:>6}"), ("new", "new", "{:>5}"), ("batch", "batch", "{:>5}"), ("slots", "slots", "{:>6}"),
    ("schedule", "schedule", "{:<11}"), ("tokens_per_s", "tokens/s", "{:>9.4g}"), ("spread", "±", "{:>6.2g}"),
    ("prompt_per_s", "prompt/s", "{:>9.4g}"), ("ttft_ms", "TTFT ms", "{:>8.4g}"), ("hit_rate", "hits", "{:>5.0%}"),
]  # fmt: skip

#: Columns of a CSV, in a cell that could not run too.
FIELDS = [
    "model", "prompt", "new", "batch", "slots", "schedule", "repeats", "prompts", "error", "tokens_per_s",
    "tokens_per_s_least", "tokens_per_s_most", "prompt_per_s", "ttft_ms", "tpot_ms", "hit_rate", "late_rate",
    "miss_rate", "stall_frac", "link_use_frac", "h2d_bytes", "num_slots", "cache", "decode", "experts", "lossy",
    "label", "device", "link", "dtype", "cpu", "cores", "prescope", "commit", "torch", "transformers",
]  # fmt: skip


def bench(
    model: Annotated[str, typer.Argument(metavar="MODEL", hidden=True)] = DEFAULT_MODEL,
    prompt: Annotated[str, typer.Option("--prompt", "-p", metavar="N,..", help="Prompt tokens.")] = "64",
    new: Annotated[str, typer.Option("--new", "-n", metavar="N,..", help="New tokens.")] = "32",
    batch: Annotated[str, typer.Option("--batch", "-b", metavar="N,..", help="Sequences.")] = "1",
    slots: Annotated[str, typer.Option("--slots", "-s", metavar="S,..", help="Slots.")] = "0.25,0.5,1.0",
    schedule: Annotated[str, typer.Option("--schedule", metavar="NAME,..", help="Schedules.")] = "on-demand",
    repeats: Annotated[int, typer.Option("--repeats", "-r", metavar="N", min=1, help="Runs of a cell.")] = 5,
    warm_up: Annotated[int, typer.Option("--warm-up", metavar="N", min=0, help="Runs before them.")] = 1,
    device: Device = "auto",
    dtype: Dtype = "auto",
    experts: Experts = "auto",
    link: Link = None,
    predictor: Predictor = None,
    as_json: AsJson = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Also to .json or .csv.", show_default=False),
    ] = None,
) -> None:
    """Measure tokens/s of MODEL, a folder or hub id, over a grid of comma lists: median ± half the spread."""
    if as_json and as_csv:
        raise typer.BadParameter("choose one of --json and --csv")
    if output is not None and output.suffix not in (".json", ".csv"):
        raise typer.BadParameter(f"{output} ends in neither .json nor .csv", param_hint="--output")
    if output is not None:
        require_writable(output)
    prompts, news, batches = numbers(prompt, "--prompt"), numbers(new, "--new"), numbers(batch, "--batch")
    from ..engine.benchmark import benchmark, grid
    from ..training import own_prompts

    pools, schedules = [slots_of(text) for text in listed(slots, "--slots")], listed(schedule, "--schedule")
    cells = grid(prompts, news, batches, pools, schedules)
    rows: list[dict[str, Any]] = []
    with StatusLine() as status:
        status.show(f"loading {model}")
        engine = _opened(
            pools,
            lambda wanted: loaded(
                model, predictor, schedule="on-demand", slots=wanted, device=device, dtype=dtype, experts=experts,
                link_gb_per_s=link,
            ),
        )  # fmt: skip
        texts = [text for group in own_prompts().values() for text in group]

        def on_run(cell: Any, number: int) -> None:
            status.share(f"{cell}, run {number + 1} of {warm_up + repeats}", len(rows) / len(cells))

        try:
            with engine:
                for row in benchmark(
                    engine, cells, repeats=repeats, warm_up=warm_up, texts=texts, on_run=on_run
                ):
                    rows.append(row)
                    status.clear()
                    _keep(rows, output)
                    if not as_json:
                        _print(row, len(rows) == 1, as_csv)
        finally:  # after Ctrl-C too: the cells that are done
            if as_json:
                typer.echo(_json(rows))
    failed = [row for row in rows if row["error"]]
    for row in failed:
        tell(f"prescope: {row['slots']} slots, {row['schedule']}: {row['error']}")
    if failed:
        raise typer.Exit(1)


def _opened(slots: list[int | float | str], load: Callable[[int | float | str], "Engine"]) -> "Engine":
    """An engine with the first of these slots that can be: those that cannot are rows with a reason, later."""
    for wanted in slots[:-1]:
        try:
            return load(wanted)
        except (SlotPoolTooSmall, SlotPoolTooLarge):
            continue
    return load(slots[-1])


def _print(row: dict[str, Any], is_first: bool, as_csv: bool) -> None:
    if as_csv:
        typer.echo(_csv([row], with_names=is_first), nl=False)
        return
    if is_first:
        tell(
            f"{row['model']}, {row['dtype']}, {row['label']}; {row['prompts']}, {row['repeats']} runs a cell"
        )
        typer.echo("  ".join(_padded(title, form) for _, title, form in COLUMNS))
    if row["error"]:
        head = [_padded(str(row[name]), form) for name, _, form in COLUMNS[:5]]
        typer.echo("  ".join([*head, row["error"]]))
        return
    spread = (row["tokens_per_s_most"] - row["tokens_per_s_least"]) / 2
    typer.echo("  ".join(form.format((row | {"spread": spread})[name]) for name, _, form in COLUMNS))


def _padded(text: str, form: str) -> str:
    width = int(form.strip("{}:<>").partition(".")[0].rstrip("%"))
    return f"{text:{form[2]}{width}}"


def _keep(rows: list[dict[str, Any]], output: Path | None) -> None:
    """Write all cells so far, whole: a killed bench leaves a file that can be read."""
    if output is not None:
        write_text(output, _csv(rows) if output.suffix == ".csv" else _json(rows) + "\n")


def _json(rows: list[dict[str, Any]]) -> str:
    known = [
        {
            name: None if isinstance(value, float) and math.isnan(value) else value
            for name, value in row.items()
        }
        for row in rows
    ]
    return json.dumps(known, indent=1)


def _csv(rows: list[dict[str, Any]], with_names: bool = True) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, FIELDS, restval="", lineterminator="\n")
    if with_names:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
