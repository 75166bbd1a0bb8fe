// The frame of the console: navigation, health of the service, and the view that the address names.
import { render } from "preact";
import { useEffect, useState } from "preact/hooks";
import {
  forgetKey,
  get,
  hasKey,
  json,
  modelAddress,
  type ModelSummary,
  pause,
  Problem,
  reason,
} from "./api";
import { KeyDialog } from "./key";
import { metrics } from "./metrics";
import { ModelView } from "./model";
import { Overview } from "./overview";
import { Alert } from "./parts";
import { StreamView } from "./stream";
import { applyTheme, ThemeButton } from "./theme";

const HEALTH_EVERY_S = 3;

/** `#/models/{model}/streams/{stream}`, or a part of it from the left. */
function route(): { model?: string; stream?: string } {
  const [, , model, , stream] = location.hash.split("/");
  const decoded = (part?: string) => (part ? decodeURIComponent(part) : undefined);
  return { model: decoded(model), stream: decoded(stream) };
}

interface Health {
  state: "waiting" | "ready" | "not_ready" | "unreachable";
  text: string;
}

async function readHealth(signal: AbortSignal): Promise<Health> {
  try {
    await get("health/ready", signal);
    return { state: "ready", text: "Ready" };
  } catch (error) {
    if (error instanceof Problem) return { state: "not_ready", text: "Not ready" };
    return { state: "unreachable", text: "No answer" };
  }
}

function App() {
  const [{ model, stream }, setRoute] = useState(route);
  const [health, setHealth] = useState<Health>({ state: "waiting", text: "Connecting" });
  const [models, setModels] = useState<ModelSummary[]>([]);
  const [problem, setProblem] = useState("");

  useEffect(() => {
    const follow = () => {
      setRoute(route());
      document.querySelector("main")?.focus();
    };
    addEventListener("hashchange", follow);
    return () => removeEventListener("hashchange", follow);
  }, []);
  useEffect(() => {
    const stop = new AbortController();
    void metrics.run(stop.signal);
    void (async () => {
      let known = "";
      while (!stop.signal.aborted) {
        const now = await readHealth(stop.signal);
        try {
          // they change only with a start of the service
          if (now.state !== known)
            setModels((await json<{ models: ModelSummary[] }>("v1/models", stop.signal)).models);
          known = now.state;
          setProblem("");
        } catch (error) {
          setProblem(reason(error));
        }
        setHealth(now);
        await pause(HEALTH_EVERY_S, stop.signal);
      }
    })();
    return () => stop.abort();
  }, []);
  useEffect(() => {
    document.title = [stream, model, "Carry console"].filter(Boolean).join(" · ");
  }, [model, stream]);

  return (
    <>
      <header>
        <a class="brand" href="#/">
          Carry <span>console</span>
        </a>
        <span class={`health ${health.state}`} role="status">
          {health.text}
        </span>
        {hasKey() && (
          <button type="button" onClick={() => (forgetKey(), location.reload())}>
            Forget key
          </button>
        )}
        <ThemeButton />
      </header>
      <nav aria-label="Models">
        <a href="#/" aria-current={model === undefined ? "page" : undefined}>
          Overview
        </a>
        <h2>Models</h2>
        {models.map(({ name, version }) => (
          <a
            key={name}
            href={modelAddress(name)}
            aria-current={model === name ? "page" : undefined}
          >
            {name} <small>{version}</small>
          </a>
        ))}
      </nav>
      <main tabIndex={-1}>
        <Alert text={problem && `${problem} The page tries again every ${HEALTH_EVERY_S} seconds.`} />
        {model === undefined ? (
          <Overview models={models} />
        ) : stream === undefined ? (
          <ModelView key={model} model={model} />
        ) : (
          <StreamView key={`${model} ${stream}`} model={model} stream={stream} />
        )}
      </main>
      <KeyDialog />
    </>
  );
}

applyTheme();
render(<App />, document.body);
