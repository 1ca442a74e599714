"""The ledger of forecasts: what is recorded, what is counted, and that a change shows."""

from __future__ import annotations

import datetime as dt
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from price_tables import random_prices
from source_tree import REPO_ROOT, RunScript

import ledger as script
from stocklora.cli.console import UserError
from stocklora.ledger.chain import START, LedgerError, append, head_of, read_entries
from stocklora.ledger.record import Maker, is_known, record_forecast
from stocklora.ledger.score import records_of, surprises
from stocklora.ledger.table import judged, table_of, with_closes
from stocklora.prices.calendar import sessions_between
from stocklora.prices.tables import write_prices

META = {"source": "test", "adjust": "all", "interval": "1d"}
COLUMNS = ("P05", "P10", "P25", "P50", "P75", "P90", "P95")
SPREAD = np.array([-1.645, -1.2816, -0.6745, 0.0, 0.6745, 1.2816, 1.645])
DAYS = sessions_between("AAPL", pd.Timestamp("2024-01-02"), pd.Timestamp("2024-12-31"))
AFTER = dt.datetime(2025, 6, 1, tzinfo=dt.UTC)


def prices_of(*tickers: str) -> dict[str, pd.DataFrame]:
    return {name: random_prices(len(DAYS), seed).set_index(DAYS) for seed, name in enumerate(tickers)}


def rows_at(ticker: str, frame: pd.DataFrame, at: int, ahead: int = 3, volatility: float = 0.02) -> list[dict]:
    """Normal forecasts from row ``at``, as rows of predictions.csv."""
    last, rows = float(frame["Close"].iloc[at]), []
    for day in range(1, ahead + 1):
        closes = dict(zip(COLUMNS, last * np.exp(volatility * day**0.5 * SPREAD), strict=True))
        rows.append({"Ticker": ticker, "Origin": DAYS[at], "Date": DAYS[at + day], "Day": day, "Last_Close": last,
                     "Predicted_Close": closes["P50"], **closes})  # fmt: skip
    return rows


def evening(at: int) -> dt.datetime:
    """After the close of row ``at``."""
    return DAYS[at].to_pydatetime().replace(hour=22, tzinfo=dt.UTC)


def record(path: Path, prices: dict[str, pd.DataFrame], at: int, now: dt.datetime | None = None, **options) -> None:
    sha256 = options.pop("sha256", "a" * 64)
    rows = [row for name, frame in prices.items() for row in rows_at(name, frame, at, **options)]
    known = {name: frame.iloc[: at + 1] for name, frame in prices.items()}
    record_forecast(path, rows, known, Maker("a model", sha256, "2023-12-31"), lambda: now or evening(at))


def scored(path: Path, prices: dict[str, pd.DataFrame], now: dt.datetime = AFTER) -> pd.DataFrame:
    return with_closes(judged(table_of(read_entries(path)), now), prices)


def one_error(call) -> str:
    assert call.returncode == 2, (call.stdout, call.stderr)
    (line,) = call.stderr.splitlines()
    return line


def test_each_entry_follows_the_one_before(in_folder: Path, capsys) -> None:
    prices = prices_of("AAPL", "MSFT")
    for at in (100, 101):
        record(Path("f.db"), prices, at)
    assert "ledger: f.db, entries 3 to 4\n" in capsys.readouterr().out
    entries = read_entries(Path("f.db"))
    assert [entry.content["previous"] for entry in entries] == [START, *(entry.digest for entry in entries[:-1])]
    first = entries[0].content
    assert (first["ticker"], first["origin"]) == ("AAPL", f"{DAYS[100]:%Y-%m-%d}")
    assert first["made"] == evening(100).isoformat()
    assert first["model"] == {"name": "a model", "sha256": "a" * 64, "prior_last_day": "2023-12-31"}
    assert not first["running"]
    assert [day["late"] for day in first["days"]] == [False] * 3


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("UPDATE entries SET content = replace(content, 'false', 'true') WHERE number = 2", "entry 2"),
        ("DELETE FROM entries WHERE number = 2", "lacks entry 2, it goes on with 3"),
        ("DELETE FROM entries WHERE number = 1", "lacks entry 1"),
        ("UPDATE entries SET content = (SELECT content FROM entries WHERE number = 1), "
         "hash = (SELECT hash FROM entries WHERE number = 1) WHERE number = 2", "entry 2 does not follow"),
    ],
)  # fmt: skip
def test_a_change_shows(in_folder: Path, call_script: RunScript, change: str, says: str) -> None:
    for at in (100, 101, 102):
        record(Path("f.db"), prices_of("AAPL"), at)
    database = sqlite3.connect("f.db")
    with pytest.raises(sqlite3.IntegrityError, match=r"never change|always stay"):
        database.execute(change)
    for trigger in ("entries_stay", "entries_remain"):
        database.execute(f"DROP TRIGGER {trigger}")
    database.execute(change)
    database.commit()
    database.close()
    write_prices(prices_of("AAPL"), Path("p.csv"), META)
    for command in (["verify"], ["export"], ["score", "--test_csv", "p.csv"]):
        assert says in one_error(call_script("ledger.py", *command, "--ledger", "f.db", cwd=in_folder))
    assert not Path("ledger.csv").exists()


