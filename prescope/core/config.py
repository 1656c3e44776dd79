"""Settings of an engine: frozen, validated once, resolved from "auto" into a new object with reasons.

Knows nothing of torch; `resolve_slots` is pure arithmetic.
"""

from dataclasses import asdict, dataclass
from typing import Any

from ..errors import SlotPoolTooSmall, UnsupportedOption
from .units import format_bytes, parse_bytes

DEVICES = ("auto", "cuda", "cpu", "null")
CACHES = ("lru", "lfu", "static", "score", "shallow", "next-use")
SCHEDULES = (
    "on-demand", "streaming", "klotski", "fate", "fiddler", "hybrimoe", "moe-infinity", "presched",
)  # fmt: skip
KERNELS = ("auto", "torch", "triton")
#: Ways to decode in which the GPU decides.
DEVICE_DRIVERS = ("gpu-driven", "copy-engine")
DECODES = ("auto", "layered", "gpu-driven", "copy-engine", "host-driven")
#: Emulated link when the user names none: one expert takes a millisecond, so that, as on a real machine, moving an
#: expert takes longer than computing with it; at most PCIe 4 x16.
EMULATED_EXPERT_US = 1000.0
EMULATED_MOST_GB_PER_S = 26.0


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """What a person can set on an engine.

    Args:
        slots: places for experts on the device: an int is a count, a float in (0, 1] a share of all
            experts of the model, a text such as "8GiB" the memory they may take.
        device: "cuda"; "cpu" with an emulated link; "null" (virtual clock, for tests); "auto" takes CUDA
            when there is one and says so.
        cache: which expert gives up its slot: "lru", "lfu", "static" (least frequent by `frequencies`)
            "score" (decayed router weight), "shallow" (first layers stay) or "next-use" (what is expected last);
            "auto": as the schedule has it.
        link_gb_per_s: bandwidth of the emulated link, GB/s; only with device="cpu" or "null". By default one
            expert takes a millisecond.
        link_factor: how many times each expert is copied, to study a slower link on a faster one: 2 on PCIe 5 is like
            PCIe 4, 4 like PCIe 3. CUDA only; results say that the link is emulated.
        kernels: "torch" (reference), "triton" (CUDA), or "auto".
        decode: how decode steps run. "layered": layer by layer, launched from Python. From one CUDA graph, with
            misses read by the GPU ("gpu-driven"), copied on the GPU's orders ("copy-engine"), or served by the host,
            which every cache policy can ("host-driven"). "auto": from a graph where that is possible, by the faster
            of the first two as measured in the first steps, or by the host where the cache policy needs it.
        schedule: who decides what is copied, prefetched and computed on the CPU in decode steps
            (`prescope.scheduler.SCHEDULES`): "on-demand", "presched", or a system it is compared with.
        lookahead: layers ahead that are predicted; None: as the schedule has it.
        width: experts prefetched for one layer at most; None: as the schedule has it.
        threshold: least probability of use worth a prefetch, in [0, 1]; None: as the schedule has it.
        cpu_threads: threads that compute experts on the CPU, where the schedule does; None: all cores but two; 0: none.
        compiled: compile the layers around the experts before the graph is captured (torch.compile, half a minute
            once per model and batch size).
        events: record the timeline (costs at most 2 % of a token's time, see benchmarks/).
        record_routing: keep each step's expert ids and weights for `RunResult.trace`.
        record_inputs: keep the router inputs too (D values per token and layer), to train predictors.
    """

    slots: int | float | str = 0.5
    device: str = "auto"
    cache: str = "auto"
    link_gb_per_s: float | None = None
    link_factor: int = 1
    kernels: str = "auto"
    decode: str = "auto"
    schedule: str = "on-demand"
    lookahead: int | None = None
    width: int | None = None
    threshold: float | None = None
    cpu_threads: int | None = None
    compiled: bool = False
    events: bool = True
    record_routing: bool = True
    record_inputs: bool = False

    def __post_init__(self) -> None:
        _one_of("device", self.device, DEVICES)
        _one_of("cache", self.cache, ("auto", *CACHES))
        _one_of("kernels", self.kernels, KERNELS)
        _one_of("decode", self.decode, DECODES)
        _one_of("schedule", self.schedule, SCHEDULES)
        if self.schedule != "on-demand" and self.decode in DEVICE_DRIVERS:
            raise UnsupportedOption(
                f"decode={self.decode!r} leaves decisions to the GPU, which only on-demand loading can; "
                f"schedule={self.schedule!r} needs decode='auto', 'host-driven' or 'layered'"
            )
        if (
            isinstance(self.link_factor, bool)
            or not isinstance(self.link_factor, int)
            or self.link_factor < 1
        ):
            raise UnsupportedOption(f"link_factor is {self.link_factor!r}; it counts copies: 1, 2, 4, ...")
        if self.link_factor > 1 and self.decode == "gpu-driven":
            raise UnsupportedOption(
                "decode='gpu-driven' reads experts itself, once; link_factor needs decode='auto', 'copy-engine', "
                "'host-driven' or 'layered'"
            )
        if self.lookahead is not None and self.lookahead < 1:
            raise UnsupportedOption(
                f"lookahead is {self.lookahead}; predictions are for 1 layer ahead or more"
            )
        if self.width is not None and self.width < 0:
            raise UnsupportedOption(
                f"width is {self.width}; 0 prefetches nothing, more is a number of experts"
            )
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise UnsupportedOption(f"threshold is {self.threshold}; a probability lies in [0, 1]")
        if self.cpu_threads is not None and self.cpu_threads < 0:
            raise UnsupportedOption(f"cpu_threads is {self.cpu_threads}; 0 switches the CPU lane off")
        if isinstance(self.slots, bool) or not isinstance(self.slots, int | float | str):
            raise UnsupportedOption(f"slots is {self.slots!r}; give a count, a share such as 0.25, or '8GiB'")
        if isinstance(self.slots, str):
            try:
                parse_bytes(self.slots)
            except ValueError as error:
                raise UnsupportedOption(f"slots: {error}") from error
        if isinstance(self.slots, float) and not 0 < self.slots <= 1:
            raise UnsupportedOption(
                f"slots is {self.slots}; a float is a share of all experts and lies in (0, 1]; "
                f"for a count write an int"
            )
        if isinstance(self.slots, int) and self.slots < 1:
            raise UnsupportedOption(f"slots is {self.slots}; a count is at least 1")
        if self.link_gb_per_s is not None and not self.link_gb_per_s > 0:
            raise UnsupportedOption(f"link_gb_per_s is {self.link_gb_per_s}; a bandwidth is positive")
        if self.link_gb_per_s is not None and self.device == "cuda":
            raise UnsupportedOption(
                "link_gb_per_s sets the emulated link of device='cpu'; CUDA's link is real"
            )
        if self.record_inputs and not self.record_routing:
            raise UnsupportedOption(
                "record_inputs needs record_routing=True: inputs are stored with the routing"
            )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def emulated_link_gb_per_s(row_bytes: int) -> float:
    """Bandwidth of the emulated link for experts of `row_bytes`, when the user names none; two digits."""
    return float(f"{min(EMULATED_MOST_GB_PER_S, row_bytes / EMULATED_EXPERT_US / 1e3):.2g}")


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UnsupportedOption(f"{name} is {value!r}; choose one of {', '.join(map(repr, allowed))}")


def resolve_slots(
    slots: int | float | str, *, total_experts: int, row_bytes: int, top_k: int
) -> tuple[int, str]:
    """Number of slots a setting means for a model, and the reason as one sentence.

    A setting above the number of experts gives one slot to each: more could never be used.

    Raises:
        SlotPoolTooSmall: fewer than top_k.
    """
    if isinstance(slots, str):
        count = parse_bytes(slots) // row_bytes
        meaning = f"{slots} / {format_bytes(row_bytes)} per expert"
    elif isinstance(slots, float):
        count = round(slots * total_experts)
        meaning = f"{slots:.4g} of {total_experts} experts"
    else:
        count, meaning = slots, "as given"
    if count < top_k:
        raise SlotPoolTooSmall(
            f"slots={slots!r} gives {count} slots ({format_bytes(count * row_bytes)}), but one token of one layer "
            f"needs top-k = {top_k} experts at once; use slots={top_k} ({format_bytes(top_k * row_bytes)}) or more"
        )
    if count > total_experts:
        return total_experts, f"{meaning}, cut to one slot for each of the {total_experts} experts"
    return count, meaning
