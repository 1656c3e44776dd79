"""Files that prescope reads, made, damaged and read again: what must come of it is told apart in `Outcome`."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import prescope
from prescope.core.types import MoEShape
from prescope.errors import PrescopeError
from prescope.predictor import LayerGroups, Llapor, LlaporConfig, ModelTag, RecordedPredictor
from prescope.predictor.llapor_config import tensor_shapes
from prescope.profile import HardwareProfile
from prescope.scheduler.costs import LayerCosts
from prescope.simulator import Machine, Recording
from prescope.traces.events import read_events, write_events
from prescope.traces.result import RunResult
from prescope.traces.routing import RoutingTrace
from tests.support import foreign_traces
from tests.support.damage import damage
from tests.support.models import tiny_moe
from tests.support.small_run import small_run

ROOT = Path(__file__).resolve().parents[2]


class Outcome(StrEnum):
    """What became of a damaged input."""

    REFUSED = "refused"  # a PrescopeError, or FileNotFoundError where the file is gone
    SAME = "same"  # read, and what was read is what was written
    OTHER = "other"  # read, and it is something else
    FOREIGN = "foreign"  # another error


@dataclass(frozen=True)
class Kind:
    """One kind of input: its whole files in a folder, and how they are read to something that can be compared."""

    make: Callable[[Path], None]
    read: Callable[[Path], Any]
    may_differ: bool = False  # it has no checksum: what was changed may be read


def _trace_arrays(trace: RoutingTrace) -> str:
    arrays = {name: (str(array.dtype), array.tobytes()) for name, array in trace._arrays().items()}
    return repr((arrays, trace._metadata()))


def small_predictor() -> Llapor:
    config = LlaporConfig(lookahead=2, width_outer=4, width_middle=4, hidden=6, block=3)
    shape, groups = MoEShape(3, 4, 2), LayerGroups.at(1, 2, 3, "made up")
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(size, generator=generator)
        for name, size in tensor_shapes(config, shape, 8, 1).items()
    }
    return Llapor(config, shape, groups, tensors, ModelTag(model="m", fingerprint="f"), validation_error=0.5)


def _predictor_values(path: Path) -> str:
    loaded = Llapor.load(path)
    tensors = {name: tensor.numpy().tobytes() for name, tensor in sorted(loaded.tensors.items())}
    return repr((tensors, loaded.config, loaded.shape, loaded.groups, loaded.tag, loaded.validation_error))


def _copy_profile(folder: Path) -> None:
    HardwareProfile.load("test_machine").save(folder / "p.json")


def _profile_values(path: Path) -> str:
    profile = HardwareProfile.load(path)
    return repr({name: value for name, value in vars(profile).items() if name != "lanes"})


def _make_recording(folder: Path) -> None:
    trace = small_run(steps=4).trace
    rows, rng = int((trace.phase == 1).sum()), np.random.default_rng(0)
    scores = [rng.random((rows, trace.num_layers - 1, trace.num_experts)).astype(np.float32)]
    costs = LayerCosts(link_us=60.0, gpu_us=12.0, rest_us=25.0, cpu_us=(0.0, 40.0), source="made up")
    Recording(
        trace=trace,
        predictors=[RecordedPredictor.of_scores(trace, scores, name="llapor", is_calibrated=True)],
        machine=Machine("elsewhere", costs, 1_500_000, 30.0, 2, on_demand=costs),
        predict_us={"llapor": 3.0},
        measured=[{"schedule": "presched", "tokens_per_s": 10.0}],
        about={"label": "made up"},
    ).save(folder, "r")


def _recording_values(one: Recording) -> str:
    predictors = [(vars(p).keys(), p.name, p.replay(one.trace, 1).tobytes()) for p in one.predictors]
    return repr((_trace_arrays(one.trace), predictors, one.machine, one.predict_us, one.measured, one.about))


def _run_values(run: RunResult) -> str:
    tables = [table.to_csv() for table in (run.events, run.layers, run.steps)]
    said = (run.text, run.tokens, run.config, run.hardware, run.notes, run.metrics)
    return repr((tables, said, _trace_arrays(run.trace)))


def make_model(folder: Path) -> None:
    """A tiny MoE in two shards with a tokenizer."""
    tiny_moe().save_pretrained(folder, max_shard_size="60KB")
    write_tokenizer(folder)


def write_tokenizer(folder: Path) -> None:
    """One of sixty words; all others are the first."""
    vocabulary = {f"w{i}": i for i in range(60)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", eos_token="w1").save_pretrained(
        folder
    )


def _load_model(folder: Path) -> str:
    with prescope.load(folder, slots=6, device="null") as engine:
        return f"{engine.fingerprint} {engine.tokenizer is not None}"


def _strip(path: Path) -> None:
    """Take the checksum out of a file."""
    if path.suffix == ".json":
        contents = json.loads(path.read_text())
        del contents["checksum"]
        path.write_text(json.dumps(contents))
    elif path.suffix == ".parquet":
        table = pq.read_table(path)
        attrs = json.loads(table.schema.metadata[b"PANDAS_ATTRS"])
        del attrs["checksum"]
        metadata = table.schema.metadata | {b"PANDAS_ATTRS": json.dumps(attrs).encode()}
        pq.write_table(table.replace_schema_metadata(metadata), path)
    else:
        with safe_open(path, "pt") as file:
            header = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        del header["checksum"]
        save_file(tensors, path, header)


def _without_checksum(kind: Kind) -> Kind:
    """The same as a version without checksums wrote it: all that stands between its reader and harm is validation."""

    def make(folder: Path) -> None:
        kind.make(folder)
        for path in folder.iterdir():
            _strip(path)

    return Kind(make, kind.read, may_differ=True)


KINDS: dict[str, Kind] = {
    "trace": Kind(
        lambda folder: small_run(steps=4).trace.save(folder / "t.safetensors"),
        lambda folder: _trace_arrays(RoutingTrace.load(folder / "t.safetensors")),
    ),
    "parquet trace": Kind(
        lambda folder: small_run(steps=4).trace.save_parquet(folder / "t.parquet"),
        lambda folder: _trace_arrays(RoutingTrace.load_parquet(folder / "t.parquet")),
    ),
    "events": Kind(
        lambda folder: write_events(small_run(steps=4).events, folder / "e.parquet"),
        lambda folder: read_events(folder / "e.parquet").to_csv(),
    ),
    "predictor": Kind(
        lambda folder: small_predictor().save(folder / "p.safetensors"),
        lambda folder: _predictor_values(folder / "p.safetensors"),
    ),
    "profile": Kind(_copy_profile, lambda folder: _profile_values(folder / "p.json")),
    "recording": Kind(_make_recording, lambda folder: _recording_values(Recording.load(folder / "r.json"))),
    "run": Kind(
        lambda folder: small_run(steps=4).save(folder),
        lambda folder: _run_values(RunResult.load(folder)),
    ),
    "model": Kind(make_model, _load_model, may_differ=True),
}
FOREIGN = ["vllm", "sglang", "llama.cpp", "megatron", "tensors", "array"]


def _make_foreign(folder: Path, kind: str) -> None:
    """One program's trace, in its own form, in this folder."""
    of = foreign_traces.known()
    if kind == "megatron":
        foreign_traces.write_router_trace(folder, of)
    elif kind == "tensors":
        foreign_traces.write_layers(folder, of)
    elif kind == "array":
        np.savez(folder / "t.npz", expert_ids=of.ids[0], inputs=of.inputs[0])
    elif kind == "llama.cpp":
        foreign_traces.write_moe_trace(folder / "t.csv", of.ids[0], of.prompt_tokens[0])
    else:
        write = {"vllm": foreign_traces.write_vllm, "sglang": foreign_traces.write_sglang}[kind]
        write(folder / "t.jsonl", of)


