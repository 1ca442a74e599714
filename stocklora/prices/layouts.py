"""The price tables that people have, brought into ours: columns, dates and numbers of other programs and sites.

A layout is recognised as a whole: where the header stands, what separates the cells, what each column is, how dates
and numbers are written, which rows are none. What was done is said in one line. Cells that cannot be read stay as
they are, so that ``csv_columns`` names them.
"""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from stocklora.cli.console import UserError
from stocklora.prices.bars import QUOTES
from stocklora.prices.cells import MISSING, Numbers, is_day, is_missing, plain_date_cells
from stocklora.prices.csv_columns import PRICE_COLUMNS, Faults, is_whole

SEPARATORS = {",": "", ";": "semicolons", "\t": "tabs", "|": "bars", " ": "blanks"}  # and what notes call them
HEADER_WITHIN = 40  # lines of a preface before the header, at most
FIELDS = ("Date", "Time", "Ticker", *PRICE_COLUMNS, "Adjusted", "Split")

# How others write a column's name, in lower case without blanks and marks; the first that a file has is taken.
SPELLINGS: dict[str, tuple[str, ...]] = {
    "Date": (
        "date", "dates", "tradedate", "tradingdate", "exchangedate", "pricedate", "datadate", "trddt", "datum", "fecha",
        "data", "jour", "timeopen", "opentime", "timestamp", "timestamps", "datetime", "dtyyyymmdd", "dateandtime",
        "gmttime", "localtime", "utctime", "beginsat", "day", "dt", "eob", "bob", "candlebegintime", "effectivedate",
        "日期", "交易日期", "交易日", "时间", "交易时间", "时间戳", "日付", "일자", "날짜", "time", "t", "unnamed0",
        "index", "",
    ),
    "Time": ("time", "时间", "交易时间"),
    "Ticker": (
        "ticker", "symbol", "tic", "tscode", "股票代码", "证券代码", "證券代號", "代码", "code", "instrument", "stkcd",
        "stockcode", "seccode", "orderbookid", "actsymbol", "uniqueid", "security", "isin", "stock", "name", "简称",
        "股票名称", "证券名称", "名称",
    ),
    "Open": (
        "open", "o", "openprice", "opening", "openingprice", "first", "openprc", "opnprc", "prcod", "öffnung",
        "eröffnung", "eröffnungskurs", "erster", "ouverture", "apertura", "abertura", "开盘", "开盘价", "今开",
        "開盤價", "開盤", "始値", "시가", "pxopen",
    ),
    "High": (
        "high", "h", "highprice", "highest", "highestprice", "max", "askhi", "hiprc", "prchd", "hoch", "tageshoch",
        "höchst", "höchstkurs", "plushaut", "máximo", "maximo", "massimo", "最高", "最高价", "最高價", "高値", "고가",
        "pxhigh",
    ),
    "Low": (
        "low", "l", "lowprice", "lowest", "lowestprice", "min", "bidlo", "loprc", "prcld", "tief",
        "tagestief", "tiefst", "tiefstkurs", "plusbas", "mínimo", "minimo", "最低", "最低价", "最低價", "安値", "저가",
        "pxlow",
    ),
    "Close": (
        "close", "c", "closelast", "closeprice", "closing", "closingprice", "prc", "clsprc", "prccd", "schluss",
        "schlusskurs", "letzter", "clôture", "cierre", "chiusura", "fechamento", "收盘", "收盘价", "收盤價", "收盤",
        "終値", "종가", "pxlast", "last", "lastprice", "price", "zuletzt",
    ),
    "Volume": (
        "volume", "vol", "v", "totalvolume", "dnshrtrd", "cshtrd", "stück", "stücke", "stuecke", "stückumsatz",
        "noofshares", "numberofshares", "sharestraded", "volumen", "umsatz", "qty", "tickvol", "tickvolume",
        "tottrdqty", "totaltradedquantity", "成交量", "成交股數", "总手", "出来高", "거래량", "pxvolume",
        "volumeshares",
    ),
    "Adjusted": (
        "adjclose", "adjustedclose", "adjustmentclose", "closeadj", "adjcloseprice", "adjustedcloseprice",
        "复权收盘价", "后复权价",
    ),
    "Split": ("splitcoefficient", "stocksplits", "splitratio"),
}  # fmt: skip
MEANINGS = {spelling: name for name in reversed(SPELLINGS) for spelling in SPELLINGS[name]}
# What yfinance and its like put beside prices, one a ticker.
BESIDE = {"dividends", "stocksplits", "capitalgains", "adjclose"}
CLOCK = re.compile(r"\d{1,2}:\d{2}(:\d{2})?|\d{6}")  # a time of day in a cell of its own
EVENT_WORDS = re.compile(r"dividend|stock split|capital gain", re.IGNORECASE)


