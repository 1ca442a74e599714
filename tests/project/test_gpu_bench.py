"""``bench/gpu.py --ladder`` as far as it goes without a card: the script, and that its levers change no gradient."""

from __future__ import annotations

import json
from pathlib import Path

from source_tree import RunScript

LEVERS = (
    "16-row-parts",
    "shared-inputs",
    "one-product",
    "not-asking",
    "one-length",
    "compiled-pieces",
    "compiled-blocks",
)


def test_levers_on_top_of_each_other_give_the_plain_gradients(call_script: RunScript, tmp_path: Path) -> None:
    path = tmp_path / "ladder.json"
    flags = ("--ladder", "--tiny", "--device", "cpu", "--output", path)
    done = call_script("bench/gpu.py", *flags, "--rows", *LEVERS, "attention-FA3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = {row["name"]: row for row in json.loads(path.read_text(encoding="utf-8"))["rows"]}
    assert "flash_attn_interface" in rows.pop("attention-FA3")["error"]  # the ladder goes on without it
    assert set(rows) == {"plain", *LEVERS}
    assert all(row["differs"] < 1e-5 and row["tokens_per_s"] > 0 and row["peak_mb"] > 0 for row in rows.values())
    assert [len(row["profile"]) for row in rows.values() if "profile" in row] == [20, 20]  # the first and the best
    assert done.stdout.count("% of peak") == len(rows)
