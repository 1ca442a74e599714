"""The tables and sentences that ``training/evaluate.py`` prints of its results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stocklora.cli.console import print_table, say
from stocklora.instruct.chat.sources import last_part
from stocklora.instruct.evaluation.majority import majority_verdicts
from stocklora.instruct.evaluation.measures import BASE_SYSTEM, MEASURES, TUNED_SYSTEM, number, shown

# measures of the table by kind of row, and what its cells call them
OF_KINDS = {
    "success_rate": "ended", "chrf": "chrF", "rouge_l": "ROUGE-L", "label_accuracy": "label", "json_valid": "JSON",
    "field_accuracy": "fields", "numbers_supported": "numbers", "generated_tokens": "tokens",
}  # fmt: skip


def print_results(content: Mapping[str, Any]) -> None:
    """The table of measures, what is settled by it in words, and a table by kind of row."""
    systems: Mapping[str, Any] = content["systems"]
    majority: Mapping[str, Any] = content.get("majority") or {}
    rows = []
    for measure in MEASURES:
        entries = [systems[name].get(measure.name) for name in systems]
        if not any(entries):
            continue
        counts = sorted({entry["rows"] for entry in entries if entry})
        cells = [shown(entry, measure) for entry in entries]
        if content["difference"]:
            cells.append(shown(content["difference"].get(measure.name), measure, signed=True))
        if majority:
            cells.append(shown(majority[measure.name], measure) if measure.name in majority else "")
        rows.append([measure.label, "-".join(map(str, counts)), *cells])
    names = {BASE_SYSTEM: f"base ({last_part(str(content['base_model']))})", TUNED_SYSTEM: "tuned"}
    header = ["", "rows", *[names[name] for name in systems]]
    title = f"Held-out rows: value and 95% interval ({content['intervals'].partition('; ')[2]})"
    header += ["difference"] if content["difference"] else []
    print_table(title, [*header, "majority class"] if majority else header, rows)
    if (share := content["expected"]["numbers_supported"]) is not None:
        say(f"(of the numbers in the expected answers, {100 * share:.0f}% stand in the question)")
    if majority:
        labels = ", ".join(f"{label} ({kind})" for kind, label in majority["labels"].items())
        say(f"(majority class: always the commonest label of these rows: {labels})")
    for line in [*verdicts(content), *majority_verdicts(content)]:
        say(line)
    if held := content.get("constrained"):
        shares = ("json_valid", "field_accuracy", "fields_exact")
        rows = [
            [name, *(f"{100 * held[name][share]:.1f}%" for share in shares), f"{held[name]['seconds_a_token']:.3f}"]
            for name in ("free", "constrained")
        ]
        title = f"The tuned model on the {held['rows']} rows whose answers have a schema"
        print_table(title, ["", "JSON alone", "fields right", "all fields", "s a token"], rows)
    measures = [measure for measure in MEASURES if measure.name in OF_KINDS]
    by_kind = []
    for kind, entry in content["by_kind"].items():
        cells = []
        for measure in measures:
            values = [entry[name][measure.name] for name in systems]
            missing = all(value is None for value in values)
            cells.append("" if missing else " / ".join("-" if v is None else number(v, measure) for v in values))
        if majority:
            commonest = entry.get("majority")
            cells.append(f"{commonest['label']} {100 * commonest['share']:.1f}%" if commonest else "")
        by_kind.append([kind, entry["rows"], *cells])
    if len(by_kind) > 1:
        title = f"By kind of row: {' / '.join(systems)}"
        header = ["kind", "rows", *[OF_KINDS[measure.name] for measure in measures]]
        print_table(title, [*header, "majority class"] if majority else header, by_kind)


def verdicts(content: Mapping[str, Any]) -> list[str]:
    """What the paired differences settle: a line for each measure of quality whose interval leaves 0 out."""
    lines = []
    for measure in MEASURES:
        entry = content["difference"].get(measure.name)
        if not measure.better or measure.unit != "%" or not entry or entry["low"] is None:
            continue
        if entry["low"] > 0 or entry["high"] < 0:
            word = "better" if entry["value"] * measure.better > 0 else "worse"
            lines.append(f"the tuned model is {word}: {measure.label}, {shown(entry, measure, signed=True)}")
    if content["difference"] and not lines:
        lines.append("no difference in quality between base and tuned is larger than chance")
    return lines