def test_a_record_cut_short_or_made_anew_lacks_the_head_that_was_noted(in_folder: Path, call_script: RunScript) -> None:
    prices = prices_of("AAPL")
    for at in (100, 101):
        record(Path("f.db"), prices, at)
    head = head_of(read_entries(Path("f.db")))
    record(Path("f.db"), prices, 102)
    good = call_script("ledger.py", "verify", "--ledger", "f.db", "--head", head, cwd=in_folder)
    assert (good.returncode, good.stderr) == (0, "")
    assert "is that of entry 2" in good.stdout
    for at in (100, 101):
        record(Path("anew.db"), prices, at, volatility=0.03)
    line = one_error(call_script("ledger.py", "verify", "--ledger", "anew.db", "--head", head, cwd=in_folder))
    assert "no entry of anew.db has this hash" in line


def test_a_clock_that_was_set_back_is_told(in_folder: Path, call_script: RunScript) -> None:
    record(Path("f.db"), prices_of("AAPL"), 101)
    record(Path("f.db"), prices_of("AAPL"), 100)
    said = call_script("ledger.py", "verify", "--ledger", "f.db", cwd=in_folder).stdout
    assert "entry 2 is dated before entry 1: the clock was set back" in said


@pytest.mark.parametrize(
    ("ticker", "day", "now", "known"),
    [
        ("AAPL", "2024-11-29", "2024-11-29 17:59", False),  # an early close, 18:00 UTC
        ("AAPL", "2024-11-29", "2024-11-29 18:00", True),
        ("AAPL", "2024-12-02", "2024-11-29 18:00", False),
        ("BTC-USD", "2024-12-01", "2024-12-01 23:59", False),
        ("BTC-USD", "2024-12-01", "2024-12-02 00:00", True),
        ("X.UNKNOWN", "2024-12-02", "2024-12-01 23:59", False),
        ("X.UNKNOWN", "2024-12-02", "2024-12-02 00:00", True),
        ("AAPL", "2013-03-04", "2024-12-02 00:00", True),
    ],
)
def test_a_close_is_known_from_the_end_of_its_session(ticker: str, day: str, now: str, known: bool) -> None:
    assert is_known(ticker, pd.Timestamp(day), dt.datetime.fromisoformat(now).replace(tzinfo=dt.UTC)) == known


def test_what_is_late_said_again_or_not_over_is_not_counted(in_folder: Path, capsys) -> None:
    prices, path = prices_of("AAPL"), Path("f.db")
    record(path, prices, 100, evening(101))  # its first day is known
    assert "1 of 3 closes were known already: late" in capsys.readouterr().out
    record(path, prices, 100, evening(101), volatility=0.9)  # all said again, wider
    record(path, prices, 110, DAYS[110].to_pydatetime().replace(hour=17, tzinfo=dt.UTC))  # at noon of its own origin
    assert "made before the close it starts from, not counted: AAPL" in capsys.readouterr().out
    record(path, prices, 110)
    record(path, prices, 110, sha256="b" * 64)  # another forecaster's is its own
    table = scored(path, prices, evening(112))
    assert table["state"].tolist() == [
        *("late", "scored", "scored"), *("late", "repeated", "repeated"), *["running"] * 3,
        *("scored", "scored", "pending"), *("scored", "scored", "pending"),
    ]  # fmt: skip
    first, second = records_of(table)
    assert [(day.day, day.closes) for day in first.days] == [(1, 1), (2, 2), (3, 1)]
    assert [(day.day, day.closes) for day in second.days] == [(1, 1), (2, 1)]


