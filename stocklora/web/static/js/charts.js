// Small pictures of our own, and the candles with their fan by TradingView's Lightweight Charts.

import { s } from "./dom.js";
import * as library from "../vendor/lightweight-charts.standalone.production.mjs";

/** Closes from 0 to 100 as a line, with the last one marked. */
export function sparkline(values, width = 108, height = 26) {
  if (values.length < 2) return s("svg", { width, height, "aria-hidden": "true" });
  const x = (place) => 1 + (place * (width - 6)) / (values.length - 1);
  const y = (value) => 3 + ((100 - value) * (height - 6)) / 100;
  const points = values.map((value, place) => `${x(place).toFixed(1)} ${y(value).toFixed(1)}`);
  const last = values.length - 1;
  const way = values[last] >= values[0] ? "up" : "down";
  return s(
    "svg",
    { width, height, viewBox: `0 0 ${width} ${height}`, class: `spark ${way}`, "aria-hidden": "true" },
    s("path", { d: `M${points.join("L")}`, fill: "none", "stroke-width": 1.3, "stroke-linejoin": "round" }),
    s("circle", { cx: x(last), cy: y(values[last]), r: 1.9, stroke: "none" }),
  );
}

const nice = (span) => {
  const power = 10 ** Math.floor(Math.log10(span || 1));
  return [1, 2, 5, 10].map((step) => step * power).find((step) => step >= span / 1.0001) ?? power;
};

/** Lines over a common x: `[{name, points: [[x, y], ...], kind}]`, kind "main", "second" or "level". */
export function lineChart(series, { width = 640, height = 220, xLabel = "", yDigits = 3, label = "" } = {}) {
  const shown = series.map((line) => ({ ...line, points: line.points.filter(([, y]) => Number.isFinite(y)) })).filter((line) => line.points.length);
  const all = shown.flatMap((line) => line.points);
  const chart = s("svg", { viewBox: `0 0 ${width} ${height}`, class: "lines", role: "img", "aria-label": label });
  if (!all.length) return chart;
  const [left, right, top, bottom] = [56, 12, 10, 26];
  const xs = all.map(([x]) => x);
  let [low, high] = [Math.min(...all.map(([, y]) => y)), Math.max(...all.map(([, y]) => y))];
  if (high - low < 1e-9) [low, high] = [low - Math.abs(low || 1) * 0.01, high + Math.abs(high || 1) * 0.01];
  const pad = 0.06 * (high - low);
  [low, high] = [low - pad, high + pad];
  const [first, last] = [Math.min(...xs), Math.max(...xs)];
  const x = (value) => left + ((value - first) / (last - first || 1)) * (width - left - right);
  const y = (value) => top + ((high - value) / (high - low)) * (height - top - bottom);
  const step = nice((high - low) / 4);
  for (let tick = Math.ceil(low / step) * step; tick <= high; tick += step) {
    chart.append(
      s("line", { x1: left, x2: width - right, y1: y(tick), y2: y(tick), class: "grid" }),
      s("text", { x: left - 8, y: y(tick) + 3.5, "text-anchor": "end" }, tick.toFixed(step < 0.001 ? 5 : yDigits)),
    );
  }
  const stepX = Math.max(1, nice((last - first) / 6));
  for (let tick = Math.ceil(first / stepX) * stepX; tick <= last; tick += stepX) {
    chart.append(s("text", { x: x(tick), y: height - 8, "text-anchor": "middle" }, String(Math.round(tick))));
  }
  if (xLabel) chart.append(s("text", { x: width - right, y: height - 8, "text-anchor": "end" }, xLabel));
  for (const line of shown) {
    const points = line.points.map(([px, py]) => `${x(px).toFixed(1)} ${y(py).toFixed(1)}`);
    chart.append(s("path", { d: `M${points.join("L")}`, class: `line ${line.kind}` }));
    if (line.points.length < 40) for (const [px, py] of line.points) chart.append(s("circle", { cx: x(px), cy: y(py), r: 2.4, class: `dot ${line.kind}` }));
  }
  return chart;
}

/** Shares found with their intervals beside what was promised: `[{wanted, found, low, high}]`. */
export function shareChart(shares, label) {
  const [width, row, left, right] = [420, 34, 52, 16];
  const x = (share) => left + share * (width - left - right);
  const height = row * shares.length + 24;
  const chart = s("svg", { viewBox: `0 0 ${width} ${height}`, class: "shares", role: "img", "aria-label": label });
  for (const tick of [0, 0.25, 0.5, 0.75, 1]) {
    chart.append(
      s("line", { x1: x(tick), x2: x(tick), y1: 4, y2: height - 20, class: "grid" }),
      s("text", { x: x(tick), y: height - 6, "text-anchor": "middle" }, `${100 * tick}%`),
    );
  }
  shares.forEach((share, place) => {
    const y = 4 + row * (place + 0.5);
    const held = share.low <= share.wanted && share.wanted <= share.high;
    chart.append(
      s("text", { x: left - 12, y: y + 4, "text-anchor": "end" }, `${Math.round(100 * share.wanted)}%`),
      s("line", { x1: x(share.low), x2: x(share.high), y1: y, y2: y, class: `span ${held ? "" : "off"}` }),
      s("line", { x1: x(share.wanted), x2: x(share.wanted), y1: y - 10, y2: y + 10, class: "wanted" }),
      s("circle", { cx: x(share.found), cy: y, r: 4.5, class: `found ${held ? "" : "off"}` }),
    );
  });
  return chart;
}

