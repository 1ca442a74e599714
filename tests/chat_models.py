"""Adapters and conversations for the tests of chat models."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stocklora.instruct.records import Message


def make_adapter(base: Path, folder: Path, seed: int = 0, info: dict[str, Any] | None = None, **lora: Any) -> Path:
    """A LoRA adapter with random weights as PEFT saves it, strong enough to change every answer.

    Args:
        info: what training would have written about itself.
    """
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    options = {"r": 4, "lora_alpha": 64, "target_modules": "all-linear", "init_lora_weights": False} | lora
    model = AutoModelForCausalLM.from_pretrained(base)
    peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **options)).save_pretrained(folder)
    torch.random.set_rng_state(state)
    if info is not None:
        (folder / "training_info.json").write_text(json.dumps(info, ensure_ascii=False), encoding="utf-8")
    return folder


def user(*texts: str) -> list[Message]:
    """A conversation in which the user and the assistant speak in turn."""
    return [Message(("user", "assistant")[index % 2], text) for index, text in enumerate(texts)]


def write_jsonl(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def read_jsonl(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
