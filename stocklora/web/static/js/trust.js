// What was said before the fact, and backtests.

import { get, runs, start, watchRuns } from "./api.js";
import { shareChart } from "./charts.js";
import { fill, h } from "./dom.js";
import { moment, number } from "./format.js";
import { startForm } from "./form.js";
import { emptyState, runHistory, runStrip } from "./runs.js";
import { known, t } from "./strings.js";

export function trustRoom(root, wanted) {
  let gone = false;
  const strips = [];
  const record = h("section", { class: "panel" }, h("p", { class: "muted" }, t("loading")));
  const reports = h("section", {});
  const stripBox = h("div", { class: "strips" });
  const form = h("div", { class: "fold" });
  const history = runHistory(["backtest", "ledger"], { quiet: true });
  const problem = h("p", { class: "problem", role: "alert" });
  const words = h("div", { class: "words-of" });

  const run = async (script, values) => {
    fill(problem);
    try {
      const strip = runStrip((await start(script, values)).id, { dismiss: () => strip.element.remove() });
      strips.push(strip);
      stripBox.prepend(strip.element);
    } catch (error) {
      fill(problem, error.message);
    }
  };

  async function loadRecord() {
    const found = await get("/api/record");
    const { arguments: files } = await get("/api/watch");
    if (gone) return;
    const actions = h("div", { class: "actions" },
      files.length ? h("button", { type: "button", onclick: () => run("ledger", { command: "score", test_csv: files }) }, t("scoreNow")) : null,
      h("button", { type: "button", onclick: () => run("ledger", { command: "verify" }) }, t("verifyNow")),
      h("button", { type: "button", onclick: () => run("ledger", { command: "export" }) }, t("exportNow")));
    if (found.error) fill(record, h("h2", {}, t("brokenRecord")), h("p", { class: "problem" }, found.error), actions);
    else if (!found.entries) fill(record, h("h2", {}, t("record")), emptyState(t("noRecord"), t("noRecordText")));
    else fill(record, h("h2", {}, t("record")), h("p", { class: "muted wrap" }, t("recordText", number(found.entries), ""), h("code", { title: found.head }, found.head.slice(0, 16))), found.forecasters.map(forecasterPart), actions, words);
    loadWords().catch(() => {});
  }

  /** What ledger.py said when it scored last, and its picture. */
  async function loadWords() {
    const scored = runs().find((one) => one.script === "ledger" && one.values.command === "score" && one.state === "done");
    if (!scored) return;
    const { text } = await get(`/api/runs/${scored.id}/log`, { start: 0 });
    if (gone) return;
    fill(words, h("details", { open: true }, h("summary", {}, t("inWords", moment(scored.started))),
      h("pre", { class: "log", tabindex: "0", "aria-label": t("log") }, text),
      text.includes("chart: ledger.png") ? h("img", { src: `/files/ledger.png?${scored.id}`, alt: t("reliability") }) : null));
  }

  async function loadReports() {
    const found = await get("/api/backtests");
    if (gone) return;
    if (!found.length) return fill(reports, emptyState(t("noBacktests"), t("noBacktestsText")));
    fill(reports, found.map((report) => reportPart(report, wanted === report.folder)));
  }

  async function loadForm() {
    const { arguments: files } = await get("/api/watch");
    const state = await get("/api/state");
    const values = { data: files };
    const { element } = await startForm({
      script: "backtest", values: files.length ? values : {}, hidden: ["resume"], open: ["data", "models"],
      suggest: { data: files, lora_weights: state.weights, model_path: state.base_models }, start,
      started: (one) => { location.hash = `#/run/${one.id}`; },
    });
    if (!gone) fill(form, h("details", { class: "panel" }, h("summary", {}, h("h2", {}, t("newBacktest"))), element));
  }

  fill(root, h("div", { class: "page trust" }, h("header", { class: "bar-top" }, h("h1", {}, t("trust"))), problem, stripBox, record, h("h2", {}, t("backtests")), form, reports, history.element));
  for (const load of [loadRecord, loadReports, loadForm]) load().catch((error) => gone || fill(problem, error.message === "offline" ? t("offline") : error.message));
  let over = null;
  const stopRuns = watchRuns((all) => {
    const now = all.filter((one) => ["backtest", "ledger"].includes(one.script) && one.state !== "running").length;
    if (over !== null && now !== over) for (const load of [loadRecord, loadReports]) load().catch(() => {});
    over = now;
  });
  return () => {
    gone = true;
    stopRuns();
    history.remove();
    for (const strip of strips) strip.remove();
  };
}

