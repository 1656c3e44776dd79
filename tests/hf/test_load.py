"""Loading a folder: what is wrong with it is said before anything is built on it."""

import gc
import itertools
import json
import shutil
import socket
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import RepositoryNotFoundError
from transformers import LlamaConfig, LlamaForCausalLM

import prescope
from prescope.device import NullDevice
from prescope.errors import (
    BadModelFolder,
    NotAMoE,
    PrescopeError,
    SlotPoolTooSmall,
    TraceMismatch,
    UnsupportedOption,
)
from prescope.hf import Attachment, find_moe_layers
from prescope.weights import pages
from prescope.weights.host_pool import HostLayer
from prescope.weights.layout import row_layout
from tests.support.models import LAYERS, plain_tokens, prompt, tiny_moe

SETTINGS = {"slots": 6, "device": "cpu", "link_gb_per_s": 50.0}


@pytest.fixture
def folder(tmp_path):
    tiny_moe().save_pretrained(tmp_path / "model", max_shard_size="60KB")
    return tmp_path / "model"


def shards(folder):
    return sorted(folder.glob("*.safetensors"))


def test_a_saved_model_gives_its_own_tokens(folder):
    ids = prompt(batch=2)
    with prescope.load(folder, **SETTINGS) as engine:
        assert engine.generate(ids, max_new_tokens=12).tokens == plain_tokens(tiny_moe(), ids)
        engine.check_integrity()


def test_bytes_in_host_rows_equal_the_bytes_on_disk(folder):
    weights = {name: tensor.clone() for name, tensor in tiny_moe().state_dict().items()}
    with prescope.load(folder, **SETTINGS) as engine:
        for layer, rows in enumerate(engine._attachment.host.layers):
            for name in ("gate_up_proj", "down_proj"):
                assert torch.equal(rows.tensor(name), weights[f"model.layers.{layer}.mlp.experts.{name}"])


def test_a_short_load_prints_nothing_and_a_long_one_a_bar_that_goes(folder, capsys, monkeypatch):
    with prescope.load(folder, **SETTINGS):
        said = capsys.readouterr()
    assert said.out + said.err == ""
    monkeypatch.setattr("prescope.hf.reading.BAR_AFTER_S", 0.0)
    with prescope.load(folder, **SETTINGS):
        bar = capsys.readouterr().err
    assert "reading weights" in bar and "Loading" not in bar
    assert not bar.endswith("\n"), "the bar stays in the notebook for good"


def test_the_dtype_can_be_chosen(folder):
    with prescope.load(folder, dtype=torch.bfloat16, **SETTINGS) as engine:
        assert engine.hardware()["dtype"] == "bfloat16"
        assert engine.shape.row_bytes == 3 * 32 * 24 * 2


@pytest.mark.parametrize("name", ["no/such/folder", "./nowhere", "justaname"])
def test_a_folder_that_is_not_there_is_named(name):
    with pytest.raises(BadModelFolder, match=name):
        prescope.load(name, **SETTINGS)


@pytest.fixture
def lookups(monkeypatch):
    """Hosts that were looked up, with a network that finds none; not offline by setting."""
    asked = []

    def nothing_found(host, *_, **__):
        asked.append(host)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", nothing_found)
    return asked


@pytest.mark.parametrize(
    "name, said",
    [
        (
            "data/tiny-mo",
            r"no folder data/tiny-mo \(did you mean data/tiny-moe\?\).*config\.json.*hf download",
        ),
        ("data/another", r"no folder data/another; .*config\.json"),
        (Path("owner/name"), r"no folder owner/name; .*config\.json"),
        ("~/nowhere-at-all", r"no folder .*nowhere-at-all; .*config\.json"),
        ("owner--x/name", "neither a folder nor a hub id"),
    ],
)
def test_what_looks_like_a_folder_is_refused_and_no_hub_is_asked(name, said, tmp_path, monkeypatch, lookups):
    """The hub library would ask for half a minute."""
    (tmp_path / "data" / "tiny-moe").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadModelFolder, match=said):
        prescope.load(name, **SETTINGS)
    assert not lookups


def test_a_hub_that_does_not_answer_is_asked_once(tmp_path, lookups):
    with pytest.raises(
        BadModelFolder, match=r"owner/name.*cache.*cannot be asked \(.*hf download owner/name"
    ):
        prescope.load("owner/name", cache_dir=tmp_path, **SETTINGS)
    assert 1 <= len(lookups) <= 2, (
        "the library asks for something of its own once a process; a retry asks six times"
    )


