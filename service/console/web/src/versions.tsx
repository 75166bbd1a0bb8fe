// The versions of a model: which one answers, what the challenger does, and changes of both.
import { useState } from "preact/hooks";
import { json, modelPath, post, remove } from "./api";
import { type Change, Confirmation } from "./confirmation";
import { number } from "./format";
import { Alert, Table, usePolling, useRequest } from "./parts";

const FORCED = "Rejected if the version would reject existing streams; only the command line can force it.";

interface Version {
  version: string;
  label: string | null;
  alias: "champion" | "challenger" | null;
  share: number;
  loaded: number;
  failed: { process: string; reason: string }[];
}

interface VersionList {
  processes: number;
  rollback: string | null;
  versions: Version[];
}

/** What can be done with a version that is not the champion. */
function changesOf(model: string, { versions }: VersionList, { version, alias, share }: Version): Change[] {
  const champion = versions.find((each) => each.alias === "champion")!.version;
  const former = versions.find((each) => each.alias === "challenger" && each.version !== version);
  const replaced = former ? ` ${former.version} neither computes nor answers any more.` : "";
  const setAlias = (action: string, share?: number) =>
    post(`${modelPath(model)}/aliases`, { action, version, share });
  const shadow = {
    title: "Shadow",
    text: `Version ${version} computes beside ${champion}, which answers all streams.${replaced}`,
    apply: () => setAlias("shadow"),
  };
  return [
    ...(alias === "challenger" && share === 0 ? [] : [shadow]),
    {
      title: "Canary",
      text:
        `Version ${version} answers a share of the streams, always the same ones; ${champion} answers the ` +
        `others, and each computes beside the other.${replaced} ${FORCED}`,
      fields: (
        <>
          <label for="share">Share of streams, in percent</label>
          <input id="share" name="share" type="number" min="0.1" max="100" step="0.1" required />
        </>
      ),
      apply: (fields) => setAlias("canary", Number(fields.get("share")) / 100),
    },
    {
      title: "Promote",
      text: `Version ${version} answers all streams; ${champion} computes beside it.${replaced} ${FORCED}`,
      apply: () => setAlias("promote"),
    },
    {
      title: "Retire",
      text:
        `Version ${version} is forgotten and unloaded` +
        (alias === "challenger" ? `; ${champion} answers all streams and nothing computes beside it.` : "."),
      apply: () => remove(`${modelPath(model)}/versions/${version}`),
    },
  ];
}

const load = (model: string): Change => ({
  title: "Load",
  text: "The version is loaded and warmed up beside those that answer. It answers no stream yet.",
  fields: (
    <>
      <label for="path">Folder of the artifact, inside that of the models</label>
      <input id="path" name="path" placeholder={`${model}/2026-11-30`} autocomplete="off" required />
      <label for="label">Label (optional)</label>
      <input id="label" name="label" autocomplete="off" />
    </>
  ),
  apply: (fields) =>
    post(`${modelPath(model)}/versions`, { path: fields.get("path"), label: fields.get("label") || null }),
});

const rollBack = (model: string, version: string, { versions }: VersionList): Change => {
  const champion = versions.find(({ alias }) => alias === "champion")!.version;
  return {
    title: "Roll back",
    text: `Version ${version} answers all streams again, also if that rejects streams; ${champion} computes beside it.`,
    apply: () => post(`${modelPath(model)}/aliases`, { action: "rollback" }),
  };
};

/** A panel; nothing if the key does not allow to read the versions. */
export function Versions({ model }: { model: string }) {
  const { value: list, problem } = usePolling<VersionList>(`${modelPath(model)}/versions`);
  const [change, setChange] = useState<Change>();
  if (list === undefined) return null;
  const challenger = list.versions.find(({ alias }) => alias === "challenger");
  const button = (change: Change, version: string) => (
    <button aria-label={`${change.title} ${version}`} onClick={() => setChange(change)}>{change.title}</button>
  );
  return (
    <section class="panel">
      <div class="bar">
        <h2>Versions</h2>
        {button(load(model), "a version")}
        {list.rollback !== null && button(rollBack(model, list.rollback, list), `to ${list.rollback}`)}
      </div>
      <Alert text={problem} />
      <Table
        head={["Version", "Label", "Alias", "#Share of streams", "#Loaded by", "Failed", "Change"]}
        rows={list.versions.map((each) => [
          <span class="code">{each.version}</span>,
          each.label ?? "–",
          each.alias ?? "–",
          `${number(100 * each.share)} %`,
          `${each.loaded} of ${list.processes}`,
          each.failed.map(({ process, reason }) => `${process}: ${reason}`).join("; ") || "–",
          <span class="bar">
            {each.alias !== "champion" && changesOf(model, list, each).map((change) => button(change, each.version))}
          </span>,
        ])}
      />
      {challenger && <Challenger model={model} version={challenger.version} />}
      {change && <Confirmation change={change} onClose={() => setChange(undefined)} />}
    </section>
  );
}

interface Report {
  chunks: Record<string, number>;
  differences: Record<string, { mean: number; p50: number; p90: number; p99: number }>;
  losses: Record<string, Record<string, { champion: number; challenger: number; events: number }>>;
}

/** What the challenger does beside the champion: differences of outputs, losses of both. */
function Challenger({ model, version }: { model: string; version: string }) {
  const path = `${modelPath(model)}/versions/${version}/report`;
  const { value: report } = useRequest((signal: AbortSignal) => json<Report>(path, signal), [path]);
  if (report === undefined) return null;
  const counts = Object.entries(report.chunks).map(([outcome, count]) => `${count} ${outcome}`);
  const digits = (value: number) => value.toPrecision(3);
  return (
    <>
      <h3>Challenger beside the champion</h3>
      <p>Chunks: {counts.join(", ") || "none yet"}</p>
      <Table
        head={["Output", "#Mean difference", "#p50", "#p90", "#p99"]}
        rows={Object.entries(report.differences).map(([output, { mean, p50, p90, p99 }]) => [
          output, ...[mean, p50, p90, p99].map(digits),
        ])}
      />
      {Object.keys(report.losses).length > 0 && <Table
        head={["Head", "Loss", "#Champion", "#Challenger", "#Events"]}
        rows={Object.entries(report.losses).flatMap(([head, losses]) =>
          Object.entries(losses).map(([loss, { champion, challenger, events }]) => [
            head, loss, digits(champion), digits(challenger), `${events}`,
          ]),
        )}
      />}
    </>
  );
}
