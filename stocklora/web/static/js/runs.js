// Runs as the page shows them: a strip, a table, and one run with its loss, log and command.

import { get, lookAgain, post, refreshRuns, start, watchRuns } from "./api.js";
import { lineChart } from "./charts.js";
import { fill, h, icon } from "./dom.js";
import { bytes, duration, moment, number } from "./format.js";
import { t } from "./strings.js";

/** A command that can be copied. */
export function commandBlock(text) {
  const button = h("button", {
    type: "button", class: "quiet copy", "aria-label": `${t("copy")}: ${t("command")}`,
    onclick: async () => {
      await copyText(text);
      fill(button, t("copied"));
      setTimeout(() => fill(button, icon("copy"), t("copy")), 1400);
    },
  }, icon("copy"), t("copy"));
  return h("div", { class: "command" }, h("pre", { tabindex: "0", "aria-label": t("command") }, text), button);
}

async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const area = h("textarea", { class: "away" });
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
}

export function stateBadge(run) {
  const state = run.stopping ? "stopping" : run.state;
  return h("span", { class: `badge ${run.state}` }, h("span", { class: "dot" }), t(state));
}

/** The part of a run that is done, where its script says so. */
export function progressBar(run) {
  const { done, total } = run.progress ?? {};
  if (run.state !== "running" || !total) return null;
  const share = Math.max(0, Math.min(1, done / total));
  const bar = h("span", { class: "fill" });
  bar.style.width = `${100 * share}%`;
  return h("span", { class: "bar", role: "progressbar", "aria-valuemin": 0, "aria-valuemax": total, "aria-valuenow": done, "aria-label": run.script }, bar);
}

/** What is going on, in a line: for runs that belong to what one sees. */
export function runStrip(id, { dismiss = null } = {}) {
  const element = h("div", { class: "strip", role: "status" });
  const stop = watchRuns((all) => {
    const run = all.find((one) => one.id === id);
    if (!run) return;
    const words = run.state !== "running" ? run.last : run.progress?.total ? `${number(run.progress.done)} / ${number(run.progress.total)}` : run.progress?.bytes ? `${bytes(run.progress.bytes)} · ${run.last}` : run.last;
    element.className = `strip ${run.state}`;
    fill(
      element,
      stateBadge(run), h("span", { class: "mono what" }, `${run.script}.py`), progressBar(run),
      h("span", { class: "words", title: run.last }, words), h("span", { class: "muted num" }, duration(run.seconds)),
      h("a", { href: `#/run/${run.id}` }, t("log")),
      run.state === "running" ? stopButton(run) : null,
      dismiss && run.state !== "running" ? h("button", { type: "button", class: "quiet icon-only", "aria-label": t("close"), onclick: dismiss }, icon("close")) : null,
    );
  });
  return { element, remove: stop };
}

function stopButton(run) {
  return h("button", {
    type: "button", class: "quiet danger",
    onclick: async () => {
      await post(`/api/runs/${run.id}/stop`);
      refreshRuns();
    },
  }, icon("stop"), t(run.stopping ? "stopNow" : "stop"));
}

function resumeButton(run) {
  if (!run.resume || run.state === "running" || run.state === "done") return null;
  return h("button", {
    type: "button", class: "primary",
    onclick: async (event) => {
      event.target.disabled = true;
      const again = await start(run.script, { ...run.values, ...run.resume });
      location.hash = `#/run/${again.id}`;
    },
  }, t("resume"));
}

const shown = (value) => (Array.isArray(value) ? value.join(", ") : String(value));

export function chipsOf(values, most = 6) {
  const items = Object.entries(values);
  if (!items.length) return h("span", { class: "muted" }, t("allDefaults"));
  return h("span", { class: "chips" }, items.slice(0, most).map(([name, value]) => h("span", { class: "setting" }, h("b", {}, name), " ", shown(value))), items.length > most ? h("span", { class: "muted" }, `+${items.length - most}`) : null);
}

