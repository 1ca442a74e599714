"""The reliability diagram: how often closes were at or below each quantile, beside how often they should be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt

from stocklora.plots.style import DOWN, GRID, INK, MODEL, MUTED, UP, WALK, save_figure, set_title

COLOURS = (MODEL, DOWN, UP, INK)
MOST_PANELS = 4

Point = tuple[float, float, float, float]  # level, share found, and the ends of its interval


def plot_reliability(
    forecasters: Sequence[tuple[str, Mapping[int, Sequence[Point]], Mapping[int, int]]], path: Path
) -> None:
    """A panel for each forecaster, of many the first four; in it a line for each day ahead.

    Intervals are drawn for the nearest day alone, where they are narrowest; the others' are in the tables.

    Args:
        forecasters: name, day ahead -> its points, day ahead -> how many closes.
        path: a PNG.
    """
    shown = list(forecasters)[:MOST_PANELS]
    columns = min(2, len(shown))
    rows = -(-len(shown) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(5.6 * columns, 5.8 * rows), squeeze=False, sharex=True, sharey=True,
        layout="constrained",
    )  # fmt: skip
    for axis in axes.flat[len(shown) :]:
        axis.set_visible(False)
    for axis, (name, days, closes) in zip(axes.flat, shown, strict=False):
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color(WALK)
        axis.tick_params(colors=MUTED, labelsize=9)
        axis.grid(color=GRID, linewidth=0.8)
        axis.set_axisbelow(True)
        axis.plot([0, 1], [0, 1], color=WALK, linestyle="--", linewidth=1.0, label="as promised")
        first = min(days)
        for place, (day, points) in enumerate(sorted(days.items())):
            level, found, low, high = np.array(points).T
            colour = COLOURS[place % len(COLOURS)]
            label = f"{day} day{'s' * (day != 1)} ahead, {closes[day]:,} close{'s' * (closes[day] != 1)}"
            if day == first:
                axis.vlines(level, low, high, color=colour, alpha=0.35, linewidth=5.0)
            axis.plot(level, found, color=colour, marker="o", markersize=4.0, linewidth=1.6, label=label)
        set_title(axis, name if len(name) <= 44 else f"{name[:30]}...{name[-11:]}", "95% confidence sequences")
        axis.set_xlim(0, 1)
        axis.set_ylim(0, 1)
        axis.set_aspect("equal")
        axis.set_xlabel("quantile", color=MUTED)
        axis.set_ylabel("share of closes at or below it", color=MUTED)
        axis.legend(loc="upper left", fontsize=9, labelcolor=INK, facecolor="white", edgecolor="none", framealpha=0.85)
    save_figure(figure, path)
