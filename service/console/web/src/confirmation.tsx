// A dialog that says what a change of the service does, and makes it once the user confirms.
import type { ComponentChildren } from "preact";
import { useEffect, useRef, useState } from "preact/hooks";
import { reason } from "./api";
import { Alert } from "./parts";

export interface Change {
  /** A verb: of the button that opens the dialog, and of the one that confirms. */
  title: string;
  /** What will happen. */
  text: string;
  fields?: ComponentChildren;
  apply: (fields: FormData) => Promise<unknown>;
}

/** Open while it is rendered; stays open with the reason if the service rejects the change. */
export function Confirmation({ change, onClose }: { change: Change; onClose: () => void }) {
  const dialog = useRef<HTMLDialogElement>(null);
  const [isPending, setPending] = useState(false);
  const [problem, setProblem] = useState("");
  useEffect(() => dialog.current!.showModal(), []);
  // closed before it is removed, so that the focus returns
  const close = () => dialog.current?.close();
  const submit = (event: SubmitEvent) => {
    event.preventDefault();
    setPending(true);
    setProblem("");
    change
      .apply(new FormData(event.currentTarget as HTMLFormElement))
      .then(close, (error) => setProblem(reason(error)))
      .finally(() => setPending(false));
  };
  return (
    <dialog ref={dialog} aria-labelledby="change-title" aria-describedby="change-text" onClose={onClose}>
      <form onSubmit={submit}>
        <h2 id="change-title">{change.title}</h2>
        <p id="change-text">{change.text}</p>
        <Alert text={problem} />
        {change.fields}
        <div class="bar">
          <button type="button" onClick={close}>Cancel</button>
          <button class="primary" disabled={isPending}>{change.title}</button>
        </div>
      </form>
    </dialog>
  );
}
