"""Choices and checks that the settings of several scripts share."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Protocol

from stocklora.cli.console import UserError

DTYPES = ("auto", "bfloat16", "float32")


DEVICES = ("auto", "cpu", "cuda", "mps")


METHODS = ("lora", "peft", "full", "head")


QUANTIZATIONS = ("none", "8bit", "4bit")


MOST_DAYS_AHEAD = 20


class RunSettings(Protocol):
    """What ``check_run`` reads."""

    @property
    def window_size(self) -> int: ...

    @property
    def epochs(self) -> int: ...


def check_run(settings: RunSettings) -> None:
    """The limits that every training script's settings share.

    Raises:
        UserError: naming the flag.
    """
    window_size, epochs = settings.window_size, settings.epochs
    if window_size < 2:
        raise UserError(f"--window_size must be at least 2, got {window_size}")
    if epochs < 0:
        raise UserError(f"--epochs must be 0 or more, got {epochs}")
    for name in ("validation_fraction", "test_fraction"):
        if not 0.0 < getattr(settings, name) < 0.5:
            raise UserError(f"--{name} must be between 0 and 0.5, got {getattr(settings, name)}")


def check_horizon(horizon: int) -> None:
    """Raise a UserError beyond what the volatility scales are made for."""
    if horizon > MOST_DAYS_AHEAD:
        raise UserError(f"--horizon must be at most {MOST_DAYS_AHEAD} days, got {horizon}")


def check_positive(settings: object, *names: str) -> None:
    """Raise a UserError that names the first setting that is given and not above zero."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and not value > 0:
            raise UserError(f"--{name} must be above 0, got {value}")


SERVER = {"fastapi": "fastapi", "uvicorn": "uvicorn"}


SCORES = {"sacrebleu": "sacrebleu", "rouge_chinese": "rouge-chinese"}


def check_installed(packages: Mapping[str, str], purpose: str) -> None:
    """Raise a UserError that says what to install, if any of ``packages`` (module -> package) is missing."""
    missing = [package for module, package in packages.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise UserError(f"{purpose} needs {' and '.join(missing)}; install: pip install {' '.join(missing)}")
