"""The settings of ``framework_llm.py`` and ``merge_lora.py``; light to import."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from stocklora.cli.console import UserError
from stocklora.cli.settings import DEVICES, DTYPES, check_positive, setting
from stocklora.prices.settings import ReadingSettings


@dataclass(frozen=True)
class MoreOutputs:
    """What ``framework.py`` and ``framework_llm.py`` say of a forecast beside its table."""

    explain: bool = setting(
        False, "say why each interval is as wide as it is: the factors that multiply to its scale", section="more"
    )
    explain_output: Path = setting(
        Path("explanation.csv"), "with --explain: the factors of every ticker and day", section="more", metavar="CSV"
    )
    paths: int | None = setting(
        None, "also draw so many joint paths of the days ahead, whose quantiles are the forecast's", section="more",
        metavar="N",
    )  # fmt: skip
    paths_output: Path = setting(Path("paths.csv"), "with --paths: where they go", section="more", metavar="CSV")
    ledger: Path | None = setting(
        Path("forecasts.db"), "append the forecast to this record, which ledger.py scores when the closes have come",
        section="more", metavar="FILE", off="--no-ledger",
    )  # fmt: skip
    above: float | None = setting(
        None, "say how probable closes above this price are (of one ticker)", section="more", metavar="PRICE"
    )
    below: float | None = setting(None, "and below this price", section="more", metavar="PRICE")

    def check_price(self, tickers: Collection[str]) -> None:
        """Raise a UserError where a price is asked about and several tickers are forecast."""
        if (self.above is not None or self.below is not None) and len(tickers) > 1:
            raise UserError(
                f"--above and --below are a price of one ticker; choose it with --tickers: {', '.join(tickers)}"
            )


@dataclass(frozen=True)
class ForecastSettings(MoreOutputs, ReadingSettings):
    """Settings of ``framework_llm.py``."""

    # Empty lists, not their defaults, so that a flag beside one that excludes it is seen; read price_files.
    test_csv: list[Path] = setting(
        [], "price CSV file(s) or folder(s) to read (default: sample_test.csv, unless --ticker is given)",
        section="data", nargs="+", metavar="CSV",
    )  # fmt: skip
    tickers: list[str] = setting(
        [], "of the tickers that stand in --test_csv, forecast only these; downloads nothing", section="data",
        nargs="+", metavar="TICKER",
    )  # fmt: skip
    window_size: int | None = setting(
        None, "must be the one the weights were trained with (default: taken from the weights)", section="data"
    )
    ticker: list[str] = setting(
        [], "download fresh prices of these tickers, as download.py does, instead of reading --test_csv",
        section="fresh prices", nargs="+", metavar="TICKER",
    )  # fmt: skip
    source: str | None = setting(
        None, "where --ticker is asked for; see download.py (default: yahoo)", choices=("yahoo", "akshare", "sample"),
        section="fresh prices",
    )  # fmt: skip
    period: str | None = setting(None, "how far back to ask; see download.py (default: 1y)", section="fresh prices")
    retries: int | None = setting(
        None, "how often to ask again when the source says too many requests (default: 4)", section="fresh prices"
    )
    watch: float | None = setting(
        None, "stay, look every so many minutes, and forecast anew whenever a bar is complete; Ctrl-C ends it",
        section="fresh prices", metavar="MINUTES",
    )  # fmt: skip
    model_path: list[Path] = setting(
        [Path("Qwen3-0.6B")],
        "base model folder that the weights were trained on; with several weights files one for all or one each",
        section="model", nargs="+", metavar="FOLDER",
    )  # fmt: skip
    lora_weights: list[Path] = setting(
        [Path("checkpoints/best_lora_weights.pth")],
        "weights file of train_lora.py, or folder of merge_lora.py; of several, the forecasts are combined; a.pth:0.7 "
        "b.pth:0.3 averages the weights into one model instead", section="model", nargs="+", metavar="FILE[:WEIGHT]",
    )  # fmt: skip
    ensemble: str = setting(
        "mean", "how several forecasts become one, quantile by quantile; median: a member that strays pulls less",
        choices=("mean", "median"), section="model",
    )  # fmt: skip
    trust_remote_code: bool = setting(False, "run Python code that comes with the base model", section="model")
    dtype: str = setting(
        "auto", "number format of the base; auto: bfloat16 where the processor has it", choices=DTYPES, section="model"
    )
    device: str = setting("auto", "where to compute", choices=DEVICES, section="model")
    output: Path = setting(Path("predictions.csv"), "where the forecast goes", section="output", metavar="CSV")
    plot: Path | None = setting(
        None, "also draw candles and the forecast's fan into this PNG; of several tickers, one file each",
        section="output", metavar="PNG",
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_positive(self, "window_size", "watch")
        check_positive(self, "paths", "above", "below")
        if self.explain and len(self.lora_weights) > 1:
            raise UserError("--explain explains the forecast of one weights file; give one, or leave --explain out")
        if self.ticker and self.test_csv:
            raise UserError("--test_csv reads prices and --ticker downloads them; give one of the two")
        if self.ticker:
            self.refuse_reading("says how --test_csv is read, and --ticker downloads")
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


def check_weights_path(path: Path) -> None:
    """Whether there is anything at ``path``: told before torch is imported, which takes seconds.

    Raises:
        UserError: with the command that trains.
    """
    if not path.exists():
        raise UserError(f"no weights file {path}; train one with: python train_lora.py --data FILE --model_path FOLDER")


def split_share(path: Path) -> tuple[Path, float | None]:
    """``a.pth:0.7`` -> ``a.pth`` and 0.7; a path without a number after a colon has no share."""
    match = re.fullmatch(r"(.+):(\d+\.?\d*|\.\d+)", str(path))
    return (path, None) if match is None or path.exists() else (Path(match[1]), float(match[2]))


@dataclass(frozen=True)
class MergeSettings(ReadingSettings):
    """Settings of ``merge_lora.py``."""

    lora_weights: Path = setting(
        Path("checkpoints/best_lora_weights.pth"),
        "weights file of train_lora.py, or a folder with an adapter in PEFT's format", section="input",
        metavar="FILE",
    )  # fmt: skip
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
        [], "price CSV file(s) for --verify (default: the last bundled year of AAPL)", section="check", nargs="+",
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
