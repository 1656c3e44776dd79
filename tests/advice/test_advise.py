"""Advice from a config alone: sizes are the published ones, the curve obeys its laws, words follow numbers."""

import json
import warnings
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

import prescope
from prescope import views
from prescope.advice import INTERVAL, MachineSpec, ModelSize, advise, paces
from prescope.core.machine import this_place
from prescope.core.paths import data_dir, embedded_model
from prescope.device import describe_auto
from prescope.engine.config import EngineConfig
from prescope.errors import BadModelFolder, BadProfile, NotAMoE, TraceMismatch, UnsupportedOption
from prescope.profile import HardwareProfile, own_file
from prescope.traces.synthetic import SyntheticSpec
from tests.support import families

#: Published sizes, parameters in 10^9: all, and without the routed experts.
PUBLISHED = {
    "qwen3-30b-a3b": 30.53,
    "mixtral-8x7b-v0.1": 46.70,
    "olmoe-1b-7b": 6.92,
    "deepseek-v2-lite": 15.71,
}
SMALL = {
    "hidden_size": 64, "num_hidden_layers": 4, "num_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1000, "dtype": "bfloat16",
    "tie_word_embeddings": True,
}  # fmt: skip
BIG_EXPERTS = SMALL | {"hidden_size": 2048, "moe_intermediate_size": 1024}
DESKTOP = {"link_gb_per_s": 25, "host_gib": 64, "host_gb_per_s": 60, "gpu_gib": 24, "gpu_gb_per_s": 1000}


def desktop(**changes: float) -> MachineSpec:
    return MachineSpec(**{**DESKTOP, **changes})


@pytest.mark.parametrize(("name", "billions"), PUBLISHED.items())
def test_sizes_are_the_published_ones(name, billions):
    size = ModelSize.of(name)
    assert (size.experts_bytes + size.dense_bytes) / 2e9 == pytest.approx(billions, rel=0.01)


def test_sizes_of_the_embedded_model_are_those_of_its_file():
    index = json.loads((embedded_model() / "model.safetensors.index.json").read_text())
    size = ModelSize.of(embedded_model())
    assert size.experts_bytes + size.dense_bytes == index["metadata"]["total_size"]
    assert size.expert == (122_880, 256, 80)


def test_the_small_model_is_advised_on_by_the_name_by_which_it_is_loaded(tmp_path, monkeypatch):
    """Wherever one stands; unless a folder of that name lies there, as for `load`."""
    monkeypatch.chdir(tmp_path)
    assert replace(ModelSize.of("tiny-moe"), name="") == replace(ModelSize.of(embedded_model()), name="")
    (tmp_path / "tiny-moe").mkdir()
    (tmp_path / "tiny-moe" / "config.json").write_text(
        (data_dir() / "configs" / "olmoe-1b-7b.json").read_text()
    )
    assert ModelSize.of("tiny-moe").shape == ModelSize.of("olmoe-1b-7b").shape


@pytest.mark.parametrize("path", sorted((data_dir() / "configs").glob("*.json")), ids=lambda path: path.stem)
def test_every_shape_that_comes_with_prescope_can_be_advised_on(path):
    size = ModelSize.of(path.stem)
    facts = json.loads(path.read_text())
    assert size.shape.num_layers == facts["moe_layers"]
    assert size.expert.nbytes == facts["derived"]["bytes_per_expert_native"]


#: Families of which a config's numbers alone say something else: layers of another kind between those with experts, a
#: list for each layer, names of their own, no gate, biases, a vision tower, keys and values in some layers only.
OWN_WAYS = (
    "afmoe", "deepseek_v3", "ernie4_5_moe", "glm4_moe_lite", "gpt_oss", "granitemoehybrid", "jamba", "kimi_linear",
    "minimax", "mixtral", "nemotron_h", "qwen3_5_moe", "qwen3_next", "qwen3_vl_moe",
)  # fmt: skip


