"""What one machine can do: measured points, the curves through them, and the costs of a model's layer.

Pure but for its files. A profile is evidence of one machine: engines may plan only by a profile of the machine they run
on; the simulator may take any, under its label.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from ..core.html import facts_html
from ..core.machine import Place, this_place
from ..core.numbers import is_count, require_count, require_size
from ..core.paths import user_path
from ..core.types import ExpertSize, MoEShape
from ..errors import BadProfile, ForeignProfile, NoProfile, UnsupportedOption
from ..scheduler.costs import ASSUMED_HANDOVER, HANDOVER_US, LayerCosts, Spread
from .files import named_file, own_file, read_json, shipped_files, write_json
from .form import from_plain, to_plain
from .lanes import nearest
from .links import paced, sent_often
from .measurements import Measurements
from .tables import description, points_table

#: What slower links of a machine with a GPU stand for, by how often each copy is made.
SLOWER_LINKS = {2: "PCIe 4", 4: "PCIe 3"}
#: `LayerCosts.cpu_us` has at least this many tokens, the most that are measured: an expert of a prompt has as many, and
#: from 16 on a token costs the CPU more than before (0.9 us, then 2.4; H200's host, experts of Qwen3's size).
LEAST_CPU_TOKENS = 64


@dataclass(frozen=True, kw_only=True)
class HardwareProfile(Measurements):
    """Measured curves of one machine, and what a layer costs by them; `prescope.calibrate()` makes one."""

    # -- times -------------------------------------------------------------------------------------------------

    def link_us(self, nbytes: float, *, busy_cpu: bool = False) -> float:
        """One copy of `nbytes` to the device in a train of copies, microseconds; `busy_cpu`: while CPU experts run."""
        return (self.lanes.link_beside_cpu if busy_cpu else self.lanes.link).us(nbytes)

    def cpu_us(self, tokens: float, expert: ExpertSize | int, *, busy_link: bool = True) -> float:
        """One expert with `tokens` tokens on the CPU, of several submitted together, microseconds; 0.0 for none.

        Args:
            expert: its sizes, or its bytes. Another size than the measured ones is scaled by bytes from the nearest.

        Raises:
            BadProfile: no CPU experts were measured.
        """
        return self.lanes.expert_us("cpu", tokens, expert, busy_link)

    def gpu_us(self, tokens: float, expert: ExpertSize | int) -> float:
        """One resident expert with `tokens` tokens on the device, microseconds; otherwise as `cpu_us`."""
        return self.lanes.expert_us("gpu", tokens, expert)

    def base_us(self, lane: str, expert: ExpertSize | int, *, busy_link: bool = True) -> float:
        """Of one submission of experts to "cpu" or "gpu", however many, microseconds; not scaled by size."""
        return nearest(self.lanes.experts_of(lane, busy_link), expert).base_us

    def costs(
        self,
        shape: MoEShape | int,
        *,
        width: int,
        expert_width: int,
        batch: int = 1,
        cpu_lane: bool = True,
        rest_us: float | None = None,
    ) -> LayerCosts:
        """Costs of one MoE layer of a model, in a decode step of `batch` sequences.

        Args:
            shape: of the model, or the bytes of one of its experts: then each expert is taken to have one token.
            width, expert_width: D and F.
            cpu_lane: experts are computed on the CPU too, which slows the link and is slowed by it.
            rest_us: the rest of a layer; by default as measured with an engine of these sizes.

        Raises:
            BadProfile: nothing is known of the rest of a layer, or of experts on the device.
            UnsupportedOption: `batch` is no count, or `rest_us` no time.
        """
        require_count("batch", batch)
        if rest_us is not None:
            require_size("rest_us", rest_us)
        nbytes = shape if isinstance(shape, int) else shape.row_bytes
        expert, lanes = ExpertSize(nbytes, width, expert_width), self.lanes
        rest = rest_us if rest_us is not None else lanes.layer_us("rest", expert, batch)
        if rest is None:
            raise BadProfile(
                f"{self.label}: no engine with experts of {expert} was measured, so the rest of a layer is not known; "
                f"run prescope.calibrate(engine), or pass rest_us"
            )
        has_cpu = cpu_lane and any(lane.startswith("cpu") for lane in lanes.measured)
        near = nearest(lanes.experts_of("gpu"), expert).expert
        scaled = "" if near == expert else f"; experts of {expert} scaled by bytes from those of {near}"
        enqueue_us, decide_us = lanes.small_us("enqueue"), lanes.layer_us("decide", expert, batch)
        # Beside a busy link it is hidden by the copies before it, so the idle link's time counts.
        handover_us, is_emulated = lanes.small_us("handover"), self.link_gb_per_s is not None
        if is_assumed := not handover_us and not is_emulated:
            handover_us = HANDOVER_US
        return LayerCosts(
            link_us=self.link_us(nbytes),
            link_busy_us=self.link_us(nbytes, busy_cpu=True) if has_cpu else None,
            gpu_us=self.gpu_us(tokens_per_expert(shape, batch), expert),
            rest_us=rest + self.base_us("gpu", expert),
            cpu_us=self._cpu_table(expert, batch) if has_cpu else (),
            # The outputs, T x D of two bytes, cross the link in one small copy.
            cpu_base_us=self.base_us("cpu", expert) + self.link_us(2 * batch * width) + enqueue_us
            if has_cpu
            else 0.0,
            cpu_alone_us=self._cpu_table(expert, batch, busy_link=False) if has_cpu else (),
            # Without an engine: the least that a decision takes. Its own arithmetic comes on top.
            decide_us=decide_us
            if decide_us is not None
            else lanes.small_us("message") or lanes.small_us("read"),
            batch_us=lanes.small_us("batch"),
            copy_us=enqueue_us,
            handover_us=handover_us,
            # An emulated link has the CPU for a GPU, where the host launches each layer.
            is_layered=is_emulated,
            spread=Spread(
                lanes.spread(["h2d"]),
                lanes.spread(["gpu"], expert),
                lanes.spread(["cpu"], expert),
                lanes.spread(["rest"], expert),
            ),
            source=f"{self.label}, {self.measured}{scaled}{'; ' + ASSUMED_HANDOVER if is_assumed else ''}",
        )

    def _cpu_table(self, expert: ExpertSize, batch: int, *, busy_link: bool = True) -> tuple[float, ...]:
        tokens = range(max(batch, LEAST_CPU_TOKENS) + 1)
        return tuple(self.cpu_us(n, expert, busy_link=busy_link) for n in tokens)

    # -- which machine -----------------------------------------------------------------------------------------

    def is_this_machine(self, described: Mapping[str, Any] | None = None) -> bool:
        """Whether CPU, GPU and link are those at hand.

        Args:
            described: `describe()` of the device that will run, and of a link that is used as if slower its
                `link_factor`; None: the GPU there is, else the emulated link.
        """
        factor = (described or {}).get("link_factor", 1)
        return self.place == this_place(described) and self.link_factor == factor

    def require_this_machine(self, described: Mapping[str, Any] | None = None) -> None:
        """Refuse to plan an engine's run by another machine's times.

        Raises:
            ForeignProfile: CPU, GPU or link differ.
        """
        if not self.is_this_machine(described):
            raise ForeignProfile(
                f"this profile ({self.label}) is of {self.place}; here is {this_place(described)}. An engine is "
                f"planned by its own machine's times: run prescope.calibrate(). The simulator takes any profile"
            )

    @classmethod
    def of_this_machine(cls, described: Mapping[str, Any] | None = None) -> "HardwareProfile":
        """The profile that `prescope.calibrate()` saved here, else one that comes with prescope for this very machine.

        Args:
            described: as in `is_this_machine`; an emulated link's rate, or how much slower a real one is made, is taken
                from it.

        Raises:
            NoProfile: there is none, with the remedy.
            BadProfile: the saved one cannot be read.
        """
        place = this_place(described)
        profile = cls._found(place)
        if profile is None:
            raise NoProfile(
                f"{place} has not been calibrated; run prescope.calibrate(), which takes a minute"
            )
        return profile.behind(described)

    def behind(self, described: Mapping[str, Any] | None = None) -> "HardwareProfile":
        """This profile of the machine at hand, behind the link that is used here.

        Args:
            described: as in `of_this_machine`.

        Raises:
            ForeignProfile: it is of another machine.
        """
        factor, rate = (described or {}).get("link_factor", 1), (described or {}).get("link_gb_per_s")
        if self.place == this_place(described) and self.link_factor == 1 < factor:
            return self.emulated(factor, SLOWER_LINKS.get(factor, f"1/{factor} of the link"))
        self.require_this_machine(described)
        return self if rate is None or self.link_gb_per_s is None else self.with_link(rate)

    @classmethod
    def _found(cls, place: Place) -> "HardwareProfile | None":
        if own_file(place).is_file():
            return cls.load(own_file(place))
        shipped = map(cls.load, shipped_files())
        return next(
            (profile for profile in shipped if (profile.place, profile.link_factor) == (place, 1)), None
        )

    # -- other links -------------------------------------------------------------------------------------------

    def emulated(self, link_factor: int, name: str) -> "HardwareProfile":
        """This machine with each copy made `link_factor` times, to study a slower link (see `links.sent_often`).

        Args:
            link_factor: 2 for one PCIe version less, 4 for two.
            name: of the link it stands for, such as "PCIe 4".

        Raises:
            UnsupportedOption: the factor is below 2, or the link is emulated already.
        """
        if (
            not is_count(link_factor)
            or link_factor < 2
            or self.link_factor != 1
            or self.link_gb_per_s is not None
        ):
            raise UnsupportedOption(
                f"link_factor={link_factor!r} on {self.label}: give 2 or more, and a profile whose link is real"
            )
        return replace(
            self,
            points=sent_often(self.points, link_factor),
            label=f"emulated {name} (each copy made {link_factor} times), {self.label}",
            link_factor=link_factor,
            notes=(
                *self.notes,
                f"{name} is emulated: the same bytes sent {link_factor} times over the real link",
            ),
        )

    def with_link(self, gb_per_s: float) -> "HardwareProfile":
        """The same with the emulated link at another rate.

        Raises:
            UnsupportedOption: the link is real, or the rate not positive.
        """
        if self.link_gb_per_s is None or not gb_per_s > 0:
            raise UnsupportedOption(
                f"{gb_per_s} GB/s on {self.label}: only an emulated link has a rate to choose"
            )
        if gb_per_s == self.link_gb_per_s:
            return self
        return replace(
            self,
            points=paced(self.points, self.link_gb_per_s, gb_per_s),
            label=self.label.replace(f"{self.link_gb_per_s:g} GB/s", f"{gb_per_s:g} GB/s"),
            link_gb_per_s=gb_per_s,
        )

    def with_experts_of(self, older: "HardwareProfile") -> "HardwareProfile":
        """This profile with what only an older one of the same machine knows: other sizes of experts, other models.

        Copies and host costs of the older one are left out as a whole, and so is what another CPU backend computed.
        """
        mine = {(p.of.kind, p.of.expert) for p in self.points}
        if older.place != self.place or older.link_factor != self.link_factor:
            return self
        kinds = {"gpu", "rest", "decide"} | ({"cpu"} if older.cpu_backend == self.cpu_backend else set())
        others = [p for p in older.points if p.of.kind in kinds and (p.of.kind, p.of.expert) not in mine]
        return replace(self, points=(*self.points, *others))

    # -- tables and files --------------------------------------------------------------------------------------

    def describe(self) -> pd.DataFrame:
        """The profile in a few dozen rows: what, value, unit, fit error; `attrs["label"]` says where it is from."""
        return description(self)

    def _repr_html_(self) -> str:
        lanes = self.lanes
        sizes = sorted({str(expert) for curves in lanes.measured.values() for expert in curves})
        facts = [
            ("machine", str(self.place)),
            (
                "link",
                f"{lanes.link.rate_gb_per_s:.3g} GB/s, {lanes.link_beside_cpu.rate_gb_per_s:.3g} beside CPU experts",
            ),
            ("experts measured", ", ".join(sizes) or "none"),
            ("origin", f"{self.origin}, {self.measured}, {len(self.points)} points"),
        ]
        return facts_html(self.label, facts, self.notes)

    def table(self) -> pd.DataFrame:
        """All points, one a row."""
        return points_table(self)

    @classmethod
    def load(cls, path: str | Path) -> "HardwareProfile":
        """Read a profile's file; a plain name such as "h200" is one that comes with prescope.

        Raises:
            BadProfile: it is not there, cut off, of a later version, or holds what no measurement gives.
        """
        file = named_file(path)
        return cls(**from_plain(read_json(file), str(file)))

    def save(self, path: str | Path | None = None) -> Path:
        """Write it as JSON, by an atomic rename; by default where `of_this_machine` finds it. Returns the path."""
        file = own_file(self.place) if path is None else user_path(path)
        write_json(file, to_plain(self))
        return file


def tokens_per_expert(shape: MoEShape | int, batch: int) -> float:
    """Mean tokens of the experts that a step needs, if each token chose at random; 1 if only bytes are known."""
    if isinstance(shape, int) or not 0 < shape.top_k <= shape.num_experts:
        return 1.0
    share = shape.top_k / shape.num_experts
    return batch * share / (1.0 - (1.0 - share) ** batch)
