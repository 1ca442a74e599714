"""How far the training text of a base model reaches: a model may remember the prices of days before that.

Dates are those that the makers state in the model's card or paper; where they state none, the day the weights
were published is an upper bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from stocklora.cli.console import UserError

# beginning of the name, without the owner, in lower case -> (date, whether the makers state it)
CUTOFFS: dict[str, tuple[str, bool]] = {
    "gpt2": ("2017-12-31", True),
    "distilgpt2": ("2017-12-31", True),
    "llama-2": ("2022-09-30", True),
    "meta-llama-3-8b": ("2023-03-31", True),
    "meta-llama-3-70b": ("2023-12-31", True),
    "llama-3.1": ("2023-12-31", True),
    "llama-3.2": ("2023-12-31", True),
    "llama-3.3": ("2023-12-31", True),
    "phi-3": ("2023-10-31", True),
    "phi-4": ("2024-06-30", True),
    "gemma-3": ("2024-08-31", True),
    "smollm2": ("2024-10-31", False),
    "smollm3": ("2025-07-08", False),
    "qwen2.5": ("2024-09-19", False),
    "qwen2": ("2024-06-07", False),
    "qwen3": ("2025-04-29", False),
    "deepseek-r1": ("2025-01-20", False),
    "tinyllama": ("2023-12-30", False),
    "mistral-7b": ("2023-09-27", False),
}


def cutoff_of(name: str) -> tuple[pd.Timestamp, bool] | None:
    """The date for a base model's name, and whether its makers state it; None where nothing is known."""
    short = name.rsplit("/", 1)[-1].lower()
    matches = [start for start in CUTOFFS if short.startswith(start)]
    if not matches:
        return None
    date, stated = CUTOFFS[max(matches, key=len)]
    return pd.Timestamp(date), stated


def cutoff_note(ensemble: Any, given: str | None, days: np.ndarray) -> list[str]:
    """What the reader of a report must know of the base model's memory.

    Args:
        given: ``--base_cutoff``. days: (n,) datetime64[D] forecast dates.
    """
    names = list(dict.fromkeys(content.spec.base_model["name"] for content in ensemble.weights))
    anonymous = all(content.spec.anonymize for content in ensemble.weights)
    prompt = "The prompt names neither ticker nor date." if anonymous else "The prompt names the ticker and a date."
    return [f"{_about(name, given, days)} {prompt}" for name in names]


def _about(name: str, given: str | None, days: Sequence[np.datetime64] | np.ndarray) -> str:
    known = cutoff_of(name)
    if given is not None:
        try:
            known = pd.Timestamp(given), True
        except ValueError:
            raise UserError(f"--base_cutoff {given!r} is not a date; write it as 2024-10-31") from None
    if known is None:
        return (
            f"How far the training text of {name} reaches is not known here (say it with --base_cutoff): it may "
            f"remember some of the {len(days)} days scored."
        )
    date, stated = known
    before = int(np.sum(np.asarray(days) <= np.datetime64(date, "D")))
    end = f"The training text of {name} ends on {date:%Y-%m-%d}"
    published = f"The makers of {name} state no end of its training text; it was published on {date:%Y-%m-%d}"
    whose = end if stated else published
    if before == 0:
        return f"{whose}, before all of the {len(days)} days scored."
    share = "all" if before == len(days) else f"{before} of"
    return f"{whose}: {share} the {len(days)} days scored lie before that, and it may remember them."
