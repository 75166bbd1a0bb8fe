"""`carry streams list|show|delete`: look at and forget streams of a running service.

A client of the HTTP API like any other: it holds no state and reaches no store.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote

import typer

if TYPE_CHECKING:
    import httpx

PAGE = 500

streams_app = typer.Typer(
    help="List, show and forget streams of a running service.", no_args_is_help=True
)

Model = Annotated[str, typer.Argument(help="The model's name.")]
Url = Annotated[str, typer.Option("--url", help="Where the service listens.")]
DEFAULT_URL = "http://127.0.0.1:8000"


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


def _ask(client: httpx.Client, method: str, path: str, **params: str | int) -> Any:
    """The decoded reply; a problem document ends in one line and exit status 1."""
    response = client.request(method, path, params=params)
    if response.is_success:
        return response.json() if response.content else None
    try:
        problem = response.json()
        line = f"{problem['code']}: {problem['detail']}"
    except (ValueError, KeyError, TypeError):
        line = f"{response.status_code} {response.reason_phrase}; is this a Carry service?"
    typer.echo(f"carry: {line}", err=True)
    raise typer.Exit(1)


def _path(model: str, stream: str | None = None) -> str:
    path = f"/v1/models/{quote(model, safe='')}/streams"
    return path if stream is None else f"{path}/{quote(stream, safe='')}"


def _names(client: httpx.Client, model: str, prefix: str) -> Iterator[str]:
    """Every name once, page by page."""
    seen: set[str] = set()
    cursor: str | None = None
    while True:
        more = {} if cursor is None else {"cursor": cursor}
        page = _ask(client, "GET", _path(model), prefix=prefix, limit=PAGE, **more)
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
    stream: Annotated[str | None, typer.Argument(help="The stream's name.")] = None,
    prefix: Annotated[
        str | None, typer.Option(help="Forget every stream whose name begins with this.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    url: Url = DEFAULT_URL,
) -> None:
    """Forget one stream, or all with a prefix."""
    if (stream is None) == (prefix is None):
        raise typer.BadParameter("expected either a stream's name or --prefix")
    what = f"stream {stream}" if stream is not None else f"all streams that begin with {prefix!r}"
    if not yes:
        typer.confirm(f"Forget {what} of model {model}?", abort=True)
    with _service(url) as client:
        if stream is not None:
            _ask(client, "DELETE", _path(model, stream))
            typer.echo(f"forgot {stream}")
        else:
            reply = _ask(client, "DELETE", _path(model), prefix=prefix or "")
            typer.echo(f"forgot {reply['deleted']} streams")
