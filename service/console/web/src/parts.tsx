// Parts of every view: requests with their problem, tables, tiles, lists of facts.
import type { ComponentChildren } from "preact";
import { useEffect, useState } from "preact/hooks";
import { json, pause, reason } from "./api";

const INTERVAL_S = 1;
/** Least interval between reads, as a multiple of the time that one takes. */
const INTERVAL_FACTOR = 10;

/** The result of a request that is repeated when its inputs change, or why it failed. */
export function useRequest<T>(request: (signal: AbortSignal) => Promise<T>, inputs: unknown[]) {
  const [result, setResult] = useState<{ value?: T; problem?: string }>({});
  useEffect(() => {
    const stop = new AbortController();
    setResult({});
    request(stop.signal).then(
      (value) => stop.signal.aborted || setResult({ value }),
      (error) => stop.signal.aborted || setResult({ problem: reason(error) }),
    );
    return () => stop.abort();
  }, inputs);
  return result;
}

/** The latest reply of a request that is repeated while the view is shown, and why the last one failed. */
export function usePolling<T>(path: string, onReply: (reply: T) => void = () => undefined) {
  const [result, setResult] = useState<{ value?: T; problem?: string }>({});
  useEffect(() => {
    const stop = new AbortController();
    const follow = async () => {
      while (!stop.signal.aborted) {
        const began = performance.now();
        try {
          const value = await json<T>(path, stop.signal);
          onReply(value);
          setResult({ value });
        } catch (error) {
          if (!stop.signal.aborted) setResult(({ value }) => ({ value, problem: reason(error) }));
        }
        const took_s = (performance.now() - began) / 1000;
        await pause(Math.max(INTERVAL_S, INTERVAL_FACTOR * took_s), stop.signal);
      }
    };
    void follow();
    return () => stop.abort();
  }, [path]);
  return result;
}

export const Alert = ({ text }: { text: string | undefined }) =>
  text ? <p class="problem" role="alert">{text}</p> : null;

interface TableProps {
  /** Headings; those that begin with "#" are of numbers. */
  head: string[];
  rows: ComponentChildren[][] | undefined;
  empty?: string;
}

export function Table({ head, rows, empty }: TableProps) {
  const kind = (column: number) => (head[column]?.startsWith("#") ? "number" : undefined);
  return (
    <>
      <table aria-busy={rows === undefined}>
        <thead>
          <tr>{head.map((name, column) => <th class={kind(column)}>{name.replace("#", "")}</th>)}</tr>
        </thead>
        <tbody>
          {rows?.map((cells) => (
            <tr>{cells.map((cell, column) => <td class={kind(column)}>{cell}</td>)}</tr>
          ))}
        </tbody>
      </table>
      {rows?.length === 0 && empty && <p class="quiet">{empty}</p>}
    </>
  );
}

/** Names with values: large in tiles, small in facts. */
export const Facts = ({ of, large }: { of: [string, ComponentChildren][]; large?: boolean }) => (
  <dl class={large ? "tiles" : "facts"}>
    {of.map(([name, value]) => (
      <div key={name} class={large ? "panel" : undefined}>
        <dt>{name}</dt>
        <dd>{value}</dd>
      </div>
    ))}
  </dl>
);
