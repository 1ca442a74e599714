"""Peers: what they know at an origin, agreement with their packages and with formulas, and honest stand-ins."""

from __future__ import annotations

import importlib
import re
import sys
import types
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from stocklora.baselines import classical as peers
from stocklora.baselines.classical import PACKAGES, PEERS, WINDOW_DAYS, peer_quantiles, require_peer
from stocklora.cli.console import UserError
from stocklora.metrics.scores import QUANTILE_LEVELS, pinball_loss
from stocklora.prices.tables import log_returns_ahead, read_prices
from stocklora.runtime.files import bundled_folder

LEVELS = np.array(QUANTILE_LEVELS)
STATSFORECAST = ("autoarima", "autoets", "autotheta")
FITTED = (*STATSFORECAST, "garch")


@pytest.fixture(params=FITTED)
def peer(request):
    pytest.importorskip(PACKAGES[request.param][0])
    return request.param


@pytest.fixture
def garch():
    return pytest.importorskip("arch")


@pytest.fixture
def models():
    return pytest.importorskip("statsforecast.models")


def walk(days: int, seed: int = 0, volatility: float = 0.02) -> np.ndarray:
    return 50.0 * np.exp(np.cumsum(volatility * np.random.default_rng(seed).standard_normal(days)))


def clustered(days: int, seed: int = 0, alpha: float = 0.08, momentum: float = 0.0) -> np.ndarray:
    """Closes whose returns follow a GARCH(1,1) with t(6) shocks, 2% a day in the long run, and an AR(1) if asked."""
    draw = np.random.default_rng(seed)
    shocks = draw.standard_t(6, days) * np.sqrt(4 / 6)
    variance, last, returns = 4e-4, 0.0, np.empty(days)
    for day in range(days):
        shock = np.sqrt(variance) * shocks[day]
        variance = 0.02 * 4e-4 + alpha * shock**2 + (0.98 - alpha) * variance
        last = returns[day] = momentum * last + shock
    return 50.0 * np.exp(np.cumsum(returns))


def lively(days: int) -> np.ndarray:
    """Closes from which every peer forecasts something that moves with the last close."""
    return clustered(days, alpha=0.3, momentum=0.4)


# --- what is known at an origin ---------------------------------------------------------------------------


def test_later_closes_change_nothing(peer):
    close, origins, last_known = lively(130), range(110, 126), 119
    options = {"horizon": 3, "levels": LEVELS, "refit_every": 8, "least_days": 80, "max_days": 100}
    before = peer_quantiles(peer, close, origins, **options)
    changed = close.copy()
    changed[last_known + 1 :] *= np.linspace(1.3, 3.0, len(close) - last_known - 1)
    after = peer_quantiles(peer, changed, origins, **options)
    known = last_known - origins.start + 1
    assert before.fallbacks == after.fallbacks == 0
    np.testing.assert_array_equal(before.quantiles[:known], after.quantiles[:known])
    # the day after sees the change, and so do all that follow
    assert (np.abs(before.quantiles - after.quantiles)[known:].max(axis=(1, 2)) > 1e-5).all()


def test_the_close_of_the_origin_is_used(peer):
    close = lively(115)
    options = {"horizon": 1, "levels": LEVELS, "least_days": 80}
    base = peer_quantiles(peer, close, [110, 114], **options).quantiles
    close[114] *= 1.05
    moved = peer_quantiles(peer, close, [110, 114], **options).quantiles
    np.testing.assert_array_equal(base[0], moved[0])
    assert np.abs(base[1] - moved[1]).max() > 1e-5


@pytest.mark.parametrize("name", ["autoets", "garch"])
def test_refit_days_do_not_depend_on_the_other_origins(name):
    pytest.importorskip(PACKAGES[name][0])
    close = lively(130)
    options = {"horizon": 2, "levels": LEVELS, "refit_every": 10, "least_days": 80}
    every = peer_quantiles(name, close, range(110, 130), **options).quantiles
    some = [0, 3, 9, 10, 19]
    chosen = peer_quantiles(name, close, [110 + index for index in some], **options).quantiles
    np.testing.assert_array_equal(every[some], chosen)


