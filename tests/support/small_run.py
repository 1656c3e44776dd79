"""A small run made by arithmetic: consistent tables for tests of metrics, figures and reports, with no model.

One link, one compute lane, LRU slots, a prefetcher that guesses one expert of the next layer; seeded.
"""

import numpy as np

from prescope.traces.events import Event, LayerRow, StepRow, event_frame, layer_frame, step_frame
from prescope.traces.metrics import compute_metrics
from prescope.traces.result import RunResult
from prescope.traces.routing import RoutingTrace

NUM_LAYERS, NUM_EXPERTS, TOP_K = 4, 8, 2
ROW_BYTES = 1_500_000
DENSE_US, EXPERTS_US, HOST_US, TAIL_US = 25.0, 12.0, 6.0, 30.0
LABEL = "synthetic: LRU slots, 25 GB/s link"

# A prefill of 1000 us, decode steps of 500 and 300 us; two layers; copies at 0-600, 1100-1300, 1200-1400 us.
TEN_EVENTS = [
    Event("gpu", "dense", 0, "prefill", 0, -1, "", 0, 0.0, 100.0),
    Event("host", "host_wait", 0, "prefill", 0, -1, "", 0, 100.0, 20.0),
    Event("h2d", "transfer", 0, "prefill", 0, 3, "on_demand", 6_000_000, 0.0, 600.0),
    Event("stall", "stall", 0, "prefill", 0, -1, "", 0, 120.0, 480.0),
    Event("gpu", "experts", 0, "prefill", 0, -1, "", 0, 600.0, 400.0),
    Event("gpu", "dense", 1, "decode", 0, -1, "", 0, 1000.0, 250.0),
    Event("h2d", "transfer", 1, "decode", 1, 5, "prefetch", 1_000_000, 1100.0, 200.0),
    Event("h2d", "transfer", 1, "decode", 1, 6, "on_demand", 2_000_000, 1200.0, 200.0),
    Event("stall", "stall", 1, "decode", 1, -1, "", 0, 1250.0, 150.0),
    Event("gpu", "experts", 2, "decode", 0, -1, "", 0, 1500.0, 300.0),
]
LAYERS = [
    LayerRow(0, "prefill", 0, 8, 5, 2, 0, 3, 1),
    LayerRow(1, "decode", 0, 2, 4, 3, 1, 0, 1, 0, 1),
    LayerRow(1, "decode", 1, 2, 4, 2, 0, 2, 1),
    LayerRow(2, "decode", 0, 2, 2, 2, 0, 0, 1, 0, 1),
]
STEPS = [
    StepRow(0, "prefill", 8, 0.0, 1000.0),
    StepRow(1, "decode", 2, 1000.0, 500.0),
    StepRow(2, "decode", 2, 1500.0, 300.0),
]


def ten_events_run() -> RunResult:
    """The ten events as a run of two sequences with three tokens each."""
    events, layers, steps = event_frame(TEN_EVENTS), layer_frame(LAYERS), step_frame(STEPS)
    return RunResult(
        text=["", ""],
        tokens=[[1, 2, 3], [1, 2, 3]],
        metrics=compute_metrics(events, layers, steps, 2, 6),
        events=events,
        layers=layers,
        steps=steps,
        trace=None,
        config={"num_slots": 4, "slots_frac": 0.25, "slots_gib": 0.5, "cache": "lru"},
        hardware={"label": LABEL, "link": "virtual"},
    )


def small_run(
    *,
    steps: int = 6,
    batch: int = 2,
    prompt: int = 5,
    slots: int = 12,
    link_gb_per_s: float = 25.0,
    seed: int = 0,
) -> RunResult:
    """A run of one prefill and `steps - 1` decode steps."""
    trace = small_trace(steps=steps, batch=batch, prompt=prompt, seed=seed)
    run = _Replay(trace, slots, ROW_BYTES / link_gb_per_s / 1e3, seed)
    events, layers, steps_table = event_frame(run.events), layer_frame(run.layers), step_frame(run.steps)
    return RunResult(
        text=["…"] * batch,
        tokens=[[1] * steps for _ in range(batch)],
        metrics=compute_metrics(events, layers, steps_table, batch, batch * steps),
        events=events,
        layers=layers,
        steps=steps_table,
        trace=trace,
        config={
            "num_slots": slots,
            "slots_frac": slots / (NUM_LAYERS * NUM_EXPERTS),
            "slots_gib": slots * ROW_BYTES / 2**30,
            "cache": "lru",
        },
        hardware={"label": LABEL, "link": "emulated", "link_gb_per_s": link_gb_per_s},
    )


