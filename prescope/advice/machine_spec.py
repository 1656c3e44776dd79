"""What a machine can do, in the seven numbers that offloading depends on: measured, or typed in and marked so."""

from dataclasses import dataclass, replace

from ..core.machine import CPU_DEVICE
from ..core.numbers import is_number
from ..core.types import ExpertSize, MoEShape
from ..errors import BadProfile, UnsupportedOption
from ..profile import HardwareProfile
from ..scheduler.costs import LayerCosts

#: GPU -> memory in GiB and its rate in GB/s, by its maker's data sheet; of others a profile holds what CUDA tells. Of
#: the A100 what PreScope's authors left of its memory.
GPUS = {
    "NVIDIA H200": (140.4, 4800.0),
    "NVIDIA H100 80GB HBM3": (79.6, 3350.0),
    "NVIDIA A100, 24 GB of it": (22.4, 1555.0),
}
#: Where nothing is measured: launches of a captured, uncompiled layer (H200: 159 to 172 us, hidden 2048 and 4096).
LAUNCHES_US = 150.0
#: Share of a GPU memory's rate that one expert's product reaches with few tokens, and its launch.
GPU_SHARE, GPU_BASE_US = 0.6, 3.0
#: CPU lane: share of the host memory's rate (77 to 97 % of it on an H100's host), and of one submission, us.
CPU_SHARE, CPU_BASE_US = 0.8, 60.0
#: From the router's choice to the first copy, a batch of copies besides its bytes, us (H200).
DECIDE_US, BATCH_US = 21.0, 12.0
#: Most tokens of the CPU table.
CPU_TOKENS = 16


