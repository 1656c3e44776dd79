"""Laws of LLaPor and of its training, on a small random MoE: that it learns is tested in test_learning.py."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import prescope
from prescope.core.types import MoEShape
from prescope.errors import BadTrace, TraceMismatch, UnsupportedOption
from prescope.predictor import (
    BadPredictor,
    BadState,
    EarlyRouter,
    LayerGroups,
    Llapor,
    LlaporConfig,
    ModelTag,
    Oracle,
    Routers,
    TooFewPrompts,
    files,
    llapor,
)
from prescope.predictor.llapor import ALWAYS_TRUST, NEVER_TRUST
from prescope.scheduler.costs import LayerCosts
from prescope.simulator import Simulator, as_decode, prepare
from prescope.traces.routing import used_mask
from prescope.training import (
    TrainConfig,
    record_trace,
    routers_of,
    rows_of,
    score,
    split_by_prompt,
    train,
    train_on_trace,
)
from prescope.training.held_out import fit_trust, layer_recalls
from prescope.training.misses import absent_pairs
from tests.support.models import EXPERTS, LAYERS, TOP_K, VOCABULARY, tiny_moe

SHAPE = MoEShape(LAYERS, EXPERTS, TOP_K)
GROUPS = LayerGroups.at(1, 2, LAYERS, "three groups: for the test")
SMALL = LlaporConfig(lookahead=2, hidden=32, block=16)
QUICK = TrainConfig(epochs=3, batch_tokens=128)
COSTS = LayerCosts(link_us=100.0, gpu_us=5.0, rest_us=50.0, source="made up for a test")


@pytest.fixture(scope="module")
def recorded():
    """A trace of 24 prompts with inputs, and the model's routers."""
    prompts = np.random.default_rng(0).integers(0, VOCABULARY, (24, 30)).tolist()
    with prescope.attach(tiny_moe(), slots=1.0, device="null") as engine:
        trace = record_trace(engine, {"a": prompts[:12], "b": prompts[12:]})
        return trace, routers_of(engine, trace)


def quick(recorded, **changes):
    trace, routers = recorded
    settings = {"config": SMALL, "training": QUICK, "routers": routers, "groups": GROUPS}
    return train(trace, **{**settings, **changes})


@pytest.fixture(scope="module")
def trained(recorded):
    return quick(recorded).predictor


def same(first: Llapor, second: Llapor) -> bool:
    return all(torch.equal(first.tensors[name], second.tensors[name]) for name in first.tensors)


def test_an_untrained_residual_predictor_is_the_early_router(recorded):
    """The correction starts at zero, so whatever it scores better by, it has learned."""
    trace, routers = recorded
    D = routers.weight_LED.shape[2]
    pca = (torch.zeros(LAYERS, 1, D), torch.eye(D).repeat(LAYERS, 1, 1), torch.ones(LAYERS, 1, D) / D)
    fresh = Llapor.fresh(
        SMALL, SHAPE, GROUPS, pca, ModelTag(model=trace.model, fingerprint=trace.fingerprint), routers, 0
    )
    for ahead in (1, 2):
        early = EarlyRouter(SHAPE, routers, 2).replay(trace, ahead)
        best = [np.argsort(-s, axis=-1)[..., :TOP_K] for s in (fresh.replay(trace, ahead), early)]
        assert np.array_equal(np.sort(best[0]), np.sort(best[1]))


@pytest.mark.parametrize("config", [SMALL, LlaporConfig.paper(lookahead=2, hidden=32, block=16)])
def test_live_predictions_equal_the_replays(recorded, config):
    """One world: what the engine asks layer by layer is what the simulator replays at once."""
    trace, _ = recorded
    predictor = quick(recorded, config=config).predictor
    rows = np.arange(7)
    x = torch.from_numpy(trace.inputs[rows].astype(np.float32))
    ids, weights = torch.from_numpy(trace.expert_ids[rows]), torch.from_numpy(trace.weights[rows])
    for layer in range(LAYERS):
        live = predictor.predict(layer, x[:, layer], ids[:, layer], weights[:, layer])
        assert [p.moe_layer for p in live] == list(range(layer + 1, LAYERS))
        for one in live:
            expected = predictor.replay(trace, one.lookahead)[rows, layer]
            np.testing.assert_allclose(one.scores_TE.numpy(), expected, atol=1e-5)


