"""`carry streams list|show|history|rewind|acknowledge|delete|reset`: manages streams of a running
service; `carry alarms` lists the open alarms of its models.

These commands are a client of the HTTP API: they hold no state and connect to no store. `load`, in
a module of its own, writes into a store.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.commands.common import DEFAULT_URL, Url, open_service, show_progress
from service.commands.load import load_streams
from service.core.errors import OperatorError

if TYPE_CHECKING:
    from carry_client import Carry

CONCURRENT_REQUESTS = 8
"""Number of concurrent requests when a command acts on many streams."""

PAGE_STREAMS = 1000
"""Streams that are submitted together: it bounds the memory of their requests."""

streams_app = typer.Typer(
    help="List, show, rewind, acknowledge, delete and reset streams of a running service; load new "
    "ones.",
    no_args_is_help=True,
)
streams_app.command("load")(load_streams)

Model = Annotated[str, typer.Argument(help="The model's name.")]
StreamArgument = Annotated[str, typer.Argument(help="The stream's name.")]
Stream = Annotated[str | None, typer.Argument(help="The stream's name.")]
Prefix = Annotated[
    str | None, typer.Option(help="All streams whose names begin with this; '' for all.")
]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask for confirmation.")]
DELETED, KEPT, NOT_FOUND, DAMAGED = "deleted", "kept", "not_found", "damaged"
"""Outcomes of the reset of one stream."""


@streams_app.command("list")
def list_streams(
    model: Model,
    prefix: Annotated[str, typer.Option(help="Only names that begin with this.")] = "",
    limit: Annotated[int, typer.Option(min=0, help="At most this many; 0 for all.")] = 0,
    url: Url = DEFAULT_URL,
) -> None:
    """Print the names of a model's streams, one per line."""
    with open_service(url) as client:
        for name in islice(client.model(model).streams(prefix), limit or None):
            typer.echo(name)


@streams_app.command("show")
def show_stream(
    model: Model,
    stream: StreamArgument,
    state: Annotated[bool, typer.Option("--state", help="Include every state part.")] = False,
    url: Url = DEFAULT_URL,
) -> None:
    """Print a stream's position, epoch and tag as JSON."""
    from carry_client import stream_path

    with open_service(url) as client:
        path = stream_path(model, stream) + ("/state" if state else "")
        typer.echo(json.dumps(client.request("GET", path), indent=2))


@streams_app.command("history")
def show_history(
    model: Model,
    stream: StreamArgument,
    start: Annotated[int, typer.Option("--from", min=0, help="Position of the first event.")] = 0,
    limit: Annotated[int | None, typer.Option(min=1, help="At most this many events.")] = None,
    url: Url = DEFAULT_URL,
) -> None:
    """Print what is kept of a stream's past, and where it can be rewound to, as JSON."""
    from carry_client import stream_path

    params = {"from": start} if limit is None else {"from": start, "limit": limit}
    with open_service(url) as client:
        path = stream_path(model, stream) + "/history"
        typer.echo(json.dumps(client.request("GET", path, params=params), indent=2))


@streams_app.command("rewind")
def rewind_stream(
    model: Model,
    stream: StreamArgument,
    position: Annotated[int, typer.Argument(min=0, help="Events that stay consumed.")],
    yes: Yes = False,
    url: Url = DEFAULT_URL,
) -> None:
    """Take a stream back to an earlier position; its later events are dropped.

    Nothing happens if the stream changes between the question and the answer.
    """
    with open_service(url) as client:
        handle = client.model(model).stream(stream)
        head = handle.refresh()
        if not yes:
            which = f"stream {stream} of model {model}"
            question = f"Take {which} from position {head.position} to {position}?"
            typer.confirm(question, abort=True)
        head = handle.rewind(position)
        typer.echo(f"rewound {stream} to position {head.position}, epoch {head.epoch}")


@streams_app.command("acknowledge")
def acknowledge_alarm(
    model: Model,
    stream: StreamArgument,
    position: Annotated[
        int | None, typer.Option(min=0, help="Only if the stream is at this position.")
    ] = None,
    url: Url = DEFAULT_URL,
) -> None:
    """Close the open alarm of a stream, and take what it does now as normal."""
    with open_service(url) as client:
        was_open = client.model(model).stream(stream).acknowledge(position)
        typer.echo(f"{'acknowledged' if was_open else 'no open alarm of'} {stream}")


