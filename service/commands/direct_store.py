"""Options and settings of commands that access the store directly, without a service."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from service.settings import Settings

RedisUrl = Annotated[
    str | None, typer.Option(help="Address of the state store; default: the embedded Valkey.")
]
DataDir = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Data directory of the embedded Valkey.")
]


@contextmanager
def open_settings(
    redis_url: str | None,
    data_dir: Path | None,
    *expected: type[Exception],
    create: bool = False,
) -> Iterator[Settings]:
    """The settings, with the store's address; an expected error prints one line and exits.

    Args:
        expected: further errors that are expected.
        create: whether the data directory of the embedded Valkey may be new.
    """
    from service.core.errors import CarryError
    from service.settings import Settings, SettingsError
    from service.store.embedded import running_valkey
    from service.telemetry.logs import configure_logs

    errors: tuple[type[Exception], ...] = (SettingsError, CarryError, OSError, *expected)
    try:
        settings = Settings.load({"redis_url": redis_url, "data_dir": data_dir})
        configure_logs("warning", "console")
        if settings.store.redis_url is not None:
            yield settings
            return
        if not create and not settings.store.data_dir.is_dir():
            raise SettingsError(f"there is no data directory {settings.store.data_dir}")
        with running_valkey(
            settings.store.data_dir, fsync=settings.store.durability == "fsync"
        ) as url:
            yield settings.changed(redis_url=url)
    except errors as error:
        reason = error.detail if isinstance(error, CarryError) else str(error)
        typer.echo(f"carry: {reason}", err=True)
        raise typer.Exit(1) from error
