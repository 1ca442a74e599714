"""A font for pictures with Chinese words: the best that this machine has, or none."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from matplotlib import font_manager
from matplotlib.ft2font import FT2Font

from stocklora.cli.console import UserError

# In order of preference; any other font with the characters will do after them.
CHINESE_FONTS = (
    "Noto Sans CJK SC", "Source Han Sans SC", "Source Han Sans CN", "Noto Sans SC", "PingFang SC", "Microsoft YaHei",
    "HarmonyOS Sans SC", "Hiragino Sans GB", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "SimHei", "DengXian",
    "STHeiti", "Heiti SC", "Heiti TC", "Sarasa Gothic SC", "Noto Serif CJK SC", "Songti SC", "SimSun", "FangSong",
    "KaiTi", "Noto Sans CJK JP", "Arial Unicode MS", "Droid Sans Fallback",
)  # fmt: skip
LATIN_FONT = "DejaVu Sans"  # comes with matplotlib


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
