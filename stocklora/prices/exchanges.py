"""Which exchange a ticker trades on: by its name in the spellings of many data vendors, and by the days of its rows.

Where name and rows disagree the rows win; where neither tells, ``--exchange`` does.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

UNITED_STATES = "XNYS"
EVERY_DAY = "24/7"
WEEKDAYS = "24/5"

# Yahoo's suffix -> exchange_calendars' name. Regional boards keep the days of their main exchange.
SUFFIXES = {
    "SS": "XSHG", "SH": "XSHG", "SZ": "XSHG", "BJ": "XSHG", "XSHG": "XSHG", "XSHE": "XSHG", "HK": "XHKG",
    "XHKG": "XHKG", "TW": "XTAI", "TWO": "XTAI", "JP": "XTKS",
    "T": "XTKS", "KS": "XKRX", "KQ": "XKRX", "SI": "XSES", "KL": "XKLS", "JK": "XIDX", "BK": "XBKK", "PS": "XPHS",
    "NS": "XBOM", "BO": "XBOM", "KA": "XKAR", "AX": "XASX", "XA": "XASX", "NZ": "XNZE",
    "L": "XLON", "IL": "XLON", "UK": "XLON", "IR": "XDUB", "PA": "XPAR", "AS": "XAMS", "BR": "XBRU", "LS": "XLIS",
    "DE": "XETR", "F": "XFRA", "BE": "XFRA", "DU": "XDUS", "HM": "XHAM", "MU": "XFRA", "SG": "XSTU", "HA": "XFRA",
    "MI": "XMIL", "MC": "XMAD", "SW": "XSWX", "VI": "XWBO", "ST": "XSTO", "HE": "XHEL", "CO": "XCSE", "OL": "XOSL",
    "IC": "XICE", "TL": "XTAL", "RG": "XRIS", "VS": "XLIT", "WA": "XWAR", "PR": "XPRA", "BD": "XBUD", "RO": "XBSE",
    "AT": "ASEX", "IS": "XIST", "ME": "XMOS", "TA": "XTAE", "SR": "XSAU", "JO": "XJSE",
    "TO": "XTSE", "V": "XTSE", "NE": "XTSE", "CN": "XTSE", "MX": "XMEX", "SA": "BVMF", "BA": "XBUE", "SN": "XSGO",
    "CL": "XBOG", "LM": "XLIM",
    # share classes written with a point: BRK.B; Reuters' boards
    "A": UNITED_STATES, "B": UNITED_STATES, "C": UNITED_STATES, "US": UNITED_STATES, "N": UNITED_STATES,
    "O": UNITED_STATES, "OQ": UNITED_STATES,
}  # fmt: skip
# What stands before the code: qlib's SH600519, baostock's sh.600519, SHSE.600519, Google's HKG:0700.
PREFIXES = {
    "SH": "XSHG", "SZ": "XSHG", "BJ": "XSHG", "SHSE": "XSHG", "SZSE": "XSHG", "SHA": "XSHG", "SHE": "XSHG",
    "SSE": "XSHG", "HK": "XHKG", "HKG": "XHKG", "HKEX": "XHKG", "TYO": "XTKS", "TSE": "XTKS", "KRX": "XKRX",
    "TPE": "XTAI", "TWSE": "XTAI", "LON": "XLON", "LSE": "XLON", "ETR": "XETR", "XETR": "XETR", "FRA": "XFRA",
    "EPA": "XPAR", "AMS": "XAMS", "NSE": "XBOM", "BSE": "XBOM", "ASX": "XASX", "TSX": "XTSE", "NYSE": UNITED_STATES,
    "NASDAQ": UNITED_STATES, "AMEX": UNITED_STATES, "NYSEARCA": UNITED_STATES, "BINANCE": EVERY_DAY,
    "COINBASE": EVERY_DAY, "BITSTAMP": EVERY_DAY,
}  # fmt: skip
# Bloomberg's country and board codes: 700 HK Equity.
BLOOMBERG = {
    "US": UNITED_STATES, "UN": UNITED_STATES, "UW": UNITED_STATES, "UQ": UNITED_STATES, "UR": UNITED_STATES,
    "LN": "XLON", "GR": "XETR", "GY": "XETR", "JP": "XTKS", "JT": "XTKS", "HK": "XHKG", "CH": "XSHG", "CG": "XSHG",
    "CS": "XSHG", "C1": "XSHG", "C2": "XSHG", "FP": "XPAR", "NA": "XAMS", "IM": "XMIL", "SM": "XMAD", "SW": "XSWX",
    "SE": "XSWX", "AU": "XASX", "AT": "XASX", "CN": "XTSE", "CT": "XTSE", "IN": "XBOM", "IB": "XBOM", "IS": "XBOM",
    "KS": "XKRX", "KP": "XKRX", "KQ": "XKRX", "TT": "XTAI", "SP": "XSES", "BZ": "BVMF", "SS": "XSTO", "DC": "XCSE",
    "NO": "XOSL",
}  # fmt: skip
INDICES = {
    "^FTSE": "XLON", "^GDAXI": "XETR", "^MDAXI": "XETR", "^FCHI": "XPAR", "^STOXX50E": "XETR", "^N225": "XTKS",
    "^HSI": "XHKG", "^HSCE": "XHKG", "^AXJO": "XASX", "^AORD": "XASX", "^GSPTSE": "XTSE", "^BVSP": "BVMF",
    "^MXX": "XMEX", "^KS11": "XKRX", "^KQ11": "XKRX", "^TWII": "XTAI", "^STI": "XSES", "^BSESN": "XBOM",
    "^NSEI": "XBOM", "^IBEX": "XMAD", "^AEX": "XAMS", "^SSMI": "XSWX", "^OMX": "XSTO", "^ATX": "XWBO",
}  # fmt: skip
MONEY = "USD|EUR|GBP|JPY|CNY|KRW|INR|CAD|AUD|CHF|BRL|TRY|BTC|ETH|USDT|USDC"
COINS = "BTC|ETH|XRP|BNB|SOL|ADA|DOGE|TRX|AVAX|DOT|LTC|BCH|LINK|XLM|XMR|ETC|ATOM|MATIC|XBT"
CRYPTO = re.compile(
    rf"[A-Z0-9]{{2,}}[-/_]({MONEY})|[A-Z0-9]{{2,12}}(USDT|USDC|BUSD|FDUSD|TUSD)|({COINS})({MONEY})", re.IGNORECASE
)
# Codes of digits alone are written alike in several countries: the rows choose among these.
DIGITS = {4: ("XTKS", "XHKG", "XTAI", "XKLS", "XSAU"), 5: ("XHKG",), 6: ("XSHG", "XKRX")}
ANYWHERE = (
    UNITED_STATES, "XLON", "XETR", "XPAR", "XTKS", "XHKG", "XSHG", "XKRX", "XTAI", "XBOM", "XASX", "XTSE", "XSES",
    "BVMF", "XSWX", "XMIL", "XMAD", "XSTO", "XKLS", "XIDX", "XBKK", "XJSE", "XMEX", "XSAU", "CMES",
)  # fmt: skip
ROWS_LOOKED_AT = 750  # the last three years: calendars are built for whole years, and each takes its time
MOST_OFF = 0.01  # of the rows may stand on days without a session: a half day, a storm, a vendor's slip
REFUSED_OFF = 0.03  # of the rows, and no calendar that fits better
LEAST_ROWS, LEAST_DENSITY = 40, 0.6  # fewer, or more holes, say nothing of holidays
CLEARLY = 0.004  # a calendar must fit better than the next by so much

WAY_OUT = "name the exchange, as in --exchange XSHG"

_assigned: dict[str, str] = {}


def assign_exchange(ticker: str, code: str) -> None:
    """From now on the ticker trades there, whatever its name says."""
    _assigned[ticker] = code


def assigned_exchanges() -> dict[str, str]:
    """What ``assign_exchange`` was told."""
    return dict(_assigned)


def exchange_of(ticker: str) -> str | None:
    """The exchange_calendars name for a ticker, or None where its suffix names no exchange known here."""
    return _assigned.get(ticker) or named_exchange(ticker)


def named_exchange(ticker: str) -> str | None:
    """What the name alone says; the United States where it says nothing."""
    name = ticker.strip().upper()
    if CRYPTO.fullmatch(name):
        return EVERY_DAY
    if name.endswith("=X"):
        return WEEKDAYS
    if name.endswith("=F"):
        return "CMES"
    if name.startswith("^"):
        return INDICES.get(name, UNITED_STATES)
    if match := re.fullmatch(r"\S+ ([A-Z][A-Z0-9])( EQUITY| INDEX)?", name):
        return BLOOMBERG.get(match[1])
    match = re.fullmatch(r"([A-Z]{2,8})[.:](.+)", name)
    if match and match[1] in PREFIXES and (":" in name or match[2].isdigit()):
        return PREFIXES[match[1]]
    if match := re.fullmatch(r"(SH|SZ|BJ|HK)\d{4,6}", name):
        return PREFIXES[match[1]]
    stem, point, suffix = name.rpartition(".")
    if point and stem:
        return SUFFIXES.get(suffix)
    # A-shares are often written without a suffix; Shanghai and Shenzhen keep the same days.
    return DIGITS.get(len(name), (UNITED_STATES,))[0] if name.isdigit() else UNITED_STATES


def settle_exchange(
    ticker: str, index: pd.DatetimeIndex, sessions: Callable[[str, pd.Timestamp, pd.Timestamp], pd.DatetimeIndex]
) -> str | None:
    """Hold a ticker's days against the calendars, and assign the exchange where they say another than its name.

    Args:
        ticker: its name.
        index: days of its rows.
        sessions: (exchange, first, last) -> the days on which it is open.

    Returns:
        What was decided, in words; None where the name was right, or nothing better is known.

    Raises:
        ValueError: the days fit no exchange.
    """
    _assigned.pop(ticker, None)
    days = index[-ROWS_LOOKED_AT:]
    named = named_exchange(ticker)
    if len(days) < LEAST_ROWS or len(days) < LEAST_DENSITY * len(pd.bdate_range(days[0], days[-1])):
        return None
    weekend = float(np.mean(days.day_of_week.to_numpy() >= 5))
    if weekend > 0.2:
        if named == EVERY_DAY:
            return None
        assign_exchange(ticker, EVERY_DAY)
        return f"{ticker}: {100 * weekend:.0f}% of its rows are weekends, so that it trades every day"
    if named == EVERY_DAY:
        if weekend > 0:
            return None
        assign_exchange(ticker, WEEKDAYS)
        return f"{ticker}: no row is on a weekend, so that it trades on weekdays"
    # Every weekday, holidays included: filled up, or made by a program. That says nothing of where.
    if named in (None, WEEKDAYS) or len(days) > 0.99 * len(pd.bdate_range(days[0], days[-1])):
        return None
    digits = DIGITS.get(len(ticker.strip()), ()) if ticker.strip().isdigit() else ()
    off, _ = _misfit(days, str(named), sessions)
    if off <= MOST_OFF and len(digits) < 2:
        return None
    fits = _fitting(days, (str(named), *digits), sessions)
    if not fits and off > MOST_OFF:
        fits = _fitting(days, (str(named), *ANYWHERE), sessions)
    if not fits:
        if off > REFUSED_OFF:
            raise ValueError(f"{_off_days(ticker, days, str(named), sessions)}, and no other calendar fits; {WAY_OUT}")
        return None
    if str(named) in fits:
        return None
    if len(fits) > 1:
        told = _off_days(ticker, days, str(named), sessions)
        raise ValueError(f"{told}; they are the sessions of {' and of '.join(sorted(fits))} alike; {WAY_OUT}")
    assign_exchange(ticker, fits[0])
    return f"{ticker}: its rows are the sessions of {fits[0]}, not of {named}"


def _fitting(
    days: pd.DatetimeIndex,
    codes: Sequence[str],
    sessions: Callable[[str, pd.Timestamp, pd.Timestamp], pd.DatetimeIndex],
) -> list[str]:
    """The exchange whose sessions the days are, or several that fit about as well; none where they fit nowhere."""
    misfits = {code: _misfit(days, code, sessions) for code in dict.fromkeys(codes)}
    least = min(sum(misfit) for misfit in misfits.values())
    return [code for code, misfit in misfits.items() if misfit[0] <= MOST_OFF and sum(misfit) < least + CLEARLY]


def _misfit(
    days: pd.DatetimeIndex, code: str, sessions: Callable[[str, pd.Timestamp, pd.Timestamp], pd.DatetimeIndex]
) -> tuple[float, float]:
    """The share of the rows on days without a session, and of the sessions without a row (long gaps left out)."""
    known = sessions(code, days[0], days[-1])
    off = len(days.difference(known)) / len(days)
    absent = known.difference(days)
    gaps = pd.Series(known.isin(absent)).groupby((~pd.Series(known.isin(absent))).cumsum()).sum()
    return off, float(gaps[gaps <= 3].sum()) / max(1, len(known))


def _off_days(
    ticker: str,
    days: pd.DatetimeIndex,
    named: str,
    sessions: Callable[[str, pd.Timestamp, pd.Timestamp], pd.DatetimeIndex],
) -> str:
    off: Sequence[pd.Timestamp] = days.difference(sessions(named, days[0], days[-1]))
    shown = ", ".join(f"{day:%Y-%m-%d}" for day in off[:3])
    return f"{ticker}: {len(off)} of its last {len(days)} rows are no sessions of {named} ({shown})"
