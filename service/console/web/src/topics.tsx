// The topics that consumers read: lag, pending entries, rate, owners; and the newest outputs of one.
import { useReducer, useState } from "preact/hooks";
import { modelAddress, streamAddress, topicAddress } from "./api";
import { ago, duration, number, whole } from "./format";
import { Alert, Facts, Table, usePolling } from "./parts";

/** Reads over which a rate is computed. */
const RATE_READS = 10;
const OUTPUTS = 20;

interface Progress {
  entries: number;
  pending: number;
  lag: number | null;
  acknowledged: number | null;
  oldest_s: number | null;
}

interface Topic extends Progress {
  topic: string;
  group: string;
  model: string;
  outputs: string;
  dead_letters: string;
  owners: string[];
  partitions: (Progress & { topic: string; owner: string | null })[];
}

interface Output {
  stream: string;
  position: number;
  time_ms: number;
  outputs: Record<string, unknown>;
}

const nameOf = ({ topic, group }: Topic): string => `${group} ${topic}`;

/** Entries per second that were acknowledged, by topic. */
class Rates {
  private reads = new Map<string, [number, number][]>();

  add(topics: Topic[]): void {
    for (const topic of topics) {
      if (topic.acknowledged === null) continue;
      const reads = this.reads.get(nameOf(topic)) ?? [];
      this.reads.set(nameOf(topic), [...reads, [performance.now(), topic.acknowledged] as [number, number]].slice(-RATE_READS));
    }
  }

  of(topic: Topic): number | undefined {
    const reads = this.reads.get(nameOf(topic)) ?? [];
    const [first, last] = [reads[0], reads.at(-1)];
    if (first === undefined || last === undefined || first === last) return undefined;
    return Math.max(0, (1000 * (last[1] - first[1])) / (last[0] - first[0]));
  }
}

function useTopics(withPartitions: boolean) {
  const [rates] = useState(() => new Rates());
  const path = `v1/topics${withPartitions ? "?partitions=true" : ""}`;
  const { value, problem } = usePolling<{ topics: Topic[] }>(path, ({ topics }) => rates.add(topics));
  return { topics: value?.topics, rates, problem };
}

const figures = ({ lag, pending, oldest_s }: Progress): string[] => [
  lag === null ? "–" : whole(lag), whole(pending), oldest_s === null ? "–" : duration(oldest_s),
];

export function Topics() {
  const [unfolded, setUnfolded] = useReducer(
    (names: string[], name: string) => (names.includes(name) ? names.filter((each) => each !== name) : [...names, name]),
    [],
  );
  const { topics, rates, problem } = useTopics(unfolded.length > 0);
  const rows = topics?.flatMap((topic) => {
    const name = nameOf(topic);
    const isUnfolded = unfolded.includes(name);
    const partitions = isUnfolded ? topic.partitions : [];
    return [
      [
        <a href={topicAddress(topic.group, topic.topic)}>{topic.topic}</a>,
        topic.group,
        <a href={modelAddress(topic.model)}>{topic.model}</a>,
        number(rates.of(topic)),
        ...figures(topic),
        <button
          aria-expanded={isUnfolded}
          aria-label={`${topic.owners.length} consumers, partitions of ${topic.topic}`}
          onClick={() => setUnfolded(name)}
        >
          {whole(topic.owners.length)}
        </button>,
      ],
      ...partitions.map((each) => [
        <span class="part code">{each.topic}</span>, "", "", "", ...figures(each),
        <span class="code">{each.owner ?? "none"}</span>,
      ]),
    ];
  });
  return (
    <>
      <h1>Topics</h1>
      <Alert text={problem} />
      <section class="panel">
        <Table
          head={["Input topic", "Group", "Model", "#Events/s", "#Lag", "#Pending", "#Oldest", "#Consumers"]}
          rows={rows}
          empty="No consumer has read a topic."
        />
      </section>
    </>
  );
}

/** The outputs of an event in one line. */
const shown = (value: unknown): string =>
  Array.isArray(value) ? value.map(shown).join(", ") : typeof value === "number" ? number(value) : String(value);

export function TopicView({ group, topic: name }: { group: string; topic: string }) {
  const { topics, rates, problem } = useTopics(false);
  const query = new URLSearchParams({ topic: name, group, limit: String(OUTPUTS) });
  const { value, problem: noOutputs } = usePolling<{ outputs: Output[] }>(`v1/topics/outputs?${query}`);
  const topic = topics?.find((each) => each.topic === name && each.group === group);
  const outputs = value?.outputs;
  const names = Object.keys(outputs?.[0]?.outputs ?? {});
  const model = topic?.model ?? "";
  return (
    <>
      <p class="path"><a href="#/topics">Topics</a></p>
      <h1>{name}</h1>
      <Alert text={problem} />
      {topic && (
        <>
          <Facts
            large
            of={[
              ["Events/s", number(rates.of(topic))],
              ["Lag", figures(topic)[0]],
              ["Pending", figures(topic)[1]],
              ["Oldest", figures(topic)[2]],
              ["Consumers", whole(topic.owners.length)],
            ]}
          />
          <section class="panel">
            <Facts
              of={[
                ["model", <a href={modelAddress(model)}>{model}</a>],
                ["group", group],
                ["entries", whole(topic.entries)],
                ["output topic", topic.outputs],
                ["dead letters", topic.dead_letters],
                ["owners", topic.owners.join(" ") || "none"],
              ]}
            />
          </section>
        </>
      )}
      <section class="panel">
        <h2>Newest outputs</h2>
        <Alert text={noOutputs} />
        <Table
          head={["Stream", "#Position", "Committed", ...names.map((each) => `#${each}`)]}
          rows={outputs?.map((each) => [
            <a href={streamAddress(model, each.stream)}>{each.stream}</a>,
            whole(each.position),
            ago(each.time_ms),
            ...names.map((output) => shown(each.outputs[output])),
          ])}
          empty="No outputs."
        />
      </section>
    </>
  );
}