@pytest.mark.parametrize(("max_days", "starts"), [(None, [0, 0, 0]), (260, [41, 51, 61])])
def test_windows_and_refit_days(monkeypatch, garch, max_days, starts):
    close, fits, forecasts = walk(400), [], []

    def fit(path, horizon, levels):
        fits.append(path)
        return lambda later: forecasts.append(later) or np.tile(levels, (horizon, 1))

    monkeypatch.setattr(peers, "_garch", fit)
    peer_quantiles("garch", close, range(300, 325), 1, LEVELS, refit_every=10, max_days=max_days)
    for path, start, day in zip(fits, starts, (300, 310, 320), strict=True):
        np.testing.assert_allclose(path, np.log(close[start : day + 1] / close[start]))
    for index, path in enumerate(forecasts):
        start = starts[index // 10]  # the window's start stays until the next refit
        np.testing.assert_allclose(path, np.log(close[start : 301 + index] / close[start]))
    assert len(forecasts) == 25


def test_the_unit_of_the_price_does_not_matter(peer):
    # Adjusted closes are divided by every later split: here by a power of two, so that the division is exact.
    close = lively(120)
    options = {"horizon": 3, "levels": LEVELS, "least_days": 80}
    one = peer_quantiles(peer, close, range(110, 120), **options).quantiles
    np.testing.assert_array_equal(one, peer_quantiles(peer, close / 64.0, range(110, 120), **options).quantiles)


# --- GARCH ------------------------------------------------------------------------------------------------


def fitted_garch(arch, close: np.ndarray):
    returns = 100.0 * np.diff(np.log(close))
    return arch.arch_model(returns, mean="Constant", vol="GARCH", p=1, q=1, dist="t", rescale=False).fit(disp="off")


def test_garch_agrees_with_arch_on_the_refit_day(garch):
    close = clustered(700)
    ours = peer_quantiles("garch", close, [650], 3, LEVELS).quantiles[0]
    result = fitted_garch(garch, close[:651])
    forecast = result.forecast(horizon=3)
    deviation = np.sqrt(np.cumsum(forecast.variance.to_numpy()[-1]))
    mean = np.cumsum(forecast.mean.to_numpy()[-1])
    standard = result.model.distribution.ppf(LEVELS, result.params[["nu"]])
    np.testing.assert_allclose(100.0 * ours, mean[:, None] + deviation[:, None] * standard, rtol=1e-5, atol=1e-5)


def test_garch_keeps_its_parameters_and_filters_on(garch):
    close = clustered(700)
    close[655:] *= 1.15  # a jump after the fit: the variance must take it up, the parameters must not
    ours = peer_quantiles("garch", close, range(650, 670), 3, LEVELS, refit_every=60).quantiles
    params = fitted_garch(garch, close[:651]).params
    for origin in (651, 655, 669):
        # arch itself, given the same parameters and the returns so far; its start has died away by then
        model = garch.arch_model(100.0 * np.diff(np.log(close[: origin + 1])), dist="t", rescale=False)
        variance = model.fix(params).forecast(horizon=3).variance.to_numpy()[-1]
        spread = ours[origin - 650, :, -1] - ours[origin - 650, :, 0]
        unit = stats.t.ppf(0.95, params["nu"]) * np.sqrt((params["nu"] - 2) / params["nu"])
        np.testing.assert_allclose(100.0 * spread, 2.0 * unit * np.sqrt(np.cumsum(variance)), rtol=1e-5)
    widths = ours[:, 0, -1] - ours[:, 0, 0]
    assert widths[5] > 1.5 * widths[4]  # origin 655 has seen the jump, 654 has not


def test_garch_quantiles_of_three_days_are_near_those_of_simulated_paths(garch):
    close = clustered(1200, seed=1)
    ours = 100.0 * peer_quantiles("garch", close, [1199], 3, LEVELS).quantiles[0, 2]
    result = fitted_garch(garch, close[200:])
    mean, omega, alpha, beta, freedom = result.params
    draw = np.random.default_rng(0)
    variance = np.full(400_000, result.forecast(horizon=1).variance.to_numpy()[-1, 0])
    total = np.zeros(len(variance))
    for _ in range(3):
        shock = np.sqrt(variance * (freedom - 2) / freedom) * draw.standard_t(freedom, len(variance))
        total += mean + shock
        variance = omega + alpha * shock**2 + beta * variance
    simulated = np.quantile(total, LEVELS)
    assert np.abs(ours - simulated).max() < 0.05 * np.ptp(simulated) / 2


def test_garch_in_a_price_that_hardly_moves(garch):
    # A thousandth of the returns: arch refuses to fit those in percent, so they are fitted in larger units.
    calm = np.exp(np.log(clustered(400)) / 1000.0)
    small = peer_quantiles("garch", calm, [390], 3, LEVELS)
    large = peer_quantiles("garch", clustered(400), [390], 3, LEVELS)
    assert small.fallbacks == 0
    np.testing.assert_allclose(1000.0 * small.quantiles, large.quantiles, rtol=0.02, atol=2e-4)


# --- statsforecast ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STATSFORECAST)
def test_levels_are_interval_ends_of_the_package(models, name):
    close, levels = walk(320), [0.05, 0.4, 0.5, 0.9]  # not symmetrical
    ours = peer_quantiles(name, close, [310], 3, levels).quantiles[0]
    path = np.log(close[:311] / close[0])
    kind = {"autoarima": models.AutoARIMA, "autoets": models.AutoETS, "autotheta": models.AutoTheta}[name]
    theirs = kind(season_length=1).forecast(y=path, h=3, level=[20, 80, 90])
    expected = np.stack([theirs[key] for key in ("lo-90", "lo-20", "mean", "hi-80")], axis=1) - path[-1]
    np.testing.assert_allclose(ours, np.sort(expected, axis=1), atol=1e-6)


@pytest.mark.parametrize("name", ["autoarima", "autoets"])
def test_a_random_walk_gets_a_random_walks_quantiles(models, name):
    quantiles = peer_quantiles(name, walk(900, seed=3), [899], 3, LEVELS, max_days=900).quantiles[0]
    expected = 0.02 * np.sqrt([[1], [2], [3]]) * stats.norm.ppf(LEVELS)
    assert np.abs(quantiles - expected).max() < 0.12 * expected.max()


def test_ets_keeps_its_smoothing_and_updates_its_level(models):
    noise = np.random.default_rng(5).standard_normal((2, 420))
    close = 50.0 * np.exp(np.cumsum(0.005 * noise[0]) + 0.02 * noise[1])  # level plus noise: smoothing pays
    fit = models.AutoETS(season_length=1).fit(np.log(close[:401] / close[0])).model_
    assert fit["components"] == "ANNN"
    alpha, level = fit["par"][0], fit["states"][-1, 0]
    assert 0.05 < alpha < 0.9
    ours = peer_quantiles("autoets", close, range(400, 420), 2, [0.25, 0.5, 0.75]).quantiles
    for origin in range(400, 420):
        value = np.log(close[origin] / close[0])
        if origin > 400:
            level = alpha * value + (1.0 - alpha) * level
        np.testing.assert_allclose(ours[origin - 400, :, 1], level - value, atol=1e-9)


# --- where there is no forecast ---------------------------------------------------------------------------


def naive_quantiles(close: np.ndarray, horizon: int) -> np.ndarray:
    rows = [np.quantile(np.log(close[h:] / close[:-h])[: len(close) - horizon], LEVELS) for h in range(1, horizon + 1)]
    return np.array(rows) - np.array(rows)[:, 4:5]


def test_a_short_series_falls_back_until_there_are_enough_days(peer, capsys):
    close = walk(120)
    forecast = peer_quantiles(peer, close, range(85, 110), 3, LEVELS, refit_every=10, least_days=95, ticker="XYZ")
    # Refit days 85, 95, 105: with 86 days too few, with 96 enough.
    assert forecast.fallbacks == 10
    for index in range(10):
        expected = naive_quantiles(close[: 86 + index], 3)
        np.testing.assert_allclose(forecast.quantiles[index], expected, atol=2e-4)
    assert (forecast.quantiles[:10, :, 4] == 0.0).all()
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith(f"warning: {peer} has no forecast at 10 of 25 origins of XYZ (fewer than 95 days: 10)")


def test_a_constant_price_falls_back(peer, capsys):
    forecast = peer_quantiles(peer, np.full(320, 10.0), range(300, 320), 3, LEVELS)
    assert forecast.fallbacks == 20
    assert np.abs(forecast.quantiles).max() < 1e-6
    assert "never moved: 20" in capsys.readouterr().err


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0, -1.0])
def test_a_close_that_is_no_price_falls_back_from_there_on(garch, capsys, bad):
    close = clustered(330)
    expected = peer_quantiles("garch", close, range(300, 330), 3, LEVELS).quantiles
    close[310] = bad
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # our one line is enough
        forecast = peer_quantiles("garch", close, range(300, 330), 3, LEVELS)
    assert forecast.fallbacks == 20
    np.testing.assert_array_equal(forecast.quantiles[:10], expected[:10])
    assert np.isfinite(forecast.quantiles).all()
    assert capsys.readouterr().err.count("\n") == 1


