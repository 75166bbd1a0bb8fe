"""The histories of all epochs once more, with their cuts, on a service that nothing disturbs."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np

from tests.faults.http import MSGPACK, Line, NoReply, chunk_body
from tests.faults.network import OUTPUT
from tests.faults.records import History
from tests.faults.verdict import MIXED, Finding, Node, Verdict
from tests.support.service import Service

AT_ONCE = 16
TIMEOUT_S = 30.0


async def compare(history: History, verdict: Verdict, folder: Path, models: Path) -> int:
    """Replay every history, each as a stream of its own, and compare outputs, positions and tags
    with every reply that was given; what differs is added to the findings.

    Returns:
        Chunks that were replayed.
    """
    service = Service(folder, models)
    await asyncio.to_thread(service.start, CARRY_RUNTIME="onnxruntime")
    try:
        replies = {log.name: _replies(history, log.name) for log in history.streams}
        histories = list(verdict.histories.items())
        port = int(service.url.rsplit(":", 1)[1])

        async def some(first: int) -> int:
            line, count = Line(port), 0
            for (name, epoch), way in histories[first::AT_ONCE]:
                findings = await _replay(line, f"{name}:{epoch}", way, replies[name])
                verdict.findings += [Finding(MIXED, name, each) for each in findings]
                count += len(way)
            line.drop()
            return count

        return sum(await asyncio.gather(*(some(first) for first in range(AT_ONCE))))
    finally:
        await asyncio.to_thread(service.stop)


def _replies(history: History, name: str) -> dict[bytes, list[np.ndarray]]:
    found: dict[bytes, list[np.ndarray]] = {}
    for log in history.streams:
        if log.name == name:
            for ack in log.acks:
                found.setdefault(ack.tag, []).append(ack.outputs)
    return found


async def _replay(
    line: Line, stream: str, way: list[Node], replies: dict[bytes, list[np.ndarray]]
) -> list[str]:
    """What differs."""
    found = []
    for node in way:
        body = chunk_body(node.sent.rows, node.sent.start, MSGPACK)
        try:
            status, document = await line.ask(
                "POST", stream, body=body, media=MSGPACK, timeout_s=TIMEOUT_S
            )
        except NoReply as error:
            raise AssertionError(f"the undisturbed service did not answer: {error}") from error
        assert status == 200, document
        if document["position"] != node.position or document["tag"] != node.tag.hex():
            found.append(f"chunk at {node.sent.start}: undisturbed it has another position or tag")
            return found
        expected = np.asarray(document["outputs"][OUTPUT], np.float32)
        if any(
            outputs.shape != expected.shape or (outputs != expected).any()
            for outputs in replies.get(node.tag, [])
        ):
            found.append(f"chunk at {node.sent.start}: undisturbed it has other outputs")
    return found
