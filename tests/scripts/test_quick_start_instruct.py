"""The second track's demo, as a user runs it, with a tiny model in the place of SmolLM2."""

from __future__ import annotations

import json
from pathlib import Path

from source_tree import RunScript


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
    for words in ("[5/5]", "expected:", "tuned:", "took "):
        assert words in result.stdout
