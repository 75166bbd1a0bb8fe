"""Send the departures beside this file as streams; every event is applied once.

    python examples/client.py [URL]        against `make run`

A chunk names the position of its first event. Without an answer, or after a problem that is
retryable, the same chunk is sent again with the same position. A problem that names the stream's
position moves the client there: back where the store lost commits, forward where another client
sent some. `carry_client` does this; keep the events until they are applied.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from carry_client import Carry, Problem, Stream

CHUNK_EVENTS = 8


def main(url: str = "http://127.0.0.1:8000") -> None:
    """Send the departures; a second run finds that all of them are applied."""
    departures = json.loads(Path(__file__).with_name("departures.json").read_bytes())
    try:
        with Carry(url) as carry:
            for name, events in departures.items():
                stream = Stream(carry, "flights", name)
                for start, outputs in stream.send_all(events, CHUNK_EVENTS):
                    print(name, start, json.dumps(outputs)[:100])
                print(f"{name} is at position {stream.position}")
    except Problem as problem:
        raise SystemExit(str(problem)) from problem


if __name__ == "__main__":
    if len(sys.argv) > 2:
        raise SystemExit("usage: python examples/client.py [URL]")
    main(*sys.argv[1:])
