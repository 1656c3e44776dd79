"""What is a point of recall worth in tokens/s, by machine and format? An oracle that errs, on the simulator.

    python benchmarks/recall_value.py --out recall_value.json             # all traces
    python benchmarks/recall_value.py --traces tiny-moe --out tiny.json   # one

No GPU: costs are an H200's profile, behind its own link (PCIe 5) and behind those emulated of it (PCIe 4, PCIe 3).

traces    tiny-moe: its own routing of the prompts that come along, an expert counted as one of Qwen3-30B-A3B's
          (9.4 MB); medium: routing recorded on an H200, 3 prompts, at batch 1; qwen-like: made up, 16 layers of 128
          experts, top-8
formats   bf16; int4: 4.13 bits a weight over the link, experts on the CPU in 0.63 of bf16's time (measured on another
          CPU, benchmarks/results/cpu_packed_xeon_2cores_2026-11-29.md), on the GPU in the same time
schedule  PreSched with its CPU lane, predictions up to 4 layers ahead; a prediction takes 20 us beside the layer
recall    the same at each lookahead, errors independent from token to token: `NoisyOracle`. Errors of real predictors
          come together in hard tokens, and their recall falls with the lookahead; the early router (and LLaPor on the
          medium model, where its predictions were recorded) stands beside, at its own recall

"A point" is 0.01 of recall; its worth the mean between recall 0.7 and 0.9. Intervals are 95 %, over prompts (batch 1)
or groups of prompts side by side, paired; seeds of the errors are averaged.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import prescope
from prescope.core.machine import machine_facts
from prescope.core.types import MoEShape
from prescope.predictor import EarlyRouter, NoisyOracle, Predictor
from prescope.profile import SLOWER_LINKS, HardwareProfile
from prescope.scheduler.costs import LayerCosts
from prescope.simulator import Recording, Simulator, as_decode
from prescope.traces.routing import RoutingTrace
from prescope.traces.synthetic import SyntheticSpec
from prescope.training import own_prompts, record_trace, routers_of, score
from prescope.training.intervals import interval_of, resamples

RECALLS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
LOW, HIGH = 0.7, 0.9
SLOTS = (0.25, 0.5)
LOOKAHEAD = 4
PREDICT_US = 20.0
INT4_BITS, INT4_CPU = 4.125, 0.63
QWEN_EXPERT = (9_437_184, 2048, 768)
MEDIUM_EXPERT = (12_582_912, 2048, 1024)
QWEN_LIKE = SyntheticSpec(
    num_layers=16, num_experts=128, top_k=8, zipf=0.4, persistence=0.2, correlation=0.2, diversity=0.5
)


class Case(NamedTuple):
    """A trace, the machine its experts were measured on, and what real predictors say of it."""

    name: str
    trace: RoutingTrace
    profile: str
    expert: tuple[int, int, int]  # bytes in bf16, D, F
    batches: Sequence[int]
    real: Sequence[Predictor]
    ordered: bool = False  # predictions were recorded of this very order of steps

    def steps(self, batch: int) -> RoutingTrace:
        """The trace with `batch` prompts side by side."""
        return self.trace if self.ordered else as_decode(self.trace, batch)


class Cell(NamedTuple):
    """Times of one machine, format, batch and number of slots, by prompts."""

    labels: dict[str, Any]
    tokens_U: np.ndarray
    seconds_VU: np.ndarray  # by recall, seeds averaged
    without_U: np.ndarray
    real: list[dict[str, Any]]  # what real predictors reach, and at which recall

    def tokens_per_s(self, seconds_U: np.ndarray) -> float:
        """Of all prompts."""
        return float(self.tokens_U.sum() / seconds_U.sum())

    def row(self) -> dict[str, Any]:
        """Tokens/s by recall, and the worth of a point in percent with its interval."""
        worth = self._worth(np.ones(len(self.tokens_U)))
        found = interval_of(float(worth), self._worth(resamples(np.ones(len(self.tokens_U), bool), 0)))
        rates = {
            str(recall): self.tokens_per_s(s) for recall, s in zip(RECALLS, self.seconds_VU, strict=True)
        }
        return {
            **self.labels,
            "prompts_or_groups": len(self.tokens_U),
            "none": self.tokens_per_s(self.without_U),
            **rates,
            "pct_a_point": found.value,
            "pct_low": found.low,
            "pct_high": found.high,
            "real": self.real,
        }

    def _worth(self, weights: np.ndarray) -> np.ndarray:
        low, high = (weights @ self.seconds_VU[RECALLS.index(recall)] for recall in (LOW, HIGH))
        worth: np.ndarray = 100.0 * (low / high - 1.0) / (100.0 * (HIGH - LOW))
        return worth


def tiny_moe() -> Case:
    """tiny-moe's own routing of the prompts that come along, with its early router."""
    with prescope.load("data/tiny-moe", slots=1.0, device="null") as engine:
        trace = record_trace(engine, own_prompts())
        early = EarlyRouter(trace.shape, routers_of(engine, trace), LOOKAHEAD)
    early.calibrate(trace)
    return Case("tiny-moe", trace, "h200", QWEN_EXPERT, (1, 8), [early])


