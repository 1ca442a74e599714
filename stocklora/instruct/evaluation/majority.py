"""What a model has to beat where rows have labels: always giving the commonest one, without reading the question."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from stocklora.instruct.evaluation.bootstrap import Resampler
from stocklora.instruct.evaluation.measures import (
    MEASURES,
    OF_LABELS,
    Prediction,
    Scores,
    kind_of,
    shown,
    wanted_label,
)
from stocklora.instruct.rows.formats import Record

NOTHING_SAID = Scores(0.0, 0.0, 0.0, None, None, None, None, None, 0, 0)


def commonest_labels(records: Sequence[Record]) -> dict[str, str]:
    """The label that most rows of each kind have; of several the first by name. Kinds without labels are left out."""
    counts: dict[str, Counter[str]] = {}
    for record in records:
        if (label := wanted_label(record)) is not None:
            counts.setdefault(kind_of(record), Counter())[label] += 1
    return {kind: min(found, key=lambda label: (-found[label], label)) for kind, found in sorted(counts.items())}


def beside_majority(
    records: Sequence[Record], predictions: Sequence[Prediction], draws: Resampler
) -> dict[str, Any] | None:
    """What the commonest label scores, and by how much ``predictions`` are above it; None where no row has a label.

    Knowing the labels of the very rows that are scored, it is the best that any constant answer can be.

    Args:
        records: that were answered.
        predictions: of the model that is judged.
        draws: over the records; the same draws for both, so that the difference is paired.

    Returns:
        ``labels`` by kind, and by measure of ``OF_LABELS`` its estimate and the ``difference`` of the model from it.
    """
    labels = commonest_labels(records)
    if not labels:
        return None
    constant = [
        replace(item, scores=_always(record, labels)) for item, record in zip(predictions, records, strict=True)
    ]
    result: dict[str, Any] = {"labels": labels}
    for measure in (measure for measure in MEASURES if measure.name in OF_LABELS):
        values = measure.values(draws, constant, records)
        used = [measure.applies(item, record) for item, record in zip(constant, records, strict=True)]
        estimate = draws.estimate(values, used, (0.0, 1.0))
        gap = draws.estimate(measure.values(draws, predictions, records) - values, used, (-1.0, 1.0))
        if estimate and gap:
            result[measure.name] = {**asdict(estimate), "difference": asdict(gap)}
    return result


def _always(record: Record, labels: Mapping[str, str]) -> Scores:
    wanted = wanted_label(record)
    if wanted is None:
        return NOTHING_SAID
    label = labels[kind_of(record)]
    return replace(NOTHING_SAID, label=label, label_correct=float(label == wanted))


def majority_verdicts(content: Mapping[str, Any]) -> list[str]:
    """A line for each measure of labels: whether the judged model is above the commonest label by more than chance."""
    found = content.get("majority") or {}
    lines = []
    for measure in MEASURES:
        entry = found.get(measure.name)
        if entry is None or entry["difference"]["low"] is None:
            continue
        gap = entry["difference"]
        word = "above" if gap["low"] > 0 else "below" if gap["high"] < 0 else "not surely above"
        lines.append(
            f"the tuned model is {word} the majority class: {measure.label}, {shown(gap, measure, signed=True)}"
        )
    return lines
