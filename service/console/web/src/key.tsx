// The dialog that asks for an access key when the service rejects a request without a valid one.
import { useEffect, useRef, useState } from "preact/hooks";
import { keepKey, keyDialog } from "./api";
import { Alert } from "./parts";

export function KeyDialog({ onKey }: { onKey: () => void }) {
  const dialog = useRef<HTMLDialogElement>(null);
  const answer = useRef<(() => void) | null>(null);
  const [wasRejected, setWasRejected] = useState(false);
  useEffect(() => {
    keyDialog.ask = (rejected) => {
      setWasRejected(rejected);
      dialog.current?.showModal();
      return new Promise((resolve) => (answer.current = resolve));
    };
  }, []);
  const submit = (event: SubmitEvent) => {
    event.preventDefault();
    const form = event.currentTarget as HTMLFormElement;
    const key = String(new FormData(form).get("key")).trim();
    if (key === "") return;
    form.reset();
    dialog.current?.close();
    keepKey(key);
    onKey();
    answer.current?.();
  };
  return (
    <dialog ref={dialog} aria-labelledby="key-title" onCancel={(event) => event.preventDefault()}>
      <form onSubmit={submit}>
        <h2 id="key-title">Access key</h2>
        <p id="key-help">The service requires an access key. The tab keeps it until it is closed.</p>
        <Alert text={wasRejected ? "The service rejected this key." : ""} />
        <label for="key">Key</label>
        <input id="key" name="key" type="password" autocomplete="off" required aria-describedby="key-help" />
        <button class="primary">Use this key</button>
      </form>
    </dialog>
  );
}
