"""What ``backtest.py`` can be told; light to import."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from stocklora.cli.console import UserError
from stocklora.cli.settings import DEVICES, DTYPES, check_horizon, check_positive, check_range, setting
from stocklora.prices.settings import ReadingSettings

BACKTEST_MODELS = (
    "naive", "drift", "ewma", "har", "harx", "prior", "simple", "llm", "autoarima", "autoets", "autotheta", "garch",
    "fracast",
)  # fmt: skip


@dataclass(frozen=True)
class BacktestSettings(ReadingSettings):
    """Settings of ``backtest.py``."""

    data: list[Path] = setting([], "price CSV file(s) or folder(s)", section="data", nargs="+", metavar="CSV")
    tickers: list[str] = setting([], "use only these tickers of the files", section="data", nargs="+", metavar="TICKER")
    models: list[str] = setting(
        ["naive", "drift", "ewma", "har", "harx", "prior"],
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
    prior: str = setting(
        "builtin", "what the model prior starts from: builtin, or a FILE of scripts/make_prior.py", section="models",
        metavar="FILE",
    )  # fmt: skip
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
        if self.prior == "none":
            raise UserError("--prior none: leave the model prior out of --models instead")
        check_positive(self, "train_days", "window_size", "horizon", "leakage_cuts")
        check_horizon(self.horizon)
        check_range(self, window_size=(2, None))
        if "llm" in self.models and not self.lora_weights:
            raise UserError("--models llm needs --lora_weights FILE; train one with: python train_lora.py --data FILE")
        if self.lora_weights and "llm" not in self.models:
            raise UserError("--lora_weights is for the model llm; add it: --models naive ewma har llm")
        if len(self.model_path) not in (1, len(self.lora_weights)) and self.lora_weights:
            raise UserError(
                f"--model_path: give one folder for all of the {len(self.lora_weights)} weights files or one each, "
                f"not {len(self.model_path)}"
            )
