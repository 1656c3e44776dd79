"""A LLaPor predictor's settings, the model it belongs to, and the tensors that follow from both.

Shapes: D width, P compressed width, H hidden, B width of the block, E experts, L MoE layers, N = lookahead * E outputs.
"""

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from ..core.numbers import is_number, require_count, require_size, settle
from ..core.types import MoEShape
from ..errors import UnsupportedOption

#: Compressed widths of the paper, for hidden size 4096; a model narrower than that keeps all its dimensions.
WIDTH_OUTER, WIDTH_MIDDLE = 256, 512


@dataclass(frozen=True, kw_only=True, slots=True)
class LlaporConfig:
    """Settings of the networks and their loss.

    Args:
        lookahead: layers ahead, 1..lookahead are all predicted.
        width_outer, width_middle: PCA dimensions kept, cut to the model's width.
        hidden: width of the networks. `block`: of the middle group's gated residual block.
        dropout: share of hidden units dropped in training.
        residual: early-router logits + learned correction; needs the model's routers.
        trust: the residual variant's correction fades with a state's mean squared whitened distance from the training
            states (which lie at 1 on average): it counts in full up to the distance that `held_out.fit_trust` finds for
            each layer: this many times the errors it corrects over those it leaves; 0: always in full.
        relative: scores are scaled from a logit's distance to its token's own threshold, the middle between its K-th
            best and the next (`baselines.above_threshold`), so that experts of easy and of hard tokens compare. Ranks
            within a token are the same either way; across tokens those of the plain logits are much worse.
        use_choice: the chosen experts and their weights are inputs too.
        focal_lambda, focal_gamma: weight and exponent of the focal loss in the outer groups.
        distill: weight of the cross-entropy to the coming router's own probabilities, which say more than the K
            chosen ids; needs the model's routers; 0 is the paper's loss. Applies to the residual variant only.
    """

    lookahead: int = 4
    width_outer: int = WIDTH_OUTER
    width_middle: int = WIDTH_MIDDLE
    hidden: int = 512
    block: int = 128
    dropout: float = 0.1
    residual: bool = True
    trust: float = 1.5
    relative: bool = True
    use_choice: bool = True
    focal_lambda: float = 0.5
    focal_gamma: float = 2.0
    distill: float = 1.0

    def __post_init__(self) -> None:
        for name in ("lookahead", "width_outer", "width_middle", "hidden", "block"):
            require_count(name, getattr(self, name))
        if not is_number(self.dropout) or not 0.0 <= self.dropout < 1.0:
            raise UnsupportedOption(f"dropout is {self.dropout!r}; it lies in [0, 1)")
        for name in ("trust", "focal_lambda", "focal_gamma", "distill"):
            require_size(name, getattr(self, name))
        for name in ("residual", "relative", "use_choice"):
            if not isinstance(getattr(self, name), bool):
                raise UnsupportedOption(f"{name} is {getattr(self, name)!r}; it is True or False")
        settle(self)

    @classmethod
    def paper(cls, **changes: Any) -> "LlaporConfig":
        """The paper's form: no early router, no distillation."""
        return cls(**{"residual": False, "distill": 0.0, **changes})


@dataclass(frozen=True, kw_only=True)
class ModelTag:
    """Which model a predictor belongs to, and what is known of its training."""

    model: str
    fingerprint: str
    notes: dict[str, Any] = field(default_factory=dict)
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))


def tensor_shapes(
    config: LlaporConfig, shape: MoEShape, width: int, num_middle: int
) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a predictor; `width` is D. A file is checked against it."""
    L, E = shape[:2]
    P = min(width, max(config.width_outer, config.width_middle))
    H, B, N = config.hidden, config.block, config.lookahead * E
    shapes: dict[str, tuple[int, ...]] = {
        "pca_mean": (L, 1, width),
        "pca": (L, width, P),
        "whiten": (L, 1, P),
        "in": (L, P, H),
        "in_bias": (L, 1, H),
        "up": (num_middle, H, B),
        "up_bias": (num_middle, 1, B),
        "gate": (num_middle, H, B),
        "gate_bias": (num_middle, 1, B),
        "down": (num_middle, B, H),
        "head": (L, H, N),
        "head_bias": (L, 1, N),
        "platt": (L, config.lookahead, 2),
    }
    if config.use_choice:
        shapes["choice"] = (L, E, H)
    if config.residual:
        shapes |= {
            "skip": (L, 1, N),
            "trust": (L, 1, 1),
            "platt_faded": (L, config.lookahead, 2),
            "router": (L, E, width),
            "router_bias": (L, E),
        }
    return shapes


#: Tensors that are not trained by gradient.
FIXED = ("pca_mean", "pca", "whiten", "platt", "trust", "platt_faded", "router", "router_bias")
