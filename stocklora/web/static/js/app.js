// The page's frame: rooms, language, theme, and which room the address names.

import { get, refreshRuns, watchRuns } from "./api.js";
import { assistantRoom } from "./assistant.js";
import { dataRoom } from "./data.js";
import { fill, h, icon } from "./dom.js";
import { forecastsRoom } from "./forecasts.js";
import { runPage } from "./runs.js";
import { isChinese, setLanguage, t } from "./strings.js";
import { tickerPage } from "./ticker.js";
import { trainRoom } from "./train.js";
import { trustRoom } from "./trust.js";

const ROOMS = { forecasts: forecastsRoom, train: trainRoom, trust: trustRoom, assistant: assistantRoom, data: dataRoom };
const RUN_ROOM = { train: "train", train_lora: "train", fine_tune_qwen: "train", merge_lora: "train", backtest: "trust", ledger: "trust", inference_lora: "assistant", download_model: "data" };

const remembered = (name, otherwise) => {
  try {
    return localStorage.getItem(`stocklora-${name}`) ?? otherwise;
  } catch {
    return otherwise;
  }
};
const remember = (name, value) => {
  try {
    localStorage.setItem(`stocklora-${name}`, value);
  } catch {
    // a browser that keeps nothing asks again
  }
};

let state = { workspace: "", version: "" };
let leave = null;
let arrived = null;

function theme(name) {
  document.documentElement.dataset.theme = name;
  remember("theme", name);
}

function frame() {
  const main = h("main", { id: "main", tabindex: "-1" });
  const links = Object.keys(ROOMS).map((room) => h("a", { href: `#/${room}`, "data-room": room }, icon(room), h("span", {}, t(room))));
  const running = h("a", { class: "busy", href: "#/train" });
  const banner = h("div", { class: "banner", role: "alert", hidden: true });
  const foot = h("div", { class: "foot" },
    h("button", { type: "button", class: "quiet", "aria-label": t("languageLabel"), lang: isChinese() ? "en" : "zh-CN", onclick: () => switchLanguage() }, t("language")),
    h("button", { type: "button", class: "quiet", "aria-label": t("theme"), onclick: () => { theme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"); arrive(true); } }, icon("theme")),
    h("p", { class: "fine" }, h("span", { title: state.workspace }, state.workspace.split(/[\\/]/).pop() || ""), ` · stocklora ${state.version}`),
    h("p", { class: "fine" }, t("charts"), " ", h("a", { href: "https://www.tradingview.com/", rel: "noreferrer", target: "_blank" }, "TradingView Lightweight Charts™")),
    h("p", { class: "fine" }, t("advice")));
  fill(document.body,
    h("a", { class: "skip", href: "#main", onclick: (event) => { event.preventDefault(); main.focus(); } }, t("skip")),
    banner,
    h("div", { class: "frame" },
      h("nav", { class: "rooms", "aria-label": t("rooms") }, h("a", { class: "brand", href: "#/forecasts", "aria-label": "stocklora" }, h("img", { src: "/static/icon.svg", alt: "", width: 22, height: 22 }), h("span", {}, "stocklora")), links, running, foot),
      main));
  watchRuns((all) => {
    const active = all.filter((run) => run.state === "running");
    running.hidden = !active.length;
    if (active.length) {
      running.href = `#/run/${active[0].id}`;
      fill(running, h("span", { class: "dot pulse" }), `${active.length} ${t("running")}`);
    }
  });
  return main;
}

let main = null;

function switchLanguage() {
  const code = isChinese() ? "en" : "zh";
  remember("language", code);
  setLanguage(code);
  main = frame();
  arrive(true);
}

function arrive(again = false) {
  const [room, ...rest] = (location.hash.replace(/^#\/?/, "") || "forecasts").split("/");
  const name = decodeURIComponent(rest.join("/"));
  if (!again && arrived === location.hash) return;
  arrived = location.hash;
  leave?.();
  const place = h("div", { class: "room" });
  fill(main, place);
  let shown = room in ROOMS ? room : "forecasts";
  if (room === "run" && name) {
    const script = name.split("-").slice(2, -1).join("-");
    shown = RUN_ROOM[script] ?? "forecasts";
    leave = runPage(place, name);
  } else if (room === "forecasts" && name) {
    leave = tickerPage(place, name);
  } else {
    leave = ROOMS[shown](place, name);
  }
  for (const link of document.querySelectorAll("nav a[data-room]")) {
    if (link.dataset.room === shown) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = `${name || t(shown)} · stocklora`;
  if (!again) main.scrollTo?.(0, 0);
}

async function begin() {
  const wanted = remembered("language", navigator.language.startsWith("zh") ? "zh" : "en");
  setLanguage(wanted);
  theme(remembered("theme", matchMedia("(prefers-color-scheme: light)").matches ? "light" : "dark"));
  if (location.search) history.replaceState(null, "", location.pathname + location.hash); // the token, out of sight
  main = frame();
  arrive();
  addEventListener("hashchange", () => arrive());
  const banner = (key) => {
    const line = document.querySelector(".banner");
    line.hidden = !key;
    fill(line, key ? t(key) : "");
  };
  for (const key of ["locked", "offline"]) document.addEventListener(key, () => banner(key));
  document.addEventListener("answered", () => banner(null));
  refreshRuns();
  try {
    state = await get("/api/state");
    const fine = document.querySelector(".foot .fine");
    fill(fine, h("span", { title: state.workspace }, state.workspace.split(/[\\/]/).pop()), ` · stocklora ${state.version}`);
  } catch {
    // the rooms say what is wrong
  }
}

begin();