def test_no_past_at_all_gives_no_spread_rather_than_an_error(garch, capsys):
    forecast = peer_quantiles("garch", walk(3), [0, 1, 2], 3, LEVELS)
    assert forecast.fallbacks == 3
    assert np.abs(forecast.quantiles[0]).max() < 1e-6


def test_a_fit_that_raises_falls_back_and_says_why(models, monkeypatch, capsys):
    def fit(self, y, X=None):
        raise Exception("no model able to be fitted")

    monkeypatch.setattr(models.AutoETS, "fit", fit)
    assert peer_quantiles("autoets", walk(310), range(300, 310), 3, LEVELS).fallbacks == 10
    assert "the fit failed with Exception: no model able to be fitted: 10" in capsys.readouterr().err


def test_a_fit_that_did_not_converge_falls_back(garch, monkeypatch, capsys):
    base = importlib.import_module("arch.univariate.base")
    monkeypatch.setattr(base.ARCHModelResult, "convergence_flag", property(lambda self: 9))
    assert peer_quantiles("garch", walk(310), range(300, 310), 3, LEVELS).fallbacks == 10
    assert "did not converge: 10" in capsys.readouterr().err


@pytest.mark.parametrize("value", [np.nan, 0.0])
def test_a_forecast_that_cannot_be_one_falls_back(models, monkeypatch, capsys, value):
    def forward(self, y, h, level=None, **_):
        return {"mean": np.full(h, value), **{f"{end}-{x}": np.full(h, value) for end in ("lo", "hi") for x in level}}

    monkeypatch.setattr(models.AutoTheta, "forward", forward)
    assert peer_quantiles("autotheta", walk(310), range(300, 310), 3, LEVELS).fallbacks == 10
    assert "not finite or has no spread: 10" in capsys.readouterr().err


