"""Recall by the MoE's shape: experts, top-k, depth; from the rows that benchmarks/predictor_by_shape.py writes."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd
import plotly.graph_objects as go

from prescope.errors import BadTrace

from .cases import cases

#: Name in the rows -> in the legend.
NAMES = {"chance": "chance", "early router": "early router", "llapor": "LLaPor"}


class RecallByShapeInfo(NamedTuple):
    """Recall@K and the ends of its 95 % interval: index: shapes; columns: predictors."""

    recall: pd.DataFrame
    low: pd.DataFrame
    high: pd.DataFrame


def recall_by_shape(rows: Sequence[Mapping[str, Any]], lookahead: int = 1, told: str = "") -> go.Figure:
    """A row for each model, a mark for each predictor.

    Args:
        rows: of the benchmark's JSON. told: where they are from.

    Raises:
        BadTrace: no row.
    """
    info = recall_by_shape_info(rows, lookahead)
    ahead = "one layer" if lookahead == 1 else f"{lookahead} layers"
    subtitle = f"recall@K {ahead} ahead on held-out prompts, 95 % intervals over prompts<br>{told}"
    return cases(
        info.recall, title="Which MoEs can be predicted?", told=subtitle, axis="recall@K", ends=(info.low, info.high)
    )  # fmt: skip


def recall_by_shape_info(rows: Sequence[Mapping[str, Any]], lookahead: int = 1) -> RecallByShapeInfo:
    """As numbers; a model without a layer so far ahead is left out."""
    if not rows:
        raise BadTrace("recall_by_shape compares models; give one row at least")
    found: dict[str, dict[str, tuple[float, float, float]]] = {}
    for row in rows:
        cells = {one["predictor"]: one for one in row["recall"] if one["lookahead"] == lookahead}
        if cells:
            name = f"{row['layers']} layers x {row['experts']}, top-{row['top_k']}"
            loss = row.get("loss_nats")
            name += f", loss {loss:.1f}" if loss is not None else ""
            found[name] = {
                title: (cells[key]["recall"], cells[key]["low"], cells[key]["high"])
                for key, title in NAMES.items()
                if key in cells
            }
    tables = [
        pd.DataFrame({name: {key: cell[i] for key, cell in row.items()} for name, row in found.items()}).T
        for i in range(3)
    ]
    return RecallByShapeInfo(*tables)
