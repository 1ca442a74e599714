"""How others write a date or a number in a cell, and what is meant."""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from zoneinfo import ZoneInfo

import numpy as np

from stocklora.cli.console import UserError
from stocklora.prices.csv_columns import MOST_DROPPED

MISSING = {"", "nan", "na", "n/a", "#n/a", "nat", "null", "none", "-", "--", "—", "."}
MONTHS = {
    name: number
    for number, names in enumerate(
        ("jan ene gen", "feb fév fev", "mar mär mrz", "apr avr abr", "may mai mag maj", "jun juin giu", "jul juil lug",
         "aug aoû ago", "sep set", "oct okt ott out", "nov", "dec dez dic déc"), start=1)
    for name in names.split()
}  # fmt: skip
CURRENCY = re.compile(r"HK\$|US\$|R\$|[$€£¥￥₹₩]|USD|EUR|GBP|CNY|HKD|JPY|INR|元|股|手|\s|\u00a0|'|’")
FACTORS = {"k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12, "万": 1e4, "亿": 1e8}
WEEKDAY_BEHIND = re.compile(r"[,，]\s*(周|星期)?[一二三四五六日]$")
WEEKDAY = re.compile(r"^[A-Za-z]{2,9}\.?,\s+(?=\S*\d|[A-Za-z])")
EPOCH_UNITS = {10: 1.0, 13: 1e-3, 16: 1e-6, 19: 1e-9}


def is_missing(cell: str) -> bool:
    return cell.strip().lower() in MISSING


# ------------------------------------------------------------------------------------------------------ numbers


@dataclass(frozen=True)
class Numbers:
    """How a file writes numbers.

    Attributes:
        comma: whether the decimals stand behind a comma, and points part thousands.
        notes: what is unusual, in words.
    """

    comma: bool = False
    notes: tuple[str, ...] = ()

    @staticmethod
    def of(cells: Sequence[str]) -> Numbers:
        """Decide by a file's prices.

        A comma with other than three digits behind it, or behind a point, parts decimals.
        """
        stripped = [CURRENCY.sub("", cell) for cell in cells]
        with_comma = [cell for cell in stripped if "," in cell]
        comma = any(
            re.fullmatch(r"-?\d*,(\d{1,2}|\d{4,})", cell) or re.search(r"\.\d{3},\d+$", cell) for cell in with_comma
        )
        if not comma and with_comma and not any("." in cell for cell in stripped):
            # 100,512 and nothing else: thousands would be whole numbers all the way.
            comma = any(re.fullmatch(r"-?0,\d{3}", cell) for cell in with_comma)
        notes = []
        if comma:
            notes.append("decimal commas")
        elif with_comma:
            notes.append("commas between thousands")
        if any(re.search(r"[$€£¥￥₹₩元]", cell) for cell in cells):
            notes.append("currency signs left out")
        return Numbers(comma, tuple(notes))

    def plain(self, cell: str, counts: bool = False) -> str:
        """``$1,234.50`` as ``1234.50``; with ``counts``, ``0.67M`` and ``3万`` too; unreadable cells as they are."""
        text = CURRENCY.sub("", cell)
        text = text.replace(".", "").replace(",", ".") if self.comma else text.replace(",", "")
        factor = 1.0
        if counts and text and text[-1].lower() in FACTORS:
            factor, text = FACTORS[text[-1].lower()], text[:-1]
        try:
            value = float(text)
        except ValueError:
            return cell
        return text if factor == 1.0 else repr(round(value * factor, 6))


# -------------------------------------------------------------------------------------------------------- dates


def plain_date_cells(
    path: Path, cells: Sequence[str], lines: Sequence[int], date_format: str | None, zone: str | None
) -> tuple[list[str], list[str]]:
    """Cells as 2024-01-31, and notes; cells that are no dates stay as they are.

    Args:
        path, lines: for messages.
        cells: of one column.
        date_format: as ``strptime`` has it; None to find out.
        zone: IANA name of the exchange's zone, for stamps that name another.

    Raises:
        UserError: dates that can be read in two ways, or a ``--date_format`` that does not fit.
    """
    stripped = [WEEKDAY.sub("", cell.strip()) if cell[:1].isalpha() else cell.strip() for cell in cells]
    stripped = [WEEKDAY_BEHIND.sub("", cell) for cell in stripped]
    if date_format is not None:
        return _by_format(path, stripped, lines, date_format), []
    if (stamps := _epochs(stripped)) is not None:
        return _days_of_stamps(stamps, zone), ["stamps counted from 1970"]
    if any(_two_readings(cell) for cell in stripped):
        return _slashes(path, stripped)
    parsed = [_parsed(cell) for cell in stripped]
    with_zone = [stamp for stamp in parsed if stamp is not None and stamp.tzinfo is not None]
    if with_zone and any(stamp.time() != dt.time(0) for stamp in with_zone):
        days = [cell if stamp is None else _day_in(stamp, zone) for cell, stamp in zip(cells, parsed, strict=True)]
        return days, [f"stamps in another time zone: the day in {zone}"] if zone else []
    return [cell if stamp is None else f"{stamp:%Y-%m-%d}" for cell, stamp in zip(cells, parsed, strict=True)], []


def _by_format(path: Path, cells: Sequence[str], lines: Sequence[int], date_format: str) -> list[str]:
    days, others = [], []
    for cell, line in zip(cells, lines, strict=True):
        try:
            days.append(f"{dt.datetime.strptime(cell, date_format):%Y-%m-%d}")
        except ValueError:
            days.append(cell)
            others.append((line, cell))
    if len(others) > MOST_DROPPED * len(cells):
        line, cell = others[0]
        raise UserError(
            f"{path}, row {line}: '{cell}' is not written as --date_format {date_format} says; mend the format"
        )
    return days


def _epochs(cells: Sequence[str]) -> list[dt.datetime] | None:
    found = []
    for cell in cells:
        match = re.fullmatch(r"(\d{10}|\d{13}|\d{16}|\d{19})(\.\d+)?", cell)
        if match is None:
            return None
        found.append(dt.datetime.fromtimestamp(float(match[1]) * EPOCH_UNITS[len(match[1])], dt.UTC))
    return found or None


def _days_of_stamps(stamps: Sequence[dt.datetime], zone: str | None) -> list[str]:
    midnight = all(stamp.time() == dt.time(0) for stamp in stamps)
    return [f"{stamp:%Y-%m-%d}" if midnight else _day_in(stamp, zone) for stamp in stamps]


def _day_in(stamp: dt.datetime, zone: str | None) -> str:
    return f"{stamp.astimezone(ZoneInfo(zone)) if zone and stamp.tzinfo else stamp:%Y-%m-%d}"


def _two_readings(cell: str) -> re.Match[str] | None:
    return re.match(r"(\d{1,2})([/-])(\d{1,2})\2(\d{4}|\d{2})(?!\d)", cell)


def _slashes(path: Path, cells: Sequence[str]) -> tuple[list[str], list[str]]:
    """01/02/2024: month first or day first, as the rows decide."""
    matches = [_two_readings(cell) for cell in cells]
    others = [None if match else _parsed(cell) for cell, match in zip(cells, matches, strict=True)]
    readings: dict[str, list[dt.date | None]] = {}
    for name, (month, day) in {"month first": (1, 3), "day first": (3, 1)}.items():
        days: list[dt.date | None] = []
        try:
            for match, stamp in zip(matches, others, strict=True):
                if match is None:
                    days.append(None if stamp is None else stamp.date())
                else:
                    days.append(dt.date(_year(match[4]), int(match[month]), int(match[day])))
        except ValueError:
            continue
        readings[name] = days
    if not readings:
        return list(cells), []
    if len(readings) == 2 and readings["month first"] != readings["day first"]:
        faults = {name: _implausible(days) for name, days in readings.items()}
        better = sorted(faults, key=lambda name: faults[name])
        if faults[better[0]] + 0.1 >= faults[better[1]]:
            cell = next(cell for cell, match in zip(cells, matches, strict=True) if match and match[1] != match[3])
            one, other = (days[cells.index(cell)] for days in readings.values())
            raise UserError(
                f"{path}: '{cell}' can be {one} or {other}, and the rows do not tell which; give --date_format "
                f"%m/%d/%Y or --date_format %d/%m/%Y"
            )
        readings = {better[0]: readings[better[0]]}
    ((name, days),) = list(readings.items())[:1]
    return [cell if day is None else day.isoformat() for cell, day in zip(cells, days, strict=True)], [f"dates {name}"]


def _year(digits: str) -> int:
    return int(digits) if len(digits) == 4 else int(digits) + (2000 if int(digits) < 70 else 1900)


def _implausible(days: Sequence[dt.date | None]) -> float:
    """A share: days on weekends, and steps that do not lead one way or are longer than a fortnight."""
    known = [day for day in days if day is not None]
    steps = np.diff([day.toordinal() for day in known])
    one_way = max(float(np.mean(steps >= 0)), float(np.mean(steps <= 0))) if len(steps) else 1.0
    far = float(np.mean(np.abs(steps) > 14)) if len(steps) else 0.0
    weekend = float(np.mean([day.weekday() >= 5 for day in known]))
    return (weekend if weekend < 0.2 else 1.0) + (1.0 - one_way) + far


def _from_months(match: re.Match[str], month: int, day: int, year: int) -> dt.datetime:
    return dt.datetime(_year(match[year]), MONTHS[match[month].lower()[:3]], int(match[day]))


FORMS: tuple[tuple[re.Pattern[str], Callable[[re.Match[str]], dt.datetime]], ...] = (
    (re.compile(r"(\d{4})(\d{2})(\d{2})(\.0| 00:?00(:?00)?)?"),
     lambda m: dt.datetime(int(m[1]), int(m[2]), int(m[3]))),
    (re.compile(r"(1\d{2})[/-](\d{1,2})[/-](\d{1,2})"),  # Taiwan's years begin with the republic
     lambda m: dt.datetime(int(m[1]) + 1911, int(m[2]), int(m[3]))),
    (re.compile(r"(\d{4})年(\d{1,2})月(\d{1,2})日?.*"), lambda m: dt.datetime(int(m[1]), int(m[2]), int(m[3]))),
    (re.compile(r"(\d{1,2})\.(\d{1,2})\.(\d{4}|\d{2})(?!\d).*"),
     lambda m: dt.datetime(_year(m[3]), int(m[2]), int(m[1]))),
    (re.compile(r"([^\W\d]{3,9})\.?[ -](\d{1,2})(?:st|nd|rd|th)?,?[ -](\d{4}|\d{2})(?!\d).*"),
     lambda m: _from_months(m, 1, 2, 3)),
    (re.compile(r"(\d{1,2})(?:st|nd|rd|th)?\.?[ -]?([^\W\d]{3,9})\.?,?[ -]?(\d{4}|\d{2})(?!\d).*"),
     lambda m: _from_months(m, 2, 1, 3)),
)  # fmt: skip


def is_day(cell: str) -> bool:
    """Whether a cell can be nothing but a day or a stamp of one."""
    text = cell.strip()
    return _parsed(text) is not None or _two_readings(text) is not None or _epochs([text]) is not None


def _parsed(cell: str) -> dt.datetime | None:
    match = re.fullmatch(r"(\d{4})[-/.](\d{1,2})[-/.](\d{1,2})(.*)", cell, re.DOTALL)
    try:
        if match:
            rest = match[4].strip().replace("T", " ").strip()
            rest = re.sub(r"\s*(Z|UTC)$", "+00:00", rest)
            rest = re.sub(r"\s+([+-]\d)", r"\1", rest)
            day = f"{int(match[1]):04d}-{int(match[2]):02d}-{int(match[3]):02d}"
            return dt.datetime.fromisoformat(f"{day} {rest}".strip())
        for form, made in FORMS:
            if found := form.fullmatch(cell):
                return made(found)
    except (ValueError, KeyError):
        return None
    return None
