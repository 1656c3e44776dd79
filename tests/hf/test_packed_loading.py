"""Loading packed checkpoints, and packing plain ones: what is said, what is kept, what is refused before it is read."""

import json
import re
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import prescope
from prescope.advice import ModelSize
from prescope.errors import BadModelFolder, NotEnoughMemory, UnsupportedExperts, UnsupportedOption
from prescope.hf import HostParameter
from prescope.hf.arguments import Source
from prescope.hf.load import load_model
from prescope.hf.moe_layers import find_moe_layers
from prescope.hf.packed import packed_on_load
from prescope.hf.packed.checkpoint import Checkpoint
from prescope.hf.packed.in_files import FromFiles
from prescope.hf.packed.integers import bytes_of
from prescope.hf.packed.methods import groups_of
from prescope.hf.packed.published import matrices_in
from tests.support import families
from tests.support.distances import distance
from tests.support.models import plain_tokens, prompt, tiny_moe
from tests.support.packed_checkpoints import (
    EXPERTS,
    FP8,
    HIDDEN,
    LAYOUTS,
    WIDTH,
    compressed,
    compressed_int4,
    edit_config,
    fp8_block,
    fp8_blocks,
    int4_groups,
    int8_words,
    int_bytes,
    is_packed,
    mixed,
    mxfp4_words,
    some_zeros,
    words_of,
    write,
)

pytestmark = pytest.mark.filterwarnings("ignore:experts on the CPU run on torch")
TOLERANCE = 1e-5
load = partial(prescope.load, dtype="float32", device="cpu", link_gb_per_s=50.0)
INT4_OF_8 = compressed(
    "pack-quantized", num_bits=4, type="int", strategy="group", group_size=8, symmetric=True
)


def grouped(group: int) -> dict:
    """Groups of compressed-tensors with so many weights to a scale."""
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": group, "symmetric": True}
    return {"group_0": {"targets": ["Linear"], "weights": weights}}


