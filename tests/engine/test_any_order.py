"""Any use in any order: operations drawn from a seed on one attached model, each text compared with the plain model's.

Two models with the same weights, one of them attached. What an operation leaves behind would show in a later one.
"""

import random
import warnings

import pytest
import torch
from transformers import DynamicCache, GenerationConfig

import prescope
from prescope.cache.policies import POLICIES
from prescope.errors import PrescopeError
from prescope.scheduler.costs import LayerCosts
from tests.support.families import VOCAB, build

COSTS = LayerCosts(link_us=100.0, gpu_us=5.0, rest_us=200.0, cpu_us=(0.0, 80.0, 120.0), source="made up")
SCHEDULES = ("on-demand", "presched", "fiddler", "hybrimoe", "streaming")
STEPS = 14


class Struck(Exception):
    """What a caller's own code raises in the middle of a run."""


def strike(*arguments):
    raise Struck


class Pair:
    """A plain model, and the same one attached."""

    def __init__(self, family: str, seed: int) -> None:
        self.rng = random.Random(f"{family} {seed}")
        self.plain, self.model, self.draft = build(family), build(family), build(family, seed=1)
        self.attach()

    def attach(self) -> None:
        schedule, cache = self.rng.choice(SCHEDULES), self.rng.choice(sorted(POLICIES.keys() - {"static"}))
        self.engine = prescope.attach(
            self.model, slots=self.rng.choice((4, 7, 1.0)), schedule=schedule, cache=cache, costs=COSTS,
            cpu_threads=0, device="cpu", link_gb_per_s=50.0,
        )  # fmt: skip

    def prompt(self, batch: int | None = None) -> dict[str, torch.Tensor]:
        batch, length = batch or self.rng.choice((1, 1, 2, 3)), self.rng.choice((1, 2, 6, 11))
        rows = [[self.rng.randrange(3, VOCAB) for _ in range(length)] for _ in range(batch)]
        ids, mask = torch.tensor(rows), torch.ones(batch, length, dtype=torch.long)
        for row in range(1, batch if length > 2 else 1):
            mask[row, : self.rng.randrange(length - 1)] = 0
        return {"input_ids": ids * mask, "attention_mask": mask}

    def settings(self) -> dict:
        """One or two of the ways in which tokens are chosen."""
        ways = (
            {}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}, {"do_sample": True, "top_k": 9},
            {"do_sample": True, "num_return_sequences": 2}, {"eos_token_id": [*range(3, 40)]},
            {"repetition_penalty": 1.5}, {"bad_words_ids": [[5], [7, 8]]}, {"prefill_chunk_size": 2},
            {"use_cache": False}, {"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 2},
            {"assistant_model": self.draft}, {"return_dict_in_generate": True, "output_scores": True},
            {"generation_config": GenerationConfig(max_new_tokens=3, do_sample=False, pad_token_id=0)},
        )  # fmt: skip
        return {name: value for _ in range(2) for name, value in self.rng.choice(ways).items()}

    # -- operations --------------------------------------------------------------------------------------------

    def generate(self) -> None:
        given, settings = self.prompt(), {"max_new_tokens": 5, "pad_token_id": 0} | self.settings()
        greedy = {} if "generation_config" in settings else {"do_sample": False}
        by_model = self.rng.random() < 0.4
        try:
            expected = self.seeded(self.plain, given, greedy | settings)
        except Exception as error:  # noqa: BLE001 - settings that exclude one another: the same is said of both
            with pytest.raises((type(error), PrescopeError)):
                self.seeded(self.model if by_model else self.engine, given, settings)
            return
        if by_model:
            with self.engine.record() as results:
                assert torch.equal(self.seeded(self.model, given, greedy | settings), expected)
            assert len(results) == 1
            return
        run = self.seeded(self.engine, given, settings)
        rows = expected[:, given["input_ids"].shape[1] :].tolist()
        assert len(run.tokens) == len(rows)
        for found, row in zip(run.tokens, rows, strict=True):
            assert found == row[: len(found)] and not set(row[len(found) :]) - {0, -1}, settings
        assert run.metrics.output_tokens == sum(map(len, run.tokens))

    @staticmethod
    def seeded(what, given, settings):
        torch.manual_seed(0)
        found = what.generate(**given, **settings)
        return getattr(found, "sequences", found)

    def chat(self) -> None:
        """Two turns with one cache, each by the engine or by the model."""
        texts = {}
        ways, first, second = (
            [self.rng.choice(("engine", "model")) for _ in range(2)], self.prompt(1), self.prompt(1),
        )  # fmt: skip
        for name, model in (("plain", self.plain), ("attached", self.model)):
            cache, ids = DynamicCache(config=model.config), first["input_ids"]
            for way, new in zip(ways, (second["input_ids"], first["input_ids"]), strict=True):
                settings = {
                    "attention_mask": torch.ones_like(ids), "past_key_values": cache, "max_new_tokens": 4,
                    "pad_token_id": 0,
                }  # fmt: skip
                if way == "engine" and name == "attached":
                    said = torch.tensor(self.engine.generate(ids, **settings).tokens)
                    ids = torch.cat([ids, said, new], dim=1)
                else:
                    ids = torch.cat([model.generate(ids, do_sample=False, **settings), new], dim=1)
            texts[name] = ids.tolist()
        assert texts["attached"] == texts["plain"]

    @torch.no_grad()
    def forward(self) -> None:
        given = self.prompt()
        given["labels"] = given["input_ids"]
        expected, found = self.plain(**given), self.model(**given)
        torch.testing.assert_close(found.logits, expected.logits, atol=2e-4, rtol=1e-3)
        torch.testing.assert_close(
            found.loss, expected.loss, atol=2e-4, rtol=1e-3, equal_nan=True
        )  # of one token

    def configure(self) -> None:
        changes = (
            {"slots": self.rng.choice((4, 5, 9, 1.0))}, {"cache": self.rng.choice(("lru", "lfu", "arc"))},
            {"schedule": self.rng.choice(SCHEDULES)}, {"predictor": "none"}, {"compiled": False},
        )  # fmt: skip
        self.engine.configure(**self.rng.choice(changes))
        former = self.engine.describe()
        wrong = self.rng.choice(
            ({"slots": 0}, {"cache": "x"}, {"schedule": 3}, {"width": -1}, {"nothing": 1})
        )
        with pytest.raises(PrescopeError):
            self.engine.configure(slots=6, **wrong) if "slots" not in wrong else self.engine.configure(
                **wrong
            )
        assert self.engine.describe() == former

    def cancel(self) -> None:
        run = self.engine.generate(
            **self.prompt(1),
            max_new_tokens=9,
            pad_token_id=0,
            on_step=lambda n: n > 1 and self.engine.cancel(),
        )
        assert len(run.tokens[0]) == 2 and any("cancelled" in note for note in run.notes)

    def interrupt(self) -> None:
        where = self.rng.choice(("on_step", "logits_processor", "hook", "in a recording"))
        settings = {"max_new_tokens": 4, "pad_token_id": 0}
        hook = None
        try:
            if where == "on_step":
                settings["on_step"] = strike
            elif where == "logits_processor":
                settings["logits_processor"] = [strike]
            else:
                hook = self.engine.layers[-1].module.register_forward_hook(strike)
            with pytest.raises(Struck):
                if where == "in a recording":
                    with self.engine.record():
                        self.model.generate(**self.prompt(), **settings)
                else:
                    self.engine.generate(**self.prompt(), **settings)
        finally:
            if hook is not None:
                hook.remove()
        assert not self.engine.forwards.recorders and self.engine.turn.holder is None

    def force(self) -> None:
        given = self.prompt(1)
        run = self.engine.generate(**given, max_new_tokens=4, pad_token_id=0)
        self.engine.force_routing(run.trace)
        assert self.engine.generate(**given, max_new_tokens=4, pad_token_id=0).tokens == run.tokens
        with pytest.raises(PrescopeError):
            self.engine.generate(**self.prompt(2), max_new_tokens=4, pad_token_id=0)
        self.engine.force_routing(None)

    @torch.no_grad()
    def edit(self) -> None:
        """A weight that is no expert's, the same in both."""
        for model in (self.plain, self.model):
            model.get_output_embeddings().weight[5] *= 1.25

    def reattach(self) -> None:
        self.engine.close()
        for (name, back), own in zip(
            self.model.state_dict().items(), self.plain.state_dict().values(), strict=True
        ):
            assert torch.equal(back, own), name
        self.attach()


OPERATIONS = {
    Pair.generate: 10, Pair.forward: 3, Pair.configure: 4, Pair.chat: 3, Pair.cancel: 2, Pair.interrupt: 3,
    Pair.force: 2, Pair.edit: 1, Pair.reattach: 2,
}  # fmt: skip


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss", "granitemoe"])
def test_whatever_was_done_before_the_next_text_is_the_plain_models(family, seed):
    pair, done = Pair(family, seed), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for operation in pair.rng.choices(list(OPERATIONS), list(OPERATIONS.values()), k=STEPS):
            done.append(operation.__name__)
            try:
                operation(pair)
                pair.engine.check_integrity()
            except (Exception, pytest.fail.Exception) as error:
                raise AssertionError(f"{family}, seed {seed}: {' > '.join(done)}") from error
    pair.reattach()
