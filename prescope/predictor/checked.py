"""A predictor's answers, looked at before anything is decided by them: anybody may write one.

Shapes: R rows of a trace, T tokens, E experts, L MoE layers, d layers ahead.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..core.numbers import is_count
from ..core.types import MoEShape
from ..core.units import count_of
from ..errors import BadTrace, PrescopeError, UnsupportedOption
from ..traces.routing import RoutingTrace
from .base import IdArray, Prediction, Predictor, ReplaysRows, ScoreArray

#: How far sums of probabilities in float32, or 16 bits, may leave their range.
SLACK = 1e-2
PROBABILITIES = "scores are probabilities in [0, 1]: of logits take the sigmoid"
#: Tokens of a trial.
TRIAL_TOKENS = 2


class BadPrediction(PrescopeError):
    """A predictor's answer has not the form that `Predictor` promises, or holds no probabilities."""


#: What is asked of a predictor everywhere, besides its methods.
FIELDS = ("name", "shape", "lookahead", "needs_inputs", "is_calibrated")


def require_predictor(given: Any, *methods: str) -> None:
    """Look at what was given as a predictor, but do not ask it anything.

    Args:
        methods: that it is going to be asked by.

    Raises:
        UnsupportedOption: it lacks some of `Predictor`, or its shape, lookahead or name are none.
    """
    kind = given.__name__ if isinstance(given, type) else type(given).__name__
    if isinstance(given, type):
        raise UnsupportedOption(f"predictor is {kind} itself, a class; make one of it: {kind}(...)")
    if lacking := [name for name in (*FIELDS, *methods) if not hasattr(given, name)]:
        raise UnsupportedOption(
            f"predictor is a {kind}, which lacks what prescope.predictor.Predictor asks for: {', '.join(lacking)}"
        )
    if not isinstance(given.shape, MoEShape):
        raise UnsupportedOption(
            f"the shape of a {kind} is {given.shape!r}; it has to be a model's, as engine.shape or trace.shape"
        )
    if not (is_count(given.lookahead) and given.lookahead >= 0):
        raise UnsupportedOption(f"the lookahead of a {kind} is {given.lookahead!r}; it is a number of layers")
    if not isinstance(given.name, str):
        raise UnsupportedOption(f"the name of a {kind} is {given.name!r}; figures show it, so it is a text")


