"""A relay of outputs to a webhook: order, retries, rejections, bounded memory, several relays."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import socket
import ssl
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import standardwebhooks
import uvicorn
from structlog.testing import capture_logs

from models.artifact.artifact import Artifact
from service.consumers.relay import DELIVERIES_AT_ONCE
from tests.support.certificates import Certificates, certificates
from tests.support.consumers import (
    add,
    assert_outputs,
    consuming,
    interleaved,
    outputs_of,
    relaying,
)
from tests.support.pages import ROOT
from tests.support.pipelines import rows_of
from tests.support.receiver import Receiver, Request, receiving, reply
from tests.support.servers import RealServer, becomes, server, shared_server

__all__ = ["certificates", "server", "shared_server"]

RANDOM = np.random.default_rng(27)
SECRET = f"whsec_{base64.b64encode(bytes(range(32))).decode()}"
GROUP = "carry/relay"


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.consumers.relay.RETRY_S", 0.01)
    monkeypatch.setattr("service.consumers.relay.MAX_RETRY_S", 0.05)


@pytest.fixture
def client(server: RealServer) -> Iterator[Any]:
    with server.client() as client:
        yield client


def output(stream: str, position: int, **others: Any) -> dict[str, Any]:
    """An entry as a consumer writes it."""
    fields = {"stream": stream, "epoch": "e1", "tag": "t", "model": "probe", "version": "1"}
    return fields | {"time": 1, "position": position, "outputs": f'{{"out":{position}}}'} | others


def webhook(receiver: Receiver, **others: Any) -> dict[str, Any]:
    return {"url": receiver.url, "secret": SECRET, **others}


def positions(receiver: Receiver, stream: str = "a") -> list[int]:
    return [position for position, _ in receiver.outputs().get(stream, [])]


async def until_acknowledged(client: Any, topic: str = "scores") -> None:
    """Wait until the relay has read and acknowledged all entries of a topic."""

    def is_acknowledged() -> bool:
        last = client.xrevrange(topic, count=1)[0][0]
        groups = [each for each in client.xinfo_groups(topic) if each["name"] == GROUP.encode()]
        return bool(groups) and (groups[0]["pending"], groups[0]["last-delivered-id"]) == (0, last)

    await becomes(is_acknowledged, "the acknowledgements")


async def test_outputs_arrive_signed_and_in_order(
    server: RealServer, client: Any, artifact: Artifact
) -> None:
    rows = {f"s{number}": rows_of(RANDOM, 30) for number in range(5)}
    add(client, "events", *interleaved(rows))
    async with receiving() as receiver, consuming(server.url, artifact):
        secrets = f"whsec_{base64.b64encode(b'n' * 32).decode()}\n{SECRET}\n"
        async with relaying(server.url, webhook=webhook(receiver, secret=secrets, batch=7)):
            await becomes(lambda: receiver.count() == 150, "all outputs")
            await until_acknowledged(client)
        found = receiver.outputs()
        assert found == outputs_of(client, "scores")
        for name, each in rows.items():
            assert_outputs(artifact, found[name], each)
        entries = dict(client.xrange("scores"))
    assert max(len(request.outputs) for request in receiver.requests) <= 7
    for request in receiver.requests:
        message = standardwebhooks.Webhook(SECRET).verify(request.body, request.headers)
        assert (message["type"], message["topic"]) == ("carry.outputs", "scores")
        assert request.headers["content-type"] == "application/json"
    first = receiver.requests[0].outputs[0]
    fields = {
        name.decode(): value.decode() for name, value in entries[first["entry"].encode()].items()
    }
    expected = fields | {"position": int(fields["position"]), "time": int(fields["time"])}
    expected |= {"entry": first["entry"], "outputs": json.loads(fields["outputs"])}
    assert first == expected


async def test_the_receiver_of_the_guide_gets_each_output_once(
    server: RealServer,
    client: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    guide = (ROOT / "docs" / "how-to" / "consume-events.md").read_text()
    [source] = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    monkeypatch.setenv("WEBHOOK_SECRET", SECRET)
    names: dict[str, Any] = {}
    exec(source, names)
    add(client, "scores", *[output("a", at) for at in (0, 1, 1, 2)])
    receiver = uvicorn.Server(uvicorn.Config(names["app"], log_config=None))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        serving = asyncio.create_task(receiver.serve(sockets=[listening]))
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/outputs"
        config = {"url": url, "secret": {"env": "WEBHOOK_SECRET"}}
        async with relaying(server.url, webhook=config):
            await until_acknowledged(client)
        receiver.should_exit = True
        await serving
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("('a'")]
    assert lines == [f"('a', 'e1') {at} {{'out': {at}}}" for at in range(3)]


async def test_entries_with_ids_that_are_no_times_are_delivered(
    server: RealServer, client: Any
) -> None:
    for at, entry in enumerate(("1-0", f"{2**64 - 1}-0")):
        client.xadd("scores", output("a", at), id=entry)
    async with receiving() as receiver, relaying(server.url, webhook=webhook(receiver)):
        await until_acknowledged(client)
    assert positions(receiver) == [0, 1]


async def test_a_changed_body_or_another_secret_does_not_verify(
    server: RealServer, client: Any
) -> None:
    add(client, "scores", output("a", 0))
    async with receiving() as receiver, relaying(server.url, webhook=webhook(receiver)):
        await becomes(lambda: receiver.requests, "a request")
    [request] = receiver.requests
    for secret, body in ((SECRET, request.body + b" "), ("whsec_" + "A" * 44, request.body)):
        with pytest.raises(standardwebhooks.WebhookVerificationError):
            standardwebhooks.Webhook(secret).verify(body, request.headers)


@pytest.mark.parametrize(
    "answer",
    [
        reply(500), reply(503, b"busy"), reply(408), reply(401), reply(404),
        reply(429, retry_after="0"), reply(503, retry_after="Thu, 01 Jan 1970 00:00:00 GMT"),
        reply(307, location="/outputs"), b"garbage\r\n\r\n", b"HTTP/9 what", b"", None,
    ],
    ids=str,
)  # fmt: skip
async def test_failed_deliveries_are_repeated_in_order_with_the_same_id(
    server: RealServer, client: Any, answer: bytes | None
) -> None:
    add(client, "scores", *[output("a", at) for at in range(10)])
    async with receiving() as receiver:
        receiver.answer = lambda _: answer if len(receiver.requests) % 3 else reply()
        config = webhook(receiver, batch=4, timeout_s=0.2 if answer is None else 60)
        async with relaying(server.url, webhook=config) as relay:
            await until_acknowledged(client)
    ids = [request.headers["webhook-id"] for request in receiver.requests]
    assert len({*ids}) == 3
    assert ids == sorted(ids, key=ids.index)
    assert [position for position, _ in receiver.outputs(unique=True)["a"]] == [*range(10)]
    if answer is not None:
        assert positions(receiver) == [*range(10)]
        assert relay.counts == {"delivered": 10, "failures": 6}
    assert not client.exists("scores:dead")


@pytest.mark.parametrize("retry_after", ["3000", "Fri, 01 Jan 2100 00:00:00 GMT"])
async def test_a_receiver_sets_the_pause_which_ends_when_the_relay_stops(
    server: RealServer, client: Any, retry_after: str
) -> None:
    add(client, "scores", output("a", 0))
    async with receiving() as receiver:
        receiver.answer = lambda _: reply(429, retry_after=retry_after)
        with capture_logs() as lines:
            async with relaying(server.url, webhook=webhook(receiver)) as relay:
                await becomes(lambda: relay.counts["failures"], "an attempt")
        [pause_s] = [line["pause_s"] for line in lines if line["event"] == "delivery_failed"]
        assert 3000 <= pause_s <= 3600
    assert client.xpending("scores", GROUP)["pending"] == 1


async def test_a_status_of_success_confirms_although_the_reply_ends_early(
    server: RealServer, client: Any
) -> None:
    add(client, "scores", output("a", 0))
    async with receiving() as receiver:
        head = b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 9\r\n\r\n"
        receiver.answer = lambda _: head + b"x"
        async with relaying(server.url, webhook=webhook(receiver)) as relay:
            await until_acknowledged(client)
    assert len(receiver.requests) == 1
    assert relay.counts == {"delivered": 1}


async def test_an_endless_reply_is_cut_off(server: RealServer, client: Any) -> None:
    add(client, "scores", output("a", 0))
    async with receiving() as receiver:
        head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
        receiver.answer = lambda _: head + b"10000\r\n%b\r\n" % (b"x" * 65536) * 40
        async with relaying(server.url, webhook=webhook(receiver, timeout_s=60)):
            await until_acknowledged(client)


async def test_only_the_rejected_output_becomes_a_dead_letter(
    server: RealServer, client: Any
) -> None:
    add(
        client,
        "scores",
        *[output("a", at) for at in range(20)],
        {"other": "entry"},
        output("a", 20),
    )

    def answer(request: Request) -> bytes:
        has_bad = any(each["position"] == 13 for each in request.outputs)
        return reply(422, b"position 13\nis unlucky") if has_bad else reply()

    async with receiving() as receiver:
        receiver.answer = answer
        async with relaying(server.url, webhook=webhook(receiver)) as relay:
            await until_acknowledged(client)
    assert positions(receiver) == [*range(13), *range(14, 21)]
    bad, foreign = [fields for _, fields in client.xrange("scores:dead")]
    assert bad[b"position"] == b"13"
    assert (bad[b"carry-code"], bad[b"carry-stream"]) == (b"delivery_rejected", b"a")
    assert bad[b"carry-reason"] == b"127.0.0.1 returned 422: position 13 is unlucky"
    assert foreign[b"other"] == b"entry"
    assert relay.counts == {"delivered": 20, "dead_letters": 2}


async def test_with_on_error_halt_a_rejected_output_waits(server: RealServer, client: Any) -> None:
    add(client, "scores", *[output("a", at) for at in range(5)])
    async with receiving() as receiver:
        receiver.answer = lambda _: reply(422)
        config = webhook(receiver, on_error="halt", batch=2)
        async with relaying(server.url, webhook=config) as relay:
            await becomes(lambda: relay.counts["failures"] >= 3, "some attempts")
            receiver.answer = lambda _: reply()
            await until_acknowledged(client)
    assert positions(receiver) == [*range(5)]
    assert not client.exists("scores:dead")


async def test_deleted_entries_are_acknowledged_and_delivered_ones_may_be_deleted(
    server: RealServer, client: Any
) -> None:
    ids = add(client, "scores", *[output("a", at) for at in range(4)])
    async with receiving() as receiver:
        receiver.answer = lambda _: reply(500)
        async with relaying(server.url, webhook=webhook(receiver)) as relay:
            await becomes(lambda: relay.counts["failures"], "an attempt")
        client.xdel("scores", ids[1])
        receiver.answer = lambda _: reply()
        async with relaying(server.url, webhook=webhook(receiver, delete=True)) as relay:
            await becomes(lambda: client.xlen("scores") == 0, "deletion")
    assert positions(receiver) == [0, 2, 3]
    assert relay.counts == {"delivered": 3, "deleted": 1}


async def test_a_receiver_that_hangs_delays_neither_commits_nor_other_topics(
    server: RealServer, client: Any, artifact: Artifact
) -> None:
    topics = [f"carry{{p{number:04d}}}:out:scores" for number in range(4)]
    for number, topic in enumerate(topics):
        add(client, topic, *[output(f"s{number}", at) for at in range(20)])
    rows = {"a": rows_of(RANDOM, 40)}
    async with receiving() as receiver:
        receiver.answer = lambda request: None if request.topic == topics[0] else reply()
        config = webhook(receiver, batch=5)
        partitions = {"partitions": 4}
        relayed = relaying(server.url, partitions, partitioned=True, webhook=config)
        async with relayed as relay, consuming(server.url, artifact, partitions, partitioned=False):
            await becomes(lambda: receiver.count() == 60, "the outputs of the other topics")
            add(client, "events", *interleaved(rows))
            await becomes(lambda: client.xlen("scores") == 40, "commits")
            assert relay.count_owned() == 4
            # else the delivery in progress would end by its timeout
            receiver.answer = lambda _: reply()
            for connection in [*receiver._connections]:
                connection.cancel()
            await becomes(lambda: receiver.count() == 80, "the outputs of the topic that hung")
    assert positions(receiver, "s0") == [*range(20)]


async def test_the_entries_in_memory_are_bounded(server: RealServer, client: Any) -> None:
    names = [f"carry{{p{number:04d}}}:out:scores" for number in range(32)]
    for name in names:
        add(client, name, *[output(name[7:11], at) for at in range(6)])

    def pending() -> int:
        return sum(group["pending"] for name in names for group in client.xinfo_groups(name))

    most = 2 * DELIVERIES_AT_ONCE
    async with receiving() as receiver:
        receiver.answer = lambda _: reply(503)
        config = webhook(receiver, batch=2)
        partitions = {"partitions": 32}
        async with relaying(server.url, partitions, partitioned=True, webhook=config) as relay:
            await becomes(lambda: relay.count_owned() == 32, "all topics")
            await becomes(lambda: pending() == most, "as much as there is room for")
            await becomes(lambda: relay.counts["failures"] >= 64, "attempts")
            assert pending() == most
            receiver.answer = lambda _: reply()
            await becomes(lambda: receiver.count() == 6 * 32, "all outputs")
    for name in names:
        assert positions(receiver, name[7:11]) == [*range(6)]


async def test_the_deliveries_in_progress_are_bounded(server: RealServer, client: Any) -> None:
    names = [f"carry{{p{number:04d}}}:out:scores" for number in range(32)]
    for name in names:
        add(client, name, output(name[7:11], 0))
    async with receiving() as receiver:
        answers = asyncio.Event()
        receiver.before = answers.wait
        partitions = {"partitions": 32}
        config = webhook(receiver, timeout_s=60)
        async with relaying(server.url, partitions, partitioned=True, webhook=config):

            def pending() -> int:
                return sum(
                    group["pending"] for name in names for group in client.xinfo_groups(name)
                )

            await becomes(lambda: all(map(client.exists, names)) and pending() == 32, "all reads")
            await becomes(lambda: receiver.in_progress >= DELIVERIES_AT_ONCE, "requests")
            answers.set()
            await becomes(lambda: receiver.count() == 32, "all outputs")
        assert receiver.most_in_progress == DELIVERIES_AT_ONCE


async def test_deliveries_that_wait_for_others_do_not_begin_after_the_stop(
    server: RealServer, client: Any
) -> None:
    """Nor after the topic was lost: its next owner may have delivered what follows."""
    names = [f"carry{{p{number:04d}}}:out:scores" for number in range(32)]
    for name in names:
        add(client, name, output(name[7:11], 0))
    async with receiving() as receiver:
        answers = asyncio.Event()
        receiver.before = answers.wait
        config: dict[str, Any] = {"partitioned": True, "webhook": webhook(receiver, timeout_s=60)}
        async with relaying(server.url, {"partitions": 32}, **config) as relay:

            def has_read_all() -> bool:
                topics = relay.topics.values()
                return len(topics) == 32 and all(topic._unacknowledged for topic in topics)

            await becomes(has_read_all, "all reads")
            await becomes(lambda: receiver.in_progress >= DELIVERIES_AT_ONCE, "requests")
            relay.stop()
            await becomes(
                lambda: all(topic._is_releasing for topic in relay.topics.values()), "the stop"
            )
            answers.set()
        assert receiver.count() == DELIVERIES_AT_ONCE


async def test_relays_share_the_topics_of_partitions(server: RealServer, client: Any) -> None:
    names = [f"carry{{p{number:04d}}}:out:scores" for number in range(8)]
    partitions = {"partitions": 8}
    async with receiving() as receiver:
        config: dict[str, Any] = {"partitioned": True, "webhook": webhook(receiver, batch=3)}
        async with relaying(server.url, partitions, **config) as first:
            for name in names:
                add(client, name, *[output(name[7:11], at) for at in range(30)])
            async with relaying(server.url, partitions, **config) as second:
                await becomes(
                    lambda: (first.count_owned(), second.count_owned()) == (4, 4), "a rebalance"
                )
                for name in names:
                    add(client, name, *[output(name[7:11], at) for at in range(30, 60)])
                await becomes(lambda: receiver.count() == 60 * 8, "all outputs")
            await becomes(lambda: first.count_owned() == 8, "a rebalance")
    for name in names:
        assert positions(receiver, name[7:11]) == [*range(60)]


async def test_the_certificate_of_a_receiver_is_verified(
    certificates: Certificates, client: Any, server: RealServer
) -> None:
    add(client, "scores", output("a", 0))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificates.certificate, certificates.key)
    async with receiving(context) as receiver:
        async with relaying(server.url, webhook=webhook(receiver)) as relay:
            await becomes(lambda: relay.counts["failures"] >= 2, "attempts")
        assert not receiver.requests
        trusting = webhook(receiver, ca_file=certificates.authority)
        async with relaying(server.url, webhook=trusting):
            await until_acknowledged(client)
    assert positions(receiver) == [0]


async def test_proxies_of_the_environment_are_not_used(
    server: RealServer, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(client, "scores", output("a", 0))
    async with receiving() as receiver, receiving() as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        monkeypatch.setenv("ALL_PROXY", proxy.url)
        # the error of an invalid header would have its value
        headers = {"authorization": {"env": "TOKEN"}, "x-key": " secret "}
        monkeypatch.setenv("TOKEN", "Bearer abc")
        async with relaying(server.url, webhook=webhook(receiver, headers=headers)):
            await until_acknowledged(client)
    assert not proxy.requests
    [request] = receiver.requests
    assert request.headers["authorization"] == "Bearer abc"
    assert request.headers["x-key"] == "secret"
    assert request.head == "POST /outputs HTTP/1.1"


async def test_outputs_in_messagepack_are_posted_as_json(
    server: RealServer, client: Any, artifact: Artifact
) -> None:
    rows = {"a": rows_of(RANDOM, 10)}
    add(client, "events", *interleaved(rows))
    async with (
        receiving() as receiver,
        consuming(server.url, artifact, outputs="msgpack"),
        relaying(server.url, outputs="msgpack", webhook=webhook(receiver)),
    ):
        await becomes(lambda: receiver.count() == 10, "all outputs")
    assert_outputs(artifact, receiver.outputs()["a"], rows["a"])