def test_a_long_trace_is_scored_in_parts(recorded, trained, monkeypatch):
    """Logits of all rows, layers, lookaheads and experts were 4.6 GB for 1,024 tokens of a model of 94 x 512."""
    trace, sizes, hidden = recorded[0], [], Llapor.hidden

    def counted(self, x_LTD, *rest, **options):
        sizes.append(x_LTD.shape[1])
        return hidden(self, x_LTD, *rest, **options)

    wholes = [trained.replay(trace, ahead) for ahead in (1, 2)]
    decoded = as_decode(trace)
    whole = Simulator(decoded, COSTS, row_bytes=1, predictor=trained).predicted
    monkeypatch.setattr(Llapor, "hidden", counted)
    monkeypatch.setattr(llapor, "PART_BYTES", 7 * 4 * LAYERS * trained.width)
    for ahead in (1, 2):
        np.testing.assert_allclose(trained.replay(trace, ahead), wholes[ahead - 1], atol=1e-6)
        rows = np.array([3, 4, 40, 300])
        np.testing.assert_allclose(
            trained.replay_rows(trace, ahead, rows), wholes[ahead - 1][rows], atol=1e-6
        )
    layer_recalls(trained, trace, np.arange(len(trace)))
    assert max(sizes) == 7
    monkeypatch.setattr(prepare, "KEPT_BYTES", 0)
    monkeypatch.setattr(prepare, "PART_BYTES", 5 * 4 * LAYERS * EXPERTS)
    sizes.clear()
    simulator = Simulator(decoded, COSTS, row_bytes=1, predictor=trained)
    assert not sizes  # nothing is made before a replay comes to it
    np.testing.assert_allclose(simulator.predicted.used_dSLE, whole.used_dSLE, atol=1e-6)
    assert max(sizes) == 5


def test_the_correction_fades_on_states_unlike_those_of_the_training(recorded, trained):
    """`trust`: what was learned on one kind of text must not rule on another; a mean state keeps most of it."""
    x, choice = trained.batch_of(recorded[0], slice(0, 300))
    predictor = trained.trusting(0.7)
    full, _ = trained.trusting(ALWAYS_TRUST).hidden(x, choice)
    near, far, remote = (
        predictor.hidden(states, choice)[1] for states in (x, x + 3 * x.std(dim=1, keepdim=True), 30 * x)
    )
    torch.testing.assert_close(predictor.hidden(x, choice)[0], full * near)
    assert 0.6 < near.mean() <= 1.0
    assert near.mean() > 3 * far.mean() > 30 * remote.mean()


def weakened(recorded):
    """The same trace, inputs and router of each layer turned by a rotation of its own: only early routers are worse."""
    trace, routers = recorded
    D = routers.weight_LED.shape[2]
    generator = torch.Generator().manual_seed(0)
    turns = torch.linalg.qr(torch.randn(LAYERS, D, D, generator=generator)).Q
    inputs = torch.einsum("rld,lde->rle", torch.from_numpy(trace.inputs).float(), turns)
    turned = replace(routers, weight_LED=torch.einsum("lkd,lde->lke", routers.weight_LED, turns))
    return replace(trace, inputs=inputs.numpy().astype(np.float16)), turned


def test_a_weak_early_router_is_fallen_back_to_later(recorded, trained):
    """Fading to a router that is wrong cost the correction's gain on strange text (docs/log/predictor.md)."""
    weak = quick(weakened(recorded)).predictor
    distances = [predictor.tensors["trust"][:-1] for predictor in (trained, weak)]
    assert (distances[1] > 2 * distances[0]).all()
    assert all((distance > 0).all() for distance in distances)


def test_a_correction_that_mends_nothing_is_not_trusted(recorded, trained):
    """Heads that are noise make more errors than they mend: the early router answers."""
    tensors = trained.tensors | {"head": torch.randn(trained.tensors["head"].shape)}
    noise = Llapor(trained.config, trained.shape, trained.groups, tensors, trained.tag)
    fit_trust(noise, recorded[0], np.arange(200))
    assert (noise.tensors["trust"][:-1] <= NEVER_TRUST).all()


