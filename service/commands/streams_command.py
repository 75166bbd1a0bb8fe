"""`carry streams list|show|delete|reset`: manages streams of a running service.

The commands are a client of the HTTP API: they hold no state and connect to no store.
"""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from http import HTTPStatus
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.commands.common import one_line_errors

if TYPE_CHECKING:
    from carry_client import Carry

CONCURRENT_REQUESTS = 8
"""Number of concurrent requests when a command acts on many streams."""

DELETE_LIMIT = 10_000
"""About how many streams one request deletes."""

streams_app = typer.Typer(
    help="List, show, delete and reset streams of a running service.", no_args_is_help=True
)

Model = Annotated[str, typer.Argument(help="The model's name.")]
Url = Annotated[str, typer.Option("--url", help="Address of the service.")]
Stream = Annotated[str | None, typer.Argument(help="The stream's name.")]
Prefix = Annotated[
    str | None, typer.Option(help="All streams whose names begin with this; '' for all.")
]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask for confirmation.")]
DEFAULT_URL = "http://127.0.0.1:8000"
DELETED, KEPT, NOT_FOUND, DAMAGED = "deleted", "kept", "not_found", "damaged"
"""Outcomes of an action on one stream."""

Action = Callable[["Carry", str], str]
"""Acts on the stream of a URL path; returns the outcome."""


@contextmanager
def _service(url: str) -> Iterator[Carry]:
    """Open a client; a problem prints one line and exits with status 1."""
    # Imported here: it would take a third of the start-up time of every other command.
    from carry_client import Carry, Problem

    # of the access key in the environment
    with one_line_errors(ValueError):
        client = Carry(url, encoding="json")
    try:
        with client:
            yield client
    except Problem as problem:
        if problem.code == "no_answer":
            line = f"{url} does not answer: {problem.detail}"
        elif problem.status == 0:
            line = problem.detail
        elif problem.document:
            line = str(problem)
        else:
            phrase = HTTPStatus(problem.status).phrase
            line = f"{problem.status} {phrase}; is this a Carry service?"
        typer.echo(f"carry: {line}", err=True)
        raise typer.Exit(1) from problem


def _request(
    client: Carry,
    method: str,
    path: str,
    *,
    accept: Collection[str] = (),
    if_match: str | None = None,
    **params: str | int,
) -> Any:
    """Send a request and return its reply.

    Args:
        accept: codes of problems whose documents are returned to the caller.
        if_match: value of the If-Match header.
    """
    from carry_client import Problem

    headers = {} if if_match is None else {"if-match": if_match}
    try:
        return client.request(method, path, headers=headers, params=params)
    except Problem as problem:
        if problem.code not in accept:
            raise
        return problem.document


def _path(model: str, stream: str | None = None) -> str:
    from carry_client import model_path, stream_path

    return f"{model_path(model)}/streams" if stream is None else stream_path(model, stream)


def _names(client: Carry, model: str, prefix: str) -> Iterator[str]:
    """Yield the name of each stream once, page by page."""
    seen: set[str] = set()
    cursor: str | None = None
    while True:
        parameters = {} if cursor is None else {"cursor": cursor}
        page = _request(client, "GET", _path(model), prefix=prefix, **parameters)
        for name in page["streams"]:
            if name not in seen:
                seen.add(name)
                yield name
        cursor = page["cursor"]
        if cursor is None:
            return


@streams_app.command("list")
def list_streams(
    model: Model,
    prefix: Annotated[str, typer.Option(help="Only names that begin with this.")] = "",
    limit: Annotated[int, typer.Option(min=0, help="At most this many; 0 for all.")] = 0,
    url: Url = DEFAULT_URL,
) -> None:
    """Print the names of a model's streams, one per line."""
    with _service(url) as client:
        for count, name in enumerate(_names(client, model, prefix), start=1):
            typer.echo(name)
            if count == limit:
                break


@streams_app.command("show")
def show_stream(
    model: Model,
    stream: Annotated[str, typer.Argument(help="The stream's name.")],
    state: Annotated[bool, typer.Option("--state", help="Include every state part.")] = False,
    url: Url = DEFAULT_URL,
) -> None:
    """Print a stream's position, epoch and tag as JSON."""
    with _service(url) as client:
        path = _path(model, stream) + ("/state" if state else "")
        typer.echo(json.dumps(_request(client, "GET", path), indent=2))


@streams_app.command("delete")
def delete_streams(
    model: Model,
    stream: Stream = None,
    prefix: Prefix = None,
    yes: Yes = False,
    url: Url = DEFAULT_URL,
) -> None:
    """Delete one stream, or all streams with a prefix."""
    _confirm(model, stream, prefix, yes, "Delete {}?")
    with _service(url) as client:
        if prefix is not None:
            typer.echo(f"deleted {_delete_prefix(client, model, prefix):,} streams")
            return
        _apply(client, model, stream, prefix, "deleting", _delete)
    typer.echo(f"deleted {stream}")


