// Training: a form from the settings, the memory as one types, and every run there was.

import { get, post, start } from "./api.js";
import { fill, h, later } from "./dom.js";
import { megabytes, number } from "./format.js";
import { scriptForm } from "./form.js";
import { runHistory } from "./runs.js";
import { t } from "./strings.js";

const SCRIPTS = { train_lora: "trainLora", train: "trainSimple", fine_tune_qwen: "trainChat" };
const PARTS = ["weights", "state", "activations", "program"];
const drafts = {}; // what was typed, kept while the page is open

export function trainRoom(root, wanted) {
  let gone = false;
  let script = wanted in SCRIPTS ? wanted : "train_lora";
  const place = h("div", { class: "train-form" });
  const aside = h("aside", { class: "train-side" });
  const history = runHistory([...Object.keys(SCRIPTS), "merge_lora"]);
  const tabs = h("div", { class: "tabs", role: "tablist", "aria-label": t("trainWhat") });

  const drawTabs = () => fill(tabs, Object.entries(SCRIPTS).map(([name, words]) => h("button", {
    type: "button", role: "tab", "aria-selected": String(name === script), tabindex: name === script ? "0" : "-1", "data-script": name,
    onclick: () => choose(name), onkeydown: (event) => {
      const names = Object.keys(SCRIPTS);
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      choose(names[(names.indexOf(script) + step + names.length) % names.length]);
      tabs.querySelector('[aria-selected="true"]').focus();
    },
  }, t(words), " ", h("span", { class: "mono muted" }, `${name}.py`))));

  function choose(name) {
    script = name;
    history.element.dataset.script = name;
    drawTabs();
    build();
  }

  async function build() {
    const mine = script;
    fill(place, h("p", { class: "muted" }, t("loading")));
    fill(aside);
    try {
      const state = await get("/api/state");
      const watch = await get("/api/watch");
      if (gone || mine !== script) return;
      const rows = state.files.filter((file) => file.kind === "rows").map((file) => file.name);
      const suggest = {
        data: watch.arguments, data_path: rows, validation_path: rows, model_path: state.base_models, teacher_model_path: state.base_models,
        expand_rank_from: state.weights, teacher: state.weights, tickers: watch.lines.slice(0, 24).map((line) => line.ticker),
      };
      const values = (drafts[mine] ??= beginning(mine, watch, state, rows));
      const memory = h("section", { class: "panel memory", "aria-live": "polite" });
      const plan = later(async (given) => {
        if (!("model_path" in given)) return fill(memory, h("h2", {}, t("memory")), h("p", { class: "muted" }, t("noModel")));
        if (!memory.querySelector(".stack")) fill(memory, h("h2", {}, t("memory")), h("p", { class: "muted" }, t("planning")));
        try {
          drawPlan(memory, await post("/api/plan", given));
        } catch (error) {
          fill(memory, h("h2", {}, t("memory")), h("p", { class: "muted" }, error.message));
        }
      }, 250);
      const begin = h("button", { type: "button", class: "primary wide", disabled: true, onclick: async () => {
        begin.disabled = true;
        try {
          const run = await start(mine, form.values());
          location.hash = `#/run/${run.id}`;
        } catch (error) {
          fill(form.problem, error.message);
          begin.disabled = false;
        }
      } }, t("startRun"));
      const form = await scriptForm({
        script: mine, values, suggest, hidden: ["resume", "resume_from_checkpoint"], open: ["data", "model", "method"],
        onChange(given, problem) {
          drafts[mine] = { ...given };
          begin.disabled = problem !== null;
          if (mine === "train_lora" && !problem) plan(given);
        },
      });
      if (gone || mine !== script) return;
      fill(place, form.element);
      fill(aside, h("section", { class: "panel" }, h("h2", {}, t("command")), form.command, form.problem, begin), mine === "train_lora" ? memory : null);
    } catch (error) {
      fill(place, h("p", { class: "problem" }, error.message === "offline" ? t("offline") : error.message));
    }
  }

  drawTabs();
  fill(root, h("div", { class: "page train" }, h("header", { class: "bar-top" }, h("h1", {}, t("train")), tabs), h("div", { class: "train-body" }, place, aside), history.element));
  build();
  return () => {
    gone = true;
    history.remove();
  };
}

/** What a form begins with: what lies in the workspace, instead of names that are not there. */
function beginning(script, watch, state, rows) {
  const values = {};
  if (script !== "fine_tune_qwen" && watch.arguments.length) values.data = watch.arguments;
  if (script !== "train" && state.base_models.length) [values.model_path] = state.base_models;
  if (script === "fine_tune_qwen") {
    if (rows.length) values.data_path = [rows[0]];
    values.use_lora = true;
  }
  return values;
}

function drawPlan(memory, plan) {
  const most = Math.max(plan.total_mb, plan.free_mb ?? 0);
  const names = { weights: t("weights"), state: t("gradients"), activations: t("activations"), program: t("program") };
  const stack = h("div", { class: "stack", role: "img", "aria-label": `${t("memory")}: ${megabytes(plan.total_mb)}` }, PARTS.map((part) => {
    const bar = h("span", { class: `part ${part}` });
    bar.style.width = `${(100 * plan.parts[part]) / most}%`;
    return bar;
  }));
  fill(memory, h("h2", {}, t("memory")), stack,
    h("p", {}, plan.free_mb === null ? t("memoryFree", megabytes(plan.total_mb), number(plan.tokens)) : t("memoryText", megabytes(plan.total_mb), megabytes(plan.free_mb), number(plan.tokens))),
    h("dl", { class: "legend-list" }, PARTS.map((part) => [h("dt", {}, h("span", { class: `key ${part}` }), names[part]), h("dd", { class: "num" }, megabytes(plan.parts[part]))])),
    h("p", { class: "muted" }, t("trainable", number(plan.trainable), number(plan.parameters))),
    plan.advice ? h("p", { class: "problem" }, plan.advice) : null);
}
