"""Scores of a tuned chat model beside its base, on rows that neither was trained on."""

from __future__ import annotations

import gc
import json
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from stocklora.cli.console import UserError, say, warn
from stocklora.cli.settings import SCORES, check_installed
from stocklora.instruct.chat.settings import EvaluateSettings
from stocklora.instruct.chat.sources import (
    BASE,
    Sources,
    find_sources,
    is_adapter,
    trained_base,
)
from stocklora.instruct.evaluation.bootstrap import Estimate, Resampler
from stocklora.instruct.evaluation.held_out import HeldOut, held_out_rows
from stocklora.instruct.evaluation.majority import beside_majority, commonest_labels
from stocklora.instruct.evaluation.measures import (
    BASE_SYSTEM,
    MEASURES,
    TUNED_SYSTEM,
    Prediction,
    kind_of,
    wanted_label,
)
from stocklora.instruct.evaluation.scoring import score
from stocklora.instruct.evaluation.tables import print_results
from stocklora.instruct.rows.formats import SENTIMENTS, Record
from stocklora.runtime.files import as_json_types, check_writable, write_json, write_text
from stocklora.runtime.machine import machine_facts, versions_of

PARTIAL = "evaluation_answers.partial.jsonl"  # finished answers, until the results are written
RESULTS, PREDICTIONS = "evaluation_results.json", "evaluation_predictions.jsonl"
LIBRARIES = ("torch", "transformers", "peft", "sacrebleu", "rouge-chinese")
FORMAT = 1


# ---------------------------------------------------------------------------------------------------------- a run


def evaluate(settings: EvaluateSettings) -> Path:
    """Score the models that ``settings`` name, print the tables, write both files; the results' path.

    Raises:
        UserError: no model, no rows, or rows that do not fit the model.
    """
    check_installed(SCORES, "scoring")
    folder = settings.output_dir or settings.model_path
    if settings.output_dir or settings.model_path.is_dir():
        check_writable(folder, "--output_dir" if settings.output_dir else "--model_path")
    base = settings.base_model if settings.model_path.is_dir() and is_adapter(settings.model_path) else None
    sources = find_sources(base, [str(settings.model_path)], settings.any_base)
    held_out = held_out_rows(settings)
    say(f"scoring {len(held_out.records)} rows: {held_out.note}")
    if len(held_out.records) < held_out.available:
        say(f"(of {held_out.available}, each kind in its share)")
    answering = _Answering(settings, held_out.records, folder)
    answers, base_name = _predictions(settings, sources, answering)
    records, predictions = answering.kept(answers)
    held_out = replace(held_out, records=records)
    results = summarize(held_out.records, predictions, settings.resamples, settings.seed)
    content = {**_conditions(settings, base_name, held_out), **results}
    rows = [json.dumps(row, ensure_ascii=False, allow_nan=False) for row in answer_rows(held_out.records, predictions)]
    write_text(folder / PREDICTIONS, "".join(f"{row}\n" for row in rows))
    if answering.constrained:
        content["constrained"] = answering.constrained
    write_json(folder / RESULTS, content)
    (folder / PARTIAL).unlink(missing_ok=True)
    print_results(content)
    say(f"results: {folder / RESULTS}; answers: {folder / PREDICTIONS}")
    return folder / RESULTS


def _conditions(settings: EvaluateSettings, base_name: str | None, held_out: HeldOut) -> dict[str, Any]:
    """What was scored, on which rows, how and where."""
    return {
        "format": FORMAT,
        "model_path": str(settings.model_path),
        "base_model": base_name,
        "data": {
            "files": held_out.files,
            "split": held_out.split,
            "rows": len(held_out.records),
            "of": held_out.available,
        },
        "settings": {
            name: getattr(settings, name)
            for name in ("max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "seed", "batch_size",
                         "resamples", "quantization", "device", "dtype")
        },
        "intervals": "95% bootstrap, exact where all rows agree; rows of one event are drawn together",
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions_of(*LIBRARIES),
        "machine": machine_facts(),
    }  # fmt: skip


def _predictions(
    settings: EvaluateSettings, sources: Sources, answering: _Answering
) -> tuple[dict[str, list[Prediction | None]], str | None]:
    """Answers of the base, where there is one to compare with, and of the tuned model; and the base's name."""
    from stocklora.instruct.chat.load import load_sources

    predictions: dict[str, list[Prediction | None]] = {}
    if sources.adapters:
        model = load_sources(sources, settings)
        if not settings.tuned_only:
            predictions[BASE_SYSTEM] = answering.predict(model, BASE, "base")
        predictions[TUNED_SYSTEM] = answering.predict(model, model.adapters[0], "tuned")
        return predictions, sources.base_name
    base = settings.base_model or _base_of_whole(settings.model_path)
    if base is not None and not settings.tuned_only:
        model = load_sources(find_sources(base, []), settings)
        predictions[BASE_SYSTEM] = answering.predict(model, BASE, "base")
        del model
        gc.collect()
    elif not settings.tuned_only:
        warn(f"the base of {settings.model_path} is not here, so there is nothing to compare with; give --base_model")
    model = load_sources(sources, settings)
    predictions[TUNED_SYSTEM] = answering.predict(model, BASE, "tuned")
    return predictions, None if base is None else base.name