@streams_app.command("reset")
def reset_streams(
    model: Model,
    stream: Stream = None,
    prefix: Prefix = None,
    yes: Yes = False,
    url: Url = DEFAULT_URL,
) -> None:
    """Delete streams whose state was written by another version of the model.

    A stream is deleted only if it has not changed since its version was read; its next chunk then
    starts at position 0. Streams of the version that is served now are kept.
    """
    _confirm(model, stream, prefix, yes, "Delete {}, if another version wrote the state?")
    with _service(url) as client:
        detail = _request(client, "GET", _path(model).removesuffix("/streams"))
        reset = partial(_reset, fingerprint=detail["fingerprint"])
        outcomes = _apply(client, model, stream, prefix, "resetting", reset)
    typer.echo(
        f"reset {outcomes[DELETED]:,} streams, kept {outcomes[KEPT]:,} of version "
        f"{detail['version']}"
    )
    if outcomes[DAMAGED]:
        typer.echo(
            f"carry: {outcomes[DAMAGED]:,} damaged streams were kept; restore or delete them",
            err=True,
        )
        raise typer.Exit(1)


def _confirm(model: str, stream: str | None, prefix: str | None, yes: bool, question: str) -> None:
    """Ask the user for confirmation, unless `yes`.

    Args:
        question: its `{}` is replaced by a description of the streams.
    """
    if (stream is None) == (prefix is None):
        raise typer.BadParameter("expected either a stream's name or --prefix")
    which = f"all streams that begin with {prefix!r}" if stream is None else f"stream {stream}"
    if not yes:
        typer.confirm(question.format(f"{which} of model {model}"), abort=True)


def _apply(
    client: Carry,
    model: str,
    stream: str | None,
    prefix: str | None,
    description: str,
    action: Action,
) -> Counter[str]:
    """Act on one stream, which must exist, or on all streams with a prefix; count the outcomes."""
    if stream is None:
        return _apply_to_prefix(client, model, prefix or "", description, action)
    outcome = action(client, _path(model, stream))
    if outcome == NOT_FOUND:
        typer.echo(f"carry: model {model} has no stream {stream}", err=True)
        raise typer.Exit(1)
    return Counter([outcome])


def _apply_to_prefix(
    client: Carry, model: str, prefix: str, description: str, action: Action
) -> Counter[str]:
    """Act on every stream with a prefix concurrently, and count the outcomes.

    Stops at the first failure; running the same command again continues from there.
    """
    # Imported here, because it takes long.
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    console = Console(stderr=True)
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    outcomes: Counter[str] = Counter()
    with (
        Progress(*columns, console=console, disable=not console.is_terminal) as progress,
        ThreadPoolExecutor(CONCURRENT_REQUESTS) as pool,
    ):
        task = progress.add_task("listing", total=None)
        names = list(progress.track(_names(client, model, prefix), task_id=task))
        progress.reset(task, description=description, total=len(names))
        futures = (pool.submit(action, client, _path(model, name)) for name in names)
        for future in _with_lookahead(futures, 2 * CONCURRENT_REQUESTS):
            outcomes[future.result()] += 1
            progress.advance(task)
    return outcomes


def _delete_prefix(client: Carry, model: str, prefix: str) -> int:
    """Delete all streams with a prefix, in requests of bounded size; returns how many."""
    from rich.console import Console

    deleted: int = 0
    cursor: str | None = ""
    with Console(stderr=True).status("deleting") as status:
        while cursor is not None:
            page = _request(
                client, "DELETE", _path(model), prefix=prefix, limit=DELETE_LIMIT, cursor=cursor
            )
            deleted += page["deleted"]
            cursor = page["cursor"]
            status.update(f"deleted {deleted:,} streams")
    return deleted


def _with_lookahead(futures: Iterator[Future[str]], count: int) -> Iterator[Future[str]]:
    """Yield the futures in order, with `count` of them submitted ahead."""
    submitted = deque(islice(futures, count))
    while submitted:
        yield submitted.popleft()
        submitted.extend(islice(futures, 1))


def _delete(client: Carry, path: str) -> str:
    return NOT_FOUND if _request(client, "DELETE", path, accept=("stream_not_found",)) else DELETED


def _reset(client: Carry, path: str, fingerprint: str) -> str:
    """Delete a stream unless its state has this fingerprint."""
    while True:
        stream = _request(client, "GET", path, accept=("stream_not_found", "state_damaged"))
        if stream.get("code") == "stream_not_found":
            return NOT_FOUND
        if stream.get("code") == "state_damaged":
            return DAMAGED
        if stream["fingerprint"] == fingerprint:
            return KEPT
        etag = f'"{stream["epoch"]}-{stream["tag"]}"'
        problem = _request(
            client, "DELETE", path, accept=("stream_not_found", "state_changed"), if_match=etag
        )
        if problem is None:
            return DELETED