def test_without_trust_nothing_fades(recorded):
    trace, _ = recorded
    predictor = quick(recorded, config=replace(SMALL, trust=0.0)).predictor
    x, choice = predictor.batch_of(trace, slice(0, 10))
    assert predictor.hidden(30 * x, choice)[1] is None
    assert torch.equal(predictor.tensors["platt"], predictor.tensors["platt_faded"])


def test_the_same_seed_gives_the_same_bits_and_another_does_not(recorded, trained):
    assert same(trained, quick(recorded).predictor)
    assert not same(trained, quick(recorded, training=replace(QUICK, seed=1)).predictor)


def test_a_resumed_training_ends_where_an_uninterrupted_one_does(recorded, trained, tmp_path):
    class PowerCut(Exception):
        pass

    def cut(progress):
        if progress.epoch == 2:
            raise PowerCut

    path = tmp_path / "checkpoint.safetensors"
    with pytest.raises(PowerCut):
        quick(recorded, checkpoint=path, on_progress=cut)
    resumed = quick(recorded, checkpoint=path)
    assert [p.epoch for p in resumed.history] == [1, 2, 3]
    assert same(trained, resumed.predictor)


def test_a_checkpoint_of_another_training_is_refused_and_kept(recorded, tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    quick(recorded, checkpoint=path, training=replace(QUICK, epochs=1))
    before = path.read_bytes()
    with pytest.raises(BadPredictor, match="training differ"):
        quick(recorded, checkpoint=path)
    assert path.read_bytes() == before


def test_training_stops_when_the_held_out_recall_no_longer_rises(recorded):
    """At a learning rate of almost nothing only the first epoch can be the best."""
    still = TrainConfig(epochs=9, patience=2, learning_rate=1e-12, batch_tokens=128)
    assert len(quick(recorded, training=still).history) == 3


def test_the_objective_of_misses_is_another_one(recorded, trained):
    """With slots for all experts only first uses are misses; the scores stay probabilities either way."""
    found = [
        quick(recorded, training=replace(QUICK, objective="misses", slots=slots)).predictor
        for slots in (0.3, 1.0)
    ]
    assert not same(trained, found[0]) and not same(*found)
    counted = absent_pairs(recorded[0], slots=0.3)[:, 1:]
    used = used_mask(recorded[0].expert_ids, EXPERTS)[:, 1:]
    said = [p.replay(recorded[0], 1)[counted].mean() for p in (trained, found[0])]
    truth = used[counted].mean()
    assert abs(said[1] - truth) < abs(said[0] - truth), "of experts without a slot"


def test_no_prompt_is_trained_on_and_held_out(recorded):
    trace, _ = recorded
    split = split_by_prompt(trace, 0.3, seed=0)
    parts = [set(trace.sequence[rows].tolist()) for rows in split]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 24
    assert sum(map(len, split)) == (trace.position >= 0).sum()


def test_own_text_is_trained_on_and_never_held_out(recorded):
    trace, _ = recorded
    own = rows_of(trace, np.arange(100))
    result, plain = quick(recorded, own_text=own), quick(recorded)
    assert max(rows.max() for rows in result.split) < len(trace)
    assert not same(result.predictor, plain.predictor)


def test_a_saved_predictor_comes_back_equal(recorded, trained, tmp_path):
    path = trained.save(tmp_path / "p.safetensors")
    loaded = Llapor.load(path, fingerprint=recorded[0].fingerprint)
    assert same(trained, loaded)
    assert (loaded.config, loaded.shape, loaded.groups) == (trained.config, trained.shape, trained.groups)
    assert loaded.validation_error == trained.validation_error
    np.testing.assert_array_equal(loaded.replay(recorded[0], 1), trained.replay(recorded[0], 1))


def test_a_predictor_file_is_safetensors_not_pickle(trained, tmp_path):
    path = trained.save(tmp_path / "p.safetensors")
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["format"] == "prescope-predictor-3"
    assert b"\x80\x04" not in path.read_bytes()[:2]


def test_a_file_of_the_version_before_is_refused_with_the_remedy(trained, tmp_path):
    """It has no trust of its own layers and no scaling of faded scores, which only training can find."""
    path = trained.save(tmp_path / "p.safetensors")
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file(load_file(path), path, metadata | {"format": "prescope-predictor-2"})
    with pytest.raises(BadPredictor, match=r"prescope-predictor-2.*train again"):
        Llapor.load(path)


def test_a_file_of_plain_logits_scores_as_it_did(recorded, trained, tmp_path):
    """Files that do not know `relative` were scaled without it."""
    plain = quick(recorded, config=replace(SMALL, relative=False)).predictor
    path = plain.save(tmp_path / "p.safetensors")
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    known = json.loads(metadata["prescope"])
    del known["config"]["relative"]
    tensors, header = load_file(path), {**metadata, "prescope": json.dumps(known)}
    header["checksum"] = files._checksum({k: v for k, v in header.items() if k != "checksum"}, tensors)
    save_file(tensors, path, header)
    loaded = Llapor.load(path)
    assert not loaded.config.relative
    np.testing.assert_array_equal(loaded.replay(recorded[0], 1), plain.replay(recorded[0], 1))
    assert not np.array_equal(plain.replay(recorded[0], 1), trained.replay(recorded[0], 1))


def test_scores_compare_across_tokens(recorded, trained):
    """A level that all experts of a token share says nothing of any of them: scores do not change with it."""
    z = torch.randn(LAYERS, 5, 2 * EXPERTS)
    level = torch.randn(LAYERS, 5, 1).repeat(1, 1, 2 * EXPERTS)
    torch.testing.assert_close(trained.probabilities(z + level, None), trained.probabilities(z, None))
    for ahead in (1, 2):
        sums = trained.replay(recorded[0], ahead).sum(-1)
        assert abs(sums.mean() - TOP_K) < 0.2 and sums.std() < 0.4


@pytest.mark.parametrize("layers, experts, width", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (-1, 0, 0)])
def test_routers_of_another_model_are_told(recorded, layers, experts, width):
    """Of a model with more layers the first ones were taken, and the file that was saved could not be read."""
    routers = recorded[1]
    sizes = np.add(routers.weight_LED.shape, (layers, experts, width)).tolist()
    with pytest.raises(TraceMismatch, match=r"routers of .* that read"):
        quick(recorded, routers=Routers.of_weights(torch.zeros(sizes)))


