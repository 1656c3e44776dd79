"""The kernels of a captured step against the host's own decisions; in Triton's interpreter where there is no GPU."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from prescope.cache.policies import POLICIES, make_policy
from prescope.cache.residency import ResidencyTable, distinct
from prescope.core.types import MoEShape
from prescope.kernels import ExpertsSpec, LayerWeights
from prescope.weights.layout import row_layout
from tests.support.gates import silu_gate

captured = pytest.importorskip("prescope.kernels.graph_buffers", reason="Triton exists for Linux only")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
L, E, D, F = 3, 12, 32, 24


class World:
    """A small MoE whose experts are in host rows, its table on both sides, and one captured step's buffers."""

    def __init__(
        self,
        tokens: int,
        top_k: int,
        num_slots: int,
        policy: str,
        host: bool = False,
        seed: int = 0,
        scheduled=None,
    ):
        rng = torch.Generator().manual_seed(seed)
        self.shape = MoEShape(L, E, top_k, 0)
        self.up = torch.randn(L, E, 2 * F, D, generator=rng) / 6
        self.down = torch.randn(L, E, D, F, generator=rng) / 5
        layout = row_layout({"gate_up_proj": self.up[0], "down_proj": self.down[0]})
        self.rows = []
        for layer in range(L):
            rows = torch.zeros((E, layout.row_bytes), dtype=torch.uint8, pin_memory=DEVICE == "cuda")
            layout.view(rows, "gate_up_proj").copy_(self.up[layer])
            layout.view(rows, "down_proj").copy_(self.down[layer])
            self.rows.append(rows)
        self.pool = torch.full((num_slots, layout.row_bytes), 0xFF, dtype=torch.uint8, device=DEVICE)  # NaN
        self.slots = LayerWeights(
            layout.view(self.pool, "gate_up_proj"), layout.view(self.pool, "down_proj"), None, None
        )
        frequencies = np.arange(L * E, dtype=np.float64).reshape(L, E) % 7
        self.host_table = ResidencyTable(self.shape, num_slots, make_policy(policy, self.shape, frequencies))
        self.table = captured.DeviceTable(self.shape, num_slots, torch.device(DEVICE))
        self.table.take(self.host_table)
        number = captured.graph_kernels.HOST if host else POLICIES[policy].kind
        self.step = captured.GraphBuffers(
            self.table,
            tokens,
            top_k,
            policy=number,
            orders=False,
            timed=DEVICE == "cuda",
            scheduled=scheduled,
        )
        self.spec = ExpertsSpec(
            up="gate_up_proj", down="down_proj", up_bias=None, down_bias=None, is_transposed=False,
            gate=silu_gate, post_norm=None,
        )  # fmt: skip
        self.rng = rng

    def draw(self, tokens: int, sentinels: bool = False):
        x = torch.randn(tokens, D, generator=self.rng)
        ids = torch.stack([torch.randperm(E, generator=self.rng)[: self.shape.top_k] for _ in range(tokens)])
        if sentinels:
            ids[0, 0], ids[-1, -1] = -1, E
        return x, ids, torch.rand(tokens, self.shape.top_k, generator=self.rng)

    def launch(self, layer: int, x, ids, weights) -> torch.Tensor:
        out = self.step.layer(
            layer, E, x.to(DEVICE), ids.to(DEVICE), weights.to(DEVICE), self.spec, self.slots, self.pool,
            self.rows[layer],
        )  # fmt: skip
        return out.cpu()

    def expected(self, layer: int, x, ids, weights) -> torch.Tensor:
        out = torch.zeros_like(x)
        for t, k in np.ndindex(*ids.shape):
            e = int(ids[t, k])
            if 0 <= e < E:
                h = silu_gate(functional.linear(x[t], self.up[layer, e]))
                out[t] += weights[t, k] * functional.linear(h, self.down[layer, e])
        return out

    def host_need(self, layer: int, ids):
        """The host's own decision for the same routing; returns (needed, missing)."""
        experts, counts = distinct(ids.numpy(), E)
        need = self.host_table.need(layer, experts, counts, counts.astype(float))
        missing = need.experts[need.num_hits :]
        self.host_table.protect(self.host_table.slots_for(layer, need.experts[: need.num_hits]))
        if len(missing):
            slots = self.host_table.take(layer, missing)
            self.host_table.landed(slots)
        self.host_table.unprotect()
        return len(experts), len(missing)


