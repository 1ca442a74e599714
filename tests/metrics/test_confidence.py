"""The confidence sequence: it holds at every time looked at, and it says something."""

from __future__ import annotations

import numpy as np
import pytest

from stocklora.metrics.confidence import log_evidence, overlapping_share_interval, share_interval

ALPHA = 0.1


def held(name: str, draw: np.random.Generator, days: int) -> tuple[np.ndarray, np.ndarray]:
    """(days,) outcomes, and the mean of their conditional means so far."""
    if name == "changing":  # the share itself changes with the regime
        chance = np.where(np.arange(days) % 60 < 30, 0.6, 0.95)
    else:
        chance = np.full(days, 0.8)
    tickers = 30 if name == "many tickers" else 1
    return draw.binomial(tickers, chance) / tickers, np.cumsum(chance) / np.arange(1, days + 1)


@pytest.mark.parametrize("name", ["one ticker", "many tickers", "changing"])
def test_the_truth_is_outside_at_any_time_in_few_of_many_records(name: str) -> None:
    draw, missed = np.random.default_rng(1), 0
    for _ in range(300):
        outcomes, truth = held(name, draw, 300)
        missed += bool((log_evidence(outcomes, truth) >= -np.log(ALPHA)).any())
    assert missed / 300 <= ALPHA


def test_a_usual_interval_would_miss_in_many() -> None:
    """What the sequence is for: the same records, looked at every day from the 20th on, with the usual interval."""
    draw, missed = np.random.default_rng(1), 0
    count = np.arange(1, 301)
    for _ in range(300):
        outcomes, truth = held("one ticker", draw, 300)
        mean = np.cumsum(outcomes) / count
        width = 1.645 * np.sqrt(np.maximum(mean * (1 - mean), 1e-9) / count)
        missed += bool((np.abs(mean - truth) > width)[20:].any())
    assert missed / 300 > 2 * ALPHA


def test_the_ends_are_where_the_evidence_reaches_its_bar() -> None:
    outcomes = (np.random.default_rng(2).random(250) < 0.8).astype(float)
    low, high = share_interval(outcomes)
    assert 0.0 < low < outcomes.mean() < high < 1.0
    for end in (low, high):
        assert log_evidence(outcomes, end)[-1] == pytest.approx(np.log(20.0), abs=1e-6)
    assert high - low < 0.22  # the usual one, right at one time alone, has 0.1


def test_it_narrows_and_sees_that_many_tickers_vary_less() -> None:
    draw = np.random.default_rng(3)
    widths = [np.diff(share_interval((draw.random(n) < 0.8).astype(float)))[0] for n in (10, 100, 1000, 10_000)]
    assert widths == sorted(widths, reverse=True)
    assert widths[-1] < 0.04
    assert np.diff(share_interval(draw.binomial(50, 0.8, 1000) / 50))[0] < 0.5 * widths[2]


@pytest.mark.parametrize(("value", "ends"), [(1.0, (0.8, 1.0)), (0.0, (0.0, 0.2))])
def test_records_without_a_miss_or_a_hit(value: float, ends: tuple[float, float]) -> None:
    low, high = share_interval(np.full(60, value))
    assert ends[0] <= low <= value <= high <= ends[1]


def test_of_nothing_nothing_is_known() -> None:
    assert share_interval(np.empty(0)) == (0.0, 1.0)
    assert overlapping_share_interval(np.empty(0), np.empty(0), np.empty(0)) == (0.0, 1.0)
    with pytest.raises(ValueError, match="from 0 to 1"):
        share_interval(np.array([0.5, 1.5]))


def test_overlapping_forecasts_are_covered_at_every_time_too() -> None:
    """Three days ahead, made every day: whether the sum of three normal returns stays inside its 80% interval."""
    draw, missed = np.random.default_rng(4), 0
    days, looks = 160, range(40, 161, 40)
    begins, ends = np.arange(days), np.arange(days) + 3
    for _ in range(40):
        ahead = np.convolve(draw.standard_normal(days + 2), np.ones(3), mode="valid")
        inside = (np.abs(ahead) <= 1.2816 * np.sqrt(3)).astype(float)
        ranges = [overlapping_share_interval(inside[:n], begins[:n], ends[:n], ALPHA) for n in looks]
        missed += any(not low <= 0.8 <= high for low, high in ranges)
    assert missed / 40 <= ALPHA


def test_spans_that_follow_each_other_are_one_run() -> None:
    outcomes = (np.random.default_rng(5).random(100) < 0.8).astype(float)
    days = np.arange(100)
    assert overlapping_share_interval(outcomes, days, days + 1, ALPHA) == pytest.approx(
        share_interval(outcomes, ALPHA / 2)
    )