/** Runs of some scripts, newest first, with their settings side by side where two or more are chosen. */
export function runHistory(scripts, { limit = 40, quiet = false } = {}) {
  const chosen = new Set();
  const element = h("section", { class: "history" });
  let latest = [];
  let before = "";
  const draw = (all) => {
    latest = all.filter((run) => scripts.includes(run.script)).slice(0, limit);
    const now = JSON.stringify([latest.map((run) => [run.id, run.state, run.stopping, run.last, Math.round(run.seconds)]), [...chosen]]);
    if (now === before || element.contains(document.activeElement) && document.activeElement.matches("summary")) return;
    before = now;
    if (!latest.length && quiet) {
      fill(element);
      return;
    }
    if (!latest.length) {
      fill(element, h("h2", {}, t("runs")), emptyState(t("noRuns"), t("noRunsText")));
      return;
    }
    const focused = element.contains(document.activeElement) ? document.activeElement.dataset.key : null;
    fill(element, h("h2", {}, t("runs")), table(), chosen.size > 1 ? comparison() : latest.length > 1 ? h("p", { class: "muted" }, t("compareHint")) : null);
    if (focused) element.querySelector(`[data-key="${CSS.escape(focused)}"]`)?.focus();
  };
  const table = () =>
    h("div", { class: "scroller" }, h("table", { class: "grid-table" },
      h("thead", {}, h("tr", {}, h("th", {}, h("span", { class: "away" }, t("compare"))), [t("script"), t("state"), t("started"), t("took"), t("settings"), t("result")].map((name) => h("th", { scope: "col" }, name)))),
      h("tbody", {}, latest.map((run) => h("tr", {},
        h("td", {}, h("input", { type: "checkbox", "data-key": `c${run.id}`, "aria-label": t("select", run.id), checked: chosen.has(run.id), onchange: (event) => { event.target.checked ? chosen.add(run.id) : chosen.delete(run.id); draw(latest); } })),
        h("td", {}, h("a", { href: `#/run/${run.id}`, class: "mono", "data-key": `a${run.id}` }, `${run.script}.py`)),
        h("td", {}, stateBadge(run), progressBar(run)), h("td", { class: "date" }, moment(run.started)), h("td", { class: "date" }, duration(run.seconds)),
        h("td", {}, chipsOf(run.values, 4)), h("td", { class: "clip", title: run.last }, run.last))))));
  const comparison = () => {
    const compared = latest.filter((run) => chosen.has(run.id));
    const names = [...new Set(compared.flatMap((run) => Object.keys(run.values)))];
    return h("div", { class: "scroller compare" }, h("table", { class: "grid-table" },
      h("thead", {}, h("tr", {}, h("th", { scope: "col" }, t("settings")), compared.map((run) => h("th", { scope: "col" }, h("span", { class: "mono" }, `${run.script}.py`), h("br"), moment(run.started))))),
      h("tbody", {},
        names.map((name) => {
          const values = compared.map((run) => (name in run.values ? shown(run.values[name]) : "–"));
          const differs = new Set(values).size > 1;
          return h("tr", { class: differs ? "differs" : "" }, h("th", { scope: "row", class: "mono" }, name), values.map((value) => h("td", {}, value)));
        }),
        h("tr", {}, h("th", { scope: "row" }, t("took")), compared.map((run) => h("td", { class: "num" }, duration(run.seconds)))),
        h("tr", {}, h("th", { scope: "row" }, t("result")), compared.map((run) => h("td", {}, run.last))))));
  };
  const stop = watchRuns(draw);
  return { element, remove: stop };
}

export function emptyState(title, text, ...more) {
  return h("div", { class: "empty" }, h("p", { class: "title" }, title), h("p", {}, text), more);
}

