"""The schedules by name: PreSched and the systems it is compared with, as we re-implement them.

None of the published systems' code is used, and their authors' constants are replaced by costs measured on the
machine at hand; `same` and `unknown` say of each how far that makes it the published system.
"""

from dataclasses import dataclass

from ..errors import UnsupportedOption
from .plan import (
    ARTEFACT,
    FATE,
    FIDDLER,
    HYBRIMOE,
    KLOTSKI,
    MOE_INFINITY,
    ON_DEMAND,
    PRESCHED,
    STATIC_SPLIT,
    STREAMING,
)

#: Predictors a schedule names; "none" for those that look at no prediction.
PREDICTORS = ("none", "early router", "frequency", "transition", "llapor")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """One way to decide about a layer's experts.

    Attributes:
        name: as a user writes it. `title`: as a figure writes it. `number`: in compiled code (`plan.make_plan`).
        cache: cache policy it comes with. `predictor`: of `PREDICTORS`, the one it comes with.
        uses_cpu: it may compute experts on the CPU lane.
        lookahead: layers ahead it prefetches for. `width`: experts for one layer at most, None: all.
            `threshold`: least probability of use of an expert worth prefetching.
        lag: it decides a layer by predictions that were made this many layers before. With 1 no layer waits for its
            predictor; the layer's own predictions then only choose the prefetches.
        places: the most frequent experts are in slots before a run and put back behind each prompt, if frequencies are
            given. One that `lives_on_frequencies` is told the trace's own by the simulator where none are.
        heeds_prompt: which these are is told by each prompt too (`cache.frequencies.behind_prompt`).
        same: what is as published. `unknown`: what is not known, or ours. `source`: where it is published.
    """

    name: str
    title: str
    number: int
    cache: str
    predictor: str
    uses_cpu: bool
    lookahead: int = 0
    width: int | None = None
    threshold: float = 0.0
    lag: int = 0
    places: bool = False
    heeds_prompt: bool = False
    same: str
    unknown: str
    source: str

    @property
    def needs_predictor(self) -> bool:
        """Without predictions it would be loading on demand."""
        return self.number in (FATE, MOE_INFINITY)

    def lives_on_frequencies(self, cache: str | None) -> bool:
        """Under this cache (None: its own) it goes by which experts are hot for the whole of a run."""
        return "static" in (self.cache, cache)

    @property
    def streams(self) -> bool:
        """It copies whole layers, whatever is predicted."""
        return self.number in (STREAMING, KLOTSKI)


