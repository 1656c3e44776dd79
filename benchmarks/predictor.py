"""How well do predictors predict: in the domains they were trained on, when the text changes, and at what cost.

    python benchmarks/predictor.py --corpus corpus --out predictor.json                  # data/tiny-moe, CPU or GPU
    python benchmarks/predictor.py --model medium --corpus corpus --out medium.json --prompts 200 --epochs 12

The corpus is a folder with train/<domain>.txt, valid/<domain>.txt and ood/<domain>.txt. Parts, each written to the
JSON as soon as it is done; one that fails leaves its traceback there and the next goes on:

all       LLaPor and the paper's form trained on all domains, scored beside the baselines on held-out and unknown text;
          LLaPor also with a correction that always and that never counts in full
shifts    trained on one domain alone (--only), scored on the others: dialogue -> code, prose -> maths, another language
ablation  the same training without one thing each: trust, own text, distillation, the chosen experts
online    the text changes in mid-stream, with and without online tuning
failures  inverted, random and adversarial predictions
slots     what recall is worth: recall at the slots, coverage of a cache's misses, stalls, bytes, tokens/s, on text of
          unknown kinds, by an H200's costs (an expert counts as one of Qwen3-30B-A3B's), gains with intervals
worth     milliseconds saved per token by the cost model, for the machine of --link-us, --gpu-us and --rest-us
cost      time and size of one prediction at Qwen3-30B-A3B's shape on this machine: eager, and in a CUDA graph
training  time of `prescope.train_predictor`, all of it, for a model of the --shape with random weights and tokens

--turn R turns each layer's recorded states and its router by a further random rotation of at most R radians: what a
layer chooses stays, routers of coming layers fit the states less, as in a model whose early router is weak.

Recall@K is the mean over layers; intervals are 95 %, over prompts. Accuracy does not depend on the machine; times do.
"""

import argparse
import json
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _models import open_model
from recall_value import QWEN_EXPERT, machines

import prescope
from prescope.core.machine import machine_facts
from prescope.core.types import MoEShape
from prescope.engine.engine import Engine
from prescope.predictor import (
    LayerGroups,
    Llapor,
    LlaporConfig,
    ModelTag,
    OnlineConfig,
    Routers,
    find_groups,
    measure_us,
)
from prescope.predictor.llapor import ALWAYS_TRUST, NEVER_TRUST
from prescope.scheduler.costs import LayerCosts
from prescope.traces.routing import RoutingTrace
from prescope.training import (
    Inverted,
    TrainConfig,
    adversarial_trace,
    baselines,
    difference,
    domain_shift,
    own_prompts,
    own_text,
    random_predictor,
    record_trace,
    router_agreement,
    routers_of,
    rows_of,
    savings,
    schedule_cards,
    score,
    split_by_prompt,
    train,
    train_artefact,
)
from prescope.training.score_card import ScoreCard

LOOKAHEADS = (1, 2, 4)
#: Qwen3-30B-A3B (data/configs/qwen3-30b-a3b.json): experts, top-k, hidden size.
QWEN3 = (128, 8, 2048)


