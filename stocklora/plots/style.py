"""What all pictures share: colours, axes, titles, fonts, and a file that is whole or not there.

Drawn without a display. Chinese words take the best font for them that this machine has, or none.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")

from matplotlib import font_manager
from matplotlib import pyplot as plt
from matplotlib.ft2font import FT2Font

from stocklora.cli.console import UserError
from stocklora.runtime.files import replacing

INK, MUTED, GRID = "#1f2933", "#697586", "#e4e7eb"
UP, DOWN, MODEL, WALK = "#2a9d6f", "#d1495b", "#2f5d9b", "#9aa5b1"
DPI = 150
# In order of preference; any other font with the characters will do after them.
CHINESE_FONTS = (
    "Noto Sans CJK SC", "Source Han Sans SC", "Source Han Sans CN", "Noto Sans SC", "PingFang SC", "Microsoft YaHei",
    "HarmonyOS Sans SC", "Hiragino Sans GB", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "SimHei", "DengXian",
    "STHeiti", "Heiti SC", "Heiti TC", "Sarasa Gothic SC", "Noto Serif CJK SC", "Songti SC", "SimSun", "FangSong",
    "KaiTi", "Noto Sans CJK JP", "Arial Unicode MS", "Droid Sans Fallback",
)  # fmt: skip
LATIN_FONT = "DejaVu Sans"  # comes with matplotlib


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
    """A bold title above the axes, and a smaller line below it if given."""
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


# ------------------------------------------------------------------------------------------------------ fonts


@dataclass(frozen=True)
class Font:
    """A font that matplotlib knows by ``name``."""

    name: str
    path: Path

    def lacks(self, text: str) -> set[str]:
        """Characters of ``text`` that it has no picture for."""
        return {
            character for character in text if not character.isspace() and ord(character) not in _charmap(self.path)
        }

    def drawable(self, text: str) -> str:
        """``text`` with a question mark for each character that would be drawn as a box."""
        lacking = self.lacks(text)
        return "".join("?" if character in lacking else character for character in text)


def find_font(text: str, path: Path | None = None) -> Font | None:
    """A font with every character of ``text``; None where this machine has none.

    Args:
        path: a font file that is to be used, and no other.

    Raises:
        UserError: ``path`` is no font, or lacks a character.
    """
    if path is not None:
        try:
            font_manager.fontManager.addfont(str(path))
            font = Font(font_manager.FontProperties(fname=str(path)).get_name(), path)
            lacking = font.lacks(text)
        except (OSError, RuntimeError) as error:
            raise UserError(f"--font {path} is not a font that can be drawn with: {error}") from None
        if lacking:
            raise UserError(f"--font {path} lacks {len(lacking)} characters, {min(lacking)} among them; give another")
        return font
    # matplotlib remembers the fonts of its first start; one that was installed since is not among them.
    known = {entry.fname for entry in font_manager.fontManager.ttflist}
    for name in sorted(set(font_manager.findSystemFonts()) - known):
        with contextlib.suppress(OSError, RuntimeError, ValueError):
            font_manager.fontManager.addfont(name)
    names: set[str] = set()
    for entry in font_manager.fontManager.ttflist:
        # "Last Resort" has a picture for every character, and the picture is a box.
        if entry.style == "normal" and not entry.name.startswith(("Last Resort", ".")):
            names.add(entry.name)
    with quiet_fonts():
        return _first_with(text, names)


def _first_with(text: str, names: set[str]) -> Font | None:
    for name in [*(name for name in CHINESE_FONTS if name in names), *sorted(names - set(CHINESE_FONTS))]:
        # A family counts by the file that matplotlib would take from it.
        with contextlib.suppress(OSError, RuntimeError, ValueError):
            found = Path(font_manager.findfont(font_manager.FontProperties(family=[name]), fallback_to_default=False))
            font = Font(name, found)
            if not font.lacks(text):
                return font
    return None


@contextlib.contextmanager
def quiet_fonts() -> Iterator[None]:
    """Without matplotlib's remark on every family that has no regular or bold weight."""
    log = logging.getLogger("matplotlib.font_manager")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def latin_font() -> Font:
    """The font that is always there."""
    return Font(LATIN_FONT, Path(font_manager.findfont(LATIN_FONT)))


def families(font: Font) -> list[str]:
    """For ``font.family``: characters that ``font`` lacks are taken from the font that is always there."""
    return list(dict.fromkeys([font.name, LATIN_FONT]))


@functools.cache
def _charmap(path: Path) -> frozenset[int]:
    return frozenset(FT2Font(str(path)).get_charmap())
