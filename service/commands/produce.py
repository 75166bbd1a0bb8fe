"""`carry produce`: writes events of a file to a topic, each to the partition of its stream."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.commands.common import DataDir, RedisUrl, run_on_store, show_progress
from service.core.errors import CarryError, OperatorError

if TYPE_CHECKING:
    from service.store.topics import TopicEntry

AT_ONCE = 500
"""Events that are sent together, and then awaited."""

MEMBERS = {"stream", "event", "position"}


def produce(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE|-",
            help="Lines of JSON with `stream`, `event` and perhaps `position`; -: standard input.",
        ),
    ],
    topic: Annotated[str, typer.Option("--to", help="The topic that the consumer reads.")],
    model: Annotated[
        str | None, typer.Option(help="The model that reads it; needed with partitions.")
    ] = None,
    partitioned: Annotated[
        bool | None,
        typer.Option(
            "--partitioned", help="A topic for each partition of the store; default on a cluster."
        ),
    ] = None,
    redis_url: RedisUrl = None,
    data_dir: DataDir = None,
) -> None:
    """Write events to a topic. Events with a position may be written again after a failure."""
    from service.settings import Settings
    from service.store.keys import KeySpace

    space = Settings.load().store.keys

    async def send(store: Any) -> int:
        is_partitioned = store.is_cluster if partitioned is None else partitioned
        if is_partitioned and model is None:
            raise OperatorError("--model: expected the model that reads the topic of partitions")
        chosen: KeySpace | None = space if is_partitioned else None
        count = 0
        with ExitStack() as stack:
            lines = sys.stdin.buffer
            if str(file) != "-":
                try:
                    lines = stack.enter_context(file.open("rb"))
                except OSError as error:
                    raise OperatorError(f"{file}: {error.strerror}") from error
            update = stack.enter_context(show_progress("produce"))
            entries = _entries(lines, topic, model or "", chosen)
            part: list[TopicEntry] = []
            try:
                while part := [*islice(entries, AT_ONCE)]:
                    await store.topics.add(part)
                    count += len(part)
                    update(count)
            except OperatorError as error:
                raise OperatorError(f"{error}; {count} events were written") from error
            except CarryError as error:
                raise OperatorError(
                    f"--to {topic}: {error.detail}; {count} events were written, and perhaps some "
                    f"of the next {len(part)}"
                ) from error
        return count

    count = run_on_store(redis_url, data_dir, send)
    typer.echo(f"{count} events written")


def _entries(lines: Iterable[bytes], topic: str, model: str, space: Any) -> Iterator[TopicEntry]:
    """The entries of lines; with the key space of a store, those of its partitions."""
    import msgspec

    from models.spec.stream_name import STREAM_NAME_RULE, is_stream_name
    from service.core.values import StreamKey
    from service.store.topics import TopicEntry

    decode = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        place = f"line {number}"
        try:
            members = decode(line)
            event = bytes(members["event"])
            place = f"line {number}: stream"
            stream = msgspec.json.decode(members["stream"], type=str)
            place = f"line {number}: position"
            position = members.get("position")
            given = [] if position is None else [msgspec.json.decode(position, type=int)]
        except KeyError as error:
            raise OperatorError(f"line {number}: expected a member {error}") from error
        except msgspec.DecodeError as error:
            raise OperatorError(f"{place}: {error}") from error
        if unknown := members.keys() - MEMBERS:
            raise OperatorError(
                f"line {number}: expected members among {', '.join(sorted(MEMBERS))}, "
                f"got {', '.join(sorted(unknown))}"
            )
        if event[:1] not in (b"{", b"["):
            raise OperatorError(f"line {number}: event: expected an object or a row of numbers")
        if not is_stream_name(stream):
            raise OperatorError(
                f"line {number}: stream: expected {STREAM_NAME_RULE}, got {stream!r}"
            )
        name = topic
        if space is not None:
            prefix = space.partition_prefix(space.partition(StreamKey(model, stream)))
            name = f"{prefix}:in:{topic}"
        fields: list[str | bytes | int] = ["stream", stream, "event", event]
        for each in given:
            fields += ["position", each]
        yield TopicEntry(name, fields)
