"""Connections of the client: TLS, forks, event loops, concurrent use and cancellation."""

from __future__ import annotations

import asyncio
import gc
import os
import ssl
import threading
import traceback
from collections.abc import Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from carry_client import AsyncCarry, Carry, NoAnswer, Problem, Stream, calls
from tests.service.commands.replay.standin import Standin
from tests.support.certificates import Certificates, certificates
from tests.support.servers import free_port

__all__ = ["certificates"]
Events = list[dict[str, Any]]


class NoModels(BaseHTTPRequestHandler):
    """Answers every request with an empty list of models."""

    def do_GET(self) -> None:
        body = b'{"models": []}'
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def https(certificates: Certificates) -> Iterator[str]:
    """The address of a server behind TLS."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates.certificate, certificates.key)
    with HTTPServer(("127.0.0.1", 0), NoModels) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"https://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


async def test_a_private_authority_is_trusted_if_it_is_named(
    https: str, certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    # its one attempt lasts until the certificate is rejected, also on a busy machine
    monkeypatch.setattr(calls, "GRACE_S", 60.0)
    context = ssl.create_default_context(cafile=certificates.authority)
    for verify in (certificates.authority, str(certificates.authority), context):
        with Carry(https, verify=verify) as carry:
            assert await asyncio.to_thread(carry.models) == []
        async with AsyncCarry(https, verify=verify) as asynchronous:
            assert await asynchronous.models() == []
    with Carry(https, deadline_s=0.01) as carry, pytest.raises(NoAnswer, match="CERTIFICATE"):
        await asyncio.to_thread(carry.models)


def test_a_file_without_certificates_is_rejected(certificates: Certificates) -> None:
    for file in (certificates.key, certificates.key / "none"):
        with pytest.raises(ValueError, match="verify: expected a PEM file of certificates, got /"):
            Carry("https://127.0.0.1", verify=file)


def test_client_fails_over_to_the_next_address(
    background: str, standin: Standin, events: Events
) -> None:
    other = background.replace("127.0.0.1", "localhost")
    with Carry([f"http://127.0.0.1:{free_port()}", background, other]) as carry:
        stream = carry.model("small").stream("s")
        stream.send(events[:2])
        stream.send(events[2:4])
        standin.fault = lambda _: "store_unavailable" if len(standin.hosts) == 2 else None
        assert stream.send(events[4:6]).position == 6
    hosts = [host.partition(":")[0] for host in standin.hosts]
    assert hosts == ["127.0.0.1", "127.0.0.1", "127.0.0.1", "localhost"]
    with pytest.raises(Problem, match="invalid_url"):
        Carry([])


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
async def test_unreachable_service_is_no_answer_with_one_cause() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    expected = f"expected an answer from {url}, got "
    with Carry(url, deadline_s=0.2) as carry, pytest.raises(NoAnswer, match=expected) as raised:
        carry.model("small").describe()
    async with AsyncCarry(url, deadline_s=0.2) as other:
        with pytest.raises(NoAnswer, match=expected) as asynchronous:
            await other.model("small").describe()
    for error in (raised.value, asynchronous.value):
        shown = "".join(traceback.format_exception(error))
        assert shown.count("was the direct cause of") == 1
        assert "During handling" not in shown


def test_a_forked_process_opens_its_own_connections(
    small: Stream, standin: Standin, events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    small.send(events[:1])
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with closing(small._driver._client):  # the parent's
        small.send(events[1:2])
        small.send(events[2:3])
        parents, *own = standin.connections
        assert own[0] is own[1]
        assert own[0] is not parents
        assert not parents.is_closing(), "the parent may have a request in flight on it"


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
def test_an_asynchronous_client_works_in_one_event_loop_after_another(
    background: str, events: Events
) -> None:
    carry = AsyncCarry(background, deadline_s=60)
    stream = carry.model("small").stream("s")
    for start in (0, 2):
        loop = asyncio.SelectorEventLoop()
        reply = loop.run_until_complete(stream.send(events[start : start + 2]))
        assert reply.position == start + 2
        loop.close()
    del carry, stream
    gc.collect()


async def test_concurrent_sends_of_one_stream_are_rejected(background: str, events: Events) -> None:
    async with AsyncCarry(background) as carry:
        model = carry.model("small")
        stream = model.stream("s")
        outcomes = await asyncio.gather(
            *(stream.send(events[:2]), stream.send(events[2:4]), model.send_many({stream: events})),
            return_exceptions=True,
        )
        first, *others = outcomes
        assert not isinstance(first, BaseException)
        for error in others:
            assert isinstance(error, RuntimeError)
            assert "stream 's': expected one send at a time" in str(error)
        assert (await stream.send(events[2:4])).position == 4


async def test_a_send_that_was_cancelled_while_events_are_sent_again_can_be_repeated(
    background: str, standin: Standin, events: Events
) -> None:
    async with AsyncCarry(background) as carry:
        stream = carry.model("small").stream("s")
        for start in (0, 2):
            await stream.send(events[start : start + 2])
        known = stream.head
        standin.roll_back("s", 1)
        is_resending = threading.Event()

        def fault(_: object) -> str | None:
            if len(standin.port_of) == 2:  # the chunk that is rejected: events 2 and 3 are missing
                return None
            is_resending.set()
            return "store_unavailable"

        standin.fault = fault
        sending = asyncio.ensure_future(stream.send(events[4:6]))
        await asyncio.to_thread(is_resending.wait)
        sending.cancel()
        with pytest.raises(asyncio.CancelledError) as cancelled:
            await sending
        assert stream.head == known
        standin.fault = lambda _: None
        assert (await stream.send(events[4:6])).position == 6
        del cancelled
