"""What training starts from: rows split by prompt, and the PCA of each layer's router inputs.

Shapes: R rows, D width, P compressed width, L MoE layers.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ..core.numbers import is_number, require_seed
from ..errors import BadTrace, UnsupportedOption
from ..predictor.base import IdArray, TooFewPrompts
from ..traces.files import metadata_text
from ..traces.routing import RoutingTrace

#: Two to train on, one for early stopping, one to calibrate on.
MIN_PROMPTS = 4
#: Rows PCA is fitted on; more change the components by less than training does.
PCA_ROWS = 16384
#: Least variance of a direction, as a share of the mean one, when distances are measured.
MIN_VARIANCE = 1e-3


def require_trace(given: Any) -> None:
    """Raises UnsupportedOption unless it is a trace itself."""
    if not isinstance(given, RoutingTrace):
        raise UnsupportedOption(
            f"a trace is a RoutingTrace, this is a {type(given).__name__}; prescope.read_trace reads one from a file, "
            f"a run has it as result.trace"
        )


def require_hold_out(value: Any) -> None:
    """Raises UnsupportedOption unless it is a share of prompts."""
    if not is_number(value) or not 0.0 < value < 1.0:
        raise UnsupportedOption(f"hold_out is {value!r}; it is a share of the prompts, in (0, 1)")


def require_coming_layer(trace: RoutingTrace) -> None:
    """Raises BadTrace where there is one MoE layer, before which nothing is predicted."""
    if trace.num_layers < 2:
        raise BadTrace(f"{trace.model} has {trace.num_layers} MoE layer; there is no coming layer to predict")


class Split(NamedTuple):
    """Rows of a trace by purpose; no prompt is in two of them, and padding is in none."""

    train: IdArray
    validation: IdArray
    calibration: IdArray


def prompt_keys(trace: RoutingTrace) -> IdArray:
    """(R,) a number for each row's prompt. Sequences of the same text are one prompt: they must not be split."""
    numbers: dict[str, int] = {}
    sequences, row_sequence = np.unique(trace.sequence, return_inverse=True)
    keys, known_by_sequence = [], trace.prompt_of_each()
    for sequence in sequences.tolist():
        known = known_by_sequence[sequence]
        text = known.get("tokens", known.get("text"))
        name = f"sequence {sequence}" if text is None else metadata_text(text)
        keys.append(numbers.setdefault(name, len(numbers)))
    return np.array(keys, dtype=np.int64)[row_sequence]


def split_by_prompt(trace: RoutingTrace, hold_out: float, seed: int) -> Split:
    """Rows for training, validation and calibration, whole prompts each.

    Raises:
        TooFewPrompts: fewer than 4 different prompts.
        UnsupportedOption: `hold_out` is no share, or `seed` none.
    """
    require_seed(seed)
    require_hold_out(hold_out)
    keys = prompt_keys(trace)
    real = trace.position >= 0
    prompts = np.unique(keys[real])
    if len(prompts) < MIN_PROMPTS:
        raise TooFewPrompts(
            f"the trace holds {len(prompts)} different prompts, training needs {MIN_PROMPTS} or more (some dozens of "
            f"different texts are better): two to train on, one to stop by and one to calibrate on"
        )
    order = np.random.default_rng(seed).permutation(prompts)
    held = min(max(2, round(hold_out * len(prompts))), len(prompts) - 2)
    parts = (order[held:], order[: held // 2], order[held // 2 : held])
    return Split(*(np.flatnonzero(np.isin(keys, part) & real) for part in parts))


def rows_of(trace: RoutingTrace, rows: IdArray) -> RoutingTrace:
    """Those rows as a trace, in the trace's order."""
    keep = np.zeros(len(trace), dtype=bool)
    keep[rows] = True
    names = ("expert_ids", "weights", "step", "sequence", "position", "phase", "inputs")
    arrays = {name: array[keep] for name in names if (array := getattr(trace, name)) is not None}
    return replace(trace, **arrays)


def spread(rows: IdArray, most: int) -> IdArray:
    """At most `most` of the rows, evenly spaced."""
    return rows[np.linspace(0, len(rows) - 1, min(len(rows), most)).astype(int)]


def fit_pca(
    inputs_RLD: NDArray[np.float16], width: list[int], most: int, device: str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean (L, 1, D), components (L, D, P) and whitening (L, 1, P) of each layer's inputs.

    Columns are scaled so that the compressed input has variance 1 on average. A state's squared compressed input times
    the whitening, summed, is its squared distance from the mean in standard deviations, over the number of dimensions:
    1 on average here. The sign of each column is such that its largest entry is positive, so the same data give
    the same components.

    Args:
        width: dimensions of each layer. `most`: P; columns beyond a layer's width are zero.
    """
    _, L, D = inputs_RLD.shape
    mean, components, whitening = (
        torch.zeros(L, 1, D, dtype=torch.float32, device="cpu"),
        torch.zeros(L, D, most, dtype=torch.float32, device="cpu"),
        torch.zeros(L, 1, most, dtype=torch.float32, device="cpu"),
    )
    for layer, keep in enumerate(width):
        x = torch.from_numpy(inputs_RLD[:, layer]).to(device).float()
        centre = x.mean(0)
        covariance = (x - centre).T @ (x - centre) / len(x)
        variance, vectors = torch.linalg.eigh(covariance.double())
        variance, vectors = variance[-keep:].flip(0).clamp_min(0), vectors[:, -keep:].flip(1)
        scale = variance.mean().sqrt().clamp_min(1e-6)
        sign = torch.sign(vectors.gather(0, vectors.abs().argmax(0, keepdim=True)))
        mean[layer, 0] = centre.cpu()
        components[layer, :, :keep] = (vectors * sign / scale).float().cpu()
        # Directions in which the training states hardly differ would otherwise decide alone.
        relative = (variance / scale**2).clamp_min(MIN_VARIANCE)
        whitening[layer, 0, :keep] = (1.0 / (keep * relative)).float().cpu()
    return mean, components, whitening
