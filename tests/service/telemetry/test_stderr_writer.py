"""The writer of log lines to stderr: order, buffering, exit and threads."""

from __future__ import annotations

import asyncio
import io
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from service.telemetry import logs
from service.telemetry.logs import MAX_BUFFERED_LINES, StderrWriter

REPOSITORY = Path(__file__).resolve().parents[3]


def written(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


async def test_write_flushes_the_buffered_lines_first(
    capsys: pytest.CaptureFixture[str],
) -> None:
    stderr = StderrWriter()
    stderr.buffer("one")
    stderr.buffer("two")
    assert written(capsys) == []
    stderr.write("three")
    assert written(capsys) == ["one", "two", "three"]
    stderr.buffer("four")
    stderr.flush()
    stderr.flush()
    assert written(capsys) == ["four"]


async def test_buffered_lines_are_flushed_after_the_interval(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "FLUSH_INTERVAL_S", 0)
    stderr = StderrWriter()
    for text in ("first", "second"):
        stderr.buffer(text)
        assert written(capsys) == []
        done = asyncio.Event()
        asyncio.get_running_loop().call_later(0, done.set)
        await done.wait()
        assert written(capsys) == [text]


async def test_a_full_buffer_is_flushed_immediately(capsys: pytest.CaptureFixture[str]) -> None:
    stderr = StderrWriter()
    expected = [str(number) for number in range(MAX_BUFFERED_LINES)]
    for text in expected[:-1]:
        stderr.buffer(text)
    assert written(capsys) == []
    stderr.buffer(expected[-1])
    assert written(capsys) == expected


def test_lines_are_written_immediately_without_an_event_loop(
    capsys: pytest.CaptureFixture[str],
) -> None:
    StderrWriter().buffer("now")
    assert written(capsys) == ["now"]


@pytest.mark.parametrize("end", ["", "raise SystemExit(3)", "1 / 0"])
def test_buffered_lines_are_flushed_at_exit(end: str) -> None:
    program = f"""
import uvloop
from service.telemetry.logs import StderrWriter

async def main():
    StderrWriter().buffer("last words")
    {end}

uvloop.run(main())
"""
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, timeout=60
    )
    assert b"last words\n" in ended.stderr


async def test_lines_of_several_threads_keep_their_order(
    capsys: pytest.CaptureFixture[str],
) -> None:
    stderr = StderrWriter()
    others = [
        threading.Thread(
            target=lambda name=name: [stderr.write(f"{name}{at}") for at in range(200)]  # type: ignore[misc]
        )
        for name in "ab"
    ]
    for thread in others:
        thread.start()
    for at in range(200):
        stderr.buffer(f"c{at}")
    for thread in others:
        thread.join()
    stderr.flush()
    lines = written(capsys)
    for name in "abc":
        assert [text for text in lines if text[0] == name] == [f"{name}{at}" for at in range(200)]
    assert len(lines) == 600


async def test_a_closed_stderr_raises_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stderr", closed)
    stderr = StderrWriter()
    stderr.buffer("a")
    stderr.write("b")
