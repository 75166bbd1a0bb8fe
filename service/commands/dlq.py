"""`carry dlq list|show|replay`: the events of topics that could not be processed."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.commands.common import DataDir, RedisUrl, run_on_store
from service.core.errors import OperatorError

if TYPE_CHECKING:
    from service.consumers.config import ConsumerConfig
    from service.store.redis.redis_store import RedisStore
    from service.store.topics import Entry, TopicKeys

PAGE: int = 500
"""Dead letters that are read, and moved, together."""

dlq_app = typer.Typer(
    help="List, show and replay the events of topics that could not be processed.",
    no_args_is_help=True,
)

Config = Annotated[Path | None, typer.Option(help="The configuration of the consumer.")]
Source = Annotated[
    str | None, typer.Option("--from", help="The topic of the events, instead of a configuration.")
]
Partitioned = Annotated[
    bool | None,
    typer.Option(
        "--partitioned", help="A topic for each partition of the store; default on a cluster."
    ),
]
Group = Annotated[str | None, typer.Option(help="The consumer group.")]
Stream = Annotated[str | None, typer.Option(help="Of this stream only.")]
Outputs = Annotated[
    bool,
    typer.Option(
        "--outputs",
        help="Outputs that a webhook or Kafka rejected, instead of events; needs --config.",
    ),
]


@dlq_app.command("list")
def list_letters(
    config: Config = None,
    source: Source = None,
    partitioned: Partitioned = None,
    stream: Stream = None,
    limit: Annotated[int, typer.Option(min=1, help="Most dead letters.")] = 100,
    outputs: Outputs = False,
    redis_url: RedisUrl = None,
    data_dir: DataDir = None,
) -> None:
    """List dead letters, oldest first: id, time, code, stream and reason."""

    async def show(store: RedisStore, topics: list[TopicKeys], _: ConsumerConfig) -> None:
        shown = 0
        for keys in topics:
            async for letter in _letters(store, keys, stream):
                values = _values(letter)
                time_s = int(values.get("carry-time", "0")) / 1000
                time = datetime.fromtimestamp(time_s, UTC).isoformat(timespec="seconds")
                code, name = values.get("carry-code", "-"), values.get("carry-stream") or "-"
                reason = " ".join(values.get("carry-reason", "").split())[:120]
                typer.echo(f"{letter.id.decode():22} {time:26} {code:18} {name:24} {reason}")
                shown += 1
                if shown == limit:
                    return
        if not shown:
            names = repr(topics[0].dead_letters)
            if len(topics) > 1:
                names += f" to {topics[-1].dead_letters!r}"
            of_stream = "" if stream is None else f" of stream {stream!r}"
            typer.echo(f"no dead letters{of_stream} in {names}", err=True)

    overrides = {"from": source, "partitioned": partitioned}
    _run(config, overrides, redis_url, data_dir, show, outputs=outputs)


@dlq_app.command("show")
def show_letter(
    letter_id: Annotated[str, typer.Argument(metavar="ID", help="The id of a dead letter.")],
    config: Config = None,
    source: Source = None,
    partitioned: Partitioned = None,
    outputs: Outputs = False,
    redis_url: RedisUrl = None,
    data_dir: DataDir = None,
) -> None:
    """Show the fields of a dead letter: code and reason, and those of the original entry."""

    async def show(store: RedisStore, topics: list[TopicKeys], _: ConsumerConfig) -> None:
        for keys in topics:
            async for letter in _letters(store, keys, None):
                if letter.id.decode() == letter_id:
                    document = {"topic": keys.dead_letters, **_values(letter)}
                    typer.echo(json.dumps(document, indent=2))
                    return
        raise OperatorError(f"there is no dead letter {letter_id!r}")

    overrides = {"from": source, "partitioned": partitioned}
    _run(config, overrides, redis_url, data_dir, show, outputs=outputs)


@dlq_app.command("replay")
def replay_letters(
    ids: Annotated[
        list[str] | None, typer.Argument(metavar="[ID]...", help="Ids of dead letters.")
    ] = None,
    config: Config = None,
    source: Source = None,
    partitioned: Partitioned = None,
    group: Group = None,
    stream: Annotated[
        str | None,
        typer.Option(
            help="All of this stream, by position; a halted stream continues behind them."
        ),
    ] = None,
    discard: Annotated[
        bool, typer.Option("--discard", help="Delete them instead of adding them again.")
    ] = False,
    outputs: Outputs = False,
    redis_url: RedisUrl = None,
    data_dir: DataDir = None,
) -> None:
    """Add dead letters to their topic again, as new entries behind all others."""
    chosen = {each.encode() for each in ids or ()}
    if bool(chosen) == (stream is not None):
        raise OperatorError("expected ids of dead letters, or --stream NAME")

    async def replay(store: RedisStore, topics: list[TopicKeys], consumer: ConsumerConfig) -> None:
        moved, missing = 0, set(chosen)
        for keys in topics:
            if stream is not None:
                field = consumer.position
                moved += await _replay_stream(
                    store, keys, stream, field, adds=not discard, is_configured=config is not None
                )
                continue
            found = [each.id async for each in _letters(store, keys, None) if each.id in chosen]
            missing -= {*found}
            for at in range(0, len(found), PAGE):
                part = found[at : at + PAGE]
                moved += await store.topics.replay(keys, part, adds=not discard) or 0
        typer.echo(f"{moved} dead letters {'deleted' if discard else 'replayed'}")
        if missing:
            names = ", ".join(repr(each.decode()) for each in sorted(missing))
            raise OperatorError(f"there is no dead letter {names}")

    overrides = {"from": source, "group": group, "partitioned": partitioned}
    _run(config, overrides, redis_url, data_dir, replay, outputs=outputs)


async def _replay_stream(
    store: RedisStore,
    keys: TopicKeys,
    stream: str,
    field: str | None,
    *,
    adds: bool,
    is_configured: bool,
) -> int:
    """Replay a stream's dead letters; the stream continues behind the last one.

    Args:
        field: with the position; they are in its order if all have one, since a missing event that
            was sent while the stream halted is behind those that wait for it.
        is_configured: whether the field is that of the consumer, and not the default.

    Raises:
        OperatorError: the positions are in another field.
    """
    moved = 0
    while True:
        last, positions = b"", dict[bytes, str]()
        async for letter in _letters(store, keys, None):
            last, values = letter.id, _values(letter)
            if values.get("carry-stream") == stream:
                positions[last] = values.get(field or "", "")
                is_ahead = values.get("carry-code") == "position_ahead"
                if adds and is_ahead and not positions[last] and not is_configured:
                    raise OperatorError(
                        "--config: expected the configuration, which names the field of the "
                        f"position: dead letter {last.decode()!r} has no field {field!r}"
                    )
        ids = [*positions]
        if all(each.isdecimal() for each in positions.values()):
            ids.sort(key=lambda each: int(positions[each]))
        for at in range(0, max(0, len(ids) - PAGE), PAGE):
            moved += await store.topics.replay(keys, ids[at : at + PAGE], adds=adds) or 0
        rest = ids[-(len(ids) % PAGE or PAGE) :] if ids else []
        done = await store.topics.replay(keys, rest, adds=adds, resumed=stream, last=last)
        if done is not None:
            return moved + done


async def _letters(store: RedisStore, keys: TopicKeys, stream: str | None) -> AsyncIterator[Entry]:
    """The dead letters of a topic, in order."""
    after = "-"
    while page := await store.topics.dead_letters(keys, after, PAGE):
        for letter in page:
            if stream is None or _values(letter).get("carry-stream") == stream:
                yield letter
        after = page[-1].id.decode()


def _values(letter: Entry) -> dict[str, str]:
    fields = [field.decode("utf-8", "backslashreplace") for field in letter.fields or ()]
    return dict(zip(fields[::2], fields[1::2], strict=True))


def _run(
    path: Path | None,
    overrides: dict[str, Any],
    redis_url: str | None,
    data_dir: Path | None,
    action: Any,
    *,
    outputs: bool,
) -> None:
    from service.consumers.config import read_any_config
    from service.settings import Settings

    if outputs and path is None:
        raise OperatorError("--outputs: expected --config")
    config = read_any_config(path, overrides)
    space = Settings.load().store.keys

    async def act(store: Any) -> None:
        topics_of = config.outboxes if outputs else config.topics
        await action(store, topics_of(space, is_cluster=store.is_cluster), config)

    run_on_store(redis_url, data_dir, act)
