// Requests to the public API of the service that serves this page, with the user's access key.

const ROOT = new URL("..", document.baseURI);
const STORED_KEY = "carry.access-key";

/** A request that the service rejected; the message is the problem document's. */
export class Problem extends Error {
  constructor(
    readonly status: number,
    readonly document: any,
  ) {
    super(document.detail ?? `The service answered ${status}.`);
  }
}

/** Why a request failed, in a sentence. */
export const reason = (error: unknown): string =>
  error instanceof Problem ? error.message : "The service does not answer.";

/** Asks the user for a key and keeps it; set by the dialog. `wasRejected`: the last one did not work. */
export const keyDialog = { ask: async (_wasRejected: boolean): Promise<void> => undefined };
let asked: Promise<void> | undefined;

export const keepKey = (key: string): void => sessionStorage.setItem(STORED_KEY, key);
export const forgetKey = (): void => sessionStorage.removeItem(STORED_KEY);
export const hasKey = (): boolean => sessionStorage.getItem(STORED_KEY) !== null;

/** Requests of the page wait for one dialog; a key that was replaced meanwhile is not asked for. */
async function renewKey(used: string | null): Promise<void> {
  if (sessionStorage.getItem(STORED_KEY) !== used) return;
  asked ??= keyDialog.ask(used !== null).finally(() => (asked = undefined));
  await asked;
}

interface Options extends RequestInit {
  headers?: Record<string, string>;
}

/** The response to a request; asks for a key for as long as the service wants another one. */
async function request(path: string, { headers, ...options }: Options): Promise<Response> {
  for (;;) {
    const key = sessionStorage.getItem(STORED_KEY);
    const response = await fetch(new URL(path, ROOT), {
      cache: "no-store",
      headers: key === null ? headers : { ...headers, authorization: `Bearer ${key}` },
      ...options,
    });
    if (response.ok) return response;
    const document = await response.json().catch(() => ({}));
    if (response.status !== 401) throw new Problem(response.status, document);
    await renewKey(key);
    options.signal?.throwIfAborted();
  }
}

export const get = (
  path: string,
  signal: AbortSignal,
  headers: Record<string, string> = {},
): Promise<Response> => request(path, { signal, headers });

export const post = (
  path: string,
  body: object,
  headers: Record<string, string> = {},
): Promise<Response> =>
  request(path, {
    method: "POST",
    headers: { ...headers, "content-type": "application/json" },
    body: JSON.stringify(body),
  });

export const remove = (path: string): Promise<Response> => request(path, { method: "DELETE" });

export const json = async <T>(path: string, signal: AbortSignal): Promise<T> =>
  (await get(path, signal)).json();

export interface ServerEvent {
  event: string;
  id: string;
  data: string;
}

/** The server-sent events of a GET. (An EventSource cannot send a key.) */
export async function* serverEvents(
  path: string,
  signal: AbortSignal,
  lastId: string,
): AsyncGenerator<ServerEvent> {
  const response = await get(path, signal, lastId === "" ? {} : { "last-event-id": lastId });
  const reader = response.body!.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (let read = await reader.read(); !read.done; read = await reader.read()) {
    const messages = (text + read.value).split("\n\n");
    text = messages.pop()!;
    for (const message of messages) {
      const fields = message.split("\n").map((line) => line.split(/: ?(.*)/s));
      const field = (name: string) => fields.find(([key]) => key === name)?.[1] ?? "";
      if (field("data") !== "")
        yield { event: field("event"), id: field("id"), data: field("data") };
    }
  }
}

/** Waits, shorter if aborted. */
export const pause = (seconds: number, signal: AbortSignal): Promise<void> =>
  new Promise((resolve) => {
    const timer = setTimeout(resolve, seconds * 1000);
    signal.addEventListener("abort", () => (clearTimeout(timer), resolve()), { once: true });
  });

export interface ModelSummary {
  name: string;
  version: string;
  description: string;
  runtime: string;
}

export interface ModelDetail extends ModelSummary {
  fingerprint: string;
  input_features: number;
  events: object | null;
  outputs: Record<string, { shape: number[]; per: "step" | "chunk"; labels: string[]; categories_of?: string }>;
  state: Record<string, { shape: number[]; dtype: string }>;
  chunking: string;
  blocks: { size: number; lookahead: number } | null;
  runtimes: string[];
  forecast: { targets: string[]; max_horizon: number } | null;
  alarms: { output: string } | null;
}

export interface StreamHead {
  stream: string;
  version: string;
  feed: string;
  epoch: string;
  tag: string;
  position: number;
  updated_ms: number;
  state_bytes?: number;
}

const modelPart = (model: string): string => `models/${encodeURIComponent(model)}`;
const streamPart = (model: string, stream: string): string =>
  `${modelPart(model)}/streams/${encodeURIComponent(stream)}`;

/** Paths in the API. */
export const modelPath = (model: string): string => `v1/${modelPart(model)}`;
export const streamPath = (model: string, stream: string): string =>
  `v1/${streamPart(model, stream)}`;

/** Addresses of views of this page. */
export const modelAddress = (model: string): string => `#/${modelPart(model)}`;
export const streamAddress = (model: string, stream: string): string =>
  `#/${streamPart(model, stream)}`;
export const topicAddress = (group: string, topic: string): string =>
  `#/topics/${encodeURIComponent(group)}/${encodeURIComponent(topic)}`;