def test_groups_and_own_text_of_another_model_are_told(recorded):
    trace = recorded[0]
    for groups in (LayerGroups.at(1, 4, 5, "of five layers"), LayerGroups.one(2, "of two")):
        with pytest.raises(TraceMismatch, match="groups name"):
            quick(recorded, groups=groups)
        with pytest.raises(TraceMismatch, match="groups name"):
            score(Oracle(SHAPE, 1), trace, groups=groups)
    for changes, error in (
        ({"inputs": trace.inputs[..., :-1]}, TraceMismatch), ({"inputs": None}, BadTrace),
        ({"fingerprint": "f" * 16}, TraceMismatch),
    ):  # fmt: skip
        with pytest.raises(error):
            quick(recorded, own_text=replace(trace, **changes))


@pytest.mark.parametrize("device", ["cuda:77", "gpu0", "cpu:x", ""])
def test_a_device_that_is_not_here_is_told(recorded, trained, tmp_path, device):
    with pytest.raises(UnsupportedOption, match="choose 'auto', 'cpu'"):
        quick(recorded, device=device)
    with pytest.raises(UnsupportedOption, match="choose 'auto', 'cpu'"):
        Llapor.load(trained.save(tmp_path / "saved"), device=device)


@pytest.mark.parametrize("wrong", ["model", "sizes", "width", "no inputs", "no tokens", "padding"])
def test_a_test_trace_that_cannot_judge_is_told_before_training(recorded, tmp_path, wrong):
    """Told behind it, an hour's training was gone: the predictor is saved when it has been judged."""
    trace = recorded[0]
    test = {
        "model": replace(trace, fingerprint="f" * 16),
        "sizes": replace(trace, num_experts=EXPERTS + 1),
        "width": replace(trace, inputs=trace.inputs[..., :-1]),
        "no inputs": replace(trace, inputs=None),
        "no tokens": trace.take(trace.step < 0),
        "padding": replace(trace, position=np.full(len(trace), -1)),
    }[wrong]
    epochs = []
    with pytest.raises((TraceMismatch, BadTrace)):
        train_on_trace(trace, test=test, training=QUICK, on_progress=epochs.append)
    assert not epochs