def medium() -> Case:
    """The recording that comes along: too few prompts for a larger batch."""
    recording = Recording.load("medium.b1")
    real = list(recording.predictors)
    return Case("medium", recording.trace, "h200_medium", MEDIUM_EXPERT, (1,), real, ordered=True)


def qwen_like() -> Case:
    """A made-up model's decode steps."""
    trace = QWEN_LIKE.generate(prompt_tokens=8, new_tokens=25, batch=32, seed=1).select(phase="decode")
    return Case("qwen-like", trace, "h200", QWEN_EXPERT, (1, 8), [])


CASES = {"tiny-moe": tiny_moe, "medium": medium, "qwen-like": qwen_like}


def machines(
    profile: str, expert: tuple[int, int, int], shape: MoEShape, batch: int
) -> Iterator[tuple[str, str, LayerCosts, int]]:
    """Link, format, costs and bytes of an expert; `expert` in bf16: bytes, D, F."""
    nbytes, width, expert_width = expert
    known = HardwareProfile.load(profile)
    links = {"PCIe 5": known} | {name: known.emulated(n, name) for n, name in SLOWER_LINKS.items()}
    for link, seen in links.items():
        costs = seen.costs(
            shape._replace(row_bytes=nbytes), width=width, expert_width=expert_width, batch=batch
        )
        costs = costs.with_predictor(PREDICT_US)
        yield link, "bf16", costs, nbytes
        packed = int(nbytes * INT4_BITS / 16)
        yield link, "int4", packed_costs(costs, seen, packed), packed


def packed_costs(costs: LayerCosts, profile: HardwareProfile, nbytes: int) -> LayerCosts:
    """The same layer with experts of 4 bits."""
    return replace(
        costs,
        link_us=profile.link_us(nbytes),
        link_busy_us=profile.link_us(nbytes, busy_cpu=True),
        cpu_us=tuple(INT4_CPU * us for us in costs.cpu_us),
        cpu_alone_us=tuple(INT4_CPU * us for us in costs.cpu_alone_us),
        source=f"{costs.source}; int4 stated: {INT4_BITS} bits, {INT4_CPU} of the CPU's time",
    )


