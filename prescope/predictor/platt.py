"""Platt scaling: turn scores that only rank into probabilities, by one slope and one offset per layer and lookahead.

probability = sigmoid(slope * logit + offset), fitted by Newton's method on labels held out from training
(Platt 1999). A positive slope never changes a ranking, so recall is untouched.
"""

import numpy as np
from numpy.typing import NDArray

from .base import TINY

#: Pull towards slope 1, offset 0, in units of observations: a layer with few labels keeps its scores.
PRIOR_STRENGTH = 1.0
MAX_ITERATIONS = 50
#: Pairs of row and expert that a fit reads: as many evenly spaced whole rows as hold them, of 128 experts 8192 rows of
#: one layer or 546 of 15. What 512 change of 8192 stands in
#: docs/log/predictor.md; pairs drawn singly mostly change more.
MAX_PAIRS = 2**20


def logit(scores: NDArray[np.floating]) -> NDArray[np.float64]:
    """log(p / (1 - p)) of scores in [0, 1], kept finite."""
    clipped = np.clip(scores.astype(np.float64), TINY, 1.0 - TINY)
    return np.log(clipped) - np.log1p(-clipped)


def sigmoid(values: NDArray[np.floating]) -> NDArray[np.float64]:
    """1 / (1 + exp(-v)) without overflow."""
    return 0.5 * (1.0 + np.tanh(0.5 * values.astype(np.float64)))


def fit_platt(logits: NDArray[np.floating], used: NDArray[np.bool_]) -> tuple[float, float]:
    """Slope and offset that maximise the likelihood of `used`, both arrays of any one shape, rows first.

    The slope is kept positive: a score that predicts the opposite is a fault to be seen, not to be corrected.
    """
    most = max(1, MAX_PAIRS * len(logits) // max(1, logits.size))
    rows = np.linspace(0, len(logits) - 1, min(len(logits), most)).astype(int)
    z = logits[rows].ravel().astype(np.float64)
    y = used[rows].ravel().astype(np.float64)
    # In units of the scores' own spread, from their mean and the share that was used on: whatever the scale of the
    # logits, the steps are few. `back` takes (slope, offset) in these units to those of the logits.
    mean, spread = z.mean(), max(z.std(), TINY)
    z = (z - mean) / spread
    back = np.array([[1.0 / spread, 0.0], [-mean / spread, 1.0]])
    theta = np.array([1.0, float(logit(y.mean(keepdims=True))[0])])
    prior = np.array([1.0, 0.0])
    for _ in range(MAX_ITERATIONS):
        p = sigmoid(theta[0] * z + theta[1])
        residual, weight = p - y, np.maximum(p * (1.0 - p), 1e-9)
        gradient = np.array([residual @ z, residual.sum()]) + PRIOR_STRENGTH * back.T @ (back @ theta - prior)
        cross = weight @ z
        hessian = (
            np.array([[weight @ (z * z), cross], [cross, weight.sum()]]) + PRIOR_STRENGTH * back.T @ back
        )
        step = np.linalg.solve(hessian, gradient)
        # A full step may overshoot where the labels are separable; two units at most keeps it stable.
        theta = theta - step * min(1.0, 2.0 / max(np.abs(step).max(), 1e-12))
        if np.abs(step).max() < 1e-8:
            break
    slope, offset = back @ theta
    return max(float(slope), 1e-3), float(offset)
