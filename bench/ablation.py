"""Does the language model help? The same training with and without what a language model could bring.

    python bench/ablation.py                                      # SmolLM2-135M's first layers, half an hour a seed
    python bench/ablation.py --tickers AAPL ADBE AMZN AXP JPM XOM --layers 8 --epochs 3 --seeds 5
    python bench/ablation.py --data my_prices.csv --tickers A B C --first_day 2018-01-02 \\
        --validation_from 2021-01-04 --test_from 2022-01-03

Rows: ``pretrained``: LoRA over the base model; ``random``: over a model of the same configuration that never read
anything; ``shuffled``: the base model again, but each day line is that of a random one of the last 20 days;
``head``: the forecast head alone over the frozen base; ``none``: no model, which is the start itself. Each from the
EWMA start and from a market prior, which is fitted on the file's other tickers before validation begins. All train on
the same days, as many epochs, with the same seeds; what the last epoch gives is scored on test days beside what
validation would have kept (``--required_gain 0``), and beside the average of its quantiles with the prior's at the
weight with the lowest validation loss. All forecasts are calibrated on validation days, the starts too.

A ratio is of quantile losses, below 1 where the model is better; its 95% interval is that of a block bootstrap over
test days. Finished runs are kept in --work_dir: the same command goes on where it was cut off. Writes
bench/results/ablation.json after every run, of the first seed first.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from harness import RESULTS, ROOT, run_benchmark, save_result

STARTS = {"ewma": {"scale": "ewma", "prior": "none"}, "prior": {"scale": "prior"}}
ROWS = {
    "pretrained": "pretrained weights, LoRA",
    "random": "random weights, LoRA",
    "shuffled": "days shuffled, LoRA",
    "head": "head alone",
    "none": "no model: the start",
}
SCORED = ("validation", "test")
SHUFFLED_DAYS = 20
PRIOR_WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the model's quantiles in the average with the prior's
DATA = ROOT.parent / "shared" / "data" / "markets" / "us.csv.gz"
TICKERS = ("AAPL", "JPM", "LLY", "XOM")
OTHERS = "ADBE AMZN AXP BLK C COP COST CVX DAL DE DUK GS HD HON IBM JNJ LMT LOW MRK MS NEE NKE ORCL STX TGT TXN"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", help="prices of these tickers and of others to make a prior "
                        "from (default: ../shared/data/markets/us.csv.gz, where it lies there)")  # fmt: skip
    parser.add_argument("--tickers", nargs="+", default=list(TICKERS), help="(default: %(default)s)")
    parser.add_argument("--first_day", default="2020-01-02", help="of training (default: %(default)s)")
    parser.add_argument("--validation_from", default="2022-07-01", help="(default: %(default)s)")
    parser.add_argument("--test_from", default="2023-01-03", help="(default: %(default)s)")
    parser.add_argument("--model_path", type=Path, default=ROOT / "models" / "smollm2-135m")
    parser.add_argument("--prompt", default="returns", choices=("returns", "ohlcv", "zscores", "words"))
    parser.add_argument("--layers", type=int, default=4, help="the base model's first (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=1, help="passes over the training days (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="how many runs a row (default: %(default)s)")
    parser.add_argument("--max_tokens_per_sequence", type=int, default=1400, help="(default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=1, help="sequences a step (default: %(default)s)")
    parser.add_argument("--learning_rate", type=float, default=3e-4, help="of the adapters (default: %(default)s)")
    parser.add_argument("--head_learning_rate", type=float, default=1e-4, help="(default: %(default)s)")
    parser.add_argument("--rows", nargs="+", choices=tuple(ROWS), default=list(ROWS))
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--work_dir", type=Path, default=ROOT / "checkpoints" / "ablation", help="of finished runs")
    parser.add_argument("--output", type=Path, default=RESULTS / "ablation.json")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return run_benchmark(build_parser(), run, argv)


def run(arguments: argparse.Namespace) -> int:
    from stocklora.base_models.loading import BaseModel
    from stocklora.cli.console import say

    prices = prices_of(arguments)
    if prices is None:
        return 0
    tested, others = prices
    base = BaseModel(arguments.model_path)
    settings = settings_of(arguments, made_prior(others, arguments))
    bench = Bench(base, {name: Start(tested, settings[name], base) for name in STARTS}, arguments.work_dir)
    shown = {"model": arguments.model_path.name, "days": bench.starts["prior"].prepared.facts} | {
        name: getattr(arguments, name)
        for name in ("tickers", "first_day", "prompt", "layers", "epochs", "seeds", "max_tokens_per_sequence",
                     "batch_size", "learning_rate", "head_learning_rate")
    }  # fmt: skip
    scored: dict[tuple[str, str], dict[str, Any]] = {}
    runs: dict[tuple[str, str], list[Any]] = {(start, row): [] for start in STARTS for row in arguments.rows}
    for seed in range(arguments.seeds):
        for (start, row), done in runs.items():
            if row != "none":
                done.append(bench.run(row, start, seed))
            scored[start, row] = bench.scored(row, start, done)
            rows = [scored[key] for key in runs if key in scored]
            beside = bench.beside_each_other(runs)
            save_result(arguments.output, {"settings": shown, "rows": rows, "pretrained_over": beside})
    print_rows(rows, beside)
    say(f"saved: {arguments.output}")
    return 0


# ------------------------------------------------------------------------------------------ prices, prior, settings


def prices_of(arguments: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """The tickers to train and test, from ``--first_day`` on, and all others; None, after a line, without a file."""
    from stocklora.cli.console import say
    from stocklora.dataset.prepare import select_tickers
    from stocklora.dataset.windows import as_date
    from stocklora.prices.tables import read_prices

    if arguments.data is None and not DATA.is_file():
        say(f"no prices at {DATA}; get them with: python download.py --ticker {' '.join(TICKERS)} {OTHERS} "
            f"--start 2017-09-05 --end 2023-12-31 --output us.csv.gz, then give --data us.csv.gz")  # fmt: skip
        return None
    prices = read_prices(arguments.data or [DATA])
    first = as_date(arguments.first_day, "--first_day")
    tested = {name: frame[frame.index >= first] for name, frame in select_tickers(prices, arguments.tickers).items()}
    return tested, {name: frame for name, frame in prices.items() if name not in tested}


def made_prior(others: Mapping[str, Any], arguments: argparse.Namespace) -> Path:
    """A file with a market prior that knows neither the tested tickers nor a day from validation on."""
    from stocklora.cli.console import UserError
    from stocklora.dataset.windows import as_date
    from stocklora.finetune.settings import TrainLoraSettings
    from stocklora.volatility.prior import fit_prior

    before = as_date(arguments.validation_from, "--validation_from")
    try:
        prior = fit_prior({"others": others}, before, horizon=TrainLoraSettings().horizon)
    except ValueError as error:
        raise UserError(f"--data: the prior is made from tickers beside --tickers, and {error}") from None
    path: Path = arguments.work_dir / "prior.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    prior.save(path)
    return path


def settings_of(arguments: argparse.Namespace, prior: Path) -> dict[str, Any]:
    """Start -> settings of ``train_lora.py``, of any seed and row."""
    from stocklora.cli.console import UserError
    from stocklora.finetune.settings import TrainLoraSettings

    if arguments.seeds < 1:
        raise UserError(f"--seeds must be at least 1, got {arguments.seeds}")
    shared = {
        "model_path": arguments.model_path, "backbone_layers": arguments.layers, "prior": str(prior),
        "prompt": arguments.prompt,
        "validation_from": arguments.validation_from, "test_from": arguments.test_from,
        "max_tokens_per_sequence": arguments.max_tokens_per_sequence, "batch_size": arguments.batch_size,
        "epochs": arguments.epochs, "patience": max(1, arguments.epochs), "required_gain": 0.0,
        "learning_rate": arguments.learning_rate, "head_learning_rate": arguments.head_learning_rate,
        "device": arguments.device, "checkpoint_every": sys.maxsize,  # so that a state is saved after every epoch
    }  # fmt: skip
    return {name: TrainLoraSettings(**(shared | fields)) for name, fields in STARTS.items()}


# ------------------------------------------------------------------------------------------------------ training


class Start:
    """The days with one start, and what the start itself forecasts.

    Attributes:
        prepared: splits, baselines and token sequences.
        quantiles: split -> (n, horizon, levels) of the start, not calibrated.
    """

    def __init__(self, prices: Mapping[str, Any], settings: Any, base: Any) -> None:
        from stocklora.finetune.fit import prepare_data
        from stocklora.finetune.prepare import split_prices

        self.settings, self.prepared = settings, prepare_data(split_prices(prices, settings), settings, base)
        data = self.prepared.data
        start = data.start(settings.scale)
        self.quantiles = {split: data.forecasts_of(start, split) for split in SCORED}

    def shuffled(self, base: Any, seed: int) -> Any:
        """``prepared`` with every day line taken from a random one of the last days that the sequence had by then."""
        import numpy as np

        from stocklora.dataset.prepare import make_examples
        from stocklora.dataset.prompts import DayEncoder

        draw = np.random.default_rng(seed)

        class ShuffledDays(DayEncoder):
            def _join(self, sequence: Any, lines: Sequence[list[int]], frame: Any) -> Any:
                taken = [at - int(draw.integers(min(at + 1, SHUFFLED_DAYS))) for at in range(len(lines))]
                return super()._join(sequence, [lines[at] for at in taken], frame)

        data, settings = self.prepared.data, self.settings
        encoder = ShuffledDays(base.tokenizer, settings.prompt)
        examples = {
            split: make_examples(data.prices, [example.encoded.sequence for example in part], encoder,
                                 data.scales[self.prepared.scale_kind])
            for split, part in self.prepared.examples.items()
        }  # fmt: skip
        return replace(self.prepared, examples=examples)


@dataclass
class Bench:
    """All runs of one call.

    Attributes:
        starts: by name, of the same days.
    """

    base: Any
    starts: Mapping[str, Start]
    work_dir: Path

    def run(self, row: str, start: str, seed: int) -> dict[str, Any]:
        """A run's forecasts and history, from ``work_dir`` where it was made before.

        Returns:
            ``last`` and ``kept``: split -> (n, horizon, levels), after the last epoch and after the best on
            validation; ``facts``: history and best epoch.
        """
        import numpy as np

        from stocklora.runtime.files import as_json_types, replacing

        settings = replace(self.starts[start].settings, seed=seed, method="head" if row == "head" else "lora")
        own = asdict(settings) | {"model_path": self.base.description, "prior": STARTS[start].get("prior")}
        identity = json.dumps(as_json_types({"row": row, "settings": own, "data": self.starts[start].prepared.facts}))
        path = self.work_dir / f"{start}-{row}-{seed}.npz"
        content: Mapping[str, Any] = {}
        if path.is_file():
            with np.load(path) as file:
                content = dict(file)
        if str(content.get("identity")) != identity:
            content = {"identity": identity, **self.train(row, start, settings)}
            with replacing(path) as temporary, temporary.open("wb") as file:
                np.savez(file, **content)
        quantiles = {which: {split: content[f"{which}_{split}"] for split in SCORED} for which in ("kept", "last")}
        return {**quantiles, "facts": json.loads(str(content["facts"]))}

    def train(self, row: str, start: str, settings: Any) -> dict[str, Any]:
        """What ``run`` keeps in a file."""
        import rich.style  # noqa: F401 - draws from Python's random numbers when first imported: before they are seeded

        from stocklora.base_models.loading import BaseModel
        from stocklora.cli.console import say
        from stocklora.finetune.fit import join_training_processes, prepare_run, train_forecaster
        from stocklora.finetune.resume import read_state
        from stocklora.forecaster.batches import predict
        from stocklora.forecaster.methods import load_trained_state

        say(f"== {ROWS[row]}, from the start {start}, seed {settings.seed} ==")
        begun, base = self.starts[start], self.base
        prepared = begun.shuffled(base, settings.seed) if row == "shuffled" else begun.prepared
        with tempfile.TemporaryDirectory() as scratch:
            settings = replace(settings, save_dir=Path(scratch) / "run")
            if row == "random":
                base = BaseModel(random_model(base, settings, Path(scratch) / "model"))
            begun_run = prepare_run(prepared, settings, base, join_training_processes(settings, alone=True))
            model, device = begun_run.forecaster.model, begun_run.accelerator.device
            outcome = train_forecaster(begun_run)
            if outcome.interrupted:
                raise KeyboardInterrupt

            def forecasts() -> dict[str, Any]:
                return {split: predict(model, prepared.examples[split], device) for split in SCORED}

            kept = forecasts() if outcome.best_epoch else begun.quantiles
            last = kept
            if outcome.best_epoch != len(outcome.history) - 1:
                assert begun_run.checkpoints.newest is not None  # it is saved after every epoch
                state = read_state(begun_run.checkpoints.newest)
                load_trained_state(model, state["optimization"]["trained"])
                last = forecasts()
        facts = {
            "best_epoch": outcome.best_epoch,
            "steps": outcome.steps,
            "stopped": outcome.stopped,
            "validation_ratio": [entry["validation_ratio"] for entry in outcome.history],
            "seconds": outcome.history[-1]["seconds"],
        }
        quantiles = {f"{which}_{split}": values[split] for which, values in (("kept", kept), ("last", last))
                     for split in SCORED}  # fmt: skip
        return {**quantiles, "facts": json.dumps(facts)}

    # ------------------------------------------------------------------------------------------------- scoring

    def scored(self, row: str, start: str, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """What the runs of a row say together; without any, what the start says.

        Ratios are of means over seeds; intervals are over days alone.
        """
        import numpy as np

        prior = self.starts["prior"].quantiles
        begun, of_prior = self.daily_losses(self.starts[start].quantiles), self.daily_losses(prior)
        content: dict[str, Any] = {"row": row, "start": start}
        if not runs:
            return content | {"loss_bp": float(begun.mean()), "to_prior": self.ratio(begun, of_prior)}
        last = np.array([self.daily_losses(each["last"]) for each in runs])
        kept = np.array([self.daily_losses(each["kept"]) for each in runs])
        facts = [each["facts"] for each in runs]
        weights = [self.best_weight(each["last"], prior) for each in runs]
        averaged = [
            self.daily_losses({split: mixed(each["last"][split], prior[split], weight) for split in prior})
            for each, weight in zip(runs, weights, strict=True)
        ]
        return content | {
            "loss_bp": float(last.mean()),
            "validation": float(np.mean([entry["validation_ratio"][-1] for entry in facts])),
            "test": self.ratio(last.mean(axis=0), begun),
            "test_by_seed": [float(losses.mean() / begun.mean()) for losses in last],
            "kept_epochs": [entry["best_epoch"] for entry in facts],
            "kept": self.ratio(kept.mean(axis=0), begun),
            "to_prior": self.ratio(last.mean(axis=0), of_prior),
            "average_weights": weights,
            "average_to_prior": self.ratio(np.mean(averaged, axis=0), of_prior),
            "steps": facts[0]["steps"],
            "seconds": [round(entry["seconds"], 1) for entry in facts],
        }

    def daily_losses(self, quantiles: Mapping[str, Any]) -> Any:
        """(test days,) quantile loss in basis points, calibrated on validation days."""
        import pandas as pd

        from stocklora.metrics.calibration import fit_calibration
        from stocklora.metrics.scores import BASIS_POINTS, pinball_loss

        data = self.starts["prior"].prepared.data
        calibration = fit_calibration(data.returns_of("validation"), quantiles["validation"], data.levels)
        calibrated = calibration.apply(quantiles["test"], data.levels)
        losses = BASIS_POINTS * pinball_loss(data.returns_of("test"), calibrated, data.levels).mean(axis=1)
        return pd.Series(losses).groupby(data.dates_of("test")).mean().to_numpy()

    def best_weight(self, own: Mapping[str, Any], prior: Mapping[str, Any]) -> float:
        """Of the model's quantiles in an average with the prior's: the one with the lowest validation loss."""
        from stocklora.metrics.scores import pinball_loss

        data = self.starts["prior"].prepared.data
        returns = data.returns_of("validation")

        def loss(weight: float) -> float:
            blend = mixed(own["validation"], prior["validation"], weight)
            return float(pinball_loss(returns, blend, data.levels).mean())

        return min(PRIOR_WEIGHTS, key=loss)

    def ratio(self, losses: Any, other: Any) -> list[float]:
        """Ratio of the means, and the ends of its 95% interval."""
        from stocklora.metrics.significance import relative_mean_interval

        horizon = self.starts["prior"].prepared.data.horizon
        low, high = relative_mean_interval(losses, other, least_block_days=horizon)
        return [float(losses.mean() / other.mean()), low, high]

    def beside_each_other(self, runs: Mapping[tuple[str, str], Sequence[Any]]) -> dict[str, dict[str, list[float]]]:
        """Start -> row -> loss of the pretrained weights over that row's, seeds that both have trained."""
        import numpy as np

        def losses(done: Sequence[Any]) -> Any:
            return np.mean([self.daily_losses(each["last"]) for each in done], axis=0)

        beside: dict[str, dict[str, list[float]]] = {start: {} for start in STARTS}
        for (start, row), others in runs.items():
            own = runs.get((start, "pretrained"), [])
            if row != "pretrained" and (count := min(len(own), len(others))):
                beside[start][row] = self.ratio(losses(own[:count]), losses(others[:count]))
        return beside


