// Figures of the last minutes, from the service's /metrics: rates of counters, quantiles of histograms.
import { get, pause, Problem, reason } from "./api";

const SCRAPE_INTERVAL_S = 2;
/** Until the next scrape after a rejection: a setting or the key forbids it. */
const REJECTED_S = 60;
const KEPT = 300;
/** Samples over which rates and quantiles are taken. */
const WINDOW = 5;

export const STAGES = ["queue", "load", "infer", "commit"];
/** Requests that compute; others (watches, pages, scrapes) say nothing of the latency of chunks. */
const COMPUTES = /\/(chunks|infer|predict|forecast)$/;

type Totals = Map<string, number>;

/** Totals of one scrape; none where it failed. */
interface Scrape {
  at_s: number;
  totals: Totals;
}

const PER_MODEL = [
  "carry_events_total", "carry_queue_depth", "carry_websocket_connections", "carry_watchers",
];
const LINE = /^(\w+)(?:\{(.*)\})? (\S+)/;
const LABEL = /(\w+)="((?:[^"\\]|\\.)*)"/g;

/** Adds up the samples of Prometheus' text format by what the page shows. */
export function parse(text: string): Totals {
  const totals: Totals = new Map();
  const add = (key: string, value: number) => totals.set(key, (totals.get(key) ?? 0) + value);
  for (const line of text.split("\n")) {
    const [, name, labels = "", value] = LINE.exec(line) ?? [];
    if (name === undefined || !name.startsWith("carry_")) continue;
    const label = Object.fromEntries([...labels.matchAll(LABEL)].map(([, key, of]) => [key, of]));
    if (name.startsWith("carry_request_seconds")) {
      if (!COMPUTES.test(label.route ?? "") && label.method !== "GRPC") continue;
      const bound = Number(label.le?.replace("+Inf", "Infinity"));
      if (name.endsWith("_bucket")) add(`latency ${bound}`, Number(value));
      if (name.endsWith("_count")) add("requests", Number(value));
    } else if (name.startsWith("carry_chunk_stage_seconds")) {
      if (!name.endsWith("_bucket")) add(`${name.slice(26)} ${label.stage}`, Number(value));
    } else if (name === "carry_refusals_total") {
      add(`code ${label.code}`, Number(value));
    } else if (PER_MODEL.includes(name)) {
      add(`${name} ${label.model}`, Number(value));
    }
  }
  return totals;
}

class Metrics {
  scrapes: Scrape[] = [];
  /** Why the last scrape failed. */
  problem = "";
  private readonly listeners = new Set<() => void>();

  subscribe(listener: () => void): () => void {
    this.listeners.add(listener);
    return () => this.listeners.delete(listener);
  }

  async run(signal: AbortSignal): Promise<void> {
    while (!signal.aborted) {
      let totals: Totals = new Map();
      let next_s = SCRAPE_INTERVAL_S;
      try {
        totals = parse(await (await get("metrics", signal)).text());
        this.problem = "";
      } catch (error) {
        this.problem = reason(error);
        if (error instanceof Problem) next_s = REJECTED_S;
      }
      this.scrapes = [...this.scrapes.slice(1 - KEPT), { at_s: Date.now() / 1000, totals }];
      for (const listener of this.listeners) listener();
      await pause(next_s, signal);
    }
  }

  /** The totals of the last scrape. */
  get last(): Totals {
    return this.scrapes.at(-1)?.totals ?? new Map();
  }

  get times(): number[] {
    return this.scrapes.map(({ at_s }) => at_s);
  }

  /** The keys with a prefix in any scrape, without it: `carry_events_total ` gives the models. */
  names(prefix: string): string[] {
    const keys = this.scrapes.flatMap(({ totals }) => [...totals.keys()]);
    return [...new Set(keys.filter((key) => key.startsWith(prefix)))].map((key) =>
      key.slice(prefix.length),
    );
  }

  /** A figure of each scrape by the increases up to it; null where there is none. */
  private each(
    figure: (increase: (key: string) => number, seconds: number) => number | null,
  ): (number | null)[] {
    return this.scrapes.map(({ at_s, totals }, index) => {
      const before = this.scrapes.slice(Math.max(0, index - WINDOW), index);
      const from = before.find((scrape) => scrape.totals.size > 0);
      if (from === undefined || totals.size === 0) return null;
      const increase = (key: string) => {
        const [was, is] = [from.totals.get(key) ?? 0, totals.get(key) ?? 0];
        // a counter that decreased was reset
        return is < was ? is : is - was;
      };
      return figure(increase, at_s - from.at_s);
    });
  }

  /** Increase per second of a counter. */
  rate(key: string): (number | null)[] {
    return this.each((increase, seconds) => increase(key) / seconds);
  }

  /** Mean seconds of a chunk in a stage. */
  stage(stage: string): (number | null)[] {
    return this.each((increase) => {
      const count = increase(`count ${stage}`);
      return count > 0 ? increase(`sum ${stage}`) / count : null;
    });
  }

  /** Quantile of the duration of requests, in seconds: linear within a bucket, as in Prometheus. */
  latency(quantile: number): (number | null)[] {
    const edges = this.names("latency ").map(Number).filter(Number.isFinite).sort((a, b) => a - b);
    return this.each((increase) => {
      const counts = edges.map((edge) => increase(`latency ${edge}`));
      const rank = quantile * increase("latency Infinity");
      if (rank === 0) return null;
      const at = counts.findIndex((count) => count >= rank);
      if (at < 0) return edges.at(-1) ?? null;
      const [low, below] = at === 0 ? [0, 0] : [edges[at - 1]!, counts[at - 1]!];
      return low + ((edges[at]! - low) * (rank - below)) / (counts[at]! - below);
    });
  }
}

export const metrics = new Metrics();
