// A list of any length of which only what is seen stands in the document; a grid for keyboards and readers.

import { h } from "./dom.js";

const SPARE = 6; // rows beyond either end

/** A list. `rowOf(item)` makes a row's cells, `open(item)` is what Enter and a click do. */
export function virtualList({ label, rowHeight, rowOf, open, keyOf }) {
  const body = h("div", { class: "vbody", role: "rowgroup" });
  const box = h("div", { class: "vlist", role: "grid", tabindex: "0", "aria-label": label }, body);
  let items = [];
  let active = 0;
  let rows = new Map();
  let frame = 0;

  const height = () => rowHeight();
  const draw = () => {
    frame = 0;
    const tall = height();
    body.style.height = `${tall * items.length}px`;
    const from = Math.max(0, Math.floor(box.scrollTop / tall) - SPARE);
    const to = Math.min(items.length, Math.ceil((box.scrollTop + box.clientHeight) / tall) + SPARE);
    const seen = new Map();
    for (let place = from; place < to; place += 1) {
      const item = items[place];
      const key = keyOf(item);
      let row = rows.get(key);
      if (!row || row.item !== item) {
        row?.element.remove();
        row = { item, element: h("div", { class: "vrow", role: "row", id: `row-${place}` }, rowOf(item)) };
        row.element.addEventListener("click", () => open(row.item));
        body.append(row.element);
      }
      row.element.id = `row-${place}`;
      row.element.setAttribute("aria-rowindex", place + 1);
      row.element.style.transform = `translateY(${place * tall}px)`;
      row.element.classList.toggle("active", place === active);
      seen.set(key, row);
    }
    for (const [key, row] of rows) if (seen.get(key) !== row) row.element.remove();
    rows = seen;
    box.setAttribute("aria-rowcount", items.length);
    if (items.length && active >= from && active < to) box.setAttribute("aria-activedescendant", `row-${active}`);
    else box.removeAttribute("aria-activedescendant");
  };
  const soon = () => {
    if (!frame) frame = requestAnimationFrame(draw);
  };
  const go = (place) => {
    active = Math.max(0, Math.min(items.length - 1, place));
    const tall = height();
    if (active * tall < box.scrollTop) box.scrollTop = active * tall;
    if ((active + 1) * tall > box.scrollTop + box.clientHeight) box.scrollTop = (active + 1) * tall - box.clientHeight;
    draw();
  };
  box.addEventListener("scroll", soon, { passive: true });
  box.addEventListener("keydown", (event) => {
    const page = Math.max(1, Math.floor(box.clientHeight / height()) - 1);
    const steps = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -items.length, End: items.length };
    if (event.key in steps) go(active + steps[event.key]);
    else if (event.key === "Enter" && items[active]) open(items[active]);
    else return;
    event.preventDefault();
  });
  const sized = new ResizeObserver(soon);
  sized.observe(box);
  return {
    element: box,
    show(found) {
      items = found;
      active = Math.min(active, Math.max(0, items.length - 1));
      draw();
    },
    remove: () => sized.disconnect(),
  };
}