@pytest.mark.parametrize(
    ("policy", "tokens", "top_k", "num_slots"),
    [
        pytest.param(policy, *sizes, marks=[] if policy in quick else pytest.mark.slow)
        for *sizes, quick in (
            (1, 2, 5, ("lru",)),
            (3, 3, 11, ("lfu", "static")),
            (9, 2, 14, ()),
            (16, 4, 36, ()),
        )
        for policy in ("lru", "lfu", "static")
    ],
)
def test_the_gpu_keeps_the_same_experts_as_the_host_and_computes_the_same_sums(
    policy, tokens, top_k, num_slots
):
    world = World(tokens, top_k, num_slots, policy)
    for step in range(6):
        world.step.begin()
        needs = []
        for layer in range(L):
            case = world.draw(tokens, sentinels=step == 3)
            needs.append(world.host_need(layer, case[1]))
            torch.testing.assert_close(
                world.launch(layer, *case), world.expected(layer, *case), rtol=2e-5, atol=2e-5
            )
        world.step.finish(torch.full((tokens,), step + 7, device=DEVICE))
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        log = world.step.log(step)
        assert log.needs.tolist() == [list(need) for need in needs]
        assert log.tokens.tolist() == [step + 7] * tokens
        slot_of = world.table.slot_of.cpu().numpy()
        assert ((slot_of >= 0) == (world.host_table.slot_of >= 0)).all(), "other experts are resident"
        world.table.give(world.host_table)
        world.host_table.check_integrity()


def asked(world: World, layer: int, step: int):
    """Experts and router weights in a layer's question, and whether it is of that step."""
    words = world.step.messages().ask[layer]
    return words >> 32 & 0xFFFF, words.view(np.float32)[::2], (words >> 48 == world.step.number(step)).all()


def host_decides(**settings) -> captured.HostOptions:
    given = {
        "lookahead": 0,
        "scores": None,
        "has_cpu": False,
        "width": D,
        "dtype": torch.float32,
    }
    return captured.HostOptions(**(given | settings))


def test_a_host_driven_step_asks_for_its_experts_and_goes_on_when_they_are_there():
    tokens, top_k = 2, 2
    world = World(tokens, top_k, 6, "lru", host=True, scheduled=host_decides())
    x, ids, weights = world.draw(tokens)
    assert not asked(world, 0, 0)[2], "nobody has asked yet"
    # The answer is given before the question: in the interpreter the waiting kernel and the host are one thread.
    experts, counts = distinct(ids.numpy(), E)
    need = world.host_table.need(0, experts, counts, counts.astype(float))
    slots = world.host_table.take(0, need.experts)
    for expert, slot in zip(need.experts, slots, strict=True):
        world.pool[slot].copy_(world.rows[0][expert])
    target, source = world.step.landing(1)
    target.copy_(source)
    world.step.reply(0, 0, world.host_table.slot_of[:E], last_copy=1, num_on_cpu=0)
    out = world.launch(0, x, ids, weights)
    torch.testing.assert_close(out, world.expected(0, x, ids, weights), rtol=2e-5, atol=2e-5)
    found, found_weights, is_it = asked(world, 0, 0)
    assert is_it and not asked(world, 0, 1)[2], "a message of another step is none"
    assert found.tolist() == ids.ravel().tolist()
    assert found_weights.tolist() == weights.ravel().tolist()
    assert (world.table.slot_of[:E].cpu().numpy() == world.host_table.slot_of[:E]).all()
    # The host shows that nothing is missing now, so that nobody has to answer.
    world.step.messages().shown[:] = world.host_table.slot_of
    world.step.begin()
    if DEVICE == "cuda":
        torch.cuda.synchronize()  # a branch of its own looks
    assert world.step.messages().looked[0] == world.step.number(0)
    world.step.reply(0, 7, np.full(E, -1), last_copy=99, num_on_cpu=3)
    out = world.launch(0, x, ids, weights)
    torch.testing.assert_close(out, world.expected(0, x, ids, weights), rtol=2e-5, atol=2e-5)


