"""Speed over a grid of settings: one row for each cell, with the spread of its repeats and where it was measured.

Prompts are windows of real text, a new one for each repeat and the same ones for every cell: a prompt that is repeated
flatters any cache, and random tokens route like no text does.
"""

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import PrescopeError, UnsupportedOption
from ..traces.result import RunResult
from .engine import Engine

#: Figures of a run's decode phase that a row has the medians of.
DECODE_FIGURES = ("hit_rate", "late_rate", "miss_rate", "stall_frac", "link_use_frac", "h2d_bytes")


class Cell(NamedTuple):
    """One point of the grid."""

    prompt: int  # tokens of each prompt
    new: int  # tokens generated after it
    batch: int  # sequences side by side
    slots: int | float | str  # as of `EngineConfig`
    schedule: str


def grid(
    prompt: Iterable[int],
    new: Iterable[int],
    batch: Iterable[int],
    slots: Iterable[int | float | str],
    schedule: Iterable[str],
) -> list[Cell]:
    """All cells, the last argument changing fastest.

    Raises:
        UnsupportedOption: fewer than 1 prompt token or sequence, or fewer than 2 new tokens: the first comes from the
            prompt's pass and says nothing of decoding.
    """
    cells = [Cell(*values) for values in product(prompt, new, batch, slots, schedule)]
    for cell in cells:
        if cell.prompt < 1 or cell.batch < 1 or cell.new < 2:
            raise UnsupportedOption(
                f"prompt {cell.prompt}, new {cell.new}, batch {cell.batch}: a cell needs 1 prompt token, 2 new tokens "
                f"and 1 sequence at least"
            )
    return cells


def benchmark(
    engine: Engine,
    cells: Iterable[Cell],
    *,
    repeats: int = 5,
    warm_up: int = 1,
    texts: Sequence[str] = (),
    seed: int = 0,
    on_run: Callable[[Cell, int], None] | None = None,
) -> Iterator[dict[str, Any]]:
    """Measure cells one by one; each row is there as soon as its cell is done.

    Args:
        repeats: runs of a cell that count. warm_up: runs before them, on other prompts: kernels are compiled, graphs
            captured and slots filled.
        texts: to cut prompts from; without them, or without a tokenizer, tokens are random and the row says so.
        on_run: told the cell and the number of the run, from 0, warm-up first.

    Yields:
        The cell and its medians, with least and most of the runs for tokens/s: `tokens_per_s` (decode phase, all
        sequences), `prompt_per_s` (prompt tokens over the time to the first token), `ttft_ms`, `tpot_ms`, rates of
        experts, and machine, dtype, versions and commit. A cell that cannot run has its reason in `error`, no figures.

    Raises:
        UnsupportedOption: no repeats.
    """
    if repeats < 1 or warm_up < 0:
        raise UnsupportedOption(f"repeats is {repeats}, warm_up {warm_up}; at least 1 run counts")
    ids, source = _tokens(engine, texts, seed)
    for cell in cells:
        row: dict[str, Any] = {"model": engine.name, **cell._asdict(), "repeats": repeats, "prompts": source}
        try:
            engine.configure(slots=cell.slots, schedule=cell.schedule)
            engine.clear_cache()
            runs = []
            for number in range(warm_up + repeats):
                if on_run is not None:
                    on_run(cell, number)
                runs.append(_run(engine, cell, _draw(ids, cell, number)))
            row |= {"error": "", **_figures(cell, runs[warm_up:]), **_settings(engine, runs[-1])}
        except PrescopeError as error:
            row["error"] = f"{type(error).__name__}: {error}"
        yield row | _where(engine)


def _tokens(engine: Engine, texts: Sequence[str], seed: int) -> tuple[NDArray[np.int64], str]:
    """A long line of tokens to cut prompts from, and what they are."""
    if texts and engine.tokenizer is not None:
        ids = [token for text in texts for token in engine.tokenizer(text)["input_ids"]]
        return np.array(ids, dtype=np.int64), "text"
    vocabulary = engine.model.config.get_text_config().vocab_size
    return np.random.default_rng(seed).integers(vocabulary, size=1 << 16), "random tokens"


def _draw(ids: NDArray[np.int64], cell: Cell, number: int) -> torch.Tensor:
    """(B, T) windows for a run, the same for every cell of this size."""
    starts = np.random.default_rng([cell.prompt, number]).integers(len(ids), size=cell.batch)
    places = (starts[:, None] + np.arange(cell.prompt)) % len(ids)
    return torch.from_numpy(ids[places])


def _run(engine: Engine, cell: Cell, prompts: torch.Tensor) -> RunResult:
    result: RunResult = engine.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),  # else a token that pads elsewhere would count as padding
        max_new_tokens=cell.new,
        eos_token_id=None,  # every run has as many steps
    )
    return result


def _figures(cell: Cell, runs: Sequence[RunResult]) -> dict[str, float]:
    speeds = [run.metrics.tokens_per_s for run in runs]
    ttft_ms = statistics.median(run.metrics.ttft_ms for run in runs)
    return {
        "tokens_per_s": statistics.median(speeds),
        "tokens_per_s_least": min(speeds),
        "tokens_per_s_most": max(speeds),
        "prompt_per_s": 1e3 * cell.prompt * cell.batch / ttft_ms,
        "ttft_ms": ttft_ms,
        "tpot_ms": statistics.median(run.metrics.tpot_ms for run in runs),
        **{
            name: statistics.median(getattr(run.metrics.decode, name) for run in runs)
            for name in DECODE_FIGURES
        },
    }


def _settings(engine: Engine, run: RunResult) -> dict[str, Any]:
    return {
        "num_slots": engine.num_slots,
        "cache": engine.config.cache,
        "decode": run.config["reasons"].get("decode", ""),
        "experts": engine.form or "plain",
        "lossy": engine.is_lossy,
    }


def _where(engine: Engine) -> dict[str, Any]:
    """Where a row was measured; what `Engine.hardware` says of the link's rate differs by device."""
    facts = engine.hardware()
    names = (
        "label",
        "device",
        "link",
        "dtype",
        "cpu",
        "cores",
        "prescope",
        "commit",
        "torch",
        "transformers",
    )
    return {name: facts[name] for name in names}
