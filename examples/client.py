"""A client that keeps positions: every event is applied once, whatever happens on the way.

    python examples/client.py [URL]        against `make run`

A chunk says at which position of its stream it begins. No answer, or a problem that may be
retried: the same chunk again, with the same position. A refusal that says where the stream
stands: go on from there, which is back if the store lost commits and forward if another
client sent some. The events are kept until then, since they may be needed again.
"""

from __future__ import annotations

import json
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHUNK_EVENTS = 8
PATIENCE_S = 60
MOVED = ("position_ahead", "position_behind", "already_applied")


class Stream:
    """One stream of a model, and where it stands."""

    def __init__(self, url: str, model: str, name: str) -> None:
        self.url = f"{url.rstrip('/')}/v1/models/{model}/streams/{name}"
        self.position = 0

    def send(self, events: list[dict[str, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Send the stream's events, the first of them being event 0 of the stream.

        Yields (position of the chunk, its outputs); a position may come again after the
        store fell back.
        """
        _, stands = self._call()
        self.position = stands.get("position", 0)
        while self.position < len(events):
            start = self.position
            chunk = {"position": start, "events": events[start : start + CHUNK_EVENTS]}
            status, answer = self._call(chunk)
            if status == 200:
                self.position = answer["position"]
                yield start, answer["outputs"]
            elif answer["code"] in MOVED:
                self.position = answer["position"]
            else:
                raise SystemExit(f"{self.url}: {answer['code']}: {answer['detail']}")

    def _call(self, chunk: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        """POST a chunk, or GET the stream, until there is an answer that settles it."""
        body = None if chunk is None else json.dumps(chunk).encode()
        url, headers = self.url + ("/chunks" if chunk else ""), {"content-type": "application/json"}
        give_up_s, wait_s = time.monotonic() + PATIENCE_S, 0.1
        while True:
            try:
                request = urllib.request.Request(url, body, headers)  # noqa: S310
                with urllib.request.urlopen(request, timeout=30) as response:  # noqa: S310
                    return response.status, json.load(response)
            except urllib.error.HTTPError as error:
                problem = json.load(error)
                if not problem["retryable"] or time.monotonic() > give_up_s:
                    return error.code, problem
            except OSError:
                if time.monotonic() > give_up_s:
                    raise
            time.sleep(wait_s)
            wait_s = min(2 * wait_s, 2.0)


def main(url: str = "http://127.0.0.1:8000") -> None:
    """Send the departures that lie beside this file; a second run finds all of them sent."""
    departures = json.loads(Path(__file__).with_name("departures.json").read_bytes())
    for name, events in departures.items():
        stream = Stream(url, "flights", name)
        for start, outputs in stream.send(events):
            print(name, start, json.dumps(outputs)[:100])
        print(f"{name} stands at {stream.position}")


if __name__ == "__main__":
    main(*sys.argv[1:])
