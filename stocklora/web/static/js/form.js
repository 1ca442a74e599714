// A script's settings as a form: sections, help and defaults as its dataclass has them.

import { get, post } from "./api.js";
import { fill, h, icon, later } from "./dom.js";
import { known, t } from "./strings.js";
import { commandBlock } from "./runs.js";

const forms = new Map();

/** The form of a script, asked for once. */
export async function formOf(script) {
  if (!forms.has(script)) forms.set(script, await get(`/api/forms/${script}`));
  return forms.get(script);
}

const shown = (value) => (Array.isArray(value) ? value.join(", ") : value === null || value === "" ? "" : String(value));
const same = (one, other) => JSON.stringify(one) === JSON.stringify(other);

/** Text of an input as a value of its field; throws a message where it is none. */
export function parsed(field, text) {
  const plain = text.trim();
  if (field.many) return plain ? plain.split(/[,，\n]+/).map((item) => one(field, item.trim())).filter((item) => item !== "") : field.default;
  if (!plain) return field.default;
  return one(field, plain);
}

function one(field, text) {
  if (field.kind !== "int" && field.kind !== "float") return text;
  const value = Number(text);
  if (!Number.isFinite(value) || (field.kind === "int" && !Number.isInteger(value))) {
    throw new Error(`${field.flag} ${text}: ${field.kind === "int" ? "a whole number" : "a number"}`);
  }
  return value;
}

/**
 * A form. `values` are what differs from the defaults; `suggest` offers values by field name; `hidden` are fields that
 * the page sets itself; `open` names sections that begin open; `onChange(values, problem)` hears of every change that
 * the script would take (problem null) or refuse.
 */
export async function scriptForm({ script, values = {}, suggest = {}, hidden = [], open = [], only = null, onChange = () => {} }) {
  const { sections } = await formOf(script);
  const given = { ...values };
  const command = h("div", { class: "form-command" });
  const problem = h("p", { class: "problem", role: "alert" });
  let asked = 0;

  const check = later(async () => {
    const mine = (asked += 1);
    try {
      const answer = await post(`/api/forms/${script}/check`, given);
      if (mine !== asked) return;
      fill(problem);
      fill(command, commandBlock(answer.command));
      onChange(given, null);
    } catch (error) {
      if (mine !== asked) return;
      fill(problem, error.message);
      onChange(given, error.message);
    }
  }, 180);

  const refuse = (message) => {
    asked += 1;
    check.cancel();
    fill(problem, message);
    onChange(given, message);
  };

  const boxes = sections
    .map((section) => ({ ...section, fields: section.fields.filter((field) => !hidden.includes(field.name)) }))
    .filter((section) => section.fields.length && (!only || only.includes(section.name)))
    .map((section) => {
      const count = h("span", { class: "count" });
      const recount = () => {
        const changed = section.fields.filter((field) => field.name in given).length;
        fill(count, changed ? t("changedCount", changed) : "");
      };
      recount();
      const rows = section.fields.map((field) =>
        fieldRow(field, given[field.name] ?? field.default, suggest[field.name] ?? [], {
          set(value) {
            if (same(value, field.default)) delete given[field.name];
            else given[field.name] = value;
            recount();
            check();
          },
          refuse,
        }),
      );
      const title = known(`sec_${section.name}`, section.name);
      return h("details", { class: "section", open: open.includes(section.name) }, h("summary", {}, h("span", {}, title), count), h("div", { class: "fields" }, rows));
    });
  check();
  return { element: h("div", { class: "form" }, boxes), command, problem, values: () => ({ ...given }) };
}

let numbers = 0;

function fieldRow(field, value, suggested, { set, refuse }) {
  numbers += 1;
  const id = `field-${numbers}`;
  const name = field.flag || field.name;
  const label = h("label", { for: id, class: "flag" }, name);
  const help = h("p", { class: "help", id: `${id}-help` }, `${field.help}. `, field.default === null || same(field.default, []) || field.kind === "bool" ? "" : h("span", { class: "default" }, t("isDefault", shown(field.default))));
  const row = h("div", { class: "field" });
  const mark = (current) => row.classList.toggle("changed", !same(current, field.default));
  mark(value);
  let input;
  const take = () => {
    let current;
    try {
      current = field.kind === "bool" ? input.checked : parsed(field, input.value);
    } catch (error) {
      input.setAttribute("aria-invalid", "true");
      refuse(error.message);
      return;
    }
    input.removeAttribute("aria-invalid");
    mark(current);
    set(current);
  };
  const described = { id, "aria-describedby": `${id}-help`, autocomplete: "off", spellcheck: "false" };
  if (field.kind === "bool") {
    input = h("input", { ...described, type: "checkbox", checked: value === true, onchange: take });
    fill(row, h("div", { class: "check" }, input, label), help);
    return row;
  }
  if (field.choices && !field.many) {
    const choices = field.optional ? ["", ...field.choices] : field.choices;
    input = h("select", { ...described, onchange: take }, choices.map((choice) => h("option", { value: String(choice), selected: choice === value }, choice === "" ? "–" : String(choice))));
    fill(row, label, input, help);
    return row;
  }
  const list = suggested.length && !field.many ? h("datalist", { id: `${id}-list` }, suggested.map((text) => h("option", { value: text }))) : null;
  input = h("input", {
    ...described, type: "text", value: same(value, field.default) ? "" : shown(value), placeholder: shown(field.default) || field.metavar || "",
    inputmode: field.kind === "int" ? "numeric" : field.kind === "float" ? "decimal" : null, list: list ? `${id}-list` : null, oninput: take,
  });
  const offers = field.many ? [...new Set([...suggested, ...(field.choices ?? [])])] : [];
  const chips = offers.length
    ? h("div", { class: "chips" }, offers.slice(0, 24).map((text) =>
        h("button", {
          type: "button", class: "chip",
          onclick: () => {
            const items = input.value.trim() ? input.value.split(/[,，]+/).map((item) => item.trim()).filter(Boolean) : [...(field.default ?? [])];
            input.value = (items.includes(text) ? items.filter((item) => item !== text) : [...items, text]).join(", ");
            take();
          },
        }, text)))
    : null;
  fill(row, label, input, list, chips, help);
  return row;
}

/** A form with its command and a button that starts it; `started(run)` is told of the run. */
export async function startForm({ title, started, button, start, ...options }) {
  let block = null;
  const begin = h("button", {
    class: "primary", type: "button",
    onclick: async () => {
      begin.disabled = true;
      try {
        started(await start(options.script, form.values()));
      } catch (error) {
        fill(form.problem, error.message);
      }
      begin.disabled = block !== null;
    },
  }, button ?? t("startRun"));
  const form = await scriptForm({
    ...options,
    onChange(values, problem) {
      block = problem;
      begin.disabled = problem !== null;
      options.onChange?.(values, problem);
    },
  });
  return { form, begin, element: h("div", {}, title ? h("h2", {}, title) : null, form.element, form.problem, form.command, h("div", { class: "actions" }, begin)) };
}

export { icon };
