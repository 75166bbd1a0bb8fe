// One watched stream: the outputs of its last steps, the norms of its state, how far the page is behind.
import {
  json, type ModelDetail, modelPath, pause, Problem, reason, serverEvents, type StreamHead, streamPath,
} from "./api";
import type { Series } from "./chart";

const KEPT_STEPS = 600;
/** Intervals between reads of the state: while chunks arrive, and while idle. */
const STATE_INTERVAL_S = 1;
const IDLE_STATE_INTERVAL_S = 5;
/** Least interval between reads, as a multiple of the time that one takes. */
const STATE_INTERVAL_FACTOR = 10;
const LONGEST_RETRY_S = 8;
const ENDS: Record<string, string> = {
  deleted: "The stream was deleted.",
  draining: "The service is stopping.",
};

type Nested = number | null | Nested[];

const flat = (value: Nested): (number | null)[] =>
  Array.isArray(value) ? value.flatMap(flat) : [value];
const norm = (value: Nested): number =>
  Math.sqrt(flat(value).reduce<number>((sum, each) => sum + Number(each) ** 2, 0));

/** The request cannot succeed by being repeated: the key, the name or the model is wrong. */
const isFinal = (error: unknown): error is Problem =>
  error instanceof Problem && error.status < 500 && error.status !== 429;

/** The last values of some series, by position. */
export class Track {
  x: number[] = [];
  series: Series[];

  constructor(labels: string[]) {
    this.series = labels.map((label) => ({ label, values: [] }));
  }

  /** Add steps, one row of values each, from a position on. */
  add(position: number, rows: (number | null)[][]): void {
    rows.forEach((row, step) => {
      this.x.push(position + step);
      this.series.forEach(({ values }, index) => values.push(row[index] ?? null));
    });
    const surplus = Math.max(0, this.x.length - KEPT_STEPS);
    for (const kept of [this.x, ...this.series.map(({ values }) => values)]) kept.splice(0, surplus);
  }
}

/** Names of the elements of an output. */
function elements(name: string, shape: number[], labels: string[]): string[] {
  const count = shape.reduce((product, size) => product * size, 1);
  if (count === 1 && labels.length === 0) return [name];
  const last = shape.at(-1) ?? 1;
  return Array.from({ length: count }, (_, index) => {
    const label = labels[index % last] ?? `${index % last}`;
    return count === last ? label : `${Math.floor(index / last)}, ${label}`;
  });
}

export class StreamWatch {
  connection: "connecting" | "live" | "interrupted" | "ended" = "connecting";
  /** Why the connection is not live, and why the state is not shown. */
  problem = "";
  stateProblem = "";
  detail?: ModelDetail;
  head?: StreamHead;
  epoch?: string;
  /** Position up to which outputs arrived or are known to be lost. */
  position?: number;
  missedSteps = 0;
  outputs = new Map<string, Track>();
  norms?: Track;
  /** Parts of one number each: clocks and counters. */
  numbers: [string, number][] = [];
  /** Position of the stream when the watch began; what was before is not missed. */
  private begin = 0;
  private stateAddress = "/state";

  constructor(
    private readonly model: string,
    private readonly stream: string,
    private readonly onChange: () => void,
    private readonly signal: AbortSignal,
  ) {}

  /** Steps of the stream whose outputs have not arrived. */
  get lag(): number | undefined {
    if (this.head === undefined || this.position === undefined) return undefined;
    return Math.max(0, this.head.position - this.position);
  }

  /** Follows the stream until the page leaves it; connects again after an interruption. */
  async follow(): Promise<void> {
    let [lastId, retry_s] = ["", 1];
    while (!this.signal.aborted) {
      try {
        this.detail ??= await json<ModelDetail>(modelPath(this.model), this.signal);
        // from 0: the outputs of the last chunk are delivered at once if they are stored
        const path = `${streamPath(this.model, this.stream)}/outputs?from=0`;
        for await (const { event, id, data } of serverEvents(path, this.signal, lastId)) {
          [lastId, retry_s] = [id || lastId, 1];
          this.apply(event, JSON.parse(data));
          this.onChange();
        }
      } catch (error) {
        if (this.signal.aborted) return;
        [this.connection, this.problem] = ["interrupted", reason(error)];
        if (isFinal(error)) this.connection = "ended";
        this.onChange();
        if (isFinal(error)) return;
      }
      await pause(retry_s, this.signal);
      retry_s = Math.min(2 * retry_s, LONGEST_RETRY_S);
    }
  }