@pytest.mark.parametrize("name", [name for name in OWN_WAYS if name in families.FAMILIES])
def test_sizes_by_a_config_are_those_of_the_model_that_it_makes(name):
    model = families.build(name)
    modules = families.experts_modules(model)
    config = model.config.to_dict() | {"architectures": [type(model).__name__], "dtype": "float32"}
    size = ModelSize.of(json.loads(json.dumps(config)))
    routed = sum(tensor.numel() for module in modules.values() for tensor in module.parameters())
    assert size.shape.num_layers == len(modules)
    assert size.shape.num_experts == next(iter(modules.values())).num_experts
    assert size.dense_bytes == 4 * (sum(tensor.numel() for tensor in model.parameters()) - routed)
    assert size.experts_bytes >= 4 * routed  # rows are aligned
    assert 0 < size.layer_bytes < size.dense_bytes
    tokens = model(**families.prompts(1, 7), use_cache=True).past_key_values.layers
    kept = [t for layer in tokens for t in (getattr(layer, "keys", None), getattr(layer, "values", None))]
    numbers = sum(t.numel() for t in kept if t is not None)
    assert size.kv_token_bytes == pytest.approx(4 * numbers / 7)


def test_a_config_as_save_pretrained_writes_it_is_read(tmp_path):
    """With floats for which JSON has no word: Nemotron-H's time steps have no upper limit."""
    name = "nemotron_h"
    if name not in families.FAMILIES:
        pytest.skip(f"the installed transformers has no {name}")
    model = families.build(name)
    model.config.save_pretrained(tmp_path)
    assert '"__float__": "Infinity"' in (tmp_path / "config.json").read_text()
    layers = families.experts_modules(model)
    assert ModelSize.of(tmp_path).shape[:2] == (len(layers), next(iter(layers.values())).num_experts)


def test_a_family_that_load_refuses_is_refused_with_its_reason():
    config = {**SMALL, "model_type": "llama4_text"}
    with pytest.raises(NotAMoE, match="transformers' experts interface"):
        ModelSize.of(config)
    size = ModelSize.of({**SMALL, "model_type": "of_tomorrow"})
    assert size.shape == ModelSize.of(SMALL).shape
    assert any("of_tomorrow" in note and "may refuse" in note for note in size.notes)


@pytest.mark.parametrize("field", ["hidden_size", "num_hidden_layers", "vocab_size", "moe_intermediate_size"])
def test_a_config_that_lacks_a_number_is_told(field):
    with pytest.raises(BadModelFolder, match=field):
        ModelSize.of({key: value for key, value in SMALL.items() if key != field})


@pytest.mark.parametrize(
    ("listed", "layers"), [({"moe_layers": [1, 3]}, 2), ({"moe_layer_freq": [0, 1, 1, 1]}, 3), ({}, 4)]
)
def test_layers_with_experts_may_be_listed(listed, layers):
    size = ModelSize.of({**SMALL, **listed, "num_experts": [16, 16, 16, 16]})
    assert (size.shape.num_layers, size.shape.num_experts) == (layers, 16)


@pytest.fixture(scope="module")
def offload():
    return advise(BIG_EXPERTS, desktop(gpu_gib=2.0, link_gb_per_s=50), context=64, gpu_gib=2.0)


def test_the_curve_obeys_its_laws(offload):
    points = offload.points
    assert [p.slots for p in points] == sorted({p.slots for p in points})
    for p in points:
        assert p.perfect >= p.tokens_per_s >= p.without * 0.999
        assert p.without >= p.on_demand
        assert 0 <= p.hit_rate <= 1
    rates = [p.tokens_per_s for p in points]
    assert all(later >= 0.97 * former for former, later in pairwise(rates)), "more slots, slower"
    assert points[0].gpu_gib < offload.budget_gib < points[-1].gpu_gib
    assert points[0].gpu_gib <= offload.cliff_gib <= points[-1].gpu_gib


