"""`carry keys create|list|show|revoke|token`: manages the access keys in the store.

The commands access the store directly, with the settings of the service: whoever may write to the
store could create keys anyway, and an API that requires keys could not create the first one.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.commands.common import DataDir, RedisUrl, run_on_store
from service.core.errors import OperatorError

if TYPE_CHECKING:
    from service.access.caller import Verb
    from service.access.keys import AccessKey
    from service.store.base import Store

ALL = "all"
DAY_MS = 86_400_000

keys_app = typer.Typer(
    help="Create, list, show and revoke access keys, in the store itself.", no_args_is_help=True
)

KeyId = Annotated[str, typer.Argument(metavar="ID", help="The key's id, 12 hex digits.")]


@keys_app.command("create")
def create_key(
    name: Annotated[str, typer.Argument(help="What the key is for.")],
    allow: Annotated[
        list[str] | None,
        typer.Option(
            metavar="VERB",
            help="What it may do; may be repeated, `all` for everything. "
            "[default: predict and models]",
        ),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(help="Models that it may use, * for any characters; may be repeated."),
    ] = None,
    prefix: Annotated[str, typer.Option(help="Only streams whose names begin with this.")] = "",
    days: Annotated[
        float | None, typer.Option(min=0.001, help="Days until it expires; default: never.")
    ] = None,
    requests_per_s: Annotated[
        float | None, typer.Option(min=0.001, help="Most requests per second, of all workers.")
    ] = None,
    events_per_s: Annotated[
        float | None, typer.Option(min=0.001, help="Most events per second, of all workers.")
    ] = None,
    concurrent_requests: Annotated[
        int | None, typer.Option(min=1, help="Most concurrent requests of a worker process.")
    ] = None,
    streams: Annotated[
        int | None, typer.Option(min=1, help="Most streams that it may create.")
    ] = None,
    state_bytes: Annotated[
        int | None, typer.Option(min=1, help="Most bytes of their states in the store.")
    ] = None,
    redis_url: RedisUrl = None,
    data_dir: DataDir = None,
) -> None:
    """Create a key and print it, the only time that it is shown."""
    from service.access.caller import Verb
    from service.access.keys import AccessKey, encode_key, new_key
    from service.access.limits import KeyLimits

    now_ms = _now_ms()
    limits = KeyLimits(
        requests_per_s=requests_per_s,
        events_per_s=events_per_s,
        concurrent_requests=concurrent_requests,
        streams=streams,
        state_bytes=state_bytes,
    )
    record = AccessKey(
        name=name,
        verbs=_verbs(allow or (Verb.PREDICT, Verb.MODELS)),
        models=tuple(model or ("*",)),
        prefix=prefix,
        created_ms=now_ms,
        expires_ms=None if days is None else now_ms + round(days * DAY_MS),
        limits=None if limits == KeyLimits() else limits,
    )
    text, record = new_key(record)
    stored = {text.key_id: encode_key(record)}
    run_on_store(redis_url, data_dir, lambda store: store.keys.write(stored), create=True)
    typer.echo(f"key {text.key_id}: {_scope(record)}; it is not shown again:", err=True)
    typer.echo(str(text))


@keys_app.command("list")
def list_keys(redis_url: RedisUrl = None, data_dir: DataDir = None) -> None:
    """Print a line for each key, the oldest first."""
    keys = run_on_store(redis_url, data_dir, _read)
    for key_id, key in sorted(keys.items(), key=lambda item: item[1].created_ms):
        typer.echo(describe(key_id, key))


@keys_app.command("show")
def show_key(key_id: KeyId, redis_url: RedisUrl = None, data_dir: DataDir = None) -> None:
    """Print what a key allows as JSON."""
    import msgspec

    key = _find(run_on_store(redis_url, data_dir, _read), key_id)
    document: dict[str, Any] = {
        "id": key_id,
        "name": key.name,
        "status": key.status(_now_ms()),
        "verbs": sorted(key.verbs),
        "models": key.models,
        "prefix": key.prefix,
        "created": _time(key.created_ms),
        "expires": _time(key.expires_ms),
        "revoked": _time(key.revoked_ms),
        "limits": {} if key.limits is None else msgspec.to_builtins(key.limits),
    }
    typer.echo(json.dumps(document, indent=2))


@keys_app.command("revoke")
def revoke_key(key_id: KeyId, redis_url: RedisUrl = None, data_dir: DataDir = None) -> None:
    """Revoke a key permanently; running services reject it within a second."""
    import msgspec

    from service.access.keys import encode_key

    async def revoke(store: Store) -> AccessKey:
        key = _find(await _read(store), key_id)
        if key.revoked_ms is None:
            key = msgspec.structs.replace(key, revoked_ms=_now_ms())
            await store.keys.write({key_id: encode_key(key)})
        return key

    key = run_on_store(redis_url, data_dir, revoke)
    typer.echo(f"revoked {key_id}, {key.name}")


@keys_app.command("token")
def sign(
    allow: Annotated[
        list[str] | None,
        typer.Option(metavar="VERB", help="What it may do; default: what the key may."),
    ] = None,
    model: Annotated[
        list[str] | None, typer.Option(help="Models that it may use; default: those of the key.")
    ] = None,
    prefix: Annotated[
        str | None,
        typer.Option(help="Only streams whose names begin with this; default: that of the key."),
    ] = None,
    subject: Annotated[str | None, typer.Option(help="The tenant, for logs.")] = None,
    minutes: Annotated[float, typer.Option(min=0.001, help="Minutes until it expires.")] = 60.0,
) -> None:
    """Sign a token that allows a part of what the key in CARRY_API_KEY (or CARRY_API_KEY_FILE)
    allows, and print it."""
    from carry_client.wire import authorization
    from service.access.keys import parse_key
    from service.access.tokens import TokenClaims, sign_token

    try:
        bearer = authorization().get("authorization", "").removeprefix("Bearer ")
    except ValueError as error:
        raise OperatorError(str(error)) from error
    key = parse_key(bearer)
    if key is None:
        raise OperatorError("expected an access key in CARRY_API_KEY or CARRY_API_KEY_FILE")
    claims = TokenClaims(
        exp=round(time.time() + 60 * minutes),
        sub=subject,
        verbs=None if allow is None else _verbs(allow),
        models=None if model is None else tuple(model),
        prefix=prefix,
    )
    typer.echo(sign_token(key, claims))


def _verbs(names: Sequence[str]) -> tuple[Verb, ...]:
    from service.access.caller import Verb

    if list(names) == [ALL]:
        return tuple(Verb)
    try:
        return tuple(dict.fromkeys(map(Verb, names)))
    except ValueError as error:
        raise OperatorError(
            f"--allow: expected {', '.join(Verb)} or {ALL}, got {', '.join(names)}"
        ) from error


async def _read(store: Store) -> dict[str, AccessKey]:
    """The keys in the store; unreadable ones are reported on stderr and skipped."""
    from service.access.keys import AccessKeyError, decode_key

    _, records = await store.keys.read(None) or (b"", {})
    keys: dict[str, AccessKey] = {}
    for key_id, record in records.items():
        try:
            keys[key_id] = decode_key(record)
        except AccessKeyError as error:
            typer.echo(f"carry: the key {key_id} is not accepted: {error}", err=True)
    return keys


def _find(keys: dict[str, AccessKey], key_id: str) -> AccessKey:
    from service.access.keys import AccessKeyError, check_key_id

    if check_key_id(key_id) not in keys:
        raise AccessKeyError(f"there is no key {key_id}; `carry keys list` lists them")
    return keys[key_id]


def describe(key_id: str, key: AccessKey) -> str:
    """Describe a key in one line."""
    return f"{key_id}  {key.status(_now_ms()):8} {key.name}: {_scope(key)}"


def _scope(key: AccessKey) -> str:
    import msgspec

    streams = f"streams {key.prefix}*" if key.prefix else "all streams"
    until = "" if key.expires_ms is None else f", until {_time(key.expires_ms)}"
    limits = (
        ""
        if key.limits is None
        else ", at most "
        + ", ".join(f"{value} {name}" for name, value in msgspec.to_builtins(key.limits).items())
    )
    verbs, models = ", ".join(sorted(key.verbs)), ", ".join(key.models)
    return f"{verbs} on models {models}, {streams}{until}{limits}"


def _time(epoch_ms: int | None) -> str | None:
    if epoch_ms is None:
        return None
    return datetime.fromtimestamp(epoch_ms / 1000, UTC).isoformat(timespec="seconds")


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
