"""How good one answer is: likeness to the expected one, sentiment label, JSON fields, numbers with a source."""

from __future__ import annotations

import functools
import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

from stocklora.instruct.measures import SENTIMENTS
from stocklora.instruct.records import Record
from stocklora.instruct.text_stream import without_reasoning

# What models say that were not taught our words; a base model is not to lose for its choice of words.
LABEL_WORDS = {
    "利好": ("利好", "正面", "积极", "看多", "偏多", "positive", "bullish"),
    "利空": ("利空", "负面", "消极", "看空", "偏空", "negative", "bearish"),
    "中性": ("中性", "中立", "neutral"),
}
HEAD = r"(?m)^[\W_]{0,4}[\u4e00-\u9fffa-z ]{1,10}[\W_]{0,3}:[\s\"'“”*【\[]*"
SAID = (
    r"(?:情绪|倾向|判断|结论|影响|标签|评级|sentiment|label)\s*(?:判断|倾向|方向)?\s*(?:为|是|is|属于|:)+"
    r"[\s\"'“”*【\[]*"
)
LIST_MARK = re.compile(r"^\s*[(（]?\d{1,2}[.、)）](?!\d)", re.MULTILINE)
# A dash between two digits joins a date or a range and is no sign.
NUMBER = re.compile(r"(?:(?<![\d.])[-+])?\d[\d,]*(?:\.\d+)?")
PLAIN_NUMBER = re.compile(r"([-+]?\d[\d,]*(?:\.\d+)?)(%?)")


@dataclass(frozen=True)
class Scores:
    """One answer against the expected one; None where a measure does not apply to the row.

    Attributes:
        success: it is not empty, and the model ended it by itself. chrf, rouge_l: likeness, 0 to 1.
        label: what it says, of the labels that there are; None if nothing clear. label_correct: 0 or 1.
        json_valid: the answer is one JSON object and nothing else, 0 or 1. field_accuracy: share of the expected fields
            that have the expected value, also where words stand around the object. fields_exact: all of them, 0 or 1.
        numbers, numbers_supported: different numbers in the answer, and those of them that stand in the question.
    """

    success: float
    chrf: float
    rouge_l: float
    label: str | None
    label_correct: float | None
    json_valid: float | None
    field_accuracy: float | None
    fields_exact: float | None
    numbers: int
    numbers_supported: int


def score(record: Record, text: str, finish: str, labels: Sequence[str] = SENTIMENTS) -> Scores:
    """Score the answer ``text``, which ended as ``finish`` says (see ``chat.Answer``).

    Args:
        labels: those that there are for rows of this kind.
    """
    text = without_reasoning(text)
    expected = record.answer.strip()
    wanted_label, wanted_fields = record.meta.get("label"), record.meta.get("fields")
    label = predicted_label(text, labels) if isinstance(wanted_label, str) else None
    shares: tuple[float, float, float] | None = None
    if isinstance(wanted_fields, Mapping) and wanted_fields:
        shares = json_scores(text, wanted_fields)
    asked = numbers_in("\n".join(message.content for message in record.prompt))
    said = numbers_in(text)
    return Scores(
        success=float(bool(text) and finish == "stop"),
        chrf=chrf(text, expected),
        rouge_l=rouge_l(text, expected),
        label=label,
        label_correct=float(label == wanted_label) if isinstance(wanted_label, str) else None,
        json_valid=shares[0] if shares else None,
        field_accuracy=shares[1] if shares else None,
        fields_exact=shares[2] if shares else None,
        numbers=len(said),
        numbers_supported=len(said & asked),
    )


# ------------------------------------------------------------------------------------------------------ likeness


def chrf(text: str, expected: str) -> float:
    """chrF2 of one sentence (Popović 2015): F2 of character n-grams up to 6, which needs no Chinese word breaks."""
    return float(_chrf().sentence_score(text, [expected]).score) / 100.0 if text else 0.0


@functools.cache
def _chrf() -> Any:
    from sacrebleu.metrics import CHRF

    return CHRF()


def rouge_l(text: str, expected: str) -> float:
    """ROUGE-L F1 (Lin 2004) over single characters."""
    hypothesis, reference = " ".join("".join(text.split())), " ".join("".join(expected.split()))
    if not hypothesis or not reference:
        return 0.0
    # The library adds 1e-8 to a denominator.
    return round(float(_rouge().get_scores(hypothesis, reference)[0]["rouge-l"]["f"]), 6)


