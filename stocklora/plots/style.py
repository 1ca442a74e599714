"""What all pictures share: colours, axes, titles, and a file that is whole or not there. Drawn without a display."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")

from matplotlib import pyplot as plt

from stocklora.runtime.files import replacing

INK, MUTED, GRID = "#1f2933", "#697586", "#e4e7eb"
UP, DOWN, MODEL, WALK = "#2a9d6f", "#d1495b", "#2f5d9b", "#9aa5b1"
DPI = 150


def new_figure(rows: int = 1, height: float = 5.0, ratios: Sequence[float] | None = None) -> tuple[Any, Any]:
    """A figure of ``rows`` panels above each other, ``height`` inches high, and its axes."""
    figure, axes = plt.subplots(
        rows, 1, figsize=(10, height), sharex=rows > 1, height_ratios=ratios, layout="constrained"
    )
    for axis in np.atleast_1d(axes):
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color(WALK)
        axis.tick_params(colors=MUTED, labelsize=9)
        axis.grid(axis="y", color=GRID, linewidth=0.8)
        axis.set_axisbelow(True)
    return figure, axes


def set_title(axis: Any, title: str, subtitle: str = "") -> None:
    axis.set_title(title, loc="left", color=INK, fontsize=13, fontweight="bold", pad=26 if subtitle else 8)
    if subtitle:
        axis.text(0, 1.025, subtitle, transform=axis.transAxes, color=MUTED, fontsize=9.5)


def save_figure(figure: Any, path: Path) -> None:
    """Write a PNG atomically, and close the figure."""
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=DPI, format="png")
    plt.close(figure)


def set_step_axis(axis: Any, label: str, steps: Sequence[float]) -> None:
    """Whole numbers from 0 to the last of ``steps``; also where there is only one."""
    axis.set_xlabel(label, color=MUTED)
    last = max([1.0, *steps])
    axis.set_xlim(-0.03 * last, 1.03 * last)
    axis.xaxis.get_major_locator().set_params(integer=True)


def dot_of(points: Sequence[Any]) -> str | None:
    """The marker for a line: a single point makes none."""
    return "o" if len(points) == 1 else None