@pytest.mark.parametrize("setting", ["HF_HUB_OFFLINE", "local_files_only"])
def test_a_hub_that_must_not_be_asked_is_not(setting, tmp_path, lookups, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", setting == "HF_HUB_OFFLINE")
    with pytest.raises(BadModelFolder, match=r"cache does not have it.*HF_HUB_OFFLINE"):
        prescope.load(
            "owner/name", cache_dir=tmp_path, local_files_only=setting == "local_files_only", **SETTINGS
        )
    assert not lookups


def test_what_was_fetched_before_is_read_without_a_network(folder, tmp_path, lookups, monkeypatch):
    """Also beside a folder of the owner's name. Each file that the cache lacks would cost half a minute."""
    cached = tmp_path / "hub" / "models--owner--name"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("a" * 40)
    shutil.copytree(folder, cached / "snapshots" / ("a" * 40))
    (tmp_path / "owner").mkdir()
    monkeypatch.chdir(tmp_path)
    with (
        pytest.warns(UserWarning, match="owner/name is read from its cache"),
        prescope.load("owner/name", cache_dir=tmp_path / "hub", **SETTINGS) as engine,
    ):
        assert engine.name == "owner/name"
    assert 1 <= len(lookups) <= 2, (
        "the library asks for something of its own once a process; a retry asks six times"
    )


def test_a_hub_that_answers_is_believed(tmp_path, monkeypatch):
    """A model that it does not have, or that needs a token, is said by transformers, which knows why."""
    asked = []

    def refuse(url, **_):
        asked.append(url)
        raise RepositoryNotFoundError("no such model", response=Mock())

    def said_by_transformers(*_, **__):
        raise OSError("not a valid model identifier")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("prescope.hf.place.get_hf_file_metadata", refuse)
    monkeypatch.setattr("prescope.hf.configuration.AutoConfig.from_pretrained", said_by_transformers)
    with pytest.raises(BadModelFolder, match="not a valid model identifier"):
        prescope.load("owner/name", cache_dir=tmp_path, revision="v1", subfolder="deep", **SETTINGS)
    assert asked[0].endswith("/owner/name/resolve/v1/deep/config.json")


def test_a_truncated_shard_is_named(folder):
    victim = shards(folder)[1]
    victim.write_bytes(victim.read_bytes()[:-100])
    with pytest.raises(BadModelFolder, match=f"{victim.name} is truncated or corrupt"):
        prescope.load(folder, **SETTINGS)


def test_a_corrupt_header_is_named(folder):
    victim = shards(folder)[0]
    victim.write_bytes(b"\xff" * 64 + victim.read_bytes()[64:])
    with pytest.raises(BadModelFolder, match="truncated or corrupt"):
        prescope.load(folder, **SETTINGS)


def test_a_missing_shard_is_named(folder):
    shards(folder)[-1].unlink()
    with pytest.raises(BadModelFolder, match="which its index names"):
        prescope.load(folder, **SETTINGS)


@pytest.mark.parametrize("experts", ["auto", "int8"])
def test_a_missing_index_is_named(folder, experts):
    """Fetched by hand, it is the file that one forgets."""
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(
        BadModelFolder, match=r"model-00001-of-.* more and no model\.safetensors\.index\.json"
    ):
        prescope.load(folder, experts=experts, **SETTINGS)


def test_weights_by_another_name_are_told_with_the_one_that_is_read(folder):
    """Mistral's own layout has such a file, alone or beside transformers'."""
    (folder / "model.safetensors.index.json").unlink()
    for shard in shards(folder)[1:]:
        shard.unlink()
    shards(folder)[0].rename(folder / "consolidated.safetensors")
    with pytest.raises(
        BadModelFolder, match=r"has consolidated\.safetensors, and what is read is model\.safetensors"
    ):
        prescope.load(folder, **SETTINGS)
    with pytest.raises(BadModelFolder, match=r"is read is model\.fp16\.safetensors"):
        prescope.load(folder, variant="fp16", **SETTINGS)


def test_missing_weights_are_an_error_and_not_random(folder):
    """transformers fills absent weights with random numbers and a warning: the text would be garbage."""
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"] = 4
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadModelFolder, match=r"lacks \d+ weights"):
        prescope.load(folder, **SETTINGS)


