// One stream live: position, lag, outputs by step, norms of its state.
import { useEffect, useReducer, useRef } from "preact/hooks";
import { modelAddress } from "./api";
import { Chart } from "./chart";
import { ago, number, whole } from "./format";
import { Alert, Facts } from "./parts";
import { StreamWatch } from "./watch";

const CONNECTIONS = {
  connecting: "Connecting",
  live: "Live",
  interrupted: "Interrupted",
  ended: "Ended",
};

/** A watch of the stream for as long as the view is shown; drawn at most once a frame. */
function useWatch(model: string, stream: string): StreamWatch | null {
  const [, draw] = useReducer((count: number, _: void) => count + 1, 0);
  const watch = useRef<StreamWatch | null>(null);
  useEffect(() => {
    const stop = new AbortController();
    let frame = 0;
    const onChange = () => {
      frame ||= requestAnimationFrame(() => {
        frame = 0;
        draw();
      });
    };
    const made = new StreamWatch(model, stream, onChange, stop.signal);
    watch.current = made;
    void made.run();
    void made.readState();
    // ages grow without an event
    const timer = setInterval(onChange, 1000);
    return () => (stop.abort(), clearInterval(timer), cancelAnimationFrame(frame));
  }, [model, stream]);
  return watch.current;
}

export function StreamView({ model, stream }: { model: string; stream: string }) {
  const watch = useWatch(model, stream);
  const connection = watch?.connection ?? "connecting";
  const head = watch?.head;
  const outputs = [...(watch?.outputs ?? [])];
  const described = Object.keys(watch?.detail?.outputs ?? {});
  return (
    <>
      <p class="path">
        <a href={modelAddress(model)}>{model}</a> / streams
      </p>
      <h1>
        {stream}{" "}
        <span class={`health ${connection}`} role="status">
          {CONNECTIONS[connection]}
        </span>
      </h1>
      <Alert text={watch?.problem && `${watch.problem} The page connects again.`} />
      <Facts
        large
        of={[
          ["Position", whole(watch?.position)],
          ["Lag, in steps", whole(watch?.lag)],
          ["Lost outputs", whole(watch?.missedSteps)],
          ["Last chunk", head ? ago(head.updated_ms) : "–"],
          ["Version", <span class="code">{head?.version ?? "–"}</span>],
        ]}
      />
      <div class="charts">
        {outputs.map(([name, { x, series }]) => (
          <Chart key={name} title={name} unit="by position" x={x} series={series} format={number} />
        ))}
        {watch?.norms && (
          <Chart
            title="State"
            unit="norm of each part, by position"
            x={watch.norms.x}
            series={watch.norms.series}
            format={number}
          />
        )}
      </div>
      {outputs.length === 0 && (
        <p class="panel quiet">
          Waiting for the next chunk{described.length > 0 && ` with ${described.join(", ")}`}.
        </p>
      )}
      {watch?.stateProblem && <p class="panel quiet">No state: {watch.stateProblem}</p>}
      {head && (
        <section class="panel">
          <h2>Stream head</h2>
          <Facts
            of={[
              ["epoch", head.epoch],
              ["fed by", head.feed],
              ...watch!.numbers.map(([name, value]): [string, string] => [
                name,
                name.endsWith("_ms") ? new Date(value).toISOString() : whole(value),
              ]),
            ]}
          />
        </section>
      )}
    </>
  );
}
