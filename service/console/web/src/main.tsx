// The frame of the console: navigation, health of the service, and the view that the address names.
import { render } from "preact";
import { useEffect, useReducer, useState } from "preact/hooks";
import {
  forgetKey, hasKey, json, modelAddress, type ModelSummary, pause, Problem, reason,
} from "./api";
import { KeyDialog } from "./key";
import { metrics } from "./metrics";
import { ModelView } from "./model";
import { Overview } from "./overview";
import { Alert } from "./parts";
import { StreamView } from "./stream";
import { ThemeContext, useTheme } from "./theme";
import { Topics, TopicView } from "./topics";

const HEALTH_EVERY_S = 3;
const HEALTH = {
  waiting: "Connecting", ready: "Ready", degraded: "Degraded", not_ready: "Not ready", unreachable: "No answer",
};
type Health = keyof typeof HEALTH;

/** The reply of `/health/ready`; a proxy's has no members. */
interface Report {
  status?: string;
  failing?: string[];
  degraded?: string[];
  checks?: { name: string; detail: string }[];
}

/** The health of the service, and the details of the failing and degraded checks. */
function healthOf(report: Report | undefined): [Health, string] {
  if (report === undefined) return ["unreachable", reason(undefined)];
  const { status, failing = [], degraded = [], checks = [] } = report;
  const names = [...failing, ...degraded];
  const text = checks.filter(({ name }) => names.includes(name)).map(({ detail }) => detail);
  return [status !== "ready" ? "not_ready" : degraded[0] ? "degraded" : "ready", text.join("; ")];
}

/** `#/models/{first}/streams/{second}` or `#/topics/{first}/{second}`, or a part of it from the left. */
interface Address {
  isTopics: boolean;
  first?: string;
  second?: string;
}

function readAddress(): Address {
  const [, view, ...parts] = location.hash.split("/");
  const isTopics = view === "topics";
  const [first, second] = (isTopics ? parts : [parts[0], parts[2]]).map((part) =>
    part ? decodeURIComponent(part) : undefined,
  );
  return { isTopics, first, second };
}

function useAddress(): Address {
  const [address, setAddress] = useState(readAddress);
  useEffect(() => {
    addEventListener("hashchange", () => {
      setAddress(readAddress());
      document.querySelector("main")?.focus();
    });
  }, []);
  return address;
}

/** The view that the address names. */
function View({ isTopics, first, second, models }: Address & { models: ModelSummary[] }) {
  const key = `${first} ${second}`;
  if (isTopics) return first && second ? <TopicView key={key} group={first} topic={second} /> : <Topics />;
  if (first === undefined) return <Overview models={models} />;
  if (second === undefined) return <ModelView key={first} model={first} />;
  return <StreamView key={key} model={first} stream={second} />;
}

/** Health of the service, and its models: read at first and when its health changes. */
function useService() {
  const [health, setHealth] = useState<Health>("waiting");
  const [models, setModels] = useState<ModelSummary[]>([]);
  /** Why the service is not ready, and why its models are not listed. */
  const [problem, setProblem] = useState("");
  const [refusal, setRefusal] = useState("");
  useEffect(() => {
    const { signal } = new AbortController();
    const follow = async () => {
      for (let known: Health = "waiting"; ; await pause(HEALTH_EVERY_S, signal)) {
        const report = await json<Report>("health/ready", signal).catch((error) =>
          error instanceof Problem ? (error.document as Report) : undefined,
        );
        const [health, text] = healthOf(report);
        setHealth(health);
        setProblem(text);
        if (health !== known && report)
          await json<{ models: ModelSummary[] }>("v1/models", signal).then(
            ({ models }) => (setModels(models), setRefusal("")),
            (error) => setRefusal(reason(error)),
          );
        known = health;
      }
    };
    void follow();
    void metrics.run(signal);
  }, []);
  return { health, models, problems: [problem, refusal] };
}

function App() {
  const [, draw] = useReducer((count: number, _: void) => count + 1, 0);
  const address = useAddress();
  const { isTopics, first, second } = address;
  const current = (isCurrent: boolean) => (isCurrent ? "page" : undefined);
  const { health, models, problems } = useService();
  const { theme, button } = useTheme();
  document.title = [second, first, isTopics && "Topics", "Carry console"].filter(Boolean).join(" · ");
  return (
    <ThemeContext.Provider value={theme}>
      <header>
        <a class="brand" href="#/">Carry <span>console</span></a>
        <span class={`health ${health}`} role="status">{HEALTH[health]}</span>
        {hasKey() && <button onClick={() => (forgetKey(), location.reload())}>Forget key</button>}
        {button}
      </header>
      <nav aria-label="Models">
        <a href="#/" aria-current={current(!isTopics && first === undefined)}>Overview</a>
        <a href="#/topics" aria-current={current(isTopics)}>Topics</a>
        <h2>Models</h2>
        {models.map(({ name, version }) => (
          <a href={modelAddress(name)} aria-current={current(!isTopics && first === name)}>
            {name} <small>{version}</small>
          </a>
        ))}
      </nav>
      <main tabIndex={-1}>
        {problems.map((text) => <Alert text={text} />)}
        <View models={models} {...address} />
      </main>
      <KeyDialog onKey={draw} />
    </ThemeContext.Provider>
  );
}

render(<App />, document.body);
