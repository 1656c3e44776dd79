"""Loading a folder: what is wrong with it is said before anything is built on it."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import prescope
from prescope.errors import BadModelFolder, NotAMoE, PrescopeError, SlotPoolTooSmall, TraceMismatch
from tests.models import plain_tokens, prompt, tiny_moe

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


def test_the_dtype_can_be_chosen(folder):
    with prescope.load(folder, dtype=torch.bfloat16, **SETTINGS) as engine:
        assert engine.hardware()["dtype"] == "bfloat16"
        assert engine.shape.row_bytes == 3 * 32 * 24 * 2


@pytest.mark.parametrize("name", ["no/such/folder", "./nowhere", "justaname"])
def test_a_folder_that_is_not_there_is_named(name):
    with pytest.raises(BadModelFolder, match=name):
        prescope.load(name, **SETTINGS)


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


def test_missing_weights_are_an_error_and_not_random(folder):
    """transformers fills absent weights with random numbers and a warning: the text would be garbage."""
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"] = 4
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadModelFolder, match=r"lacks \d+ weights"):
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
    monkeypatch.setattr(
        "prescope.hf.load.AutoModelForCausalLM.from_pretrained", lambda *a, **k: pytest.fail("read")
    )
    with pytest.raises(NotAMoE):
        prescope.load(tmp_path, **SETTINGS)


def test_too_few_slots_are_refused_before_the_weights_are_read(folder, monkeypatch):
    monkeypatch.setattr(
        "prescope.hf.load.AutoModelForCausalLM.from_pretrained", lambda *a, **k: pytest.fail("read")
    )
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
