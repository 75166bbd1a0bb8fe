"""`carry consume`: computes the outputs of a topic's events into another topic, exactly once."""

from __future__ import annotations

import asyncio
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.commands.common import DataDir, RedisUrl, run_on_store
from service.commands.serve import Models, one_directory
from service.core.errors import OperatorError

if TYPE_CHECKING:
    from service.consumers.config import ConsumerConfig
    from service.store.topics import TopicKeys, TopicStatus

STATUS = "status"
RATE_INTERVAL_S = 1.0
"""Time over which the rate of a topic is measured."""


def consume(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[status] [CONFIG.yaml]",
            help="The configuration of the consumer; `status` shows how far its topics were read.",
            show_default=False,
        ),
    ] = None,
    source: Annotated[str | None, typer.Option("--from", help="The topic with the events.")] = None,
    sink: Annotated[str | None, typer.Option("--to", help="The topic for the outputs.")] = None,
    model: Annotated[str | None, typer.Option(help="The model that computes them.")] = None,
    group: Annotated[str | None, typer.Option(help="The consumer group.")] = None,
    partitioned: Annotated[
        bool | None,
        typer.Option(
            "--partitioned", help="A topic for each partition of the store; default on a cluster."
        ),
    ] = None,
    create: Annotated[
        bool | None, typer.Option("--create", help="Create the topic if it does not exist.")
    ] = None,
    repartition: Annotated[
        bool,
        typer.Option(
            "--repartition", help="Only move the events to the topics of their partitions."
        ),
    ] = False,
    reset_offsets: Annotated[
        str | None,
        typer.Option(
            metavar="beginning|end",
            help="Only set where reading of the Kafka topic continues, in all its partitions.",
        ),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(min=0, max=65535, help="Port of health and metrics; 0: any. Default: none."),
    ] = None,
    redis_url: RedisUrl = None,
    models: Models = None,
    data_dir: DataDir = None,
) -> None:
    """Consume a topic: run a model on the events of its entries, and write outputs to another.

    Every setting of the service is a CARRY_ variable; options take precedence over the file.
    """
    words = list(words or ())
    shows_status = words[:1] == [STATUS]
    paths = words[1:] if shows_status else words
    if len(paths) > 1:
        raise typer.BadParameter(f"expected one CONFIG.yaml, got {len(paths)}")
    overrides = {
        "from": source,
        "to": sink,
        "model": model,
        "group": group,
        "partitioned": partitioned,
        "create": create,
    }
    if shows_status:
        _show_status(Path(paths[0]) if paths else None, overrides, redis_url, data_dir)
        return
    flags = {"redis_url": redis_url, "models_dir": one_directory(models), "data_dir": data_dir}
    if repartition:
        overrides["to"] = sink or "-"
    if reset_offsets not in (None, "beginning", "end"):
        raise typer.BadParameter(f"expected beginning or end, got {reset_offsets!r}")
    _run(_read(paths, overrides), port, flags, repartition=repartition, reset_offsets=reset_offsets)


def _read(paths: list[str], overrides: dict[str, Any]) -> ConsumerConfig:
    from service.consumers.config import make_config, read_config

    if paths:
        return read_config(Path(paths[0]), overrides)
    if overrides["from"] is None:
        raise OperatorError("expected CONFIG.yaml, or --from, --to and --model")
    return make_config({}, "options", overrides)


def _run(
    config: ConsumerConfig,
    port: int | None,
    flags: dict[str, Any],
    *,
    repartition: bool,
    reset_offsets: str | None,
) -> None:
    import uvloop

    from service.consume import consume as consume_until_stopped
    from service.consume import repartition as repartition_until_stopped
    from service.consume import reset_offsets as reset_offsets_to
    from service.settings import Settings
    from service.store.embedded import running_valkey
    from service.telemetry.logs import configure_logs

    settings = Settings.load(flags)
    configure_logs(settings.telemetry.log_level, settings.telemetry.log_format)
    with ExitStack() as stack:
        store = settings.store
        if store.redis_url is None:
            valkey = running_valkey(store.data_dir, fsync=store.durability == "fsync")
            settings = settings.changed(redis_url=stack.enter_context(valkey))
        if reset_offsets is not None:
            uvloop.run(reset_offsets_to(settings, config, reset_offsets))
            return
        if port is None:
            port = settings.http.admin_port
        run = repartition_until_stopped if repartition else consume_until_stopped
        uvloop.run(run(settings, config, port))


def _show_status(
    path: Path | None,
    overrides: dict[str, Any],
    redis_url: str | None,
    data_dir: Path | None,
) -> None:
    from service.consumers.config import read_any_config
    from service.settings import Settings

    config, space = read_any_config(path, overrides), Settings.load().store.keys

    async def show(store: Any) -> None:
        topics = config.topics(space, is_cluster=store.is_cluster)
        if config.has_relay:
            topics += config.outboxes(space, is_cluster=store.is_cluster)

        async def read(keys: TopicKeys) -> tuple[float, TopicStatus | None]:
            return time.monotonic(), await store.topics.status(keys)

        earlier = [await read(keys) for keys in topics]
        await asyncio.sleep(RATE_INTERVAL_S)
        columns = f"{'entries':>9} {'lag':>9} {'pending':>9} {'oldest':>9} {'rate':>9}"
        typer.echo(f"{'topic':40} {'owner':32} {columns}")
        for keys, (before_s, before) in zip(topics, earlier, strict=True):
            now_s, status = await read(keys)
            if status is not None:
                rate = _rate(before, status, now_s - before_s)
                typer.echo(_status_line(keys.topic, status, rate))
            elif keys is topics[0] and len(topics) < 3:
                raise OperatorError(
                    f"there is no topic {keys.topic!r}, or no group {keys.group!r} that reads it; "
                    "topics of partitions need --partitioned"
                )

    run_on_store(redis_url, data_dir, show)


def _rate(before: TopicStatus | None, after: TopicStatus, seconds: float) -> str:
    """Entries a second that were acknowledged; `?` if the server does not know."""
    if before is None or before.read is None or after.read is None:
        return "?"
    count = after.read - after.pending - before.read + before.pending
    return f"{max(0, count) / seconds:.0f}/s"


def _status_line(name: str, status: TopicStatus, rate: str) -> str:
    lag, oldest = "?" if status.lag is None else str(status.lag), "-"
    if status.oldest_ms is not None:
        oldest = f"{max(0.0, time.time() - status.oldest_ms / 1000):.1f} s"
    columns = f"{status.entries:9} {lag:>9} {status.pending:9} {oldest:>9} {rate:>9}"
    return f"{name:40} {status.owner or '-':32} {columns}"