def small_trace(
    *, steps: int = 6, batch: int = 2, prompt: int = 5, width: int = 0, seed: int = 0
) -> RoutingTrace:
    """Skewed random routing; `width` > 0 adds router inputs."""
    rng = np.random.default_rng(seed)
    tokens = [batch * prompt] + [batch] * (steps - 1)
    rows = sum(tokens)
    skew = 1 / np.arange(1, NUM_EXPERTS + 1)
    scores = np.log(skew) + rng.gumbel(size=(rows, NUM_LAYERS, NUM_EXPERTS))
    ids = np.argsort(-scores, axis=2)[:, :, :TOP_K].astype(np.int16)
    weights = rng.dirichlet(np.ones(TOP_K), size=(rows, NUM_LAYERS)).astype(np.float32)
    step = np.repeat(np.arange(steps), tokens)
    first, later = np.indices((batch, prompt)), np.indices((steps - 1, batch))
    return RoutingTrace(
        expert_ids=ids,
        weights=weights,
        inputs=rng.normal(size=(rows, NUM_LAYERS, width)).astype(np.float32) if width else None,
        step=step,
        sequence=np.concatenate((first[0].ravel(), later[1].ravel())),
        position=np.concatenate((first[1].ravel(), prompt + later[0].ravel())),
        phase=(step > 0).astype(np.int8),
        model="synthetic",
        fingerprint="0" * 16,
        num_experts=NUM_EXPERTS,
        top_k=TOP_K,
        decoder_layers=list(range(1, NUM_LAYERS + 1)),
        prompts=[{"domain": "none"}] * batch,
    )


class _Replay:
    """The virtual clocks of one run: compute lane `now`, link `link_free`."""

    def __init__(self, trace: RoutingTrace, slots: int, copy_us: float, seed: int) -> None:
        self.events: list[Event] = []
        self.layers: list[LayerRow] = []
        self.steps: list[StepRow] = []
        self.now = self.link_free = 0.0
        self.ready: dict[tuple[int, int], float] = {}  # resident or in flight -> ready at; in LRU order
        self.slots, self.copy_us, self.rng = slots, copy_us, np.random.default_rng(seed)
        for step in trace.steps:
            self.run_step(step, trace)

    def run_step(self, step: int, trace: RoutingTrace) -> None:
        phase, start = ("decode" if step else "prefill"), self.now
        tokens = int((trace.step == step).sum())
        for layer, experts, _ in trace.needed(step):
            where = (step, phase, layer)
            self.compute("gpu", "dense", where, DENSE_US)
            self.compute("host", "host_wait", where, HOST_US)
            self.serve([(layer, int(e)) for e in experts], where, tokens)
            self.compute("gpu", "experts", where, EXPERTS_US * len(experts))
        self.compute("gpu", "dense", (step, phase, -1), TAIL_US)
        self.steps.append(StepRow(step, phase, tokens, start, self.now - start))

    def serve(self, keys: list[tuple[int, int]], where: tuple[int, str, int], tokens: int) -> None:
        step, phase, layer = where
        hits = sum(self.ready.get(key, np.inf) <= self.now for key in keys)
        late = sum(self.now < self.ready.get(key, -1.0) for key in keys)
        self.layers.append(
            LayerRow(step, phase, layer, tokens, len(keys), hits, late, len(keys) - hits - late, 1)
        )
        for key in keys:
            ready = self.ready.pop(key, None)
            self.ready[key] = self.copy(key, "on_demand", where) if ready is None else ready
        guess = ((layer + 1) % NUM_LAYERS, int(self.rng.integers(NUM_EXPERTS)))
        self.evict(keep=set(keys))
        if guess not in self.ready and guess[0] > 0:
            self.ready[guess] = self.copy(guess, "prefetch", where)
        wait = max(self.ready[key] for key in keys) - self.now
        if wait > 0:
            self.compute("stall", "stall", where, wait)

    def evict(self, keep: set[tuple[int, int]]) -> None:
        for key in [key for key in self.ready if key not in keep][: max(0, len(self.ready) - self.slots)]:
            del self.ready[key]

    def copy(self, key: tuple[int, int], reason: str, where: tuple[int, str, int]) -> float:
        start = max(self.now, self.link_free)
        self.link_free = start + self.copy_us
        self.events.append(Event("h2d", "transfer", *where[:2], *key, reason, ROW_BYTES, start, self.copy_us))
        return self.link_free

    def compute(self, lane: str, kind: str, where: tuple[int, str, int], us: float) -> None:
        self.events.append(Event(lane, kind, *where, -1, "", 0, self.now, us))
        self.now += us
