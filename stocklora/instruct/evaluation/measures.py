"""What is measured of a chat model's answers, each measure with its words and its unit. Nothing heavy is imported."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from stocklora.instruct.chat.text_stream import without_reasoning
from stocklora.instruct.rows.formats import SENTIMENTS, Record

if TYPE_CHECKING:
    from stocklora.instruct.chat.model import Answer
    from stocklora.instruct.evaluation.bootstrap import Resampler


BASE_SYSTEM, TUNED_SYSTEM = "base", "tuned"


@dataclass(frozen=True)
class Prediction:
    """One model's answer to one row, and its scores.

    Attributes:
        batch: the rows of one number were answered at once; None: alone.
    """

    answer: Answer
    scores: Scores
    batch: int | None = None


Values = Callable[["Resampler", Sequence[Prediction], Sequence[Record]], Any]


@dataclass(frozen=True)
class Measure:
    """One number about a model.

    Attributes:
        label: for tables. unit: ``%`` for shares, else what the number counts. better: 1 if more is better, -1 if
            less, 0 if neither.
        values: of predictions and records, (1 + resamples,) values. applies: whether a row counts.
    """

    name: str
    label: str
    unit: str
    better: int
    values: Values
    applies: Callable[[Prediction, Record], bool] = lambda prediction, record: True


def _mean(name: str) -> Values:
    """Mean of a field, such as ``scores.chrf``, over the rows that have it."""
    field = attrgetter(name)
    return lambda draws, predictions, _: draws.ratio([field(item) for item in predictions])


def _has(name: str) -> Callable[[Prediction, Record], bool]:
    return lambda prediction, _: getattr(prediction.scores, name) is not None


MEASURES = (
    Measure("success_rate", "answers that end by themselves", "%", 1, _mean("scores.success")),
    Measure("chrf", "likeness to the expected answer, chrF", "%", 1, _mean("scores.chrf")),
    Measure("rouge_l", "likeness, ROUGE-L over characters", "%", 1, _mean("scores.rouge_l")),
    Measure(
        "label_accuracy", "label right, all kinds of rows", "%", 1, _mean("scores.label_correct"), _has("label_correct")
    ),
    Measure(
        "sentiment_accuracy", "sentiment label right", "%", 1,
        lambda draws, predictions, records: draws.ratio(
            [
                item.scores.label_correct if is_sentiment(record) else None
                for item, record in zip(predictions, records, strict=True)
            ]
        ),
        lambda _, record: is_sentiment(record),
    ),
    Measure(
        "sentiment_macro_f1", "sentiment label, macro F1", "%", 1,
        lambda draws, predictions, records: draws.macro_f1(
            [item.scores.label for item in predictions],
            [wanted_label(record) if is_sentiment(record) else None for record in records],
        ),
        lambda _, record: is_sentiment(record),
    ),
    Measure("json_valid", "JSON object and nothing else", "%", 1, _mean("scores.json_valid"), _has("json_valid")),
    Measure("field_accuracy", "JSON fields right", "%", 1, _mean("scores.field_accuracy"), _has("field_accuracy")),
    Measure("fields_exact", "all JSON fields right", "%", 1, _mean("scores.fields_exact"), _has("fields_exact")),
    Measure(
        "numbers_supported", "numbers that stand in the question", "%", 1,
        lambda draws, predictions, _: draws.ratio(
            [item.scores.numbers_supported for item in predictions], [item.scores.numbers for item in predictions]
        ),
        lambda prediction, _: prediction.scores.numbers > 0,
    ),
    Measure("generation_time_s", "seconds an answer", "s", -1, _mean("answer.seconds")),
    Measure("generated_tokens", "tokens an answer", "tokens", 0, _mean("answer.new_tokens")),
    Measure(
        "answer_characters", "characters an answer", "characters", 0,
        lambda draws, predictions, _: draws.ratio(
            [len(without_reasoning(item.answer.text)) for item in predictions]
        ),
    ),
)  # fmt: skip


OF_LABELS = ("label_accuracy", "sentiment_accuracy", "sentiment_macro_f1")  # which a constant answer scores in too


def is_sentiment(record: Record) -> bool:
    """Whether the row asks for 利好, 利空 or 中性."""
    return wanted_label(record) in SENTIMENTS


def wanted_label(record: Record) -> str | None:
    label = record.meta.get("label")
    return label if isinstance(label, str) else None


def kind_of(record: Record) -> str:
    return str(record.meta.get("kind") or "other")


def shown(entry: Mapping[str, Any] | None, measure: Measure, signed: bool = False) -> str:
    """``62.5% [50.0, 75.0]``."""
    if not entry:
        return "-"
    text = number(entry["value"], measure, signed)
    if entry["low"] is None:
        return text
    low, high = (number(entry[side], measure, signed) for side in ("low", "high"))
    return f"{text} [{low.split(' ')[0].removesuffix('%')}, {high.split(' ')[0].removesuffix('%')}]"


def number(value: float, measure: Measure, signed: bool = False) -> str:
    """A value of ``measure`` with its unit."""
    sign = "+" if signed else ""
    if measure.unit == "%":
        return f"{100 * value:+.1f} pt" if signed else f"{100 * value:.1f}%"
    return f"{value:{sign}.2f}" if measure.unit == "s" else f"{value:{sign}.0f}"


@dataclass(frozen=True)
class Scores:
    """One answer against the expected one; None where a measure does not apply to the row.

    Attributes:
        success: it is not empty, and the model ended it by itself. chrf, rouge_l: likeness, 0 to 1.
        label: what it says, of the labels that there are; None if nothing clear. label_correct: 0 or 1.
        json_valid: the answer is one JSON object and nothing else, 0 or 1. field_accuracy: share of the expected fields
            that have the expected value, also where words stand around the object. fields_exact: all of them, 0 or 1.
        numbers, numbers_supported: different numbers in the answer, and those of them that stand in the question, where
            15 minutes are no source of 15%.
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
