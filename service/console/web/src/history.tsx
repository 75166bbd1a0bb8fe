// What is kept of a stream's past: its newest events, and where it can be rewound to.
import { useState } from "preact/hooks";
import { json, streamPath } from "./api";
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

/** A panel; nothing if the model keeps no history, or the key does not allow to read it. */
export function History({ model, stream, position }: { model: string; stream: string; position: number }) {
  const [shown, show] = useState(position);
  const query = `from=${Math.max(0, shown - EVENTS)}&limit=${EVENTS}`;
  const { value: kept } = useRequest(
    (signal) => json<Kept>(`${streamPath(model, stream)}/history?${query}`, signal),
    [model, stream, shown],
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
      <button onClick={() => show(position)} disabled={shown === position}>Read again</button>
    </section>
  );
}
