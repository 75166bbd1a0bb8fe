// Numbers, sizes and durations as the page shows them.

const LOCALE = "en";

/** A number with at most four significant digits, whole thousands with separators. */
export function number(value: number | null | undefined): string {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (!Number.isFinite(value)) return value > 0 ? "∞" : "−∞";
  const size = Math.abs(value);
  if (size >= 1000) return Math.round(value).toLocaleString(LOCALE);
  if (size !== 0 && size < 0.001) return value.toExponential(1);
  return value.toLocaleString(LOCALE, { maximumSignificantDigits: 3 });
}

export const whole = (value: number | undefined): string =>
  value === undefined ? "–" : value.toLocaleString(LOCALE);

export function duration(seconds: number | null | undefined): string {
  if (seconds === null || seconds === undefined || Number.isNaN(seconds)) return "–";
  if (seconds < 1) return `${number(seconds * 1000)} ms`;
  if (seconds < 90) return `${number(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return seconds < 172800 ? `${Math.round(seconds / 3600)} h` : `${Math.round(seconds / 86400)} d`;
}

/** How long ago a time of the wall clock was, in whole seconds. */
export const ago = (time_ms: number): string =>
  `${duration(Math.max(0, Math.round((Date.now() - time_ms) / 1000)) || 0)} ago`.replace(
    "0 ms ago",
    "now",
  );

export function bytes(size: number | undefined): string {
  if (size === undefined) return "–";
  if (size < 1024) return `${size} B`;
  return size < 1024 ** 2 ? `${number(size / 1024)} KiB` : `${number(size / 1024 ** 2)} MiB`;
}