/** An 80% range around the last close; `share` of the close on either side fill the width, and what is beyond is cut. */
export function rangeBar(low, middle, high, close, share, width = 92) {
  const x = (value) => width / 2 + Math.max(-1, Math.min(1, (value / close - 1) / share)) * (width / 2 - 2);
  return s(
    "svg",
    { width, height: 14, viewBox: `0 0 ${width} 14`, class: "range", "aria-hidden": "true" },
    s("line", { x1: 0, x2: width, y1: 7, y2: 7, class: "track" }),
    s("rect", { x: x(low), y: 4, width: Math.max(1, x(high) - x(low)), height: 6, rx: 3, class: "band" }),
    s("line", { x1: x(close), x2: x(close), y1: 1, y2: 13, class: "close" }),
    s("circle", { cx: x(middle), cy: 7, r: 2.6, class: "middle" }),
  );
}

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/** The quantiles' bands from the last close on, drawn behind the median's line. */
class Fan {
  constructor(origin, rows) {
    this.origin = origin;
    this.rows = rows;
  }
  attached({ chart, series }) {
    this.chart = chart;
    this.series = series;
  }
  updateAllViews() {}
  paneViews() {
    return [{ zOrder: () => "normal", renderer: () => ({ draw: (target) => this.draw(target) }) }];
  }
  draw(target) {
    const place = (time) => this.chart.timeScale().timeToCoordinate(time);
    const height = (value) => this.series.priceToCoordinate(value);
    const band = colour("--fan");
    target.useMediaCoordinateSpace(({ context }) => {
      for (const [low, high, depth] of [["P05", "P95", 0.16], ["P10", "P90", 0.24], ["P25", "P75", 0.34]]) {
        const upper = [[place(this.origin.time), height(this.origin.close)], ...this.rows.map((row) => [place(row.date), height(row[high])])];
        const lower = this.rows.map((row) => [place(row.date), height(row[low])]).reverse();
        if ([...upper, ...lower].some(([px, py]) => px === null || py === null)) return;
        context.beginPath();
        [...upper, ...lower].forEach(([px, py], at) => (at ? context.lineTo(px, py) : context.moveTo(px, py)));
        context.closePath();
        context.globalAlpha = depth;
        context.fillStyle = band;
        context.fill();
      }
      context.globalAlpha = 1;
    });
  }
}

/** Candles and the fan in `place`. Returns the chart's `priceAt(y)`, `heightOf(price)` and `remove()`. */
export function candles(place, bars, forecast, { dark }) {
  const chart = library.createChart(place, {
    autoSize: true,
    layout: {
      background: { type: "solid", color: "transparent" }, textColor: colour("--muted"), fontSize: 11,
      fontFamily: getComputedStyle(document.body).fontFamily, attributionLogo: false,
    },
    grid: { vertLines: { visible: false }, horzLines: { color: colour("--line-soft") } },
    rightPriceScale: { borderVisible: false, scaleMargins: { top: 0.08, bottom: 0.08 } },
    timeScale: { borderColor: colour("--line"), rightOffset: 3, minBarSpacing: 1 },
    crosshair: { mode: 0, vertLine: { labelBackgroundColor: colour("--raised") }, horzLine: { labelBackgroundColor: colour("--raised") } },
    localization: { locale: "en-US", dateFormat: "yyyy-MM-dd" },
  });
  const [up, down] = [colour("--up"), colour("--down")];
  const smallest = Math.min(...bars.map((bar) => bar[3]));
  const digits = smallest >= 1 ? 2 : smallest >= 0.01 ? 4 : 6;
  const priceFormat = { type: "price", precision: digits, minMove: 10 ** -digits };
  const series = chart.addSeries(library.CandlestickSeries, {
    upColor: up, downColor: down, wickUpColor: up, wickDownColor: down, borderVisible: false, priceFormat,
    priceLineVisible: false, lastValueVisible: !forecast.length,
  });
  series.setData(bars.map(([time, open, high, low, close]) => ({ time, open, high, low, close })));
  const from = forecast.length ? bars.find((bar) => bar[0] === forecast[0].origin) : null;
  if (from) {
    const origin = { time: from[0], close: forecast[0].last_close };
    const median = chart.addSeries(library.LineSeries, { color: colour("--accent"), lineWidth: 2, priceFormat, priceLineVisible: false, crosshairMarkerVisible: false });
    const bound = { lineWidth: 1, lineVisible: false, priceLineVisible: false, lastValueVisible: false, crosshairMarkerVisible: false, priceFormat };
    median.setData([{ time: origin.time, value: origin.close }, ...forecast.map((row) => ({ time: row.date, value: row.P50 }))]);
    // Invisible lines at the outer quantiles keep the fan inside the price scale.
    for (const name of ["P05", "P95"]) chart.addSeries(library.LineSeries, bound).setData(forecast.map((row) => ({ time: row.date, value: row[name] })));
    median.attachPrimitive(new Fan(origin, forecast));
  }
  const width = place.clientWidth || 800;
  const seen = Math.max(30, Math.min(bars.length, Math.floor(width / 13)));
  chart.timeScale().setVisibleLogicalRange({ from: bars.length - seen, to: bars.length + forecast.length + 2 });
  return {
    priceAt: (y) => series.coordinateToPrice(y),
    heightOf: (value) => series.priceToCoordinate(value),
    plotWidth: () => chart.timeScale().width(),
    remove: () => chart.remove(),
  };
}
