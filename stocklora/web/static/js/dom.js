// Elements made without any HTML text: whatever a file says stands in text nodes.

const SVG = "http://www.w3.org/2000/svg";

/** An element. `on...` attributes are listeners, null and false ones are left out, children are nodes or text. */
export function h(tag, attributes = {}, ...children) {
  return build(document.createElement(tag), attributes, children);
}

/** An SVG element. */
export function s(tag, attributes = {}, ...children) {
  return build(document.createElementNS(SVG, tag), attributes, children);
}

function build(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "value") element.value = value;
    else if (name === "checked") element.checked = value;
    else if (name === "style") Object.assign(element.style, value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(3).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** Put `children` in the place of what `element` has. */
export function fill(element, ...children) {
  element.replaceChildren(...children.flat(3).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** Calls `action` once `wait_ms` have gone by without another call. */
export function later(action, wait_ms) {
  let timer = 0;
  const call = (...given) => {
    clearTimeout(timer);
    timer = setTimeout(() => action(...given), wait_ms);
  };
  call.cancel = () => clearTimeout(timer);
  return call;
}

const ICONS = {
  forecasts: "M3 16l4-5 3 3 4-6m0 0 4-2m-4 2 4 3",
  train: "M4 17V9m5 8V4m5 13v-6m4 6H2",
  trust: "M10 2.5 16.5 5v5c0 4-3 6.5-6.5 7.5C6.500 16.500 3.500 14 3.500 10V5zM7 10l2.200 2.200L13 8.500",
  assistant: "M3 4h14v9H9l-4 3.500V13H3z",
  data: "M3 5c0-1.100 3.100-2 7-2s7 .900 7 2-3.100 2-7 2-7-.900-7-2zm0 0v10c0 1.100 3.100 2 7 2s7-.900 7-2V5M3 10c0 1.100 3.100 2 7 2s7-.900 7-2",
  back: "M12 4 6 10l6 6",
  copy: "M7 7h9v9H7zM4 13V4h9",
  close: "M5 5l10 10M15 5 5 15",
  refresh: "M16 10a6 6 0 1 1-1.800-4.200M16 3v3.500h-3.500",
  plus: "M10 4v12M4 10h12",
  alert: "M10 3 18 17H2zM10 8v4m0 2v.500",
  stop: "M5 5h10v10H5z",
  theme: "M10 3a7 7 0 1 0 7 7 5.500 5.500 0 0 1-7-7z",
};

/** A line icon; decoration, so hidden from readers. */
export function icon(name) {
  return s(
    "svg",
    { viewBox: "0 0 20 20", class: "icon", "aria-hidden": "true", focusable: "false" },
    s("path", { d: ICONS[name], fill: "none", stroke: "currentColor", "stroke-width": 1.6, "stroke-linecap": "round", "stroke-linejoin": "round" }),
  );
}
