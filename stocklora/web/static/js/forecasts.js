// The watch list.

import { ended, get, post, runs, start, upload, watchRuns } from "./api.js";
import { rangeBar, sparkline } from "./charts.js";
import { fill, h, icon, later } from "./dom.js";
import { day, price, signed } from "./format.js";
import { emptyState, runStrip } from "./runs.js";
import { t } from "./strings.js";
import { virtualList } from "./virtual.js";

const FORECASTERS = ["framework", "framework_llm"];
const phone = matchMedia("(max-width: 720px)");
let kept = null; // the last answer, so that coming back paints at once
let keptRecord = {};

/** What the newest forecast was made by, else the market prior. */
function lastForecaster() {
  const run = runs().find((one) => FORECASTERS.includes(one.script));
  if (!run) return { script: "framework", values: { model_path: "prior", explain: true } };
  return { script: run.script, values: { ...run.values } };
}

const withoutData = (values) => {
  const rest = { ...values };
  for (const name of ["test_csv", "above", "below", "tickers", "ticker", "watch"]) delete rest[name];
  return rest;
};

export function forecastsRoom(root) {
  let watch = kept ?? { lines: [], arguments: [], errors: {}, reading: 0 };
  let record = keptRecord;
  let onlyAlerts = false;
  let widest = 0.1; // share of the close that a range bar shows, one for the whole list
  let loaded = kept !== null;
  let gone = false;
  let unreachable = false;
  let forecaster = null;
  const strips = new Set();

  const symbol = h("input", { type: "text", id: "symbol", placeholder: t("symbolHint"), autocomplete: "off", spellcheck: "false", "aria-label": t("symbol") });
  const source = h("select", { "aria-label": t("source") }, ["yahoo", "akshare", "sample"].map((name) => h("option", { value: name }, t(name))));
  const picker = h("input", { type: "file", accept: ".csv,.gz,.txt,.xlsx,.json", multiple: true, class: "away", tabindex: "-1", "aria-hidden": "true", onchange: () => take([...picker.files]) });
  const filter = h("input", { type: "search", placeholder: t("filter"), "aria-label": t("filter"), oninput: later(() => draw(), 80) });
  const by = h("select", { "aria-label": t("by"), onchange: () => chooseForecaster() });
  const again = h("button", { type: "button", class: "primary", onclick: () => forecast() }, t("forecastNow"));
  const refreshed = h("button", { type: "button", title: t("refreshHint"), onclick: () => refresh() }, icon("refresh"), t("refresh"));
  const adding = h("form", { class: "inline", onsubmit: (event) => { event.preventDefault(); addSymbol(); } }, symbol, source, h("button", { type: "submit" }, icon("plus"), t("add")));
  const notices = h("div", { class: "notices" });
  const stripBox = h("div", { class: "strips" });
  const summary = h("p", { class: "summary muted" });
  const problem = h("p", { class: "problem", role: "alert" });
  const headings = h("div", { class: "vhead", role: "presentation" });
  const list = virtualList({
    label: t("forecasts"), rowHeight: () => (phone.matches ? 76 : 46), keyOf: (line) => line.ticker,
    open: (line) => { location.hash = `#/forecasts/${encodeURIComponent(line.ticker)}`; }, rowOf,
  });
  const listBox = h("div", { class: "list-box" });
  const drop = h("div", { class: "drop", hidden: true }, t("dropHere"));

  function rowOf(line) {
    const cells = line.forecast;
    const last = cells[cells.length - 1];
    const hit = record.tickers?.[line.ticker];
    const cell = (name, ...content) => h("div", { class: `c ${name}`, role: "gridcell" }, content);
    const old = last && last.origin !== line.last;
    return [
      cell("name", hit?.alert ? h("span", { class: "alert-mark", title: alertText(line.ticker, hit.alert) }, icon("alert")) : null, h("a", { href: `#/forecasts/${encodeURIComponent(line.ticker)}`, tabindex: "-1" }, line.ticker), h("span", { class: "muted sub" }, day(line.last))),
      cell("trend", sparkline(line.spark)),
      cell("close num", price(line.close)),
      cell(`change num ${line.change > 0 ? "up" : line.change < 0 ? "down" : ""}`, signed(line.change)),
      [0, 1, 2].map((at) => cell(`ahead num${old ? " old" : ""}`, cells[at] ? price(cells[at].P50) : "–")),
      cell(`range num${old ? " old" : ""}`, last ? [rangeBar(last.P10, last.P50, last.P90, last.last_close, widest), h("span", {}, `${price(last.P10)} – ${price(last.P90)}`)] : h("span", { class: "muted" }, t("noForecast"))),
      cell("hit num", hit ? [`${Math.round((100 * hit.inside) / hit.of)}%`, h("span", { class: "muted sub" }, ` ${hit.inside}/${hit.of}`)] : "–"),
    ];
  }

  const alertText = (ticker, alert) => t("outsideText", ticker, price(alert.close), alert.date, alert.said, price(alert.low), price(alert.high));

  function drawHeadings() {
    const most = Math.max(3, ...watch.lines.slice(0, 5).map((line) => line.forecast.length));
    fill(headings, [["name", t("ticker")], ["trend", t("trend")], ["close num", t("lastClose")], ["change num", t("change")], ...[1, 2, 3].map((at) => ["ahead num", t("dayAhead", at)]), ["range num", t("range80", most)], ["hit num", t("hitRate"), t("hitHint")]].map(([name, words, title]) => h("div", { class: `c ${name}`, title }, words)));
  }

  /** Nine of ten ranges are shown whole. */
  function scaleBars() {
    const reach = watch.lines.filter((line) => line.forecast.length).map(({ forecast }) => {
      const last = forecast[forecast.length - 1];
      return Math.max(last.P90 / last.last_close - 1, 1 - last.P10 / last.last_close);
    }).sort((one, other) => one - other);
    if (reach.length) widest = 1.1 * reach[Math.ceil(0.9 * reach.length) - 1];
  }

  function draw() {
    const words = filter.value.trim().toLowerCase();
    const alerted = watch.lines.filter((line) => record.tickers?.[line.ticker]?.alert);
    if (!alerted.length) onlyAlerts = false;
    const found = (onlyAlerts ? alerted : watch.lines).filter((line) => line.ticker.toLowerCase().includes(words));
    const newest = watch.lines.reduce((latest, line) => (line.last > latest ? line.last : latest), "");
    fill(notices,
      alerted.length ? h("div", { class: "notice warn", role: "status" }, icon("alert"), h("span", {}, h("b", {}, alerted.length === 1 ? t("alertOne") : t("alerts", alerted.length)), ": ", alerted.slice(0, 3).map((line) => line.ticker).join(", "), alerted.length > 3 ? " …" : ""), h("button", { type: "button", class: "quiet", onclick: () => { onlyAlerts = !onlyAlerts; draw(); } }, t(onlyAlerts ? "showAll" : "onlyAlerts"))) : null,
      Object.entries(watch.errors).map(([name, why]) => h("div", { class: "notice bad" }, h("span", {}, h("b", {}, name), ": ", why), h("button", { type: "button", class: "quiet", title: t("removeHint", name), onclick: () => removeFile(name) }, t("remove")))),
      watch.lines.filter((line) => line.also_in).slice(0, 3).map((line) => h("div", { class: "notice" }, h("span", {}, t("twice", line.ticker, line.file, line.also_in)), h("button", { type: "button", class: "quiet", title: t("removeHint", line.also_in), onclick: () => removeFile(line.also_in) }, t("remove")))),
      newest && Date.now() - Date.parse(newest) > 12 * 86400e3 ? h("div", { class: "notice" }, t("oldPrices", newest)) : null);
    const counted = watch.lines.length === 1 ? t("tickerCount") : t("tickersCount", watch.lines.length.toLocaleString("en-US"));
    fill(summary, watch.reading ? t(watch.reading > 1 ? "reading" : "readingOne", watch.reading) : watch.lines.length ? (found.length === watch.lines.length ? counted : t("ofCount", found.length, counted)) : "");
    const bare = loaded && !watch.lines.length && !watch.reading;
    tools.hidden = bare;
    if (bare) {
      fill(listBox, emptyState(t("emptyList"), t("emptyListText"), h("div", { class: "actions" }, h("button", { type: "button", class: "primary", onclick: () => addSample() }, t("useSample")), h("button", { type: "button", onclick: () => picker.click() }, t("chooseFile")))));
    } else if (!loaded || (!watch.lines.length && watch.reading)) {
      fill(listBox, h("p", { class: "muted pad" }, t("loading")));
    } else if (!found.length) {
      fill(listBox, h("p", { class: "muted pad" }, t("noMatch", filter.value.trim())));
    } else {
      if (list.element.parentNode !== listBox) fill(listBox, headings, list.element);
      drawHeadings();
      list.show(found);
    }
  }

  function drawForecasters(state) {
    const current = lastForecaster();
    const options = [{ name: t("prior"), script: "framework", values: { model_path: "prior", explain: true } }];
    for (const file of state.weights) {
      if (file.endsWith("best_lora_weights.pth")) {
        for (const base of state.base_models) options.push({ name: `${file} · ${base}`, script: "framework_llm", values: { model_path: [base], lora_weights: [file], explain: true } });
      } else options.push({ name: file, script: "framework", values: { model_path: file } });
    }
    const key = (one) => JSON.stringify([one.script, one.values.model_path ?? "", one.values.lora_weights ?? ""]);
    if (!options.some((one) => key(one) === key(current))) options.push({ name: `${current.script}.py`, script: current.script, values: withoutData(current.values) });
    fill(by, options.map((one) => h("option", { value: JSON.stringify({ script: one.script, values: one.values }), selected: key(one) === key(current) }, one.name)));
    chooseForecaster();
  }

  const chooseForecaster = () => { forecaster = by.value ? JSON.parse(by.value) : lastForecaster(); };

  async function load(wait_ms = 100) {
    try {
      watch = await get("/api/watch");
      if (gone) return;
      kept = watch;
      scaleBars();
      loaded = true;
      if (unreachable) fill(problem); // what else is said there stays
      unreachable = false;
      draw();
      if (watch.reading) setTimeout(() => gone || load(Math.min(2 * wait_ms, 500)), wait_ms);
      else loadRecord();
    } catch (error) {
      unreachable = true;
      if (!gone) fill(problem, error.message === "offline" ? t("offline") : error.message);
    }
  }

  async function loadRecord() {
    try {
      const found = await get("/api/record");
      const changed = JSON.stringify(found) !== JSON.stringify(record);
      record = keptRecord = found;
      if (gone || !changed) return;
      watch.lines = watch.lines.map((line) => ({ ...line })); // rows are drawn anew
      draw();
    } catch {
      // the list stands without it
    }
  }

  function follow(run) {
    const strip = runStrip(run.id, { dismiss: () => { strip.remove(); strip.element.remove(); strips.delete(strip); } });
    strips.add(strip);
    stripBox.prepend(strip.element);
    ended(run.id).then((done) => {
      if (gone) return;
      load();
      if (done.state === "done") setTimeout(() => { strip.remove(); strip.element.remove(); strips.delete(strip); }, 4000);
    });
    return ended(run.id);
  }

  async function attempt(action) {
    fill(problem);
    try {
      return await action();
    } catch (error) {
      fill(problem, error.message === "offline" ? t("offline") : error.message);
      return null;
    }
  }

  async function forecast() {
    return attempt(async () => {
      const { arguments: files } = await get("/api/watch");
      if (!files.length) return null;
      chooseForecaster();
      return follow(await start(forecaster.script, { ...forecaster.values, test_csv: files }));
    });
  }

  async function refresh() {
    await attempt(async () => {
      const folder = watch.lines.some((line) => line.file.startsWith("prices/"));
      const target = folder ? "prices" : watch.lines[0]?.file;
      if (target) await follow(await start("download", { update: true, output: target }));
      await forecast();
    });
  }

  async function addSymbol() {
    const names = symbol.value.split(/[\s,，]+/).filter(Boolean);
    if (!names.length) return symbol.focus();
    await attempt(async () => {
      const values = { ticker: names, output: "prices", period: "2y" };
      if (source.value !== "yahoo") values.source = source.value;
      const run = await follow(await start("download", values));
      if (run.code === 0 || run.code === 1) {
        symbol.value = "";
        await settled();
        await forecast();
      }
    });
  }

  async function addSample() {
    await attempt(async () => {
      const run = await follow(await start("download", { source: "sample", ticker: ["AAPL"], period: "2y", output: "prices" }));
      if (run.code === 0) {
        await settled();
        await forecast();
      }
    });
  }

  /** New files have been read. */
  async function settled() {
    for (let tries = 0; tries < 120; tries += 1) {
      const { reading } = await get("/api/watch");
      if (!reading) return;
      await new Promise((resolve) => setTimeout(resolve, 250));
    }
  }

  async function take(files) {
    const added = await attempt(async () => {
      for (const file of files) await upload(file);
      return true;
    });
    picker.value = "";
    await load();
    if (!added) return;
    await settled();
    await forecast();
  }

  async function removeFile(name) {
    await attempt(() => post("/api/prices/remove", { name }));
    await load();
  }

  let depth = 0;
  const drags = {
    dragenter: (event) => { if (![...event.dataTransfer.types].includes("Files")) return; event.preventDefault(); depth += 1; drop.hidden = false; },
    dragover: (event) => event.preventDefault(),
    dragleave: () => { depth = Math.max(0, depth - 1); if (!depth) drop.hidden = true; },
    drop: (event) => { event.preventDefault(); depth = 0; drop.hidden = true; take([...event.dataTransfer.files]); },
  };
  for (const [name, listener] of Object.entries(drags)) document.addEventListener(name, listener);

  const tools = h("div", { class: "tools end" }, filter, h("label", { class: "by" }, h("span", { class: "muted" }, t("by")), by), again, refreshed);
  fill(root, h("div", { class: "page list" }, h("header", { class: "bar-top" }, h("h1", {}, t("forecasts")), adding, h("button", { type: "button", class: "quiet", onclick: () => picker.click() }, t("chooseFile")), picker), tools, problem, notices, stripBox, listBox, summary, drop));
  scaleBars();
  draw();
  load();
  get("/api/state").then((state) => gone || drawForecasters(state)).catch(() => {});
  const turned = () => { kept && draw(); };
  phone.addEventListener("change", turned);
  const mine = new Set();
  const stopRuns = watchRuns((all) => {
    for (const run of all) {
      if (run.state === "running" && [...FORECASTERS, "download"].includes(run.script) && !mine.has(run.id) && !document.querySelector(`.strip a[href="#/run/${run.id}"]`)) {
        mine.add(run.id);
        setTimeout(() => { if (!gone && !document.querySelector(`.strip a[href="#/run/${run.id}"]`)) follow(run); }, 400);
      }
    }
  });
  return () => {
    gone = true;
    stopRuns();
    list.remove();
    phone.removeEventListener("change", turned);
    for (const strip of strips) strip.remove();
    for (const [name, listener] of Object.entries(drags)) document.removeEventListener(name, listener);
  };
}
