"""Can the language model read a price? Known functions of the days, from the text alone, without the noise of outcomes.

    python bench/reading.py --part states                                  # what frozen states hold
    python bench/reading.py --part states --prompts words returns --weights pretrained random --layers 1 2 4 8
    python bench/reading.py --part taught --prompts words --layers 2       # LoRA and head, taught by the market prior

**states**: a linear map by ridge from the base model's hidden states to yesterday's log range, the mean range over 5
and 22 days, the scales of EWMA and HAR-range and today's return, each in logs, and the ranges and HAR's scale over
EWMA's: what a forecast that starts at EWMA's scale still has to read. R² on tickers and years that nothing was fitted
on. Rows: the day prompts of ``--prompt``, and forms that only stand here; the base's weights as they are or random;
states after so many layers; at the line's end, at the last token before it, the mean over the line, and the line's end
beside its means over the last 5 and 22 days. With ``--hidden N`` one hidden layer in place of the linear map.

**taught**: ``train_lora.py --teacher prior`` from the EWMA start on the training tickers, then on the others, of later
years and of the same: R² of the log of its scale against the prior's, and its quantile loss over EWMA's, beside
HAR-range's and the prior's own.

Half the tickers train, a quarter chooses (the ridge), a quarter tests; training and choice end before --test_from,
tests begin there. Intervals are 95%, by a bootstrap over sequences (R²) or blocks of days (losses). Writes
bench/results/reading.json.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import DEVELOPMENT, POOL_FILE, RESULTS, ROOT, run_benchmark, save_result
from reading_forms import FORMS, TARGET_DAYS, WARM_DAYS, Encoder

TARGETS = ("range_1", "range_5", "range_22", "ewma", "har", "return", "range_1/ewma", "range_5/ewma", "range_22/ewma",
           "har/ewma")  # fmt: skip
RIDGES = tuple(10.0**power for power in range(-4, 2))
STATES = {"mean": ("mean",), "last": ("last",), "end": ("end",), "end+means": ("end", "end_5", "end_22")}
DATA = (DEVELOPMENT / "markets" / "us.csv.gz", POOL_FILE)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("states", "taught"), default="states")
    parser.add_argument("--data", type=Path, nargs="+", help="price files (default: ../shared/data's US stocks)")
    parser.add_argument("--test_from", default="2021-01-04", help="(default: %(default)s)")
    parser.add_argument("--model_path", type=Path, default=ROOT / "models" / "smollm2-135m")
    parser.add_argument("--prompts", nargs="+", default=["returns", "zscores", "ohlcv", "words"], choices=tuple(FORMS))
    parser.add_argument("--weights", nargs="+", default=["pretrained"], choices=("pretrained", "random"))
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 2, 8], help="(default: %(default)s)")
    parser.add_argument("--states", nargs="+", choices=tuple(STATES), default=["mean", "end", "end+means"])
    parser.add_argument("--hidden", type=int, default=0, help="units of one hidden layer (default: linear)")
    parser.add_argument("--sequences", type=int, default=140, help="that are fitted on, of 44 days each")
    parser.add_argument("--epochs", type=int, default=2, help="taught: by the prior alone (default: %(default)s)")
    parser.add_argument("--outcome_epochs", type=int, default=0, help="taught: after those (default: %(default)s)")
    parser.add_argument("--method", choices=("lora", "head"), default="lora", help="taught (default: %(default)s)")
    parser.add_argument("--lora_rank", type=int, default=8, help="taught (default: %(default)s)")
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="taught (default: %(default)s)")
    parser.add_argument("--head_learning_rate", type=float, default=1e-3, help="taught (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=1, help="taught: sequences a step (default: %(default)s)")
    parser.add_argument("--simulated_series", type=int, default=0, help="taught: beside the training days")
    parser.add_argument("--first_day", help="taught: training days from here on (default: all)")
    parser.add_argument("--max_tokens_per_sequence", type=int, default=1400, help="taught (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--output", type=Path, default=RESULTS / "reading.json")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return run_benchmark(build_parser(), run, argv)


def run(arguments: argparse.Namespace) -> int:
    from stocklora.cli.console import say

    paths = arguments.data or [path for path in DATA if path.is_file()]
    if not paths:
        say(f"no prices at {DATA[0]}; get some with download.py --start 2012-01-01 and give them with --data")
        return 0
    days = Days.read(paths, arguments.test_from)
    rows = (states_rows if arguments.part == "states" else taught_rows)(days, arguments)
    shown = {key: [item.name for item in value] if key == "data" and value else value
             for key, value in vars(arguments).items()}  # fmt: skip
    shown |= {"model_path": arguments.model_path.name, "output": arguments.output.name}
    for done in rows:
        save_result(arguments.output, {"settings": shown, "rows": done})
    say(f"saved: {arguments.output}")
    return 0


# ------------------------------------------------------------------------------------------------------- the days


@dataclass
class Days:
    """Prices, and who is held out.

    Attributes:
        prices: name -> its table; a ticker that stands in several files has a name for each.
        part: name -> train, validation or test.
        scales: kind -> name -> (days, 3); ``har`` fitted on the training tickers before ``test_from``.
        tables: kind -> (3, levels) of those days' scaled returns.
    """

    prices: Mapping[str, Any]
    part: Mapping[str, str]
    test_from: Any
    scales: Mapping[str, Mapping[str, Any]]
    tables: Mapping[str, Any]

    @classmethod
    def read(cls, paths: Sequence[Path], test_from: str) -> Days:
        import numpy as np
        import pandas as pd

        from stocklora.metrics.scores import QUANTILE_LEVELS
        from stocklora.prices.tables import log_returns_ahead, read_prices
        from stocklora.volatility.random_walk import fit_baselines

        prices: dict[str, Any] = {}
        for number, path in enumerate(paths):
            prices |= {name + "~" * number: frame for name, frame in read_prices(path).items()}
        tickers = sorted({name.rstrip("~") for name in prices})
        parts = {ticker: ("train", "train", "validation", "test")[at % 4] for at, ticker in enumerate(tickers)}
        part = {name: parts[name.rstrip("~")] for name in prices}
        before = pd.Timestamp(test_from)
        taught = {name: frame for name, frame in prices.items() if part[name] == "train"}
        origins = {
            name: range(WARM_DAYS, max(WARM_DAYS, int(frame.index.searchsorted(before)) - 3))
            for name, frame in taught.items()
        }
        returns = {name: log_returns_ahead(frame["Close"].to_numpy(), 3) for name, frame in taught.items()}
        fitted = fit_baselines(taught, origins, returns, np.array(QUANTILE_LEVELS), ("ewma", "har"))
        scales = {kind: fitted[kind].scale.on(prices) for kind in ("ewma", "har")}  # type: ignore[union-attr]
        return cls(prices, part, before, scales, {kind: fitted[kind].table for kind in scales})

    def origins(self, name: str) -> range:
        """Rows that a part's forecasts are made from: before ``test_from``, or with ``test`` from there on."""
        frame = self.prices[name]
        split = int(frame.index.searchsorted(self.test_from))
        first, last = (split, len(frame)) if self.part[name] == "test" else (0, min(split, len(frame)))
        return range(max(first, WARM_DAYS + 1), max(first, WARM_DAYS + 1, last - 3))

    def sequences(self, part: str, most: int) -> list[tuple[str, int]]:
        """Names and first origins of at most so many sequences, drawn from all there are."""
        import numpy as np

        found = [
            (name, first) for name in self.prices if self.part[name] == part
            for first in self.origins(name)[:: TARGET_DAYS] if first + TARGET_DAYS <= self.origins(name).stop
        ]  # fmt: skip
        chosen = np.random.default_rng(0).permutation(len(found))[:most]
        return [found[at] for at in chosen]

    def targets(self, name: str) -> Any:
        """(days, ``TARGETS``)."""
        import numpy as np

        from stocklora.volatility.scales import range_features

        _, ewma, one, five, month, _, move, _ = range_features(self.prices[name]).T
        har = np.log(self.scales["har"][name][:, 0])
        return np.stack([one, five, month, ewma, har, move, one - ewma, five - ewma, month - ewma, har - ewma], axis=1)


