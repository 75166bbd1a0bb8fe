// What is kept of a stream's past: its newest events, and where it can be rewound to.
import { useState } from "preact/hooks";
import { json, post, type StreamHead, streamPath } from "./api";
import { type Change, Confirmation } from "./confirmation";
import { whole } from "./format";
import { Facts, Table, useRequest } from "./parts";

const EVENTS = 20;

interface Kept {
  available: [number, number][];
  snapshots: number[];
  start: number;
  chunks: { position: number; events?: object[]; inputs?: number[][] }[];
}

const ranges = (available: [number, number][]): string =>
  available.map(([first, last]) => (first === last ? whole(first) : `${whole(first)} to ${whole(last)}`)).join(", ");

/** The rewind of a stream from the state that the page shows, if it is still in that state. */
const rewind = (path: string, { epoch, tag, position }: StreamHead, { available }: Kept): Change => ({
  title: "Rewind",
  text:
    `The stream goes from position ${whole(position)} back to the state that it had at an earlier one, in a ` +
    "new epoch. Later events and snapshots are lost. Rejected if the stream changed meanwhile.",
  fields: (
    <>
      <label for="position">Position: {ranges(available)}</label>
      <input id="position" name="position" type="number" min={available[0]![0]} max={position} required />
    </>
  ),
  apply: (fields) =>
    post(`${path}/rewind`, { position: Number(fields.get("position")) }, { "if-match": `"${epoch}-${tag}"` }),
});

/** A panel; nothing if the model keeps no history, or the key does not allow to read it. */
export function History({ model, stream, head }: { model: string; stream: string; head: StreamHead }) {
  const { position } = head;
  const path = streamPath(model, stream);
  const [change, setChange] = useState<Change>();
  const [shown, show] = useState(position);
  const query = `from=${Math.max(0, shown - EVENTS)}&limit=${EVENTS}`;
  const { value: kept } = useRequest(
    (signal) => json<Kept>(`${path}/history?${query}`, signal),
    [path, shown],
  );
  if (kept === undefined || kept.available.length === 0) return null;
  const rows = kept.chunks.flatMap((chunk) =>
    (chunk.events ?? chunk.inputs ?? []).map((event, at) => [
      whole(chunk.position + at),
      <span class="code">{JSON.stringify(event)}</span>,
    ]),
  );
  return (
    <section class="panel">
      <h2>History</h2>
      <Facts
        of={[
          ["events from position", whole(kept.start)],
          ["snapshots", kept.snapshots.map(whole).join(", ") || "–"],
          ["can be rewound to", ranges(kept.available)],
        ]}
      />
      <Table head={["#Position", "Event"]} rows={rows.reverse()} empty="No events are kept." />
      <div class="bar">
        <button onClick={() => show(position)} disabled={shown === position}>Read again</button>
        <button onClick={() => setChange(rewind(path, head, kept))}>Rewind</button>
      </div>
      {change && <Confirmation change={change} onClose={() => setChange(undefined)} />}
    </section>
  );
}
