"""What questions about an event are made of: the subject, the text and the reaction that a reader is shown."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from stocklora.instruct.news import reactions as price
from stocklora.instruct.news.database import Event
from stocklora.instruct.news.reactions import Move, Thresholds
from stocklora.instruct.news.releases import Release, release_of
from stocklora.instruct.news.texts import fitted


@dataclass(frozen=True)
class Subject:
    """What a question is about: an event, its text, and one ticker's moves after it (none where not measured)."""

    event: Event
    text: str | None
    release: Release | None
    ticker: str
    moves: tuple[Move, ...]
    limits: Thresholds
    reference_minutes: int
    short: bool = False  # labels are answered without their reasons

    @property
    def reference(self) -> Move | None:
        """The move over the reference window."""
        return next((move for move in self.moves if move[0] == self.reference_minutes), None)

    @property
    def news(self) -> str | None:
        """The text of the news, or the release in a flash's words."""
        if self.text is not None and not self.event.name:
            return self.text
        return None if self.release is None else sentence(self.release)

    @property
    def band(self) -> str:
        """Size of the neutral band, as it is shown."""
        return price.percent(self.limits.neutral_bp, signed=False)


Row = dict[str, Any]
Maker = Callable[[Subject, random.Random], Row | None]


def subjects_of(
    event: Event, limits: Thresholds, reference_minutes: int, most_characters: int, short: bool = False
) -> list[Subject]:
    """One subject for each ticker that was measured, or a single one without moves."""
    release = release_of(event)
    text = fitted(event.content, most_characters) if event.content else None
    pairs = list(event.moves.items()) or [("", ())]
    return [Subject(event, text, release, ticker, moves, limits, reference_minutes, short) for ticker, moves in pairs]


def row_of_fields(instruction: str, extra: str, output: str, moves: tuple[Move, ...] = (), **scored: Any) -> Row:
    return {
        "instruction": instruction, "input": extra, "output": output,
        "windows": [minutes for minutes, _ in moves], **scored,
    }  # fmt: skip


def about_reaction(
    subject: Subject, rng: random.Random, moves: tuple[Move, ...], instruction: str, output: str, **scored: Any
) -> Row:
    """A question about a reaction: its ``input`` is the news and ``moves``."""
    label = rng.choice(("快讯", "消息", "新闻"))
    reaction = rng.choice(("公布后表现", "市场反应", "行情反应"))
    extra = f"{label}：{subject.news}\n{reaction}：{price.named(subject.ticker)}，{price.listed(moves)}"
    return row_of_fields(instruction, extra, output, moves, **scored)


def for_label(
    subject: Subject,
    rng: random.Random,
    moves: tuple[Move, ...],
    instruction: str,
    name: str,
    label: str,
    reason: str,
    *,
    reason_name: str = "说明",
    asks_for_reason: str = "，再说明",
    short_instruction: str | None = None,
    short_evidence: str = "",
) -> Row:
    """A question for the label of a reaction: it stands in the answer's first line, and below it the reason.

    Where reasons are left out, ``short_instruction`` is asked in the place of ``instruction``, and ``short_evidence``
    stands before the label: a small model judges a number better that it has just written.
    """
    if subject.short:
        instruction = short_instruction or f"{instruction}只写“{name}：”和标签，不写{reason_name}。"
        output = f"{short_evidence}{name}：{label}"
    else:
        instruction += f"首行写“{name}：”{asks_for_reason}。"
        output = f"{name}：{label}\n{reason_name}：{reason}"
    return about_reaction(subject, rng, moves, instruction, output, label=label)


def sentence(release: Release) -> str:
    """A release in a flash's words."""
    parts = [f"{release.name}公布值{release.shown(release.actual)}"]
    if release.consensus is not None:
        parts.append(f"预期{release.shown(release.consensus)}")
    if release.previous is not None:
        parts.append(f"前值{release.shown(release.previous)}")
    return "，".join(parts) + "。"