def _base_of_whole(folder: Path) -> Path | None:
    """The folder that a fully tuned model began as, if it is here."""
    path = trained_base(folder).get("path")
    return Path(str(path)) if path and (Path(str(path)) / "config.json").is_file() else None


class _Answering:
    """The rows of one evaluation and what was answered to them.

    Attributes:
        constrained: what the tuned model scores on rows with a schema, free and held to it; empty if not asked for.
    """

    def __init__(self, settings: EvaluateSettings, records: Sequence[Record], folder: Path) -> None:
        self.settings, self.records, self.folder = settings, list(records), folder
        self.constrained: dict[str, Any] = {}

    def predict(self, model: Any, adapter: str, name: str) -> list[Prediction | None]:
        """Scored answers, one for each record; None where the row does not fit the model."""
        from stocklora.instruct.evaluation.answers import answered, forms_of

        found = self._scored(answered(model, adapter, self.records, self.settings, self.folder / PARTIAL, name))
        if name == TUNED_SYSTEM and self.settings.constrained:
            forms = forms_of(self.records)
            chosen = [place for place, form in enumerate(forms) if form is not None and found[place] is not None]
            if not chosen:
                warn("--constrained: none of the rows has an answer of a kind with a schema")
                return found
            records, held = [self.records[place] for place in chosen], [forms[place] for place in chosen]
            partial = self.folder / PARTIAL
            again = answered(model, adapter, records, self.settings, partial, "tuned, held to a schema", held)
            self.constrained = side_by_side([found[place] for place in chosen], self._scored(again, records))
        return found

    def _scored(self, answers: Sequence[Any], records: Sequence[Record] | None = None) -> list[Prediction | None]:
        records = self.records if records is None else records
        labels = label_sets(self.records)
        return [
            None if one is None
            else Prediction(one[0], score(record, one[0].text, one[0].finish, labels[kind_of(record)]), one[1])
            for record, one in zip(records, answers, strict=True)
        ]  # fmt: skip

    def kept(
        self, predictions: Mapping[str, Sequence[Prediction | None]]
    ) -> tuple[list[Record], dict[str, list[Prediction]]]:
        """The records that every model could answer, and what each said to them.

        Raises:
            UserError: there is none.
        """
        rows = list(zip(*predictions.values(), strict=True))
        places = [place for place, row in enumerate(rows) if None not in row]
        if not places:
            raise UserError("no row fits the model's context: give --data FILE with shorter ones")
        kept = {
            name: [item for place in places if (item := items[place]) is not None]
            for name, items in predictions.items()
        }
        return [self.records[place] for place in places], kept


def side_by_side(free: Sequence[Prediction | None], held: Sequence[Prediction | None]) -> dict[str, Any]:
    """Free and constrained answers to the same rows: JSON, fields, and seconds a token."""
    pairs = [(one, other) for one, other in zip(free, held, strict=True) if one is not None and other is not None]
    result: dict[str, Any] = {"rows": len(pairs)}
    for name, items in (("free", [one for one, _ in pairs]), ("constrained", [other for _, other in pairs])):
        result[name] = {
            **{
                measure: sum(getattr(item.scores, measure) or 0.0 for item in items) / max(1, len(items))
                for measure in ("json_valid", "field_accuracy", "fields_exact")
            },
            "seconds_a_token": sum(item.answer.seconds for item in items)
            / max(1, sum(item.answer.new_tokens for item in items)),
        }
    return result


def label_sets(records: Sequence[Record]) -> dict[str, list[str]]:
    """The labels that there are for each kind of row."""
    sets: dict[str, set[str]] = {}
    for record in records:
        labels = sets.setdefault(kind_of(record), set())
        if (label := wanted_label(record)) is not None:
            labels |= set(SENTIMENTS) if label in SENTIMENTS else {label}
    return {kind: sorted(labels) for kind, labels in sets.items()}


# ------------------------------------------------------------------------------------------------------- summary


