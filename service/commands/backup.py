"""`carry backup` and `carry restore`: copy the streams of a store into a file, and back.

They connect to the store itself, as the service does, with its settings: `CARRY_REDIS_URL`, or the
embedded Valkey of `CARRY_DATA_DIR`, whether a service runs on it or not.
"""

from __future__ import annotations

import os
import secrets
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO

import typer

from service.commands.common import (
    DataDir,
    RedisUrl,
    run_on_store,
    show_progress,
)
from service.commands.keys import describe
from service.core.errors import OperatorError

if TYPE_CHECKING:
    from service.store.backup import BackupProgress
    from service.store.base import Store
    from service.store.capabilities import StoredKeys

SHOWN_STREAMS = 10

File = Annotated[str, typer.Argument(metavar="FILE", help="The backup; - for stdout or stdin.")]
Model = Annotated[str | None, typer.Option(help="Only the streams of this model.")]
Prefix = Annotated[str, typer.Option(help="Only streams whose names begin with this.")]


def backup(
    file: File,
    model: Model = None,
    prefix: Prefix = "",
    keys: Annotated[
        bool,
        typer.Option(
            "--keys",
            help="Include the access keys, as hashes. These sign tokens: the file has mode 0600.",
        ),
    ] = False,
    redis_url: RedisUrl = None,
    data_dir: DataDir = None,
) -> None:
    """Write every stream's state into a file, whether the service runs or not."""
    from service.settings import Settings
    from service.store.backup import BackupInfo, write_backup

    key_hint = ""
    namespace = Settings.load().store.namespace

    async def write(store: Store) -> BackupProgress:
        nonlocal key_hint
        version, records = await store.keys.read(None) or (b"", {})
        stored = (records if keys else {}) if version else None
        if records:
            count = f"{len(records):,} access key{'' if len(records) == 1 else 's'}"
            key_hint = f" and {count}" if keys else f", without the {count} (--keys)"
        _, models = await store.models.read(None) or (b"", {})
        models = _select(models, model)
        info = BackupInfo(round(time.time() * 1000), namespace, model, prefix, stored, models)
        return await write_backup(store, target, info, lambda done: show(done.streams))

    with open_output(file, is_secret=keys) as target, show_progress("backing up") as show:
        progress = run_on_store(redis_url, data_dir, write)
    # another namespace would look like an empty store, and its backup like a good one
    what = "none of these is" if model is not None or prefix else "none is"
    none = f"{what} in the namespace {namespace!r} (CARRY_NAMESPACE)"
    hint = "" if progress.streams or progress.damaged else f": {none}"
    typer.echo(f"backed up {_count(progress.streams)}{key_hint}{hint}", err=True)
    if progress.damaged:
        names = [f"{key.model}/{key.stream}" for key in progress.damaged[:SHOWN_STREAMS]]
        more = len(progress.damaged) - len(names)
        raise OperatorError(
            f"{len(progress.damaged):,} damaged streams are not in the backup: "
            f"{', '.join(names)}{f' and {more:,} more' if more else ''}"
        )


def restore(
    file: File,
    model: Model = None,
    prefix: Prefix = "",
    replace: Annotated[
        bool,
        typer.Option(
            "--replace",
            help="Also roll back streams that have later positions; with --keys overwrite keys.",
        ),
    ] = False,
    keys: Annotated[
        bool, typer.Option("--keys", help="Also restore the access keys of `carry backup --keys`.")
    ] = False,
    redis_url: RedisUrl = None,
    data_dir: DataDir = None,
) -> None:
    """Write the streams of a backup into a store, which may have other partitions and servers.

    A stream that the store has at a later position, or in another epoch, is kept, so that the
    command can be repeated. If the store of the backup has had access keys, this one requires them.
    Which versions of a model answer is restored if the store has no versions of it.
    """
    from service.store.backup import BackupError, BackupReader, restore_backup, restore_versions

    lines: list[str] = []

    async def write(store: Store) -> BackupProgress:
        # before the streams, so that no service answers for them without a key
        lines.extend(await _restore_keys(store.keys, reader.info.keys, keys, replace))
        versions = await restore_versions(store, _select(reader.info.models, model))
        for name, is_written in versions.items():
            what = "restored the versions" if is_written else "kept the versions in the store"
            lines.append(f"{what} of model {name}")
        return await restore_backup(
            *(store, reader),
            model=model,
            prefix=prefix,
            replace=replace,
            report=lambda done: show(done.streams + done.kept),
        )

    with nullcontext(sys.stdin.buffer) if file == "-" else Path(file).open("rb") as source:
        if source.seekable():
            for _ in BackupReader(source):
                pass  # the whole file is valid before anything is written
            source.seek(0)
        reader = BackupReader(source)
        if keys and not reader.info.keys:
            raise BackupError("the backup has no access keys; `carry backup --keys` includes them")
        with show_progress("restoring") as show:
            progress = run_on_store(redis_url, data_dir, write, create=True)
    kept = f", kept {progress.kept:,} that the store has already" if progress.kept else ""
    typer.echo(f"restored {_count(progress.streams)}{kept}", err=True)
    for line in lines:
        typer.echo(line, err=True)


async def _restore_keys(
    stored_keys: StoredKeys, keys: Mapping[str, bytes] | None, wanted: bool, replace: bool
) -> list[str]:
    """Write the access keys of a backup, or else mark the store as one that has had keys; returns
    the lines to print.

    Raises:
        AccessKeyError: a key is invalid; none was written.
    """
    from service.access.keys import check_key_id, decode_key

    if keys is None:
        return []
    version, stored = await stored_keys.read(None) or (b"", {})
    if not wanted:
        if not version:
            await stored_keys.write({})
        if stored:
            return []
        hint = ", or restore those of the backup with --keys" if keys else ""
        return [f"requests need an access key, as before: `carry keys create NAME`{hint}"]
    known = {check_key_id(key_id): decode_key(record) for key_id, record in keys.items()}
    differing = [key_id for key_id in keys if stored.get(key_id) != keys[key_id]]
    kept = [] if replace else [key_id for key_id in differing if key_id in stored]
    written = {key_id: keys[key_id] for key_id in differing if key_id not in kept}
    if written:
        await stored_keys.write(written)
    return [
        *(f"restored key {describe(key_id, known[key_id])}" for key_id in written),
        *(f"kept key {key_id} as the store has it; --replace overwrites it" for key_id in kept),
    ]


def _select(models: Mapping[str, bytes], model: str | None) -> Mapping[str, bytes]:
    """The records of one model, or of all."""
    return {name: record for name, record in models.items() if model in (None, name)}


def _count(streams: int) -> str:
    return f"{streams:,} stream{'' if streams == 1 else 's'}"


@contextmanager
def open_output(file: str, *, is_secret: bool = False) -> Iterator[BinaryIO]:
    """Open a file for writing, which replaces an earlier one only when it is complete.

    A secret one may be read by its owner only. Its temporary name is random, since another backup
    into the same file may be running.
    """
    if file == "-":
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    target = Path(file)
    if not target.parent.is_dir():
        raise OperatorError(f"{target.parent}: expected an existing folder for the backup")
    temporary = target.with_name(f"{target.name}.{secrets.token_hex(4)}.incomplete")
    try:
        mode = 0o600 if is_secret else 0o666
        with open(temporary, "xb", opener=partial(os.open, mode=mode)) as output:
            yield output
            output.flush()
            os.fsync(output.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
