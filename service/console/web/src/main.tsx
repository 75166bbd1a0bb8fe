// The frame of the console: navigation, health of the service, and the view that the address names.
import { render } from "preact";
import { useEffect, useState } from "preact/hooks";
import {
  forgetKey, get, hasKey, json, modelAddress, type ModelSummary, pause, Problem, reason,
} from "./api";
import { KeyDialog } from "./key";
import { metrics } from "./metrics";
import { ModelView } from "./model";
import { Overview } from "./overview";
import { Alert } from "./parts";
import { StreamView } from "./stream";
import { ThemeContext, useTheme } from "./theme";

const HEALTH_EVERY_S = 3;
const HEALTH = {
  waiting: "Connecting",
  ready: "Ready",
  not_ready: "Not ready",
  unreachable: "No answer",
};
type Health = keyof typeof HEALTH;

/** `#/models/{model}/streams/{stream}`, or a part of it from the left. */
function readAddress(): (string | undefined)[] {
  const [, , model, , stream] = location.hash.split("/");
  return [model, stream].map((part) => (part ? decodeURIComponent(part) : undefined));
}

function useAddress(): (string | undefined)[] {
  const [address, setAddress] = useState(readAddress);
  useEffect(() => {
    addEventListener("hashchange", () => {
      setAddress(readAddress());
      document.querySelector("main")?.focus();
    });
  }, []);
  return address;
}

/** Health of the service, and its models: read at first and when its health changes. */
function useService() {
  const [health, setHealth] = useState<Health>("waiting");
  const [models, setModels] = useState<ModelSummary[]>([]);
  const [problem, setProblem] = useState("");
  useEffect(() => {
    const { signal } = new AbortController();
    const follow = async () => {
      for (let known: Health = "waiting"; ; await pause(HEALTH_EVERY_S, signal)) {
        const health = await get("health/ready", signal).then(
          (): Health => "ready",
          (error): Health => (error instanceof Problem ? "not_ready" : "unreachable"),
        );
        setHealth(health);
        if (health === "unreachable") setProblem(reason(undefined));
        else if (health !== known)
          await json<{ models: ModelSummary[] }>("v1/models", signal).then(
            ({ models }) => (setModels(models), setProblem("")),
            (error) => setProblem(reason(error)),
          );
        known = health;
      }
    };
    void follow();
    void metrics.run(signal);
  }, []);
  return { health, models, problem };
}

function App() {
  const [model, stream] = useAddress();
  const { health, models, problem } = useService();
  const { theme, button } = useTheme();
  document.title = [stream, model, "Carry console"].filter(Boolean).join(" · ");
  return (
    <ThemeContext.Provider value={theme}>
      <header>
        <a class="brand" href="#/">
          Carry <span>console</span>
        </a>
        <span class={`health ${health}`} role="status">
          {HEALTH[health]}
        </span>
        {hasKey() && (
          <button type="button" onClick={() => (forgetKey(), location.reload())}>
            Forget key
          </button>
        )}
        {button}
      </header>
      <nav aria-label="Models">
        <a href="#/" aria-current={model === undefined ? "page" : undefined}>
          Overview
        </a>
        <h2>Models</h2>
        {models.map(({ name, version }) => (
          <a href={modelAddress(name)} aria-current={model === name ? "page" : undefined}>
            {name} <small>{version}</small>
          </a>
        ))}
      </nav>
      <main tabIndex={-1}>
        <Alert text={problem} />
        {model === undefined ? (
          <Overview models={models} />
        ) : stream === undefined ? (
          <ModelView key={model} model={model} />
        ) : (
          <StreamView key={`${model} ${stream}`} model={model} stream={stream} />
        )}
      </main>
      <KeyDialog />
    </ThemeContext.Provider>
  );
}

render(<App />, document.body);
