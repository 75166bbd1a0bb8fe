"""What a generator sends and what it expects back: bodies encoded beforehand, positions kept.

A `Traffic` hands out requests for streams that have none in flight, in turn, each at the
stream's next position, and checks every reply: its status by the caller, its position here.
The first replies of one stream are kept, so that their outputs can be checked after the run.
Refuses to go on after a wrong reply: a figure from wrong answers is worth nothing.
"""

from __future__ import annotations

import json
import random
import re
import zlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
import numpy as np
import orjson
import ormsgpack

from tests.support.v2_messages import infer_request, message_class, read_outputs

SAMPLED_CHUNKS = 24
"""Chunks of the sampled stream whose replies are kept; the oracle that checks them is slow."""

Media = Literal["json", "msgpack", "v2", "perf", "perf-json", "grpc", "websocket"]
"""`v2` and `grpc` are the V2 protocol with binary tensors, over HTTP and in streams of gRPC; `perf`
and `perf-json` are V2 over HTTP in the bytes of Triton's perf_analyzer, with tensors in the binary
format and in JSON: sequences of a few requests, each of a new number, without positions;
`websocket` is MessagePack in frames of sockets for many streams."""
PERF: tuple[Media, ...] = ("perf", "perf-json")
Ticket = tuple[tuple[int, int], ...]
"""The streams of a request, each with the position that its reply must give."""


_STREAM_RESPONSE = message_class("ModelStreamInferResponse")


class WrongReplyError(Exception):
    """A reply that is not the one expected; the message shows its beginning."""


class Reply(msgspec.Struct):
    """The part of a reply that is checked; the decoder skips everything else."""

    position: int | None = None
    reply: Reply | None = None
    results: tuple[Reply, ...] = ()


_V2_POSITION = re.compile(rb'"position": ?(\d+)')
_ENCODE: dict[Media, Callable[[Any], bytes]] = {"json": orjson.dumps, "msgpack": ormsgpack.packb}
_DECODE: dict[Media, Callable[[bytes], Reply]] = {
    "json": msgspec.json.Decoder(Reply).decode,
    "msgpack": msgspec.msgpack.Decoder(Reply).decode,
    "websocket": msgspec.msgpack.Decoder(Reply).decode,
}


def write_request(path: str, media: Media, content: Any) -> bytes:
    """A whole POST request."""
    body = _ENCODE[media](content)
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/{media}\r\n"
    return b"%bContent-Length: %d\r\n\r\n%b" % (head.encode(), len(body), body)


def write_v2_request(path: str, stream: str, position: int, rows: bytes, steps: int) -> bytes:
    """A whole request of the V2 protocol: a chunk of a stream as a binary tensor."""
    features = len(rows) // 4 // steps
    tensor = {"name": "inputs", "datatype": "FP32", "shape": [1, steps, features]}
    tensor["parameters"] = {"binary_data_size": len(rows)}
    parameters = {"sequence_id": stream, "position": position, "binary_data_output": True}
    header = orjson.dumps({"inputs": [tensor], "parameters": parameters})
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/octet-stream\r\n"
    head += f"Inference-Header-Content-Length: {len(header)}\r\n"
    head += f"Content-Length: {len(header) + len(rows)}\r\n\r\n"
    return b"%b%b%b" % (head.encode(), header, rows)


def write_frame(content: Any) -> bytes:
    """A frame of a WebSocket, with MessagePack; its mask is zero, which leaves it as it is."""
    payload = ormsgpack.packb(content)
    return b"\x82\xff%b%b%b" % (len(payload).to_bytes(8), bytes(4), payload)


