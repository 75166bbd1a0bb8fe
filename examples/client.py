"""Send the departures beside this file as streams; every event is applied once.

    python examples/client.py [URL]        against `make run`

A second run finds that all of them are applied. Whatever fails meanwhile (this process, the
service, its store), the next run continues from the position that the service has.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from carry_client import Carry, CarryError


def main(url: str = "http://127.0.0.1:8000") -> None:
    """Send the departures and print how likely each stream's next one is late."""
    departures = json.loads(Path(__file__).with_name("departures.json").read_bytes())
    try:
        with Carry(url) as carry:
            for name, events in departures.items():
                stream = carry.model("flights").stream(name)
                for reply in stream.send_all(events, chunk_events=8):
                    print(name, reply.first_position, reply.outputs["late"].round(3).tolist())
                print(f"{name} is at position {stream.position}")
    except CarryError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    if len(sys.argv) > 2:
        raise SystemExit("usage: python examples/client.py [URL]")
    main(*sys.argv[1:])