  /** First and last position of each alarm among the outputs that are kept. */
  get alarms(): [number, number][] {
    const track = this.outputs.get(this.detail?.alarms?.output ?? "");
    const spans: [number, number][] = [];
    track?.x.forEach((position, index) => {
      if (!track.series[0]!.values[index]) return;
      const last = spans.at(-1);
      if (last?.[1] === position - 1) last[1] = position;
      else spans.push([position, position]);
    });
    return spans;
  }

  private apply(event: string, document: any): void {
    if (event === "stream") {
      if (document.epoch !== this.epoch) this.enterEpoch();
      this.epoch = document.epoch;
      this.position ??= this.begin = document.position;
      [this.connection, this.problem] = ["live", ""];
    } else if (event === "outputs") {
      this.append(document.from, document.position, document.outputs);
      [this.position, this.epoch] = [document.position, document.epoch];
    } else if (event === "gap" && document.to > this.begin) {
      this.position = document.to;
      this.missedSteps += document.to - document.from;
    } else if (event === "end") {
      this.connection = "interrupted";
      const { reason } = document;
      this.problem = ENDS[reason] ?? `The watch ended: ${reason}.`;
    }
  }

  private enterEpoch(): void {
    this.outputs = new Map();
    this.norms = this.head = this.position = undefined;
    this.missedSteps = 0;
    this.stateAddress = "/state";
  }

  private append(from: number, position: number, outputs: Record<string, Nested>): void {
    const { blocks, outputs: described } = this.detail!;
    const first = blocks
      ? Math.max(0, Math.floor((from - blocks.lookahead) / blocks.size) * blocks.size)
      : from;
    for (const [name, { shape, per, labels, categories_of }] of Object.entries(described)) {
      const value = outputs[name];
      // names of categories are no series
      if (value === undefined || value === null || categories_of) continue;
      const track = this.outputs.get(name) ?? new Track(elements(name, shape, labels));
      this.outputs.set(name, track);
      if (per === "chunk") track.add(position - 1, [flat(value)]);
      else track.add(first, (value as Nested[]).map(flat));
    }
  }

  /** Polls the state; only the stream's head if the key does not allow the state. */
  async readState(): Promise<void> {
    while (!this.signal.aborted) {
      const began_ms = performance.now();
      // a stream without an epoch does not exist yet
      if (this.epoch !== undefined && !(await this.readOnce())) return;
      this.onChange();
      const took_s = (performance.now() - began_ms) / 1000;
      await pause(Math.max(STATE_INTERVAL_S, STATE_INTERVAL_FACTOR * took_s), this.signal);
      for (let s = STATE_INTERVAL_S; s < IDLE_STATE_INTERVAL_S && this.lag === 0; s++)
        if (this.position === this.head?.position) await pause(1, this.signal);
    }
  }

  /** Reads once; returns whether to poll on. */
  private async readOnce(): Promise<boolean> {
    try {
      const path = streamPath(this.model, this.stream) + this.stateAddress;
      const { state, ...head } = await json<StreamHead & { state?: Record<string, Nested> }>(
        path,
        this.signal,
      );
      const isNew = head.position !== this.norms?.x.at(-1);
      this.head = head;
      if (state !== undefined && isNew) this.measure(head.position, Object.entries(state));
    } catch (error) {
      if (isFinal(error) && error.document.code !== "stream_not_found") {
        this.stateProblem = error.message;
        if (this.stateAddress === "") return false;
        this.stateAddress = "";
      }
    }
    return true;
  }

  private measure(position: number, parts: [string, Nested][]): void {
    this.stateProblem = "";
    this.numbers = parts.filter((part): part is [string, number] => typeof part[1] === "number");
    const lists = parts.filter(([, value]) => Array.isArray(value));
    this.norms ??= new Track(lists.map(([name]) => name));
    this.norms.add(position, [lists.map(([, value]) => norm(value))]);
  }
}