_ALL = (
    Schedule(
        name="on-demand",
        title="On demand",
        number=ON_DEMAND,
        cache="lru",
        predictor="none",
        uses_cpu=False,
        same="experts are copied once the router has named them; LRU over the experts in GPU memory",
        unknown="mixtral-offloading also quantises experts and guesses the next layer's; neither is done here. Its "
        "LRU is one for each layer, ours one for the model",
        source="mixtral-offloading, arXiv 2312.17238",
    ),
    Schedule(
        name="streaming",
        title="Static hot set + streaming",
        number=STREAMING,
        cache="static",
        predictor="none",
        uses_cpu=False,
        lookahead=1,
        same="no published system: the simplest that a scheduler has to beat",
        unknown="ours: a fixed set of the most frequent experts stays; all other experts of the next layer are copied "
        "while this one computes, those that this one misses first",
        source="ours",
    ),
    Schedule(
        name="klotski",
        title="Klotski-like",
        number=KLOTSKI,
        cache="lru",
        predictor="frequency",
        uses_cpu=False,
        lookahead=1,
        same="no prediction of single tokens; whole layers streamed behind compute, hot experts first",
        unknown="its pass over several batches: here they are one larger batch, for which each expert is copied once "
        "as in its pass; what is missing is their order, attention of one batch after the other and experts computed "
        "as they arrive, and so the memory it saves. What it would do with more batches is told by the trace regrouped "
        "(simulator.as_decode). Which experts it calls hot is ours: the most frequent of a recorded trace",
        source="Klotski, arXiv 2502.06888",
    ),
    Schedule(
        name="fate",
        title="Fate-like",
        number=FATE,
        cache="shallow-arc",
        predictor="early router",
        uses_cpu=False,
        lookahead=1,
        threshold=0.5,
        same="the next layer's router on this layer's input says what to prefetch; the cache favours shallow layers "
        "and evicts by ARC",
        unknown="how it shares the slots out among the layers: ours evicts from the deepest layer first, there by ARC, "
        "whose lists are one pair for the model. Its quantised copies: ours copies experts whole",
        source="Fate, arXiv 2502.12224",
    ),
    Schedule(
        name="fiddler",
        title="Fiddler-like",
        number=FIDDLER,
        cache="static",
        predictor="none",
        uses_cpu=True,
        places=True,
        same="each expert for itself: on the CPU if that is sooner done than moving it; popular experts are on the GPU "
        "from the start and stay; no prefetch",
        unknown="it copies beside the popular set; ours takes the slot of the least popular for what is copied, and "
        "the next copy takes that one again",
        source="Fiddler, arXiv 2402.07033",
    ),
    Schedule(
        name="hybrimoe",
        title="HybriMoE-like",
        number=HYBRIMOE,
        cache="score",
        predictor="early router",
        uses_cpu=True,
        lookahead=3,
        threshold=0.5,
        same="a greedy split of each layer between CPU and GPU by cost; prefetches for the next three layers by "
        "their impact: the greedy split of a coming layer is simulated with and without the expert, and the greatest "
        "gains go first; score-aware cache",
        unknown="when it stops: ours when a gain, by the probability of use, is less than what the copy costs this "
        "layer and the next one's copies. Its experts' scores: ours are decayed sums of router weights, its own "
        "count only the best of a token",
        source="HybriMoE, arXiv 2504.05897",
    ),
    Schedule(
        name="moe-infinity",
        title="MoE-Infinity-like",
        number=MOE_INFINITY,
        cache="lru",
        predictor="transition",
        uses_cpu=False,
        lookahead=1,
        threshold=0.1,
        same="which experts follow is told from earlier routing, not from the router's input; prefetch, else on demand",
        unknown="it compares the activations of whole requests; ours counts which expert follows which from one layer "
        "to the next. Its cache weighs activation ratio and depth, ours is LRU",
        source="MoE-Infinity, arXiv 2401.14361",
    ),
    Schedule(
        name="static-split",
        title="Static split",
        number=STATIC_SPLIT,
        cache="static",
        predictor="none",
        uses_cpu=True,
        places=True,
        same="no published system: the best fixed experts on the GPU, all others computed on the CPU, nothing "
        "copied, as users of llama.cpp's -ncmoe run",
        unknown="-ncmoe fixes whole layers; ours fixes the most frequent experts of all layers, which finds more of "
        "what is needed. A prompt copies what it misses, as under any schedule, and the set is put back behind it. "
        "Without a CPU lane what has no slot is copied",
        source="ours",
    ),
    Schedule(
        name="artefact",
        title="Artefact's rule",
        number=ARTEFACT,
        cache="static",
        predictor="early router",
        uses_cpu=True,
        lookahead=1,
        width=2,
        threshold=0.5,
        places=True,
        same="the rule of a public repository that is very probably PreScope's: misses by token count, descending, are "
        "copied while (1 + i) copies and the expert on the GPU end before the CPU would be done with it and all that "
        "follow; prefetches in decode for more than 16 sequences, two experts of the next layer at most, by the early "
        "router; on-demand copies come first",
        unknown="constants are this machine's costs, not the repository's. Its prefetches copy nothing (they sleep) "
        "and experts under way are replaced by others; ours copies, and no token changes. Hot experts are in slots "
        "from the start, as in the paper; who gives up a slot is not described, so the least frequent does. For "
        "Mixtral it prefetches above 8 sequences",
        source="github.com/nezha-Anonymous/LayerScope, read 2026-11; arXiv 2509.23638",
    ),
    Schedule(
        name="presched",
        title="PreSched",
        number=PRESCHED,
        cache="next-use",
        predictor="llapor",
        uses_cpu=True,
        lookahead=2,
        threshold=0.2,
        lag=1,
        places=True,
        heeds_prompt=True,
        same="this and the next layer are planned together: resident, prefetched, loaded on demand or computed on the "
        "CPU, so that both are done soonest, in O(n) after a sort; costs are profiled; hot experts are in slots from "
        "the start, where frequencies are known",
        unknown="no code is public. Ours: the formulas of the window, probabilities in them; a layer is answered by "
        "predictions of the one before, so that it waits for no predictor, and prefetches by its own, some us later; "
        "late copies waited for only if the CPU would take longer; a prompt's rare experts are computed on the "
        "CPU, and behind it hot is what it has used too; further layers when the link is idle, a margin for costs "
        "that are wrong, an eviction that knows the plan and a cache that knows the order of the layers, "
        "experts computed on the CPU copied for later when choices last, and trust in the predictor by what its "
        "likeliest experts were worth. Its defaults do not depend on the batch: no other was better by more than 1 %, "
        "simulated (docs/log/scheduler.md)",
        source="PreScope, arXiv 2509.23638",
    ),
)
#: By name, in the order of the figures.
SCHEDULES: dict[str, Schedule] = {schedule.name: schedule for schedule in _ALL}


def schedule_named(name: str) -> Schedule:
    """The schedule a user chose.

    Raises:
        UnsupportedOption: there is none of this name.
    """
    if name not in SCHEDULES:
        raise UnsupportedOption(f"schedule is {name!r}; choose one of {', '.join(map(repr, SCHEDULES))}")
    return SCHEDULES[name]
