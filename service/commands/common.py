"""What commands share: options, a client of a service, the store of the settings, progress."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from service.core.errors import OperatorError

if TYPE_CHECKING:
    from carry_client import Carry
    from service.store.base import Store

T = TypeVar("T")

RedisUrl = Annotated[
    str | None, typer.Option(help="Address of the state store; default: the embedded Valkey.")
]
Url = Annotated[str, typer.Option("--url", help="Address of the service.")]
DEFAULT_URL = "http://127.0.0.1:8000"
DataDir = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Data directory of the embedded Valkey.")
]


def run_on_store(
    redis_url: str | None,
    data_dir: Path | None,
    action: Callable[[Store], Awaitable[T]],
    *,
    create: bool = False,
) -> T:
    """Act on the store of the settings, which a running service may use too, and close it.

    Args:
        create: whether the data directory of the embedded Valkey may be new.
    """
    from service.settings import Settings
    from service.store.embedded import running_valkey
    from service.store.redis.redis_store import RedisStore
    from service.telemetry.logs import configure_logs

    settings = Settings.load({"redis_url": redis_url, "data_dir": data_dir})
    configure_logs("warning", "console")

    async def run() -> T:
        store = RedisStore(settings.store)
        try:
            await store.start()
            return await action(store)
        finally:
            await store.close()

    with ExitStack() as stack:
        store = settings.store
        if store.redis_url is None:
            if not create and not store.data_dir.is_dir():
                raise OperatorError(f"there is no data directory {store.data_dir}")
            valkey = running_valkey(store.data_dir, fsync=store.durability == "fsync")
            settings = settings.changed(redis_url=stack.enter_context(valkey))
        return asyncio.run(run())


@contextmanager
def open_service(url: str) -> Iterator[Carry]:
    """Open a client; its errors become `OperatorError`, one readable line.

    A service that does not answer at once is reported on stderr, as calls retry for minutes.
    """
    # Imported here: it would take a third of the start-up time of every other command.
    from carry_client import Carry, Problem

    try:
        client = Carry(url, encoding="json")
    except (Problem, ValueError) as error:  # of the address, or of the key in the environment
        raise OperatorError(str(error)) from error
    try:
        with client:
            try:
                client.request("GET", "/health/live")
            except Problem as problem:
                if problem.code == "no_answer":
                    print(f"carry: {problem.detail}; trying again", file=sys.stderr)
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
        raise OperatorError(line) from problem


@contextmanager
def show_progress(
    description: str, total: int | None = None, *, quiet: bool = False
) -> Iterator[Callable[..., None]]:
    """Show a bar on stderr if that is a terminal; yields the function that updates it, by what is
    done and, if it is known only then, the total."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    console = Console(stderr=True)
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(
        *columns, console=console, transient=True, disable=quiet or not console.is_terminal
    ) as bar:
        task = bar.add_task(description, total=total)
        yield lambda done, total=None: bar.update(task, completed=done, total=total)
