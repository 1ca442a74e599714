"""The quality report: each oddity with its dates, and silence where there is none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from stocklora.prices.calendar import sessions_between
from stocklora.prices.quality import findings_of, print_quality, short_form
from stocklora.prices.sources.fetch import sample_prices
from stocklora.prices.tables import write_prices


def history(ticker: str = "AAPL", start: str = "2024-01-02", end: str = "2024-03-28") -> pd.DataFrame:
    days = sessions_between(ticker, pd.Timestamp(start), pd.Timestamp(end))
    close = 100 + np.sin(np.arange(len(days))) + 0.01 * np.arange(len(days))
    columns = {"Open": close, "High": close * 1.01, "Low": close * 0.99, "Close": close, "Volume": 1e6}
    return pd.DataFrame(columns, index=days)


def kinds(frame: pd.DataFrame, ticker: str = "AAPL", **meta: str) -> dict[str, tuple[int, tuple[str, ...]]]:
    return {f.kind.split(" (")[0]: (f.count, f.details) for f in findings_of(ticker, frame, meta)}


def test_nothing_odd_is_nothing_said() -> None:
    assert kinds(history()) == {}
    assert kinds(sample_prices("AAPL")[0]["AAPL"]) == {}
    assert short_form({"AAPL": history()}) == "AAPL: 61 rows, 2024-01-02 to 2024-03-28; nothing odd"


def test_gaps_are_sessions_of_the_exchange_that_are_missing() -> None:
    frame = history()
    frame = frame.drop(frame.index[[5, 10, 11, 12]])
    days = history().index
    first, last = (f"{days[place]:%Y-%m-%d}" for place in (10, 12))
    assert kinds(frame)["missing sessions"] == (4, (f"{days[5]:%Y-%m-%d}", f"{first} to {last} (3)"))


def test_a_row_on_a_holiday() -> None:
    frame = history()
    extra = frame.iloc[[3]].set_axis(pd.DatetimeIndex(["2024-01-15"]))  # Martin Luther King Day
    frame = pd.concat([frame, extra]).sort_index()
    assert kinds(frame)["rows on days without a session"] == (1, ("2024-01-15",))


def test_days_cut_in_another_time_zone() -> None:
    frame = history("7203.T", "2024-01-04")
    moved = frame.set_axis(frame.index - pd.Timedelta(days=1))
    count, (text,) = kinds(moved, "7203.T")["time zone"]
    assert count > 5
    assert "moved by +1 day" in text


@pytest.mark.parametrize(("ratio", "words"), [(4, "4 to 1"), (0.1, "1 to 10"), (1.37, None)])
def test_jumps_and_the_split_they_fit(ratio: float, words: str | None) -> None:
    frame = history()
    frame.iloc[20:, :4] /= ratio
    count, (text,) = kinds(frame)[f"returns beyond {0.25:.0%}"]
    assert count == 1
    assert text.startswith(f"{frame.index[20]:%Y-%m-%d} ")
    assert ("unadjusted?" in text) == (words is not None)
    assert words is None or words in text


def test_stale_runs_and_days_without_volume() -> None:
    frame = history()
    frame.iloc[7:12, :4] = 100.0
    frame.iloc[30:34, :4] = 100.0  # four are not yet a run
    frame.iloc[40, 4] = 0
    found = kinds(frame)
    first, last = (f"{frame.index[place]:%Y-%m-%d}" for place in (7, 11))
    assert found["stale runs"] == (1, (f"{first} to {last} at 100 (5 rows)",))
    assert found["zero volume"] == (1, (f"{frame.index[40]:%Y-%m-%d}",))
    assert kinds(frame.assign(Volume=0.0))["zero volume"][1] == ("on every row",)


def test_the_future_is_odd() -> None:
    frame = history()
    ahead = frame.iloc[[-1]].set_axis(pd.DatetimeIndex(["2190-01-03"]))
    found = kinds(pd.concat([frame, ahead]), interval="1wk")
    assert found["days in the future"] == (1, ("2190-01-03",))


def test_weeks_are_not_compared_with_sessions() -> None:
    frame = history().iloc[::5]
    assert "missing sessions" not in kinds(frame, interval="1wk")
    assert "missing sessions" in kinds(frame, interval="1d")


def test_the_report_names_file_source_zone_and_dates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    frame = history()
    frame.iloc[20:, :4] *= 2
    meta = {"source": "yahoo", "origins": {"AAPL": "Yahoo Finance"}, "adjust": "none", "interval": "1d"}
    meta |= {"timezones": {"AAPL": "America/New_York"}}
    write_prices({"AAPL": frame, "MSFT": history()}, tmp_path / "p.csv", meta)
    print_quality(tmp_path)
    out = capsys.readouterr().out
    assert f"{tmp_path / 'p.csv'}: 122 rows, 2 tickers" in out
    assert "Yahoo Finance, interval 1d, adjust none" in out
    assert "time zone: America/New_York" in out
    assert f"AAPL: returns beyond 25%, once: {frame.index[20]:%Y-%m-%d} +1" in out
    assert "nothing odd" in out


def test_short_form_adds_up_all_tickers() -> None:
    jump, holes = history(), history().drop(history().index[[4, 9]])
    jump.iloc[20:, :4] *= 2
    assert short_form({"A": jump, "B": holes, "C": history()}) == (
        "3 tickers: 181 rows, 2024-01-02 to 2024-03-28; returns beyond 25%: 1, missing sessions: 2"
    )
