"""docs/scaling.md says what the program's own arithmetic says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from stocklora.base_models.memory import Memory
from stocklora.finetune.memory import ModelShape, Setup, cost_of, shape_of
from stocklora.finetune.settings import TrainLoraSettings

LLAMA = {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 32}
# What the published config.json of each model says of its sizes.
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "SmolLM2-135M": ("LlamaConfig", {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3,
    }),
    "Qwen3-0.6B": ("Qwen3Config", {
        "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
    }),
    "Llama-2-7B": ("LlamaConfig", {
        **LLAMA, "vocab_size": 32000, "intermediate_size": 11008, "num_hidden_layers": 32
    }),
    "Llama-3.1-8B": ("LlamaConfig", {
        **LLAMA, "vocab_size": 128256, "intermediate_size": 14336, "num_hidden_layers": 32, "num_key_value_heads": 8
    }),
    "Qwen2.5-7B": ("Qwen2Config", {
        "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4,
    }),
    "DeepSeek-LLM-7B": ("LlamaConfig", {
        **LLAMA, "vocab_size": 102400, "intermediate_size": 11008, "num_hidden_layers": 30
    }),
}  # fmt: skip
LONGEST = 1400


@pytest.fixture(scope="module")
def page(repo_root: Path) -> str:
    return (repo_root / "docs" / "scaling.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelShape]:
    import transformers

    found = {}
    for name, (kind, sizes) in CONFIGS.items():
        folder = tmp_path_factory.mktemp("config")
        getattr(transformers, kind)(**sizes).save_pretrained(folder)
        found[name] = shape_of(TrainLoraSettings(model_path=folder))
    return found


def cost(
    shape: ModelShape, flags: str = "", batch: int = 1, width: int = 2, longest: int = LONGEST, on_cpu: bool = False
) -> Memory:
    method = re.search(r"--method (\w+)", flags)
    quantization = re.search(r"--quantization (\w+)", flags)
    return cost_of(shape, Setup(
        method=method[1] if method else "lora", quantization=quantization[1] if quantization else "none",
        checkpointing="--gradient_checkpointing" in flags, rank=8, dora=False, width=width, tokens=batch * longest,
        longest=longest, on_cpu=on_cpu, head=(shape.hidden + 1) * 3 * 9,
    ))  # fmt: skip


def rows_of(page: str, title: str) -> list[list[str]]:
    """The cells of the table whose first heading is ``title``."""
    table = page[page.index(f"| {title} |") :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in table]


def mb(value: float) -> str:
    return f"{value:,.0f}"


def test_one_device(page: str, shapes: dict[str, ModelShape]) -> None:
    shape = shapes["Qwen3-0.6B"]
    rows = rows_of(page, "Qwen3-0.6B")
    assert len(rows) == 6
    for flags, *cells in rows:
        expected = [cost(shape, flags, batch, width) for batch, width in ((4, 2), (1, 2), (1, 4))]
        assert cells == [mb(one.total_mb) for one in expected], flags
    two, four = (mb(cost(shapes["SmolLM2-135M"], batch=batch, on_cpu=True).total_mb) for batch in (2, 4))
    assert f"takes {two} MB in bfloat16 on a CPU" in page
    assert f"`--batch_size 4` in one pass (`--max_tokens_per_batch 6000`) {four} MB" in page


def test_seven_billion_on_a_t4(page: str, shapes: dict[str, ModelShape]) -> None:
    rows = rows_of(page, "base")
    assert len(rows) == 4
    flags = "--quantization 4bit --gradient_checkpointing"
    for names, *cells in rows:
        shape = shapes[names.split(",")[0]]
        t4, newer = cost(shape, flags, 1, 4), cost(shape, flags)
        assert cells == [
            mb(shape.parameters / 1e6), f"{t4.trainable / 1e6:.1f}", mb(t4.weights_mb), mb(t4.state_mb),
            mb(t4.activations_mb), mb(t4.total_mb), mb(newer.total_mb),
        ], names  # fmt: skip
        assert cost(shape, flags, 2, 4).total_mb < 0.95 * 15_000
    plain = [cost(shapes[row[0].split(",")[0]], "--gradient_checkpointing", 4).total_mb for row in rows]
    assert f"{mb(plain[0])}, {mb(plain[1])}, {mb(plain[2])} and\n{mb(plain[3])} MB: a card of 24 GB" in page
    assert max(plain) < 0.95 * 24_000


def test_the_worked_example_by_hand(page: str, shapes: dict[str, ModelShape]) -> None:
    shape = shapes["Qwen3-0.6B"]
    base, linear, hidden, inner, layers = 596_049_920, 440_401_920, 1024, 3072, 28
    assert (shape.parameters, shape.linear_parameters) == (base, linear)
    projections = 2 * (1024 + 2048) + 2 * (1024 + 1024)  # q and o, k and v
    adapters = 8 * layers * (projections + 3 * (1024 + 3072))
    trained = adapters + (hidden + 1) * 27
    layer = 5600 * (11 * hidden + 5 * inner) * 2
    by_hand = {
        "": (base * 2 + adapters * 4, 29.5 * layer),
        "--gradient_checkpointing": (base * 2 + adapters * 4, 3 * layer + layers * 5600 * hidden * 2),
    }
    for flags, (weights, activations) in by_hand.items():
        found = cost(shape, flags, 4)
        assert found.trainable == trained
        assert found.weights_mb == pytest.approx(weights / 1e6)
        assert found.activations_mb == pytest.approx(activations / 1e6)
        assert found.state_mb == pytest.approx(12 * trained / 1e6)
        assert f"{mb(activations / 1e6)} MB" in page
    in_four_bits = 0.516 * linear + (base - linear) * 2 + adapters * 4
    found = cost(shape, "--quantization 4bit", 4)
    assert found.weights_mb == pytest.approx(in_four_bits / 1e6, rel=1e-3)
    for figure in (mb(cost(shape).weights_mb), mb(found.weights_mb)):
        assert f"= {figure} MB" in page
    saved = cost(shape, "", 4).total_mb - cost(shape, "--gradient_checkpointing", 4).total_mb
    assert saved / (cost(shape, "", 4).weights_mb - found.weights_mb) > 10
    assert f"{20 * trained / 1e6:.0f} MB for Qwen3-0.6B at rank 8" in page
    assert f"{4 * trained / 1e6:.0f} MB\nfor Qwen3-0.6B at rank 8" in page


def test_shards(page: str, shapes: dict[str, ModelShape]) -> None:
    full = cost(shapes["Llama-2-7B"], "--method full --gradient_checkpointing")
    assert f"{mb(full.weights_mb)} + {mb(full.state_mb)} MB" in page
    assert f"a shard of eight {mb((full.weights_mb + full.state_mb) / 8)} MB" in page
