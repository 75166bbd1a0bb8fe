// All models together: throughput, latency, errors by code, the served versions.
import { useEffect, useReducer } from "preact/hooks";
import { modelAddress, type ModelSummary } from "./api";
import { Chart, type Series } from "./chart";
import { duration, number, whole } from "./format";
import { metrics, STAGES } from "./metrics";
import { Alert, Facts, Table } from "./parts";

const sum = (values: (number | null | undefined)[]): number =>
  values.reduce<number>((total, value) => total + (value ?? 0), 0);
const latest = (series: Series[]): string => number(sum(series.map((each) => each.values.at(-1))));

export function Overview({ models }: { models: ModelSummary[] }) {
  const [, draw] = useReducer((count: number, _: void) => count + 1, 0);
  useEffect(() => metrics.subscribe(draw), []);

  const rates = (prefix: string): Series[] =>
    metrics.names(prefix).map((label) => ({ label, values: metrics.rate(prefix + label) }));
  const total = (key: string) => metrics.last.get(key) ?? 0;
  const events = rates("carry_events_total ");
  const errors = rates("code ");
  const latency = [
    { label: "p50", values: metrics.latency(0.5) },
    { label: "p99", values: metrics.latency(0.99) },
  ];
  const [median, high] = latency.map(({ values }) => duration(values.at(-1)));
  const stages = STAGES.map((label) => ({ label, values: metrics.stage(label) }));
  const active = errors.filter(({ values }) => sum(values) > 0);
  const time = { x: metrics.times, isTime: true };
  return (
    <>
      <h1>Overview</h1>
      <Alert text={metrics.problem && `No metrics: ${metrics.problem}`} />
      <Facts
        large
        of={[
          ["Events/s", latest(events)],
          ["Requests/s", number(metrics.rate("requests").at(-1))],
          ["Latency, p50", median],
          ["Latency, p99", high],
          ["Errors/s", latest(errors)],
          ["Chunks in queue", whole(sum(models.map(({ name }) => total(`carry_queue_depth ${name}`))))],
        ]}
      />
      <div class="charts">
        <Chart title="Throughput" unit="events/s" series={events} format={number} {...time} />
        <Chart title="Latency" unit="of requests" series={latency} format={duration} {...time} />
        <Chart title="Errors" unit="per second and code" series={active} format={number} {...time} />
        <Chart title="Stages" unit="mean time of a chunk" series={stages} format={duration} {...time} />
      </div>
      <section class="panel">
        <h2>Models</h2>
        <Table
          head={["Model", "Version", "Runtime", "#Events/s", "#Events", "#WebSockets", "#Watchers"]}
          rows={models.map(({ name, version, runtime }) => [
            <a href={modelAddress(name)}>{name}</a>,
            <span class="code">{version}</span>,
            runtime,
            number(metrics.rate(`carry_events_total ${name}`).at(-1)),
            ...["events_total", "websocket_connections", "watchers"].map((figure) =>
              whole(total(`carry_${figure} ${name}`)),
            ),
          ])}
        />
      </section>
      <section class="panel">
        <h2>Errors since the start of the service</h2>
        <Table
          head={["Code", "#Errors/s", "#Total"]}
          rows={errors.map(({ label, values }) => [
            <a class="code" href={`../docs/errors#${label}`}>{label}</a>,
            number(values.at(-1)),
            whole(total(`code ${label}`)),
          ])}
          empty="None."
        />
      </section>
    </>
  );
}
