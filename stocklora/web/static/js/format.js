// Numbers and times as people write them.

const MINUS = "\u2212";

/** A price with the digits that its size deserves. */
export function price(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  const digits = Math.abs(value) >= 1 ? 2 : Math.abs(value) >= 0.01 ? 4 : 6;
  return number(value, digits);
}

export function number(value, digits = 0) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  return value.toLocaleString("en-US", { minimumFractionDigits: digits, maximumFractionDigits: digits }).replace("-", MINUS);
}

/** A share of one as a signed percentage. */
export function signed(share, digits = 2) {
  if (share === null || share === undefined || !Number.isFinite(share)) return "–";
  const rounded = Number((100 * share).toFixed(digits));
  const sign = rounded > 0 ? "+" : rounded < 0 ? MINUS : "";
  return `${sign}${number(Math.abs(rounded), digits)}%`;
}

/** A share of one as a percentage; none that is not certain is called 0% or 100%. */
export function percent(share, digits = 0) {
  if (digits === 0 && share > 0 && share < 0.005) return "<1%";
  if (digits === 0 && share < 1 && share >= 0.995) return ">99%";
  return Number.isFinite(share) ? `${number(100 * share, digits)}%` : "–";
}

export function bytes(count) {
  if (count < 1000) return `${count} B`;
  if (count < 1e6) return `${number(count / 1e3)} kB`;
  return count < 1e9 ? `${number(count / 1e6, 1)} MB` : `${number(count / 1e9, 2)} GB`;
}

export function megabytes(count) {
  return count < 1000 ? `${number(count)} MB` : `${number(count / 1000, 1)} GB`;
}

export function duration(seconds) {
  if (seconds < 60) return `${number(seconds, seconds < 10 ? 1 : 0)} s`;
  const minutes = Math.floor(seconds / 60);
  if (minutes < 60) return `${minutes} min ${Math.floor(seconds % 60)} s`;
  return `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

/** An ISO time as the reader's day and hour. */
export function moment(iso) {
  const when = new Date(iso);
  const two = (part) => String(part).padStart(2, "0");
  return `${when.getFullYear()}-${two(when.getMonth() + 1)}-${two(when.getDate())} ${two(when.getHours())}:${two(when.getMinutes())}`;
}

/** "11-03" of "2025-11-03". */
export const day = (date) => date.slice(5);