class Replays:
    """One trace and batch under one link and format: each predictor's simulator, prepared once."""

    def __init__(self, steps: RoutingTrace, batch: int, costs: LayerCosts, nbytes: int) -> None:
        self._steps, self._costs, self._nbytes = steps, costs, nbytes
        rows = steps.select(phase="decode")
        _, first, tokens_S = np.unique(rows.step, return_index=True, return_counts=True)
        _, self._unit_S = np.unique(rows.sequence[first] // batch, return_inverse=True)
        self.tokens_U = np.bincount(self._unit_S, tokens_S)

    def seconds(self, predictor: Predictor | None) -> dict[float, np.ndarray]:
        """(U,) of each prompt or group, by share of slots."""
        simulator = Simulator(self._steps, self._costs, row_bytes=self._nbytes, predictor=predictor)
        runs = {slots: simulator.run("presched", slots=slots) for slots in SLOTS}
        return {slots: np.bincount(self._unit_S, run.step_us / 1e6) for slots, run in runs.items()}


def measure(case: Case, batch: int, seeds: int) -> list[Cell]:
    """All cells of one trace and batch."""
    steps = case.steps(batch)
    oracles = [
        [
            NoisyOracle(steps, {1: recall, LOOKAHEAD: recall}, seed=seed)
            for seed in range(seeds if recall < 1 else 1)
        ]
        for recall in RECALLS
    ]
    recalls = [recall_of(one, steps) for one in case.real]
    found = []
    for link, form, costs, nbytes in machines(case.profile, case.expert, case.trace.shape, batch):
        replays = Replays(steps, batch, costs, nbytes)
        noisy = [[replays.seconds(one) for one in group] for group in oracles]
        without = replays.seconds(None)
        reached = [replays.seconds(one) for one in case.real]
        for slots in SLOTS:
            labels = {"trace": case.name, "link": link, "format": form, "batch": batch, "slots": slots}
            mean = np.array([np.mean([one[slots] for one in group], axis=0) for group in noisy])
            cell = Cell(labels, replays.tokens_U, mean, without[slots], [])
            for one, recall, times in zip(case.real, recalls, reached, strict=True):
                rate = cell.tokens_per_s(times[slots])
                cell.real.append({"predictor": one.name, "recall": recall, "tokens_per_s": rate})
            found.append(cell)
    return found


def recall_of(predictor: Predictor, steps: RoutingTrace) -> list[float]:
    """Recall@K of the decode steps by lookahead, 1 first."""
    rows = steps if predictor.needs_inputs else steps.select(phase="decode")
    card = score(predictor, rows)
    return [round(card.recall(ahead), 4) for ahead in card.lookaheads]


def markdown(rows: list[dict[str, Any]]) -> str:
    """The worth of a point by machine and format, then tokens/s of every cell."""
    cells = sorted({(row["trace"], row["batch"], row["slots"]) for row in rows})
    machines_ = list(dict.fromkeys((row["link"], row["format"]) for row in rows))
    at = {(row["trace"], row["batch"], row["slots"], row["link"], row["format"]): row for row in rows}
    titles = [f"{trace}, batch {batch}, {100 * slots:g} %" for trace, batch, slots in cells]
    lines = [
        f"What a point of recall is worth, % of tokens/s, mean from {LOW} to {HIGH} (95 % interval):",
        "",
        "| link, format | " + " | ".join(titles) + " |",
        "|---|" + "--:|" * len(titles),
    ]
    for link, form in machines_:
        values = []
        for cell in cells:
            row = at[(*cell, link, form)]
            values.append(f"{row['pct_a_point']:+.2f} ({row['pct_low']:+.2f} to {row['pct_high']:+.2f})")
        lines.append(f"| {link}, {form} | " + " | ".join(values) + " |")
    names = ["none", *map(str, RECALLS)]
    lines += [
        "",
        "Tokens/s without predictions, by recall, and of real predictors at theirs (1 layer ahead):",
        "",
    ]
    lines += ["| trace | batch | slots | link, format | " + " | ".join(names) + " | real |"]
    lines += ["|---|--:|--:|---|" + "--:|" * len(names) + "---|"]
    for row in rows:
        real = "; ".join(
            f"{r['predictor']} {r['recall'][0]:.2f}: {r['tokens_per_s']:.1f}" for r in row["real"]
        )
        numbers = " | ".join(f"{row[name]:.1f}" for name in names)
        lines.append(
            f"| {row['trace']} | {row['batch']} | {100 * row['slots']:g} % | {row['link']}, {row['format']} | "
            f"{numbers} | {real or '-'} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Print the tables; write rows and tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--traces", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--seeds", type=int, default=2, help="of the errors, averaged")
    parser.add_argument("--out", default="", help="JSON; a .md is written beside it")
    options = parser.parse_args()
    rows = []
    for name in options.traces:
        case = CASES[name]()
        for batch in case.batches:
            rows += [cell.row() for cell in measure(case, batch, options.seeds)]
    text = f"Simulated on a virtual clock; seeds 0 to {options.seeds - 1}.\n\n{markdown(rows)}"
    print(text)
    if options.out:
        contents = {"arguments": vars(options), "machine": machine_facts(), "rows": rows}
        Path(options.out).write_text(json.dumps(contents, indent=1) + "\n")
        Path(options.out).with_suffix(".md").write_text(text + "\n")


if __name__ == "__main__":
    main()
