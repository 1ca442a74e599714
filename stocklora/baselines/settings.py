"""What ``train.py`` and ``framework.py`` can be told; light to import."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from stocklora.cli.console import UserError
from stocklora.cli.settings import DEVICES, check_horizon, check_positive, check_run, setting
from stocklora.forecaster.settings import MoreOutputs
from stocklora.prices.settings import ReadingSettings

HORIZON = 3  # closes that framework.py forecasts


@dataclass(frozen=True)
class TrainSettings(ReadingSettings):
    """Settings of ``train.py``."""

    data: list[Path] = setting(
        [Path("sample_test.csv")], "price CSV file(s) or folder(s); several are trained together", section="data",
        nargs="+", metavar="CSV",
    )  # fmt: skip
    tickers: list[str] = setting([], "use only these tickers of the files", section="data", nargs="+", metavar="TICKER")
    window_size: int = setting(30, "days that a forecast is made from", section="data", metavar="DAYS")
    validation_fraction: float = setting(
        0.15, "share of the days for early stopping and error bars", section="data", metavar="SHARE"
    )
    test_fraction: float = setting(
        0.15, "share of the days, the last, for the final score", section="data", metavar="SHARE"
    )
    validation_from: str | None = setting(
        None, "first validation day, instead of a share", section="data", metavar="DATE"
    )
    test_from: str | None = setting(None, "first test day, instead of a share", section="data", metavar="DATE")
    epochs: int = setting(100, "passes over the training days, at most", section="training")
    batch_size: int = setting(32, "windows a step", section="training")
    learning_rate: float = setting(0.001, "Adam's learning rate", section="training", metavar="RATE")
    patience: int = setting(
        20, "stop after so many epochs without a better validation loss", section="training", metavar="EPOCHS"
    )
    seed: int = setting(42, "seed of everything random", section="training")
    device: str = setting("auto", "where to compute", choices=DEVICES, section="training")
    save_path: Path = setting(Path("model.pth"), "where the trained model goes", section="output", metavar="FILE")

    def __post_init__(self) -> None:
        check_positive(self, "window_size", "batch_size", "learning_rate", "patience")
        check_run(self)
        if not 0 <= self.seed < 2**63:
            raise UserError(f"--seed must be between 0 and 2^63 - 1, got {self.seed}")


@dataclass(frozen=True)
class FrameworkSettings(MoreOutputs, ReadingSettings):
    """Settings of ``framework.py``."""

    test_csv: list[Path] = setting(
        [Path("sample_test.csv")], "price CSV file(s) or folder(s)", section="data", nargs="+", metavar="CSV"
    )
    tickers: list[str] = setting(
        [], "forecast only these tickers of the files", section="data", nargs="+", metavar="TICKER"
    )
    window_size: int | None = setting(
        None, "must be the one the model was trained with (default: taken from the model file)", section="data",
        metavar="DAYS",
    )  # fmt: skip
    model_path: Path = setting(
        Path("model.pth"), "model file of train.py; or prior, which needs no training: what hundreds of other stocks "
        "teach, moved by the days in the file", section="model", metavar="FILE",
    )  # fmt: skip
    prior: str = setting(
        "builtin", "with --model_path prior: builtin, or a FILE of scripts/make_prior.py", section="model",
        metavar="FILE",
    )  # fmt: skip
    horizon: int | None = setting(
        None, "with --model_path prior: days ahead (default: 3)", section="model", metavar="DAYS"
    )
    device: str = setting("auto", "where to compute", choices=DEVICES, section="model")
    output: Path = setting(Path("predictions.csv"), "where the forecast goes", section="output", metavar="CSV")

    def __post_init__(self) -> None:
        check_positive(self, "window_size", "horizon", "paths", "above", "below")
        if self.explain and not self.by_prior:
            raise UserError("--explain is for --model_path prior: the network of train.py has one scale for all days")
        if self.horizon is not None:
            check_horizon(self.horizon)
        if self.window_size is not None and self.by_prior:
            raise UserError("--window_size is a model file's; the market prior reads all days of the file")
        if self.prior == "none":
            raise UserError("--prior none: leave --model_path prior out instead")
        for name in ("horizon",) + ("prior",) * (self.prior != "builtin"):
            if getattr(self, name) is not None and not self.by_prior:
                raise UserError(
                    f"--{name} is for --model_path prior; a model file of train.py forecasts {HORIZON} days"
                )

    @property
    def by_prior(self) -> bool:
        """Whether the market prior forecasts; a file of that name is a model file like any other."""
        return str(self.model_path) == "prior" and not self.model_path.exists()


def check_model_file(path: Path) -> None:
    """Raise a UserError unless there is a file at ``path``; nothing is read."""
    if path.is_dir():
        raise UserError(f"--model_path {path} is a folder; give the model file that train.py wrote")
    if not path.exists():
        raise UserError(f"no model file {path}; train one with: python train.py --data sample_test.csv")