@pytest.fixture(scope="module")
def fp8(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fp8")
    return folder, write("qwen3 fp8", folder)


def test_what_is_packed_and_what_is_unpacked_is_said_everywhere(fp8):
    folder, _ = fp8
    with load(folder, slots=8) as engine:
        assert "3 of 3 MoE layers stay packed in fp8" in engine.reasons["experts"]
        assert "12 other packed matrices are unpacked to float32" in engine.reasons["experts"]
        assert engine.reasons["experts"] in repr(engine) and engine.reasons["experts"] in engine._repr_html_()
        run = engine.generate(prompt(), max_new_tokens=3)
        assert run.config["expert_form"] == "fp8" and run.config["lossy"] is False
        assert "fp8 experts" in run.label and "lossy" not in run.label


def test_slots_in_bytes_are_counted_in_packed_rows(fp8):
    """A row: 2 x 96 x 64 and 64 x 96 bytes, and 6 x 1 and 1 x 1 scales, in steps of 256 bytes."""
    folder, _ = fp8
    with load(folder, slots="400KiB") as engine:
        assert engine.shape.row_bytes == 192 * 64 + 64 * 96 + 2 * 256
        assert engine.num_slots == 400 * 1024 // engine.shape.row_bytes
        assert engine.expert_size == (engine.shape.row_bytes, 64, 96)


@pytest.mark.parametrize("form", ["int8", "fp8", "int4", "mxfp4"])
def test_packing_at_load_is_marked_lossy_and_computes_with_what_it_packed(tmp_path, form):
    model = tiny_moe(hidden_size=64, moe_intermediate_size=32)
    model.save_pretrained(tmp_path)
    ids, threads = prompt(3), torch.get_num_threads()
    with load(tmp_path, slots=8, experts=form) as engine, torch.no_grad():
        assert torch.get_num_threads() == threads, "packing takes one thread of torch's for each expert"
        run = engine.generate(ids, max_new_tokens=4)
        for layer, held, own in zip(
            engine.layers, engine.runner.host.layers, model.model.layers, strict=True
        ):
            for name in layer.weight_names:
                weight = own.mlp.experts.get_parameter(name)
                matrices = layer.layout.matrices(held.rows, name)
                packed = torch.stack([matrices[expert] for expert in range(EXPERTS)])
                assert 0 < (packed - weight).abs().max() < 0.2 * weight.abs().max()
                weight.copy_(packed)
        assert distance(engine.model(ids).logits, model(ids).logits) < TOLERANCE
        engine.check_integrity()
    assert run.tokens == plain_tokens(model, ids, 4)
    assert run.config["lossy"] is True and run.config["experts"] == form
    assert f"{form} experts (lossy)" in run.label and f"{form} experts (lossy)" in repr(run)
    assert f"{form} experts (lossy)" in run.trace.model


@pytest.mark.parametrize(
    "name",
    ["aria", "ernie4_5_vl_moe", "gpt_oss", "granitemoe", "muse_spark", "nemotron_h", "openai_privacy_filter"],
)
def test_every_kind_of_family_can_be_packed_at_load(tmp_path, name):
    """Stored (in, out), two modules a layer, gate and up in turns, a norm behind, no gate: weights that int8 holds
    exactly give the plain model's logits.
    """
    if name not in families.FAMILIES:
        pytest.skip(f"the installed transformers has no {name}")
    plain = families.build(name)
    with torch.no_grad():
        for module in families.experts_modules(plain).values():
            for weight in (module._parameters.get(key) for key in ("gate_up_proj", "up_proj", "down_proj")):
                if weight is not None:
                    rows = weight.mT if module.is_transposed else weight
                    whole = (rows * 60).round().clamp(-126, 126)
                    whole[..., 0] = 127
                    rows.copy_(whole / 254)
    plain.save_pretrained(tmp_path)
    inputs = families.prompts(2)
    with load(tmp_path, slots=0.5, experts="int8") as engine:
        found = families.logits(engine.model, name, inputs)
    assert distance(found, families.logits(plain, name, inputs)) < TOLERANCE


def test_fp8_experts_that_are_stored_inputs_first_are_turned(tmp_path):
    """As Qwen3-VL's are: (E, D, 2F) and (E, F, D), with scales that lie likewise."""
    config = families.tiny_config(families.FAMILIES["qwen3_vl_moe"])
    config.text_config.moe_intermediate_size = 24
    plain = families.model_class(families.FAMILIES["qwen3_vl_moe"])(config).eval()
    families.randomise(plain, seed=0)
    plain.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name, weight in list(tensors.items()):
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            weight = (
                weight
                if weight.shape[1] == {"gate_up_proj": 32, "down_proj": 24}[name.split(".")[-1]]
                else weight.mT
            )
            inputs, outputs = weight.shape[1:]
            scale = torch.rand(len(weight), -(-inputs // 16), -(-outputs // 8), generator=generator) + 0.5
            spread = scale.repeat_interleave(16, 1)[:, :inputs].repeat_interleave(8, 2)[:, :, :outputs]
            tensors[name] = (weight / spread).to(torch.float8_e4m3fn).contiguous()
            tensors[f"{name}_scale_inv"] = scale
            with torch.no_grad():
                plain.get_parameter(name).copy_((tensors[name].float() * spread).mT)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    edit_config(tmp_path, quantization_config={"quant_method": "fp8", "weight_block_size": [16, 8]})
    inputs = families.prompts(2)
    with load(tmp_path, slots=8) as engine:
        found = families.logits(engine.model, "qwen3_vl_moe", inputs)
        assert engine.form == "fp8"
    assert distance(found, families.logits(plain, "qwen3_vl_moe", inputs)) < TOLERANCE


@pytest.mark.parametrize("name", ["diffusion_gemma", "granitemoeshared", "minimax_m3_vl", "mistral4"])
def test_fp8_experts_in_one_tensor_of_a_layer_find_their_place_in_every_kind_of_family(tmp_path, name):
    """Under the name of a decoder that is tied to an encoder, under names of a family's own, inside a larger model."""
    if name not in families.FAMILIES:
        pytest.skip(f"the installed transformers has no {name}")
    plain = families.build(name)
    plain.save_pretrained(tmp_path)
    values = load_file(tmp_path / "model.safetensors")
    packed = dict(values)
    for key, weight in values.items():
        if weight.dim() != 3 or not any(part in key for part in ("experts", "moe")):
            continue
        scale = weight.abs().amax((1, 2), keepdim=True) / 448
        packed[key] = (weight / scale).to(torch.float8_e4m3fn)
        packed[f"{key}_scale_inv"] = scale
        values[key] = packed[key].float() * scale
    save_file(values, tmp_path / "model.safetensors", {"format": "pt"})
    plain = type(plain).from_pretrained(tmp_path, dtype=torch.float32).eval()
    save_file(packed, tmp_path / "model.safetensors", {"format": "pt"})
    edit_config(tmp_path, quantization_config=LAYOUTS["qwen3 fp8"][2])
    inputs = families.prompts(2)
    with load(tmp_path, slots=0.5) as engine:
        found = families.logits(engine.model, name, inputs)
        assert engine.form == "fp8" and all(layer.layout.packing for layer in engine.layers)
    assert distance(found, families.logits(plain, name, inputs)) < TOLERANCE


@pytest.mark.parametrize("experts", ["auto", "plain"])
@pytest.mark.parametrize("pack", ["fp8", "int4"])
@pytest.mark.parametrize("name", ["gemma4", "gpt_oss", "openai_privacy_filter", "qwen3_vl_moe"])
def test_linears_of_single_experts_find_their_place_in_families_that_publish_them_in_one_tensor(
    tmp_path, name, pack, experts
):
    """Tools that pack linears take such tensors apart. Gate and up may be in turns there, inputs first, with biases;
    the first layer's are left plain.
    """
    if name not in families.FAMILIES:
        pytest.skip(f"the installed transformers has no {name}")
    plain, rng = families.build(name), np.random.default_rng(0)
    plain.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    published = {int(layer): stem for stem, layer in experts_of(tensors)}
    one = fp8_block if pack == "fp8" else compressed_int4(False, 8)
    for layer, (module_name, module) in enumerate(families.experts_modules(plain).items()):
        stem = published[int(re.search(r"\.(\d+)\.", module_name)[1])]
        tensors = {key: value for key, value in tensors.items() if not key.startswith(f"{stem}.")}
        for expert, linear, weight, bias in linears(module, in_turns=name == "gpt_oss"):
            key = f"{stem}.{expert}.{linear}"
            packed, values = (
                one(weight.clone().float(), rng) if layer else ({".weight": weight.clone()}, weight)
            )
            weight.copy_(values)
            tensors |= {key + suffix: tensor for suffix, tensor in packed.items()}
            if bias is not None:
                tensors[f"{key}.bias"] = bias.clone()
    save_file(
        {key: value.contiguous() for key, value in tensors.items()},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    config = LAYOUTS["qwen3 fp8"][2] if pack == "fp8" else INT4_OF_8
    edit_config(tmp_path, quantization_config=config)
    inputs = families.prompts(2)
    with load(tmp_path, slots=8, experts=experts) as engine:
        found = families.logits(engine.model, name, inputs)
        assert engine.reasons["experts"].startswith("2 of 3" if experts == "auto" else "all 48 packed")
    assert distance(found, families.logits(plain, name, inputs)) < TOLERANCE


def experts_of(names) -> set[tuple[str, str]]:
    """What the names of a layer's experts begin with, and the layer."""
    found = (re.fullmatch(r"(.*\.(\d+)\..*experts)\.(?:gate_up|down)_proj", name) for name in names)
    return {match.groups() for match in found if match}


@torch.no_grad()
def linears(module, in_turns: bool):
    """Expert, name, weight (out, in) and bias of all linears of an experts module, as views of its parameters."""
    for expert in range(module.num_experts):
        for name in ("gate_up_proj", "down_proj"):
            weight, bias = module.get_parameter(name).data[expert], getattr(module, f"{name}_bias", None)
            weight = weight.mT if module.is_transposed else weight
            bias = None if bias is None else bias.data[expert]
            if name == "down_proj":
                yield expert, name, weight, bias
                continue
            half = len(weight) // 2
            for at, part in enumerate(("gate_proj", "up_proj")):
                rows = slice(at, None, 2) if in_turns else slice(at * half, (at + 1) * half)
                yield expert, part, weight[rows], None if bias is None else bias[rows]


@pytest.mark.parametrize("layout", ["deepseek fp8", "mixtral awq", "gpt-oss mxfp4"])
def test_a_packed_checkpoint_can_be_unpacked_whole(tmp_path, layout):
    """Then it is an ordinary model, also after its engine."""
    plain = write(layout, tmp_path).requires_grad_(False)
    ids = prompt(2)
    wanted = plain(ids).logits
    with load(tmp_path, slots=8, experts="plain") as engine:
        engine.model.requires_grad_(False)
        assert engine.form == "" and not engine.is_lossy and engine.shape.row_bytes > 4 * 3 * 64 * 64
        assert "unpacked to float32" in engine.reasons["experts"]
        assert distance(engine.model(ids).logits, wanted) < TOLERANCE
    assert distance(engine.model(ids).logits, wanted) < TOLERANCE


def test_gradients_pass_packed_experts(fp8):
    folder, plain = fp8
    found = []
    with load(folder, slots=8) as engine:
        for model in (plain, engine.model):
            embeddings = model.get_input_embeddings()(prompt()).detach().requires_grad_()
            model.requires_grad_(False)
            model(inputs_embeds=embeddings).logits.sum().backward()
            found.append(embeddings.grad)
    assert distance(found[1], found[0]) < 1e-4


def test_a_calibration_measures_packed_rows(fp8):
    folder, _ = fp8
    with load(folder, slots=8) as engine:
        profile = prescope.calibrate(engine, seconds=0.5, save=False)
        sizes = {point.of.expert for point in profile.points if point.of.kind in ("cpu", "gpu")}
        assert sizes == {engine.expert_size}


# -- life and memory ---------------------------------------------------------------------------------------------


def test_after_its_engine_the_model_says_where_its_experts_are(fp8):
    folder, _ = fp8
    engine = load(folder, slots=8)
    model = engine.model
    assert type(model.model.layers[0].mlp.experts.down_proj) is HostParameter
    engine.close()
    with pytest.raises(UnsupportedExperts, match="load it again"):
        model(prompt())
    with pytest.raises(UnsupportedExperts, match="load it again"):
        prescope.attach(model, slots=8, device="cpu")


def test_experts_that_are_not_packed_in_the_files_stay_plain(tmp_path):
    """`modules_to_not_convert`: one layer of the three, and all attention."""
    plain = write("qwen3 fp8", tmp_path, lambda name: is_packed(name) and "layers.1.mlp" in name)
    with load(tmp_path, slots=8) as engine, torch.no_grad():
        assert [layer.layout.packing is None for layer in engine.layers] == [True, False, True]
        assert "1 of 3 MoE layers stay packed" in engine.reasons["experts"]
        ids = prompt(2)
        assert distance(engine.model(ids).logits, plain(ids).logits) < TOLERANCE


@pytest.mark.parametrize("layout", ["deepseek fp8", "glm int4 zeros"])
def test_weights_of_a_layer_that_predicts_further_tokens_are_left_out_and_counted_apart(tmp_path, layout):
    """DeepSeek's and GLM's files have a layer more than the model: it is neither unpacked nor said to be."""
    plain = write(layout, tmp_path)
    whole = load_file(tmp_path / "model.safetensors")
    more = {
        name.replace("layers.2.", "layers.3."): whole[name].clone() for name in whole if "layers.2." in name
    }
    save_file(whole | more, tmp_path / "model.safetensors", {"format": "pt"})
    with load(tmp_path, slots=8) as engine, torch.no_grad():
        assert "; 21 other packed matrices are unpacked to float32" in engine.reasons["experts"]
        assert "; 31 more have no place in this model" in engine.reasons["experts"]
        assert distance(engine.model(prompt()).logits, plain(prompt()).logits) < TOLERANCE


def test_matrices_beside_the_experts_are_held_against_their_scales_before_weights_are_read(
    tmp_path, monkeypatch
):
    write("qwen3 int4", tmp_path)
    change(
        tmp_path,
        lambda name, tensor: tensor[:-1] if name.endswith("2.self_attn.o_proj.weight_scale") else tensor,
    )
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", lambda *a, **k: pytest.fail("read"))
    with pytest.raises(
        UnsupportedExperts, match=r"layers\.2\.self_attn\.o_proj .* scale is BF16 of shape \(63, 2\)"
    ):
        load(tmp_path, slots=8)


def test_experts_that_are_split_from_one_list_are_refused_as_such(tmp_path):
    """ERNIE's files number the experts of text and of images in one row: nothing of them is missing."""
    if "ernie4_5_vl_moe" not in families.FAMILIES:
        pytest.skip("the installed transformers has no ernie4_5_vl_moe")
    families.build("ernie4_5_vl_moe").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name in [name for name in tensors if ".experts." in name]:
        scale = name.replace(".weight", ".weight_scale_inv")
        tensors |= {name: tensors[name].to(torch.float8_e4m3fn), scale: torch.ones(1, 1)}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    edit_config(tmp_path, quantization_config=LAYOUTS["qwen3 fp8"][2])
    with pytest.raises(UnsupportedExperts, match="is made by ErnieFuseAndSplitTextVisionExperts"):
        load(tmp_path, slots=8)


@pytest.mark.parametrize("is_named", [True, False])
def test_each_module_is_read_as_the_group_that_names_it_most_directly(tmp_path, is_named):
    """A name before a pattern before a class, whatever the order of the groups; 4 and 8 bits have the same tensors."""
    plain = write("glm int4 beside int8", tmp_path)
    groups = LAYOUTS["glm int4 beside int8"][2]["config_groups"]
    four, eight = groups["group_0"], groups["group_1"]
    if is_named:
        experts = [f"model.layers.2.mlp.experts.{expert}" for expert in range(EXPERTS)]
        names = [f"{expert}.{part}_proj" for expert in experts for part in ("gate", "up", "down")]
        four, eight = four | {"targets": ["re:.*proj"]}, eight | {"targets": names}
    edit_config(tmp_path, quantization_config=mixed(a=eight, b=four))
    with load(tmp_path, slots=8) as engine, torch.no_grad():
        assert [layer.layout.packing.name for layer in engine.layers] == ["int4", "int8"]
        assert distance(engine.model(prompt()).logits, plain(prompt()).logits) < TOLERANCE


def test_a_layer_in_two_formats_is_refused_and_can_be_unpacked(tmp_path, monkeypatch):
    packs = {"down_proj": int8_words, "proj": compressed_int4(False)}
    four, eight = LAYOUTS["glm int4 beside int8"][2]["config_groups"].values()
    config = mixed(a=four, b=eight | {"targets": ["re:.*down_proj"]})
    monkeypatch.setitem(LAYOUTS, "two", (LAYOUTS["qwen3 int4"][0], packs, config))
    plain = write("two", tmp_path)
    with pytest.raises(UnsupportedExperts, match="int4 and int8; one format a layer"):
        load(tmp_path, slots=8)
    with load(tmp_path, slots=8, experts="plain") as engine, torch.no_grad():
        assert distance(engine.model(prompt()).logits, plain(prompt()).logits) < TOLERANCE


def test_a_checkpoint_in_several_files_is_read_from_all(tmp_path):
    plain = write("deepseek fp8", tmp_path)
    split(tmp_path, 3)
    with load(tmp_path, slots=8) as engine, torch.no_grad():
        assert distance(engine.model(prompt()).logits, plain(prompt()).logits) < TOLERANCE


def split(folder, num_files: int) -> None:
    whole = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(whole)
    files = {
        name: f"model-{i % num_files + 1:05d}-of-{num_files:05d}.safetensors" for i, name in enumerate(names)
    }
    for file in set(files.values()):
        save_file(
            {name: whole[name] for name in names if files[name] == file}, folder / file, {"format": "pt"}
        )
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_tensor_belongs_to_one_matrix_or_is_plain(tmp_path, layout):
    """What a tool writes of activations too: else transformers reports it as unexpected, matrix by matrix."""
    write(layout, tmp_path)
    entries = Checkpoint([tmp_path / "model.safetensors"]).entries
    matrices = matrices_in(groups_of(LAYOUTS[layout][2]), entries)
    names = [name for matrix in matrices for name in matrix.names.values()]
    assert len(names) == len(set(names)) and len(matrices) == len({matrix.weight for matrix in matrices})
    plain = entries.keys() - set(names)
    assert {name.rpartition(".")[2] for name in plain} <= {
        "weight", "bias", "sinks", "e_score_correction_bias", "gate_up_proj_bias", "down_proj_bias"
    }  # fmt: skip


def test_experts_in_one_tensor_of_a_layer_are_read_too(tmp_path):
    """As transformers keeps FP8 experts: (E, 2F, D) with scales (E, 2F / 128, D / 128)."""
    plain = write("qwen3 fp8", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    experts = {name: tensors.pop(name) for name in list(tensors) if ".experts." in name}
    for layer in range(3):
        prefix = f"model.layers.{layer}.mlp.experts"
        for parameter, parts in (("gate_up_proj", ["gate_proj", "up_proj"]), ("down_proj", ["down_proj"])):
            wide = [
                torch.cat([wide_rows(experts, f"{prefix}.{expert}.{part}") for part in parts])
                for expert in range(EXPERTS)
            ]
            tensors[f"{prefix}.{parameter}"] = torch.stack(
                [weight.to(torch.float8_e4m3fn) for weight in wide]
            )
            rows, columns = wide[0].shape
            tensors[f"{prefix}.{parameter}_scale_inv"] = torch.ones(
                EXPERTS, -(-rows // 128), -(-columns // 128)
            )
            with torch.no_grad():
                target = plain.model.layers[layer].mlp.experts.get_parameter(parameter)
                target.copy_(tensors[f"{prefix}.{parameter}"].float())
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with load(tmp_path, slots=8) as engine, torch.no_grad():
        assert engine.form == "fp8"
        assert distance(engine.model(prompt()).logits, plain(prompt()).logits) < TOLERANCE


def test_a_scale_of_a_matrix_that_has_its_inputs_first_is_refused_as_such(tmp_path):
    """gpt-oss computes with (E, in, out): nothing is wrong with such a file, so it need not be fetched again."""
    LAYOUTS["gpt-oss mxfp4"][0]().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        tensors |= {
            name: tensors[name].to(torch.float8_e4m3fn),
            f"{name}_scale_inv": torch.ones(EXPERTS, 1, 1),
        }
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    edit_config(tmp_path, quantization_config={"quant_method": "fp8"})
    with pytest.raises(
        UnsupportedExperts, match=r"inputs first and scales of .* scales of blocks are; load the same"
    ):
        load(tmp_path, slots=8)


def wide_rows(tensors: dict[str, torch.Tensor], stem: str) -> torch.Tensor:
    return tensors[f"{stem}.weight"].float() * 2.0**-9


@pytest.mark.parametrize("named", [None, "own.safetensors", "own.safetensors.index.json"])
def test_of_several_files_those_are_read_that_transformers_would_read(tmp_path, named):
    """What the config names, else one file before an index: here the others are of another model."""
    plain = write("qwen3 int4", tmp_path)
    whole = load_file(tmp_path / "model.safetensors")
    other = {name: torch.ones_like(tensor) for name, tensor in whole.items()}
    save_file(other, tmp_path / "part.safetensors", {"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(whole, "part.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    if named is not None:
        (tmp_path / "model.safetensors").rename(tmp_path / "own.safetensors")
        save_file(other, tmp_path / "model.safetensors", {"format": "pt"})
        index["weight_map"] = dict.fromkeys(whole, "own.safetensors")
        (tmp_path / "own.safetensors.index.json").write_text(json.dumps(index))
        edit_config(tmp_path, transformers_weights=named)
    with load(tmp_path, slots=8) as engine, torch.no_grad():
        assert distance(engine.model(prompt()).logits, plain(prompt()).logits) < TOLERANCE


def test_weights_outside_of_the_folder_are_not_read(tmp_path):
    write("qwen3 int4", tmp_path)
    edit_config(tmp_path, transformers_weights="../model.safetensors")
    with pytest.raises(BadModelFolder, match="outside"):
        load(tmp_path, slots=8)


def test_host_memory_that_does_not_suffice_is_said_before_weights_are_read(fp8, monkeypatch):
    monkeypatch.setattr("prescope.weights.host_pool.available_memory_bytes", lambda: 100_000)
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", lambda *a, **k: pytest.fail("read"))
    with pytest.raises(NotEnoughMemory, match="experts take"):
        load(fp8[0], slots=8)


def test_experts_that_are_read_whole_to_be_packed_are_counted_so(tmp_path, monkeypatch):
    """A pickle is: in float32, before there are rows of 4 bits; 8 x 3 x 64 x 64 numbers in each of 3 layers."""
    model = tiny_moe(hidden_size=64, moe_intermediate_size=64)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    said: list[str] = []
    monkeypatch.setattr("prescope.engine.resolve.PROGRESS_BYTES", 1)
    monkeypatch.setattr("prescope.engine.resolve.tqdm.write", said.append)
    pickled = partial(load, tmp_path, slots=8, experts="int4", use_safetensors=False)
    with pickled() as engine:
        read = sum(tensor.nbytes for layer in engine.layers for tensor in layer.tensors().values())
        packed = sum(layer.nbytes for layer in engine.layers)
    assert read == 4 * 8 * 3 * 64 * 64 * len(engine.layers) > 6 * packed
    assert f"{read / 2**20:.3g} MiB as they are read" in said[0]
    monkeypatch.setattr("prescope.weights.host_pool.available_memory_bytes", lambda: read)
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", lambda *a, **k: pytest.fail("read"))
    with pytest.raises(NotEnoughMemory, match="as they are read"):
        pickled()


def test_experts_of_safetensors_are_packed_without_room_for_all_of_them(tmp_path, monkeypatch):
    tiny_moe(hidden_size=64, moe_intermediate_size=64).save_pretrained(tmp_path)
    said: list[str] = []
    monkeypatch.setattr("prescope.engine.resolve.PROGRESS_BYTES", 1)
    monkeypatch.setattr("prescope.engine.resolve.tqdm.write", said.append)
    read: list[tuple[int, int]] = []
    monkeypatch.setattr(
        "prescope.hf.packed.in_files.FromFiles.of",
        lambda self, experts, of=FromFiles.of: (
            read.append((experts.start, experts.stop)) or of(self, experts)
        ),
    )
    with load(tmp_path, slots=8, experts="int4") as engine:
        packed, layer = sum(layer.nbytes for layer in engine.layers), engine.layers[0]
        monkeypatch.setattr(
            "prescope.weights.host_pool.available_memory_bytes", lambda: packed + layer.nbytes
        )
    assert "as they are read" not in said[0]
    assert sorted(read) == sorted(
        2 * len(engine.layers) * [(expert, expert + 1) for expert in range(EXPERTS)]
    )
    with load(tmp_path, slots=8, experts="int4"):
        pass


@pytest.mark.parametrize(
    "family", ["qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", "qwen3_vl_moe", "ernie4_5_vl_moe"]
)
def test_experts_packed_from_their_files_are_those_packed_in_memory(family, tmp_path):
    """Of single experts, of all in one tensor, with inputs first, with biases; of the last all have to be read."""
    plain = families.build(family)
    plain.save_pretrained(tmp_path)
    layers = load_model(tmp_path, torch.float32, lambda *_: None, Source(), "fp8").layers
    assert all(layer.is_read_whole == (family == "ernie4_5_vl_moe") for layer in layers)
    for layer, held in zip(layers, packed_on_load(find_moe_layers(plain), "fp8"), strict=True):
        assert layer.read_fields is not None and held.read_fields is not None
        found, expected = layer.read_fields(), held.read_fields()
        assert found.keys() == expected.keys()
        for name, field in expected.items():
            assert torch.equal(
                found[name].contiguous().view(torch.uint8), field.contiguous().view(torch.uint8)
            )


@pytest.mark.parametrize("fault", ["missing", "another shape", "another kind"])
def test_plain_experts_that_are_damaged_are_not_packed(fault, tmp_path):
    tiny_moe().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    if fault == "missing":
        del tensors[name]
    else:
        weight = tensors[name]
        tensors[name] = weight[:-1].contiguous() if fault == "another shape" else weight.to(torch.int32)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(BadModelFolder, match=r"experts"):
        load(tmp_path, slots=8, experts="int8")


# -- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "changes", "reason"),
    [
        ("mixtral gptq", {"desc_act": True}, "desc_act=True"),
        ("mixtral gptq", {"bits": 8}, "bits=8"),
        ("mixtral gptq", {"checkpoint_format": "marlin"}, "checkpoint_format='marlin'"),
        ("mixtral gptq", {"format": "bitblas"}, "format='bitblas'"),
        ("mixtral gptq", {"pack_dtype": "int16"}, "pack_dtype='int16'"),
        ("mixtral awq", {"checkpoint_format": "gemv_fast"}, "checkpoint_format='gemv_fast'"),
        ("mixtral awq", {"group_size": "all"}, "malformed"),
        ("qwen3 fp8", {"weight_block_size": 128}, "malformed"),
        ("qwen3 fp8", {"weight_block_size": [128, 0]}, "malformed"),
        ("qwen3 int4", {"config_groups": ["W4A16"]}, "malformed"),
        ("qwen3 int4", {"config_groups": {"group_0": {"targets": ["re:("], "weights": {"num_bits": 4}}}}, "malformed"),
        ("mixtral awq", {"version": "gemv"}, "version='gemv'"),
        ("mixtral awq", {"quant_method": "bitsandbytes"}, "'bitsandbytes' is not one of"),
        ("qwen3 int4", {"format": "marlin-24"}, "'marlin-24'"),
        ("qwen3 int4", {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse"),
        ("qwen3 fp8", {"weight_block_size": [64, 64]}, r"scale is F32 of shape \(1, 1\)"),
        ("mixtral awq", {"group_size": 64}, r"zero is I32 of shape \(2, 12\)"),
        ("qwen3 int4", {"config_groups": grouped(48)}, "2 groups of 48 are no row of 64"),
        ("qwen3 fp8", {"quant_method": "mxfp4"}, "none of .* tensors"),
    ],
)  # fmt: skip
def test_what_is_not_served_is_refused_by_name_before_weights_are_read(
    tmp_path, monkeypatch, layout, changes, reason
):
    write(layout, tmp_path)
    edit_config(tmp_path, quantization_config=LAYOUTS[layout][2] | changes)
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", lambda *a, **k: pytest.fail("read"))
    with pytest.raises((UnsupportedExperts, BadModelFolder), match=reason) as refused:
        load(tmp_path, slots=8)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 500


def transformed(*locations: str) -> dict:
    """What llm-compressor's QuIP and SpinQuant say of the rotations that they put beside the weights."""
    apply = [{"targets": ["Linear"], "location": location, "inverse": False} for location in locations]
    return {"transform_config": {"config_groups": {"R1": {"type": "hadamard", "apply": apply}}}}


@pytest.mark.parametrize("location", ["input", "output"])
def test_weights_that_need_their_activations_turned_are_refused(tmp_path, location):
    """Such weights alone are another model, and nothing in their tensors shows it."""
    write("qwen3 int4", tmp_path)
    said = LAYOUTS["qwen3 int4"][2] | transformed("weight_input", location)
    edit_config(tmp_path, quantization_config=said)
    with pytest.raises(UnsupportedExperts, match=rf"R1, a hadamard transform of {location}s\) is not served"):
        load(tmp_path, slots=8)


@pytest.mark.parametrize(
    "said",
    [
        {"transform_config": {}},
        transformed("weight_input", "weight_output"),
        transformed("q_attn", "k_cache"),
    ],
)
def test_weights_that_hold_their_transforms_are_read(tmp_path, said):
    plain = write("qwen3 int4", tmp_path)
    edit_config(tmp_path, quantization_config=LAYOUTS["qwen3 int4"][2] | said)
    with load(tmp_path, slots=8) as engine, torch.no_grad():
        assert distance(engine.model(prompt()).logits, plain(prompt()).logits) < TOLERANCE


@pytest.mark.parametrize("layout", LAYOUTS)
def test_packed_weights_of_which_the_config_says_nothing_are_refused_before_they_are_read(
    tmp_path, monkeypatch, layout
):
    """As older files of modelopt are, and those whose config.json was made anew: numbers of 8 bits without their scales
    would be a model that talks nonsense.
    """
    write(layout, tmp_path)
    edit_config(tmp_path, quantization_config=None)
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", lambda *a, **k: pytest.fail("read"))
    with pytest.raises(BadModelFolder, match=r"packed matrices \(model\..* no quantization_config"):
        load(tmp_path, slots=8)


def one_zero(weight: torch.Tensor, rng: np.random.Generator):
    """compressed-tensors: one scale and one zero of a matrix."""
    scale, zero = (weight.abs().amax() / 7).bfloat16(), 3
    q = ((weight / scale.float()).round() + 8 + zero).clamp(0, 15)
    packed = {
        ".weight_packed": words_of(q.numpy()),
        ".weight_scale": scale.reshape(1),
        ".weight_zero_point": torch.tensor([zero], dtype=torch.int8),
    }
    return packed, (q - 8 - zero) * scale.float()


def one_group(weight: torch.Tensor, rng: np.random.Generator):
    """AWQ with one scale a row."""
    zeros = some_zeros(weight, weight.shape[1], rng)
    q, scale, values = int4_groups(weight, weight.shape[1], torch.float16, zeros)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    tensors = {
        ".qweight": words_of(q.T, order),
        ".qzeros": words_of(zeros.T, order),
        ".scales": scale.T.contiguous(),
    }
    return tensors, values


def fp4_in_int8(weight: torch.Tensor, rng: np.random.Generator):
    """DeepSeek-V4's experts: MXFP4 in other dtypes, by another name."""
    packed, values = mxfp4_words(weight, rng)
    scale = packed[".weight_scale"].view(torch.float8_e8m0fnu)
    return {".weight": packed[".weight_packed"].view(torch.int8), ".scale": scale}, values


FLOAT = {"num_bits": 8, "type": "float", "symmetric": True}
INT = {"type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
#: How a matrix is packed, what the config says, the form of the rows.
SETTINGS = {
    "int8 of groups": (int_bytes(8, 32), compressed("int-quantized", num_bits=8, **INT), "int8"),
    "6 bits in bytes": (int_bytes(6, 32), compressed("int-quantized", num_bits=6, **INT), "int8"),
    "3 bits in bytes": (int_bytes(3, 32), compressed("naive-quantized", num_bits=3, **INT), "int4"),
    "FP8 of groups": (
        fp8_blocks(1, 32), compressed("float-quantized", strategy="group", group_size=32, **FLOAT), "fp8",
    ),
    "a block as words": (
        fp8_blocks(20, 16), compressed("float-quantized", strategy="block", block_structure="20x16", **FLOAT), "fp8",
    ),
    "a zero of the matrix": (
        one_zero,
        compressed("pack-quantized", num_bits=4, type="int", strategy="tensor", symmetric=False),
        "int4",
    ),
    "scale": (fp8_blocks(128, 128, ".scale"), FP8, "fp8"),
    "qscale_weight": (fp8_blocks(128, 128, ".qscale_weight"), FP8, "fp8"),
    "FP4 beside FP8": (
        {"experts": fp4_in_int8, "proj": fp8_blocks(128, 128, ".scale")}, FP8 | {"expert_dtype": "fp4"}, "mxfp4",
    ),
    "words in capitals": (
        fp8_blocks(1, 32),
        compressed("float-quantized", strategy="GROUP", group_size=32, num_bits=8, type="FLOAT", symmetric=True),
        "fp8",
    ),
    "rows shorter than a group": (one_group, LAYOUTS["mixtral awq"][2] | {"group_size": 128}, "int4"),
}  # fmt: skip


@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_that_the_tools_have_besides_their_usual_ones(tmp_path, monkeypatch, setting):
    pack, config, form = SETTINGS[setting]
    monkeypatch.setitem(LAYOUTS, setting, (LAYOUTS["qwen3 fp8"][0], pack, config))
    plain = write(setting, tmp_path)
    with load(tmp_path, slots=8) as engine, torch.no_grad():
        assert engine.form == form
        assert ModelSize.of(tmp_path).shape.row_bytes == engine.shape.row_bytes
        assert distance(engine.model(prompt(2)).logits, plain(prompt(2)).logits) < TOLERANCE


#: What tools write of activations that are rounded with scales known beforehand, around zeros of their own.
STATIC = {"input_scale": 0.1, "input_zero_point": -12, "output_scale": 0.2, "output_zero_point": 3}


@pytest.mark.parametrize(
    "layout", ["glm int8", "qwen3 int4", "mixtral mxfp4", "qwen3 nvfp4", "glm fp8 channel"]
)
def test_zeros_and_scales_of_activations_are_left_aside(tmp_path, layout):
    """int8 numbers that are no weights: beside each linear, and of the cache of keys and values."""
    plain = write(layout, tmp_path)
    whole = load_file(tmp_path / "model.safetensors")
    stems = [name.rpartition(".")[0] for name in whole if name.endswith("weight_scale")]
    names = {f"{stem}.{name}": value for stem in stems for name, value in STATIC.items()}
    names |= {
        f"model.layers.{i}.self_attn.{part}": 1 for i in range(3) for part in ("k_zero_point", "v_zero_point")
    }
    more = {
        name: torch.tensor([value], dtype=torch.int8 if "zero" in name else None)
        for name, value in names.items()
    }
    save_file(whole | more, tmp_path / "model.safetensors", {"format": "pt"})
    with load(tmp_path, slots=8) as engine, torch.no_grad():
        assert distance(engine.model(prompt()).logits, plain(prompt()).logits) < TOLERANCE
    entries = Checkpoint([tmp_path / "model.safetensors"]).entries
    matrices = matrices_in(groups_of(LAYOUTS[layout][2]), entries)
    assert {name for matrix in matrices for name in matrix.names.values()} >= {
        name for name in more if not name.endswith(("k_zero_point", "v_zero_point"))
    }


def test_a_scale_beside_plain_numbers_is_the_models_own(tmp_path):
    """A router's or a norm's, as families have them."""
    tensors = {
        "norm.weight": torch.ones(4, 4),
        "norm.scale": torch.ones(4),
        "up.weight": torch.ones(4, 4).char(),
    }
    save_file(tensors | {"up.scale": torch.ones(4, 1)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint([tmp_path / "model.safetensors"])
    assert [matrix.stem for matrix in matrices_in(groups_of(FP8), checkpoint.entries)] == ["up"]


def test_numbers_that_need_more_bits_than_the_config_says_are_refused(tmp_path, monkeypatch):
    said = compressed("int-quantized", num_bits=4, **INT)
    monkeypatch.setitem(LAYOUTS, "wide", (LAYOUTS["qwen3 fp8"][0], int_bytes(8, 32), said))
    write("wide", tmp_path)
    with pytest.raises(
        UnsupportedExperts, match=r"gate_proj holds numbers from -\d+ to \d+: more than 4 bits"
    ):
        load(tmp_path, slots=8)


def test_numbers_of_8_bits_without_scales_are_numbers(tmp_path):
    """A model that was cast, and not packed."""
    build = LAYOUTS["qwen3 fp8"][0]
    build().save_pretrained(tmp_path)
    change(tmp_path, lambda name, tensor: tensor.to(torch.float8_e4m3fn) if is_packed(name) else tensor)
    plain = type(build()).from_pretrained(tmp_path, dtype=torch.float32).eval()
    with load(tmp_path, slots=8) as engine, torch.no_grad():
        assert distance(engine.model(prompt()).logits, plain(prompt()).logits) < TOLERANCE


@pytest.mark.parametrize("key", ["checkpoint_format", "format"])
@pytest.mark.parametrize("said", ["gptq_v2", "GPTQ_V2"])
def test_zeros_of_gptqs_second_format_are_stored_as_they_are(tmp_path, key, said):
    plain = write("mixtral gptq", tmp_path)
    shifts = torch.arange(0, 32, 4)

    def one_more(name, tensor):
        if not name.endswith("qzeros"):
            return tensor
        zeros = ((tensor.long().unsqueeze(-1) >> shifts & 15) + 1) % 16
        return (zeros << shifts).sum(-1).to(torch.uint32).view(torch.int32)

    change(tmp_path, one_more)
    edit_config(tmp_path, quantization_config=LAYOUTS["mixtral gptq"][2] | {key: said})
    with load(tmp_path, slots=8) as engine, torch.no_grad():
        assert distance(engine.model(prompt()).logits, plain(prompt()).logits) < TOLERANCE


def test_int8_with_zeros_that_are_none_is_symmetric(tmp_path):
    """As early versions of compressed-tensors wrote it."""
    plain = write("glm int8", tmp_path)
    whole = load_file(tmp_path / "model.safetensors")
    zeros = {
        name.replace("weight_scale", "weight_zero_point"): torch.zeros_like(tensor, dtype=torch.int8)
        for name, tensor in whole.items()
        if name.endswith("weight_scale")
    }
    save_file(whole | zeros, tmp_path / "model.safetensors", {"format": "pt"})
    with load(tmp_path, slots=8) as engine, torch.no_grad():
        assert distance(engine.model(prompt()).logits, plain(prompt()).logits) < TOLERANCE
    next(iter(zeros.values()))[0] = 1
    save_file(whole | zeros, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UnsupportedExperts, match="with zeros are not served"):
        load(tmp_path, slots=8)


@pytest.mark.parametrize(
    "where", ["experts.0.w1", "layers.1.block_sparse_moe.experts.5.w2", "self_attn.q_proj"]
)
def test_columns_in_another_order_are_refused_whatever_the_config_says(tmp_path, where):
    """Of the first expert before weights are read; of another, or beside the experts, when it comes to it."""
    write("mixtral gptq", tmp_path)
    change(tmp_path, lambda name, tensor: tensor.flip(0) if name.endswith(f"{where}.g_idx") else tensor)
    said = rf"{re.escape(str(tmp_path))} is quantised \(gptq\), and .*{where}: .*act-order.*; load the same model in"
    with pytest.raises(UnsupportedExperts, match=said):
        load(tmp_path, slots=8)


def test_a_bias_that_is_missing_is_named(tmp_path):
    write("gpt-oss mxfp4", tmp_path)
    change(
        tmp_path, lambda name, tensor: None if name.endswith("1.mlp.experts.gate_up_proj_bias") else tensor
    )
    with pytest.raises(
        BadModelFolder, match=r"no weights for model\.layers\.1\.mlp\.experts\.gate_up_proj_bias"
    ):
        load(tmp_path, slots=8)


def test_rows_whose_last_word_is_not_full_are_refused_as_such(tmp_path):
    """compressed-tensors fills it up: 4 bits all the same."""
    write("qwen3 int4", tmp_path)
    shape = torch.tensor([WIDTH, HIDDEN - 3])
    change(
        tmp_path,
        lambda name, tensor: shape.clone() if name.endswith("0.gate_proj.weight_shape") else tensor,
    )
    with pytest.raises(
        UnsupportedExperts,
        match=r"0\.gate_proj has rows of 61 weights, and the last of their words is not full",
    ):
        load(tmp_path, slots=8)


@pytest.mark.parametrize("num_words", [1, 2])
def test_words_that_are_turned_round_are_the_same_bytes(num_words):
    """GPTQ's lie by inputs first; of 8 inputs there is one word an output (Gemma 4's gates of each layer's inputs)."""
    words = torch.randint(-(2**31), 2**31 - 1, (num_words, 5), dtype=torch.int32)
    assert torch.equal(
        bytes_of(words.mT), torch.from_numpy(words.mT.contiguous().numpy().view(np.uint8).copy())
    )


@pytest.mark.parametrize(
    ("lost", "error"),
    [
        ("layers.1.mlp.experts.3.up_proj.weight_scale_inv", "no scales"),
        ("layers.1.mlp.experts.3.", "8 experts, the files have 7"),
        ("layers.1.mlp.experts.", "no weights for"),
        ("layers.1.self_attn.q_proj.", "q_proj"),
    ],
)
def test_what_is_missing_from_the_files_is_named(tmp_path, lost, error):
    write("qwen3 fp8", tmp_path)
    change(tmp_path, lambda name, tensor: None if lost in name else tensor)
    with pytest.raises(BadModelFolder, match=error):
        load(tmp_path, slots=8)


DAMAGES = {
    "a row less": lambda tensor: tensor[:-1],
    "a column less": lambda tensor: tensor[..., :-1],
    "all in one row": lambda tensor: tensor.reshape(1, -1),
    "as bytes": lambda tensor: tensor.contiguous().view(torch.uint8),
    "wide": lambda tensor: tensor.float().to(torch.int64),
}


@pytest.mark.filterwarnings("ignore")  # transformers' table of weights that do not fit
@pytest.mark.parametrize("layout", LAYOUTS)
def test_tensors_of_a_matrix_that_do_not_belong_together_are_refused(tmp_path, layout):
    """Scales of other rows, words of another width: refused by name, or harmless; never another error or number."""
    plain, ids = write(layout, tmp_path), prompt()
    whole = load_file(tmp_path / "model.safetensors")
    names = [
        name for name in whole if "layers.1." in name and (".experts.3." in name or "experts.down" in name)
    ]
    stem = names[0].rpartition("_" if layout.startswith("gpt-oss") else ".")[0]
    refused = 0
    for name in (name for name in names if name.startswith(stem) and whole[name].dim()):
        for damage in DAMAGES.values():
            damaged = damage(whole[name]).contiguous()
            save_file({**whole, name: damaged}, tmp_path / "model.safetensors", {"format": "pt"})
            try:
                with load(tmp_path, slots=8) as engine, torch.no_grad():
                    assert distance(engine.model(ids).logits, plain(ids).logits) < TOLERANCE, name
            except (UnsupportedExperts, BadModelFolder) as error:
                assert "layers.1." in str(error)
                refused += 1
    assert refused >= 5


def change(folder, edit) -> None:
    tensors = {name: edit(name, tensor) for name, tensor in load_file(folder / "model.safetensors").items()}
    kept = {name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})


def test_experts_are_packed_once_and_by_load_only(fp8, tmp_path):
    with pytest.raises(UnsupportedOption, match="already"):
        load(fp8[0], slots=8, experts="int4")
    with pytest.raises(UnsupportedOption, match="choose one of 'auto', 'plain', 'int8'"):
        load(fp8[0], slots=8, experts="int3")
    with pytest.raises(UnsupportedOption, match=r"prescope\.load"):
        prescope.attach(tiny_moe(), slots=8, device="cpu", experts="int8")
    tiny_moe().save_pretrained(tmp_path)  # its experts have rows of 24
    with pytest.raises(UnsupportedOption, match="24"):
        load(tmp_path, slots=8, experts="int4")


@pytest.mark.parametrize("layers", [[1], [0, 1, 2]])
def test_a_model_in_which_transformers_keeps_packed_experts_is_refused_with_the_way_round(layers):
    """Also where some layers have plain ones: those alone are not the model's experts."""
    fp8_experts = pytest.importorskip("transformers.integrations.finegrained_fp8").FP8Experts
    mxfp4_experts = pytest.importorskip("transformers.integrations.mxfp4").Mxfp4GptOssExperts
    for layout, kind in (("qwen3 fp8", fp8_experts), ("gpt-oss mxfp4", mxfp4_experts)):
        model = LAYOUTS[layout][0]()
        for index in layers:
            model.model.layers[index].mlp.experts = kind(model.config)
        with pytest.raises(UnsupportedExperts, match=rf"{kind.__name__}.*prescope\.load"):
            prescope.attach(model, slots=8, device="cpu")
