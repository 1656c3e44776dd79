"""The training recipe on a toy: laws of its balance loss and baselines, and one run of a few seconds."""

from __future__ import annotations

import json
import math
import random
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes import evaluate_moe, train_moe, write_model_card
from recipes._balance import (
    BalanceController,
    balance_losses,
    layer_balance_loss,
    load_ratios,
    mutual_information_bits,
)
from recipes._data import WindowSampler, cut_document, evaluation_windows, load_streams, mixture_weights
from recipes._loss_svg import spread
from recipes._ngram import KneserNeyTrigram, perplexity, unigram_probabilities
from recipes._training import Trainer, learning_rate

pytestmark = pytest.mark.usefixtures("one_thread")

NUM_EXPERTS, TOP_K, CONTEXT = 8, 2, 32
MICRO = (
    f"--hidden 64 --layers 2 --heads 2 --kv-heads 1 --head-dim 32 --experts {NUM_EXPERTS} --top-k {TOP_K} "
    f"--expert-width 96 --context {CONTEXT} --batch-tokens 512 --lr 3e-3 --shards-mib 1 --dtype float32 "
    "--device cpu --valid-tokens 2048 --tokenizer toy"
).split()


# ---- a corpus of three easy languages ----


def toy_document(domain: str, rng: random.Random) -> str:
    if domain == "sums":
        pairs = [(rng.randrange(50), rng.randrange(50)) for _ in range(12)]
        return "".join(f"{a} + {b} = {a + b}\n" for a, b in pairs)
    if domain == "verse":
        return "".join(f"the {rng.choice(['cat', 'dog', 'hen'])} sat on a mat\n" for _ in range(10))
    return "".join(f"def f{rng.randrange(9)}(x):\n    return x * {rng.randrange(9)}\n\n" for _ in range(6))


def byte_level(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("corpus")
    rng = random.Random(0)
    layout = {"train": (["sums", "verse", "code"], 120), "valid": (["sums", "verse", "code"], 12)}
    for split, (domains, num_documents) in (layout | {"ood": (["verse"], 8)}).items():
        (root / split).mkdir()
        for domain in domains:
            name = "upper" if split == "ood" else domain
            texts = [toy_document(domain, rng) for _ in range(num_documents)]
            texts = [text.upper() for text in texts] if split == "ood" else texts
            (root / split / f"{name}.txt").write_text("".join(f"{text}<|endoftext|>\n" for text in texts))
    tokenizer = byte_level(Tokenizer(models.BPE()))
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<|endoftext|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(path) for path in sorted((root / "train").glob("*.txt"))], trainer)
    (root / "tokenizers").mkdir()
    tokenizer.save(str(root / "tokenizers" / "toy.json"))
    (root / "ATTRIBUTION.md").write_text(
        "| source | from | licence | credit | documents | bytes | domain |\n|---|---|---|---|---|---|---|\n"
        "| toy | this test | CC0-1.0 | nobody | 360 | 9 | sums, verse |\n"
    )
    return root


@pytest.fixture(scope="module")
def tokenizer(corpus: Path) -> Tokenizer:
    return Tokenizer.from_file(str(corpus / "tokenizers" / "toy.json"))