def test_a_predictor_of_another_model_is_refused(trained, tmp_path):
    path = trained.save(tmp_path / "p.safetensors")
    with pytest.raises(TraceMismatch, match="train_predictor"):
        Llapor.load(path, fingerprint="0" * 16)


def damaged(path, kind: str):
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif kind == "format":
        save_file(tensors, path, metadata | {"format": "something else"})
    elif kind == "metadata":
        save_file(tensors, path, metadata | {"prescope": "{"})
    elif kind == "missing":
        save_file({k: v for k, v in tensors.items() if k != "head"}, path, metadata)
    elif kind == "shape":
        save_file(tensors | {"head": tensors["head"][:, :1].contiguous()}, path, metadata)
    else:
        save_file(tensors | {"head": torch.full_like(tensors["head"], float("nan"))}, path, metadata)
    return path


@pytest.mark.parametrize("kind", ["truncated", "format", "metadata", "missing", "shape", "nan"])
def test_a_damaged_file_is_refused(trained, tmp_path, kind):
    path = damaged(trained.save(tmp_path / "p.safetensors"), kind)
    with pytest.raises(BadPredictor, match=r"p\.safetensors"):
        Llapor.load(path)


def rewritten(path, change):
    """The file with other metadata and tensors, and without the checksum that would tell."""
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        header = {name: text for name, text in file.metadata().items() if name != "checksum"}
    metadata = json.loads(header["prescope"])
    change(metadata, tensors)
    save_file(tensors, path, header | {"prescope": json.dumps(metadata)})
    return path


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int32])
def test_tensors_of_another_kind_are_told_when_they_are_read(trained, tmp_path, dtype):
    """They were multiplied with float32, in the first prediction."""
    path = rewritten(
        trained.save(tmp_path / "p"), lambda _, tensors: tensors.update(head=tensors["head"].to(dtype))
    )
    with pytest.raises(BadPredictor, match=r"expected torch\.float32"):
        Llapor.load(path)


@pytest.mark.parametrize(
    "changed", [{"width": "8"}, {"validation_error": 7}, {"validation_error": float("inf")}], ids=str
)
def test_metadata_that_cannot_be_is_told(trained, tmp_path, changed):
    path = rewritten(trained.save(tmp_path / "p"), lambda metadata, _: metadata.update(changed))
    with pytest.raises(BadPredictor, match="metadata is damaged"):
        Llapor.load(path)


@pytest.mark.parametrize(
    "changed",
    [
        {"epoch": "x"}, {"epoch": -3}, {"epoch": 99}, {"epoch": None}, {"history": None}, {"history": [[1, 2]]},
        {"history": []}, {"best_recall": None}, {"epochs_since_best": -5}, {"identity": [1]}, {"identity": None},
    ],
    ids=str,
)  # fmt: skip
def test_a_damaged_checkpoint_is_told_and_kept(recorded, tmp_path, changed):
    path = tmp_path / "checkpoint"
    quick(recorded, checkpoint=path, training=replace(QUICK, epochs=1))
    rewritten(path, lambda metadata, _: metadata.update(changed))
    before = path.read_bytes()
    with pytest.raises(BadPredictor, match="checkpoint"):
        quick(recorded, checkpoint=path, training=replace(QUICK, epochs=1))
    assert path.read_bytes() == before
    rewritten(path, lambda metadata, _: metadata.pop(next(iter(changed))))
    with pytest.raises(BadPredictor, match="checkpoint"):
        quick(recorded, checkpoint=path, training=replace(QUICK, epochs=1))