LONGEST_NAME = 200  # characters of a column's name


@dataclass(frozen=True)
class Layout:
    """A file's cells under our names.

    Attributes:
        columns: of ``FIELDS``, each once.
        rows: their cells. lines: the line of the file that each row stands on.
        notes: what was done, in a few words each.
    """

    columns: list[str]
    rows: list[list[str]]
    lines: list[int]
    notes: list[str] = field(default_factory=list)


def spelling(name: str) -> str:
    """As ``SPELLINGS`` has it: ``<CLOSE>``, ``Close*``, ``4. close`` and ``Close (USD)`` are ``close``.

    What is longer than any column's name is left alone: of a line of 100,000 brackets the pairs take hours to look for.
    """
    if len(name) > LONGEST_NAME:
        return name
    name = re.sub(r"\(.*?\)|（.*?）|\[.*?\]", "", name.strip().lower())
    return re.sub(r"[\s_\-<>*.:/\"'%$#]", "", re.sub(r"^\d+\.\s", "", name))


def find_layout(path: Path, text: str, faults: Faults) -> Layout | None:
    """The table of a file whose columns can be told; None where they cannot.

    Args:
        path: for messages.
        text: of the file.
        faults: takes the rows with another number of cells than their header.

    Raises:
        UserError: what is no CSV.
    """
    lines = text.splitlines()
    try:
        for separator in SEPARATORS:
            head = [row for _, row in _cells("\n".join(lines[:HEADER_WITHIN]), separator)]
            for reader in (_several_headers, _without_header, _one_header):
                found = reader(text, head, separator, faults)
                if found is not None:
                    return found
    except csv.Error as error:
        raise UserError(f"{path}: not a CSV ({error}); look for a quotation mark that is not closed") from None
    return None


def _cells(text: str, separator: str) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True)
    for row in reader:
        if any(cell.strip() for cell in row):
            yield reader.line_num, row


def _one_header(text: str, head: list[list[str]], separator: str, faults: Faults) -> Layout | None:
    place = next((place for place, row in enumerate(head) if _columns_of(row) is not None), None)
    if place is None:
        return None
    columns = _columns_of(head[place])
    assert columns is not None
    rows = list(_cells(text, separator))
    first = next((i for i, (_, row) in enumerate(rows) if row == head[place]), None)
    if first is None:  # a quotation mark before it that closes far below
        return None
    notes = [f"{first} lines before the header left out"] if first else []
    if separator != ",":
        notes.append(f"{SEPARATORS[separator]} between the cells")
    kept, at_lines, dropped = _table_rows(rows[first + 1 :], head[place], columns, faults)
    notes += [f"{count} {what} left out" for what, count in dropped.items()]
    columns |= _volume_of(head[place], columns, kept)
    names = list(columns)
    return Layout(names, [[row[columns[name]] for name in names] for row in kept], at_lines, notes)


def _columns_of(header: Sequence[str]) -> dict[str, int] | None:
    """Our name -> place, where a line names a date and the four prices; the better spelling wins."""
    spelt = [spelling(name) for name in header]
    columns: dict[str, int] = {}
    for name in FIELDS:
        for candidate in SPELLINGS[name]:
            if candidate in spelt and spelt.index(candidate) not in columns.values():
                if candidate in ("", "index", "unnamed0") and spelt.index(candidate) != 0:
                    continue
                columns[name] = spelt.index(candidate)
                break
    if "Close" not in columns and "Adjusted" in columns:
        columns["Close"] = columns.pop("Adjusted")
    # A name that stands there twice is a question, not an answer.
    clear = all(spelt.count(spelt[place]) == 1 for place in columns.values())
    return columns if {"Date", *QUOTES} <= set(columns) and clear else None


