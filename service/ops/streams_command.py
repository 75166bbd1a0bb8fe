"""`carry streams list|show|delete|reset`: look at and forget streams of a running service.

A client of the HTTP API like any other: it holds no state and reaches no store.
"""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote

import typer

if TYPE_CHECKING:
    import httpx

AT_A_TIME = 8
"""Requests under way at once, where many streams are meant."""

streams_app = typer.Typer(
    help="List, show, forget and reset streams of a running service.", no_args_is_help=True
)

Model = Annotated[str, typer.Argument(help="The model's name.")]
Url = Annotated[str, typer.Option("--url", help="Where the service listens.")]
Stream = Annotated[str | None, typer.Argument(help="The stream's name.")]
Prefix = Annotated[
    str | None, typer.Option(help="Every stream whose name begins with this; '' for all.")
]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask.")]
DEFAULT_URL = "http://127.0.0.1:8000"
DONE, LEFT, GONE, DAMAGED = "done", "left", "gone", "damaged"
"""What became of one of many streams."""

Act = Callable[["httpx.Client", str], str]
"""Does something to the stream of an address, and says what became of it."""


@contextmanager
def _service(url: str) -> Iterator[httpx.Client]:
    """A client whose failures end in one line and exit status 1."""
    # here, because it takes a third of the start of every other command
    import httpx

    try:
        with httpx.Client(base_url=url, timeout=30) as client:
            yield client
    except httpx.HTTPError as error:
        typer.echo(f"carry: {url} does not answer: {error}", err=True)
        raise typer.Exit(1) from error


def _ask(
    client: httpx.Client,
    method: str,
    path: str,
    *,
    but: Collection[str] = (),
    if_match: str | None = None,
    **params: str | int,
) -> Any:
    """The decoded reply; a problem document ends in one line and exit status 1.

    Args:
        but: codes of problems that are replies to the caller.
        if_match: the ETag under which it is done.
    """
    headers = {} if if_match is None else {"If-Match": if_match}
    response = client.request(method, path, params=params, headers=headers)
    if response.is_success:
        return response.json() if response.content else None
    try:
        problem = response.json()
        if problem["code"] in but:
            return problem
        line = f"{problem['code']}: {problem['detail']}"
    except (ValueError, KeyError, TypeError):
        line = f"{response.status_code} {response.reason_phrase}; is this a Carry service?"
    typer.echo(f"carry: {line}", err=True)
    raise typer.Exit(1)


def _path(model: str, stream: str | None = None) -> str:
    if stream in (".", ".."):
        # the HTTP client would remove it from the URL
        typer.echo(f"carry: {stream!r} is not a valid stream name", err=True)
        raise typer.Exit(1)
    path = f"/v1/models/{quote(model, safe='')}/streams"
    return path if stream is None else f"{path}/{quote(stream, safe='')}"


def _names(client: httpx.Client, model: str, prefix: str) -> Iterator[str]:
    """Every name once, page by page."""
    seen: set[str] = set()
    cursor: str | None = None
    while True:
        more = {} if cursor is None else {"cursor": cursor}
        page = _ask(client, "GET", _path(model), prefix=prefix, **more)
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
    """Print the names of a model's streams, one a line."""
    with _service(url) as client:
        for count, name in enumerate(_names(client, model, prefix), start=1):
            typer.echo(name)
            if count == limit:
                break


@streams_app.command("show")
def show_stream(
    model: Model,
    stream: Annotated[str, typer.Argument(help="The stream's name.")],
    state: Annotated[bool, typer.Option("--state", help="With every state part.")] = False,
    url: Url = DEFAULT_URL,
) -> None:
    """Print where a stream stands, as JSON."""
    with _service(url) as client:
        path = _path(model, stream) + ("/state" if state else "")
        typer.echo(json.dumps(_ask(client, "GET", path), indent=2))


@streams_app.command("delete")
def delete_streams(
    model: Model,
    stream: Stream = None,
    prefix: Prefix = None,
    yes: Yes = False,
    url: Url = DEFAULT_URL,
) -> None:
    """Forget one stream, or all with a prefix."""
    _confirm(model, stream, prefix, yes, "Forget {}?")
    with _service(url) as client:
        outcomes = _each(client, model, stream, prefix, "forgetting", _forget)
    typer.echo(f"forgot {outcomes[DONE]:,} streams" if stream is None else f"forgot {stream}")