def test_nan_weights_are_not_saved_over_a_good_file(trained, tmp_path):
    path = trained.save(tmp_path / "p.safetensors")
    before = path.read_bytes()
    tensors = trained.tensors | {"head": torch.full_like(trained.tensors["head"], float("nan"))}
    broken = Llapor(trained.config, trained.shape, trained.groups, tensors, trained.tag)
    with pytest.raises(BadPredictor, match="'head' holds NaN"):
        broken.save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_loss_that_explodes_ends_training_with_a_reason(recorded, tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    with pytest.raises(BadState, match="lower learning_rate"):
        quick(recorded, training=replace(QUICK, learning_rate=1e30), checkpoint=path)
    assert not path.exists()


def test_bad_traces_are_refused_with_the_remedy(recorded, trained):
    trace, routers = recorded
    with pytest.raises(BadTrace, match="record_inputs=True"):
        train(replace(trace, inputs=None), routers=routers)
    with pytest.raises(BadTrace, match="record_inputs=True"):
        trained.replay(replace(trace, inputs=None), 1)
    with pytest.raises(TooFewPrompts, match="3 different prompts"):
        train(rows_of(trace, np.flatnonzero(trace.sequence < 3)), routers=routers)
    with pytest.raises(TraceMismatch, match="was made for"):
        trained.replay(replace(trace, num_experts=EXPERTS + 1), 1)
    with pytest.raises(TraceMismatch, match="was trained for"):
        trained.replay(replace(trace, fingerprint="of another model"), 1)
    with pytest.raises(UnsupportedOption, match="routers"):
        train(trace, config=SMALL)
    with pytest.raises(BadState, match="wide"):
        trained.predict(0, torch.zeros(1, 5), torch.zeros(1, TOP_K, dtype=torch.int64))
    with pytest.raises(BadState, match="ids_TK"):
        trained.predict(0, torch.zeros(1, 32))


@pytest.mark.parametrize(
    "wrong",
    [
        {"lookahead": 0}, {"lookahead": True}, {"hidden": "64"}, {"block": 2.0}, {"dropout": 1.0}, {"dropout": "no"},
        {"trust": -1.0}, {"trust": None}, {"distill": float("nan")}, {"residual": "no"}, {"relative": 0},
    ],
    ids=str,
)  # fmt: skip
def test_wrong_forms_are_refused_by_name(wrong):
    with pytest.raises(UnsupportedOption, match=f"{next(iter(wrong))} (is|lies)"):
        LlaporConfig(**wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0}, {"epochs": 2.5}, {"epochs": "3"}, {"patience": None}, {"patience": 1.5}, {"batch_tokens": 0},
        {"batch_tokens": 2.5}, {"hold_out": 1.0}, {"hold_out": "0.1"}, {"learning_rate": 0.0}, {"learning_rate": "1"},
        {"learning_rate": float("inf")}, {"weight_decay": -1.0}, {"weight_decay": float("nan")}, {"seed": -1},
        {"seed": 1.5}, {"seed": None}, {"seed": 2**70}, {"objective": "hits"}, {"slots": 0.0}, {"slots": "8GiB"},
    ],
    ids=str,
)  # fmt: skip
def test_wrong_training_is_refused_by_name(wrong):
    with pytest.raises(UnsupportedOption, match=next(iter(wrong))):
        TrainConfig(**wrong)


def test_numpys_numbers_are_settings_that_files_can_hold(recorded, trained, tmp_path):
    config = replace(SMALL, lookahead=np.int64(2), dropout=np.float32(0.1))
    training = replace(QUICK, epochs=np.int32(1), learning_rate=np.float32(4e-3), seed=np.int64(1))
    predictor = quick(
        recorded, config=config, training=training, checkpoint=tmp_path / "on_the_way"
    ).predictor
    assert Llapor.load(predictor.save(tmp_path / "saved")).config == config


def test_the_size_that_is_printed_is_the_size(trained):
    """Cost counts what one prediction of the largest layer reads; all tensors hold it for each layer."""
    cost = trained.cost()
    assert cost.nbytes == 4 * cost.parameters
    assert cost.nbytes * LAYERS > trained.nbytes > cost.nbytes
    assert str(cost) in repr(trained)
