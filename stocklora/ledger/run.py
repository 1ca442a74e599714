"""What ``ledger.py`` does: score, verify, export."""

from __future__ import annotations

import datetime as dt
import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from stocklora.cli.console import UserError, listed, print_table, say
from stocklora.ledger.chain import Entry, head_of, read_entries
from stocklora.ledger.score import SHARES, Record, Share, records_of, surprises
from stocklora.ledger.settings import LedgerSettings
from stocklora.ledger.table import (
    LATE,
    NO_CLOSE,
    PENDING,
    REPEATED,
    RUNNING,
    SCORED,
    judged,
    table_of,
    with_closes,
    write_table,
)
from stocklora.prices.calendar import Clock, utc_now
from stocklora.prices.sources.download import AGREEMENT, fetch_or_fail, print_failures
from stocklora.prices.sources.request import DownloadSettings, request_of, tickers_of
from stocklora.prices.tables import read_prices

SHORT = 8  # characters of a hash that tell forecasters apart
DAYS_BEFORE = 7  # the first origin: a source may answer from its week on


def run_ledger(settings: LedgerSettings, clock: Clock = utc_now) -> int:
    """Do what ``settings`` ask; the exit code.

    Raises:
        UserError: no ledger, a broken one, or closes that cannot be had.
    """
    entries = read_entries(settings.ledger)
    if settings.command == "verify":
        return verify(entries, settings)
    table = table_of(entries)
    if settings.command == "export":
        write_table(settings.output, table)
        say(f"saved: {settings.output}, {len(table)} rows of {len(entries)} entries, all hashes right")
        return 0
    return score(table, entries, settings, clock())


# -------------------------------------------------------------------------------------------------------- verify


def verify(entries: Sequence[Entry], settings: LedgerSettings) -> int:
    """Say that the chain is whole, which ``read_entries`` has seen, and what its head is.

    Raises:
        UserError: the head that was written down is none of its hashes.
    """
    say(f"{settings.ledger}: {counted(len(entries), 'entry', 'entries')}, every one follows the one before it")
    if entries:
        say(f"made {entries[0].content['made']} to {entries[-1].content['made']}")
    for before, entry in itertools.pairwise(entries):
        if dt.datetime.fromisoformat(entry.content["made"]) < dt.datetime.fromisoformat(before.content["made"]):
            say(f"entry {entry.number} is dated before entry {before.number}: the clock was set back between them")
    if settings.head is not None:
        wanted = settings.head.strip().lower()
        at = [entry.number for entry in entries if entry.digest.startswith(wanted)]
        if len(wanted) < SHORT or len(at) != 1:
            raise UserError(
                f"--head {settings.head}: no entry of {settings.ledger} has this hash; either it is of another ledger "
                f"(or shorter than {SHORT} characters), or the record was written anew since: compare with a copy"
            )
        say(f"the head that you gave is that of entry {at[0]}: nothing up to it has changed since you wrote it down")
    say(f"head: {head_of(entries)}")
    say("write the head down where you cannot change it; verify --head proves later that the record only grew")
    return 0


# --------------------------------------------------------------------------------------------------------- score


def score(table: pd.DataFrame, entries: Sequence[Entry], settings: LedgerSettings, now: dt.datetime) -> int:
    """Print each forecaster's record and draw it; the exit code.

    Raises:
        UserError: closes that cannot be had.
    """
    table = judged(table, now)
    due = table[table["state"] == NO_CLOSE]
    prices, failed = closes_for(due, settings)
    table = with_closes(table, prices)
    print_missing(table, prices)
    records = list(records_of(table))
    for record in records:
        print_record(record, settings.worst)
    drawn = [record for record in records if record.days]
    if settings.plot is not None and drawn:
        from stocklora.plots.reliability import plot_reliability

        plot_reliability(
            [
                (
                    f"{record.name} ({record.sha256[:SHORT]})",
                    {day.day: [(s.wanted, s.found, s.low, s.high) for s in day.below] for day in record.days},
                    {day.day: day.closes for day in record.days},
                )
                for record in drawn
            ],
            settings.plot,
        )
        say(f"chart: {settings.plot}")
    say(f"head: {head_of(entries)}")
    return print_failures(failed)


def closes_for(due: pd.DataFrame, settings: LedgerSettings) -> tuple[Mapping[str, pd.DataFrame], dict[str, str]]:
    """The closes that came, and the tickers whose closes could not be had (ticker -> why).

    Args:
        due: the rows that wait for a close; nothing is downloaded where there are none.

    Raises:
        UserError: files that cannot be read, a ticker that is not in the ledger, or none came.
    """
    if settings.test_csv:
        return read_prices(settings.test_csv, reading=settings), {}
    waiting = list(dict.fromkeys(due["ticker"]))
    wanted = tickers_of(settings.ticker) if settings.ticker else waiting
    wanted = [ticker for ticker in wanted if ticker in waiting]
    if not wanted:
        return {}, {}
    first = due.loc[due["ticker"].isin(wanted), "origin"].min() - pd.Timedelta(days=DAYS_BEFORE)
    given = {name: value for name in ("source", "retries") if (value := getattr(settings, name)) is not None}
    download = DownloadSettings(ticker=wanted, start=f"{first:%Y-%m-%d}", **given)
    frames, meta = fetch_or_fail(download, dict.fromkeys(wanted, request_of(download)))
    failed = dict(meta.get("failed", {}))
    if not frames:
        raise UserError(f"{wanted[0]}: {failed[wanted[0]]}")
    return frames, failed