function forecasterPart(one) {
  const states = Object.entries(one.states).map(([name, count]) => h("span", { class: "setting" }, h("b", { class: "num" }, number(count)), " ", known(`state_${name}`, name)));
  const days = one.days;
  return h("div", { class: "forecaster" },
    h("h3", {}, one.name, " ", h("code", { class: "muted" }, one.sha256.slice(0, 8))), h("p", { class: "chips" }, states),
    days.length
      ? h("div", { class: "record-body" },
          h("figure", {}, h("figcaption", {}, t("insideTitle", days[0].day)), shareChart(days[0].inside, t("insideTitle", days[0].day)), h("p", { class: "muted" }, t("insideNote"))),
          h("div", { class: "scroller" }, h("table", { class: "grid-table" },
            h("thead", {}, h("tr", {}, [t("daysAhead"), t("closes"), ...[50, 80, 90].map((share) => t("inside", share)), t("quantileLoss"), t("ofLastClose"), t("ofEwma")].map((words) => h("th", { scope: "col", class: "num" }, words)))),
            h("tbody", {}, days.map((day) => h("tr", {}, h("td", { class: "num" }, day.day), h("td", { class: "num" }, number(day.closes)),
              day.inside.map((share) => h("td", { class: "num" }, `${number(100 * share.found, 1)}%`)),
              h("td", { class: "num" }, day.losses ? number(day.losses.model[0], 2) : "–"),
              ["naive", "ewma"].map((other) => h("td", { class: "num" }, day.losses ? number(day.losses.model[0] / day.losses[other][0], 4) : "–"))))))))
      : null);
}

const COLUMNS = ["Model", "Ticker", "Day", "Origins", "MAE", "Relative_MAE", "Direction", "Pinball_bp", "Relative_Pinball", "Coverage_80", "DM_p_Holm"];
const TEXTS = ["Model", "Ticker"];

function reportPart(report, open) {
  const shown = COLUMNS.filter((name) => report.columns.includes(name));
  const columns = shown.length > 2 ? shown : report.columns.slice(0, 9);
  const path = `/files/${report.report.split("/").map(encodeURIComponent).join("/")}`;
  const body = h("div", {});
  const details = h("details", { class: "panel report", open, ontoggle: () => {
    if (!details.open || body.childNodes.length) return;
    fill(body, h("iframe", { src: path, title: t("reportFrame", report.folder), sandbox: "", loading: "lazy" }));
  } }, h("summary", {}, h("b", {}, report.folder), " ", h("span", { class: "muted num" }, moment(report.made))), body);
  return h("div", {}, report.rows.length ? h("div", { class: "scroller" }, h("table", { class: "grid-table" },
    h("caption", {}, report.folder),
    h("thead", {}, h("tr", {}, columns.map((name) => h("th", { scope: "col", class: TEXTS.includes(name) ? "" : "num" }, name.replaceAll("_", " "))))),
    h("tbody", {}, report.rows.slice(0, 60).map((row) => h("tr", {}, columns.map((name) => h("td", { class: TEXTS.includes(name) ? "" : "num" }, cell(row[name])))))))) : null, details);
}

const cell = (text) => {
  const value = Number(text);
  return text && Number.isFinite(value) && !Number.isInteger(value) ? number(value, Math.abs(value) < 10 ? 4 : 2) : text;
};
