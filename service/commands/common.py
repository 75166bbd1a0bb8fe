"""What commands share: options, the store of the settings, and progress on a terminal."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from service.core.errors import OperatorError

if TYPE_CHECKING:
    from service.settings import Settings
    from service.store.base import Store

T = TypeVar("T")

RedisUrl = Annotated[
    str | None, typer.Option(help="Address of the state store; default: the embedded Valkey.")
]
DataDir = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Data directory of the embedded Valkey.")
]


@contextmanager
def open_settings(
    redis_url: str | None, data_dir: Path | None, *, create: bool = False
) -> Iterator[Settings]:
    """The settings of a command that accesses the store itself, with the store's address.

    Args:
        create: whether the data directory of the embedded Valkey may be new.
    """
    from service.settings import Settings
    from service.store.embedded import running_valkey
    from service.telemetry.logs import configure_logs

    settings = Settings.load({"redis_url": redis_url, "data_dir": data_dir})
    configure_logs("warning", "console")
    store = settings.store
    try:
        if store.redis_url is not None:
            yield settings
            return
        if not create and not store.data_dir.is_dir():
            raise OperatorError(f"there is no data directory {store.data_dir}")
        with running_valkey(store.data_dir, fsync=store.durability == "fsync") as url:
            yield settings.changed(redis_url=url)
    except OSError as error:
        raise OperatorError(str(error)) from error


def run_on_store(settings: Settings, action: Callable[[Store], Awaitable[T]]) -> T:
    """Act on the store of the settings, and close it."""
    from service.store.redis.redis_store import RedisStore

    async def run() -> T:
        store = RedisStore(settings.store)
        try:
            await store.start()
            return await action(store)
        finally:
            await store.close()

    return asyncio.run(run())


@contextmanager
def show_progress(
    description: str, total: int | None = None, *, quiet: bool = False
) -> Iterator[Callable[[int], None]]:
    """Show a bar on stderr if that is a terminal; yields what takes the number done so far."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    console = Console(stderr=True)
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(
        *columns, console=console, transient=True, disable=quiet or not console.is_terminal
    ) as bar:
        task = bar.add_task(description, total=total)
        yield lambda done: bar.update(task, completed=done)
