"""Families of base models through the scripts: each works, or is one line; docs/base_models.md says the same."""

from __future__ import annotations

import pytest
from families import FAMILIES
from family_runs import STEPS, Outcome, make_prices, run_family
from source_tree import REPO_ROOT

# One of each kind: a weight read directly, a router that is a linear layer, a model inside another, experts that PEFT
# renames, a weight of two layers, no language model.
TRIED = ("Mamba", "Llama 4 (text)", "Gemma 3", "DeepSeek V3", "OPT-350m", "T5")


@pytest.fixture(scope="module", params=TRIED)
def tried(request, tmp_path_factory) -> tuple[str, Outcome]:
    folder = tmp_path_factory.mktemp("family")
    return request.param, run_family(request.param, folder / "family", make_prices(folder / "prices.csv"))


def test_a_family_does_what_the_page_says(tried) -> None:
    name, outcome = tried
    assert not [text for text in outcome.steps.values() if text.startswith(("TRACEBACK", "WRONG"))], outcome
    cells = [("yes" if outcome.worked(step) else "no") if step in outcome.steps else "-" for step in STEPS]
    assert page_rows()[name][: len(STEPS)] == cells


def test_every_family_is_on_the_page_and_none_breaks_off() -> None:
    rows = page_rows()
    assert rows.keys() == FAMILIES.keys()
    assert not [name for name, cells in rows.items() if "TRACEBACK" in cells[-1] or "WRONG" in cells[-1]]


def page_rows() -> dict[str, list[str]]:
    """Family -> its cells after the configuration."""
    lines = (REPO_ROOT / "docs" / "base_models.md").read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    return {row[0]: row[2:] for row in cells if row[0] in FAMILIES}