# ------------------------------------------------------------------------------------------- what frozen states hold


def states_rows(days: Days, arguments: argparse.Namespace) -> Any:
    """Yields all rows so far, after each form and kind of weights."""
    import numpy as np

    from stocklora.cli.console import say

    counts = {"train": arguments.sequences, "validation": arguments.sequences // 4, "test": arguments.sequences // 2}
    sequences = {part: days.sequences(part, most) for part, most in counts.items()}
    known = {name: days.targets(name) for part in sequences.values() for name, _ in part}
    targets = {
        part: np.concatenate([known[name][first : first + TARGET_DAYS] for name, first in chosen])
        for part, chosen in sequences.items()
    }
    rows: list[dict[str, Any]] = []
    say("R² of " + ", ".join(TARGETS))
    for weights in arguments.weights:
        for form in arguments.prompts:
            states, facts = read_states(days, sequences, form, weights, arguments)
            for layer in arguments.layers:
                for name in arguments.states:
                    inputs = {part: np.concatenate([states[part, layer, each] for each in STATES[name]], axis=1)
                              for part in sequences}  # fmt: skip
                    read = by_hidden_layer if arguments.hidden else by_ridge
                    predicted = read(inputs, targets, arguments)
                    r2, low, high = explained(targets["test"], predicted)
                    rows.append({"prompt": form, "weights": weights, "layers": layer, "state": name, **facts,
                                 "r2": dict(zip(TARGETS, r2, strict=True)),
                                 "har/ewma_interval": [low[-1], high[-1]]})  # fmt: skip
                    cells = " ".join(f"{value:6.3f}" for value in r2)
                    say(f"{form:14} {weights:10} {layer:2} layers, {name:9} {cells} "
                        f"[{low[-1]:.2f}, {high[-1]:.2f}]")  # fmt: skip
            yield rows


def read_states(
    days: Days, sequences: Mapping[str, Sequence[tuple[str, int]]], form: str, weights: str,
    arguments: argparse.Namespace,
) -> tuple[dict[tuple[str, int, str], Any], dict[str, Any]]:  # fmt: skip
    """(part, layers, state) -> (origins, width), from one pass over each sequence; and what it cost."""
    import numpy as np
    import torch
    from transformers import AutoModel

    from stocklora.base_models.loading import BaseModel, backbone_config, load_backbone, quiet_transformers

    quiet_transformers()
    base, most = BaseModel(arguments.model_path), max(arguments.layers)
    if weights == "random":
        torch.manual_seed(arguments.seed)
        model = AutoModel.from_config(backbone_config(arguments.model_path, most)).to(torch.bfloat16)
    else:
        model = load_backbone(arguments.model_path, torch.bfloat16, most)
    model.eval()
    encoder = Encoder(base.tokenizer, form)
    found: dict[tuple[str, int, str], list[Any]] = {}
    tokens, started = 0, time.process_time()
    for part, chosen in sequences.items():
        for name, first in chosen:
            ids, ends, lengths = encoder.sequence(name, days.prices[name], first)
            tokens += len(ids)
            with torch.inference_mode():
                layers = model(input_ids=torch.tensor(ids)[None], use_cache=False, output_hidden_states=True)
            for layer in arguments.layers:
                hidden = layers.hidden_states[layer][0].float()
                hidden = torch.nn.functional.layer_norm(hidden, hidden.shape[-1:]).double().numpy()
                for state, values in states_at(hidden, ends, lengths).items():
                    found.setdefault((part, layer, state), []).append(values.astype(np.float32))
    seconds = time.process_time() - started
    read = sum(map(len, sequences.values())) * (WARM_DAYS + TARGET_DAYS - 1)
    facts = {"tokens_a_day": tokens / read, "cpu_seconds": round(seconds, 1), "tokens": tokens}
    return {key: np.concatenate(values) for key, values in found.items()}, facts


def states_at(hidden: Any, ends: Any, lengths: Any) -> dict[str, Any]:
    """The states of one sequence's last ``TARGET_DAYS`` days: (days, width) each.

    Args:
        hidden: (tokens, width). ends: (days,) each line's last token. lengths: (days,) its tokens.
    """
    import numpy as np

    sums = np.vstack([np.zeros((1, hidden.shape[1])), hidden.cumsum(axis=0)])
    line_ends = hidden[ends]
    end_sums = np.vstack([np.zeros((1, hidden.shape[1])), line_ends.cumsum(axis=0)])
    stops = np.arange(WARM_DAYS, WARM_DAYS + TARGET_DAYS)
    return {
        "end": line_ends[-TARGET_DAYS:],
        "last": hidden[ends - 1][-TARGET_DAYS:],
        "mean": ((sums[ends + 1] - sums[ends + 1 - lengths]) / lengths[:, None])[-TARGET_DAYS:],
        **{f"end_{days}": (end_sums[stops] - end_sums[stops - days]) / days for days in (5, 22)},
    }


def by_ridge(inputs: Mapping[str, Any], targets: Mapping[str, Any], _: argparse.Namespace) -> Any:
    """(test origins, targets): a linear map of standardized inputs, its ridge chosen by the validation tickers."""
    import numpy as np

    centre, spread = inputs["train"].mean(axis=0), inputs["train"].std(axis=0) + 1e-6
    standard = {part: (values - centre) / spread for part, values in inputs.items()}
    level, size = targets["train"].mean(axis=0), targets["train"].std(axis=0)
    count = len(standard["train"])
    eigenvalues, vectors = np.linalg.eigh(standard["train"].T @ standard["train"] / count)
    pull = vectors.T @ (standard["train"].T @ ((targets["train"] - level) / size) / count)
    turned = {part: standard[part] @ vectors for part in ("validation", "test")}
    best = np.full(len(level), np.inf)
    predicted = np.zeros_like(targets["test"])
    for ridge in RIDGES:
        weights = pull / (np.maximum(eigenvalues, 0.0)[:, None] + ridge)
        errors = ((turned["validation"] @ weights * size + level - targets["validation"]) ** 2).mean(axis=0)
        better = errors < best
        predicted[:, better] = (turned["test"] @ weights * size + level)[:, better]
        best = np.minimum(best, errors)
    return predicted


def by_hidden_layer(inputs: Mapping[str, Any], targets: Mapping[str, Any], arguments: argparse.Namespace) -> Any:
    """(test origins, targets): one hidden layer, trained until the validation tickers' error rises."""
    import numpy as np
    import torch

    torch.manual_seed(arguments.seed)
    level, size = targets["train"].mean(axis=0), targets["train"].std(axis=0)
    centre, spread = inputs["train"].mean(axis=0), inputs["train"].std(axis=0) + 1e-6
    x = {part: torch.tensor((values - centre) / spread, dtype=torch.float32) for part, values in inputs.items()}
    y = {part: torch.tensor((values - level) / size, dtype=torch.float32) for part, values in targets.items()}
    network = torch.nn.Sequential(
        torch.nn.Linear(x["train"].shape[1], arguments.hidden), torch.nn.GELU(),
        torch.nn.Linear(arguments.hidden, len(level)),
    )  # fmt: skip
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.1)
    best, predicted = np.full(len(level), np.inf), np.zeros_like(targets["test"])
    for _ in range(30):
        for rows in torch.randperm(len(x["train"])).split(256):
            optimizer.zero_grad()
            ((network(x["train"][rows]) - y["train"][rows]) ** 2).mean().backward()
            optimizer.step()
        with torch.no_grad():
            errors = ((network(x["validation"]) - y["validation"]) ** 2).mean(dim=0).numpy()
            better = errors < best
            predicted[:, better] = (network(x["test"]).numpy() * size + level)[:, better]
        best = np.minimum(best, errors)
    return predicted