def test_what_is_advised_is_on_the_curve_and_fits(offload):
    assert offload.kind == "offload"
    assert offload.best in offload.points
    assert offload.best.gpu_gib <= offload.budget_gib
    assert not any(offload.best.gpu_gib < p.gpu_gib <= offload.budget_gib for p in offload.points), (
        "the most that fit"
    )
    EngineConfig(**offload.settings)
    assert offload.settings["slots"] == offload.best.slots
    assert offload.perfect_gain >= 0


def test_each_kind_of_advice_has_its_machine():
    assert advise(BIG_EXPERTS, desktop(), context=64).kind == "all on the GPU"
    assert advise(BIG_EXPERTS, desktop(), context=64).settings == {"slots": 1.0}
    none = advise(BIG_EXPERTS, desktop(gpu_gib=1.5), context=64)
    assert (none.kind, none.best, none.settings) == ("not with this machine", None, {})
    no_host = advise(BIG_EXPERTS, desktop(gpu_gib=2.0, host_gib=0.5), context=64)
    assert no_host.kind == "not with this machine"
    assert "host memory" in no_host.words
    slow_link = advise(BIG_EXPERTS, desktop(gpu_gib=2.0, link_gb_per_s=2.0, host_gb_per_s=300.0), context=64)
    assert slow_link.kind == "static split", slow_link.words
    assert slow_link.settings["schedule"] == "fiddler"


@pytest.mark.parametrize("machine", [{}, {"gpu_gib": 4000.0, "gpu_gb_per_s": 90_000.0}, {"host_gib": 4000.0}])
@pytest.mark.parametrize("context", [64, 99_999_999])
@pytest.mark.parametrize("width", [1024, 300_000])
def test_large_numbers_are_said_without_an_exponent(machine, context, width):
    """A context of a hundred million tokens took "9.16e+03 GiB of 140 GiB"."""
    found = advise(
        BIG_EXPERTS | {"moe_intermediate_size": width}, desktop(**machine), context=context, shares=(0.5,)
    )
    said = [found.words, *(value for _, value in found.facts()), str(found.model.expert)]
    assert not [text for text in said if "e+" in text]


def test_a_faster_link_is_never_slower_and_prediction_is_worth_less_without_one():
    slow, fast = (
        advise(BIG_EXPERTS, desktop(gpu_gib=2.0, link_gb_per_s=r, cores=0), context=64) for r in (6, 48)
    )
    assert fast.best.tokens_per_s > slow.best.tokens_per_s
    assert fast.best.limit != "link" or fast.best.limit_frac <= slow.best.limit_frac


def test_what_is_assumed_is_said(offload):
    told = " ".join(offload.assumptions)
    assert "guessed routing" in told
    assert "typed in" in told
    assert offload.machine.origin == "assumed"
    assert "guessed" in offload._repr_html_()
    trace = SyntheticSpec(num_layers=4, num_experts=16, top_k=2).generate(prompt_tokens=16, new_tokens=12)
    known = advise(BIG_EXPERTS, desktop(gpu_gib=2.0), context=64, trace=trace)
    assert "guessed" not in " ".join(known.assumptions)


def test_a_shipped_profile_is_measured_and_a_changed_one_assumed():
    spec = advise("olmoe-1b-7b", "h200", shares=(0.5,)).machine
    assert spec.origin.startswith("measured on NVIDIA H200")
    assert spec.link_gb_per_s == pytest.approx(55, abs=2)
    changed = spec.changed(link_gb_per_s=26.0)
    assert (changed.origin, changed.profile) == ("assumed", None)


def test_the_h100_says_what_of_it_was_measured():
    advice = advise("olmoe-1b-7b", "h100", shares=(0.5,), gpu_gib=8)
    assert "measured on an H100" in advice.machine.origin
    assert "assumed" in advice.machine.origin
    assert advice.best is not None


def test_the_table_has_units_and_one_row_for_each_point(offload):
    table = offload.table()
    assert list(table.index) == [p.slots for p in offload.points]
    assert table["GPU memory, GiB"].is_monotonic_increasing
    assert table["fits"].any()
    assert not table["fits"].all()


