"""A generator of routing traces from a few statistics and a seed, for shapes whose weights are not available.

It makes no router inputs, so predictors that read them cannot be judged on such a trace. Nor does such a trace show
how a real model of that shape routes; every trace says "synthetic" in its model's name.

Shapes: R rows, L MoE layers, E experts, K top-k.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ...errors import TraceMismatch, UnsupportedOption
from ..routing import RoutingTrace
from .drawing import draw_ranks, expert_of_rank, popularity_of_ranks
from .rows import TokenRows, fingerprint_of, synthetic_trace

#: Beyond this exponent the K most popular experts are all there is.
MOST_ZIPF = 8.0
#: Expert ids of a trace are int16.
MOST_EXPERTS = 2**15 - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class SyntheticSpec:
    """The routing statistics of a made-up model, and its shape.

    Args:
        num_layers, num_experts, top_k: L MoE layers of E experts, of which a token uses K.
        zipf: exponent of the popularity of a layer's experts: the i-th most popular weighs i ** -zipf; 0 is uniform.
            Published counts of one domain and layer each (allenai/OLMoE, scripts/routing_output) give OLMoE 0.25 to
            1.2, median 0.7, and Mixtral 0.05 to 0.4, median 0.2; cumulative shares then differ by 0.1 at most.
        persistence: probability that an expert is used again by the next token of its sequence, whatever its
            popularity; popularity comes on top.
        correlation: probability that an expert calls its successor, a fixed one in the next layer, as long as the token
            has room for it after `persistence`. From layer to layer only: two layers ahead little of it is left, while
            on tiny-moe transitions predict two layers ahead as well as one (recall@2 0.47 against 0.31 in its fit).
        diversity: how far each sequence has its own favourites, 0 (all share one order) to 1 (none in common). Real
            sequences do, since a text has a topic; without it a fit to tiny-moe misses LRU's hits at 50 % of the
            slots by 0.17 instead of 0.04: a sequence comes back to its experts long after the last use.
        seed: of the made-up model: which expert is popular in which layer, and which follows which. Traces of one
            spec agree on it whatever the seed of the trace.

    Raises:
        UnsupportedOption: a value outside its range.
    """

    num_layers: int
    num_experts: int
    top_k: int
    zipf: float = 1.0
    persistence: float = 0.0
    correlation: float = 0.0
    diversity: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_layers < 1:
            raise UnsupportedOption(f"num_layers is {self.num_layers}; a model has at least one MoE layer")
        if not 1 <= self.num_experts <= MOST_EXPERTS:
            raise UnsupportedOption(f"num_experts is {self.num_experts}; choose 1 to {MOST_EXPERTS}")
        if not 1 <= self.top_k <= self.num_experts:
            raise UnsupportedOption(
                f"top_k is {self.top_k}; a token uses 1 to num_experts = {self.num_experts} distinct experts"
            )
        if not 0.0 <= self.zipf <= MOST_ZIPF:
            raise UnsupportedOption(f"zipf is {self.zipf}; choose 0 (uniform) to {MOST_ZIPF}")
        for name in ("persistence", "correlation", "diversity"):
            value = getattr(self, name)
            if not 0.0 <= value <= 1.0:
                raise UnsupportedOption(f"{name} is {value}; choose 0 to 1")
        if self.seed < 0:
            raise UnsupportedOption(f"seed is {self.seed}; a seed is not negative")

    def __str__(self) -> str:
        return (
            f"Zipf {self.zipf:.2f}, persistence {self.persistence:.2f}, correlation {self.correlation:.2f}, "
            f"diversity {self.diversity:.2f}"
        )

    @property
    def fingerprint(self) -> str:
        """Differs between specs, and from that of any real model."""
        return fingerprint_of(**asdict(self))

    def with_shape(self, num_layers: int, num_experts: int, top_k: int) -> Self:
        """The same statistics in another shape.

        An exponent below 1 keeps its meaning in shares: the most popular quarter of the experts is used about as much,
        however many there are. That a real model of the shape routes like this is an assumption.
        """
        return replace(self, num_layers=num_layers, num_experts=num_experts, top_k=top_k)

    def generate(
        self, *, prompt_tokens: int = 64, new_tokens: int = 64, batch: int = 1, seed: int = 0
    ) -> RoutingTrace:
        """A run of `batch` sequences as an engine would record it, without router inputs.

        Step 0 is the prefill of batch * prompt_tokens rows, then one row for each sequence in each of new_tokens - 1
        decode steps. Router weights are fitted to nothing, see `draw_weights`. The same seed gives the same trace.
        """
        rows = TokenRows(prompt_tokens, new_tokens, batch)
        rng = np.random.default_rng([self.seed, seed])
        ids_RLK = self._draw(rows.batch, rows.length, rows.sequence, rows.position, rng)
        return self._trace(ids_RLK, rows.columns, rows.prompts, rng)

    def like(self, trace: RoutingTrace, *, seed: int = 0) -> RoutingTrace:
        """The rows of a trace (steps, sequences, positions, padding) with experts drawn anew.

        Raises:
            TraceMismatch: the trace is of another shape.
        """
        found = trace.shape[:3]
        wanted = (self.num_layers, self.num_experts, self.top_k)
        if found != wanted:
            raise TraceMismatch(
                f"the trace of {trace.model} has (layers, experts, top-k) = {found}, the spec {wanted}; "
                f"use spec.with_shape{found}"
            )
        sequences, sequence_R = np.unique(trace.sequence, return_inverse=True)
        token_R = _token_in_sequence(sequence_R)
        rng = np.random.default_rng([self.seed, seed])
        length = int(token_R.max(initial=-1)) + 1
        ids_RLK = self._draw(len(sequences), length, sequence_R, token_R, rng)
        columns = {name: getattr(trace, name) for name in ("step", "sequence", "position", "phase")}
        return self._trace(ids_RLK, columns, trace.prompts, rng)

    def _draw(
        self,
        num_sequences: int,
        num_tokens: int,
        sequence_R: NDArray[np.integer],
        token_R: NDArray[np.integer],
        rng: np.random.Generator,
    ) -> NDArray[np.int16]:
        """(R, L, K) ids of the rows that are token `token_R` of sequence `sequence_R`."""
        popularity_SE = popularity_of_ranks(self.num_experts, self.zipf, self.diversity, num_sequences, rng)
        ranks_LTSK = draw_ranks(
            popularity_SE, self.num_layers, num_tokens, self.top_k, self.persistence, self.correlation, rng
        )
        ranks_RLK = ranks_LTSK[:, token_R, sequence_R].transpose(1, 0, 2)
        expert_LE = expert_of_rank(self.num_layers, self.num_experts, self.seed)
        return expert_LE[np.arange(self.num_layers)[:, None], ranks_RLK]

    def _trace(
        self,
        ids_RLK: NDArray[np.int16],
        columns: dict[str, Any],
        prompts: list[dict[str, Any]],
        rng: np.random.Generator,
    ) -> RoutingTrace:
        return synthetic_trace(
            ids_RLK, self.num_experts, columns, prompts, rng, label=str(self), fingerprint=self.fingerprint
        )


def _token_in_sequence(sequence_R: NDArray[np.integer]) -> NDArray[np.int64]:
    """How many rows of its sequence stand before each row."""
    order = np.argsort(sequence_R, kind="stable")
    _, first = np.unique(sequence_R[order], return_index=True)
    token_R = np.empty(len(sequence_R), dtype=np.int64)
    token_R[order] = np.arange(len(sequence_R)) - np.repeat(first, np.diff(np.r_[first, len(sequence_R)]))
    return token_R