@pytest.fixture(scope="module")
def folder(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model trained for five seconds, evaluated, with its card."""
    out = tmp_path_factory.mktemp("run") / "micro"
    train_moe.main([*MICRO, "--corpus", str(corpus), "--out", str(out), "--seconds", "5"])
    evaluate_moe.main([str(out), "--corpus", str(corpus), "--device", "cpu"])
    write_model_card.main([str(out), "--corpus", str(corpus)])
    return out


def read(folder: Path, name: str) -> dict:
    return json.loads((folder / name).read_text(encoding="utf-8"))


# ---- the balance ----


def certain_logits(chosen_TK: torch.Tensor) -> torch.Tensor:
    """Router logits whose softmax gives these K experts all the probability, in equal parts."""
    return torch.zeros(len(chosen_TK), NUM_EXPERTS).scatter_(1, chosen_TK, 50.0)


def test_balance_loss_is_one_for_uniform_routing() -> None:
    tokens = torch.arange(64)
    chosen_TK = torch.stack([tokens % NUM_EXPERTS, (tokens + 1) % NUM_EXPERTS], dim=1)
    assert layer_balance_loss(certain_logits(chosen_TK), TOP_K).item() == pytest.approx(1.0)


def test_balance_loss_is_experts_over_top_k_for_collapsed_routing() -> None:
    chosen_TK = torch.tensor([[2, 5]]).repeat(64, 1)
    assert layer_balance_loss(certain_logits(chosen_TK), TOP_K).item() == pytest.approx(NUM_EXPERTS / TOP_K)


def test_balance_loss_sees_a_layer_that_pooling_would_excuse() -> None:
    """Two layers, each using one half of the experts: pooled they look fair, per layer they are not."""
    tokens = torch.arange(64)
    low = torch.stack([tokens % 4, (tokens + 1) % 4], dim=1)
    losses = balance_losses([certain_logits(low), certain_logits(low + 4)], TOP_K)
    assert losses.tolist() == pytest.approx([2.0, 2.0])
    pooled = certain_logits(torch.cat([low, low + 4]))
    assert layer_balance_loss(pooled, TOP_K).item() == pytest.approx(1.0)


def test_balance_loss_pushes_the_busy_expert_down() -> None:
    logits = torch.zeros(64, NUM_EXPERTS)
    logits[:, :TOP_K] = 1.0
    logits.requires_grad_()
    layer_balance_loss(logits, TOP_K).backward()
    assert (logits.grad[:, :TOP_K] > 0).all() and (logits.grad[:, TOP_K:] < 0).all()


def test_controller_raises_only_the_layer_in_need_and_lets_go_later() -> None:
    controller = BalanceController(num_layers=2, start=0.05, floor=0.01)
    starved, fair = np.array([0.1, 1.9]), np.array([1.0, 1.0])
    assert controller.coefficients(0.0).tolist() == pytest.approx([0.05, 0.05])
    controller.observe(np.stack([starved, fair]))
    assert controller.coefficients(1.0).tolist() == pytest.approx([0.02, 0.01])
    for _ in range(20):
        controller.observe(np.stack([fair, fair]))
    assert controller.coefficients(1.0).tolist() == pytest.approx([0.01, 0.01])


def test_mutual_information_is_zero_when_domains_route_alike_and_full_when_apart() -> None:
    assert mutual_information_bits(np.array([[10, 30], [20, 60]])) == pytest.approx(0.0)
    assert mutual_information_bits(np.diag([25, 25, 25, 25])) == pytest.approx(2.0)


def test_load_ratios_average_to_one() -> None:
    counts_LE = np.array([[4, 0, 0, 0], [1, 1, 1, 1]])
    assert load_ratios(counts_LE).tolist() == [[4.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]


# ---- data ----


def test_cut_documents_encode_like_whole_ones(tokenizer: Tokenizer) -> None:
    rng = random.Random(1)
    document = "".join(toy_document(domain, rng) for domain in ("sums", "code", "verse") * 3)
    pieces = list(cut_document(document, limit=100))
    assert len(pieces) > 5 and "".join(pieces) == document
    joined = [index for piece in pieces for index in tokenizer.encode(piece).ids]
    assert joined == tokenizer.encode(document).ids


def test_every_batch_mixes_domains_in_their_shares_and_windows_stay_inside_a_domain() -> None:
    streams = {
        name: np.arange(first, first + 500, dtype=np.uint16) for name, first in (("a", 0), ("b", 1000))
    }
    sampler = WindowSampler.build(streams, {"a": 0.75, "b": 0.25}, window=9, device="cpu", seed=0)
    for _ in range(20):
        windows = sampler.draw(16)
        assert (windows.diff(dim=1) == 1).all()
        assert int((windows[:, 0] >= 1000).sum()) == 4


def test_evaluation_windows_predict_every_token_once() -> None:
    windows = evaluation_windows(np.arange(41, dtype=np.uint16), context=8)
    assert windows[:, 1:].flatten().tolist() == list(range(1, 41))


def test_mixture_weights_favour_small_domains_and_sum_to_one() -> None:
    weights = mixture_weights({"large": np.zeros(1000), "small": np.zeros(10)})
    assert sum(weights.values()) == pytest.approx(1.0)
    assert weights["small"] > 10 / 1010


# ---- baselines ----


def test_unigram_perplexity_by_hand() -> None:
    """Training text 0 0 1 with three ids: add-one gives 3/6, 2/6, 1/6."""
    probabilities = unigram_probabilities(np.array([0, 0, 1]), vocab_size=3)
    assert probabilities.tolist() == pytest.approx([3 / 6, 2 / 6, 1 / 6])
    assert perplexity(probabilities[np.array([0, 2])]) == pytest.approx(math.sqrt(2 * 6))


def test_trigram_probabilities_sum_to_one_after_any_two_tokens() -> None:
    vocab_size = 6
    text = np.random.default_rng(0).integers(0, vocab_size - 1, 300) ** 2 % vocab_size
    model = KneserNeyTrigram.fit(text, vocab_size)
    ids = np.indices((vocab_size,) * 3).reshape(3, -1).T
    sums = model.probabilities(ids).reshape(-1, vocab_size).sum(axis=1)
    assert sums == pytest.approx(np.ones(vocab_size**2))


def test_trigram_knows_what_it_counted() -> None:
    text = np.tile([0, 1, 2, 3], 200)
    model = KneserNeyTrigram.fit(text, vocab_size=5)
    assert perplexity(model.probabilities(text)) < 1.1


# ---- the run ----


def test_learning_rate_rises_then_ends_at_zero() -> None:
    assert learning_rate(0.2, 1e-3) == 1e-3
    assert learning_rate(0.0, 1e-3) < learning_rate(0.02, 1e-3) < 1e-3
    assert learning_rate(1.0, 1e-3) == 0.0


def test_training_lowers_the_loss_of_every_domain(folder: Path) -> None:
    log = read(folder, "training_log.json")
    for domain, before in log["untrained_valid_loss"].items():
        assert log["records"][-1]["valid_loss"][domain] < 0.9 * before
    assert not log["interrupted"]
    assert log["records"][-1]["learning_rate"] == 0.0
    assert log["records"][-1]["tokens"] == log["records"][-1]["step"] * 512


def test_folder_gives_model_and_tokenizer_back(folder: Path, tokenizer: Tokenizer) -> None:
    assert read(folder, "training_log.json")["reload_max_logit_difference"] == 0.0
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    loaded = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    text = "the cat sat on a mat\n3 + 4 = 7\n"
    assert loaded(text)["input_ids"] == tokenizer.encode(text).ids
    assert (loaded.eos_token, loaded.pad_token) == ("<|endoftext|>", "<|pad|>")
    out = model.generate(**loaded("the cat", return_tensors="pt"), max_new_tokens=4, do_sample=False)
    assert out.shape[1] <= len(loaded("the cat")["input_ids"]) + 4


def test_shards_stay_below_their_limit(folder: Path) -> None:
    sizes = [path.stat().st_size for path in folder.glob("*.safetensors")]
    assert len(sizes) >= 2, "a model larger than one shard must be split"
    assert max(sizes) < 1.05 * 2**20  # the limit counts tensors; a header of a few KiB comes on top


def test_no_absolute_path_reaches_the_folder(folder: Path, corpus: Path) -> None:
    for name in ("training_log.json", "evaluation.json", "README.md", "tokenizer_config.json", "config.json"):
        text = (folder / name).read_text(encoding="utf-8")
        assert str(corpus.parent) not in text and str(folder.parent) not in text, name


def test_evaluation_is_consistent(folder: Path, corpus: Path, tokenizer: Tokenizer) -> None:
    evaluation = read(folder, "evaluation.json")
    routing = evaluation["routing"]
    ratios_LE = np.array(routing["load_ratio"])
    assert ratios_LE.shape == (2, NUM_EXPERTS)
    assert ratios_LE.sum(axis=1) == pytest.approx(NUM_EXPERTS, abs=0.01)
    for row, ratios_E in zip(routing["layers"], ratios_LE, strict=True):
        assert row["min_load_ratio"] == pytest.approx(ratios_E.min(), abs=1e-3)
        assert 0.0 <= row["domain_expert_bits"] <= math.log2(3)
    valid = [row for row in evaluation["domains"].values() if row["split"] == "valid"]
    assert routing["assignments"] == sum(row["tokens"] for row in valid) * 2 * TOP_K  # two layers
    assert set(evaluation["domains"]) == {"sums", "verse", "code", "upper"}
    for row in evaluation["domains"].values():
        assert row["perplexity"] == pytest.approx(math.exp(row["loss_nats"]))
    counts = np.bincount(
        np.concatenate(list(load_streams(corpus, "train", tokenizer).values())), minlength=384
    )
    targets = load_streams(corpus, "valid", tokenizer)["sums"]
    targets = targets[1 : 1 + evaluation["domains"]["sums"]["tokens"]]
    by_hand = math.exp(-np.mean(np.log((counts[targets] + 1) / (counts.sum() + len(counts)))))
    assert evaluation["domains"]["sums"]["unigram_perplexity"] == pytest.approx(by_hand)


def test_card_shows_the_numbers_and_a_figure(folder: Path) -> None:
    card = (folder / "README.md").read_text(encoding="utf-8")
    evaluation = read(folder, "evaluation.json")
    for row in evaluation["domains"].values():
        assert f"{row['perplexity']:.2f}" in card
    assert "toy (CC0-1.0; nobody)" in card
    svg = ET.parse(folder / "loss.svg").getroot()
    assert len(svg.findall("{http://www.w3.org/2000/svg}polyline")) == 4  # three domains and training


def test_labels_of_the_figure_do_not_overlap() -> None:
    assert spread([10.0, 12.0, 50.0, 11.0], step=14) == [10.0, 38.0, 52.0, 24.0]


def test_interrupt_saves_what_there_is(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Trainer.train_step

    def stopped_at_three(self: Trainer, progress: float) -> None:
        if self.step == 3:
            raise KeyboardInterrupt
        plain(self, progress)

    monkeypatch.setattr(Trainer, "train_step", stopped_at_three)
    train_moe.main([*MICRO, "--corpus", str(corpus), "--out", str(tmp_path / "cut"), "--seconds", "60"])
    log = read(tmp_path / "cut", "training_log.json")
    assert log["interrupted"] and log["records"][-1]["step"] == 3
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "cut", local_files_only=True) is not None