@pytest.mark.parametrize("gib", [0.5, 24.0, 400.0])
def test_the_figure_of_any_advice_is_json(gib):
    """Where nothing fits there is no best point: its NaN made the kernel warn in red below the figure."""
    machine = replace(desktop(), host_gib=8.0, gpu_gib=gib)
    figure = views.capacity(advise("qwen3-30b-a3b", machine, shares=[0.25, 0.5]))
    json.dumps(figure.to_plotly_json(), allow_nan=False, default=list)


def test_an_engine_is_advised_on_by_its_own_sizes():
    with prescope.load(embedded_model(), slots=0.5, device="null") as engine:
        advice = advise(engine, desktop(), context=64, shares=(0.5, 1.0))
    assert advice.model.shape.row_bytes == engine.shape.row_bytes
    assert advice.kind == "all on the GPU"


@pytest.mark.parametrize(
    ("model", "error"),
    [("no/such-model", BadModelFolder), ({"hidden_size": 8, "num_hidden_layers": 2}, NotAMoE)],
)
def test_what_is_no_moe_is_told(model, error):
    with pytest.raises(error):
        advise(model, desktop())


def test_a_config_that_is_no_json_is_told(tmp_path: Path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(BadModelFolder, match="readable"):
        advise(tmp_path, desktop())


@pytest.mark.parametrize(
    "change", [{"link_gb_per_s": 0}, {"link_gb_per_s": "25"}, {"gpu_gib": -1}, {"cores": -1}, {"cores": None}]
)
def test_a_machine_that_cannot_be_is_refused(change):
    with pytest.raises(UnsupportedOption):
        desktop(**change)


@pytest.mark.parametrize(
    "numbers",
    [
        {"batch": 1.5}, {"batch": 2.0}, {"batch": True}, {"batch": 0}, {"context": float("nan")}, {"context": "4k"},
        {"gpu_gib": "8"}, {"gpu_gib": float("nan")}, {"gpu_gib": 0}, {"shares": ()}, {"shares": (0.5, 2.0)},
        {"shares": (float("nan"),)},
    ],
    ids=str,
)  # fmt: skip
def test_a_number_that_cannot_be_is_refused_by_its_name(numbers):
    with pytest.raises(UnsupportedOption, match=next(iter(numbers))):
        advise(BIG_EXPERTS, desktop(), **numbers)


def test_a_machine_may_be_a_name_in_capitals_or_a_file_and_all_names_are_told(tmp_path):
    small = {"context": 64, "shares": (0.5,)}
    assert advise(BIG_EXPERTS, "H100", **small).machine == advise(BIG_EXPERTS, "h100", **small).machine
    assert advise(BIG_EXPERTS, "H200", **small).machine.profile == HardwareProfile.load("h200")
    file = HardwareProfile.load("h200").save(tmp_path / "mine.json")
    assert advise(BIG_EXPERTS, file, **small).machine.profile == HardwareProfile.load("h200")
    with pytest.raises(BadProfile, match="h100, h200, "):
        advise(BIG_EXPERTS, "h300")
    with pytest.raises(UnsupportedOption, match="MachineSpec"):
        advise(BIG_EXPERTS, DESKTOP)


def test_a_trace_of_another_model_is_told():
    other = SyntheticSpec(num_layers=3, num_experts=16, top_k=2).generate(prompt_tokens=4, new_tokens=4)
    with pytest.raises(TraceMismatch, match="record one of this model"):
        advise(BIG_EXPERTS, desktop(), trace=other)


def test_a_recorded_trace_is_served_at_the_batch_that_is_asked_for():
    """Three recorded prompts were advised on as one sequence with the tokens/s of three."""
    size = ModelSize.of(BIG_EXPERTS)
    made = SyntheticSpec(num_layers=4, num_experts=16, top_k=2).generate(
        prompt_tokens=4, new_tokens=12, batch=3, seed=3
    )
    rates = {}
    for batch in (1, 3):
        found = advise(size, desktop(), trace=made, batch=batch, shares=(0.5,))
        assert not any("guessed" in note for note in found.assumptions)
        rates[batch] = found.points[0].on_demand
    assert rates[1] < 0.8 * rates[3]
    more = advise(size, desktop(), trace=made, batch=4, shares=(0.5,))
    assert any("3 sequences, fewer than a batch of 4" in note for note in more.assumptions)
    assert any("guessed" in note for note in more.assumptions)


@pytest.mark.parametrize("model", [None, 3, b"x", embedded_model() / "tokenizer.json"], ids=str)
def test_what_is_no_config_is_told_in_a_few_words(model):
    with pytest.raises((BadModelFolder, NotAMoE)) as told:
        advise(model, desktop())
    assert len(str(told.value)) < 400


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder: no profile of this machine."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "prescope").mkdir()
    return tmp_path


def test_this_machines_own_profile_is_taken_before_a_shipped_one(cache, monkeypatch):
    """As `calibrate` saves it; without one the advice begins with whose numbers these are. A laptop's driver may list a
    GPU that torch, built without CUDA, cannot use: what was calibrated there is the CPU.
    """
    monkeypatch.setattr("prescope.core.machine.gpu_links", lambda: {"A GPU of the driver alone": "PCIe 4 x8"})
    here = this_place(describe_auto())
    advice = advise(BIG_EXPERTS, context=64, shares=(0.5,))
    if HardwareProfile.load("test_machine").place != here:
        assert advice.words.startswith("Not of this machine, which has not been calibrated")
        assert "H200" in advice.words
    shipped = HardwareProfile.load("test_machine")
    replace(shipped, place=here, label="calibrated here").save()
    own = advise(BIG_EXPERTS, context=64, shares=(0.5,))
    assert own.machine.name == "this machine"
    assert own.machine.origin.startswith("calibrated here")
    assert not own.words.startswith("Not of this machine")
    assert advise(BIG_EXPERTS, "h200", context=64, shares=(0.5,)).machine.name != "this machine"


def test_a_saved_profile_that_cannot_be_read_is_told_and_not_passed_over(cache):
    own_file(this_place(describe_auto())).write_text("{")
    with pytest.raises(BadProfile):
        advise(BIG_EXPERTS, context=64)


def profile_of_idle_machine(engine: prescope.Engine) -> HardwareProfile:
    """Of three at most the first that does not say that others kept the machine busy: no promise is due there."""
    for _ in range(3):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "the machine was busy")
            profile = prescope.calibrate(engine, seconds=4, save=False, on_progress=lambda what, share: None)
        busy = [note for note in profile.notes if note.startswith("the machine was busy")]
        if not busy:
            return profile
    pytest.skip(busy[0])