def test_intervals_that_cross_are_put_in_order(models, monkeypatch):
    def forward(self, y, h, level=None, **_):
        ends = {"mean": 0.01, "lo-20.0": 0.012, "hi-20.0": 0.015, "lo-80.0": -0.03, "hi-80.0": 0.04}
        return {key: y[-1] + np.full(h, value) for key, value in ends.items()}

    monkeypatch.setattr(models.AutoTheta, "forward", forward)
    quantiles = peer_quantiles("autotheta", walk(310), [300], 2, [0.1, 0.4, 0.5, 0.6, 0.9]).quantiles[0]
    np.testing.assert_allclose(quantiles, np.tile([-0.03, 0.01, 0.012, 0.015, 0.04], (2, 1)))


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    volatility=st.sampled_from([1e-6, 1e-3, 0.02, 0.5]),
    still=st.sampled_from([0.0, 0.5, 0.98]),
    jump=st.sampled_from([1.0, 0.1, 7.0]),
    name=st.sampled_from(["autoets", "autotheta", "garch"]),
)
def test_any_price_gets_quantiles(seed, volatility, still, jump, name):
    pytest.importorskip(PACKAGES[name][0])
    draw = np.random.default_rng(seed)
    close = 20.0 * np.exp(np.cumsum(volatility * draw.standard_normal(150) * (draw.random(150) >= still)))
    close[draw.integers(60, 150) :] *= jump
    forecast = peer_quantiles(name, close, range(120, 150, 3), 3, LEVELS, refit_every=15, least_days=60)
    assert forecast.quantiles.shape == (10, 3, len(LEVELS))
    assert np.isfinite(forecast.quantiles).all()
    assert (np.diff(forecast.quantiles, axis=2) >= 0.0).all()
    assert (np.ptp(forecast.quantiles, axis=2) > 0.0).all()


# --- manners ----------------------------------------------------------------------------------------------


def test_no_chatter(peer, capfd):
    close = np.round(clustered(310), 0)  # ties and coarse moves: the packages would like to say something
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert peer_quantiles(peer, close, range(300, 306), 3, LEVELS, refit_every=3).fallbacks == 0
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", PEERS)
def test_a_missing_package_names_the_command(monkeypatch, name):
    package, command = PACKAGES[name]
    assert command in ("pip install '.[peers]'", f"pip install {package}")

    def missing(module):
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(UserError, match=f"^{name} needs the package {package} .*; run: {re.escape(command)}$"):
        require_peer(name)
    with pytest.raises(UserError, match=re.escape(command)):  # not taken for a fit that failed
        peer_quantiles(name, walk(310), [300], 3, LEVELS)