def test_scores_are_those_worked_out_by_hand_and_a_split_changes_none(in_folder: Path) -> None:
    prices, path = prices_of("AAPL"), Path("f.db")
    for at in range(60, 120):
        record(path, prices, at)
    close = np.log(prices["AAPL"]["Close"].to_numpy())
    came = close[61:121] - close[60:120]
    quantiles = 0.02 * SPREAD
    levels = np.array([0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95])
    error = came[:, None] - quantiles
    pinball = 1e4 * np.where(error > 0, levels * error, (levels - 1) * error).mean()
    split = {"AAPL": prices["AAPL"].assign(Close=prices["AAPL"]["Close"] / 4)}
    for given in (prices, split):
        (found,) = records_of(scored(path, given))
        day = found.days[0]
        assert day.closes == day.origins == day.compared == 60
        assert day.losses["model"] == pytest.approx((pinball, 1e4 * np.abs(came).mean()), rel=1e-4)
        assert day.losses["naive"][1] == pytest.approx(1e4 * np.abs(came).mean(), rel=1e-4)  # the last close itself
        assert [share.found for share in day.inside] == pytest.approx(
            [np.mean(np.abs(came) <= 0.02 * end) for end in (0.6745, 1.2816, 1.645)]
        )
        assert [share.found for share in day.below] == pytest.approx([np.mean(came <= end) for end in quantiles])
        assert all(share.low < share.found < share.high for share in day.inside)


def test_the_baselines_know_nothing_of_later_days(in_folder: Path) -> None:
    prices = prices_of("AAPL", "MSFT")
    record(Path("f.db"), prices, 100)
    later = {name: frame.copy() for name, frame in prices.items()}
    for frame in later.values():
        frame.iloc[101:] *= 3.0
    record(Path("g.db"), later, 100)
    assert [entry.digest for entry in read_entries(Path("f.db"))] == [
        entry.digest for entry in read_entries(Path("g.db"))
    ]


def test_the_worst_surprise_is_the_crash(in_folder: Path) -> None:
    prices = prices_of("AAPL", "MSFT")
    prices["MSFT"].iloc[105:, :4] *= 0.7
    for at in range(100, 110):
        record(Path("f.db"), prices, at)
    (found,) = records_of(scored(Path("f.db"), prices))
    worst = surprises(found, 5)
    assert (worst["ticker"].iloc[0], worst["date"].iloc[0]) == ("MSFT", DAYS[105])
    assert worst["times"].is_monotonic_decreasing
    assert not worst.duplicated(["ticker", "date"]).any()


def test_score_says_what_is_missing_and_draws(in_folder: Path, call_script: RunScript) -> None:
    prices = prices_of("AAPL", "MSFT", "IBM")
    for at in range(60, 90):
        record(Path("forecasts.db"), prices, at)
    given = {"AAPL": prices["AAPL"], "MSFT": prices["MSFT"].drop(DAYS[70])}
    given["AAPL"].iloc[:, :4] /= 2.0
    write_prices(given, Path("p.csv"), META)
    result = call_script("ledger.py", "score", "--test_csv", "p.csv", cwd=in_folder)
    assert (result.returncode, result.stderr) == (0, "")
    for words in (
        "no prices were given of IBM",
        "no row in the prices of the origin or the day of 6 forecasts, the first of them "
        "MSFT", "30 of 59 origins have another close in these prices", "90 forecasts of 3 tickers", "of EWMA",
        "inside an interval that promises 80%", "worst surprises:", "chart: ledger.png",
    ):  # fmt: skip
        assert words in result.stdout
    assert Path("ledger.png").read_bytes().startswith(b"\x89PNG")
    exported = call_script("ledger.py", "export", cwd=in_folder)
    assert exported.returncode == 0
    assert len(pd.read_csv("ledger.csv")) == 270


def test_two_processes_append_at_once(in_folder: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from stocklora.ledger.chain import append\n"
        "for n in range(25): append(Path('f.db'), [{'from': sys.argv[1], 'n': n}] * 2)"
    )
    env = {**os.environ, "PYTHONPATH": str(REPO_ROOT)}
    both = [subprocess.Popen([sys.executable, "-c", code, name], env=env) for name in "ab"]
    assert [process.wait(timeout=120) for process in both] == [0, 0]
    entries = read_entries(Path("f.db"))
    assert len(entries) == 100
    for name in "ab":
        own = [entry.content["n"] for entry in entries if entry.content["from"] == name]
        assert own == sorted(own)


