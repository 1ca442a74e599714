"""From a news database to instruction rows: chosen by shares, without duplicates, split by date, each with its origin.

The labels follow from the measured returns and the named thresholds; see ``reactions.Thresholds``.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from stocklora.cli.console import UserError
from stocklora.cli.settings import check_range, default_of, setting
from stocklora.instruct.news import makers
from stocklora.instruct.news.database import RETURN_UNITS, Event, read_events
from stocklora.instruct.news.questions import Maker, Row, Subject, subjects_of
from stocklora.instruct.news.reactions import Thresholds
from stocklora.instruct.news.texts import first_of_each
from stocklora.instruct.rows.formats import Record, parse_row
from stocklora.instruct.rows.records import PARTS, cut_days, prompt_key, split_records

NEWS, MARKET, EARNINGS = SHARES = ("news", "market", "earnings")
# share -> kinds, in the order in which they take turns
MAKERS: dict[str, dict[str, Maker]] = {
    NEWS: {
        "sentiment": makers.make_sentiment,
        "extraction": makers.make_extraction,
        "windows": makers.make_windows,
        "window_sentiment": makers.make_window_sentiment,
    },
    MARKET: {
        "priced_in": makers.make_priced_in,
        "watch": makers.make_watch,
        "risk": makers.make_risk,
    },
    EARNINGS: {
        "indicator": makers.make_indicator,
        "release_extraction": makers.make_release_extraction,
        "change": makers.make_change,
    },
}
KIND_WORDS = {
    "sentiment": "情绪与理由", "extraction": "行情抽取（JSON）", "windows": "多窗口比较",
    "window_sentiment": "各窗口情绪（JSON）", "priced_in": "是否预期兑现",
    "watch": "观望信号", "risk": "短线风险等级", "indicator": "数据解读", "release_extraction": "数据抽取（JSON）",
    "change": "较前值变化",
}  # fmt: skip


@dataclass(frozen=True)
class InstructionSettings:
    """Settings of ``scripts/qlora/build_instruction_dataset.py``."""

    db: Path | None = setting(
        None, "SQLite file with events and event_impacts (default: the bundled one, whose news are invented)",
        section="data", metavar="FILE",
    )  # fmt: skip
    output: Path = setting(
        Path("data/qlora/instructions.jsonl"), "rows to write, .jsonl or .json", section="data", metavar="FILE"
    )
    num_samples: int = setting(300, "rows to make", section="data", metavar="N")
    shares: list[float] = setting(
        [0.6, 0.2, 0.2], "shares of news, market analysis, earnings and indicators", section="data", nargs="+",
        metavar="SHARE",
    )  # fmt: skip
    split: list[float] = setting(
        [0.7, 0.1, 0.2], "shares of train, validation, test; cut by date, the latest being the test", section="data",
        nargs="+", metavar="SHARE",
    )  # fmt: skip
    seed: int = setting(42, "of the choice of events and of the wording", section="data")
    strict: bool = setting(False, "stop where a share has too little data, instead of filling up", section="data")
    show: int = setting(0, "print this many of the rows", section="data", metavar="N")

    return_unit: str = setting(
        "auto", "unit of the returns in event_impacts; auto: fractions, and a stop where they cannot be",
        choices=("auto", *RETURN_UNITS), section="data",
    )  # fmt: skip
    reference_minutes: int = setting(
        15, "window whose return decides the sentiment, in minutes", section="labels", metavar="MINUTES"
    )
    neutral_band_bp: int = setting(
        5, "returns up to this size are neutral, in basis points (5 is 0.05%)", section="labels", metavar="BP"
    )
    medium_risk_bp: int = setting(10, "largest move from which the risk is medium", section="labels", metavar="BP")
    high_risk_bp: int = setting(30, "largest move from which the risk is high", section="labels", metavar="BP")
    max_characters: int = setting(
        160, "longer news are shown by their headline, or left out", section="texts", metavar="N"
    )
    short_answers: bool = setting(
        False,
        "labels of news and markets without their reasons, sentiment asked for in few words: for small models",
        section="texts",
    )
    near_duplicate: float = setting(
        0.8, "news this alike (Jaccard similarity of 3 characters) are one", section="texts", metavar="SHARE"
    )

    def check(self) -> None:
        """Raise a UserError that names the first setting that makes no sense, and what it may be."""
        check_range(self, num_samples=(1, None), reference_minutes=(1, None), max_characters=(20, None), show=(0, None))
        if not 0 <= self.neutral_band_bp < self.medium_risk_bp < self.high_risk_bp:
            raise UserError(
                f"--neutral_band_bp, --medium_risk_bp and --high_risk_bp must grow from 0 on; got "
                f"{self.neutral_band_bp}, {self.medium_risk_bp}, {self.high_risk_bp}"
            )
        if len(self.shares) != 3 or min(self.shares) < 0 or abs(sum(self.shares) - 1) > 1e-6:
            raise UserError(f"--shares must be three shares that sum to 1 ({', '.join(SHARES)}); got {self.shares}")
        if not 0 < self.near_duplicate <= 1:
            raise UserError(f"--near_duplicate must be above 0 and at most 1, got {self.near_duplicate}")
        if self.output.suffix.lower() not in (".jsonl", ".json"):
            raise UserError(f"--output must end in .jsonl or .json, got {self.output}")
        split_records([], self.split)  # refuses what are no shares


@dataclass(frozen=True)
class Built:
    """The rows, what was left out of the database and why, and what a user should know."""

    records: list[Record]
    left_out: Counter[str]
    notes: list[str] = field(default_factory=list)

    def table(self) -> list[tuple[str, ...]]:
        """Rows of (kind, what it asks, share, rows, train, validation, test), and their sum."""
        counts = Counter((r.meta["share"], r.meta["kind"], r.meta["split"]) for r in self.records)
        rows = []
        for share in SHARES:
            for kind in MAKERS[share]:
                parts = [counts[share, kind, part] for part in PARTS]
                if sum(parts):
                    rows.append((kind, KIND_WORDS[kind], share, *(f"{n:,}" for n in (sum(parts), *parts))))
        whole = [sum(n for key, n in counts.items() if key[2] == part) for part in PARTS]
        return [*rows, ("all", "", "", *(f"{n:,}" for n in (sum(whole), *whole)))]


def build_dataset(settings: InstructionSettings) -> Built:
    """Instruction rows from ``settings.db``, in order of date; the same for the same settings and database.

    Raises:
        UserError: the database is missing or not fit, nothing can be asked of it, or ``strict`` and too little data.
    """
    settings.check()
    events, left_out = read_events(settings.db, settings.return_unit)
    without = _without_reference(events, settings)
    limits = Thresholds(settings.neutral_band_bp, settings.medium_risk_bp, settings.high_risk_bp)
    asked = [
        subjects_of(event, limits, settings.reference_minutes, settings.max_characters, settings.short_answers)
        for event in events
    ]
    subjects = [subject for of_event in _without_repeats(asked, settings, left_out) for subject in of_event]
    records, notes = _chosen(subjects, settings)
    if not records:
        raise UserError(
            f"{settings.db or 'the bundled database'}: no event carries a question; it needs returns over "
            f"{settings.reference_minutes} minutes in event_impacts, or calendar items with previous and actual"
        )
    records.sort(key=lambda record: (record.meta["date"], record.meta["event_id"], record.meta["kind"]))
    return Built(records, left_out, [*without, *notes])


def _without_reference(events: Sequence[Event], settings: InstructionSettings) -> list[str]:
    """A note where no return was measured over ``reference_minutes``, and so no sentiment can be asked for.

    Raises:
        UserError: so it is, and those minutes were asked for.
    """
    windows = sorted({window for event in events for moves in event.moves.values() for window, _ in moves})
    if not windows or settings.reference_minutes in windows:
        return []
    minutes, there = settings.reference_minutes, ", ".join(map(str, windows))
    if minutes != default_of(InstructionSettings.__dataclass_fields__["reference_minutes"]):
        raise UserError(
            f"--reference_minutes {minutes}: event_impacts has no return over that window; there are {there}"
        )
    lacks = f"event_impacts has no return over {minutes} minutes; it has {there} (--reference_minutes)"
    return [f"no sentiment and no extraction: {lacks}"]


def _without_repeats(
    asked: Sequence[list[Subject]], settings: InstructionSettings, left_out: Counter[str]
) -> list[list[Subject]]:
    """The subjects of events of which no other says the same; of equals one with returns is kept, else the earliest.

    What carries no question is counted, and stays: the days are cut by all that was measured on them.
    """
    best_first = sorted(asked, key=lambda subjects: (not subjects[0].moves, _in_time(subjects)))
    by_release: dict[Any, list[Subject]] = {}
    texts: list[tuple[list[Subject], str]] = []
    silent: list[list[Subject]] = []
    for subjects in best_first:
        event, release, text = subjects[0].event, subjects[0].release, subjects[0].text
        if release is not None:
            key = (release.name, release.actual)  # the same release, once with and once without units
            if by_release.setdefault(key, subjects) is not subjects:
                left_out["repeats an earlier release"] += 1
        elif text is not None and event.moves and not event.name:
            texts.append((subjects, text))
        else:
            silent.append(subjects)
            if event.name:
                left_out["calendar item without an actual value, or nothing to compare it with"] += 1
            elif text is None:
                left_out[f"digest, or longer than {settings.max_characters} characters without a headline"] += 1
            else:
                left_out["news without a return in event_impacts"] += 1
    first = first_of_each([text for _, text in texts], settings.near_duplicate)
    kept = [subjects for index, (subjects, _) in enumerate(texts) if first[index] == index]
    if len(kept) < len(texts):
        left_out["repeats earlier news in the same or nearly the same words"] += len(texts) - len(kept)
    return sorted([*kept, *silent, *by_release.values()], key=_in_time)


def _in_time(subjects: Sequence[Subject]) -> tuple[date, str]:
    return subjects[0].event.day, subjects[0].event.event_id


def _questions(
    share: str, subjects: Sequence[Subject], seed: int, used: set[str]
) -> Iterator[tuple[str, Subject, Row]]:
    """The questions of one share: kinds in turn, labels in turn; those on events in ``used`` by then come last."""
    queues = {kind: deque(_of_kind(kind, maker, subjects, seed)) for kind, maker in MAKERS[share].items()}
    later: dict[str, deque[tuple[Subject, Row]]] = {kind: deque() for kind in queues}
    while any(queues.values()) or any(later.values()):
        for kind, queue in queues.items():
            while queue and queue[0][0].event.event_id in used:
                later[kind].append(queue.popleft())
            source = queue or later[kind]
            if source:
                yield (kind, *source.popleft())


def _of_kind(kind: str, maker: Maker, subjects: Sequence[Subject], seed: int) -> Iterator[tuple[Subject, Row]]:
    by_label: dict[str, list[tuple[Subject, Row]]] = {}
    asked: set[str] = set()  # events with a question that shows no return: one, however many tickers moved
    for subject in subjects:
        # A generator for each row: what one says does not depend on which others there are.
        row = maker(subject, random.Random(f"{seed}|{kind}|{subject.event.event_id}|{subject.ticker}"))
        if row is not None and (row["windows"] or subject.event.event_id not in asked):
            if not row["windows"]:
                asked.add(subject.event.event_id)
            label = str(row.get("label") or (row.get("fields") or {}).get("情绪", ""))
            by_label.setdefault(label, []).append((subject, row))
    for label, items in by_label.items():
        random.Random(f"{seed}|{kind}|{label}").shuffle(items)
    turns = itertools.zip_longest(*(by_label[label] for label in sorted(by_label)))
    return (item for turn in turns for item in turn if item is not None)


def _parts_by_day(subjects: Sequence[Subject], fractions: Sequence[float]) -> dict[str, list[Subject]]:
    """Subjects by part. The days are cut by what was measured on them, so that each part has some of every kind."""
    measured = Counter(s.event.day for s in subjects if s.reference is not None)
    everything = Counter(subject.event.day for subject in subjects)
    part_of_day = cut_days(measured, fractions) or cut_days(everything, fractions)
    if part_of_day is None:
        raise UserError(f"the database holds {len(everything)} day(s), too few for --split {list(fractions)}")
    begins = sorted(
        (min(day for day in part_of_day if part_of_day[day] == part), part) for part in set(part_of_day.values())
    )
    parts: dict[str, list[Subject]] = {part: [] for part in PARTS}
    for subject in subjects:
        begun = [part for first, part in begins if first <= subject.event.day]
        parts[begun[-1] if begun else begins[0][1]].append(subject)
    return parts


class _Choice:
    """Rows drawn by part and share, none of them asked twice."""

    def __init__(self, subjects: Sequence[Subject], settings: InstructionSettings) -> None:
        self.seed = settings.seed
        self.records: list[Record] = []
        self.counts: Counter[str] = Counter()  # by share
        self._asked: set[str] = set()
        self._used: set[str] = set()  # events
        self._sources = {
            (part, share): _questions(share, of_part, self.seed, self._used)
            for part, of_part in _parts_by_day(subjects, settings.split).items()
            for share in SHARES
        }

    def draw(self, part: str, share: str, wanted: int) -> int:
        """Take ``wanted`` rows, or as many as there are; their number."""
        before = len(self.records)
        while len(self.records) < before + wanted and (found := next(self._sources[part, share], None)) is not None:
            record = _record(share, part, self.seed, *found)
            key = prompt_key(record)
            if key not in self._asked:
                self._asked.add(key)
                self._used.add(found[1].event.event_id)
                self.records.append(record)
        drawn = len(self.records) - before
        self.counts[share] += drawn
        return drawn


def _chosen(subjects: Sequence[Subject], settings: InstructionSettings) -> tuple[list[Record], list[str]]:
    """Rows by part and share, and notes on what a share lacks and the others filled up."""
    choice = _Choice(subjects, settings)
    wanted = dict(zip(SHARES, _whole(settings.num_samples, settings.shares), strict=True))
    missing: Counter[str] = Counter()
    for share in (MARKET, EARNINGS, NEWS):  # the scarcest first: the plentiful turn to the events that these left over
        for part, quota in zip(PARTS, _whole(wanted[share], settings.split), strict=True):
            missing[part] += quota - choice.draw(part, share, quota)
    before = choice.counts.copy()
    notes = [
        f"{share}: {before[share]:,} rows where {wanted[share]:,} were asked for"
        for share in SHARES
        if before[share] < wanted[share]
    ]
    if notes and settings.strict:
        raise UserError(
            f"too little data for the shares and the split ({'; '.join(notes)}); lower --num_samples, change --shares, "
            f"or drop --strict to fill up"
        )
    left = _fill_up(choice, missing, [share for share in SHARES if wanted[share]], settings.split)
    more = choice.counts - before
    notes += [f"filled up with {more[share]:,} more of {share}" for share in SHARES if more[share]]
    if left:
        rows = f"{len(choice.records):,} rows in all, not {settings.num_samples:,}"
        notes.append(f"{rows}: the database holds no more questions")
    return choice.records, notes


def _fill_up(choice: _Choice, missing: Counter[str], shares: Sequence[str], split: Sequence[float]) -> int:
    """Draw what the parts are missing, first within each, then wherever there is something; how many still are."""
    for part, share in itertools.product(PARTS, shares):
        missing[part] -= choice.draw(part, share, missing[part])
    left = missing.total()
    parts = [part for part, fraction in zip(PARTS, split, strict=True) if fraction]
    for part, share in itertools.product(parts, shares):
        left -= choice.draw(part, share, left)
    return left


def _whole(rows: int, shares: Sequence[float]) -> list[int]:
    """Whole numbers that sum to ``rows``, by largest remainder."""
    exact = [rows * share for share in shares]
    counts = [int(value + 1e-9) for value in exact]
    by_rest = sorted(range(len(shares)), key=lambda place: counts[place] - exact[place])
    for place in by_rest[: rows - sum(counts)]:
        counts[place] += 1
    return counts


def _record(share: str, part: str, seed: int, kind: str, subject: Subject, row: Row) -> Record:
    windows = row.pop("windows", [])
    event = subject.event
    moves = dict(subject.moves)
    scored = {key: row.pop(key) for key in list(row) if key not in ("instruction", "input", "output")}
    meta = {
        "kind": kind, "share": share, "event_id": event.event_id, "source": event.source,
        "ticker": subject.ticker if windows else None, "windows": windows,
        "returns_bp": [moves[minutes] for minutes in windows],
        "date": event.day.isoformat(), "split": part, "seed": seed, **scored,
    }  # fmt: skip
    record, faults = parse_row({**row, **meta})
    if record is None:
        raise RuntimeError(f"{event.event_id}: {faults[0]}")
    return record