def prepared(predictor: Predictor, method: str, argument: Any) -> Any:
    """What a method of a predictor gives before a run.

    Raises:
        UnsupportedOption: it raised something else than an error of prescope, which is raised as it is.
    """
    try:
        return getattr(predictor, method)(argument)
    except (PrescopeError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise UnsupportedOption(
            f"{method}({argument}) of {predictor.name} raised {type(error).__name__} ({error}); mend it, or give "
            f"another predictor"
        ) from error


def ask(
    predictor: Predictor,
    moe_layer: int,
    x_TD: torch.Tensor,
    ids_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    lookahead: int,
) -> list[Prediction]:
    """A predictor's answers for the next `lookahead` layers, as far as there are such, in a form that was checked.

    Raises:
        BadPrediction: they are for other layers, or of another shape; or it has written into what it was given, which
            may be the model's own. And whatever the predictor raises.
    """
    given = x_TD, ids_TK, weights_TK
    before = [_version(one) for one in given]
    made = predictor.predict(moe_layer, *given)
    if [_version(one) for one in given] != before:
        raise BadPrediction(
            f"{predictor.name} writes into the tensors that it is given at MoE layer {moe_layer}; the model computes "
            f"with them, so let it work on a copy: x_TD = x_TD.clone()"
        )
    return check_form(made, predictor.name, moe_layer, len(x_TD), predictor.shape, lookahead)


def _version(tensor: torch.Tensor) -> int:
    """How often a tensor was written to; torch does not count that of one made in inference mode."""
    return 0 if tensor.is_inference() else tensor._version


def apart_from_draws(device: torch.device) -> AbstractContextManager[None]:
    """What is drawn inside leaves torch's random numbers as they were, so that a text is sampled as without it."""
    fork: AbstractContextManager[None] = torch.random.fork_rng([device] if device.type == "cuda" else [])
    return fork


def check_form(
    made: Any, name: str, moe_layer: int, num_tokens: int, shape: MoEShape, lookahead: int
) -> list[Prediction]:
    """The first answers of what `predict` has returned. Reads no number, so that a graph can be captured around it.

    Raises:
        BadPrediction: they are for other layers, or of another shape.
    """
    expected = min(lookahead, shape.num_layers - 1 - moe_layer)
    if not isinstance(made, Sequence) or not all(isinstance(one, Prediction) for one in made):
        raise BadPrediction(
            f"predict of {name} has to return a list of Prediction, this is a {type(made).__name__}"
        )
    if len(made) < expected:
        raise BadPrediction(
            f"{name} answers for {len(made)} layers behind MoE layer {moe_layer}; there are {expected} to answer for"
        )
    for ahead, one in enumerate(made[:expected], 1):
        if (one.moe_layer, one.lookahead) != (moe_layer + ahead, ahead):
            raise BadPrediction(
                f"answer {ahead} of {name} at MoE layer {moe_layer} is for layer {one.moe_layer}, {one.lookahead} "
                f"ahead; it has to be for layer {moe_layer + ahead}, {ahead} ahead"
            )
        scores, wanted = one.scores_TE, (num_tokens, shape.num_experts)
        if not isinstance(scores, torch.Tensor) or not scores.is_floating_point():
            kind = scores.dtype if isinstance(scores, torch.Tensor) else type(scores).__name__
            raise BadPrediction(f"scores of {name} are {kind}; they have to be a tensor of float32")
        if tuple(scores.shape) != wanted:
            raise BadPrediction(
                f"scores of {name} at MoE layer {moe_layer} have the shape {tuple(scores.shape)}; for {num_tokens} "
                f"tokens and {shape.num_experts} experts it has to be {wanted}"
            )
    return list(made[:expected])


def check_values(values_d2E: NDArray[np.floating[Any]], name: str, moe_layer: int, num_tokens: int) -> None:
    """Look at the expected tokens and the probabilities of use that were made of a layer's answers.

    Raises:
        BadPrediction: some are NaN or infinite, or no probabilities.
    """
    if not np.isfinite(values_d2E).all():
        bad = int((~np.isfinite(values_d2E[:, 1])).sum())
        raise BadPrediction(f"{name} answers NaN or infinity for {bad} experts behind MoE layer {moe_layer}")
    most = max(values_d2E[:, 0].max(initial=0.0) / max(1, num_tokens), values_d2E[:, 1].max(initial=0.0))
    least = values_d2E.min(initial=0.0) / max(1, num_tokens)  # what rounding leaves of each token adds up
    if least < -SLACK or most > 1.0 + SLACK:
        raise BadPrediction(
            f"{name} answers {_worse(least, most):.3g} behind MoE layer {moe_layer}; {PROBABILITIES}"
        )


def replay(predictor: Predictor, trace: RoutingTrace, lookahead: int) -> ScoreArray:
    """`Predictor.replay`, looked at.

    Raises:
        BadPrediction: it raised something else than an error of prescope, which is raised as it is; its answer is of
            another shape, or holds no probabilities.
    """
    return _replayed(lambda: predictor.replay(trace, lookahead), predictor, trace, lookahead, len(trace))


def replay_rows(
    predictor: Predictor, by_rows: ReplaysRows, trace: RoutingTrace, lookahead: int, rows: IdArray
) -> ScoreArray:
    """`ReplaysRows.replay_rows`, looked at; raises as `replay`.

    Args:
        by_rows: the predictor, as one that scores rows.
    """
    return _replayed(
        lambda: by_rows.replay_rows(trace, lookahead, rows), predictor, trace, lookahead, len(rows)
    )


def _replayed(
    answer: Callable[[], Any], predictor: Predictor, trace: RoutingTrace, lookahead: int, num_rows: int
) -> ScoreArray:
    where = f"replay of {predictor.name}, {count_of(lookahead, 'layer')} ahead,"
    try:
        made = answer()
    except PrescopeError:
        raise
    except Exception as error:
        raise BadPrediction(f"{where} raised {type(error).__name__}: {error}") from error
    if isinstance(made, torch.Tensor):
        made = made.detach().cpu()
        made = (made.float() if made.is_floating_point() else made).numpy()
    wanted = (num_rows, trace.num_layers - lookahead, trace.num_experts)
    # Of another shape numpy would repeat a single layer or expert for all of them, and nobody would notice.
    if not isinstance(made, np.ndarray) or made.dtype.kind not in "fiub" or made.shape != wanted:
        found = f"{made.dtype} {made.shape}" if isinstance(made, np.ndarray) else f"a {type(made).__name__}"
        raise BadPrediction(
            f"{where} answers with {found}; it has to be float32 {wanted}: rows, layers that far on, experts"
        )
    scores: ScoreArray = made.astype(np.float32, copy=False)
    least, most = float(scores.min(initial=0.0)), float(scores.max(initial=0.0))  # NaN if any is
    if not (np.isfinite(least) and np.isfinite(most)):
        bad = int((~np.isfinite(scores)).any(axis=(1, 2)).sum())
        raise BadPrediction(f"{where} answers NaN or infinity in {count_of(bad, 'row')}")
    if least < -SLACK or most > 1.0 + SLACK:
        raise BadPrediction(f"{where} answers {_worse(least, most):.3g}; {PROBABILITIES}")
    return scores


def _worse(least: float, most: float) -> float:
    """Of the least and the greatest number the one that is no probability."""
    return least if least < -SLACK else most


def try_out(
    predictor: Predictor,
    shape: MoEShape,
    width: int,
    dtype: torch.dtype,
    device: torch.device,
    lookahead: int,
) -> None:
    """Ask a predictor about made-up tokens, so that what is wrong with it is said before a run.

    One that says that it cannot answer yet (BadTrace: the step of its trace is not set) is let through.

    Raises:
        UnsupportedOption: its answer is not of the right form, or it raised something else than an error of prescope,
            which is raised as it is.
    """
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(TRIAL_TOKENS, width, generator=generator, dtype=torch.float32, device="cpu").to(
        device, dtype
    )
    ids_TK = torch.arange(shape.top_k, device=device).expand(TRIAL_TOKENS, -1)
    weights_TK = torch.full(
        (TRIAL_TOKENS, shape.top_k), 1.0 / shape.top_k, dtype=torch.float32, device=device
    )
    for moe_layer in sorted({0, shape.num_layers - 1}):
        try:
            with torch.no_grad(), apart_from_draws(device):
                made = ask(predictor, moe_layer, x_TD, ids_TK, weights_TK, lookahead)
            for one in made:
                scores = one.scores_TE.detach().float().cpu().numpy()
                check_values(np.stack([scores, scores], axis=1), predictor.name, moe_layer, 1)
        except BadPrediction as error:
            raise UnsupportedOption(f"{error}. Tried with {TRIAL_TOKENS} tokens of width {width}") from error
        except BadTrace:
            return
        except PrescopeError:
            raise
        except Exception as error:
            raise UnsupportedOption(
                f"{predictor.name} raised {type(error).__name__} ({error}) when it was asked about MoE layer "
                f"{moe_layer}, with {TRIAL_TOKENS} tokens of width {width} in {dtype} on {device}; mend its predict, "
                f"or give another predictor"
            ) from error
