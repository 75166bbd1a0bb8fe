// A line chart (uPlot) with a legend of latest values, redrawn in the colours of the theme.
import { useContext, useEffect, useRef } from "preact/hooks";
import uPlot from "uplot";
import { ThemeContext } from "./theme";

export const MAX_SERIES = 6;
const HEIGHT = 170;

export interface Series {
  label: string;
  values: (number | null)[];
}

interface ChartProps {
  title: string;
  unit: string;
  /** Shared by the series: seconds of the wall clock, or positions. */
  x: number[];
  series: Series[];
  format: (value: number | null | undefined) => string;
  isTime?: boolean;
  /** Whether the values are probabilities, whose y axis is logarithmic. */
  isProbability?: boolean;
  /** Ranges of x that are shaded, with their ends. */
  spans?: [number, number][];
}

/** The colour of a custom property, for a canvas. */
function color(name: string): string {
  const probe = document.createElement("i");
  probe.style.color = `var(--${name})`;
  document.body.append(probe);
  const value = getComputedStyle(probe).color;
  probe.remove();
  return value;
}

function shade({ ctx, bbox, valToPos }: uPlot, spans: [number, number][], fill: string): void {
  ctx.save();
  ctx.fillStyle = fill;
  for (const [first, last] of spans) {
    const start = Math.max(bbox.left, valToPos(first - 0.5, "x", true));
    const end = Math.min(bbox.left + bbox.width, valToPos(last + 0.5, "x", true));
    if (end > start) ctx.fillRect(start, bbox.top, end - start, bbox.height);
  }
  ctx.restore();
}

function options(
  props: ChartProps, labels: string[], width: number, spans: { current: [number, number][] },
): uPlot.Options {
  const fill = color("alarm");
  const axis = {
    stroke: color("quiet"),
    font: "12px system-ui, sans-serif",
    grid: { stroke: color("line"), width: 1 },
    ticks: { show: false },
  };
  return {
    width,
    height: HEIGHT,
    legend: { show: false },
    hooks: { drawClear: [(plot) => shade(plot, spans.current, fill)] },
    padding: [8, 8, 0, 0],
    cursor: { y: false, points: { size: 7 }, drag: { x: false, y: false } },
    scales: {
      x: { time: props.isTime ?? false },
      y: props.isProbability
        ? { distr: 3, range: (_, low) => [decade(low), 1] }
        : { range: (_, low, high) => bounds(low, high, props.isTime ?? false) },
    },
    axes: [
      { ...axis, space: 90, size: 28, values: props.isTime ? CLOCK : undefined },
      {
        ...axis,
        ...(props.isProbability ? DECADES : {}),
        size: 58,
        values: (_, ticks) => ticks.map((tick) => props.format(tick)),
      },
    ],
    series: [
      {},
      ...labels.map((label, index) => ({
        label, stroke: color(`series-${index}`), width: 1.75, points: { show: false },
      })),
    ],
  };
}

const CLOCK = (_: uPlot, ticks: number[]): string[] =>
  ticks.map((tick) => new Date(tick * 1000).toLocaleTimeString("en-GB"));

/** The power of ten at or below a probability, from 1e-20 on: uPlot draws no axis from below 1e-32. */
function decade(low: number | null): number {
  const exponent = Math.floor(Math.log10(low || 0.1));
  return Number(`1e${Math.min(-1, Math.max(-20, exponent))}`);
}

/** Ticks of a logarithmic axis up to 1: some powers of ten. */
const DECADES: uPlot.Axis = {
  splits: (_, __, low) => {
    const decades = Math.round(-Math.log10(low));
    const step = Math.ceil(decades / 5);
    return Array.from({ length: Math.floor(decades / step) + 1 }, (_, at) => Number(`1e-${at * step}`)).reverse();
  },
  filter: (_, splits) => splits,
};

/** The range of the y axis; a rate starts at zero. */
function bounds(low: number | null, high: number | null, isTime: boolean): [number, number] {
  if (low === null || high === null) return [0, 1];
  if (isTime) return [0, high > 0 ? high * 1.15 : 1];
  const margin = (high - low) * 0.1 || Math.abs(high) * 0.1 || 1;
  return [low - margin, high + margin];
}

export function Chart(props: ChartProps) {
  const { title, unit, x, format } = props;
  const series = props.series.slice(0, MAX_SERIES);
  const box = useRef<HTMLDivElement>(null);
  const plot = useRef<uPlot | null>(null);
  const spans = useRef<[number, number][]>([]);
  spans.current = props.spans ?? [];
  const theme = useContext(ThemeContext);
  const names = JSON.stringify(series.map(({ label }) => label));
  const data = [x, ...series.map(({ values }) => values)] as uPlot.AlignedData;

  useEffect(() => {
    const element = box.current!;
    const made = new uPlot(options(props, JSON.parse(names), element.clientWidth, spans), data, element);
    plot.current = made;
    const observer = new ResizeObserver(() =>
      made.setSize({ width: element.clientWidth, height: HEIGHT }),
    );
    observer.observe(element);
    return () => (observer.disconnect(), made.destroy());
  }, [names, theme]);
  useEffect(() => plot.current?.setData(data));

  const latest = series.map(({ label, values }) => `${label} ${format(values.at(-1))}`);
  return (
    <figure class="panel chart">
      <figcaption><h3>{title}</h3> <span class="quiet">{unit}</span></figcaption>
      <div ref={box} role="img" aria-label={`${title}, latest: ${latest.join(", ") || "none"}`} />
      <ul class="legend">
        {series.map(({ label, values }, index) => (
          <li key={label}>
            <i style={{ background: `var(--series-${index})` }} /> {label} <b>{format(values.at(-1))}</b>
          </li>
        ))}
        {series.length === 0 && <li class="quiet">Nothing yet</li>}
        {props.series.length > MAX_SERIES && (
          <li class="quiet">and {props.series.length - MAX_SERIES} more</li>
        )}
      </ul>
    </figure>
  );
}