def _read_foreign(folder: Path, kind: str) -> str:
    files = sorted(folder.iterdir())
    source = folder if kind in ("megatron", "tensors") else files[0] if files else folder / "gone"
    return _trace_arrays(prescope.read_trace(source, kind, shape=foreign_traces.SHAPE, model="m"))


def _foreign(kind: str) -> Kind:
    return Kind(partial(_make_foreign, kind=kind), partial(_read_foreign, kind=kind), may_differ=True)


KINDS |= {f"{name}, old": _without_checksum(KINDS[name]) for name in KINDS if name not in ("model", "run")}
#: Other programs' files have no checksum.
KINDS |= {f"{kind} trace": _foreign(kind) for kind in FOREIGN}


class Whole:
    """The whole files of a kind, made once, and what they hold."""

    def __init__(self, kind: Kind, folder: Path) -> None:
        self.kind, self.folder = kind, folder
        folder.mkdir()
        kind.make(folder)
        self.names = sorted(path.name for path in folder.iterdir())
        self.value = kind.read(folder)

    def try_damaged(self, place: Path, seed: int) -> tuple[Outcome, str]:
        """Damage a copy and read it."""
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(self.folder, place)
        what = damage(place, self.names, seed)
        try:
            value = self.kind.read(place)
        except (PrescopeError, FileNotFoundError) as error:
            return Outcome.REFUSED, f"{what}: {type(error).__name__}: {error}"
        except Exception as error:  # noqa: BLE001 - what is looked for
            return Outcome.FOREIGN, f"{what}: {type(error).__name__}: {error}"
        return (Outcome.SAME if value == self.value else Outcome.OTHER), what
