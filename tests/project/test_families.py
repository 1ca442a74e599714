"""Families of base models through the scripts: each works, or is one line; docs/base_models.md says the same."""

from __future__ import annotations

import pytest
from families import FAMILIES
from family_runs import Outcome, make_prices, page, row_of, rows_on_page, run_family
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
    assert rows_on_page(text_of_page())[name] == row_of(name, outcome)


def test_every_family_is_on_the_page_and_none_breaks_off() -> None:
    rows = rows_on_page(text_of_page())
    assert rows.keys() == FAMILIES.keys()
    assert not [name for name, cells in rows.items() if "TRACEBACK" in cells[-1] or "WRONG" in cells[-1]]


def test_the_page_is_its_rows_as_the_bench_writes_them() -> None:
    """Counts and text too; versions are those of the run that wrote it."""

    def without_versions(text: str) -> list[str]:
        return [line for line in text.splitlines() if "Versions: " not in line]

    text = text_of_page()
    assert without_versions(page(list(rows_on_page(text).values()))) == without_versions(text)


def text_of_page() -> str:
    return (REPO_ROOT / "docs" / "base_models.md").read_text(encoding="utf-8")