@pytest.mark.slow
def test_what_the_advice_promises_the_engine_keeps():
    """Hit rates to the expert, tokens/s within the interval that the advice states."""
    prompt = "The old man looked at the sea"
    with prescope.load(embedded_model(), slots=0.5, device="cpu", link_gb_per_s=0.03) as engine:
        engine.generate(prompt, max_new_tokens=4)
        engine.clear_cache()
        recorded = engine.generate(prompt, max_new_tokens=24)
        profile = profile_of_idle_machine(engine)
        advice = advise(engine, profile, context=64, trace=recorded.trace, shares=(0.25, 0.5, 0.75))
        assert any(f"{100 * INTERVAL:.0f} %" in note for note in advice.assumptions)
        for point in advice.points:
            engine.configure(slots=point.slots)
            rates = []
            for _ in range(3):
                engine.clear_cache()
                run = engine.generate(prompt, max_new_tokens=24)
                rates.append(run.metrics.tokens_per_s)
            found = run.metrics.decode.hit_rate + run.metrics.decode.late_rate
            assert found == pytest.approx(point.on_demand_hit_rate, abs=0.01)
            nearest = min(rates, key=lambda rate: abs(rate - point.on_demand))
            assert nearest == pytest.approx(point.on_demand, rel=INTERVAL), (point, rates)


