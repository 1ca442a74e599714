"""A-shares through akshare, an optional extra (``pip install 'stocklora[akshare]'``).

akshare asks Eastmoney, which has no adjustment for splits alone and counts volume in lots of 100.
Tickers are written as for Yahoo (``600519.SS``, ``000001.SZ``) or as six digits.
"""

from __future__ import annotations

import datetime as dt
import re
from typing import Any

import pandas as pd

from stocklora.cli.console import UserError
from stocklora.prices.calendar import sessions_between
from stocklora.prices.sources.request import Answer, Request, SourceError, clean_bars, period_start

ZONE = "Asia/Shanghai"
CLOSE = dt.timedelta(hours=15, minutes=5)  # the session ends at 15:00, its numbers settle a little later
SHARES_PER_LOT = 100
PERIODS = {"1d": "daily", "1wk": "weekly", "1mo": "monthly"}
ADJUST = {"none": "", "all": "qfq"}
COLUMNS = {"日期": "Date", "开盘": "Open", "最高": "High", "最低": "Low", "收盘": "Close", "成交量": "Volume"}


class AkshareSource:
    """Eastmoney's daily bars of the Shanghai, Shenzhen and Beijing exchanges."""

    name = "akshare"

    def __init__(self, timeout_s: float = 15.0) -> None:
        try:
            import akshare
        except ImportError as error:
            missing = getattr(error, "name", None) or "akshare"
            raise UserError(
                f"--source akshare needs a package that is not installed ({missing}); "
                "run: pip install 'akshare>=1.16,<2', or leave out --source akshare"
            ) from None
        self.akshare: Any = akshare
        self.timeout_s = timeout_s

    def fetch(self, ticker: str, request: Request) -> Answer:
        """Ask Eastmoney once for one ticker.

        Raises:
            SourceError: there is no answer with whole days in it.
            UserError: ``adjust`` is ``splits``, which this source does not have.
        """
        if request.adjust not in ADJUST:
            raise UserError("--source akshare has no prices adjusted for splits alone; use --adjust all or none")
        match = re.fullmatch(r"(\d{6})(\.(SS|SH|SZ|BJ))?", ticker.upper())
        if not match:
            raise SourceError("unknown", "akshare has A-shares only; write six digits, such as 600519.SS")
        now = dt.datetime.now(dt.UTC)
        today = pd.Timestamp(now).tz_convert(ZONE).tz_localize(None)
        first, last = self.span(request, today)
        try:
            raw = self.akshare.stock_zh_a_hist(
                symbol=match[1],
                period=PERIODS[request.interval],
                start_date=f"{first:%Y%m%d}",
                end_date=f"{last:%Y%m%d}",
                adjust=ADJUST[request.adjust],
                timeout=self.timeout_s,
            )
        except Exception as error:
            # akshare raises whatever its parsing or requests ran into
            kind = "network" if isinstance(error, OSError) else "server"
            raise SourceError(kind, f"akshare failed ({type(error).__name__}: {str(error)[:120]})") from None
        if raw is None or len(raw) == 0:
            raise SourceError("empty", "akshare has no prices for it in that range")
        missing = [name for name in COLUMNS if name not in raw.columns]
        if missing:
            raise SourceError("refused", f"akshare's table lacks {', '.join(missing)}; its version may be too new")
        return self.answer(request, raw, today, now)

    def span(self, request: Request, today: pd.Timestamp) -> tuple[pd.Timestamp, pd.Timestamp]:
        """First and last day to ask for, both included."""
        last = pd.Timestamp(request.end) - pd.Timedelta(days=1) if request.end else today.normalize()
        if request.start is not None:
            return pd.Timestamp(request.start), last
        if request.period == "max":
            return pd.Timestamp(1990, 12, 1), last
        return period_start(request.period, last) + pd.Timedelta(days=1), last

    def answer(self, request: Request, raw: pd.DataFrame, today: pd.Timestamp, now: dt.datetime) -> Answer:
        frame = raw.rename(columns=COLUMNS)
        index = pd.DatetimeIndex(pd.to_datetime(frame["Date"])).normalize().as_unit("ns")
        frame = frame.drop(columns="Date").set_index(index.rename("Date"))
        frame["Volume"] = frame["Volume"] * SHARES_PER_LOT
        day_is_over = today - today.normalize() >= CLOSE
        open_from = today.normalize() + pd.Timedelta(days=1) if day_is_over else today.normalize()
        # Eastmoney dates a week or month by its last session so far: only later sessions leave it open.
        last = frame.index[-1]
        end = {"1d": last, "1wk": last + pd.offsets.Week(weekday=6, n=0), "1mo": last + pd.offsets.MonthEnd(n=0)}
        bar_end = end[request.interval]
        unfinished = bar_end >= open_from and len(sessions_between("600519.SS", open_from, bar_end)) > 0
        frame, dropped = clean_bars(frame, unfinished)
        if frame.empty:
            raise SourceError("empty", "akshare gave no finished day with a price in that range")
        over = today.normalize() + (pd.Timedelta(days=1) if day_is_over else CLOSE)
        fresh_until = over.tz_localize(ZONE).tz_convert("UTC").to_pydatetime()
        return Answer(frame, now, ZONE, "CNY", dropped, {}, fresh_until)