@dataclass(frozen=True, kw_only=True)
class MachineSpec:
    """A machine.

    Args:
        name: for titles.
        link_gb_per_s: host to GPU, pinned memory.
        host_gib, host_gb_per_s: host memory and the rate at which all cores read it.
        gpu_gib, gpu_gb_per_s: GPU memory and its rate.
        cores: that compute experts; 0: no CPU lane.
        launches_us: what a layer besides its experts takes apart from reading its weights.
        profile: measured curves, used instead of the numbers wherever they know better.
        origin: "assumed" or "measured on ...".

    Raises:
        UnsupportedOption: a number that cannot be.
    """

    name: str = "typed in"
    link_gb_per_s: float
    host_gib: float
    host_gb_per_s: float
    gpu_gib: float
    gpu_gb_per_s: float
    cores: int = 8
    launches_us: float = LAUNCHES_US
    profile: HardwareProfile | None = None
    origin: str = "assumed"

    def __post_init__(self) -> None:
        for name in ("link_gb_per_s", "host_gib", "host_gb_per_s", "gpu_gib", "gpu_gb_per_s"):
            value = getattr(self, name)
            if not (is_number(value) and value > 0):
                raise UnsupportedOption(f"{name} is {value!r}; a machine has more than none of it")
        for name in ("cores", "launches_us"):
            value = getattr(self, name)
            if not (is_number(value) and value >= 0):
                raise UnsupportedOption(f"{name} is {value!r}; it is a number of 0 or more")

    @classmethod
    def of_profile(cls, profile: HardwareProfile, name: str = "") -> "MachineSpec":
        """The numbers of a measured profile; GPU memory by its maker's data sheet, else as CUDA told the calibration.
        Where the CPU stands in for a GPU its memory is the host's.

        Raises:
            UnsupportedOption: the GPU's memory is not known.
        """
        device = str(profile.machine.get("device") or profile.place.device)
        host_gib, host_gb_per_s = (
            float(profile.machine.get("host_memory_gib") or 64.0),
            profile.dram_gb_per_s(),
        )
        told = (profile.machine.get("device_memory_gib"), profile.machine.get("device_memory_gb_per_s"))
        gpu_gib, gpu_gb_per_s = GPUS.get(device) or (
            (host_gib, host_gb_per_s) if device == CPU_DEVICE else told
        )
        if not (gpu_gib and gpu_gb_per_s):
            raise UnsupportedOption(
                f"the profile does not say how much memory {device} has, nor how fast it is: run prescope.calibrate() "
                f"again, which notes both, or type the numbers in: MachineSpec(gpu_gib=..., gpu_gb_per_s=..., ...)"
            )
        return cls(
            name=name or device,
            link_gb_per_s=profile.lanes.link.rate_gb_per_s,
            host_gib=host_gib,
            host_gb_per_s=host_gb_per_s if host_gb_per_s == host_gb_per_s else 50.0,
            gpu_gib=gpu_gib,
            gpu_gb_per_s=gpu_gb_per_s if gpu_gb_per_s == gpu_gb_per_s else 50.0,
            cores=int(profile.machine.get("cpu_threads") or profile.place.cores),
            profile=profile,
            origin=f"{profile.label}, {profile.measured}",
        )

    def changed(self, **numbers: float) -> "MachineSpec":
        """The same with some numbers typed in; what was measured no longer holds then."""
        name = self.name if self.origin == "assumed" else f"{self.name}, changed"
        values: dict[str, object] = {"name": name, "profile": None, "origin": "assumed", **numbers}
        return replace(self, **values)  # type: ignore[arg-type]

    def costs(self, shape: MoEShape, expert: ExpertSize, layer_bytes: int, batch: int) -> LayerCosts:
        """What a layer of a model costs here."""
        if self.profile is not None:
            try:
                return self._measured_costs(self.profile, shape, expert, layer_bytes, batch)
            except BadProfile:  # no experts were measured: the numbers are what there is
                pass
        nbytes = expert.nbytes
        has_lane = self.cores > 0
        per_cpu = nbytes / (CPU_SHARE * self.host_gb_per_s) / 1e3
        # Beside each other link and CPU read one memory.
        beside = per_cpu * self.host_gb_per_s / max(1.0, self.host_gb_per_s - 0.5 * self.link_gb_per_s)
        return LayerCosts(
            link_us=nbytes / self.link_gb_per_s / 1e3,
            link_busy_us=1.12 * nbytes / self.link_gb_per_s / 1e3 if has_lane else None,
            gpu_us=GPU_BASE_US + nbytes / (GPU_SHARE * self.gpu_gb_per_s) / 1e3,
            rest_us=self.launches_us + layer_bytes / (GPU_SHARE * self.gpu_gb_per_s) / 1e3,
            cpu_us=(0.0, *(beside * (1 + 0.03 * (n - 1)) for n in range(1, CPU_TOKENS + 1)))
            if has_lane
            else (),
            cpu_alone_us=(0.0, *(per_cpu * (1 + 0.03 * (n - 1)) for n in range(1, CPU_TOKENS + 1)))
            if has_lane
            else (),
            cpu_base_us=CPU_BASE_US if has_lane else 0.0,
            decide_us=DECIDE_US,
            batch_us=BATCH_US,
            source=f"{self.name} ({self.origin})",
        )

    def _measured_costs(
        self, profile: HardwareProfile, shape: MoEShape, expert: ExpertSize, layer_bytes: int, batch: int
    ) -> LayerCosts:
        known = sorted(point.us for point in profile.lanes.of("rest"))
        rest_us = (known[len(known) // 2] if known else self.launches_us) + layer_bytes / (
            GPU_SHARE * self.gpu_gb_per_s
        ) / 1e3
        return profile.costs(
            shape, width=expert.width, expert_width=expert.expert_width, batch=batch, cpu_lane=self.cores > 0,
            rest_us=rest_us,
        )  # fmt: skip


#: Machines of which rates were measured but no whole profile: link, host memory alone and cores of
#: benchmarks/results/cpu_experts_h100_2026-11-24.md; GPU memory by its maker, the rest assumed.
KNOWN = {
    "h100": MachineSpec(
        name="NVIDIA H100 80GB HBM3", link_gb_per_s=54.3, host_gib=125.9, host_gb_per_s=127.0, gpu_gib=79.6,
        gpu_gb_per_s=3350.0, cores=14,
        origin="link and host memory measured on an H100, 2026-11-24; launches and kernels assumed",
    )
}  # fmt: skip