def write_perf_request(
    path: str, sequence_id: int, chunk: int, chunks: int, rows: bytes, steps: int, *, is_json: bool
) -> bytes:
    """A whole request as perf_analyzer sends it: one chunk of those of a sequence.

    Args:
        rows: float32, or with `is_json` a flat list.
    """
    values = rows.count(b",") + 1 if is_json else len(rows) // 4
    tensor = {"name": "inputs", "datatype": "FP32", "shape": [1, steps, values // steps]}
    if is_json:
        tensor["data"], rows, media = orjson.Fragment(rows), b"", "application/json"
    else:
        tensor["parameters"], media = {"binary_data_size": len(rows)}, "application/octet-stream"
    parameters = {"sequence_id": sequence_id, "sequence_start": chunk == 0}
    parameters["sequence_end"] = chunk == chunks - 1
    outputs = [{"name": "out", "parameters": {"binary_data": not is_json}}]
    members = {"id": str((1 << 48) + sequence_id * chunks + chunk), "parameters": parameters}
    header = orjson.dumps(members | {"inputs": [tensor], "outputs": outputs})
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:8000\r\nUser-Agent: libcurl-agent/1.0\r\n"
    head += f"Accept: */*\r\nInference-Header-Content-Length: {len(header)}\r\n"
    head += f"Content-Type: {media}\r\nContent-Length: {len(header) + len(rows)}\r\n\r\n"
    return b"%b%b%b" % (head.encode(), header, rows)


def write_message(model: str, stream: str, position: int, rows: bytes, steps: int) -> bytes:
    """A message of the V2 protocol in a stream of gRPC."""
    chunk = np.frombuffer(rows, "<f4").reshape(steps, -1)
    message: bytes = infer_request(model, chunk, stream, position=position).SerializeToString()
    return message


def read_message(data: bytes) -> Any:
    """The reply in a message; raises WrongReplyError for an error."""
    response = _STREAM_RESPONSE.FromString(data)
    if response.error_message:
        raise WrongReplyError(response.error_message)
    return response.infer_response


def read_grpc_reply(data: bytes) -> dict[str, Any]:
    """A message as a reply of version 1: its outputs by name."""
    return {"outputs": read_outputs(read_message(data))}


def read_v2_reply(body: bytes) -> dict[str, Any]:
    """A reply of the V2 protocol as one of version 1: its outputs by name."""
    reply, at = json.JSONDecoder().raw_decode(body.decode("latin-1"))
    outputs = {}
    for output in reply["outputs"]:
        if "data" in output:
            outputs[output["name"]] = output["data"]
            continue
        size = output["parameters"]["binary_data_size"]
        outputs[output["name"]] = np.frombuffer(body[at : at + size], "<f4")
        at += size
    return {"outputs": outputs}


def read_positions(body: bytes, media: Media) -> list[int | None]:
    """The position that a reply's body gives for each of its chunks, None where it gives none;
    raises WrongReplyError where the body cannot be decoded."""
    if media == "v2" or media in PERF:
        found = _V2_POSITION.search(body)
        return [found and int(found[1])]
    if media == "grpc":
        return [read_message(body).parameters["position"].int64_param]
    try:
        reply = _DECODE[media](body)
    except msgspec.MsgspecError as error:
        raise WrongReplyError(f"{error}: {body[:300]!r}") from error
    if reply.results:
        return [result.reply and result.reply.position for result in reply.results]
    return [(reply.reply or reply).position]


@dataclass(frozen=True)
class TrafficSpec:
    """Everything a generator needs to know; sent to its process."""

    path: str  # `{0}`, `{1}`: name of the stream, number of its model; gRPC: name of the model
    media: Media
    member: Literal["inputs", "events", "sequences", "horizon"]  # of a body
    values: tuple[bytes, ...]  # the member's in each body: JSON, or the bytes of a tensor
    steps: tuple[int, ...]  # the events in each of them; of a forecast those that it looks ahead
    prefix: str  # of every stream's name
    streams: int  # how many there are
    position: int = 0  # of every stream at the start
    items: int = 0  # chunks per request; 0 for the route of one stream
    models: int = 1  # that the streams are spread over
    is_sticky: bool = False  # whether each connection sends the chunks of one stream
    moves: bool = True  # whether a request advances its stream; a forecast does not
    positions: bool = True  # whether replies give the position (the floor's, predictions do not)
    may_reject: bool = False  # whether the server may answer 429; otherwise that ends the run
    is_sampled: bool = False  # whether the first replies to stream 0 are kept
    grpc_port: int = 0  # of the server that messages of gRPC are sent to
    sequence: int = 20  # chunks of a sequence of `PERF`, after which its stream is another one

    def name(self, stream: int) -> str:
        return f"{self.prefix}-{stream:07d}"

    def body(self, stream: int, chunk: int) -> int:
        """Which body a stream's n-th chunk has."""
        return (stream + chunk) % len(self.values)


class Traffic:
    """The streams of one spec, in one generator."""

    def __init__(self, spec: TrafficSpec):
        self.spec = spec
        self.events = 0  # that were answered
        self.sampled: list[bytes] = []  # the first replies to stream 0, in order
        order = list(range(1, spec.streams))
        random.Random(1).shuffle(order)
        # the sampled stream comes first, so that a slow server reaches it too
        self._free = deque([0, *order])
        self._position = [spec.position] * spec.streams
        self._chunks = [0] * spec.streams
        is_json = spec.media == "json"
        self._values = [orjson.Fragment(value) if is_json else value for value in spec.values]
        self._per_request = max(1, spec.items)
        self._is_perf = spec.media in PERF
        most = spec.sequence if self._is_perf else SAMPLED_CHUNKS
        self._sampled_chunks = min(SAMPLED_CHUNKS, most)
        self._first_sequence = zlib.crc32(spec.prefix.encode()) << 24

    @property
    def ready(self) -> bool:
        """Whether enough streams are without a request in flight."""
        return len(self._free) >= self._per_request

    def request(self) -> tuple[bytes, Ticket]:
        """The next request, whole, and what `accept` needs to check its reply."""
        spec = self.spec
        chunks: list[dict[str, Any]] = []
        ticket = []
        for _ in range(self._per_request):
            stream = self._free.popleft()
            position, body = self._position[stream], spec.body(stream, self._chunks[stream])
            value = self._values[body]
            chunks.append({"stream": spec.name(stream), "position": position, spec.member: value})
            ticket.append((stream, position + spec.steps[body] if spec.moves else position))
        if spec.items:
            return write_request(spec.path, spec.media, {"chunks": chunks}), tuple(ticket)
        [content] = chunks
        if spec.media == "v2":
            name = content["stream"]
            request = write_v2_request(spec.path, name, position, value, spec.steps[body])
            return request, tuple(ticket)
        if self._is_perf:
            number, chunk = divmod(self._chunks[stream], spec.sequence)
            sequence_id = self._first_sequence + number * spec.streams + stream
            request = write_perf_request(
                spec.path,
                sequence_id,
                chunk,
                spec.sequence,
                value,
                spec.steps[body],
                is_json=spec.media == "perf-json",
            )
            return request, tuple(ticket)
        if spec.media == "grpc":
            name = content["stream"]
            return write_message(spec.path, name, position, value, spec.steps[body]), tuple(ticket)
        if spec.media == "websocket":
            return write_frame(content), tuple(ticket)
        path = spec.path.format(content.pop("stream"), stream % spec.models)
        if spec.member == "sequences":
            content = {"sequences": [value]}
        return write_request(path, spec.media, content), tuple(ticket)

    def accept(self, ticket: Ticket, reply: bytes) -> None:
        """Check a reply's body, and let its streams continue; raises WrongReplyError where a
        position is another than expected, or an item failed."""
        spec = self.spec
        if spec.positions:
            expected, positions = [after for _, after in ticket], read_positions(reply, spec.media)
            if positions != expected:
                raise WrongReplyError(
                    f"expected positions {expected}, got {positions}: {reply[:300]!r}"
                )
        for stream, after in ticket:
            chunk = self._chunks[stream]
            if spec.is_sampled and stream == 0 and chunk < self._sampled_chunks:
                self.sampled.append(reply)
            self.events += spec.steps[spec.body(stream, chunk)]
            self._chunks[stream] = chunk + 1
            is_new = self._is_perf and (chunk + 1) % spec.sequence == 0
            self._position[stream] = 0 if is_new else after
            # in a closed loop, the connection that was just answered takes the first one
            (self._free.appendleft if spec.is_sticky else self._free.append)(stream)

    def reject(self, ticket: Ticket) -> None:
        """Let the streams of a rejected request continue at their positions, with other bodies: if
        the rejected chunks were applied, the server refuses the next ones, which ends the run."""
        for stream, _ in ticket:
            self._chunks[stream] += 1
            self._free.append(stream)