def list_alarms(
    model: Model,
    prefix: Annotated[str, typer.Option(help="Only streams whose names begin with this.")] = "",
    limit: Annotated[int, typer.Option(min=0, help="At most this many; 0 for all.")] = 0,
    url: Url = DEFAULT_URL,
) -> None:
    """Print the open alarms of a model, one per line, the newest first."""
    with open_service(url) as client:
        alarm = None
        for alarm in islice(client.model(model).alarms(prefix), limit or None):
            opened = datetime.fromtimestamp(alarm.opened_ms / 1000, UTC).isoformat(" ", "seconds")
            facts = [alarm.stream, opened]
            if alarm.opened is not None:
                facts.append(f"event {alarm.opened}, {alarm.events} since")
                facts.append(f"severity {alarm.severity:.1f}")
                facts.append(str(alarm.cause))
            typer.echo("\t".join(facts))
        if alarm is None:
            typer.echo("no open alarms (a model without detection never has any)", err=True)


@streams_app.command("delete")
def delete_streams(
    model: Model,
    stream: Stream = None,
    prefix: Prefix = None,
    yes: Yes = False,
    url: Url = DEFAULT_URL,
) -> None:
    """Delete one stream, or all streams with a prefix."""
    from carry_client import stream_path

    _confirm(model, stream, prefix, yes, "Delete {}?")
    with open_service(url) as client:
        if stream is not None:
            client.request("DELETE", stream_path(model, stream))
            typer.echo(f"deleted {stream}")
            return
        with show_progress("deleting"):
            deleted = client.model(model).delete_streams(prefix or "")
        typer.echo(f"deleted {deleted:,} streams")


@streams_app.command("reset")
def reset_streams(
    model: Model,
    stream: Stream = None,
    prefix: Prefix = None,
    yes: Yes = False,
    url: Url = DEFAULT_URL,
) -> None:
    """Delete streams whose state was written by a version of the model that is not served.

    A stream is deleted only if it has not changed since its version was read; its next chunk then
    starts at position 0. Streams of the versions that are served now are kept.
    """
    from carry_client import model_path, stream_path

    _confirm(model, stream, prefix, yes, "Delete {}, if another version wrote the state?")
    outcomes: Counter[str] = Counter()
    # a failure ends the command; a second run continues from there
    with open_service(url) as client, ThreadPoolExecutor(CONCURRENT_REQUESTS) as pool:
        served: Any = client.request("GET", f"{model_path(model)}/versions")
        kept = {each["fingerprint"]: each["version"] for each in served["versions"]}

        def reset(name: str) -> str:
            return _reset(client, stream_path(model, name), kept)

        named = client.model(model).streams(prefix or "") if stream is None else [stream]
        names = list(named)
        with show_progress("resetting", len(names)) as show:
            for first in range(0, len(names), PAGE_STREAMS):
                for outcome in pool.map(reset, names[first : first + PAGE_STREAMS]):
                    outcomes[outcome] += 1
                    show(outcomes.total())
    if stream is not None and outcomes[NOT_FOUND]:
        raise OperatorError(f"model {model} has no stream {stream}")
    typer.echo(
        f"reset {outcomes[DELETED]:,} streams, kept {outcomes[KEPT]:,} of version "
        f"{', '.join(kept.values())}"
    )
    if outcomes[DAMAGED]:
        raise OperatorError(
            f"{outcomes[DAMAGED]:,} damaged streams were kept; restore or delete them"
        )


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


def _reset(client: Carry, path: str, kept: Collection[str]) -> str:
    """Delete a stream unless its state has one of these fingerprints; returns the outcome."""
    from carry_client.errors import StateChanged, StateDamaged, StreamNotFound

    while True:
        try:
            stream: Any = client.request("GET", path)
            if stream["fingerprint"] in kept:
                return KEPT
            etag = f'"{stream["epoch"]}-{stream["tag"]}"'
            client.request("DELETE", path, headers={"if-match": etag})
        except StateChanged:
            continue
        except StreamNotFound:
            return NOT_FOUND
        except StateDamaged:
            return DAMAGED
        return DELETED
