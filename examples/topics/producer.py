"""Produces departures into a topic continuously, for `docker compose --profile streams up`.

    EVENTS_PER_S=20 python producer.py redis://localhost

`day.jsonl.gz` has the departures from New York of 2 January 2013, in the order of their moments.
They are sent again and again, each time a day later. The number of the last event is in the store:
event and position follow from it, so that a producer that is restarted continues, and an event
that is sent twice is a duplicate.
"""

from __future__ import annotations

import gzip
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import redis

from carry_client import Producer

DAY = Path(__file__).with_name("day.jsonl.gz")
TOPIC = "departures"
SENT = f"{TOPIC}:sent"
BEAT = Path(tempfile.gettempdir()) / "producer-beat"
"""Touched after each event, for health checks."""

RETRY_S = 1.0


def departures(start: int = 0) -> Iterator[tuple[str, dict[str, Any], int]]:
    """Stream, event and position of each departure, from a number on, endlessly."""
    day = [json.loads(line) for line in gzip.decompress(DAY.read_bytes()).splitlines()]
    per_day = Counter(each["stream"] for each in day)
    number = start - start % len(day)
    while True:
        days = number // len(day)
        for each in day:
            stream, event = each["stream"], each["event"]
            position = days * per_day[stream] + each["position"]
            if number >= start:
                # the streams of the README's examples have other events
                name = f"live-{stream}"
                departed = datetime.fromisoformat(event["departed"]) + timedelta(days=days)
                yield name, {**event, "departed": departed.isoformat()}, position
            number += 1


def produce(client: redis.Redis, events_per_s: float, partitions: int) -> None:
    """Send departures at an even rate; raises redis.RedisError if the store does not answer."""
    producer = Producer(client, TOPIC, model="flights", partitions=partitions)
    sent = int(client.get(SENT) or 0)
    due_s = time.monotonic()
    for number, (stream, event, position) in enumerate(departures(sent), sent + 1):
        producer.send(stream, event, position)
        client.set(SENT, number)
        BEAT.touch()
        due_s = max(due_s + 1 / events_per_s, time.monotonic() - 1)
        time.sleep(max(0.0, due_s - time.monotonic()))


def main(url: str) -> None:
    """Produce until the process ends, also while the store restarts."""
    events_per_s = float(os.environ.get("EVENTS_PER_S", "20"))
    partitions = int(os.environ.get("CARRY_PARTITIONS", "1024"))
    while True:
        try:
            with redis.Redis.from_url(url) as client:
                produce(client, events_per_s, partitions)
        except redis.RedisError as error:
            print(f"the store does not answer: {error}", file=sys.stderr, flush=True)
            time.sleep(RETRY_S)


if __name__ == "__main__":
    main(sys.argv[1])
