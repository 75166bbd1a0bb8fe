"""Every setting of the service: its unit, its default, and how to choose it.

A setting comes from a flag of `carry serve`, otherwise from the environment variable `CARRY_` and
its name, otherwise from its default. An unknown `CARRY_` variable is rejected, so that a misspelt
one is never ignored. Settings are immutable, and their representations never show a password.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    PrivateAttr,
    StringConstraints,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

import models
from models.spec.detection import parse_alarm_rates
from service.service_links import is_service_link, service_links
from service.store.redis.address import (
    add_password_of,
    add_sentinel_password,
    check_address,
    redact_url,
)

PREFIX = "CARRY_"
KIB = 1024
MIB = 1024 * KIB

CLIENT_VARIABLES = ("CARRY_API_KEY", "CARRY_API_KEY_FILE")
"""Read by clients of a service, such as `carry streams`; no settings of the service itself."""

AT_LEAST = {"max_pending_body_bytes": "max_body_bytes", "max_timeout_s": "timeout_s"}
"""Settings that must not be less than another one, which is declared before them."""

Origin = Literal["flag", "env", "default"]


class SettingsError(ValueError):
    """Settings that cannot be used; the message names each and says what was expected."""


@dataclass(frozen=True, slots=True)
class EffectiveSetting:
    """A setting as it is in force, with its secrets hidden."""

    name: str
    value: str
    origin: Origin


class Settings(BaseSettings):
    """The settings in force; make them with `Settings.load`."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_ignore_empty=True,
        extra="forbid",
        frozen=True,
        protected_namespaces=(),
        use_attribute_docstrings=True,
        validate_default=True,
    )

    host: Annotated[str, StringConstraints(min_length=1)] = "127.0.0.1"
    """Address to listen on. The default is reachable from this machine only. Any other one needs
    access keys (`carry keys create`), `require_keys`, or `insecure`."""

    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """TCP port to listen on; 0 selects a free one."""

    grpc_port: Annotated[int | None, Field(ge=0, le=65535)] = None
    """TCP port of the V2 protocol over gRPC; 0 selects a free one, without a value there is none.
    Needs the packages of the extra `grpc`."""

    grpc_max_calls: Annotated[int, Field(ge=1)] = 1_000
    """Maximum concurrent gRPC calls of one worker; further ones get `RESOURCE_EXHAUSTED`. Probes,
    and health and reflection streams without a key, are counted separately. More than all clients
    together have open; each stream may take four times `CARRY_GRPC_MAX_MESSAGE_BYTES`
    of memory while a message arrives."""

    grpc_max_message_bytes: Annotated[int, Field(ge=1024)] = 4 << 20
    """Maximum length of a gRPC request; a longer one gets `RESOURCE_EXHAUSTED`. The default is that
    of gRPC."""

    metrics: bool = True
    """Serve `/metrics`; off, the service has none."""

    docs: bool = True
    """Serve the documentation: `/docs`, `/docs/errors` and `/openapi.json`. It describes the API
    and the models, not the streams."""

    console: bool | None = None
    """Serve the console at `/console/`: a web page that watches models and streams by the public
    API, with the user's key. Without a value it is served where `/docs` is served beside the
    API: `docs` is on and there is no admin port."""

    admin_port: Annotated[int | None, Field(ge=0, le=65535)] = None
    """TCP port for `/metrics`, the documentation and the health checks; 0 selects a free one. The
    clients' port then has the health checks only. Let only the monitoring reach it: it requires no
    key."""

    admin_host: Annotated[str | None, StringConstraints(min_length=1)] = None
    """Address of the admin port, if not `host`; 127.0.0.1 is reachable from this machine only."""

    require_keys: bool | None = None
    """`true`: answer only requests with an access key, even before the first one is created. Not
    set: keys are required once the store has, or has ever had, a key, also if it was restored
    without its keys. `false`: keys are required only if the store has one now."""

    insecure: bool = False
    """Listen on an address that other machines reach although there is no access key: everybody who
    reaches the port may do everything. Only behind a gateway that checks access."""

    workers: Annotated[int, Field(ge=1, le=256)] = 1
    """Processes that share the port. Each keeps one to two cores busy and holds its own copy
    of every model; add workers while cores are idle."""

    worker_fill: Annotated[int, Field(ge=1, le=10_000)] = 32
    """Active connections (or waiting and running chunks, if there are more) up to which one worker
    gets all new connections; then the next one is filled, and once all are, the one with the least
    load gets them. Full batches of one worker take less CPU than small ones of each; 1 distributes
    connections evenly, for workers that each have a core of their own."""

    models_dir: Path = Path(models.__file__).parent / "pretrained"
    """Folder whose sub-folders are the artifacts to serve, one model each."""

    false_alarms_per_day: str = ""
    """Expected false alarms per stream and day of models with `detection`, instead of the rate in
    their specification: `MODEL=RATE`, several separated by commas. A request may set another rate
    for its chunk. All workers of a store need the same value."""

    runtime: Literal["auto", "onnxruntime", "tensorflow"] = "auto"
    """Library that runs the networks. `auto` chooses for each model: `onnxruntime`, which is faster
    and smaller, if it is installed and the model has a graph, otherwise `tensorflow`; the log line
    `runtime` of each model names it and the reason."""

    runtime_threads: Annotated[int, Field(ge=1, le=256)] = 1
    """Threads that one step of the network may use. Small recurrent networks gain nothing
    from more than one; use workers instead."""

    redis_url: Annotated[str | None, Field(repr=False)] = None
    """The store: redis://, rediss:// (TLS) or unix://; for a cluster redis+cluster:// or
    rediss+cluster://, with some of its nodes; behind Sentinels redis+sentinel:// or
    rediss+sentinel://. If it is not set, the service starts an embedded Valkey in `data_dir`."""

    redis_password_file: Path | None = None
    """File whose first line is the password of the store's user, such as a mounted secret;
    `redis_url` then contains no password. Read at the start of each worker."""

    redis_sentinel_password_file: Path | None = None
    """The same for the password of the Sentinels' user, if they have one."""

    data_dir: Path = Path(".carry")
    """Folder of the embedded Valkey; unused with `redis_url`. Put it on a persistent disk."""

    namespace: Annotated[
        str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]*$", max_length=32)
    ] = "carry"
    """Prefix of every key in the store; independent services on one store need different ones."""

    partitions: Annotated[int, Field(ge=1, le=16384)] = 1024
    """Partitions over which the streams are spread, written into the store at its first use; it
    cannot be changed later. Some tens per node of the largest expected cluster are enough."""

    allow_eviction: bool = False
    """Accept a store whose maxmemory-policy may evict states. Streams then silently start over:
    only for data that may be lost."""

    durability: Literal["memory", "fsync", "replicated"] = "memory"
    """When a chunk is acknowledged: the store's server has it (`memory`), its disk has it
    (`fsync`, needs `appendfsync always` on every server), or `CARRY_REPLICAS` replicas have it
    (`replicated`). docs/explanation/guarantees.md says what each survives."""

    replicas: Annotated[int, Field(ge=1, le=16)] = 1
    """Number of replicas of its server that must have a chunk with `durability=replicated`. Set it
    to the number of all replicas, so that each one that may be promoted has it."""

    store_wait_s: Annotated[float, Field(gt=0, le=300)] = 10.0
    """Longest wait for an unavailable store if no request deadline bounds it (the start, reading
    and deleting streams), in seconds. The service replaces a connection that is unresponsive for a
    third of it."""

    idle_ttl_s: Annotated[int, Field(ge=0)] = 0
    """Delete a stream this many seconds after its last commit; 0 never does. Longer than any pause
    of a live stream."""

    reply_ttl_s: Annotated[int, Field(ge=1)] = 600
    """How long the reply of a stream's last chunk is stored for retries, in seconds. Longer than
    clients retry."""

    tombstone_ttl_s: Annotated[int, Field(ge=1)] = 600
    """How long a deleted stream leaves a tombstone, in seconds, so that writes from before the
    deletion are not applied after it. Longer than a proxy or the network may delay bytes of an
    abandoned connection. A worker drops a stream's state from its cache after as long without a
    chunk."""

    reply_max_bytes: Annotated[int, Field(ge=0)] = 64 * KIB
    """A larger reply is not stored, and a retry of its chunk gets `already_applied`; 0 stores
    none. In bytes per stream, in the store's memory."""

    max_body_bytes: Annotated[int, Field(ge=KIB)] = 16 * MIB
    """Largest body of a request, in bytes."""

    http_fast_path: bool = True
    """Serve well-formed chunk requests on the fast path, which reads them from the socket's bytes.
    Off, uvicorn's parser and FastAPI serve every request, with the same responses at a lower rate:
    to exclude the fast path while debugging."""

    max_connections: Annotated[int, Field(ge=1)] = 10_000
    """Maximum concurrent connections of one worker; further ones are answered
    `too_many_connections` and closed. Lowered at start, with a warning, to what the limit on open
    files (`ulimit -n`) allows. More than all clients together keep open."""

    max_connections_per_address: Annotated[int, Field(ge=0)] = 0
    """Maximum concurrent connections of one worker from one address (of IPv6: one /64 network);
    further ones are answered `too_many_connections` and closed. 0: no limit. Set it where clients
    connect directly, to more than one of them keeps open; behind a proxy, whose address all
    connections have, use the proxy's own limit."""

    keep_alive_s: Annotated[float, Field(gt=0, le=3600)] = 5.0
    """How long an idle connection stays open, in seconds. Longer than the idle timeout of a proxy
    in front, so that the proxy never sends on a connection that is being closed."""

    head_timeout_s: Annotated[float, Field(gt=0, le=3600)] = 10.0
    """Longest time from the first byte of a request to the end of its head (request line and
    headers), in seconds; then `request_timeout`. Limits the connections of slow clients."""

    body_timeout_s: Annotated[float, Field(gt=0, le=3600)] = 30.0
    """Longest time from the head of a request to the end of its body, in seconds, plus a second for
    every 16 KiB received; then `request_timeout`. As long as the longest pause of a client's
    network."""

    send_timeout_s: Annotated[float, Field(gt=0, le=3600)] = 30.0
    """Longest time that a client may take to read the next 64 KiB of its replies, in seconds; then
    the connection is closed. Longer than a client pauses between reads."""

    pipelining_window: Annotated[int, Field(ge=1, le=4096)] = 64
    """Maximum unanswered chunks of one WebSocket, and of one gRPC stream. Beyond it no more are
    read, so that the client waits. Choose more than arrive during the round trip of a chunk; each
    takes memory for its message and its reply."""

    websocket_ping_s: Annotated[float, Field(ge=0, le=3600)] = 20.0
    """A WebSocket gets a ping after at most this long of silence, at least half of it, and is
    closed after as long without an answer, in seconds; 0 disables it. Shorter than the idle timeout
    of a proxy in front."""

    websocket_idle_s: Annotated[float, Field(ge=0)] = 0.0
    """A WebSocket without a chunk for this long is closed, in seconds; 0 never. It is checked with
    each ping. Longer than any pause of a live stream."""

    websocket_origins: str = ""
    """Origins whose pages may open a WebSocket, and change streams of a service without access
    keys, besides the service's own host: such as `https://app.example.com`, separated by commas;
    `*` allows all. Programs send no origin and are not restricted."""

    allowed_hosts: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._:\[\]*, -]*$")] = ""
    """Host names under which clients reach the service, separated by commas; `*` allows all. On a
    loopback address the service accepts these, `localhost`, names below it, 127.0.0.0/8 and
    `[::1]`: list the names that a proxy passes on as `Host`. On another address it accepts every
    name while none is listed, and otherwise also loopback names and IP addresses: list its names if
    there are no access keys."""

    max_pending_body_bytes: Annotated[int, Field(ge=MIB)] = 256 * MIB
    """Maximum bytes of request bodies that a worker buffers. Beyond it the oldest incomplete bodies
    are answered `overloaded`. Several times `CARRY_MAX_BODY_BYTES`, and well below the memory of
    the worker: a body takes up to three times its size."""

    max_pending_reply_bytes: Annotated[int, Field(ge=MIB)] = 256 * MIB
    """Maximum bytes of replies that a worker buffers for clients that do not read them. Beyond it
    the connections that have waited longest are closed. Well below the memory of the worker."""

    max_chunk_steps: Annotated[int, Field(ge=1)] = 10_000
    """Maximum events in one chunk. A long chunk is computed in slices between other streams, so
    this bounds memory and the wait for its reply."""

    max_items: Annotated[int, Field(ge=1)] = 1_000
    """Maximum items in one request for many streams."""

    max_predict_steps: Annotated[int, Field(ge=1)] = 100_000
    """Maximum events in one predict request, all its sequences together."""

    max_forecast_samples: Annotated[int, Field(ge=0)] = 1_000
    """Maximum sample paths of one forecast; 0 forbids them. Each is a row of the network's calls at
    every step of the horizon, between other streams' chunks."""

    max_batch_rows: Annotated[int, Field(ge=1, le=4096)] = 128
    """Maximum streams in one inference call, if its runtime supports as many. More raises the
    throughput until the core is busy, and the duration of each call."""

    max_batch_steps: Annotated[int, Field(ge=1)] = 4_096
    """Maximum steps in one inference call, rows times the longest, padding included. It bounds
    the duration of a call, and so the wait of a new chunk for the previous call."""

    timeout_s: Annotated[float, Field(gt=0, le=3600)] = 30.0
    """Deadline of a request without `Carry-Timeout`, in seconds. Work that has not started by then
    is not started. Not longer than the clients' own timeout, nor than `CARRY_MAX_TIMEOUT_S`."""

    max_timeout_s: Annotated[float, Field(gt=0, le=3600)] = 300.0
    """Longest deadline of any request, in seconds; it caps `Carry-Timeout`."""

    inference_timeout_s: Annotated[float, Field(gt=0, le=3600)] = 10.0
    """Longest inference call, in seconds. ONNX Runtime terminates a longer one between two
    operators, and its chunks fail with `inference_timeout`. The calls of other models wait
    meanwhile: choose little more than the largest call of the slowest model takes."""

    max_queue: Annotated[int, Field(ge=1)] = 4_096
    """Maximum chunks of one model that wait in a worker; beyond it the answer is `overloaded` at
    once. The chunks of one stream may take a quarter of the free places (`stream_overloaded`), the
    items of one request half of them, 256 at a time. It bounds the memory of waiting chunks."""

    max_queue_wait_s: Annotated[float, Field(gt=0, le=3600)] = 5.0
    """Longest expected wait of a chunk in the queue, by the rate at which the queue drains, in
    seconds; beyond it, or beyond its own deadline, the answer is `overloaded` at once. The longest
    wait that is still useful to a client."""

    batches_in_flight: Annotated[int, Field(ge=1, le=16)] = 2
    """Concurrent batches between load and commit, so that the store's time is hidden behind the
    network's. More batches are smaller, which costs more per chunk; try three if the store has a
    high latency."""

    conflict_attempts: Annotated[int, Field(ge=1, le=100)] = 32
    """How often a chunk is evaluated again after a version conflict, before `conflict`. Each time
    another chunk of the stream was applied, so about as many attempts are enough as chunks of one
    stream are in flight."""

    on_model_change: Literal["refuse", "reset"] = "refuse"
    """What to do with a stream whose state another version of its model wrote: reject it with
    `state_incompatible`, or reset it to position 0 (`reset`). Not `reset` while two versions are
    served at once: they would reset each other's streams."""

    sequence_end: Literal["keep", "delete"] = "keep"
    """What `sequence_end` of the V2 protocol (KServe, Triton) does to the stream: `keep` keeps its
    state, `delete` deletes it after the chunk."""

    state_cache_bytes: Annotated[int, Field(ge=0)] = 64 * MIB
    """Size of each worker's cache of recent states, which saves their load; 0 disables it. About
    the number of live streams times the size of a state."""

    drain_s: Annotated[float, Field(ge=0, le=3600)] = 30.0
    """Longest graceful shutdown: how long the service answers accepted requests, in seconds.
    Shorter than the time after which a supervisor kills it."""

    lame_duck_s: Annotated[float, Field(ge=0, le=3600)] = 0.0
    """How long the service accepts requests after SIGTERM while `/health/ready` fails, before it
    drains, in seconds; 0 drains at once. Choose longer than a load balancer takes to notice the
    failing check."""

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Lowest level that is logged; `info` has one line for each request, `warning` only those of
    requests that failed."""

    log_format: Literal["json", "console"] = "json"
    """`json`: one JSON object a line; `console`: lines for people."""

    log_success_ratio: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Share of the successful requests that have a line in the log; those that failed always have
    one. Lower it where a line for each request costs too much: the metrics count every request."""

    log_streams: Literal["none", "hashed", "clear"] = "none"
    """How lines and traces of requests name the stream: not at all, by a keyed hash, which is the
    same in every worker of a store, or by its name, which may be personal data."""

    tracing: bool = False
    """Send traces by OTLP, as the standard variables `OTEL_...` say. Needs the packages of the
    extra `otel`."""

    _flags: frozenset[str] = PrivateAttr(default=frozenset())

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Constructor arguments, then the environment without Kubernetes service links."""
        if isinstance(env_settings, EnvSettingsSource):
            env_settings.env_vars = {
                name: value
                for name, value in env_settings.env_vars.items()
                if not is_service_link(name.upper(), value or "")
            }
        return init_settings, env_settings

    @classmethod
    def load(cls, flags: Mapping[str, Any] | None = None) -> Self:
        """The settings from flags, the environment and the defaults, in this order.

        Args:
            flags: values by setting name; None counts as not set.

        Raises:
            SettingsError: a `CARRY_` variable is unknown, or a value is invalid.
        """
        reject_unknown(os.environ)
        flag_values = {name: value for name, value in (flags or {}).items() if value is not None}
        try:
            settings = cls(**flag_values)
        except ValidationError as error:
            raise SettingsError(_explain(error, flag_values)) from None
        settings._flags = frozenset(flag_values)
        return settings

    @field_validator("redis_url")
    @classmethod
    def _check_redis_url(cls, url: str | None) -> str | None:
        if url is not None:
            check_address(url)
        return url

    @field_validator("redis_password_file")
    @classmethod
    def _check_redis_password_file(cls, file: Path | None, info: ValidationInfo) -> Path | None:
        if file is not None and "redis_url" in info.data:
            add_password_of(file, info.data["redis_url"])
        return file

    @field_validator("redis_sentinel_password_file")
    @classmethod
    def _check_sentinel_password_file(cls, file: Path | None, info: ValidationInfo) -> Path | None:
        if file is not None and "redis_url" in info.data:
            add_password_of(file, info.data["redis_url"], add_sentinel_password)
        return file

    @field_validator("false_alarms_per_day")
    @classmethod
    def _check_alarm_rates(cls, value: str) -> str:
        parse_alarm_rates(value)
        return value

    @field_validator(*AT_LEAST)
    @classmethod
    def _check_order(cls, value: float, info: ValidationInfo) -> float:
        other = AT_LEAST[info.field_name or ""]
        least = info.data.get(other, value)
        if value < least:
            raise ValueError(f"expected at least {PREFIX}{other.upper()}, which is {least}")
        return value

    def alarm_rates(self) -> dict[str, float]:
        """By model, the expected number of false alarms of one stream in a day."""
        return parse_alarm_rates(self.false_alarms_per_day)

    def store_url(self) -> str | None:
        """The store's address with the passwords of the files; None: embedded."""
        url = self.redis_url
        if self.redis_password_file is not None:
            url = add_password_of(self.redis_password_file, url)
        if self.redis_sentinel_password_file is not None:
            url = add_password_of(self.redis_sentinel_password_file, url, add_sentinel_password)
        return url

    def effective(self) -> list[EffectiveSetting]:
        """Every setting in force and where it comes from, secrets hidden; for the start."""
        return [
            EffectiveSetting(name, _shown(name, getattr(self, name)), self._origin(name))
            for name in type(self).model_fields
        ]

    def _origin(self, name: str) -> Origin:
        if name in self._flags:
            return "flag"
        return "env" if name in self.model_fields_set else "default"


