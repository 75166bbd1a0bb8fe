// Open alarms: of a model as a table, of a stream above its charts; both can be acknowledged.
import { useState } from "preact/hooks";
import { type ModelDetail, modelPath, post, streamAddress, streamPath } from "./api";
import { type Change, Confirmation } from "./confirmation";
import { ago, number, whole } from "./format";
import { Alert, Table, usePolling } from "./parts";

interface OpenAlarm {
  stream: string;
  epoch: string;
  tag: string;
  position: number;
  opened_ms: number;
  opened: number | null;
  events: number | null;
  severity: number | null;
  cause: string | null;
}

interface AlarmList {
  alarms: OpenAlarm[];
  cursor: string | null;
}

/** The acknowledgement of the alarm that the page shows, also after further events of the stream. */
const acknowledge = (model: string, { stream }: OpenAlarm): Change => ({
  title: "Acknowledge",
  text:
    `The alarm of ${stream} closes, and what the stream does now becomes normal: its detection restarts, ` +
    "and opens no alarm over the next 64 events. It cannot be rewound to before.",
  apply: () => post(`${streamPath(model, stream)}/acknowledge`, {}),
});

function useAcknowledge(model: string) {
  const [change, setChange] = useState<Change>();
  const button = (alarm: OpenAlarm) => (
    <button onClick={() => setChange(acknowledge(model, alarm))}>Acknowledge</button>
  );
  const dialog = change && <Confirmation change={change} onClose={() => setChange(undefined)} />;
  return { button, dialog };
}

/** A panel; nothing for a model without detection. */
export function Alarms({ model, detail }: { model: string; detail: ModelDetail }) {
  return detail.alarms === null ? null : <AlarmTable model={model} />;
}

function AlarmTable({ model }: { model: string }) {
  const { value, problem } = usePolling<AlarmList>(`${modelPath(model)}/alarms`);
  const { button, dialog } = useAcknowledge(model);
  const rows = value?.alarms.map((alarm) => [
    <a href={streamAddress(model, alarm.stream)}>{alarm.stream}</a>,
    alarm.cause ?? "–",
    number(alarm.severity),
    ago(alarm.opened_ms),
    whole(alarm.events ?? undefined),
    button(alarm),
  ]);
  return (
    <section class="panel">
      <h2>Open alarms</h2>
      <Alert text={problem} />
      <Table head={["Stream", "Cause", "#Severity", "#Opened", "#Events since", ""]} rows={rows} empty="No open alarms." />
      {value?.cursor && <p class="quiet">Only the newest are shown.</p>}
      {dialog}
    </section>
  );
}

/** A line with the cause; nothing while the stream has no open alarm, or the key may not list it. */
export function StreamAlarm({ model, stream }: { model: string; stream: string }) {
  const query = new URLSearchParams({ prefix: stream });
  const { value } = usePolling<AlarmList>(`${modelPath(model)}/alarms?${query}`);
  const { button, dialog } = useAcknowledge(model);
  const alarm = value?.alarms.find((each) => each.stream === stream);
  return (
    <>
      {alarm && (
        <div class="problem bar" role="alert">
          <span>
            Alarm {ago(alarm.opened_ms)}
            {alarm.opened !== null && `, since event ${whole(alarm.opened)}: ${alarm.cause}`}
          </span>
          {button(alarm)}
        </div>
      )}
      {dialog}
    </>
  );
}