def explained(targets: Any, predicted: Any, draws: int = 400) -> tuple[Any, Any, Any]:
    """R² of each target, and the ends of its 95% interval by a bootstrap over sequences."""
    import numpy as np

    shape = (-1, TARGET_DAYS, targets.shape[1])
    wrong = ((targets - predicted) ** 2).reshape(shape).mean(axis=1)
    total = ((targets - targets.mean(axis=0)) ** 2).reshape(shape).mean(axis=1)
    draw = np.random.default_rng(0).integers(len(wrong), size=(draws, len(wrong)))
    found = 1.0 - wrong[draw].sum(axis=1) / total[draw].sum(axis=1)
    return 1.0 - wrong.sum(axis=0) / total.sum(axis=0), *np.quantile(found, (0.025, 0.975), axis=0)


# --------------------------------------------------------------------------------------------- what a teacher teaches


def taught_rows(days: Days, arguments: argparse.Namespace) -> Any:
    """Yields all rows so far, after each form, kind of weights and number of layers."""
    rows = []
    for form in arguments.prompts:
        for weights in arguments.weights:
            for layers in arguments.layers:
                rows.append(taught(days, form, weights, layers, arguments))
                yield rows


def taught(days: Days, form: str, weights: str, layers: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train on the training tickers, read and score the held-out ones."""
    import pandas as pd
    from ablation import random_model

    from stocklora.base_models.loading import BaseModel
    from stocklora.cli.console import say
    from stocklora.finetune.fit import finetune
    from stocklora.volatility.prior import fit_prior

    # Enough days behind the training part to be validated and tested on as any run is; the real test is on others.
    first = pd.Timestamp(arguments.first_day or "1900-01-01")
    prices = {
        name: frame[(frame.index < days.test_from) & (frame.index >= first)] for name, frame in days.prices.items()
        if days.part[name] == "train"
    }  # fmt: skip
    prices = {name: frame for name, frame in prices.items() if len(frame) > 2 * WARM_DAYS}
    validation_from, test_from = (days.test_from - pd.Timedelta(days=count) for count in (180, 60))
    with tempfile.TemporaryDirectory() as scratch:
        prior_path = Path(scratch) / "prior.json"
        fit_prior({"train": prices}, validation_from, 3).save(prior_path)
        settings = taught_settings(form, layers, prior_path, (validation_from, test_from), arguments)
        base = BaseModel(arguments.model_path)
        if weights == "random":
            path = random_model(base, settings, Path(scratch) / "model")
            settings = with_fields(settings, model_path=path)
        started = time.process_time()
        run = finetune(prices, with_fields(settings, save_dir=Path(scratch) / "run"), alone=True)
        seconds = time.process_time() - started
        facts = {"prompt": form, "weights": weights, "layers": layers, "cpu_seconds": round(seconds),
                 "best_epoch": run.outcome.best_epoch,
                 "validation": [entry["validation_ratio"] for entry in run.outcome.history],
                 "training_days": sum(len(parts["train"]) for parts in run.data.origins.values())}  # fmt: skip
        row = facts | {
            "later_years": held_out_scores(days, run, "test"),
            "same_years": held_out_scores(days, run, "validation", first),
        }
    say(", ".join(f"{name} {value}" for name, value in row.items()))
    return row


def taught_settings(form: str, layers: int, prior: Path, dates: tuple[Any, Any], arguments: argparse.Namespace) -> Any:
    from stocklora.finetune.settings import TrainLoraSettings

    return TrainLoraSettings(
        model_path=arguments.model_path, backbone_layers=layers, prompt=form, window_size=WARM_DAYS, scale="ewma",
        prior=str(prior), teacher=Path("prior"), teacher_epochs=arguments.epochs,
        epochs=arguments.epochs + arguments.outcome_epochs, patience=99, required_gain=0.0,
        method=arguments.method, batch_size=arguments.batch_size,
        simulated_series=arguments.simulated_series, lora_rank=arguments.lora_rank,
        learning_rate=arguments.learning_rate, head_learning_rate=arguments.head_learning_rate,
        max_tokens_per_sequence=arguments.max_tokens_per_sequence, seed=arguments.seed, device="cpu",
        validation_from=f"{dates[0]:%Y-%m-%d}", test_from=f"{dates[1]:%Y-%m-%d}",
    )  # fmt: skip


def with_fields(settings: Any, **fields: Any) -> Any:
    from dataclasses import replace

    return replace(settings, **fields)


def held_out_scores(days: Days, run: Any, part: str, first: Any = None) -> dict[str, Any]:
    """R² of the log scale against the prior's, and losses over EWMA's, on tickers that nothing saw.

    Args:
        part: ``test``, of years that nothing saw either, or ``validation``, of the years that the others trained on.
        first: day of the latter.
    """
    import numpy as np
    import pandas as pd

    from stocklora.finetune.reading import forecasts_at
    from stocklora.metrics.scores import BASIS_POINTS, QUANTILE_LEVELS, pinball_loss, width_explained
    from stocklora.metrics.significance import relative_mean_interval
    from stocklora.prices.tables import log_returns_ahead

    origins: dict[str, range] = {}
    for name, frame in days.prices.items():
        rows = days.origins(name)
        start = max(rows.start, 0 if first is None else int(frame.index.searchsorted(first)))
        if days.part[name] == part and start < rows.stop:
            origins[name] = range(start, rows.stop)
    prices = {name: days.prices[name] for name in origins}

    def at(values: Mapping[str, Any]) -> Any:
        return np.concatenate([values[name][list(rows)] for name, rows in origins.items()])

    ewma, har = at(days.scales["ewma"]), at(days.scales["har"])
    forecasts = {
        "ewma": run.data.baselines["ewma"].quantiles(ewma),
        "har": har[:, :, None] * days.tables["har"][None],
        "prior": forecasts_at(run.data.baselines["prior"], prices, origins),
        "model": run.forecaster.quantiles(run.forecaster.packed_examples(prices, origins), calibrated=False),
    }
    returns = at({name: log_returns_ahead(frame["Close"].to_numpy(), 3) for name, frame in prices.items()})
    weight = weight_on_validation(run)
    forecasts["average"] = weight * forecasts["model"] + (1.0 - weight) * forecasts["prior"]
    dates = at({name: frame.index.to_numpy() for name, frame in prices.items()})
    levels = np.array(QUANTILE_LEVELS)
    daily = {
        name: pd.Series(BASIS_POINTS * pinball_loss(returns, quantiles, levels).mean(axis=1)).groupby(dates).mean()
        for name, quantiles in forecasts.items()
    }
    ratios = {
        name: [float(losses.mean() / daily["ewma"].mean()),
               *relative_mean_interval(losses.to_numpy(), daily["ewma"].to_numpy(), least_block_days=3)]
        for name, losses in daily.items()
    }  # fmt: skip
    over_prior = relative_mean_interval(daily["average"].to_numpy(), daily["prior"].to_numpy(), least_block_days=3)
    start, prior_quantiles = forecasts["ewma"], forecasts["prior"]
    return {
        "origins": len(returns),
        "days": len(daily["ewma"]),
        "loss_over_ewma": ratios,
        "share_of_har_gain": (1.0 - ratios["model"][0]) / (1.0 - ratios["har"][0]),
        "r2_of_prior_over_start": width_explained(forecasts["model"], prior_quantiles, start),
        "r2_of_prior_over_start_by_har": width_explained(forecasts["har"], prior_quantiles, start),
        "r2_of_har_over_start": width_explained(forecasts["model"], forecasts["har"], start),
        "r2_of_prior": width_explained(forecasts["model"], prior_quantiles, np.ones_like(start) * start[:1]),
        "average_weight": weight,
        "average_over_prior": [float(daily["average"].mean() / daily["prior"].mean()), *over_prior],
    }


def weight_on_validation(run: Any) -> float:
    """Of the model's quantiles in an average with the prior's: the one with the lowest loss on validation days."""
    from stocklora.metrics.scores import pinball_loss

    data = run.data
    origins = {name: parts["validation"] for name, parts in data.origins.items() if parts["validation"]}
    examples = run.forecaster.packed_examples({name: data.prices[name] for name in origins}, origins)
    model, returns = run.forecaster.quantiles(examples, calibrated=False), data.returns_of("validation")
    prior = data.forecasts_of(data.baselines["prior"], "validation")

    def loss(weight: float) -> float:
        return float(pinball_loss(returns, weight * model + (1.0 - weight) * prior, data.levels).mean())

    return min((0.0, 0.1, 0.25, 0.5, 0.75, 1.0), key=loss)


if __name__ == "__main__":
    sys.exit(main())
