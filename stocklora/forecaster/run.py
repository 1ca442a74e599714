"""One run of ``framework_llm.py``: prices and weights files -> the next closes, once or whenever a bar is complete."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stocklora.base_models.folders import check_model_folder
from stocklora.cli.console import UserError, say, warn
from stocklora.forecaster.explain import explain, say_more
from stocklora.forecaster.live import Prices, price_feed, watch
from stocklora.forecaster.predictions import print_forecast, write_predictions
from stocklora.forecaster.settings import ForecastSettings, check_weights_path
from stocklora.ledger.record import Maker, record_forecast
from stocklora.prices.quality import short_form
from stocklora.runtime.machine import choose_device, choose_dtype, peak_memory_mb
from stocklora.volatility.scales import VolatilityScale

if TYPE_CHECKING:
    from stocklora.forecaster.ensemble import Ensemble


def forecast_prices(settings: ForecastSettings) -> int:
    """Forecast what the settings name, and with ``watch`` go on until Ctrl-C.

    Returns:
        The exit code: 1 where some of the tickers did not come.

    Raises:
        UserError: prices or weights that cannot be had, or that do not go together.
    """
    feed = price_feed(settings)
    prices = feed.first()
    settings.check_price(prices)
    for weights, model in settings.members:
        check_weights_path(weights)
        check_model_folder(model)
    say(f"prices: {short_form(prices)}")

    from stocklora.forecaster.ensemble import Ensemble  # only now: torch takes seconds, and prices may be missing

    device = choose_device(settings.device)
    ensemble = Ensemble(
        settings.members, settings.ensemble, device, choose_dtype(settings.dtype, device), settings.trust_remote_code,
        shares=settings.shares,
    )  # fmt: skip
    check_window(settings, ensemble)
    check_market(ensemble, [*prices, *feed.market_only])

    def forecast(prices: Prices, news: str | None = None) -> None:
        rows = ensemble.forecast(prices, feed.market_only)
        write_predictions(settings.output, rows)
        if news is None:
            print_ensemble_facts(ensemble)
        else:
            say(f"\n{news}")
        print_forecast(rows)
        say(f"saved: {settings.output}")
        record_forecast(settings.ledger, rows, {**prices, **feed.market_only}, maker_of(ensemble))
        if settings.plot is not None:
            plot_each_ticker(settings.plot, prices, rows)
        say_more(rows, settings, lambda: explain_by_ensemble(ensemble, rows, {**prices, **feed.market_only}))

    forecast(prices)
    if settings.watch is None:
        return feed.exit_code()
    return watch(feed, prices, settings.watch, forecast)


def maker_of(ensemble: Ensemble) -> Maker:
    """What the ledger is told of who forecasts: the files, the hash of what was read from them, and their prior."""
    names = " and ".join(
        f"{content.spec.base_model['name']} with {path}"
        for (path, _), content in zip(ensemble.members, ensemble.weights, strict=True)
    )
    days = [content.training["prior"]["last_day"] for content in ensemble.weights if content.training.get("prior")]
    return Maker(names, ensemble.sha256, max(days, default=None))


def explain_by_ensemble(ensemble: Ensemble, rows: list[dict[str, Any]], prices: Prices) -> list[dict[str, Any]]:
    """Why the forecasts of the one member are as wide as they are; ``prices`` of all tickers that make its markets."""
    (spec,) = ensemble.each(lambda forecaster: forecaster.spec)
    scale = VolatilityScale.from_dict(spec.scale)
    ends = [spec.levels.index(level) for level in (0.1, 0.9)]
    table = np.array(spec.table)[:, ends]
    return explain(rows, prices, scale, scale.markets_of(prices), table)


def check_window(settings: ForecastSettings, ensemble: Ensemble) -> None:
    """Refuse a ``--window_size`` that a model was not trained with.

    Raises:
        UserError: naming the weights file.
    """
    for (path, _), content in zip(ensemble.members, ensemble.weights, strict=True):
        trained_window = content.spec.window_size
        if settings.window_size not in (None, trained_window):
            raise UserError(
                f"--window_size {settings.window_size}: {path} was trained with a window of {trained_window} days; "
                f"leave the flag out or train again"
            )


def check_market(ensemble: Ensemble, tickers: list[str]) -> None:
    """Warn where weights read a market of many tickers and are given far fewer: that is another market."""
    for (path, _), content in zip(ensemble.members, ensemble.weights, strict=True):
        spec = content.spec
        trained = len(content.training.get("data", {}).get("tickers", []))
        if (
            (spec.scale["kind"] == "harx" or "market" in spec.indicators)
            and trained >= 5
            and 2 * len(tickers) < trained
        ):
            warn(
                f"{path} was trained on {trained} tickers and reads their market every day; with {len(tickers)} its "
                f"error bars may be off: give the others' prices too and choose by --tickers"
            )


def print_ensemble_facts(ensemble: Ensemble) -> None:
    """Print what forecasts, and how it did on the test days of its training."""
    from stocklora.forecaster.ensemble import trainable_parameters

    weights = ensemble.weights
    memory = f"peak memory: {peak_memory_mb(ensemble.device.type):,.0f} MB ({ensemble.device.type})"
    if len(weights) > 1:
        say(f"{ensemble.how} of the quantiles of {len(weights)} models:")
        for (path, _), content in zip(ensemble.members, weights, strict=True):
            spec, model, naive = content.spec, *(content.training["test_scores"][name] for name in ("model", "naive"))
            say(
                f"  {path}: {spec.base_model['name']}, window {spec.window_size}, prompt {spec.prompt}, "
                f"{trainable_parameters(content):,} trainable parameters; test pinball loss "
                f"{model['pinball_bp']:.2f} bp, of the last close {naive['pinball_bp']:.2f} bp (in training's "
                f"{model['origins']} test days)"
            )
        say(memory)
        return
    say(f"trainable parameters: {trainable_parameters(weights[0]):,}")
    say(memory)
    if averaged := weights[0].training.get("averaged"):
        say(f"average of the weights of {len(averaged)} models, itself not scored; the test pinball losses of each:")
        for part in averaged:
            say(f"  {part['share']:.3g} of {part['path']}: {part['test_scores']['model']['pinball_bp']:.2f} bp")
        return
    for score_name, label in (("model", "this model"), ("naive", "the last close")):
        score = weights[0].training["test_scores"][score_name]
        say(f"test pinball loss of {label}: {score['pinball_bp']:.2f} bp (in training's {score['origins']} test days)")


def plot_each_ticker(path: Path, prices: Prices, rows: list[dict[str, Any]]) -> None:
    """Draw each ticker's forecast; of several tickers each into a file of its own."""
    from stocklora.plots.forecasts import plot_forecast

    for ticker, frame in prices.items():
        own = [row for row in rows if row["Ticker"] == ticker]
        if not own:  # too few days: said already
            continue
        name = ticker.replace("/", "-")
        target = path if len(prices) == 1 else path.with_name(f"{path.stem}_{name}{path.suffix}")
        plot_forecast(frame, own, target)
        say(f"chart: {target}")