def _volume_of(header: Sequence[str], columns: Mapping[str, int], rows: Sequence[Sequence[str]]) -> dict[str, int]:
    """Where the volume stands, if anywhere: of the columns that may be it, the first with a trade in it.

    MetaTrader's real volume is zero all along where the broker knows only ticks; others call it after what is traded.
    """
    spelt = [spelling(name) for name in header]
    places = [spelt.index(name) for name in SPELLINGS["Volume"] if name in spelt]
    places += [place for place, name in enumerate(spelt) if re.fullmatch("volume.{0,4}", name)]
    places = [place for place in places if place not in {columns[name] for name in columns if name != "Volume"}]
    traded = (place for place in places if any(re.search("[1-9]", row[place]) for row in rows))
    return {"Volume": next(traded, places[0])} if places else {}


def _table_rows(
    rows: Sequence[tuple[int, list[str]]], header: list[str], columns: dict[str, int], faults: Faults
) -> tuple[list[list[str]], list[int], Counter[str]]:
    """The rows that are days: without repeated headers, events, empty days and what stands below the table."""
    kept, lines, dropped = [], [], Counter[str]()
    width = len(header)
    date_at, prices_at = columns["Date"], [columns[name] for name in QUOTES]
    last = max((i for i, (_, row) in enumerate(rows) if len(row) >= width and _has_digits(row[date_at])), default=-1)
    for place, (line, row) in enumerate(rows):
        if [cell.strip() for cell in row[:width]] == [cell.strip() for cell in header]:
            dropped["repeated headers"] += 1
        elif any(EVENT_WORDS.search(cell) for cell in row):
            dropped["rows of dividends and splits"] += 1
        elif place > last >= 0 and (len(row) < width or not _has_digits(row[date_at])):
            dropped["lines below the table"] += 1
        elif is_whole(line, row, width, faults):
            if all(is_missing(row[index]) for index in prices_at) and row[date_at].strip():
                dropped["rows without a price"] += 1
            else:
                kept.append(row)
                lines.append(line)
    return kept, lines, dropped


def _has_digits(cell: str) -> bool:
    return sum(map(str.isdigit, cell)) >= 3


def _several_headers(text: str, head: list[list[str]], separator: str, faults: Faults) -> Layout | None:
    """yfinance's table: a line of prices and one of tickers, in either order, and mostly a third for the index."""
    if len(head) < 3 or len(head[0]) < 5 or len(head[0]) != len(head[1]):
        return None
    first, second = ([cell.strip() for cell in row[1:]] for row in head[:2])
    known = {*MEANINGS, *BESIDE} - {""}
    if all(spelling(cell) in known for cell in first) and not all(spelling(cell) in known for cell in second):
        prices, tickers = first, second
    elif all(spelling(cell) in known for cell in second) and not all(spelling(cell) in known for cell in first):
        prices, tickers = second, first
    else:
        return None
    rows = list(_cells(text, separator))[2:]
    if rows and not any(cell.strip() for cell in rows[0][1][1:]):
        rows = rows[1:]  # "Date,,,,"
    columns: dict[str, dict[str, int]] = {}
    for place, (price, ticker) in enumerate(zip(prices, tickers, strict=True), start=1):
        name = "Adjusted" if spelling(price) == "adjclose" else MEANINGS.get(spelling(price))
        if name in (*PRICE_COLUMNS, "Adjusted", "Split"):
            columns.setdefault(ticker, {})[name] = place
    if not columns or any(not set(QUOTES) <= set(own) for own in columns.values()):
        return None
    names = ["Ticker", "Date", *[name for name in FIELDS[3:] if all(name in own for own in columns.values())]]
    kept, lines, dropped = [], [], 0
    rows = [(line, row) for line, row in rows if is_whole(line, row, len(head[0]), faults)]
    for ticker, own in columns.items():
        for line, row in rows:
            if all(is_missing(row[own[name]]) for name in QUOTES):
                dropped += 1
                continue
            kept.append([ticker, row[0], *[row[own[name]] for name in names[2:]]])
            lines.append(line)
    notes = ["yfinance's header of several lines"]
    return Layout(names, kept, lines, notes + ([f"{dropped} rows without a price left out"] if dropped else []))


