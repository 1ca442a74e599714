"""The second track's demo, as a user runs it, with a tiny model in the place of SmolLM2."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from source_tree import RunScript

from stocklora.demo.instruct_track import FAST_MOST, KINDS, MOST, ROWS, chosen_rows
from stocklora.instruct.news.dataset import InstructionSettings, build_dataset
from stocklora.instruct.rows.formats import SENTIMENTS


def test_the_assistants_demo_ends_with_scores_and_pictures(
    tiny_model: Path, call_script: RunScript, tmp_path: Path
) -> None:
    result = call_script(
        "quick_start.py", "--track", "instruct", "--fast", "--model_path", str(tiny_model), cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "demo" / "instruct"
    scores = json.loads((folder / "adapter" / "evaluation_results.json").read_text(encoding="utf-8"))
    assert scores["data"]["split"] == "test"
    assert {path.name for path in folder.glob("*.png")} >= {"plot_loss.png", "plot_scores.png"}
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    for words in ("[5/5]", "expected:", "tuned:", "took ", "majority class"):
        assert words in result.stdout
    assert scores["majority"]["sentiment_macro_f1"]["low"] is not None
    rows = [json.loads(line) for line in (folder / "instructions.jsonl").read_text(encoding="utf-8").splitlines()]
    for part, most in FAST_MOST.items():
        counts = Counter(row["kind"] for row in rows if row["split"] == part)
        assert dict(zip(KINDS, most, strict=True)) == counts


def test_the_label_is_learned_from_every_row_that_has_one() -> None:
    """Balanced enough that no label is half of what is learned, and enough of each to be scored."""
    made = build_dataset(InstructionSettings(**ROWS)).records
    rows = chosen_rows(made, MOST)
    for part in ("train", "test"):
        found = [r for r in rows if (r.meta["split"], r.meta["kind"]) == (part, "sentiment")]
        assert len(found) == sum((r.meta["split"], r.meta["kind"]) == (part, "sentiment") for r in made)
        labels = Counter(r.meta["label"] for r in found)
        assert set(labels) == set(SENTIMENTS)
        assert max(labels.values()) < 0.55 * len(found)
        assert min(labels.values()) >= 10
    days = {part: {r.meta["date"] for r in rows if r.meta["split"] == part} for part in MOST}
    assert max(days["train"]) < min(days["validation"]) <= max(days["validation"]) < min(days["test"])
