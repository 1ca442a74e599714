// The server's side: JSON in, JSON out. Errors are lines for people.

export class Refused extends Error {}

async function answered(promise) {
  let response;
  try {
    response = await promise;
  } catch {
    throw new Refused("offline");
  }
  if (response.ok) return response;
  const text = await response.text();
  if (response.status === 403) {
    document.dispatchEvent(new CustomEvent("locked", { detail: text }));
    throw new Refused("locked");
  }
  let message = text;
  try {
    message = JSON.parse(text).error ?? text;
  } catch {
    message = `${response.status}`;
  }
  throw new Refused(message);
}

export async function get(path, query = {}) {
  const search = new URLSearchParams(query).toString();
  return (await answered(fetch(search ? `${path}?${search}` : path, { credentials: "same-origin" }))).json();
}

export async function post(path, body = {}) {
  return (await answered(send(path, body))).json();
}

export async function upload(file) {
  const path = `/api/prices?${new URLSearchParams({ name: file.name })}`;
  return (await answered(fetch(path, { method: "POST", body: file, credentials: "same-origin" }))).json();
}

/** Calls `onPiece` with each event's JSON until the stream ends. */
export async function stream(path, body, onPiece, signal) {
  const response = await answered(send(path, body, signal));
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    rest += value;
    const lines = rest.split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data: ") && line !== "data: [DONE]") onPiece(JSON.parse(line.slice(6)));
    }
  }
}

function send(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  return fetch(path, { method: "POST", headers, body: JSON.stringify(body), credentials: "same-origin", signal });
}

// ---- runs: one list for the whole page, asked for while somebody looks

const listeners = new Set();
let known = [];
let timer = 0;

/** Calls `listener` with all runs now and whenever they change; returns how to end that. */
export function watchRuns(listener) {
  listeners.add(listener);
  listener(known);
  return () => listeners.delete(listener);
}

export const runs = () => known;

/** When to look at the runs again: often while one is young, for most scripts take seconds. */
export function lookAgain() {
  const ages = known.filter((run) => run.state === "running").map((run) => run.seconds);
  if (!ages.length) return 6000;
  return Math.min(...ages) < 20 ? 400 : 1000;
}

export async function refreshRuns() {
  clearTimeout(timer);
  try {
    const found = await get("/api/runs");
    const changed = JSON.stringify(found) !== JSON.stringify(known);
    known = found;
    document.dispatchEvent(new CustomEvent("answered"));
    if (changed) for (const listener of [...listeners]) listener(known);
  } catch (error) {
    if (error.message === "offline") document.dispatchEvent(new CustomEvent("offline"));
  }
  timer = setTimeout(refreshRuns, lookAgain());
}

export async function start(script, values) {
  const run = await post("/api/runs", { script, values });
  known = [run, ...known];
  for (const listener of [...listeners]) listener(known);
  refreshRuns();
  return run;
}

/** Resolves with the run's description once it is over. */
export function ended(id) {
  return new Promise((resolve) => {
    let stop = () => {};
    const look = (all) => {
      const run = all.find((one) => one.id === id);
      if (run && run.state !== "running") {
        queueMicrotask(() => stop());
        resolve(run);
      }
    };
    stop = watchRuns(look);
  });
}