class Study:
    """What the parts share: traces, routers, trained predictors, and the report they add to."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.started = time.perf_counter()
        self.report: dict[str, Any] = {"arguments": vars(args), "machine": machine_facts() | gpu_facts()}
        self.tables: list[str] = []
        self.predictors: dict[str, Llapor] = {}

    def record(self) -> None:
        """Traces of all splits and the model's own text."""
        args = self.args
        with prescope.load(args.model, slots=1.0, device=args.device, events=False) as engine:
            self.traces = {
                split: record_trace(
                    engine,
                    excerpts(engine, Path(args.corpus) / split, count, args.tokens),
                    max_tokens=args.tokens,
                    batch_tokens=args.batch_tokens,
                )
                for split, count in (
                    ("train", args.prompts),
                    ("valid", args.test_prompts),
                    ("ood", args.test_prompts),
                )
            }
            self.routers = routers_of(engine, self.traces["train"])
            reading_s = time.perf_counter() - self.started
            self.own = own_text(engine, args.own_tokens) if args.own_tokens else None
        if args.turn:
            turns = rotations(self.routers, args.turn)
            self.routers = replace(
                self.routers, weight_LED=torch.einsum("lkd,led->lke", self.routers.weight_LED, turns)
            )
            self.traces = {name: turned(trace, turns) for name, trace in self.traces.items()}
            self.own = None if self.own is None else turned(self.own, turns)
        self.groups = find_groups(self.traces["train"])
        self.report["recorded"] = {
            "tokens": {name: len(trace) for name, trace in self.traces.items()},
            "own_tokens": 0 if self.own is None else len(self.own),
            "reading_s": reading_s,
            "own_text_s": time.perf_counter() - self.started - reading_s,
            "router_agreement": router_agreement(self.routers, self.traces["train"]),
            "groups": self.groups.reason,
        }
        print(f"# {self.report['recorded']}", flush=True)

    def trained(self, name: str, trace: RoutingTrace, own: RoutingTrace | None, **changes: Any) -> Llapor:
        """Train one, and note what it took."""
        args, started = self.args, time.perf_counter()
        form = LlaporConfig.paper if changes.pop("paper", False) else LlaporConfig
        settings = {"hidden": args.hidden} if args.hidden else {}
        training = TrainConfig(
            epochs=args.epochs, seed=args.seed, batch_tokens=args.train_batch, patience=args.epochs
        )
        result = train(
            trace,
            own_text=own,
            config=form(**settings, **changes),
            training=training,
            routers=self.routers,
            device=args.train_device,
        )
        predictor = result.predictor
        self.predictors[name] = predictor
        self.report.setdefault("trained", []).append({
            "name": name, "tokens": len(trace), "seconds": time.perf_counter() - started,
            "held_out_recall": [p.validation_recall for p in result.history], "groups": result.groups.reason,
            "cost": predictor.cost()._asdict(), "nbytes": predictor.nbytes,
            "trust": predictor.tensors["trust"].flatten().tolist() if predictor.config.residual else None,
        })  # fmt: skip
        print(f"# {name}: {predictor!r} in {self.report['trained'][-1]['seconds']:.0f} s", flush=True)
        return predictor

    def scored(self, title: str, everyone: list[Any], trace: RoutingTrace, domain: str | None = None) -> None:
        """Cards of several predictors on one trace, the early router among them, as a table."""
        cards = {
            p.name: score(
                p, trace, lookaheads=[a for a in LOOKAHEADS if a <= p.lookahead], groups=self.groups
            )
            for p in everyone
        }
        cells = [cell(card, cards["early router"], domain) for card in cards.values()]
        self.report.setdefault("scores", []).append({"title": title, "cells": cells})
        self.report.setdefault("by_layer", {})[title] = {
            name: card.to_frame().groupby(["lookahead", "moe_layer"]).recall.mean().unstack(0).to_dict()
            for name, card in cards.items() if name in ("llapor", "early router")
        }  # fmt: skip
        self.tables.append(table_of(title, cells))
        print(self.tables[-1], flush=True)

    # -- parts -------------------------------------------------------------------------------------------------

    def all(self) -> None:
        """Trained on all domains."""
        trace = self.traces["train"]
        full = self.trained("llapor", trace, self.own)
        paper = self.trained("llapor plain", trace, self.own, paper=True)
        early, *others = baselines(trace, self.routers, full)
        self.artefact = train_artefact(trace, split_by_prompt(trace, 0.15, self.args.seed))
        always, never = (full.trusting(distance) for distance in (ALWAYS_TRUST, NEVER_TRUST))
        always.name, never.name = "llapor, always in full", "llapor, never"
        forms = [full, paper, always, never, self.artefact, early]
        self.scored(
            "all domains -> held-out text of the same domains", [*forms, *others], self.traces["valid"]
        )
        for domain in domains_of(self.traces["ood"]):
            self.scored(f"all domains -> {domain}", forms, of_domain(self.traces["ood"], domain))
        texts = {"held out": self.traces["valid"]}
        texts |= {domain: of_domain(self.traces["ood"], domain) for domain in domains_of(self.traces["ood"])}
        rows = [{"text": text, **shares(full, trace)} for text, trace in texts.items()]
        self.report["shares"] = rows
        self.tables.append(markdown("Share of the correction that counts, mean over tokens, by layer", rows))
        print(self.tables[-1], flush=True)

    def slots(self) -> None:
        """In the cache and the schedule, on text of kinds that were not trained on."""
        full, trace = self.predictors["llapor"], self.traces["ood"]
        early, *others = baselines(self.traces["train"], self.routers, full)
        everyone = [early, full, self.artefact, *others]
        rows = []
        for link, form, costs, nbytes in machines("h200", QWEN_EXPERT, trace.shape, 1):
            by_name = {p.name: schedule_cards(p, trace, costs, row_bytes=nbytes) for p in everyone}
            for cards in by_name.values():
                for card, base in zip(cards, by_name[early.name], strict=True):
                    gain = card.gain(base)
                    row = {"link": link, "format": form, **card.row()}
                    row["gain"] = f"{100 * gain.value:+.2f} % [{100 * gain.low:+.2f}, {100 * gain.high:+.2f}]"
                    rows.append({k: v for k, v in row.items() if k not in ("schedule", "cache", "source")})
        self.report["slots"] = rows
        self.tables.append(
            markdown("In the cache and by PreSched, gain in tokens/s over the early router", rows)
        )
        print(self.tables[-1], flush=True)

    def shifts(self) -> None:
        """Trained on one domain alone, with and without own text."""
        for only in self.args.only:
            known = of_domain(self.traces["train"], only)
            early = baselines(known, self.routers, self.predictors["llapor"])[0]
            with_own = self.trained(f"llapor, {only} only", known, self.own)
            for domain in domains_of(self.traces["valid"]):
                self.scored(f"{only} -> {domain}", [with_own, early], of_domain(self.traces["valid"], domain))

    def ablation(self) -> None:
        """One thing less each, on the domain of the first shift: in domain and on all others."""
        only = self.args.only[0]
        known = of_domain(self.traces["train"], only)
        early = baselines(known, self.routers, self.predictors["llapor"])[0]
        others = of_domain(self.traces["valid"], *(d for d in domains_of(self.traces["valid"]) if d != only))
        forms: dict[str, dict[str, Any]] = {
            "no trust": {"trust": 0.0}, "no own text": {"own": None}, "neither": {"trust": 0.0, "own": None},
            "no distillation": {"distill": 0.0}, "no choice": {"use_choice": False}, "hidden 256": {"hidden": 256},
        }  # fmt: skip
        for name, changes in forms.items():
            own = changes.pop("own", self.own)
            one = self.trained(name, known, own, **changes)
            for label, trace in ((only, of_domain(self.traces["valid"], only)), ("all others", others)):
                self.scored(f"{only} -> {label}, {name}", [one, early], trace)

    def online(self) -> None:
        """The text changes from what was trained on to what was not."""
        predictor = self.predictors.get(f"llapor, {self.args.only[0]} only", self.predictors["llapor"])
        before = of_domain(self.traces["valid"], self.args.only[0])
        for domain in domains_of(self.traces["ood"]):
            for margin in (0.1, 0.02):
                after = of_domain(self.traces["ood"], domain)
                shift = domain_shift(predictor, before, after, online=OnlineConfig(margin=margin))
                found = {k: v for k, v in shift._asdict().items() if k not in ("fixed", "tuned")}
                found |= {
                    "after": domain, "margin": margin, "cycle_ms": shift.tuning_ms / max(shift.cycles, 1),
                }  # fmt: skip
                self.report.setdefault("online", []).append(found)
        self.tables.append(markdown("Change of text in mid-stream, lookahead 1", self.report["online"]))
        print(self.tables[-1], flush=True)

    def failures(self) -> None:
        """Predictions that are wrong on purpose."""
        good, trace = self.predictors["llapor"], self.traces["valid"]
        hostile = adversarial_trace(trace, good)
        rows = [
            {"case": name, "recall@1": score(one, on, lookaheads=(1,)).recall(1)}
            for name, one, on in (
                ("as trained", good, trace), ("inverted", Inverted(good), trace),
                ("random", random_predictor(good.shape, 1), trace), ("adversarial routing", good, hostile),
            )
        ]  # fmt: skip
        self.report["failures"] = rows
        self.tables.append(markdown("Failures on purpose", rows))
        print(self.tables[-1], flush=True)

    def worth(self) -> None:
        """Would a predictor pay on the machine that the arguments describe?"""
        args, good = self.args, self.predictors["llapor"]
        everyone = [good, *baselines(self.traces["train"], self.routers, good), Inverted(good)]
        costs = LayerCosts(
            link_us=args.link_us, gpu_us=args.gpu_us, rest_us=args.rest_us, source=args.cost_source
        )
        rows = []
        for ahead in LOOKAHEADS:
            for one in everyone:
                spent = args.predict_us if one.needs_inputs else 0.0
                found = savings(one, self.traces["valid"], costs.with_predictor(spent), lookahead=ahead)
                rows.append(found._asdict() | {"saved_ms": found.saved_ms})
        self.report["worth"] = rows
        self.tables.append(markdown(f"Worth by the cost model, ms per token at batch 1: {costs}", rows))
        print(self.tables[-1], flush=True)

    def cost(self) -> None:
        """One prediction at the shape of Qwen3-30B-A3B, weights random: time does not depend on them."""
        rows = [
            prediction_cost(num_layers, tokens, self.args.train_device, config)
            for config in (LlaporConfig(), LlaporConfig(hidden=256))
            for num_layers in (16, 48)
            for tokens in (1, 16)
        ]
        self.report["cost"] = rows
        self.tables.append(markdown("One prediction, Qwen3-30B-A3B's shape, 4 layers ahead, per layer", rows))
        print(self.tables[-1], flush=True)

    def training(self) -> None:
        """`prescope.train_predictor` with its defaults, on as many prompts as come with prescope."""
        args = self.args
        bench = open_model(args.shape, torch.device(args.train_device), torch.bfloat16)
        generator = torch.Generator().manual_seed(args.seed)
        size = (sum(map(len, own_prompts().values())), args.tokens)
        prompts = torch.randint(bench.model.config.vocab_size, size, generator=generator).tolist()
        with prescope.attach(bench.model, slots=1.0) as engine:
            trained = prescope.train_predictor(engine, prompts)
        row = {
            "shape": args.shape, "layers": trained.predictor.shape.num_layers, "prompts": size[0],
            "tokens": args.tokens, "own_tokens": trained.predictor.tag.notes["own_tokens"],
            "epochs": len(trained.history), "seconds": trained.seconds,
        }  # fmt: skip
        self.report["training"] = [row]
        self.tables.append(markdown("Training a predictor for a model with random weights, all of it", [row]))
        print(self.tables[-1], flush=True)


