"""Advice on packed checkpoints counts the rows that the engine makes of them, to the byte, before anything is read."""

import pytest

import prescope
from prescope.advice import ModelSize
from prescope.hf import formats_said
from prescope.weights.formats import Fp8, Int4
from tests.support.models import tiny_moe
from tests.support.packed_checkpoints import (
    FP8,
    GPTQ,
    LAYOUTS,
    compressed,
    edit_config,
    group,
    is_packed,
    mixed,
    write,
)

COLUMNS = {"up": 64, "down": 96}
INT4 = compressed("pack-quantized", num_bits=4, type="int", group_size=32, symmetric=True)


def engine_row_bytes(folder) -> int:
    with prescope.load(folder, slots=8, device="null") as engine:
        return engine.shape.row_bytes


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_row_has_the_bytes_that_it_has_in_the_engine(layout, tmp_path):
    """gpt-oss has biases; a layer in int8 beside one in int4 needs slots that hold either."""
    write(layout, tmp_path)
    assert ModelSize.of(tmp_path).shape.row_bytes == engine_row_bytes(tmp_path)


@pytest.mark.parametrize("form", ["int8", "int4", "mxfp4"])
def test_biases_of_experts_that_will_be_packed_are_counted(form, tmp_path):
    build, _, _ = LAYOUTS["gpt-oss mxfp4"]
    build().save_pretrained(tmp_path)
    with prescope.load(tmp_path, slots=8, device="null", experts=form) as engine:
        assert ModelSize.of(tmp_path, form).shape.row_bytes == engine.shape.row_bytes


def test_advice_on_an_engine_says_how_its_experts_are_packed(tmp_path):
    """As advice on a config does: that the numbers are lossy above all."""
    tiny_moe(hidden_size=64, moe_intermediate_size=32).save_pretrained(tmp_path)
    with prescope.load(tmp_path, slots=8, device="null", experts="int4") as engine:
        size, advice = ModelSize.of_engine(engine), prescope.advise(engine)
        notes = size.notes
        assert "int4 experts (lossy)" in repr(advice) and "int4 experts (lossy)" in size.name
        assert "int4 experts (lossy)" in repr(prescope.advise(tmp_path, experts="int4"))
        assert any("packed to int4 while they are loaded, which is lossy" in note for note in notes)
        assert set(ModelSize.of(tmp_path, "int4").notes) <= set(notes)
    with prescope.load(tmp_path, slots=8, device="null") as engine:
        assert not ModelSize.of_engine(engine).notes


@pytest.mark.parametrize(
    ("kept", "left_plain", "words"),
    [
        ("self_attn", ["model.layers.0.mlp", "model.layers.1.mlp", "model.layers.2.mlp"], "3 of 3 layers"),
        (
            "layers.1.mlp",
            ["lm_head", "model.layers.0.mlp.experts", "model.layers.2.mlp.experts"],
            "2 of 3 layers",
        ),
    ],
)
def test_experts_that_a_checkpoint_leaves_plain_are_counted_plain(kept, left_plain, words, tmp_path):
    write("qwen3 fp8", tmp_path, lambda name: is_packed(name) and kept in name)
    edit_config(tmp_path, quantization_config=FP8 | {"modules_to_not_convert": left_plain})
    size = ModelSize.of(tmp_path)
    assert size.shape.row_bytes == engine_row_bytes(tmp_path)
    assert any(words in note for note in size.notes)
    assert not any("packed experts are counted" in note for note in size.notes)


def each(names: str, layers: int = 3, experts: int = 8) -> list[str]:
    """Every expert by its own name, as llm-compressor writes them down."""
    return [names.format(layer, expert) for layer in range(layers) for expert in range(experts)]


@pytest.mark.parametrize(
    "said",
    [
        INT4 | {"ignore": ["lm_head", "re:.*mlp.experts.*"]},
        INT4 | {"ignore": ["re:.*experts"]},
        INT4 | {"ignore": each("model.layers.{}.mlp.experts.{}.gate_proj")},
        INT4 | {"ignore": each("language_model.model.layers.{}.mlp.experts.{}.gate_proj")},
        INT4 | {"ignore": each("model.layers.{}.block_sparse_moe.experts.{}.w1")},
        mixed(group_0=group("pack-quantized", r"re:.*self_attn\..*", num_bits=4, type="int", group_size=32)),
        FP8 | {"modules_to_not_convert": ["model.layers.*.mlp.experts"]},
        FP8 | {"modules_to_not_convert": ["mlp"]},
        FP8 | {"ignored_layers": ["gate_proj", "up_proj", "down_proj"]},
        GPTQ | {"dynamic": {r"-:.*mlp\.experts.*": {}}},
        {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.mlp.experts"]},
    ],
)  # fmt: skip
def test_every_tools_way_to_leave_experts_plain_is_understood(said):
    assert formats_said(said, COLUMNS, [0, 2]) == [None, None]


@pytest.mark.parametrize(
    ("said", "form"),
    [
        (INT4 | {"ignore": ["lm_head", "re:.*mlp.gate$", "re:.*shared_expert.*", "re:.*block_sparse_moe.gate"]}, Int4),
        (INT4 | {"ignore": ["model.layers.10.mlp.experts.0.gate_proj", "re:visual.*"]}, Int4),
        (FP8 | {"modules_to_not_convert": ["model.layers.*.mlp.gate", "gate", "lm_head", "model.layers.20"]}, Fp8),
        (FP8 | {"modules_to_not_convert": None, "ignored_layers": []}, Fp8),
        (GPTQ | {"dynamic": {r"-:.*self_attn.*": {}, r"+:.*experts.*": {"bits": 4}}}, Int4),
    ],
)  # fmt: skip
def test_what_else_is_left_plain_leaves_experts_packed(said, form):
    """A router is called `gate`, and is no part of `gate_proj`; layer 2 is no part of layer 20."""
    (formats,) = formats_said(said, COLUMNS, [2])
    assert {type(one) for one in formats.values()} == {form}


@pytest.mark.parametrize(
    ("rules", "group"),
    [
        ({r"+:.*self_attn.*": {"group_size": 64}}, 32),
        ({r"+:.*experts.*": {"group_size": 16}, r"-:.*mlp\.gate$": {}}, 16),
        ({r".*down_proj": {"group_size": 16}, r".*layers\.2\..*experts.*": {"group_size": 8}}, 8),
        ({r"+:.*experts.*": {"bits": 4}, r"+:.*o_proj": {"group_size": -1}}, 32),
    ],
)  # fmt: skip
def test_a_rule_of_gptq_on_some_modules_is_not_taken_for_one_on_experts(rules, group):
    (formats,) = formats_said(GPTQ | {"dynamic": rules}, COLUMNS, [2])
    assert {one.group for one in formats.values()} == {group}


def test_a_list_of_thousands_of_experts_is_read_at_once(tmp_path):
    """Each expert of 94 layers stands there by its name: tried one by one they were millions of patterns."""
    names = each("model.layers.{}.mlp.experts.{}.gate_proj", 94, 384)
    found = formats_said(INT4 | {"ignore": names}, COLUMNS, range(95))
    assert [formats is None for formats in found] == [True] * 94 + [False]


@pytest.mark.parametrize("listed", [7, ["re:("], {"a": 1, "[": 2}])
def test_a_list_that_is_none_is_said(listed, tmp_path):
    tiny_moe().save_pretrained(tmp_path)
    edit_config(tmp_path, quantization_config=FP8 | {"modules_to_not_convert": listed})
    assert any("malformed" in note for note in ModelSize.of(tmp_path).notes)
