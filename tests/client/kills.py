"""Kills service and store while `send_all` runs over one stream of departures.

    python -m tests.client.kills --events 100000       compares every output with one Keras call

The stream is that of all departures from New York in the order of their time, sent as a Polars
DataFrame. The service gets SIGKILL at a third, service and store at two thirds; both start again
while the client retries. Exit status 1 if an output is lost, doubled or different.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

import models
from carry_client import Carry, Progress, Reply
from models.artifact.artifact import Artifact, load_artifact
from models.events.columns import EventColumns
from models.events.frame import columns_from_frame
from service.commands.replay.departures import EVENT_COLUMNS, flight_events
from service.commands.replay.verify import Received, keras_runner, verify_outputs
from tests.support.servers import free_port
from tests.support.service import Service, running

STREAM = "departures"


@dataclass(frozen=True)
class Outcome:
    """What a client received.

    Attributes:
        positions: int64 [N], of each output in the order of their arrival.
        outputs: float32 [N, O], all outputs side by side.
        columns: the events, as the model's encoder takes them.
        last: progress at the end.
        longest_s: longest time between two replies.
    """

    positions: np.ndarray
    outputs: np.ndarray
    columns: EventColumns
    last: Progress
    longest_s: float


def flights() -> Artifact:
    """The pretrained artifact."""
    return load_artifact(Path(models.__file__).parent / "pretrained" / "flights")


def departures(count: int) -> pl.DataFrame:
    """The first departures of all airports, in the order of their time."""
    frame = flight_events().sort("departed", maintain_order=True)
    return frame.head(count).select(EVENT_COLUMNS)


def send_with_kills(
    folder: Path, model_dir: Path, count: int, chunk_events: int, kills: Sequence[int]
) -> Outcome:
    """Send the departures through a service of its own, which is killed meanwhile.

    Args:
        kills: positions from which on the service is killed, at the last one with its store.
    """
    frame, artifact = departures(count), flights()
    assert artifact.spec.events is not None
    waiting = sorted(kills, reverse=True)
    restarts: list[threading.Thread] = []
    progress: list[Progress] = []
    times_s = [time.monotonic()]
    replies: list[Reply] = []
    options = ("--port", str(free_port()))
    with running(folder, model_dir, *options) as service:

        def kill(latest: Progress) -> None:
            progress.append(latest)
            times_s.append(time.monotonic())
            if waiting and latest.position >= waiting[-1]:
                waiting.pop()
                store = None if waiting else service.valkey_pid()
                service.kill()
                if store is not None:
                    os.kill(store, signal.SIGKILL)
                restarts.append(threading.Thread(target=Service.start, args=(service,)))
                restarts[-1].start()

        with Carry(service.url) as carry:
            stream = carry.model("flights").stream(STREAM)
            replies += stream.send_all(frame, chunk_events=chunk_events, progress=kill)
            position = stream.refresh().position
        for restart in restarts:
            restart.join()
    assert position == count, f"the stream is at {position} of {count}"
    names = [name for name in replies[0].to_columns() if name != "position"]
    columns = [reply.to_columns() for reply in replies]
    return Outcome(
        positions=np.concatenate([each["position"] for each in columns]),
        outputs=np.column_stack([np.concatenate([e[name] for e in columns]) for name in names]),
        columns=columns_from_frame(artifact.spec.events, frame),
        last=progress[-1],
        longest_s=float(np.max(np.diff(times_s))),
    )


def main(arguments: list[str]) -> int:
    """Run the comparison with Keras, and print its figures as JSON."""
    parser = argparse.ArgumentParser(prog="python -m tests.client.kills", description=__doc__)
    parser.add_argument("--events", type=int, default=100_000)
    parser.add_argument("--chunk-events", type=int, default=64)
    options = parser.parse_args(arguments)
    artifact = flights()
    with tempfile.TemporaryDirectory() as folder:
        model_dir = Path(folder) / "models"
        model_dir.mkdir()
        (model_dir / "flights").symlink_to(artifact.path)
        began_s = time.monotonic()
        kills = (options.events // 3, 2 * options.events // 3)
        outcome = send_with_kills(
            Path(folder), model_dir, options.events, options.chunk_events, kills
        )
        sent_s = time.monotonic() - began_s
    is_once = np.array_equal(outcome.positions, np.arange(options.events))
    received = Received(STREAM, outcome.columns, outcome.outputs)
    verification = verify_outputs(artifact.spec, keras_runner(artifact), [received])
    figures = {
        "events": options.events,
        "chunks": outcome.last.chunks,
        "seconds": round(sent_s, 1),
        "longest_silence_s": round(outcome.longest_s, 2),
        "retries": outcome.last.retries,
        "rollbacks": outcome.last.rollbacks,
        "outputs_lost": outcome.last.skipped,
        "each_output_once": is_once,
        "compared_with_keras": verification.compared,
        "largest_excess": max(output.excess for output in verification.outputs),
        "allowed_excess": 1e-5,
    }
    print(json.dumps(figures, indent=2))
    return 0 if is_once and verification.holds and not verification.missing else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