def mixed(own: Any, prior: Any, weight: float) -> Any:
    """Average of two forecasts, quantile by quantile."""
    return weight * own + (1.0 - weight) * prior


def random_model(base: Any, settings: Any, folder: Path) -> Path:
    """A model of the base's configuration as it is before it has read anything, drawn by the run's seed.

    Raises:
        UserError: more layers than the base has.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from stocklora.base_models.loading import first_layers
    from stocklora.cli.console import UserError

    try:
        config = first_layers(base.config, settings.backbone_layers)
    except ValueError as error:
        raise UserError(f"--layers: {error}") from None
    torch.manual_seed(settings.seed)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    return folder


# ------------------------------------------------------------------------------------------------------- telling


def print_rows(rows: Sequence[Mapping[str, Any]], beside: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    """The table, and the pretrained weights beside each other row."""
    from stocklora.cli.console import print_table, say

    def cells(row: Mapping[str, Any]) -> list[str]:
        first = [row["start"], ROWS[row["row"]], f"{row['loss_bp']:.2f}"]
        if "test" not in row:
            return [*first, "1", "1", "1", with_interval(row["to_prior"]), ""]
        epochs = " ".join(map(str, row["kept_epochs"]))
        weights = " ".join(f"{weight:g}" for weight in row["average_weights"])
        return [
            *first, f"{row['validation']:.4f}", with_interval(row["test"]), f"{row['kept'][0]:.4f} (epochs {epochs})",
            with_interval(row["to_prior"]), f"{with_interval(row['average_to_prior'])} (weights {weights})",
        ]  # fmt: skip

    header = ("start", "row", "test, bp", "validation/start", "test/start", "kept/start", "test/prior", "average/prior")
    print_table("Does the language model help?", header, [cells(row) for row in rows])
    for start, others in beside.items():
        for name, ratio in others.items():
            say(f"from {start}: pretrained weights over {ROWS[name]}: {with_interval(ratio)}")


def with_interval(ratio: Sequence[float]) -> str:
    return f"{ratio[0]:.4f} [{ratio[1]:.4f}, {ratio[2]:.4f}]"


if __name__ == "__main__":
    sys.exit(main())