/** A log that grows as its run writes; `toEnd()` resolves when it shows all that is written by now. */
export function liveLog(id) {
  const text = h("pre", { class: "log", tabindex: "0", "aria-label": t("log") }, t("noLog"));
  let from = -1;
  let timer = 0;
  let gone = false;
  let all = "";
  let over = false;
  let asking = null;
  const part = async () => {
    let whole = false;
    try {
      const found = await get(`/api/runs/${id}/log`, { start: from });
      if (gone) return true;
      from = found.next;
      if (found.text) {
        const follows = text.scrollTop + text.clientHeight >= text.scrollHeight - 24;
        all = (all + found.text).slice(-400000);
        fill(text, all);
        if (follows) text.scrollTop = text.scrollHeight;
      }
      whole = found.next >= found.size || !found.text;
      over = found.run.state !== "running" && whole;
    } catch {
      // asked again
      whole = true;
    }
    return whole;
  };
  const ask = () => (asking ??= part().finally(() => { asking = null; }));
  const more = async () => {
    await ask();
    if (!gone && !over) timer = setTimeout(more, Math.min(lookAgain(), 1000));
  };
  more();
  return {
    element: text,
    async toEnd() {
      await asking; // it may have been answered before the run's end
      while (!gone && !over && !(await ask()));
    },
    remove() {
      gone = true;
      clearTimeout(timer);
    },
  };
}

function curveOf(run, { live, whole }) {
  const [points, byEpoch] = whole.length > 1 ? [whole, true] : [live.map((line) => ({ x: line.done, loss: Number(line.loss), validation: Number(line.ratio) })), false];
  const of = (name) => points.map((point) => [point.x, typeof point[name] === "number" ? point[name] : NaN]);
  const has = (name) => of(name).some(([, y]) => Number.isFinite(y));
  const charts = [];
  const isChat = run.script === "fine_tune_qwen";
  if (has("loss")) charts.push([t("trainLoss"), [{ points: of("loss"), kind: "main" }]]);
  if (has("validation")) charts.push([t(isChat ? "validationLoss" : "validationRatio"), [{ points: of("validation"), kind: "second" }]]);
  const label = t(byEpoch ? "lossEpochs" : "lossLive");
  return charts.map(([name, lines]) => h("figure", {}, h("figcaption", {}, name), lineChart(lines, { label: `${label}: ${name}`, width: 560, height: 200 })));
}

/** One run: state, loss, log, command. */
export function runPage(root, id) {
  const head = h("div", { class: "run-head" });
  const curve = h("div", { class: "curves" });
  const facts = h("div", {});
  const log = liveLog(id);
  let lastSeconds = -9;
  let drawn = "";
  let latest = null;
  const stop = watchRuns(async (all) => {
    const run = all.find((one) => one.id === id);
    if (!run) return;
    latest = run;
    if (run.state !== "running") await log.toEnd(); // the last lines come no later than the state
    if (latest !== run) return;
    fill(head,
      h("h1", { class: "mono" }, `${run.script}.py`), stateBadge(run), progressBar(run),
      h("span", { class: "muted num" }, `${moment(run.started)} · ${duration(run.seconds)}`),
      h("span", { class: "grow" }), run.state === "running" ? stopButton(run) : resumeButton(run));
    if (drawn !== run.state) {
      fill(facts, run.state === "lost" ? h("p", { class: "problem" }, t("lostText")) : null, h("h2", {}, t("command")), commandBlock(run.command), h("h2", {}, t("settings")), chipsOf(run.values, 99));
    }
    if (drawn !== run.state || run.seconds - lastSeconds > 2) {
      drawn = run.state;
      lastSeconds = run.seconds;
      try {
        fill(curve, curveOf(run, await get(`/api/runs/${id}/curve`)));
      } catch {
        fill(curve);
      }
    }
  });
  fill(root, h("div", { class: "page run" }, head, curve, h("h2", {}, t("log")), log.element, facts));
  return () => {
    stop();
    log.remove();
  };
}
