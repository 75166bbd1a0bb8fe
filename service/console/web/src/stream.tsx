// One stream live: position, lag, its alarm, outputs by step, norms of its state.
import { useEffect, useReducer, useState } from "preact/hooks";
import { StreamAlarm } from "./alarms";
import { modelAddress } from "./api";
import { Chart } from "./chart";
import { ago, number, whole } from "./format";
import { History } from "./history";
import { Alert, Facts } from "./parts";
import { StreamWatch } from "./watch";

const CONNECTIONS = { connecting: "Connecting", live: "Live", interrupted: "Interrupted", ended: "Ended" };

const DRAW_EVERY_MS = 200;

/** A watch of the stream for as long as the view is shown. */
function useWatch(model: string, stream: string): StreamWatch {
  const [, draw] = useReducer((count: number, _: void) => count + 1, 0);
  const [{ watch, stop }] = useState(() => {
    const stop = new AbortController();
    let timer = 0;
    const onChange = () => {
      timer ||= setTimeout(() => {
        timer = 0;
        if (!stop.signal.aborted) draw();
      }, DRAW_EVERY_MS);
    };
    return { stop, watch: new StreamWatch(model, stream, onChange, stop.signal) };
  });
  useEffect(() => {
    void watch.follow();
    void watch.readState();
    // ages grow without an event
    const timer = setInterval(() => draw(), 1000);
    return () => (stop.abort(), clearInterval(timer));
  }, []);
  return watch;
}

export function StreamView({ model, stream }: { model: string; stream: string }) {
  const watch = useWatch(model, stream);
  const { connection, problem, head, norms } = watch;
  const probability = watch.detail?.alarms?.output.replace(/alarm$/, "probability");
  return (
    <>
      <p class="path"><a href={modelAddress(model)}>{model}</a> / streams</p>
      <h1>{stream} <span class={`health ${connection}`} role="status">{CONNECTIONS[connection]}</span></h1>
      <Alert text={problem + (connection === "interrupted" ? " The page connects again." : "")} />
      <Facts
        large
        of={[
          ["Position", whole(watch.position)],
          ["Lag, in steps", whole(watch.lag)],
          ["Lost outputs", whole(watch.missedSteps)],
          ["Last chunk", head ? ago(head.updated_ms) : "–"],
          ["Version", <span class="code">{head?.version ?? "–"}</span>],
        ]}
      />
      {watch.detail?.alarms && <StreamAlarm model={model} stream={stream} />}
      <div class="charts">
        {[...watch.outputs].map(([name, track]) => (
          <Chart
            key={name}
            title={name}
            unit="by position"
            format={number}
            isProbability={name === probability}
            spans={watch.alarms}
            {...track}
          />
        ))}
        {norms && <Chart title="State" unit="norm of each part" format={number} {...norms} />}
      </div>
      {watch.outputs.size === 0 && <p class="panel quiet">Waiting for the next chunk.</p>}
      {watch.stateProblem && <p class="panel quiet">No state: {watch.stateProblem}</p>}
      {head && (
        <section class="panel">
          <h2>Stream head</h2>
          <Facts
            of={[
              ["epoch", head.epoch],
              ["fed by", head.feed],
              ...watch.numbers.map(([name, value]): [string, string] => [
                name,
                name.endsWith("_ms") ? new Date(value).toISOString() : whole(value),
              ]),
            ]}
          />
        </section>
      )}
      {head && <History model={model} stream={stream} head={head} />}
    </>
  );
}