def print_missing(table: pd.DataFrame, prices: Mapping[str, pd.DataFrame]) -> None:
    """Say which closes are due and not in the prices, and which closes have been adjusted since."""
    missing = table[table["state"] == NO_CLOSE]
    unknown = [ticker for ticker in dict.fromkeys(missing["ticker"]) if ticker not in prices]
    if unknown:
        say(f"no prices were given of {listed(unknown)}: what was forecast of them is due and not scored")
    gaps = missing[~missing["ticker"].isin(unknown)]
    if len(gaps):
        first = gaps.iloc[0]
        say(
            f"no row in the prices of the origin or the day of {counted(len(gaps), 'forecast')}, the first of them "
            f"{first['ticker']} {first['origin']:%Y-%m-%d} to {first['date']:%Y-%m-%d}: not scored; give prices of "
            f"these days too"
        )
    origins = table[table["state"] == SCORED].drop_duplicates(["ticker", "origin"])
    moved = np.abs(origins["origin_close"] / origins["last_close"] - 1.0) > AGREEMENT
    if moved.any():
        say(
            f"{int(moved.sum())} of {counted(len(origins), 'origin')} have another close in these prices than when the "
            f"forecast was made (splits or dividends since, or another adjustment): returns are compared, not prices"
        )


def print_record(record: Record, worst: int) -> None:
    """One forecaster's record, in a table and in words."""
    own = record.table
    state = own["state"].value_counts()
    say()
    say(f"{record.name} ({record.sha256[:SHORT]})")
    made = own["made"].str[:10]
    origins = len(own[["ticker", "origin"]].drop_duplicates())
    say(
        f"{counted(own['number'].nunique(), 'forecast')} of {counted(own['ticker'].nunique(), 'ticker')} from "
        f"{counted(origins, 'origin')}, made {made.min()} to {made.max()}: {counted(len(own), 'close')}, of which"
    )
    words = {
        SCORED: "scored below", NO_CLOSE: "due, but not in the prices given", PENDING: "not due yet",
        LATE: "late (the close was known): not counted", REPEATED: "said before: counted once",
        RUNNING: "made before the close that they start from: not counted",
    }  # fmt: skip
    for name, text in words.items():
        if state.get(name, 0):
            say(f"  {state[name]:,} {text}")
    if not record.days:
        say("nothing can be scored yet")
        return
    print_table(
        "Closes inside the intervals, with 95% confidence sequences: they hold however often one looks",
        ("days ahead", "closes", "on days", *(f"inside {share:.0%}" for share in SHARES)),
        [(day.day, f"{day.closes:,}", f"{day.origins:,}", *map(share_text, day.inside)) for day in record.days],
    )
    print_losses(record)
    for day in record.days[:1]:
        print_verdict(day.inside[1], day.day)
    print_surprises(record, worst)


def print_losses(record: Record) -> None:
    """Losses beside those of the last close and of the EWMA scale."""
    days = [day for day in record.days if day.losses]
    rows = []
    for day in days:
        (loss, error), naive, ewma = (day.losses[name] for name in ("model", "naive", "ewma"))
        ratios = [ratio(own, other) for own, pair in ((loss, 0), (error, 1)) for other in (naive[pair], ewma[pair])]
        rows.append((day.day, f"{day.compared:,}", f"{loss:.2f}", *ratios[:2], f"{error:.2f}", *ratios[2:]))
    if rows:
        print_table(
            "Quantile loss and absolute error, basis points, as parts of those of the last close and of EWMA (below 1 "
            "is better)",
            ("days ahead", "closes", "quantile loss", "of last close", "of EWMA", "error", "of last close", "of EWMA"),
            rows,
        )


def ratio(own: float, other: float) -> str:
    return f"{own / other:.4f}" if other > 0.0 else "-"


def share_text(share: Share) -> str:
    return f"{share.found:.1%} ({share.low:.0%} to {share.high:.0%})"


def print_verdict(share: Share, day: int) -> None:
    """In words, what the 80% intervals of the nearest day are worth so far."""
    ahead = f"{day} day{'s' * (day != 1)} ahead"
    held = f"{share.found:.0%} of the closes {ahead} were inside an interval that promises {share.wanted:.0%}"
    verdict = "the record does not contradict it"
    if share.verdict != "no contradiction":
        verdict = f"the intervals are {'too wide' if share.verdict == 'more than promised' else 'too narrow'}"
    say(f"{held}: {verdict}; the true share is between {share.low:.0%} and {share.high:.0%}")


def print_surprises(record: Record, most: int) -> None:
    """The closes that went furthest beyond what was said, in words."""
    worst = surprises(record, most)
    worst = worst[worst["times"] > 1.0]
    if len(worst):
        say("worst surprises:")
    for _, row in worst.iterrows():
        came, low, high = (
            f"{100.0 * value:+.1f}%"
            for value in (np.expm1(row["came"]), row["P10"] / row["last_close"] - 1, row["P90"] / row["last_close"] - 1)
        )
        ahead = f"{row['day']} day{'s' * (row['day'] != 1)} ahead"
        say(
            f"  {row['ticker']} {row['date']:%Y-%m-%d}, said {ahead} on {row['origin']:%Y-%m-%d}: {came}, where "
            f"80% was {low} to {high}; {row['times']:.1f} times as far as that end"
        )


def counted(number: int, one: str, many: str = "") -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"
