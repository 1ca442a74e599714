// A chat with the base and with what was tuned on it, side by side where one likes.

import { get, lookAgain, refreshRuns, start, stream, watchRuns } from "./api.js";
import { fill, h } from "./dom.js";
import { startForm } from "./form.js";
import { runStrip } from "./runs.js";
import { t } from "./strings.js";

let talk = []; // the conversation, kept while the page is open

export function assistantRoom(root) {
  let gone = false;
  let timer = 0;
  let server = null;
  let strip = null;
  let shown = "";
  const place = h("div", {});
  const stripBox = h("div", { class: "strips" });
  const problem = h("p", { class: "problem", role: "alert" });

  async function look() {
    clearTimeout(timer);
    try {
      const found = await get("/api/assistant");
      if (gone) return;
      server = found.server;
      const now = server ? (server.port ? `chat ${server.run.id} ${found.models}` : `load ${server.run.id}`) : "none";
      if (now !== shown) {
        shown = now;
        drawStrip();
        if (!server) await offer();
        else if (!server.port) fill(place, h("p", { class: "muted pad" }, t("loadingModel")));
        else fill(place, chat(found));
      }
    } catch (error) {
      if (!gone && error.message === "offline") fill(problem, t("offline"));
    }
    if (!gone) timer = setTimeout(look, server && !server.port ? Math.min(lookAgain(), 1000) : 4000);
  }

  function drawStrip() {
    strip?.remove();
    strip = server ? runStrip(server.run.id) : null;
    fill(stripBox, strip?.element);
  }

  async function offer() {
    const state = await get("/api/state");
    if (gone) return;
    if (!state.base_models.length && !state.adapters.length) {
      return fill(place, h("div", { class: "empty" }, h("p", { class: "title" }, t("startServer")), h("p", {}, t("noBase")), h("div", { class: "actions" }, h("a", { class: "button primary", href: "#/data" }, t("toData")))));
    }
    const values = { serve: true, port: 0 };
    // An adapter may name its base by a path of another folder.
    if (state.adapters.length) values.lora_model = [state.adapters[0]];
    if (!state.adapters.length || state.base_models.length === 1) [values.base_model] = state.base_models;
    const { element } = await startForm({
      script: "inference_lora", values, only: ["model", "answers"], hidden: ["serve", "port", "json_schema", "batch_size"], open: ["model"],
      suggest: { base_model: state.base_models, lora_model: state.adapters }, button: t("startServer"), start,
      started: () => { refreshRuns(); look(); },
    });
    if (!gone) fill(place, h("div", { class: "narrow" }, h("p", { class: "lead" }, t("assistantText")), element));
  }

  function chat({ models, schemas }) {
    const log = h("div", { class: "talk", tabindex: "0", role: "log", "aria-label": t("assistant") });
    const model = h("select", { "aria-label": t("answerBy") }, models.map((name) => h("option", { value: name }, name)));
    const beside = h("select", { "aria-label": t("besideIt") }, h("option", { value: "" }, t("nobody")), models.map((name) => h("option", { value: name }, name)));
    if (models.length > 1) beside.value = models[models.length - 1];
    const form = h("select", { "aria-label": t("schema"), onchange: () => { own.hidden = form.value !== "own"; } }, h("option", { value: "" }, t("freeText")), Object.keys(schemas).map((name) => h("option", { value: name }, name)), h("option", { value: "own" }, t("ownSchema")));
    const own = h("textarea", { class: "mono", rows: 5, hidden: true, "aria-label": t("schemaText"), spellcheck: "false" });
    own.value = JSON.stringify({ type: "object", properties: { answer: { type: "string" } }, required: ["answer"] }, null, 1);
    const heat = h("input", { type: "text", inputmode: "decimal", value: "0", size: 4, "aria-label": t("temperature") });
    const most = h("input", { type: "text", inputmode: "numeric", value: "256", size: 5, "aria-label": t("maxTokens") });
    const message = h("textarea", { rows: 2, placeholder: t("message"), "aria-label": t("message"), onkeydown: (event) => { if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); ask(); } } });
    const button = h("button", { type: "submit", class: "primary" }, t("send"));
    let stopper = null;

    const drawTalk = () => {
      const low = log.scrollTop + log.clientHeight >= log.scrollHeight - 40;
      if (!talk.length) {
        fill(log, h("div", { class: "empty" }, h("p", { class: "title" }, t("emptyChat")), h("div", { class: "chips center" }, ["example1", "example2", "example3"].map((key) => h("button", { type: "button", class: "chip", onclick: () => { message.value = t(key); ask(); } }, t(key))))));
        return;
      }
      fill(log, talk.map((turn) => h("div", { class: "turn" }, h("div", { class: "said you" }, h("span", { class: "who" }, t("you")), h("p", {}, turn.question)),
        h("div", { class: `answers-of n${turn.answers.length}` }, turn.answers.map((answer) => h("div", { class: "said" }, h("span", { class: "who mono" }, answer.model), h("p", { class: answer.error ? "problem" : "" }, answer.error ?? (answer.text.trim() || t(answer.over ? "noAnswer" : "thinking"))), answer.note ? h("span", { class: "muted" }, answer.note) : null))))));
      if (low) log.scrollTop = log.scrollHeight;
    };

    const format = () => {
      if (!form.value) return undefined;
      const schema = form.value === "own" ? JSON.parse(own.value) : schemas[form.value];
      return { type: "json_schema", json_schema: { name: "answer", schema } };
    };

    async function ask() {
      const question = message.value.trim();
      if (stopper) {
        stopper.abort();
        return;
      }
      if (!question) return message.focus();
      fill(problem);
      let shape;
      try {
        shape = format();
      } catch (error) {
        fill(problem, error.message);
        return;
      }
      message.value = "";
      const names = [model.value, beside.value].filter((name, at, all) => name && all.indexOf(name) === at);
      const before = talk.slice();
      const turn = { question, answers: names.map((name) => ({ model: name, text: "" })) };
      talk = [...talk, turn];
      drawTalk();
      stopper = new AbortController();
      fill(button, t("stop"));
      for (const answer of turn.answers) {
        const messages = before.flatMap((one) => {
          const own = one.answers.find((other) => other.model === answer.model && other.text && !other.error);
          return own ? [{ role: "user", content: one.question }, { role: "assistant", content: own.text }] : [];
        });
        messages.push({ role: "user", content: question });
        const body = { model: answer.model, messages, temperature: Number(heat.value) || 0, max_tokens: Math.max(1, Math.round(Number(most.value)) || 256), response_format: shape };
        try {
          await stream("/api/chat", body, (piece) => {
            if (piece.error) answer.error = piece.error.message;
            const choice = piece.choices?.[0];
            answer.text += choice?.delta?.content ?? "";
            if (choice?.finish_reason === "length") answer.note = t("cutOff");
            drawTalk();
          }, stopper.signal);
        } catch (error) {
          if (error.name === "AbortError") {
            answer.note = t("stopped");
            break;
          }
          answer.error = error.message === "offline" ? t("offline") : error.message;
        }
        answer.over = true;
        drawTalk();
      }
      stopper = null;
      fill(button, t("send"));
      drawTalk();
    }

    drawTalk();
    return h("div", { class: "chat" },
      h("div", { class: "tools" }, labelled(t("answerBy"), model), labelled(t("besideIt"), beside), labelled(t("schema"), form), labelled(t("temperature"), heat), labelled(t("maxTokens"), most), h("button", { type: "button", class: "quiet", onclick: () => { talk = []; drawTalk(); } }, t("newChat"))),
      own, log, h("form", { class: "say", onsubmit: (event) => { event.preventDefault(); ask(); } }, message, button));
  }

  const labelled = (words, input) => h("label", { class: "small" }, h("span", { class: "muted" }, words), input);

  fill(root, h("div", { class: "page assistant" }, h("header", { class: "bar-top" }, h("h1", {}, t("assistant"))), stripBox, problem, place));
  fill(place, h("p", { class: "muted" }, t("loading")));
  look();
  const stopRuns = watchRuns((all) => {
    const alive = all.some((run) => run.script === "inference_lora" && run.state === "running");
    if (alive !== (server !== null)) look();
  });
  return () => {
    gone = true;
    clearTimeout(timer);
    stopRuns();
    strip?.remove();
  };
}
