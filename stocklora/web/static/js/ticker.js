// Behind a line of the list: candles with the fan, the table, why it is this wide, and a price one drags.

import { get } from "./api.js";
import { candles } from "./charts.js";
import { fill, h, icon } from "./dom.js";
import { number, percent, price, signed } from "./format.js";
import { emptyState } from "./runs.js";
import { known, t } from "./strings.js";

export function tickerPage(root, name) {
  let gone = false;
  let chart = null;
  let paths = null;
  let asked = null;
  let frame = 0;
  let content = { bars: [], forecast: [], why: null };

  const head = h("header", { class: "ticker-head" });
  const place = h("div", { class: "chart", role: "img", "aria-label": t("chartLabel", name) });
  const handle = h("div", { class: "handle", role: "slider", tabindex: "0", "aria-label": t("priceLine"), hidden: true }, h("span", { class: "grip" }));
  const box = h("div", { class: "chart-box" }, place, handle);
  const side = h("div", { class: "side" });
  const problem = h("p", { class: "problem", role: "alert" });
  const typed = h("input", { type: "text", inputmode: "decimal", id: "asked", class: "num", autocomplete: "off", oninput: () => { const value = Number(typed.value.replace(/,/g, "")); if (value > 0) ask(value, true); } });
  const answers = h("div", { class: "answers", "aria-live": "polite" });

  function ask(value, fromTyping = false) {
    asked = value;
    const last = content.forecast[0]?.last_close;
    if (!fromTyping) typed.value = price(value).replace(/,/g, "");
    handle.setAttribute("aria-valuenow", value);
    handle.setAttribute("aria-valuetext", price(value));
    if (!paths || !last) return;
    const { dates, closes } = paths;
    const above = dates.map((_, at) => closes.filter((path) => path[at] > value).length / closes.length);
    const below = dates.map((_, at) => closes.filter((path) => path[at] < value).length / closes.length);
    const ever = (test) => closes.filter((path) => path.some(test)).length / closes.length;
    fill(answers, h("table", { class: "grid-table" },
      h("thead", {}, h("tr", {}, h("th", { scope: "col" }, t("date")), h("th", { scope: "col", class: "num" }, t("above")), h("th", { scope: "col", class: "num" }, t("below")))),
      h("tbody", {},
        dates.map((date, at) => h("tr", {}, h("td", { class: "date" }, date), h("td", { class: "num" }, meter(above[at], "up")), h("td", { class: "num" }, meter(below[at], "down")))),
        h("tr", { class: "sum" }, h("td", {}, t("anyDay")), h("td", { class: "num" }, percent(ever((close) => close > value))), h("td", { class: "num" }, percent(ever((close) => close < value)))))),
      h("p", { class: "muted" }, signed(value / last - 1), " · ", t("pathsNote")));
  }

  const meter = (share, way) => {
    const bar = h("span", { class: `meter ${way}` });
    bar.style.setProperty("--share", String(share));
    return [bar, percent(share)];
  };

  function follow() {
    frame = 0;
    if (gone || !chart) return;
    const y = asked === null ? null : chart.heightOf(asked);
    handle.hidden = y === null || y < 0 || y > place.clientHeight - 20;
    if (y !== null) {
      handle.style.top = `${y}px`;
      handle.style.width = `${chart.plotWidth()}px`;
    }
    frame = requestAnimationFrame(follow);
  }

  handle.addEventListener("pointerdown", (event) => {
    handle.setPointerCapture(event.pointerId);
    event.preventDefault();
    handle.focus();
  });
  handle.addEventListener("pointermove", (event) => {
    if (!handle.hasPointerCapture(event.pointerId)) return;
    const value = chart.priceAt(event.clientY - place.getBoundingClientRect().top);
    if (value > 0) ask(value);
  });
  handle.addEventListener("keydown", (event) => {
    const step = { ArrowUp: 1, ArrowRight: 1, ArrowDown: -1, ArrowLeft: -1, PageUp: 10, PageDown: -10 }[event.key];
    if (!step || asked === null) return;
    event.preventDefault();
    ask(Math.max(asked * (1 + step * 0.001), 1e-9));
  });

  function draw(record) {
    const { bars, forecast, why } = content;
    const last = bars[bars.length - 1];
    const change = bars.length > 1 ? last[4] / bars[bars.length - 2][4] - 1 : null;
    const mine = record?.tickers?.[name];
    fill(head,
      h("a", { class: "back", href: "#/forecasts" }, icon("back"), t("back")),
      h("h1", {}, name),
      h("span", { class: "big num" }, price(last[4])), h("span", { class: `num ${change > 0 ? "up" : change < 0 ? "down" : ""}` }, signed(change)), h("span", { class: "muted num" }, last[0]),
      mine ? h("span", { class: "muted" }, `${t("hitRate")} `, h("b", { class: "num" }, percent(mine.inside / mine.of)), ` ${mine.inside}/${mine.of}`) : null,
      h("span", { class: "grow" }), forecast.length ? h("span", { class: "legend muted" }, h("span", { class: "swatch" }), t("fanLegend")) : null);
    const alert = mine?.alert;
    fill(side,
      alert ? h("div", { class: "notice warn" }, icon("alert"), h("span", {}, t("outsideText", name, price(alert.close), alert.date, alert.said, price(alert.low), price(alert.high)))) : null,
      forecast.length && forecast[0].origin !== last[0] ? h("div", { class: "notice" }, t("stale")) : null,
      forecast.length ? [table(forecast), probability(), explained(why)] : emptyState(t("noForecast"), t("noForecastText")));
  }

  const table = (rows) =>
    h("section", {}, h("h2", {}, t("table", rows[0].origin)), h("div", { class: "scroller" }, h("table", { class: "grid-table" },
      h("thead", {}, h("tr", {}, [t("date"), "5%", "10%", t("median"), "90%", "95%"].map((words, at) => h("th", { scope: "col", class: at ? "num" : "" }, words)))),
      h("tbody", {}, rows.map((row) => h("tr", {}, h("td", { class: "date" }, row.date), ["P05", "P10"].map((q) => h("td", { class: "num" }, price(row[q]))), h("td", { class: "num strong" }, price(row.P50)), ["P90", "P95"].map((q) => h("td", { class: "num" }, price(row[q])))))))));

  const probability = () =>
    h("section", {}, h("h2", {}, t("probability")), h("div", { class: "ask" }, h("label", { for: "asked" }, t("probabilityHint")), typed), answers);

  function explained(why) {
    if (!why) return h("section", {}, h("h2", {}, t("whyWide")), h("p", { class: "muted" }, t("whyNone")));
    const most = Math.max(5, ...why.factors.map((factor) => Math.abs(factor.percent)));
    return h("section", {}, h("h2", {}, t("whyWide")), h("p", {}, t("whyText", why.date, number(why.scale, 2), number(why.level, 2))),
      h("ul", { class: "factors" }, why.factors.filter((factor) => Math.abs(factor.percent) >= 0.05).map((factor) => {
        const bar = h("span", { class: `factor ${factor.percent > 0 ? "wider" : "narrower"}` });
        bar.style.setProperty("--share", String(Math.abs(factor.percent) / most));
        return h("li", {}, h("span", {}, known(`why_${factor.name}`, factor.words)), h("span", { class: "track" }, bar), h("span", { class: "num" }, signed(factor.percent / 100, 1)));
      })));
  }

  async function load() {
    try {
      content = await get("/api/ticker", { name });
      if (gone) return;
      draw(null);
      chart = candles(place, content.bars, content.forecast, {});
      if (content.forecast.length) {
        const last = content.forecast[content.forecast.length - 1];
        ask(last.P90);
        follow();
        paths = await get("/api/paths", { name });
        if (gone) return;
        ask(asked);
      }
      const record = await get("/api/record");
      if (gone) return;
      draw(record);
    } catch (error) {
      if (!gone) {
        fill(head, h("a", { class: "back", href: "#/forecasts" }, icon("back"), t("back")), h("h1", {}, name));
        fill(problem, error.message === "offline" ? t("offline") : error.message);
      }
    }
  }

  fill(root, h("div", { class: "page ticker" }, head, problem, h("div", { class: "ticker-body" }, box, side)));
  load();
  return () => {
    gone = true;
    cancelAnimationFrame(frame);
    chart?.remove();
  };
}
