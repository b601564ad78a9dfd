"""What all pictures have in common: a figure with its data, marks that survive a grey print, labels that keep apart."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Sequence
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from llmq.pages import plain
from llmq.words import number

INK, ACCENT, WARNING, FAINT = "#1a1a1a", "#0b62a4", "#b3261e", "#8a8a8a"
GROUND, GRID = "#f1f1f1", "#e0e0e0"
WIDTH_INCHES = 9.6
BACKED = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.5}
LABEL_GAP = 0.062
"""Between the middles of two labels at the edge of a picture, as a share of its height."""
HIGHEST_LABEL = 0.97


class SweepFigure(Figure):
    """A figure that notebooks show without pyplot. `frame` is what is drawn: see where it is made."""

    frame: pd.DataFrame = pd.DataFrame()

    def png(self, dpi: int = 100) -> bytes:
        """The picture as a PNG file."""
        image = io.BytesIO()
        self.savefig(image, format="png", dpi=dpi)
        return image.getvalue()

    def _repr_png_(self) -> bytes:
        return self.png()


def new_figure(height_inches: float, title: str = "") -> SweepFigure:
    """An empty figure as wide as a notebook."""
    figure = SweepFigure(figsize=(WIDTH_INCHES, height_inches), layout="constrained")
    if title:
        figure.suptitle(textwrap.fill(plain(title), 108), fontsize=10, x=0.01, ha="left", parse_math=False)
    return figure


def legend_aside(figure: Figure, title: str | None = None) -> None:
    """What colours and hatches mean, to the right of everything. Names are taken as they are, never for formulas."""
    legend = figure.legend(loc="outside right upper", frameon=False, fontsize=9, title=title)
    for text in legend.get_texts():
        text.set_parse_math(False)


def dress(axes: Any, grid: str = "y") -> None:
    """No frame above and to the right, and faint lines to read values by."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color=GRID, lw=0.8)
    axes.set_axisbelow(True)


def level_axis(axes: Any, levels: Sequence[int]) -> None:
    """Levels from left to right, twice as many the same step further."""
    if not levels:
        return
    axes.set_xscale("log", base=2)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(*level_limits(levels))
    ticks = level_ticks(levels)
    axes.set_xticks(ticks, [str(level) for level in ticks])


def level_limits(levels: Sequence[int]) -> tuple[float, float]:
    """A little beyond the lowest and the highest level."""
    margin = max(1.1, (max(levels) / min(levels)) ** 0.05)
    return min(levels) / margin, max(levels) * margin


def level_ticks(levels: Sequence[int]) -> list[int]:
    """The levels to name: powers of two; else all that stand far enough apart.

    >>> level_ticks([1, 2, 4, 5, 6, 8]), level_ticks([5, 20, 21, 40])
    ([1, 2, 4, 8], [5, 20, 40])
    """
    wanted = sorted({level for level in levels if level & (level - 1) == 0})
    if len(wanted) >= 2:
        return wanted
    ticks: list[int] = []
    for level in sorted(set(levels)):
        if not ticks or level >= 1.15 * ticks[-1]:
            ticks.append(level)
    return ticks


def seconds_axis(axis: Any) -> None:
    """A logarithmic axis of seconds with plain numbers; of one decade or less, 2 and 5 are named, too."""
    low, high = sorted(axis.get_view_interval())
    plain_number = FuncFormatter(lambda value, _: number(value, 6))
    axis.set_major_formatter(plain_number)
    axis.set_minor_locator(LogLocator(subs=(2, 5)))
    few = low > 0 and high / low < 300
    axis.set_minor_formatter(plain_number if few else NullFormatter())


def at_least(axes: Any, ratio: float) -> None:
    """Make a logarithmic y axis reach over at least this ratio, so that noise does not fill the picture."""
    low, high = axes.get_ylim()
    if high < ratio * low:
        middle = math.sqrt(low * high)
        axes.set_ylim(middle / math.sqrt(ratio), middle * math.sqrt(ratio))


def label_right(axes: Any, labels: Sequence[tuple[float, float, str, str]]) -> None:
    """Names of lines, (x, y, text, colour) of where each ends, at the right edge and clear of each other.

    Call it when the limits of the axes are final.
    """
    to_fraction = axes.transAxes.inverted().transform
    middles = [float(to_fraction(axes.transData.transform((x, y)))[1]) for x, y, *_ in labels]
    for (x, y, text, color), middle in zip(labels, kept_apart(middles, LABEL_GAP), strict=True):
        axes.annotate(
            text,
            (x, y),
            xytext=(1.025, middle),
            textcoords="axes fraction",
            va="center",
            fontsize=9,
            color=color,
            arrowprops={"arrowstyle": "-", "color": color, "lw": 0.6, "ls": ":", "shrinkA": 1, "shrinkB": 3},
        )


def kept_apart(middles: Sequence[float], gap: float) -> list[float]:
    """The same places in the same order, moved so that no two are nearer than `gap`, below the top if they fit.

    >>> [round(middle, 2) for middle in kept_apart([0.5, 0.51, 0.99], 0.1)]
    [0.5, 0.6, 0.97]
    """
    order = sorted(range(len(middles)), key=lambda n: middles[n])
    placed = list(middles)
    floor = -math.inf
    for n in order:
        placed[n] = floor = max(placed[n], floor + gap)
    ceiling = HIGHEST_LABEL + gap
    for n in reversed(order):
        placed[n] = ceiling = min(placed[n], ceiling - gap)
    return placed


def label_points(
    axes: Any, labels: Sequence[tuple[float, float, str, str]], others: Sequence[tuple[float, float]] = ()
) -> None:
    """Names of points, (x, y, text, colour), each where it covers neither a point nor another name, if there is room.

    `others` are points without a name that are not to be covered either.

    Call it when the limits of the axes are final.
    """
    axes.figure.draw_without_rendering()
    places = [tuple(axes.transData.transform((x, y))) for x, y, *_ in labels]
    points = [*places, *(tuple(axes.transData.transform(other)) for other in others)]
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in points]
    inside = axes.bbox.extents
    for (x, y, text, color), (at_x, at_y) in zip(labels, places, strict=True):
        width, height = 6.2 * len(text), 12.0
        boxes = [
            (at_x + dx - (width if dx < 0 else width / 2 if dx == 0 else 0), at_y + dy - height / 2)
            for reach in (1.0, 2.2, 3.4, 4.6, 6.0)
            for dx, dy in ((8, 0), (6, 9 * reach), (6, -9 * reach), (-8, 0), (-6, 9 * reach), (-6, -9 * reach))
        ]
        free = [box for box in boxes if _is_free((*box, box[0] + width, box[1] + height), taken, inside)]
        left, bottom = (free or boxes)[0]
        taken.append((left, bottom, left + width, bottom + height))
        points_a_pixel = 72 / axes.figure.dpi
        axes.annotate(
            text,
            (x, y),
            xytext=((left - at_x) * points_a_pixel, (bottom + height / 2 - at_y) * points_a_pixel),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=color,
            bbox=BACKED,
            arrowprops={"arrowstyle": "-", "color": color, "lw": 0.5, "shrinkA": 0, "shrinkB": 4},
        )


Box = tuple[float, float, float, float]


def _is_free(box: Box, taken: Sequence[Box], inside: Sequence[float]) -> bool:
    left, bottom, right, top = box
    if left < inside[0] or right > inside[2] or bottom < inside[1] or top > inside[3]:
        return False
    return all(right <= x0 or left >= x1 or top <= y0 or bottom >= y1 for x0, y0, x1, y1 in taken)