def prediction_cost(num_layers: int, tokens: int, device: str, config: LlaporConfig) -> dict[str, Any]:
    """Microseconds per layer and call: eager with the device waited for, and in a graph of all layers."""
    E, K, D = QWEN3
    shape = MoEShape(num_layers, E, K)
    groups = LayerGroups.at(num_layers // 4, 3 * num_layers // 4, num_layers, "for the measurement")
    generator = torch.Generator().manual_seed(0)
    routers = Routers.of_weights(torch.randn(num_layers, E, D, generator=generator) * D**-0.5)
    P = config.width_middle
    pca = (
        torch.zeros(num_layers, 1, D), torch.randn(num_layers, D, P, generator=generator) * D**-0.5,
        torch.full((num_layers, 1, P), 1.0 / P),
    )  # fmt: skip
    tag = ModelTag(model="random weights", fingerprint="none")
    predictor = Llapor.fresh(config, shape, groups, pca, tag, routers, seed=0).to(device)
    row: dict[str, Any] = {
        "layers": num_layers, "tokens": tokens, "hidden": config.hidden,
        "eager_us": measure_us(predictor, D, tokens=tokens, device=device),
        "graph_us": graph_us_or_reason(predictor, tokens, D),
        "few_launches_us": graph_us_or_reason(predictor, tokens, D, few=True),
        "MiB_per_layer": predictor.cost().nbytes / 2**20, "GiB_all": predictor.nbytes / 2**30,
    }  # fmt: skip
    return row


def graph_us_or_reason(predictor: Llapor, tokens: int, width: int, few: bool = False) -> float | str:
    """`graph_us`; a graph that cannot be captured must not cost the eager figure beside it."""
    if predictor.device.type != "cuda":
        return "no CUDA"
    try:
        return graph_us(predictor, tokens, width, few)
    except Exception as error:  # noqa: BLE001 - printed in the table
        return f"failed: {error}"[:120]


def graph_us(predictor: Llapor, tokens: int, width: int, few: bool, repeats: int = 50) -> float:
    """Device time of predictions for all layers, one after the other, in one CUDA graph; per layer.

    By `predict`, or by the kernels that an engine uses for a few tokens.
    """
    fast_path = predictor.fast_path(predictor.lookahead) if few else None
    if few and (fast_path is None or tokens > fast_path.most_tokens):
        raise ValueError("not for so many tokens, or without Triton")
    x = torch.randn(tokens, width, device=predictor.device)
    ids = torch.arange(predictor.shape.top_k, device=predictor.device).expand(tokens, -1).contiguous()
    weights = torch.full(ids.shape, 1.0 / predictor.shape.top_k, device=predictor.device)

    def step() -> list[torch.Tensor]:
        layers = range(predictor.shape.num_layers - 1)
        if fast_path is not None:
            return [fast_path(layer, x, ids, weights) for layer in layers]
        made = [predictor.predict(layer, x, ids, weights) for layer in layers]
        return [one.scores_TE for predictions in made for one in predictions]

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = step()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph.replay()
    begin.record()
    for _ in range(repeats):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    assert all(bool(torch.isfinite(scores).all()) for scores in kept)
    return 1e3 * begin.elapsed_time(end) / repeats / (predictor.shape.num_layers - 1)


def cell(card: ScoreCard, early: ScoreCard, domain: str | None) -> dict[str, Any]:
    """All metrics of a predictor on one domain (None: all)."""
    out: dict[str, Any] = {"predictor": card.predictor}
    for ahead in card.lookaheads:
        out[f"@{ahead}"] = {
            "recall": card.recall_interval(ahead, domain=domain)._asdict(),
            "recall_double": card.recall(ahead, double=True, domain=domain),
            "gain": difference(card, early, ahead, domain=domain)._asdict(),
            "exact": card.exact_frac(ahead, domain=domain),
            "hot": card.hot(ahead, domain=domain),
            "count_error_frac": card.count_error_frac(ahead, domain=domain),
            "ece": card.ece(ahead, domain=domain),
        }
    return out


def table_of(title: str, cells: list[dict[str, Any]]) -> str:
    """Recall@K at each lookahead, the gain over the early router, exact sets, 2K, hot 4 in 6, count error, ECE."""
    rows = []
    for one in cells:
        row: dict[str, Any] = {"predictor": one["predictor"]}
        for ahead in LOOKAHEADS:
            row |= columns_of(one.get(f"@{ahead}"), ahead)
        rows.append(row)
    return markdown(title, rows)


def columns_of(metrics: dict[str, Any] | None, ahead: int) -> dict[str, Any]:
    """Of one lookahead; dashes where a predictor does not look so far."""
    names = ("recall", "gain", "exact", "2K", "hot", "count err", "ECE")
    if metrics is None:
        return {f"{name} @{ahead}": "-" for name in names}
    gain = metrics["gain"]
    values = (
        metrics["recall"]["value"], f"{gain['value']:+.3f} [{gain['low']:+.3f}, {gain['high']:+.3f}]",
        metrics["exact"], metrics["recall_double"], metrics["hot"], metrics["count_error_frac"], metrics["ece"],
    )  # fmt: skip
    return {f"{name} @{ahead}": value for name, value in zip(names, values, strict=True)}


def markdown(title: str, rows: list[dict[str, Any]]) -> str:
    """A table; floats with three digits."""
    names = list(rows[0])
    lines = [f"\n### {title}\n", "| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    for row in rows:
        values = [f"{v:.3f}" if isinstance(v, float) else str(v) for v in (row[name] for name in names)]
        lines.append("| " + " | ".join(values) + " |")
    return "\n".join(lines)


def shares(predictor: Llapor, trace: RoutingTrace) -> dict[str, float]:
    """Mean share of the correction that counts, for each layer that predicts, of at most 2048 rows."""
    x_LTD, scenario = predictor.batch_of(
        trace, np.linspace(0, len(trace) - 1, min(len(trace), 2048)).astype(int)
    )
    with torch.no_grad():
        _, share_LT1 = predictor.hidden(x_LTD, scenario)
    assert share_LT1 is not None, "nothing fades"
    return {f"layer {layer}": float(share.mean()) for layer, share in enumerate(share_LT1[:-1])}


def rotations(routers: Routers, radians: float) -> torch.Tensor:
    """(L, D, D) each layer's is the former's and one more, random, of at most so many radians in any plane."""
    L, _, D = routers.weight_LED.shape
    generator = torch.Generator().manual_seed(0)
    turns = [torch.eye(D)]
    for _ in range(1, L):
        half = torch.randn(D, D, generator=generator)
        skew = half - half.T
        turns.append(torch.matrix_exp(radians * skew / torch.linalg.matrix_norm(skew, 2)) @ turns[-1])
    return torch.stack(turns)


def turned(trace: RoutingTrace, turns_LDD: torch.Tensor) -> RoutingTrace:
    """The same choices from rotated states."""
    assert trace.inputs is not None, "recorded with inputs"
    x_RLD = torch.from_numpy(trace.inputs).float()
    return replace(trace, inputs=torch.einsum("rld,led->rle", x_RLD, turns_LDD).numpy().astype(np.float16))


def of_domain(trace: RoutingTrace, *domains: str) -> RoutingTrace:
    """The rows of some domains' prompts."""
    sequences = [i for i, prompt in enumerate(trace.prompts) if prompt["domain"] in domains]
    return rows_of(trace, np.flatnonzero(np.isin(trace.sequence, sequences)))


def domains_of(trace: RoutingTrace) -> list[str]:
    """Domains of a trace, sorted."""
    return sorted({str(prompt["domain"]) for prompt in trace.prompts})


def excerpts(engine: Engine, folder: Path, count: int, tokens: int) -> dict[str, list[list[int]]]:
    """`count` excerpts of each file of a folder, at evenly spaced places, `tokens` long each."""
    assert engine.tokenizer is not None, "text needs a tokenizer"
    found: dict[str, list[list[int]]] = {}
    for path in sorted(folder.glob("*.txt")):
        text = path.read_text(encoding="utf-8", errors="replace")
        starts = np.linspace(0, max(0, len(text) - 8 * tokens), count).astype(int)
        # The first token may be a piece of a word.
        found[path.stem] = [
            engine.tokenizer(text[i : i + 8 * tokens])["input_ids"][1 : tokens + 1] for i in starts
        ]
    if not found:
        raise SystemExit(
            f"{folder} holds no <domain>.txt; --corpus needs train/, valid/ and ood/ with one a domain"
        )
    return found


def gpu_facts() -> dict[str, Any]:
    """The GPU's name, if there is one."""
    return {"gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None}


def main() -> None:
    """Run the parts in order while time is left; print all tables again at the end."""
    args = arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    study = Study(args)
    parts: list[Callable[[], None]] = [getattr(study, name) for name in args.parts]
    if not set(args.parts) <= {"cost", "training"}:
        if not args.corpus:
            raise SystemExit(
                "these parts need --corpus, a folder with text; --parts cost training do without"
            )
        parts.insert(0, study.record)
    for part in parts:
        name, began = part.__name__, time.perf_counter()
        if began - study.started > args.seconds and name != "cost":
            study.report.setdefault("left_out", []).append(name)
            continue
        try:
            part()
        except Exception:  # noqa: BLE001 - nothing is lost: the traceback is printed and kept, other parts go on
            study.report.setdefault("failed", {})[name] = traceback.format_exc()
            traceback.print_exc()
        study.report.setdefault("part_s", {})[name] = time.perf_counter() - began
        if args.out:
            Path(args.out).write_text(json.dumps(study.report, indent=1, default=str) + "\n")
    head = (
        f"# {study.report['machine']}\n# {study.report.get('recorded')}\n# seconds {study.report['part_s']}"
    )
    text = "\n".join([head, *study.tables, f"\nfailed: {list(study.report.get('failed', {})) or 'nothing'}, "
                      f"left out: {study.report.get('left_out', 'nothing')}"])  # fmt: skip
    if args.out:
        Path(args.out).with_suffix(".md").write_text(text + "\n")
    print("\n" + "=" * 100 + "\n" + text)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    on_gpu = torch.cuda.is_available()
    add("--model", default="data/tiny-moe")
    add(
        "--corpus",
        default="",
        help="folder with train/, valid/ and ood/, one <domain>.txt a domain in each; `cost` and `training` need none",
    )
    add("--out", default="", help="JSON; a .md is written beside it")
    add("--shape", default="qwen3-30b-a3b-cut16", help="of the part `training`")
    add(
        "--parts",
        nargs="*",
        default=["all", "slots", "shifts", "online", "failures", "worth", "cost", "ablation"],
    )
    add(
        "--only",
        nargs="*",
        default=["dialogue", "prose"],
        help="train on each of these domains alone as well",
    )
    add("--seconds", type=float, default=170.0, help="no part but the cost begins after so many")
    add("--prompts", type=int, default=48, help="of each training domain")
    add("--test-prompts", type=int, default=16)
    add("--tokens", type=int, default=128, help="of each prompt")
    add("--own-tokens", type=int, default=16384, help="of text the model writes itself")
    add("--epochs", type=int, default=6)
    add("--hidden", type=int, default=0, help="width of the networks; 0 the default")
    add(
        "--train-batch", type=int, default=None, help="tokens of a step; as `TrainConfig` has it unless given"
    )
    add("--batch-tokens", type=int, default=8192 if on_gpu else 1024, help="of a pass when recording")
    add("--turn", type=float, default=0.0, help="radians by which each layer is rotated against the former")
    add("--seed", type=int, default=0)
    add("--threads", type=int, default=0)
    add("--device", default="auto")
    add("--train-device", default="cuda" if on_gpu else "cpu")
    add("--link-us", type=float, default=172.0)
    add("--gpu-us", type=float, default=5.0)
    add("--rest-us", type=float, default=200.0)
    add("--predict-us", type=float, default=60.0)
    add("--cost-source", default="Qwen3-30B-A3B's expert of 9.4 MB over 55 GB/s; the rest assumed")
    return parser.parse_args()


if __name__ == "__main__":
    main()
