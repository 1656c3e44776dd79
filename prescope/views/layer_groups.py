"""What tells the layer groups apart: the three cues by MoE layer, and the borders found in them."""

from typing import Any, NamedTuple

import plotly.graph_objects as go

from prescope.predictor.layer_groups import Cues, LayerGroups, contrast_of

from .theme import COLORS, TEXT, style

NAMES = {
    "correlation": "routing correlation",
    "skew": "skew of load and weight",
    "similarity": "similarity of router inputs",
    "contrast": "contrast (right axis)",
}
_COLOR = {
    "correlation": COLORS["experts"],
    "skew": COLORS["on_demand"],
    "similarity": COLORS["prefetch"],
    "contrast": COLORS["line"],
}
_SHADE = {"input": "rgba(0,114,178,.10)", "middle": "rgba(128,128,128,.05)", "output": "rgba(213,94,0,.10)"}


class LayerGroupsInfo(NamedTuple):
    """The cues of each MoE layer, their contrast, and the groups as (name, first layer, end)."""

    cues: dict[str, tuple[float, ...]]
    contrast: tuple[float, ...]
    groups: tuple[tuple[str, int, int], ...]
    reason: str


def layer_groups(cues: Cues, groups: LayerGroups) -> go.Figure:
    """Cues by layer, with the groups as shades."""
    return plot_layer_groups(layer_groups_info(cues, groups))


def layer_groups_info(cues: Cues, groups: LayerGroups) -> LayerGroupsInfo:
    """As numbers; empty groups are left out."""
    named = (("input", groups.input), ("middle", groups.middle), ("output", groups.output))
    return LayerGroupsInfo(
        {
            "correlation": tuple(cues.correlation_L.tolist()),
            "skew": tuple(cues.skew_L.tolist()),
            "similarity": tuple(cues.similarity_L.tolist()),
        },
        tuple(contrast_of(cues).tolist()),
        tuple((name, layers.start, layers.stop) for name, layers in named if len(layers)),
        groups.reason,
    )


def plot_layer_groups(info: LayerGroupsInfo) -> go.Figure:
    """Three lines for the cues, their contrast dashed on the right axis, a shade for each group."""
    fig = go.Figure()
    layers = list(range(len(info.contrast)))
    for name, values in {**info.cues, "contrast": info.contrast}.items():
        is_contrast = name == "contrast"
        fig.add_scatter(
            x=layers, y=values, name=NAMES[name], mode="lines+markers", yaxis="y2" if is_contrast else "y",
            line={"color": _COLOR[name], "width": 2, "dash": "dot" if is_contrast else "solid"},
            marker={"size": 7, "line": {"color": "white", "width": 1.5}}, hovertemplate="%{y:.3f}",
        )  # fmt: skip
    for name, first, end in info.groups:
        fig.add_vrect(x0=first - 0.5, x1=end - 0.5, fillcolor=_SHADE[name], line_width=0, layer="below")
        fig.add_annotation(
            x=(first + end - 1) / 2, y=1, yref="paper", yanchor="bottom", showarrow=False,
            text=name if len(info.groups) > 1 else "one group", font={"size": 12, "color": TEXT},
        )  # fmt: skip
    cut = info.reason.find("; ")
    reason = info.reason if cut < 0 else f"{info.reason[:cut]};<br>{info.reason[cut + 2 :]}"
    style(fig, title="Do the layers fall into groups?", subtitle=reason, height=430, top=124)
    right: dict[str, Any] = {"overlaying": "y", "side": "right", "showgrid": False, "zeroline": False}
    right |= {"ticks": "", "tickmode": "linear", "tick0": 0, "dtick": 1, "tickformat": "+d"}
    right["title"] = {"text": "contrast, standard deviations", "font": {"size": 12.5}}
    fig.update_layout(hovermode="x unified", margin_r=66, yaxis2=right)
    fig.update_xaxes(title_text="MoE layer", showgrid=False, dtick=1 if len(layers) <= 32 else None)
    fig.update_yaxes(title_text="cue, 0 to 1", rangemode="tozero", selector=0)
    return fig