def test_the_log_holds_each_layers_routing():
    world = World(2, 2, 8, "lru")
    cases = [world.draw(2) for _ in range(L)]
    for layer, case in enumerate(cases):
        world.launch(layer, *case)
    world.step.finish(torch.tensor([3, 4], device=DEVICE))
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    log = world.step.log(0)
    for layer, (_, ids, weights) in enumerate(cases):
        assert log.ids_LTK[layer].tolist() == ids.tolist()
        assert log.weights_LTK[layer].tolist() == weights.tolist()
    assert world.step.tokens(1) is None, "the next step has not run"


@pytest.mark.parametrize(("tokens", "top_k"), [(1, 3), (9, 4)])
def test_a_scheduled_step_takes_changes_and_the_cpus_pairs(tokens, top_k):
    """The host answers: two experts on the CPU, the others in slots."""
    way = host_decides(has_cpu=True)
    world = World(tokens, top_k, 20, "lru", host=True, scheduled=way)
    for layer in range(2):
        x, ids, weights = world.draw(tokens)
        needed = np.unique(ids.numpy())
        on_cpu, here = needed[:2], needed[2:]
        slots = world.host_table.take(layer, here)
        for expert, slot in zip(here, slots, strict=True):
            world.pool[slot].copy_(world.rows[layer][expert])
        world.host_table.landed(slots)
        for t, k in np.ndindex(*ids.shape):
            if ids[t, k] in on_cpu:
                h = silu_gate(functional.linear(x[t], world.up[layer, ids[t, k]]))
                world.step.cpu_pairs[layer][t * top_k + k] = functional.linear(
                    h, world.down[layer, ids[t, k]]
                )
        target, source = world.step.landing(layer + 1)
        target.copy_(source)
        # In the interpreter the waiting kernel and the host are one thread, so the answer comes first.
        row = world.host_table.slot_of[layer * E : (layer + 1) * E]
        world.step.reply(layer, 0, row, last_copy=layer + 1, num_on_cpu=len(on_cpu))
        word, value = world.step.cpu_flag(layer, 0)
        word.fill_(value)
        out = world.launch(layer, x, ids, weights)
        torch.testing.assert_close(out, world.expected(layer, x, ids, weights), rtol=2e-5, atol=2e-5)
        assert torch.equal(world.step.inputs[layer], x), "the CPU is given the router's inputs"
        found, _, is_it = asked(world, layer, 0)
        assert is_it and found.tolist() == ids.ravel().tolist()


def test_predictions_reach_the_host_with_the_number_of_their_step():
    scores = torch.rand(2, 2, E)
    way = host_decides(lookahead=2, scores=lambda *_: scores.to(DEVICE))
    world = World(1, 2, 20, "lru", host=True, scheduled=way)
    x, ids, weights = world.draw(1)
    world.host_table.take(0, np.sort(ids.numpy().ravel()))
    words = world.step.messages().scores
    assert not words.any(), "nothing has been predicted"
    world.step.reply(0, 0, world.host_table.slot_of[:E], last_copy=0, num_on_cpu=0)
    world.launch(0, x, ids, weights)
    if DEVICE == "cuda":
        torch.cuda.synchronize()  # a branch of its own predicts
    assert (words[0] >> 32 == world.step.number(0)).all() and not words[1].any()
    assert words[0].view(np.float32)[::2].tolist() == scores.ravel().tolist()


def test_all_steps_of_a_table_are_captured_beside_its_own_two_streams(monkeypatch):
    """torch hands out 32 in turn: a step's own were now and then the capture's, and lay in the layers' way."""
    opened = []
    if DEVICE == "cpu":
        monkeypatch.setattr(captured, "_branch", lambda device: opened.append(device) or object())
    table = captured.DeviceTable(MoEShape(L, E, 2, 0), 8, torch.device(DEVICE))
    way = host_decides(lookahead=1, scores=lambda *_: None)
    forms = [
        {"policy": captured.graph_kernels.HOST, "orders": False, "scheduled": way},
        {"policy": captured.graph_kernels.HOST, "orders": False, "scheduled": host_decides(lookahead=0)},
        {"policy": POLICIES["lru"].kind, "orders": True},
        {"policy": POLICIES["lru"].kind, "orders": False},
    ]
    steps = [table.new_step(tokens, 2, timed=False, **form) for form in forms for tokens in (1, 4)]
    assert table.looks != table.side and len(opened) == (2 if DEVICE == "cpu" else 0)
    assert [step._looks for step in steps] == [table.looks] * 6 + [None] * 2
    assert [getattr(step, "_side", None) for step in steps] == [table.side] * 2 + [None] * 6
