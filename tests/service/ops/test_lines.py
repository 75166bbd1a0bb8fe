"""Lines keep their order and none is lost, gathered or not."""

from __future__ import annotations

import asyncio
import io
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from service.ops import lines
from service.ops.lines import MOST_GATHERED, StderrLines

REPOSITORY = Path(__file__).resolve().parents[3]


def written(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


async def test_a_line_that_is_written_takes_the_gathered_ones_along(
    capsys: pytest.CaptureFixture[str],
) -> None:
    stderr = StderrLines()
    stderr.gather("one")
    stderr.gather("two")
    assert written(capsys) == []
    stderr.write("three")
    assert written(capsys) == ["one", "two", "three"]
    stderr.gather("four")
    stderr.flush()
    stderr.flush()
    assert written(capsys) == ["four"]


async def test_gathered_lines_are_written_by_themselves(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "GATHER_S", 0)
    stderr = StderrLines()
    for text in ("first", "second"):
        stderr.gather(text)
        assert written(capsys) == []
        done = asyncio.Event()
        asyncio.get_running_loop().call_later(0, done.set)
        await done.wait()
        assert written(capsys) == [text]


async def test_many_lines_do_not_wait(capsys: pytest.CaptureFixture[str]) -> None:
    stderr = StderrLines()
    expected = [str(number) for number in range(MOST_GATHERED)]
    for text in expected[:-1]:
        stderr.gather(text)
    assert written(capsys) == []
    stderr.gather(expected[-1])
    assert written(capsys) == expected


def test_without_a_loop_nothing_waits(capsys: pytest.CaptureFixture[str]) -> None:
    StderrLines().gather("now")
    assert written(capsys) == ["now"]


@pytest.mark.parametrize("end", ["", "raise SystemExit(3)", "1 / 0"])
def test_a_process_that_ends_loses_none(end: str) -> None:
    program = f"""
import uvloop
from service.ops.lines import StderrLines

async def main():
    StderrLines().gather("last words")
    {end}

uvloop.run(main())
"""
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, timeout=60
    )
    assert b"last words\n" in ended.stderr


async def test_lines_of_threads_are_all_there(capsys: pytest.CaptureFixture[str]) -> None:
    stderr = StderrLines()
    others = [
        threading.Thread(
            target=lambda name=name: [stderr.write(f"{name}{at}") for at in range(200)]  # type: ignore[misc]
        )
        for name in "ab"
    ]
    for thread in others:
        thread.start()
    for at in range(200):
        stderr.gather(f"c{at}")
    for thread in others:
        thread.join()
    stderr.flush()
    found = written(capsys)
    for name in "abc":
        assert [text for text in found if text[0] == name] == [f"{name}{at}" for at in range(200)]
    assert len(found) == 600


async def test_a_stderr_that_is_gone_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stderr", closed)
    stderr = StderrLines()
    stderr.gather("a")
    stderr.write("b")
