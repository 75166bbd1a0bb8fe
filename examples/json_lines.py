"""A transport of one's own: chunks as lines over a Unix socket, without HTTP.

    CARRY_REDIS_URL=unix:///run/valkey.sock python -m examples.json_lines /tmp/carry.sock

A request is a line `MODEL STREAM KEY BODY`: an access key, or `-` without one, and the JSON body of
a chunk as over HTTP. Its answer is a line of JSON: the reply as over HTTP, or `code`, `detail` and
other members of a problem document. The lines of a connection are answered one after another.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from asyncio import StreamReader, StreamWriter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import uvloop

from models.spec.stream_name import STREAM_NAME_RULE, is_stream_name
from service.access.caller import PREDICT
from service.build import PipelineService, build_pipeline
from service.codec.media import Media, dumps
from service.codec.reply_writer import EVERY_STEP, ReplyWriter
from service.codec.request_reader import RequestReader
from service.core.errors import BodyTooLarge, CarryError, InvalidName, MalformedBody
from service.settings import Settings
from service.telemetry.logs import configure_logs


class JsonLines:
    """Answers the lines of connections by a pipeline that is started."""

    def __init__(self, service: PipelineService):
        self._pipeline, self._keys = service.pipeline, service.keys
        self._requests = service.settings.requests
        models = service.pipeline.models.values()
        self._readers = {
            served.name: RequestReader(served.artifact, self._requests) for served in models
        }
        self._writers = {served.name: ReplyWriter(served.artifact) for served in models}

    async def serve(self, reader: StreamReader, writer: StreamWriter) -> None:
        """Answer one connection until its client closes it, or sends a line that is too long."""
        try:
            while line := await reader.readline():
                writer.write(dumps(Media.JSON, await self._answer(line)) + b"\n")
                await writer.drain()
        except ValueError:
            too_large = BodyTooLarge(
                f"expected lines of at most {self._requests.max_body_bytes} bytes"
            )
            writer.write(dumps(Media.JSON, _problem(too_large)) + b"\n")
        except ConnectionError:
            pass
        finally:
            writer.close()

    async def _answer(self, line: bytes) -> Mapping[str, Any]:
        deadline_s = time.monotonic() + self._requests.timeout_s
        try:
            model, stream, key, body = _split(line)
            caller = self._keys.caller(None if key == "-" else f"Bearer {key}".encode())
            served = self._pipeline.model(caller, PREDICT, model, stream)
            reader = self._readers[served.name]
            chunk = reader.chunk(body, Media.JSON, reader.key(stream))
            reply = await self._pipeline.process(caller, chunk, deadline_s)
        except CarryError as error:
            return _problem(error)
        return self._writers[served.name].reply(reply, EVERY_STEP)


def _split(line: bytes) -> tuple[str, str, str, bytes]:
    parts = line.split(b" ", 3)
    if len(parts) < 4:
        raise MalformedBody("expected a line MODEL STREAM KEY BODY")
    model, stream, key = (part.decode("latin-1") for part in parts[:3])
    if not is_stream_name(stream):
        raise InvalidName(f"stream: expected {STREAM_NAME_RULE}, got {stream[:300]!r}")
    return model, stream, key, parts[3]


def _problem(error: CarryError) -> Mapping[str, Any]:
    return {**error.facts, "code": error.code, "detail": error.detail, "retryable": error.retryable}


async def main(path: Path) -> None:
    """Serve the models of the settings until SIGTERM or SIGINT."""
    settings = Settings.load()
    configure_logs(settings.telemetry.log_level, settings.telemetry.log_format)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with build_pipeline(settings) as service:
        lines, limit = JsonLines(service), settings.requests.max_body_bytes
        server = await asyncio.start_unix_server(lines.serve, path, limit=limit)
        await stop.wait()
        server.close()


if __name__ == "__main__":
    uvloop.run(main(Path(sys.argv[1])))
