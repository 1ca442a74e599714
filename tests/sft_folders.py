"""A folder laid out as the project's is, with tiny models under the names that the training commands use."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from conftest import REPO_ROOT


def instruction_rows(count: int) -> list[dict[str, Any]]:
    """Short alpaca rows of different lengths, none twice."""
    return [
        {
            "instruction": "判断情绪",
            "input": f"公司{n}{'增长' if n % 2 else '下降' * (n % 3 + 1)}",
            "output": ("利好" if n % 2 else "利空") + "。" * (n % 4),
        }
        for n in range(count)
    ]


def lay_out(folder: Path, model: Path, rows: int = 40) -> Path:
    """Configs, data and models in ``folder``, which is returned."""
    shutil.copytree(REPO_ROOT / "configs", folder / "configs")
    for name in ("Qwen2.5-0.5B-Instruct", "deepseek-llm-7b-chat"):
        shutil.copytree(model, folder / "models" / name)
    (folder / "data" / "qlora").mkdir(parents=True)
    content = instruction_rows(rows)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
    (folder / "data/chinese_instructions.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    (folder / "data/store_xhs_sft_samples.jsonl").write_text(lines, encoding="utf-8")
    (folder / "data/qlora/instructions.jsonl").write_text(lines, encoding="utf-8")
    return folder


def info_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "training_info.json").read_text(encoding="utf-8")))