def _without_header(text: str, head: list[list[str]], separator: str, faults: Faults) -> Layout | None:
    """Rows of day, sometimes time or ticker, then open, high, low, close and volume, told by the cells alone.

    So write Binance (klines), MetaTrader, Kibot, FirstRate, HistData, LEAN. The third price must be the lowest of each
    row and the second the highest, or the order is anyone's guess.
    """
    if len(head) < 2 or len(head[0]) < 5 or not is_day(head[0][0]):
        return None
    width = len(head[0])
    befores = [["Date"]]
    if CLOCK.fullmatch(head[0][1].strip()):
        befores.append(["Date", "Time"])
    elif re.search("[A-Za-z]", head[0][1]):
        befores.append(["Date", "Ticker"])
    for columns in befores:
        if all(len(row) == width and is_day(row[0]) and _is_bar(row[len(columns) :]) for row in head):
            break
    else:
        return None
    columns += PRICE_COLUMNS[: width - len(columns)]
    rows = [(line, cells) for line, cells in _cells(text, separator) if is_whole(line, cells, width, faults)]
    note = f"no header: {', '.join(columns).lower()} by their cells"
    return Layout(columns, [cells[: len(columns)] for _, cells in rows], [line for line, _ in rows], [note])


def _is_bar(cells: Sequence[str]) -> bool:
    """Whether open, high, low and close stand there, in this order."""
    try:
        opening, high, low, close = (float(cell) for cell in cells[:4])
    except ValueError:
        return False
    return 0.0 < low <= min(opening, close) <= max(opening, close) <= high


def plain_cells(path: Path, layout: Layout, date_format: str | None, zone: str | None) -> Layout:
    """Dates as 2024-01-31, numbers as 1234.56, and a volume where there is none; what cannot be read stays as it is.

    Args:
        path: for messages.
        layout: as found.
        date_format: how dates are written, where the user says so.
        zone: of the exchange, for stamps with a time zone.

    Raises:
        UserError: dates that can be read in two ways, or several bars a day.
    """
    place = {name: index for index, name in enumerate(layout.columns)}
    cells = {name: [row[index] for row in layout.rows] for name, index in place.items()}
    notes = list(layout.notes)
    cells["Date"], note = plain_date_cells(path, cells["Date"], layout.lines, date_format, zone)
    notes += note
    numbers = Numbers.of([cell for name in QUOTES for cell in cells[name][:500]])
    notes += numbers.notes
    for name in (*QUOTES, "Adjusted"):
        if name in cells:
            cells[name] = [numbers.plain(cell) for cell in cells[name]]
    if "Volume" in cells:
        cells["Volume"] = ["0" if cell.strip().lower() in MISSING else numbers.plain(cell, counts=True)
                           for cell in cells["Volume"]]  # fmt: skip
    else:
        notes.append("no volume: zeros")
        cells["Volume"] = ["0"] * len(layout.rows)
    halts = 0
    for row, (opening, high, low, close) in enumerate(zip(*[cells[name] for name in QUOTES], strict=True)):
        if not any(map(_amount, (opening, high, low))) and _amount(close) > 0.0:
            for name in QUOTES[:3]:
                cells[name][row] = close
            halts += 1
    if halts:
        notes.append(f"{halts} halted days without open, high and low: at their close")
    columns = [name for name in ("Ticker", "Date", *PRICE_COLUMNS, "Adjusted", "Split") if name in cells]
    rows = [list(row) for row in zip(*[cells[name] for name in columns], strict=True)]
    return Layout(columns, rows, layout.lines, notes)


def _amount(cell: str) -> float:
    """0 for nothing."""
    if is_missing(cell):
        return 0.0
    try:
        return float(cell)
    except ValueError:
        return float("inf")