def summarize(
    records: Sequence[Record], predictions: Mapping[str, Sequence[Prediction]], resamples: int = 2000, seed: int = 42
) -> dict[str, Any]:
    """Every measure of every model with its interval, their paired difference, and the values for each kind of row.

    Args:
        predictions: of each model, one for each of ``records``. The last model's are summarized in ``summary``.
    """
    by_event = Resampler([_group(record, index) for index, record in enumerate(records)], resamples, seed)
    # Rows that were answered at once have one time between them.
    answered = next(iter(predictions.values()))
    by_batch = Resampler(
        [("row", index) if item.batch is None else item.batch for index, item in enumerate(answered)], resamples, seed
    )
    systems: dict[str, dict[str, Any]] = {name: {} for name in predictions}
    difference: dict[str, Any] = {}
    for measure in MEASURES:
        draws = by_batch if measure.name == "generation_time_s" else by_event
        is_share = measure.unit == "%"
        values, used = {}, {}
        for name, items in predictions.items():
            values[name] = measure.values(draws, items, records)
            used[name] = [measure.applies(item, record) for item, record in zip(items, records, strict=True)]
            estimate = draws.estimate(values[name], used[name], (0.0, 1.0) if is_share else None)
            systems[name][measure.name] = _plain(estimate)
        if BASE_SYSTEM in values and TUNED_SYSTEM in values:
            gap, fewer = values[TUNED_SYSTEM] - values[BASE_SYSTEM], min(used.values(), key=sum)
            difference[measure.name] = _plain(draws.estimate(gap, fewer, (-1.0, 1.0) if is_share else None))
    tuned = systems[list(predictions)[-1]]
    return {
        "summary": {
            "success_rate": tuned["success_rate"]["value"],
            "average_similarity": tuned["chrf"]["value"],
            "average_generation_time_s": tuned["generation_time_s"]["value"],
            "average_generation_length": tuned["generated_tokens"]["value"],
        },
        "systems": systems,
        "difference": difference,
        "majority": beside_majority(records, list(predictions.values())[-1], by_event),
        "by_kind": _by_kind(records, predictions),
        "expected": _of_expected(records, by_event),
    }


def _plain(estimate: Estimate | None) -> dict[str, Any] | None:
    return asdict(estimate) if estimate else None


def _by_kind(records: Sequence[Record], predictions: Mapping[str, Sequence[Prediction]]) -> dict[str, Any]:
    """The measures' plain values over the rows of each kind."""
    kinds: dict[str, list[int]] = {}
    for index, record in enumerate(records):
        kinds.setdefault(kind_of(record), []).append(index)
    result: dict[str, Any] = {}
    for kind, members in sorted(kinds.items()):
        draws = Resampler(members, 0, 0)
        chosen = [records[index] for index in members]
        result[kind] = {"rows": len(members), "majority": _commonest(chosen)}
        for name, items in predictions.items():
            mine = [items[index] for index in members]
            result[kind][name] = {
                measure.name: as_json_types(measure.values(draws, mine, chosen)[0]) for measure in MEASURES
            }
    return result


def _commonest(records: Sequence[Record]) -> dict[str, Any] | None:
    """The commonest label of rows of one kind, and its share; None where they have none."""
    wanted = [label for label in map(wanted_label, records) if label is not None]
    for label in commonest_labels(records).values():
        return {"label": label, "share": wanted.count(label) / len(wanted)}
    return None


def _of_expected(records: Sequence[Record], draws: Resampler) -> dict[str, Any]:
    """What the expected answers themselves would score where that is not 100%: numbers and length."""
    scores = [score(record, record.answer, "stop") for record in records]
    supported = draws.ratio([item.numbers_supported for item in scores], [item.numbers for item in scores])[0]
    return {
        "numbers_supported": as_json_types(supported),
        "answer_characters": sum(len(record.answer) for record in records) / len(records),
    }


def _group(record: Record, index: int) -> Hashable:
    event = record.meta.get("event_id")
    return ("row", index) if event in (None, "") else ("event", str(event))


def answer_rows(records: Sequence[Record], predictions: Mapping[str, Sequence[Prediction]]) -> list[dict[str, Any]]:
    """A row for each record: where it stands, what was asked and expected, what each model said and scored."""
    rows = []
    for index, record in enumerate(records):
        row: dict[str, Any] = {"file": str(record.file), "row": record.row}
        row |= {name: record.meta[name] for name in ("kind", "event_id", "label", "fields") if name in record.meta}
        row["prompt"] = [{"role": m.role, "content": m.content} for m in record.prompt]
        row["expected"] = record.answer
        for name, items in predictions.items():
            answer = items[index].answer
            row[name] = {
                "answer": answer.text,
                "finish": answer.finish,
                "new_tokens": answer.new_tokens,
                "seconds": round(answer.seconds, 4),
                "scores": asdict(items[index].scores),
            }
        rows.append(as_json_types(row))
    return rows
