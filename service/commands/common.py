"""What commands share: options, errors as one line, and the store of the settings."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

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
def one_line_errors(*expected: type[Exception]) -> Iterator[None]:
    """Turn expected errors, and those of the service, into one line and exit status 1."""
    from service.core.errors import CarryError

    errors: tuple[type[Exception], ...] = (CarryError, *expected)
    try:
        yield
    except errors as error:
        reason = error.detail if isinstance(error, CarryError) else str(error)
        typer.echo(f"carry: {reason}", err=True)
        raise typer.Exit(1) from error


@contextmanager
def open_settings(
    redis_url: str | None,
    data_dir: Path | None,
    *expected: type[Exception],
    create: bool = False,
) -> Iterator[Settings]:
    """The settings of a command that accesses the store itself, with the store's address.

    Args:
        expected: further errors that are expected.
        create: whether the data directory of the embedded Valkey may be new.
    """
    from service.settings import Settings, SettingsError
    from service.store.embedded import running_valkey
    from service.telemetry.logs import configure_logs

    with one_line_errors(SettingsError, OSError, *expected):
        settings = Settings.load({"redis_url": redis_url, "data_dir": data_dir})
        configure_logs("warning", "console")
        store = settings.store
        if store.redis_url is not None:
            yield settings
            return
        if not create and not store.data_dir.is_dir():
            raise SettingsError(f"there is no data directory {store.data_dir}")
        with running_valkey(store.data_dir, fsync=store.durability == "fsync") as url:
            yield settings.changed(redis_url=url)


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
