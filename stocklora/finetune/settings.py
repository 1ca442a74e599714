"""The settings of ``train_lora.py``, and which of them exclude each other; light to import."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from stocklora.cli.console import UserError
from stocklora.cli.settings import (
    DEVICES,
    DTYPES,
    METHODS,
    QUANTIZATIONS,
    check_horizon,
    check_positive,
    check_range,
    check_run,
    setting,
)
from stocklora.prices.settings import ReadingSettings

PRIOR_TEACHER = Path("prior")  # what --teacher calls the market prior; a file of that name is ./prior


@dataclass(frozen=True)
class TrainLoraSettings(ReadingSettings):
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
        "words", "how days are written: words, a letter for the size of a number; basis points from the day before; "
        "prices; percent of the volatility", choices=("words", "returns", "ohlcv", "zscores"), section="data",
    )  # fmt: skip
    indicators: list[str] = setting(
        [], "numbers added to every day line; market: mean return and range of all tickers in the files",
        choices=("market", "returns", "sma", "ema", "rsi", "macd", "bollinger", "atr", "range"), section="data",
        nargs="+", metavar="NAME",
    )  # fmt: skip
    anonymize: bool = setting(
        True, "keep ticker and dates out of the prompt: a base model may remember them", section="data"
    )
    targets_per_sequence: int | None = setting(
        None, "forecasts per forward pass; 1 is one window a pass (default: what fits the model's context, "
        "the token budget and the data)", section="data", metavar="N",
    )  # fmt: skip
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
        "auto", "volatility scale the forecast starts from; auto: the prior's, or another that is clearly better on "
        "validation", choices=("auto", "ewma", "har", "harx", "prior"), section="model",
    )  # fmt: skip
    prior: str = setting(
        "builtin", "what hundreds of other stocks teach about volatility: builtin, none, or a FILE of "
        "scripts/make_prior.py", section="model", metavar="FILE",
    )  # fmt: skip
    method: str = setting(
        "lora",
        "what trains beside the forecast head; lora: adapters of lora.py; peft: adapters of the PEFT library; full: "
        "every weight of the base; head: nothing, and the base is read only once", choices=METHODS, section="method",
    )  # fmt: skip
    quantization: str = setting(
        "none",
        "store the frozen linear layers in less: 8bit: int8 with a scale for each row; 4bit: nf4 with quantized "
        "scales (QLoRA); needs bitsandbytes, computes on CPUs too", choices=QUANTIZATIONS, section="method",
    )  # fmt: skip
    expand_rank_from: Path | None = setting(
        None, "start from this weights file's adapters and head, at the larger --lora_rank, with the same forecasts",
        section="method", metavar="FILE",
    )  # fmt: skip
    teacher: Path | None = setting(
        None, "whose quantiles are a second target on training days: prior, the market prior's, or a weights file's",
        section="method", metavar="FILE",
    )  # fmt: skip
    teacher_model_path: Path | None = setting(
        None, "base model folder of --teacher (default: that of --model_path)", section="method", metavar="FOLDER"
    )
    distill_weight: float = setting(
        0.5, "weight of the distance to the teacher's quantiles, beside a loss of weight 1", section="method",
        metavar="WEIGHT",
    )  # fmt: skip
    teacher_epochs: int = setting(
        0, "first epochs that learn from the teacher alone, before outcomes are learned", section="method",
        metavar="EPOCHS",
    )  # fmt: skip
    simulated_series: int = setting(
        0, "made-up stocks of 500 days with known quantiles that the teacher's epochs read as well", section="method",
        metavar="N",
    )  # fmt: skip

    lora_rank: int = setting(8, "rank of the adapters", section="LoRA")
    lora_alpha: float = setting(16.0, "adapters are scaled by alpha / rank", section="LoRA")
    lora_dropout: float = setting(0.0, "dropout on the adapters' input", section="LoRA")
    target_modules: list[str] = setting(
        ["all-linear"], "layers to adapt, by name", section="LoRA", nargs="+", metavar="NAME"
    )
    adapt_layers: int | None = setting(
        None, "adapt the last K layers alone; those before them read each sequence only once (default: all)",
        section="LoRA", metavar="K",
    )  # fmt: skip
    use_rslora: bool = setting(False, "scale by alpha / sqrt(rank), for high ranks (rsLoRA)", section="LoRA")
    use_dora: bool = setting(
        False, "train the length of each weight row apart from its direction (DoRA); slower", section="LoRA"
    )
    init_lora: str = setting(
        "kaiming", "how adapters start; pissa: at the weights' leading singular vectors",
        choices=("kaiming", "pissa"), section="LoRA",
    )  # fmt: skip
    train_bias: str = setting(
        "none", "biases of the base that train too: of no layer, of the adapted ones, of all",
        choices=("none", "lora_only", "all"), section="LoRA",
    )  # fmt: skip
    lora_plus_ratio: float | None = setting(
        None, "learning rate of B over that of A, 16 in the paper (LoRA+; default: the same rate)", section="LoRA",
        metavar="RATIO",
    )  # fmt: skip

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
        None, "padded tokens of one forward pass, at most: larger batches are cut, with the same gradients (a longer "
        "sequence goes alone; default: 2,816 on a CPU, the whole batch on a graphics card)", section="training",
        metavar="TOKENS",
    )  # fmt: skip
    compile: bool = setting(
        False, "compile the base model with torch.compile; needs a C++ compiler", section="training"
    )
    seed: int = setting(42, "seed of everything random", section="training")
    dtype: str = setting(
        "auto", "number format of the frozen base; auto: bfloat16 where the processor has it", choices=DTYPES,
        section="training",
    )  # fmt: skip
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
        if self.scale == "prior" and self.prior == "none":
            raise UserError("--scale prior starts from a prior and --prior none leaves it out; drop one of the two")
        check_positive(
            self, "checkpoint_every", "window_size", "horizon", "targets_per_sequence",
            "max_tokens_per_sequence", "max_tokens_per_batch", "lora_rank", "lora_alpha", "lora_plus_ratio",
            "distill_weight", "batch_size", "gradient_accumulation_steps", "learning_rate",
            "head_learning_rate", "max_grad_norm", "patience", "backbone_layers", "adapt_layers",
        )  # fmt: skip
        check_horizon(self.horizon)
        if not 0.0 <= self.lora_dropout < 1.0:
            raise UserError(f"--lora_dropout must be at least 0 and below 1, got {self.lora_dropout}")
        check_range(self, teacher_epochs=(0, None), simulated_series=(0, None))
        check_range(self, seed=(0, 2**32 - 1), warmup_ratio=(0, 1), required_gain=(0, None), weight_decay=(0, None))
        check_run(self)
        check_method(self)


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
            "--adapt_layers": settings.adapt_layers is not None,
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
    if settings.adapt_layers is not None and settings.train_bias == "all":
        raise UserError(
            "--train_bias all trains biases of all layers, and --adapt_layers leaves the first alone: use --train_bias "
            "lora_only, or leave one of them out"
        )
    if settings.init_lora == "pissa" and quantized and method == "peft":
        raise UserError(
            "PEFT's PiSSA takes its start away from the weights, and quantized weights cannot be changed: use --method "
            f"lora, or leave out --quantization {settings.quantization} or --init_lora pissa"
        )
    if settings.expand_rank_from is not None and settings.init_lora == "pissa":
        raise UserError("--expand_rank_from brings its own start: leave out --init_lora pissa")
    check_teacher(settings)
    if method == "head" and settings.gradient_checkpointing:
        raise UserError("--method head keeps no activations: leave out --gradient_checkpointing")


def check_teacher(settings: TrainLoraSettings) -> None:
    """As ``check_method``, for the flags of ``--teacher``."""
    if settings.teacher is None and settings.teacher_epochs:
        raise UserError("--teacher_epochs are epochs with a --teacher alone; give that too, or leave them out")
    if settings.simulated_series and not settings.teacher_epochs:
        raise UserError("--simulated_series are read in the teacher's epochs: give --teacher and --teacher_epochs too")
    if settings.teacher_model_path is not None and settings.teacher in (None, PRIOR_TEACHER):
        raise UserError("--teacher_model_path is the base model of a --teacher; give its weights, or leave it out")
    if settings.teacher == PRIOR_TEACHER:
        if settings.prior == "none":
            raise UserError("--teacher prior is the market prior and --prior none leaves it out; drop one of the two")
        if settings.scale == "prior":
            raise UserError(
                "--scale prior starts where --teacher prior leads, and nothing is left to learn; give --scale ewma"
            )