def test_an_unknown_peer_is_named_with_those_there_are():
    with pytest.raises(UserError, match="'prophet'; choose from autoarima, autoets, autotheta, garch, fracast"):
        require_peer("prophet")


def test_every_peer_has_a_window():
    assert tuple(WINDOW_DAYS) == PEERS


@pytest.mark.parametrize(
    ("origins", "levels", "options"),
    [
        ([300, 300], LEVELS, {}),
        ([-1, 300], LEVELS, {}),
        ([300, 310], LEVELS, {}),
        ([300], [0.5, 0.1], {}),
        ([300], [0.5, 1.0], {}),
        ([300], LEVELS, {"refit_every": 0}),
        ([300], LEVELS, {"max_days": 249}),
    ],
)
def test_arguments_that_make_no_sense(garch, origins, levels, options):
    with pytest.raises(ValueError):
        peer_quantiles("garch", walk(310), origins, 3, levels, **options)


def test_no_origins_no_forecasts(garch):
    assert peer_quantiles("garch", walk(310), range(300, 300), 3, LEVELS).quantiles.shape == (0, 3, 9)


# --- fracast ----------------------------------------------------------------------------------------------


def test_fracast_levels_beyond_its_own(monkeypatch):
    """Given a normal distribution at levels 0.1 to 0.9, the other levels come out as that normal's."""
    seen = []

    class Model:
        quantiles = tuple(np.arange(1, 10) / 10)

        @staticmethod
        def from_pretrained(**_):
            return Model()

        def forecast(self, context, *, horizon):
            seen.append(context)
            return 0.01 + 0.02 * np.sqrt(np.arange(1, horizon + 1))[:, None] * stats.norm.ppf(self.quantiles)

    monkeypatch.setitem(sys.modules, "fracast", types.SimpleNamespace(FracastModel=Model))
    peers._fracast_model.cache_clear()
    close = walk(310)
    forecast = peer_quantiles("fracast", close, range(300, 310), 3, LEVELS)
    peers._fracast_model.cache_clear()
    expected = 0.01 + 0.02 * np.sqrt([[1], [2], [3]]) * stats.norm.ppf(LEVELS)
    np.testing.assert_allclose(forecast.quantiles, np.broadcast_to(expected, (10, 3, 9)), atol=1e-12)
    for index, context in enumerate(seen):
        np.testing.assert_allclose(context, np.log(close[: 301 + index] / close[300 + index]))


def test_fracast_itself():
    pytest.importorskip("fracast")
    close = walk(306)
    forecast = peer_quantiles("fracast", close, range(300, 304), 3, LEVELS)
    assert forecast.fallbacks == 0
    assert 0.02 < np.ptp(forecast.quantiles, axis=2).mean() < 0.3  # 2% a day: about 0.09
    close[302:] *= 1.5
    np.testing.assert_array_equal(
        peer_quantiles("fracast", close, range(300, 304), 3, LEVELS).quantiles[:2], forecast.quantiles[:2]
    )


# --- real prices ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def four():
    prices = read_prices(bundled_folder() / "us_tech_2000_2013.csv.gz")
    return {ticker: prices[ticker]["Close"] for ticker in ("AAPL", "GOOG", "IBM", "MSFT")}


@pytest.mark.parametrize(
    ("name", "options", "pinball_bp", "tolerance"),
    [
        ("garch", {"max_days": 10_000}, 50.27, 0.03),  # on all days before, as the known figure
        ("autoets", {}, 50.75, 0.3),
        ("autotheta", {}, 50.65, 0.3),
    ],
)
def test_known_pinball_losses_on_four_stocks(four, name, options, pinball_bp, tolerance):
    # Measured independently before this project began: every origin from 2012 on, mean over three days.
    pytest.importorskip(PACKAGES[name][0])
    losses = []
    for series in four.values():
        close = series.to_numpy()
        origins = range(int(series.index.searchsorted(np.datetime64("2012-01-01"))), len(close) - 3)
        forecast = peer_quantiles(name, close, origins, 3, LEVELS, **options)
        assert forecast.fallbacks == 0
        losses.append(pinball_loss(log_returns_ahead(close, 3)[list(origins)], forecast.quantiles, LEVELS))
    assert 1e4 * np.concatenate(losses).mean() == pytest.approx(pinball_bp, abs=tolerance)