@pytest.mark.parametrize("kind", ["text", "another program's", "folder", "in a file"])
def test_what_is_no_ledger_is_left_alone_and_the_forecast_saved(
    kind: str, sample_csv: Path, in_folder: Path, call_script: RunScript
) -> None:
    path = Path("f.db")
    if kind == "text":
        path.write_text("Date,Close\n" * 200)
    elif kind == "another program's":
        with sqlite3.connect(path) as database:
            database.execute("CREATE TABLE news (text)")
    elif kind == "folder":
        path.mkdir()
    else:
        Path("file").write_text("")
        path = Path("file/f.db")
    before = path.read_bytes() if path.is_file() else None
    shutil.copy(sample_csv, "x.csv")
    made = call_script(
        "framework.py", "--model_path", "prior", "--test_csv", "x.csv", "--ledger", path, cwd=in_folder
    )  # fmt: skip
    assert made.returncode == 0
    (line,) = made.stderr.splitlines()
    assert line.startswith(f"warning: ledger: {path} ")
    assert "the forecast is saved but not on record" in line
    assert Path("predictions.csv").is_file()
    assert before is None or path.read_bytes() == before
    assert str(path) in one_error(call_script("ledger.py", "verify", "--ledger", path, cwd=in_folder))


def test_a_database_that_must_not_be_written_is_a_ledger_error(in_folder: Path, monkeypatch) -> None:
    record(Path("f.db"), prices_of("AAPL"), 100)
    connect = sqlite3.connect
    monkeypatch.setattr(
        "stocklora.ledger.chain.sqlite3.connect",
        lambda path, **options: connect(f"file:{path}?mode=ro", uri=True, **options),
    )
    with pytest.raises(LedgerError, match="readonly"):
        append(Path("f.db"), [{}])


def test_no_ledger_leaves_none(sample_csv: Path, in_folder: Path, call_script: RunScript) -> None:
    Path("c.json").write_text('{"ledger": null}')
    for flags in (["--no-ledger"], ["--config", "c.json"]):
        made = call_script("framework.py", "--model_path", "prior", "--test_csv", sample_csv, *flags, cwd=in_folder)
        assert (made.returncode, made.stderr) == (0, "")
        assert "ledger" not in made.stdout
    assert not list(Path().glob("*.db"))


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["verify"], "no ledger forecasts.db; framework.py and framework_llm.py write one"),
        (["score"], "where are the closes that came? Give --test_csv FILE, or --ticker"),
        (["verify", "--test_csv", "p.csv"], "--test_csv is for score"),
        (["score", "--ticker", "--test_csv", "p.csv"], "give one of the two"),
        (["score", "--test_csv", "p.csv", "--retries", "1"], "--retries says how closes are downloaded"),
        (["scroe"], "unknown argument scroe; give one of score, verify, export"),
    ],
)
def test_mistakes_are_one_line(flags: list[str], says: str, in_folder: Path, call_script: RunScript) -> None:
    assert says in one_error(call_script("ledger.py", *flags, cwd=in_folder))
    assert list(in_folder.iterdir()) == []


def test_the_closes_are_downloaded_as_download_py_does(in_folder: Path, capsys) -> None:
    """From the bundled prices, which are a source like any other."""
    from stocklora.prices.sources.fetch import bundled_prices

    frame = bundled_prices()["AAPL"].iloc[-40:]
    rows = []
    for day in (1, 2, 3):
        last = float(frame["Close"].iloc[-20])
        closes = dict(zip(COLUMNS, last * np.exp(0.02 * SPREAD), strict=True))
        rows.append({"Ticker": "AAPL", "Origin": frame.index[-20], "Date": frame.index[-20 + day], "Day": day,
                     "Last_Close": last, "Predicted_Close": last, **closes})  # fmt: skip
    now = frame.index[-20].to_pydatetime().replace(hour=22, tzinfo=dt.UTC)
    record_forecast(Path("forecasts.db"), rows, {"AAPL": frame.iloc[:-19]}, Maker("m", "c" * 64), lambda: now)
    assert script.main(["score", "--ticker", "--source", "sample", "--no-plot"]) == 0
    assert "3 scored below" in capsys.readouterr().out
    with pytest.raises(UserError, match="no ledger"):
        read_entries(Path("other.db"))