@pytest.mark.parametrize(
    ("entry", "number", "said"),
    [
        ("num_local_experts", 16, r"mlp\..*\(8, .* in the files and \(16, .* by the config"),
        ("vocab_size", 77, r"\(77, 32\) by the config"),
        ("hidden_size", 48, r"in the files and .*48.* by the config"),
    ],
)
def test_weights_of_other_shapes_than_the_config_says_are_told_with_both(folder, entry, number, said):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    assert entry in config
    file.write_text(json.dumps(config | {entry: number}))
    with pytest.raises(BadModelFolder, match=said):
        prescope.load(folder, **SETTINGS)


def test_an_unknown_family_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "moe_from_next_year"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadModelFolder, match="update transformers"):
        prescope.load(folder, **SETTINGS)


def test_a_folder_without_weights_or_config_is_refused(folder, tmp_path):
    for shard in shards(folder):
        shard.unlink()
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(BadModelFolder, match=r"no \*\.safetensors"):
        prescope.load(folder, **SETTINGS)
    with pytest.raises(BadModelFolder, match=r"no config\.json"):
        prescope.load(tmp_path, **SETTINGS)


def test_a_dense_model_is_refused_before_its_weights_are_read(tmp_path, monkeypatch):
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1
        )
    ).save_pretrained(tmp_path)
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", lambda *a, **k: pytest.fail("read"))
    with pytest.raises(NotAMoE):
        prescope.load(tmp_path, **SETTINGS)


def test_too_few_slots_are_refused_before_the_weights_are_read(folder, monkeypatch):
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", lambda *a, **k: pytest.fail("read"))
    with pytest.raises(SlotPoolTooSmall):
        prescope.load(folder, slots=1)


def test_a_trace_of_another_model_is_told_apart():
    """Same shape, other weights: only the fingerprint knows."""
    ids = prompt()
    with (
        prescope.attach(tiny_moe(seed=0), **SETTINGS) as one,
        prescope.attach(tiny_moe(seed=1), **SETTINGS) as other,
    ):
        trace = one.generate(ids, max_new_tokens=3).trace
        trace.check_model(one.fingerprint, one.name)
        with pytest.raises(TraceMismatch):
            trace.check_model(other.fingerprint, other.name)


def test_every_error_is_of_one_family():
    """One `except prescope.errors.PrescopeError` catches all that prescope raises on purpose."""
    assert issubclass(BadModelFolder, PrescopeError)
    assert issubclass(NotAMoE, PrescopeError)


class PinningDevice(NullDevice):
    """Keeps count of what is pinned, as CUDA does, and may refuse the n-th time."""

    def __init__(self, refuse_at: int = -1) -> None:
        super().__init__()
        self.pinned: set[int] = set()
        self._calls = itertools.count()  # two threads pin at a time
        self._refuse_at = refuse_at

    def pin(self, row: torch.Tensor) -> bool:
        if next(self._calls) == self._refuse_at:
            raise UnsupportedOption("the host limits locked memory")
        assert row.data_ptr() not in self.pinned, "pinned twice"
        self.pinned.add(row.data_ptr())
        return True

    def unpin(self, row: torch.Tensor) -> None:
        self.pinned.remove(row.data_ptr())


def attachment(model, device) -> Attachment:
    attached = Attachment(model, find_moe_layers(model), device)
    attached.attach(lambda *arguments: None)
    return attached


