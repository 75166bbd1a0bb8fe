"""A stand-in for the service: the protocol in a page, a float64 network, faults on demand.

It knows nothing of the service's code. What it computes comes from the oracle, one event at a
time, so that a replay against it can be verified against Keras.
"""

from __future__ import annotations

import hashlib
import secrets
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import orjson
import ormsgpack
from aiohttp import web

from models.events.encode import Clock, encode
from models.events.parse import event_json_schema
from models.spec.layout import output_spec, state_spec
from models.spec.model import ModelSpec, parse_spec
from tests.support.oracle import oracle_step
from tests.support.strict_events import columns_from_events

SPEC = parse_spec(
    {
        "name": "small",
        "events": {
            "fields": [
                {"kind": "timestamp", "name": "at", "gap_mean": 3.0, "gap_std": 1.5},
                {"kind": "numeric", "name": "delay", "mean": 4.0, "std": 20.0},
                {"kind": "categorical", "name": "kind", "vocabulary": ["a", "b"], "embedding": 2},
                {"kind": "numeric", "name": "wind", "optional": True, "mean": 1.0, "std": 2.0},
            ]
        },
        "layers": [{"kind": "lstm", "units": 4}, {"kind": "gru", "units": 3}],
        "heads": [
            {"kind": "classification", "name": "late", "target": "delay", "above": 5},
            {"kind": "forecast", "name": "next", "targets": ["delay"]},
        ],
    }
)
VERSION = "0123456789ab"
IF_MATCH = "If-Match"
LIMITS = ("max_body_bytes", "max_chunk_steps", "max_predict_steps")


@dataclass(frozen=True)
class Stream:
    epoch: str
    tag: str = "0" * 32
    position: int = 0
    state: Any = None
    clock: Clock = Clock()  # noqa: RUF009
    start: int = -1
    digest: bytes = b""
    reply: dict[str, Any] | None = None

    @property
    def head(self) -> dict[str, Any]:
        return {"position": self.position, "epoch": self.epoch, "tag": self.tag}


Fault = Callable[[web.Request], str | None]
"""Given a chunk's request: None, or what is to go wrong with it."""


