"""Draw loss curves as one self-contained SVG, without a plotting library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from xml.sax.saxutils import escape

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 720, 400
LEFT, RIGHT, TOP, BOTTOM = 56, 110, 34, 44  # margins in px; the right one holds the labels
LABEL_STEP = 14  # px between labels at least
# Okabe and Ito's colours, told apart by colour-blind readers too, without the yellow that white swallows.
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000"]


def ticks(low: float, high: float, wanted: int = 6) -> list[float]:
    """Round numbers inside [low, high], about ``wanted`` of them."""
    raw = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw)
    return [n * step for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def spread(positions: list[float], step: float = LABEL_STEP) -> list[float]:
    """Move labels down just so far that none overlaps the one above; order is kept."""
    order = sorted(range(len(positions)), key=positions.__getitem__)
    moved = list(positions)
    for above, index in pairwise(order):
        moved[index] = max(moved[index], moved[above] + step)
    return moved


def loss_svg(series: dict[str, Points], background: Points, *, title: str, x_label: str, y_label: str) -> str:
    """SVG text: one coloured line per name of ``series``, ``background`` in grey behind them.

    The paper is white in either theme, so that one file reads on light and dark pages.
    """
    everything = [point for points in (*series.values(), background) for point in points]
    x_high = max(x for x, _ in everything) or 1.0
    y_low, y_high = min(y for _, y in everything), max(y for _, y in everything)
    if y_high <= y_low:
        y_high = y_low + 1.0
    y_low, y_high = y_low - 0.04 * (y_high - y_low), y_high + 0.04 * (y_high - y_low)

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + x / x_high * (WIDTH - LEFT - RIGHT),
            TOP + (y_high - y) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM),
        )

    def line(points: Points, colour: str, width: float) -> str:
        path = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in points)
        return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}"/>'

    def text(x: float, y: float, words: str, anchor: str = "middle", colour: str = "#333") -> str:
        return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{escape(words)}</text>'

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
        f'height="{HEIGHT}" font-family="sans-serif" font-size="12" role="img">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        text(LEFT, 20, title, "start"),
    ]
    for y in ticks(y_low, y_high):
        _, py = place(0.0, y)
        parts.append(f'<path d="M{LEFT} {py:.1f}H{WIDTH - RIGHT}" stroke="#dddddd"/>')
        parts.append(text(LEFT - 6, py + 4, f"{y:g}", "end"))
    for x in ticks(0.0, x_high):
        px, _ = place(x, y_low)
        parts.append(f'<path d="M{px:.1f} {HEIGHT - BOTTOM}v4" stroke="#333333"/>')
        parts.append(text(px, HEIGHT - BOTTOM + 18, f"{x:g}"))
    parts.append(text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, x_label))
    parts.append(
        f'<text transform="translate(16 {(TOP + HEIGHT - BOTTOM) / 2:.0f}) rotate(-90)" text-anchor="middle" '
        f'fill="#333">{escape(y_label)}</text>'
    )
    if background:
        parts.append(line(background, "#bbbbbb", 1.2))
    names = list(series)
    heights = spread([place(*series[name][-1])[1] for name in names])
    for index, name in enumerate(names):
        colour = COLOURS[index % len(COLOURS)]
        parts.append(line(series[name], colour, 1.8))
        parts.append(text(WIDTH - RIGHT + 6, heights[index] + 4, name, "start", colour))
    return "\n".join([*parts, "</svg>"]) + "\n"