def reject_unknown(environ: Mapping[str, str]) -> None:
    """Reject unknown `CARRY_` variables, with a suggestion for each.

    Raises:
        SettingsError: naming them all.
    """
    known = [PREFIX + name.upper() for name in Settings.model_fields]
    others = {*service_links(environ), *CLIENT_VARIABLES}
    unknown = sorted(
        name
        for name in environ
        if name.upper().startswith(PREFIX) and name.upper() not in known and name not in others
    )
    if not unknown:
        return
    hints = []
    for name in unknown:
        nearest = difflib.get_close_matches(name.upper(), known, n=1, cutoff=0.0)
        hints.append(f"{name} is not a setting; did you mean {nearest[0]}?")
    raise SettingsError(" ".join(hints))


def _shown(name: str, value: object) -> str:
    if value is None:
        return "not set"
    return redact_url(str(value)) if name == "redis_url" else str(value)


def _explain(error: ValidationError, flags: Mapping[str, Any]) -> str:
    """One sentence for each value that does not fit; no value of a secret."""
    sentences = []
    for problem in error.errors(include_url=False):
        name = str(problem["loc"][0]) if problem["loc"] else ""
        shown = f"--{name.replace('_', '-')}" if name in flags else PREFIX + name.upper()
        message = problem["msg"].removeprefix("Value error, ")
        # the password of a malformed address cannot be found, so none of it is shown
        got = "" if name == "redis_url" else f", got {str(problem['input'])!r}"
        sentences.append(f"{shown}: {message[0].lower()}{message[1:]}{got}.")
    return " ".join(sentences)
