"""Settings of an engine: frozen, validated once, resolved from "auto" into a new object with reasons.

The names to choose from are those of the registries: of devices, cache policies and schedules.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..cache.num_slots import require_slots_setting
from ..cache.policies import POLICIES
from ..core.numbers import is_count, is_number, settle
from ..core.types import DEVICE_DRIVERS
from ..device import DEVICES
from ..errors import UnsupportedOption
from ..scheduler import SCHEDULES
from ..weights.formats import PACKED

#: One GPU of several, by its index.
_ONE_GPU = re.compile(r"cuda:[0-9]{1,3}")
KERNELS = ("auto", "torch", "triton")
DECODES = ("auto", "layered", "gpu-driven", "copy-engine", "host-driven")


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """What a person can set on an engine.

    Args:
        slots: places for experts on the device: an int is a count, a float in (0, 1] a share of all
            experts of the model (or "25%"), a text such as "8GiB" the memory they may take.
        device: "cuda", or "cuda:1" for one GPU of several (or torch.device("cuda:1")); "cpu" with an emulated link;
            "null" (virtual clock, for tests); "auto" takes CUDA when there is one and says so.
        cache: which expert gives up its slot: "lru", "lfu", "static" (least frequent by `frequencies`)
            "score" (decayed router weight), "shallow" (first layers stay), "arc" (adaptive replacement; "shallow-arc"
            with the first layers favoured), "class-lru" (uses that count half after 128 tokens) or "next-use" (the one
            whose next use is expected last); "auto": the schedule's own.
        link_gb_per_s: bandwidth of the emulated link, GB/s; only with device="cpu" or "null". By default one
            expert takes a millisecond.
        link_factor: how many times each expert is copied, to study a slower link on a faster one: 2 on PCIe 5 is like
            PCIe 4, 4 like PCIe 3. CUDA only; results say that the link is emulated.
        kernels: "torch" (reference), "triton" (CUDA), or "auto".
        decode: how decode steps run. "layered": layer by layer, launched from Python. From one CUDA graph, with
            misses read by the GPU ("gpu-driven"), copied on the GPU's orders ("copy-engine"), or served by the host,
            which every cache policy can ("host-driven"). "auto": from a graph where that is possible, by the faster
            of the first two as measured in the first steps, or by the host where the cache policy needs it.
        experts: "auto": as the checkpoint has them, packed or not. "plain": unpacked to the model's dtype. "int8" (a
            scale for each output channel), "fp8" (for each 128 x 128), "int4" (for 128 weights of a row, or 64, 32, 16)
            or "mxfp4" (for 32): a plain checkpoint's experts are packed while they are loaded. That is lossy, and
            results say so. Only `load` takes it.
        schedule: who decides what is copied, prefetched and computed on the CPU in decode steps
            (`prescope.scheduler.SCHEDULES`): "on-demand", "presched", or a system it is compared with.
        lookahead: layers ahead that are predicted; None: the schedule's own.
        width: experts prefetched for one layer at most; None: the schedule's own.
        threshold: experts less likely to be used are not prefetched, in [0, 1]; None: the schedule's own.
        cpu_threads: threads that compute experts on the CPU, where the schedule does; None: all cores but two; 0: none.
        compiled: compile the layers around the experts before the graph is captured (torch.compile; once for all
            layers that are alike, for each batch size and length of the cache).
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
    experts: str = "auto"
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
        settle(self)
        device: Any = self.device
        if isinstance(device, torch.device):
            object.__setattr__(self, "device", str(device))
        if not (isinstance(self.device, str) and _ONE_GPU.fullmatch(self.device)):
            _one_of("device", self.device, ("auto", *DEVICES), " (and 'cuda:1' for one GPU of several)")
        _one_of("cache", self.cache, ("auto", *POLICIES))
        _one_of("kernels", self.kernels, KERNELS)
        _one_of("decode", self.decode, DECODES)
        _one_of("experts", self.experts, ("auto", "plain", *PACKED))
        _one_of("schedule", self.schedule, SCHEDULES)
        if self.schedule != "on-demand" and self.decode in DEVICE_DRIVERS:
            raise UnsupportedOption(
                f"decode={self.decode!r} leaves decisions to the GPU, which only on-demand loading can; "
                f"schedule={self.schedule!r} needs decode='auto', 'host-driven' or 'layered'"
            )
        for name in ("compiled", "events", "record_routing", "record_inputs"):
            if not isinstance(value := getattr(self, name), bool):
                raise UnsupportedOption(f"{name} is {value!r}; it is True or False")
        if not is_count(self.link_factor) or self.link_factor < 1:
            raise UnsupportedOption(f"link_factor is {self.link_factor!r}; it counts copies: 1, 2, 4, ...")
        if self.link_factor > 1 and self.decode == "gpu-driven":
            raise UnsupportedOption(
                "decode='gpu-driven' reads experts itself, once; link_factor needs decode='auto', 'copy-engine', "
                "'host-driven' or 'layered'"
            )
        for name, least, meaning in (
            ("lookahead", 1, "predictions are for 1 layer ahead or more"),
            ("width", 0, "0 prefetches nothing, more is a number of experts"),
            ("cpu_threads", 0, "0 switches the CPU lane off, more is a number of threads"),
        ):
            value = getattr(self, name)
            if value is not None and not (is_count(value) and value >= least):
                raise UnsupportedOption(f"{name} is {value!r}; {meaning}")
        if self.threshold is not None and not (is_number(self.threshold) and 0 <= self.threshold <= 1):
            raise UnsupportedOption(f"threshold is {self.threshold!r}; a probability lies in [0, 1]")
        require_slots_setting(self.slots)
        link = self.link_gb_per_s
        if link is not None and not (is_number(link) and 0 < link < math.inf):
            raise UnsupportedOption(f"link_gb_per_s is {link!r}; a bandwidth is a positive number of GB/s")
        if self.link_gb_per_s is not None and self.device.startswith("cuda"):
            raise UnsupportedOption(
                "link_gb_per_s sets the emulated link of device='cpu'; CUDA's link is real"
            )
        if self.record_inputs and not self.record_routing:
            raise UnsupportedOption(
                "record_inputs needs record_routing=True: inputs are stored with the routing"
            )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def _one_of(name: str, value: Any, allowed: Iterable[str], others: str = "") -> None:
    if not isinstance(value, str) or value not in allowed:
        raise UnsupportedOption(f"{name} is {value!r}; choose one of {', '.join(map(repr, allowed))}{others}")
