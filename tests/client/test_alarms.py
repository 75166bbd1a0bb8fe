"""Open alarms by both clients and by the commands; a producer goes on over an acknowledgement."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from carry.cli import app
from carry_client import AsyncCarry, Carry, Stream, errors
from tests.service.conftest import pipeline_server
from tests.service.transports.v1 import harness as harness_module
from tests.service.transports.v1.harness import harness
from tests.service.transports.v1.raw_http import port_of, serving
from tests.support.alarms import alarm_model, noise, raised, served_by_onnx
from tests.support.servers import RealServer

__all__ = ["pipeline_server"]

QUIET = 60


@pytest.fixture
async def url(
    pipeline_server: RealServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[str]:
    monkeypatch.setattr(harness_module, "numpy_served", served_by_onnx)
    models = {"sensors": alarm_model(tmp_path)}
    async with harness(pipeline_server, models) as api, serving(api) as server:
        yield f"http://127.0.0.1:{port_of(server)}"


def open_alarm(stream: Stream) -> None:
    for rows in (*noise(QUIET).reshape(3, -1, 6), raised(5)):
        stream.send(rows)


def use_alarms(url: str) -> None:
    def carry(*words: str) -> str:
        done = CliRunner().invoke(app, [*words, "--url", url])
        assert done.exit_code == 0, done.output
        return done.stdout

    with Carry(url) as client, Carry(url) as operator:
        producers = {name: client.model("sensors").stream(name) for name in ("a", "b", "c")}
        for each in producers.values():
            open_alarm(each)
        model = operator.model("sensors")
        alarms = {alarm.stream: alarm for alarm in model.alarms()}
        assert set(alarms) == {"a", "b", "c"}
        alarm = alarms["a"]
        assert (alarm.head, alarm.opened, alarm.events) == (producers["a"].head, QUIET, 4)
        assert alarm.severity is not None
        assert alarm.severity > 1
        assert [each.stream for each in model.alarms("b")] == ["b"]
        none = CliRunner().invoke(app, ["alarms", "sensors", "--prefix", "z", "--url", url])
        assert (none.exit_code, none.stdout) == (0, "")
        assert none.stderr.startswith("no open alarms")
        lines = carry("alarms", "sensors", "--prefix", "a").splitlines()
        assert len(lines) == 1
        assert lines[0].startswith("a\t2023-11-14 22:13:20+00:00\tevent 60, 4 since\tseverity ")
        assert lines[0].endswith(f"\t{alarm.cause}")

        with pytest.raises(errors.PositionBehind):
            model.stream("a").acknowledge(QUIET)
        assert model.stream("a").acknowledge(QUIET + 5)
        assert not model.stream("a").acknowledge()
        command = ("streams", "acknowledge", "sensors", "b")
        assert (carry(*command), carry(*command)) == ("acknowledged b\n", "no open alarm of b\n")
        # the producers send the ETag of their last reply, and do not notice
        for name in ("a", "b"):
            assert set(producers[name].send(raised(20)).outputs["surprise.alarm"]) == {0}
        assert carry("alarms", "sensors").split("\t")[0] == "c"


async def use_alarms_async(url: str) -> None:
    async with AsyncCarry(url) as client:
        model = client.model("sensors")
        assert [each.stream async for each in model.alarms()] == ["c"]
        assert await model.stream("c").acknowledge()
        assert [each async for each in model.alarms()] == []


async def test_alarms_are_listed_and_acknowledged_by_clients_and_commands(url: str) -> None:
    await asyncio.to_thread(use_alarms, url)
    await use_alarms_async(url)