@streams_app.command("reset")
def reset_streams(
    model: Model,
    stream: Stream = None,
    prefix: Prefix = None,
    yes: Yes = False,
    url: Url = DEFAULT_URL,
) -> None:
    """Begin streams anew whose state another version of the model wrote.

    They are forgotten, each only as long as it is as it was found; their next chunk is expected
    at position 0. The streams of the version that is served now are left alone.
    """
    _confirm(model, stream, prefix, yes, "Forget {}, where another version wrote the state?")
    with _service(url) as client:
        detail = _ask(client, "GET", f"/v1/models/{quote(model, safe='')}")
        reset = partial(_reset, fingerprint=detail["fingerprint"])
        outcomes = _each(client, model, stream, prefix, "resetting", reset)
    typer.echo(
        f"reset {outcomes[DONE]:,} streams, left {outcomes[LEFT]:,} of version {detail['version']}"
    )
    if outcomes[DAMAGED]:
        typer.echo(
            f"carry: {outcomes[DAMAGED]:,} damaged streams were left; restore or delete them",
            err=True,
        )
        raise typer.Exit(1)


def _confirm(model: str, stream: str | None, prefix: str | None, yes: bool, question: str) -> None:
    """Ask, unless `yes`, whether the streams that are meant are to be acted on.

    Args:
        question: with `{}` in the streams' place.
    """
    if (stream is None) == (prefix is None):
        raise typer.BadParameter("expected either a stream's name or --prefix")
    which = f"all streams that begin with {prefix!r}" if stream is None else f"stream {stream}"
    if not yes:
        typer.confirm(question.format(f"{which} of model {model}"), abort=True)


def _each(
    client: httpx.Client, model: str, stream: str | None, prefix: str | None, doing: str, act: Act
) -> Counter[str]:
    """Act on the one stream, which has to be there, or on all with the prefix: the outcomes."""
    if stream is None:
        return _many(client, model, prefix or "", doing, act)
    outcome = act(client, _path(model, stream))
    if outcome == GONE:
        typer.echo(f"carry: model {model} has no stream {stream}", err=True)
        raise typer.Exit(1)
    return Counter([outcome])


def _many(client: httpx.Client, model: str, prefix: str, doing: str, act: Act) -> Counter[str]:
    """Act on every stream with a prefix, some at a time, and count the outcomes.

    The first failure ends it; what was done stays done, and the same command goes on from there.
    """
    # here, because it takes long to import
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    console = Console(stderr=True)
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    outcomes: Counter[str] = Counter()
    with (
        Progress(*columns, console=console, disable=not console.is_terminal) as progress,
        ThreadPoolExecutor(AT_A_TIME) as pool,
    ):
        task = progress.add_task("listing", total=None)
        names = list(progress.track(_names(client, model, prefix), task_id=task))
        progress.reset(task, description=doing, total=len(names))
        asked = (pool.submit(act, client, _path(model, name)) for name in names)
        for done in _in_turn(asked, 2 * AT_A_TIME):
            outcomes[done.result()] += 1
            progress.advance(task)
    return outcomes


def _in_turn(futures: Iterator[Future[str]], ahead: int) -> Iterator[Future[str]]:
    """The futures in order, that many of them begun ahead."""
    begun = deque(islice(futures, ahead))
    while begun:
        yield begun.popleft()
        begun.extend(islice(futures, 1))


def _forget(client: httpx.Client, path: str) -> str:
    return GONE if _ask(client, "DELETE", path, but=("stream_not_found",)) else DONE


def _reset(client: httpx.Client, path: str, fingerprint: str) -> str:
    """Forget a stream unless its state has this fingerprint."""
    while True:
        found = _ask(client, "GET", path, but=("stream_not_found", "state_damaged"))
        if found.get("code") == "stream_not_found":
            return GONE
        if found.get("code") == "state_damaged":
            return DAMAGED
        if found["fingerprint"] == fingerprint:
            return LEFT
        etag = f'"{found["epoch"]}-{found["tag"]}"'
        refusal = _ask(
            client, "DELETE", path, but=("stream_not_found", "state_changed"), if_match=etag
        )
        if refusal is None:
            return DONE
