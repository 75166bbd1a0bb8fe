// One model: its open alarms, its versions, its streams page by page, by the prefix of their names, its metadata.
import { useState } from "preact/hooks";
import { Alarms } from "./alarms";
import {
  json, type ModelDetail, modelPath, pause, streamAddress, type StreamHead, streamPath,
} from "./api";
import { ago, bytes, whole } from "./format";
import { Alert, Facts, Table, useRequest } from "./parts";
import { Versions } from "./versions";

const PAGE = 25;
const TYPING_S = 0.25;

interface Listing {
  streams: string[];
  cursor: string | null;
}

/** Reads pages until one has names: before the last, a page may be empty. */
async function readPage(
  model: string, prefix: string, cursor: string | null, signal: AbortSignal,
): Promise<Listing> {
  await pause(prefix === "" ? 0 : TYPING_S, signal);
  for (;;) {
    signal.throwIfAborted();
    const query = new URLSearchParams({ prefix, limit: String(PAGE) });
    if (cursor !== null) query.set("cursor", cursor);
    const page = await json<Listing>(`${modelPath(model)}/streams?${query}`, signal);
    cursor = page.cursor;
    // a name may come twice
    if (page.streams.length > 0 || cursor === null)
      return { streams: [...new Set(page.streams)], cursor };
  }
}

/** Something of a stream's head, once it is read. */
function Head({ of, show }: { of: Promise<StreamHead>; show: (head: StreamHead) => string }) {
  return <>{useRequest(() => of.then(show), [of]).value ?? "–"}</>;
}

function Streams({ model }: { model: string }) {
  const [prefix, setPrefix] = useState("");
  /** Cursors of the pages up to the one shown. */
  const [cursors, setCursors] = useState<(string | null)[]>([null]);
  const cursor = cursors.at(-1)!;
  const { value: page, problem } = useRequest(
    async (signal) => {
      const { streams, cursor: next } = await readPage(model, prefix, cursor, signal);
      const rows = streams.map((name) => {
        const head = json<StreamHead>(streamPath(model, name), signal);
        // reported by the cells, which may not be drawn any more
        head.catch(() => undefined);
        return [
          <a href={streamAddress(model, name)}>{name}</a>,
          <Head of={head} show={({ position }) => whole(position)} />,
          <Head of={head} show={({ updated_ms }) => ago(updated_ms)} />,
          <Head of={head} show={({ state_bytes }) => bytes(state_bytes)} />,
        ];
      });
      return { rows, next };
    },
    [model, prefix, cursor],
  );
  const search = (event: InputEvent) => {
    setPrefix((event.currentTarget as HTMLInputElement).value);
    setCursors([null]);
  };
  const open = (event: SubmitEvent) => {
    event.preventDefault();
    if (prefix !== "") location.hash = streamAddress(model, prefix);
  };
  return (
    <section class="panel">
      <form class="bar" onSubmit={open}>
        <h2>Streams</h2>
        <label for="search">Name begins with</label>
        <input id="search" type="search" value={prefix} onInput={search} autocomplete="off" />
        <button disabled={prefix === ""}>Open this name</button>
      </form>
      <Alert text={problem} />
      <Table head={["Stream", "#Position", "#Last chunk", "#State"]} rows={page?.rows} empty="No streams." />
      <p class="quiet" role="status">
        {page === undefined && problem === undefined && "Searching…"}
      </p>
      <div class="bar">
        <button disabled={cursors.length === 1} onClick={() => setCursors(cursors.slice(0, -1))}>
          Previous
        </button>
        <span class="quiet">Page {cursors.length}</span>
        <button disabled={!page?.next} onClick={() => setCursors([...cursors, page!.next])}>Next</button>
      </div>
    </section>
  );
}

const dimensions = (shape: number[]): string => (shape.length === 0 ? "number" : shape.join(" × "));

function Metadata({ detail }: { detail: ModelDetail }) {
  const { version, runtimes, input_features, events, chunking, forecast, fingerprint } = detail;
  return (
    <section class="panel">
      <h2>Metadata</h2>
      <Facts
        of={[
          ["Version", version],
          ["Runtime", runtimes.join(", ")],
          ["Input", `${input_features} features${events ? ", from events" : ""}`],
          ["Chunking", chunking],
          ["Forecast", forecast ? `up to ${forecast.max_horizon} steps` : "no"],
          ["Fingerprint", fingerprint],
        ]}
      />
      <Table
        head={["Output", "Shape", "One per", "Labels"]}
        rows={Object.entries(detail.outputs).map(([name, { shape, per, labels }]) => [
          name, dimensions(shape), per, labels.join(", ") || "–",
        ])}
      />
      <Table
        head={["Part of the state", "Shape", "Type"]}
        rows={Object.entries(detail.state).map(([name, { shape, dtype }]) => [
          name, dimensions(shape), dtype,
        ])}
      />
    </section>
  );
}

export function ModelView({ model }: { model: string }) {
  const read = (signal: AbortSignal) => json<ModelDetail>(modelPath(model), signal);
  const { value: detail, problem } = useRequest(read, [model]);
  return (
    <>
      <h1>{model}</h1>
      <Alert text={problem} />
      {detail && <p class="lead">{detail.description}</p>}
      {detail && <Alarms model={model} detail={detail} />}
      <Versions model={model} />
      <Streams model={model} />
      {detail && <Metadata detail={detail} />}
    </>
  );
}