@functools.cache
def _rouge() -> Any:
    from rouge_chinese import Rouge

    return Rouge(metrics=["rouge-l"])


# ------------------------------------------------------------------------------------------------------- labels


def predicted_label(text: str, labels: Sequence[str] = SENTIMENTS) -> str | None:
    """The label that an answer gives, one of ``labels``.

    What stands behind ``情绪：`` or the like at the head of a line decides, the first time; else behind ``判断为`` and
    its kin; else the only label that occurs at all. An answer that names several, and not which is meant, gives none.
    """
    words = {word: label for label in labels for word in LABEL_WORDS.get(label, (label,))}
    if not words:
        return None
    # The longest first, so that a label may begin as another does. One character alone is part of many words.
    any_word = "|".join(
        re.escape(word) if len(word) > 1 else f"{re.escape(word)}(?=(?:等|级|风险)?(?![\u4e00-\u9fff]))"
        for word in sorted(words, key=len, reverse=True)
    )
    text = unicodedata.normalize("NFKC", text).lower().strip()
    if said := re.search(HEAD + f"({any_word})", text) or re.search(SAID + f"({any_word})", text):
        several = re.match(rf"\s*(?:[、/,或|]|or)\s*({any_word})", text[said.end() :])
        return None if several else words[said[1]]
    if whole := re.fullmatch(f"({any_word})(?:等|级|风险)?[\\W]*", text):
        return words[whole[1]]
    long = "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True) if len(word) > 1)
    found = {words[word] for word in re.findall(long, text)} if long else set()
    return found.pop() if len(found) == 1 else None


# --------------------------------------------------------------------------------------------------------- JSON


def json_scores(text: str, expected: Mapping[str, Any]) -> tuple[float, float, float]:
    """(valid, share of the fields that are right, all of them right); see ``Scores``."""
    whole = parse_object(text)
    found = whole if whole is not None else first_object(text)
    right = [found is not None and name in found and same_value(found[name], value) for name, value in expected.items()]
    return float(whole is not None), sum(right) / len(right), float(all(right))


def parse_object(text: str) -> dict[str, Any] | None:
    """``text`` as a JSON object, if it is one and nothing else."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def first_object(text: str) -> dict[str, Any] | None:
    """The first JSON object somewhere in ``text``."""
    decoder = json.JSONDecoder()
    for match in re.finditer(r"\{", text):
        try:
            content, _ = decoder.raw_decode(text, match.start())
        except (ValueError, RecursionError):
            continue
        if isinstance(content, dict):
            return content
    return None


def same_value(given: Any, wanted: Any) -> bool:
    """Whether two JSON values say the same: 3.20 and "3.2" do, "3.2%" and 3.2 don't."""
    if isinstance(given, bool) or isinstance(wanted, bool):
        return given is wanted
    if isinstance(wanted, Mapping):
        return (
            isinstance(given, Mapping)
            and set(given) == set(wanted)
            and all(same_value(given[name], value) for name, value in wanted.items())
        )
    if isinstance(wanted, (list, tuple)):
        return (
            isinstance(given, (list, tuple))
            and len(given) == len(wanted)
            and all(same_value(one, other) for one, other in zip(given, wanted, strict=True))
        )
    if given is None or wanted is None:
        return given in (None, "") and wanted in (None, "")
    if isinstance(given, (Mapping, list, tuple)):
        return False
    one, other = _text_of(given), _text_of(wanted)
    first, second = PLAIN_NUMBER.fullmatch(one), PLAIN_NUMBER.fullmatch(other)
    if first and second:
        return (decimal_of(first[1]), first[2]) == (decimal_of(second[1]), second[2])
    return one == other


def _text_of(value: Any) -> str:
    return unicodedata.normalize("NFKC", str(value)).strip().casefold().replace("−", "-")


# ------------------------------------------------------------------------------------------------------ numbers


def numbers_in(text: str) -> set[Decimal]:
    """The different numbers in a text, without sign (a fall of 3% is -3%) and without marks of lists."""
    text = LIST_MARK.sub(" ", unicodedata.normalize("NFKC", text))
    return {abs(number) for found in NUMBER.findall(text) if (number := decimal_of(found)) is not None}


def decimal_of(text: str) -> Decimal | None:
    try:
        return Decimal(text.replace(",", "").rstrip("."))
    except InvalidOperation:
        return None