@dataclass
class Standin:
    """The service's state, and what goes wrong.

    Attributes:
        fault: asked for every request with chunks; see `_answer` for what it may say.
        seen: stream, position and number of events of every chunk, as they came.
        port_of: the port that each request with chunks came to.
        hosts: the host and port that each of them named.
        connections: by which each of them came.
        wrong_by: added to an output of every stream's event 7.
        deaf: how many questions for a position go unanswered.
    """

    weights: dict[str, Any]
    spec: ModelSpec = SPEC
    fault: Fault = lambda request: None
    streams: dict[str, Stream] = field(default_factory=dict)
    history: dict[str, list[Stream]] = field(default_factory=dict)
    seen: list[tuple[str, int, int]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    port_of: list[int] = field(default_factory=list)
    hosts: list[str] = field(default_factory=list)
    connections: list[Any] = field(default_factory=list)
    wrong_by: float = 0.0
    deaf: int = 0
    version: str = VERSION
    chunking: str = "invisible"
    hides_models: bool = False

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/v1/models/{model}", self._model)
        app.router.add_get("/v1/models/{model}/streams/{stream}", self._stream)
        app.router.add_post("/v1/models/{model}/streams/{stream}/chunks", self._one)
        app.router.add_post("/v1/models/{model}/chunks", self._many)
        return app

    def roll_back(self, name: str, commits: int) -> None:
        """The store lost the stream's last commits."""
        for _ in range(commits):
            self.history[name].pop()
        if self.history[name]:
            self.streams[name] = self.history[name][-1]
        else:
            del self.streams[name]

    async def _model(self, request: web.Request) -> web.Response:
        if request.match_info["model"] != self.spec.name:
            return _respond(request, 404, _problem(404, "model_not_found", False))
        outputs = {
            o.name: {"shape": list(o.shape), "per": o.per, "labels": list(o.labels)}
            for o in output_spec(self.spec).outputs
        }
        if self.hides_models:
            return _respond(request, 403, _problem(403, "forbidden", False))
        assert self.spec.events is not None
        document = {
            "name": self.spec.name,
            "version": self.version,
            "runtimes": ["oracle"],
            "columns": [],
            "limits": dict.fromkeys(LIMITS, 1_000_000),
            "events": event_json_schema(self.spec.events),
            "outputs": outputs,
            "chunking": self.chunking,
        }
        return _respond(request, 200, document)

    async def _stream(self, request: web.Request) -> web.Response:
        if self.deaf:
            self.deaf -= 1
            return _respond(request, 503, _problem(503, "store_unavailable", True))
        found = self.streams.get(request.match_info["stream"])
        if found is None:
            return _respond(request, 404, _problem(404, "stream_not_found", False))
        return _respond(request, 200, found.head)

    async def _one(self, request: web.Request) -> web.Response:
        body = _read(request, await request.read())
        name = request.match_info["stream"]
        match = {"if_match": request.headers[IF_MATCH]} if IF_MATCH in request.headers else {}
        return await self._answer(request, [{"stream": name, **match, **body}], alone=True)

    async def _many(self, request: web.Request) -> web.Response:
        body = _read(request, await request.read())
        return await self._answer(request, body["chunks"], alone=False)

    async def _answer(
        self, request: web.Request, items: list[dict[str, Any]], alone: bool
    ) -> web.Response:
        fault = self.fault(request)
        self.port_of.append(request.url.port or 0)
        self.hosts.append(request.host)
        self.connections.append(request.transport)
        if fault == "drop":
            assert request.transport is not None
            request.transport.close()
            return web.Response()
        if fault == "store_unavailable":
            return _respond(request, 503, _problem(503, "store_unavailable", True))
        if fault == "conflict":
            return _respond(request, 409, _problem(409, "conflict", True))
        if fault == "refuse":
            return _respond(request, 422, _problem(422, "invalid_input", False))
        answers = [self._apply(item) for item in items]
        if fault == "drop_after":
            assert request.transport is not None
            request.transport.close()
            return web.Response()
        if fault == "outcome_unknown":
            return _respond(request, 503, _problem(503, "outcome_unknown", True))
        if fault == "outcome_unknown_for_good":
            return _respond(request, 503, _problem(503, "outcome_unknown", False))
        if fault == "one_fails" and not alone:
            answers[0] = 503, _problem(503, "overloaded", True)
        if alone:
            return _respond(request, *answers[0])
        results = [
            {"status": status, "reply" if status == 200 else "error": document}
            for status, document in answers
        ]
        return _respond(request, 200, {"results": results})

    def _apply(self, item: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        name, start, events = item["stream"], item["position"], item["events"]
        self.seen.append((name, start, len(events)))
        found = self.streams.get(name)
        digest = hashlib.sha256(orjson.dumps(events)).digest()
        if found is not None and (start, digest) == (found.start, found.digest):
            if found.reply is None:
                return 409, self._standing("already_applied", name)
            self.counts["replays"] += 1
            return 200, {**found.reply, "replayed": True}
        etag = None if found is None else f'"{found.epoch}-{found.tag}"'
        if "if_match" in item and item["if_match"] != etag:
            return 412, self._standing("state_changed", name)
        position = 0 if found is None else found.position
        if start != position:
            code = "position_ahead" if start > position else "position_behind"
            return 409, self._standing(code, name)
        return 200, self._process(found, name, start, events, digest)

    def _process(
        self, found: Stream | None, name: str, start: int, events: list[Any], digest: bytes
    ) -> dict[str, Any]:
        assert self.spec.events is not None
        zero = np.zeros(state_spec(self.spec).float_size)
        before = found or Stream(secrets.token_hex(8), state=zero)
        columns = columns_from_events(self.spec.events, events)
        rows, clock = encode(self.spec.events, columns, before.clock)
        outputs, state = oracle_step(self.spec, self.weights, rows, before.state)
        if start <= 7 < start + len(events):
            outputs[7 - start, 1] += self.wrong_by
        tag = hashlib.sha256(before.tag.encode() + digest).hexdigest()[:32]
        position = start + len(events)
        named = output_spec(self.spec).by_name(outputs.astype(np.float32))
        reply = {
            "model": self.spec.name,
            "version": self.version,
            "stream": name,
            "epoch": before.epoch,
            "position": position,
            "tag": tag,
            "outputs": {key: value.tolist() for key, value in named.items()},
            "replayed": False,
        }
        now = Stream(before.epoch, tag, position, state, clock, start, digest, reply)
        self.streams[name] = now
        self.history.setdefault(name, []).append(now)
        self.counts["chunks"] += 1
        return reply

    def forget_reply(self, name: str) -> None:
        self.streams[name] = replace(self.streams[name], reply=None)

    def _standing(self, code: str, name: str) -> dict[str, Any]:
        found = self.streams.get(name)
        problem = _problem(409, code, False)
        head = {"position": 0, "epoch": None, "tag": None} if found is None else found.head
        return {**problem, "stream": name, **head}


def _problem(status: int, code: str, retryable: bool) -> dict[str, Any]:
    return {"status": status, "code": code, "detail": f"it is {code}", "retryable": retryable}


def _read(request: web.Request, body: bytes) -> Any:
    return ormsgpack.unpackb(body) if "msgpack" in request.content_type else orjson.loads(body)


def _respond(request: web.Request, status: int, document: Any) -> web.Response:
    if "msgpack" in request.headers.get("accept", ""):
        packed = ormsgpack.packb(document)
        return web.Response(body=packed, status=status, content_type="application/msgpack")
    kind = "application/json" if status < 400 else "application/problem+json"
    return web.Response(body=orjson.dumps(document), status=status, content_type=kind)
