// One watched stream: the outputs of its last steps, the norms of its state, how far the page is behind.
import {
  json,
  type ModelDetail,
  modelPath,
  pause,
  Problem,
  reason,
  serverEvents,
  type StreamHead,
  streamPath,
} from "./api";
import type { Series } from "./chart";

const KEPT_STEPS = 600;
/** Pauses between reads of the state: while chunks arrive, and at rest. */
const STATE_EVERY_S = 1;
const STATE_AT_REST_S = 5;
/** A state that takes long to read is read rarely. */
const STATE_SHARE = 10;
const RETRY_S = [1, 2, 4, 8];

type Nested = number | null | Nested[];

const flat = (value: Nested): (number | null)[] =>
  Array.isArray(value) ? value.flatMap(flat) : [value];

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

/** Names of the elements of an output or a part. */
function elements(name: string, shape: number[], labels: string[] = []): string[] {
  const count = shape.reduce((product, size) => product * size, 1);
  if (count === 1 && labels.length < 1) return [name];
  const last = shape.at(-1) ?? 1;
  return Array.from({ length: count }, (_, index) => {
    const label = labels[index % last] ?? `${index % last}`;
    return count === last ? label : `${Math.floor(index / last)}, ${label}`;
  });
}

interface OutputsDocument {
  from: number;
  position: number;
  outputs: Record<string, Nested>;
}

interface StateDocument extends StreamHead {
  state: Record<string, Nested>;
}

export class StreamWatch {
  connection: "connecting" | "live" | "interrupted" | "ended" = "connecting";
  /** Why the connection is not live, and why the state cannot be read. */
  problem = "";
  stateProblem = "";
  detail?: ModelDetail;
  head?: StreamHead;
  epoch?: string;
  /** Position up to which outputs arrived or are known to be lost. */
  position?: number;
  exists = false;
  missedSteps = 0;
  /** Position of the stream when the watch began; what was before is not missed. */
  private begin = 0;
  outputs = new Map<string, Track>();
  norms?: Track;
  /** Parts of one number each: clocks and counters. */
  numbers: [string, number][] = [];

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

  /** Follows the stream until the page leaves it; connects again after every interruption. */
  async run(): Promise<void> {
    let [lastId, attempt] = ["", 0];
    while (!this.signal.aborted) {
      try {
        this.detail ??= await json<ModelDetail>(modelPath(this.model), this.signal);
        // from 0: the last chunk's outputs are delivered at once if they are stored
        const path = `${streamPath(this.model, this.stream)}/outputs?from=0`;
        for await (const { event, id, data } of serverEvents(path, this.signal, lastId)) {
          [lastId, attempt] = [id || lastId, 0];
          this.apply(event, JSON.parse(data));
          this.onChange();
        }
        if (this.connection === "live") this.interrupt("The service closed the connection.");
      } catch (error) {
        if (this.signal.aborted) return;
        this.interrupt(reason(error));
      }
      this.onChange();
      await pause(RETRY_S[Math.min(attempt++, RETRY_S.length - 1)]!, this.signal);
    }
  }

  private interrupt(problem: string): void {
    this.connection = "interrupted";
    this.problem = problem;
  }

  private apply(event: string, document: any): void {
    if (event === "stream") {
      if (document.epoch !== this.epoch) this.reset();
      this.epoch = document.epoch;
      this.position ??= this.begin = document.position;
      this.exists = document.epoch !== undefined;
      [this.connection, this.problem] = ["live", ""];
    } else if (event === "outputs") {
      this.append(document);
    } else if (event === "gap") {
      if (document.to <= this.begin) return;
      this.position = document.to;
      this.missedSteps += document.to - document.from;
    } else if (event === "end") {
      this.connection = "ended";
      this.problem =
        document.reason === "deleted" ? "The stream was deleted." : `Ended: ${document.reason}.`;
    }
  }

  private reset(): void {
    this.outputs = new Map();
    this.norms = this.head = this.position = undefined;
    this.missedSteps = 0;
  }

  private append({ from, position, outputs }: OutputsDocument): void {
    const { blocks, outputs: described } = this.detail!;
    const first = blocks
      ? Math.max(0, Math.floor((from - blocks.lookahead) / blocks.size) * blocks.size)
      : from;
    for (const [name, { shape, per, labels }] of Object.entries(described)) {
      const value = outputs[name];
      if (value === undefined || value === null) continue;
      let track = this.outputs.get(name);
      if (track === undefined)
        this.outputs.set(name, (track = new Track(elements(name, shape, labels))));
      if (per === "chunk") track.add(position - 1, [flat(value)]);
      else track.add(first, (value as Nested[]).map(flat));
    }
    this.position = position;
    this.exists = true;
  }

  /** Reads the state again and again, and only the stream's head where that is not possible. */
  async readState(): Promise<void> {
    while (!this.signal.aborted) {
      if (this.position === undefined || !this.exists) {
        await pause(STATE_EVERY_S, this.signal);
        continue;
      }
      const began_ms = performance.now();
      const path = streamPath(this.model, this.stream);
      try {
        this.take(await json<StateDocument>(`${path}/state`, this.signal));
        this.stateProblem = "";
      } catch (error) {
        if (this.signal.aborted) return;
        this.stateProblem = error instanceof Problem ? error.message : "";
        if (error instanceof Problem && error.code !== "stream_not_found")
          await json<StreamHead>(path, this.signal).then((head) => (this.head = head), () => null);
      }
      this.onChange();
      const took_s = (performance.now() - began_ms) / 1000;
      await pause(Math.max(STATE_EVERY_S, STATE_SHARE * took_s), this.signal);
      for (let s = STATE_EVERY_S; s < STATE_AT_REST_S && this.position === this.head?.position; s++)
        await pause(1, this.signal);
    }
  }

  private take(document: StateDocument): void {
    const { state, ...head } = document;
    const isNew = head.position !== this.head?.position || head.epoch !== this.head.epoch;
    this.head = head;
    const parts = Object.entries(state);
    this.numbers = parts.filter((part): part is [string, number] => typeof part[1] === "number");
    const lists = parts.filter(([, value]) => Array.isArray(value));
    this.norms ??= new Track(lists.map(([name]) => name));
    const norm = (value: Nested) => Math.hypot(...flat(value).map((each) => Number(each)));
    if (isNew || this.norms.x.length === 0)
      this.norms.add(head.position, [lists.map(([, value]) => norm(value))]);
  }
}
