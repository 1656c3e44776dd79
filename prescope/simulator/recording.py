"""A run that was recorded elsewhere, complete: routing, what predictors said of it, and the machine it ran on.

Everything a simulation needs and nothing else, so that it fits into a few MB: no weights, no router inputs, no text but
the prompts'. Three kinds of files side by side: `<name>.json`, `<name>.trace.safetensors` and one
`<name>.<predictor>.safetensors` for each predictor.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from ..cache.prefetch import LEAST_BYTES_ON_WIRE
from ..core.files import checksum, read_object, require_checksum, sorted_json, write_text
from ..core.paths import data_dir, user_path
from ..errors import BadTrace
from ..predictor import RecordedPredictor
from ..scheduler.costs import LayerCosts
from ..traces.routing import RoutingTrace
from .machines import Machine
from .scenarios import Scenarios

FORMAT = "prescope.recording"
VERSION = 1
#: Of its JSON file; routing and predictions are not in it.
MOST_BYTES = 16 << 20
REMEDY = "record it again, or fetch it again"
#: Folder of the recordings that come with prescope, below `data/`.
SHIPPED = "traces"


@dataclass(frozen=True, kw_only=True)
class Recording:
    """A recorded run with what was said of it.

    Attributes:
        trace: routing, without router inputs.
        predictors: their scores of the trace's decode steps, the best first.
        machine: where it ran; its times were measured there.
        predict_us: what one prediction costs there, by predictor.
        measured: runs on that machine of the same prompts under schedules: schedule, slots_frac, tokens_per_s, ...
        about: where it comes from: model, machine, commands, date, recall.
    """

    trace: RoutingTrace
    predictors: Sequence[RecordedPredictor]
    machine: Machine
    predict_us: Mapping[str, float] = field(default_factory=dict)
    measured: Sequence[Mapping[str, Any]] = ()
    about: Mapping[str, Any] = field(default_factory=dict)

    def scenarios(self, machines: Sequence[Machine] = ()) -> Scenarios:
        """What any setting would have done with it, there or on other machines."""
        return Scenarios(
            self.trace, [self.machine, *machines], self.predictors, predict_us=self.predict_us,
            label=str(self.about.get("label", self.trace.model)), measured=self.measured,
            commands=[str(self.about["command"])] if "command" in self.about else [],
        )  # fmt: skip

    def save(self, folder: str | Path, name: str) -> list[Path]:
        """Write its files; returns them."""
        folder = user_path(folder)
        files = [self.trace.save(folder / f"{name}.trace.safetensors")]
        files += [one.save(folder / f"{name}.{_plain(one.name)}.safetensors") for one in self.predictors]
        contents = {
            "format": FORMAT,
            "version": VERSION,
            "about": dict(self.about),
            "predictors": [one.name for one in self.predictors],
            "predict_us": dict(self.predict_us),
            "machine": _machine_to_plain(self.machine),
            "measured": [dict(row) for row in self.measured],
        }
        written = {**contents, "checksum": checksum(sorted_json(contents))}
        path = write_text(folder / f"{name}.json", json.dumps(written, indent=1) + "\n")
        return [path, *files]

    @classmethod
    def load(cls, name: str | Path) -> Self:
        """Read a recording: a path to its JSON file, or the name of one that comes with prescope.

        Raises:
            BadTrace: there is none of this name, or a file of it is damaged.
            BadPredictor: its predictions are.
        """
        path = _file_of(name)
        contents = read_object(path, BadTrace, REMEDY, MOST_BYTES)
        if (contents.get("format"), contents.get("version")) != (FORMAT, VERSION):
            raise BadTrace(f"{path} is no recording of version {VERSION}; {REMEDY}")
        found = checksum(sorted_json(contents, without=["checksum"]))
        require_checksum(contents.get("checksum"), found, path, BadTrace, REMEDY)
        try:
            return cls(
                trace=RoutingTrace.load(path.with_suffix(".trace.safetensors")),
                predictors=[
                    RecordedPredictor.load(path.with_suffix(f".{_plain(one)}.safetensors"))
                    for one in contents["predictors"]
                ],
                machine=_machine_of_plain(contents["machine"]),
                predict_us={str(one): float(us) for one, us in contents["predict_us"].items()},
                measured=[dict(row) for row in contents["measured"]],
                about=dict(contents["about"]),
            )
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, OSError) as error:
            raise BadTrace(f"{path} is no whole recording ({error!r}); {REMEDY}") from error


def shipped_recordings() -> list[str]:
    """Names of the recordings that come with prescope."""
    folder = data_dir() / SHIPPED
    return sorted(path.stem for path in folder.glob("*.json")) if folder.is_dir() else []


def _file_of(name: str | Path) -> Path:
    given, shipped = user_path(name), data_dir() / SHIPPED / f"{name}.json"
    for path in (given, shipped):
        if path.is_file():
            return path
    known = ", ".join(shipped_recordings()) or "none"
    raise BadTrace(f"there is no recording {str(name)!r}; those that come with prescope: {known}")


def _plain(name: str) -> str:
    return name.replace(" ", "_")


def _machine_to_plain(machine: Machine) -> dict[str, Any]:
    return {
        "name": machine.name,
        "costs": asdict(machine.costs),
        "on_demand": None if machine.on_demand is None else asdict(machine.on_demand),
        "row_bytes": machine.row_bytes,
        "step_us": machine.step_us,
        "least_bytes": machine.least_bytes,
    }


def _machine_of_plain(plain: Mapping[str, Any]) -> Machine:
    alone = plain["on_demand"]
    # The first recordings, all made on GPUs, do not say it.
    least_bytes = int(plain.get("least_bytes", LEAST_BYTES_ON_WIRE))
    return Machine(
        str(plain["name"]), _costs_of_plain(plain["costs"]), int(plain["row_bytes"]), float(plain["step_us"]),
        least_bytes, on_demand=None if alone is None else _costs_of_plain(alone),
    )  # fmt: skip


def _costs_of_plain(plain: Mapping[str, Any]) -> LayerCosts:
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in plain.items()}
    return LayerCosts(**values)
