"""Settings of the server: its ports, connections, sockets and processes."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, StringConstraints

from service.core.settings import MIB, settings_group


@settings_group
class HttpSettings:
    """Where the HTTP server listens, and what it serves beside the API."""

    host: Annotated[str, StringConstraints(min_length=1)] = "127.0.0.1"
    """Address to listen on. The default is reachable from this machine only. Any other one needs
    access keys (`carry keys create`), `require_keys`, or `insecure`."""

    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """TCP port to listen on; 0 selects a free one."""

    allowed_hosts: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._:\[\]*, -]*$")] = ""
    """Host names under which clients reach the service, separated by commas; `*` allows all. On a
    loopback address the service accepts these, `localhost`, names below it, 127.0.0.0/8 and
    `[::1]`: list the names that a proxy passes on as `Host`. On another address it accepts every
    name while none is listed, and otherwise also loopback names and IP addresses: list its names if
    there are no access keys."""

    http_fast_path: bool = True
    """Serve well-formed chunk requests on the fast path, which reads them from the socket's bytes.
    Off, uvicorn's parser and FastAPI serve every request, with the same responses at a lower rate:
    to exclude the fast path while debugging."""

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


@settings_group
class ConnectionSettings:
    """Limits of the connections of a worker."""

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

    websocket_ping_s: Annotated[float, Field(ge=0, le=3600)] = 20.0
    """A WebSocket gets a ping after at most this long of silence, at least half of it, and is
    closed after as long without an answer, in seconds; 0 disables it. Shorter than the idle timeout
    of a proxy in front."""

    max_pending_body_bytes: Annotated[int, Field(ge=MIB)] = 256 * MIB
    """Maximum bytes of request bodies that a worker buffers. Beyond it the oldest incomplete bodies
    are answered `overloaded`. Several times `CARRY_MAX_BODY_BYTES`, and well below the memory of
    the worker: a body takes up to three times its size."""

    max_pending_reply_bytes: Annotated[int, Field(ge=MIB)] = 256 * MIB
    """Maximum bytes of replies that a worker buffers for clients that do not read them. Beyond it
    the connections that have waited longest are closed. Well below the memory of the worker."""


@settings_group
class WebSocketSettings:
    """Limits of a WebSocket, and who may open one."""

    pipelining_window: Annotated[int, Field(ge=1, le=4096)] = 64
    """Maximum unanswered chunks of one WebSocket, and of one gRPC stream. Beyond it no more are
    read, so that the client waits. Choose more than arrive during the round trip of a chunk; each
    takes memory for its message and its reply."""

    websocket_idle_s: Annotated[float, Field(ge=0)] = 0.0
    """A WebSocket without a chunk for this long is closed, in seconds; 0 never. It is checked with
    each ping. Longer than any pause of a live stream."""

    websocket_origins: str = ""
    """Origins whose pages may open a WebSocket, and change streams of a service without access
    keys, besides the service's own host: such as `https://app.example.com`, separated by commas;
    `*` allows all. Programs send no origin and are not restricted."""


@settings_group
class WorkerSettings:
    """Worker processes, and how they stop."""

    workers: Annotated[int, Field(ge=1, le=256)] = 1
    """Processes that share the port. Each keeps one to two cores busy and holds its own copy
    of every model; add workers while cores are idle."""

    worker_fill: Annotated[int, Field(ge=1, le=10_000)] = 32
    """Active connections (or waiting and running chunks, if there are more) up to which one worker
    gets all new connections; then the next one is filled, and once all are, the one with the least
    load gets them. Full batches of one worker take less CPU than small ones of each; 1 distributes
    connections evenly, for workers that each have a core of their own."""

    drain_s: Annotated[float, Field(ge=0, le=3600)] = 30.0
    """Longest graceful shutdown: how long the service answers accepted requests, in seconds.
    Shorter than the time after which a supervisor kills it."""

    lame_duck_s: Annotated[float, Field(ge=0, le=3600)] = 0.0
    """How long the service accepts requests after SIGTERM while `/health/ready` fails, before it
    drains, in seconds; 0 drains at once. Choose longer than a load balancer takes to notice the
    failing check."""