@pytest.mark.parametrize("job_bytes", [64, 1000, 1 << 20])
def test_rows_equal_their_sources_however_the_copy_is_cut(job_bytes, monkeypatch):
    """Several threads copy pieces of a row, or of several rows; transposed sources go another way."""
    monkeypatch.setattr(pages, "JOB_BYTES", job_bytes)
    tensors = {
        "up": torch.randn(5, 24, 7).to(torch.bfloat16),
        "up_bias": torch.randn(5, 24),
        "down": torch.randn(5, 11, 24).transpose(1, 2),
    }
    rows = HostLayer(row_layout(tensors), 5, NullDevice())
    rows.fill(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(rows.tensor(name), tensor)
        assert torch.equal(rows.restore(name, torch.device("cpu")), tensor)
    assert all(torch.equal(rows.row(expert), rows.rows[expert]) for expert in range(5))
    rows.close()


@pytest.mark.parametrize("nbytes", [1, 4097, (2 << 20) - 1, 2 << 20, (5 << 20) + 3])
def test_pages_are_zero_and_large_ones_start_on_a_huge_page(nbytes):
    memory = pages.HostPages(nbytes)
    memory.touch()
    assert memory.data.shape == (nbytes,) and not memory.data.any()
    if nbytes >= pages.HUGE_PAGE_BYTES:
        assert memory.data.data_ptr() % pages.HUGE_PAGE_BYTES == 0
    memory.keep_from_children()
    memory.close()


@pytest.mark.parametrize("device_layers", [set(range(LAYERS)), {0}, {1}, {LAYERS - 1}])
def test_pages_prepared_ahead_for_a_gpu_hold_the_right_bytes(device_layers, monkeypatch):
    """Touching writes zeros: it must be over before a layer's bytes come, whichever layers are on the GPU."""
    model, device = tiny_moe(), PinningDevice()
    names = {id(layer.module): rank for rank, layer in enumerate(find_moe_layers(model))}
    owner = {id(p): names[id(m)] for m in model.modules() if id(m) in names for p in m.parameters()}

    def is_on_host(tensors):
        return owner[id(next(iter(tensors.values())))] not in device_layers

    touch = pages.HostPages.touch
    monkeypatch.setattr(pages.HostPages, "touch", lambda self: (time.sleep(0.05), touch(self))[1])
    monkeypatch.setattr("prescope.hf.attach.is_on_host", is_on_host)
    attached = attachment(model, device)
    assert len(device.pinned) == LAYERS
    attached.detach()
    assert not device.pinned
    for name, tensor in tiny_moe().state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_every_pinned_row_is_unpinned_by_detach():
    model, device = tiny_moe(), PinningDevice()
    attached = attachment(model, device)
    assert len(device.pinned) == LAYERS
    attached.detach()
    assert not device.pinned
    for name, tensor in tiny_moe().state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_rows_that_are_dropped_unclosed_are_unpinned():
    """A notebook cell run twice drops an engine without `detach`; its memory must not be freed while registered."""
    device = PinningDevice()
    weights = {"w": torch.ones(2, 300)}
    rows = HostLayer(row_layout(weights), 2, device)
    rows.fill(weights)
    assert device.pinned
    del rows
    gc.collect()
    assert not device.pinned


@pytest.mark.parametrize("refuse_at", range(LAYERS))
def test_a_refused_pin_leaves_the_model_as_it_was_and_nothing_pinned(refuse_at):
    """Pinning runs beside the copies, so a refusal comes when later layers have been filled already."""
    model, device = tiny_moe(), PinningDevice(refuse_at)
    with pytest.raises(UnsupportedOption, match="locked memory"):
        attachment(model, device)
    assert not device.pinned
    for name, tensor in tiny_moe().state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    ids = prompt()
    assert plain_tokens(model, ids) == plain_tokens(tiny_moe(), ids)


def test_a_layers_originals_are_gone_before_the_next_is_copied(monkeypatch):
    """The peak of host memory is the model plus one layer, on the way in and on the way out."""
    model = tiny_moe()
    layers = find_moe_layers(model)
    parameters = [list(layer.module.parameters()) for layer in layers]
    live: list[int] = []

    def count() -> None:
        live.append(sum(any(p.numel() for p in of_layer) for of_layer in parameters))

    copy, restore = HostLayer.copy, HostLayer.restore
    monkeypatch.setattr(HostLayer, "copy", lambda self, tensors: (count(), copy(self, tensors))[1])
    monkeypatch.setattr(HostLayer, "restore", lambda self, *of: (count(), restore(self, *of))[1])
    attached = Attachment(model, layers, NullDevice())
    attached.attach(lambda *arguments: None)
    assert live == [3, 2, 1]
    live.clear()
    open_rows = list(attached.host.layers)
    closed: list[int] = []
    close = HostLayer.close
    monkeypatch.setattr(HostLayer, "close", lambda self: (closed.append(len(live)), close(self))[1])
    attached.detach()
    assert closed[:LAYERS] == [2, 4, 6], "each layer's rows are closed as soon as its two weights are back"
    assert all(rows.rows.numel() == 0 for rows in open_rows)