@pytest.mark.parametrize(
    ("packing", "row_bytes"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, 3 * 64 * 32 + 256 + 256),
        ({"quant_method": "gptq", "bits": 4, "group_size": 32}, 3 * 64 * 32 // 2 + 4 * 256),
        ({"quant_method": "mxfp4"}, 3 * 64 * 32 // 2 + 256 + 256),
    ],
)
def test_a_packed_checkpoint_is_counted_in_its_rows(packing, row_bytes):
    """64 x 32 weights three times, and scales and zeros, each field in steps of 256 bytes."""
    size = ModelSize.of(SMALL | {"quantization_config": packing})
    assert size.shape.row_bytes == row_bytes
    assert size.dense_bytes == ModelSize.of(SMALL).dense_bytes
    assert any("packed experts" in note for note in size.notes)


def test_packing_that_is_not_served_is_said():
    size = ModelSize.of(SMALL | {"quantization_config": {"quant_method": "bitsandbytes"}})
    assert size.expert == ModelSize.of(SMALL).expert
    assert any("bitsandbytes" in note for note in size.notes)


def of_another_gpu(**more: float) -> HardwareProfile:
    """As a calibration makes it on a GPU whose data sheet nobody has typed in."""
    profile = HardwareProfile.load("h200")
    return replace(profile, machine=profile.machine | {"device": "NVIDIA GeForce RTX 4090"} | more)


def test_a_gpu_that_is_in_no_list_has_the_memory_that_its_calibration_notes():
    """Its rate was taken to be the host memory's, and `gpu_gib` was asked for and not looked at."""
    profile = of_another_gpu(device_memory_gib=23.5, device_memory_gb_per_s=1008)
    advice = advise(BIG_EXPERTS, profile, context=64)
    assert (advice.machine.gpu_gib, advice.machine.gpu_gb_per_s) == (23.5, 1008)
    assert advise(BIG_EXPERTS, profile, context=64, gpu_gib=8.0).budget_gib == 8.0


@pytest.mark.parametrize("more", [{}, {"device_memory_gib": 23.5}, {"device_memory_gb_per_s": 1008}])
def test_a_gpu_whose_memory_nobody_noted_is_refused_with_what_to_do(more):
    with pytest.raises(UnsupportedOption, match=r"RTX 4090 has.*calibrate\(\) again.*MachineSpec\("):
        advise(BIG_EXPERTS, of_another_gpu(**more), gpu_gib=8.0)


def test_advice_on_experts_that_will_be_packed():
    plain, packed = (advise(BIG_EXPERTS, desktop(), experts=form) for form in ("auto", "int4"))
    assert packed.model.shape.row_bytes < plain.model.shape.row_bytes / 3.8
    assert any("lossy" in assumption for assumption in packed.assumptions)
    with pytest.raises(UnsupportedOption, match="choose one of 'auto'"):
        advise(BIG_EXPERTS, desktop(), experts="int5")
    with pytest.raises(UnsupportedOption, match="has its sizes"):
        advise(plain.model, desktop(), experts="int4")


def test_paces_of_batches_are_those_of_the_advice():
    """A step takes what its tokens/s say; a better schedule is never slower; what has no slot crosses the link once."""
    found = paces("olmoe-1b-7b", "h200", share=0.5, batches=(1, 2))
    assert list(found) == ["on demand", "best without prediction", "best schedule", "perfect prediction"]
    point = advise("olmoe-1b-7b", "h200", batch=2, shares=[0.5]).points[0]
    assert found["best schedule"].step_ms[2] == pytest.approx(2e3 / point.tokens_per_s)
    for batch in (1, 2):
        steps = [pace.step_ms[batch] for pace in found.values()]
        assert steps == sorted(steps, reverse=True)
    shape, link = (
        ModelSize.of("olmoe-1b-7b").shape,
        MachineSpec.of_profile(HardwareProfile.load("h200")).link_gb_per_s,
    )
    half_ms = shape.total_experts / 2 * shape.row_bytes / link / 1e6
    assert [pace.prompt_ms for pace in found.values()] == pytest.approx([half_ms] * 4)
