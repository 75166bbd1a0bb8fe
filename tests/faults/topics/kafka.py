"""`python -m tests.faults.topics.kafka`: break consumers that read and write topics of Kafka.

Three consumers read a topic of Kafka and write to another one, while processes, the store and the
broker break. Every record's output must be there, in order per stream when it comes for the first
time, equal to the float64 oracle; what comes twice must be equal. Exits with 1 where it is not.
"""

import argparse
import json
import os
import secrets
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import numpy as np

from tests.faults.topics.processes import ServerStore
from tests.support.consumers import ConsumerProcess
from tests.support.kafka import QUICK, Broker, record_of, running_broker
from tests.support.pipelines import make_artifact, oracle_outputs, rows_of

STREAMS: Final = [f"s{number}" for number in range(40)]
KAFKA_PARTITIONS: Final = 6
CONSUMERS: Final = 3
PAUSE_S: Final = 0.05
FAULT_EVERY_S: Final = (1.0, 3.0)
IDLE_S: Final = 60.0
"""A run fails if no output is added for this long after the last record."""


class KafkaRun:
    """A run in progress."""

    def __init__(self, seed: int, folder: Path, store: ServerStore, broker: Broker):
        self.random = np.random.default_rng(seed)
        self.rows: dict[str, list[Any]] = {name: [] for name in STREAMS}
        self.artifact = make_artifact(folder / "probe")
        self.seen: Counter[str] = Counter()
        self.consumers: list[ConsumerProcess] = []
        self._folder, self._store, self._broker = folder, store, broker
        config = {
            "model": "probe", "from": broker.create("events", KAFKA_PARTITIONS),
            "to": broker.create("scores", KAFKA_PARTITIONS), "partitioned": True, "lease_s": 1,
            "kafka": QUICK,
        }  # fmt: skip
        (folder / "consumer.yaml").write_text(json.dumps(config))
        for _ in range(CONSUMERS):
            self.start_consumer()

    def start_consumer(self) -> None:
        log = self._folder / f"{self.seen['consumers started']}.log"
        words = str(self._folder / "consumer.yaml"), "--redis-url", self._store.url
        self.consumers.append(ConsumerProcess(log, *words, "--models", str(self.artifact.path)))
        self.seen["consumers started"] += 1

    def produce(self, seconds: float) -> None:
        """Produce a record of each stream every now and then."""
        end_s = time.monotonic() + seconds
        while time.monotonic() < end_s:
            rows = rows_of(self.random, len(STREAMS))
            for name, row in zip(STREAMS, rows, strict=True):
                self.rows[name].append(row)
            records = [record_of(name, row) for name, row in zip(STREAMS, rows, strict=True)]
            self._broker.produce("events", *records)
            time.sleep(PAUSE_S)

    def replace_consumer(self, number: int) -> None:
        """Kill or terminate a consumer, and start another one."""
        consumer = self.consumers.pop(int(self.random.integers(CONSUMERS)))
        consumer.fork.send_signal(number)
        self.start_consumer()

    def suspend_consumer(self) -> None:
        """Suspend a consumer for longer than its lease and its session."""
        consumer = self.consumers[int(self.random.integers(CONSUMERS))]
        consumer.fork.send_signal(signal.SIGSTOP)
        self.produce(3)
        consumer.fork.send_signal(signal.SIGCONT)

    def kill_store(self) -> None:
        self._store.server.kill()
        self._store.server.start()

    def roll_back_store(self) -> None:
        """Set the store back by half a second."""
        self._store.prepare_rollback(0)
        self.produce(0.5)
        self._store.roll_back()

    def stop_broker(self) -> None:
        self._broker.stop()
        time.sleep(1)
        self._broker.start()

    def outputs(self) -> tuple[dict[str, dict[int, bytes]], list[str]]:
        """The outputs of each stream by position in the order of their arrival, and findings."""
        found: dict[str, dict[int, bytes]] = {name: {} for name in STREAMS}
        findings = []
        for record in self._broker.read_all("scores", KAFKA_PARTITIONS):
            stream, position = record.key().decode(), int(dict(record.headers())["position"])
            first = found[stream].setdefault(position, record.value())
            self.seen["records of outputs"] += 1
            if first != record.value():
                findings.append(f"{stream} {position}: two different outputs")
        return found, findings

    def check(self) -> list[str]:
        """Wait for all outputs, and compare them."""
        count, changed_s = -1, time.monotonic()
        while time.monotonic() < changed_s + IDLE_S:
            self.seen["records of outputs"] = 0
            found, findings = self.outputs()
            before, count = count, sum(map(len, found.values()))
            if count == sum(map(len, self.rows.values())):
                break
            if count != before:
                changed_s = time.monotonic()
            time.sleep(0.5)
        self.seen["outputs"] = count
        for name, rows in self.rows.items():
            if [*found[name]] != [*range(len(rows))]:
                findings.append(
                    f"{name}: expected {len(rows)} positions in order, got {[*found[name]]}"
                )
                continue
            values = [
                np.concatenate([np.ravel(each) for each in json.loads(outputs).values()])
                for outputs in found[name].values()
            ]
            if not np.allclose(values, oracle_outputs(self.artifact, np.array(rows)), 1e-5, 1e-5):
                findings.append(f"{name}: wrong outputs")
        for path in self._folder.glob("*.log"):
            text = path.read_text()
            self.seen["times rewound"] += text.count('"kafka_rewound"')
            findings += [f"{path.name}: exception"] * text.count('"exception":')
        return findings


FAULTS: Final[dict[str, Callable[[KafkaRun], None]]] = {
    "consumer killed": lambda run: run.replace_consumer(signal.SIGKILL),
    "consumer terminated": lambda run: run.replace_consumer(signal.SIGTERM),
    "consumer suspended": KafkaRun.suspend_consumer,
    "store killed": KafkaRun.kill_store,
    "store rolled back": KafkaRun.roll_back_store,
    "broker stopped": KafkaRun.stop_broker,
}


def run(seed: int, faults: int) -> tuple[Counter[str], list[str]]:
    """Run as many faults; returns what was seen, and the findings."""
    os.environ["CARRY_PARTITIONS"] = "8"
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        store = ServerStore("valkey", folder)
        stack.callback(store.stop)
        store.start()
        running = KafkaRun(seed, folder, store, stack.enter_context(running_broker()))
        stack.callback(lambda: [each.fork.kill() for each in running.consumers])
        running.produce(3)
        for at in range(faults):
            kind = [*FAULTS][at % len(FAULTS)]
            FAULTS[kind](running)
            running.seen[kind] += 1
            running.produce(running.random.uniform(*FAULT_EVERY_S))
        return running.seen, running.check()


def main() -> int:
    """Run the faults of the arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults.topics.kafka", description=__doc__
    )
    parser.add_argument("--seed", type=int, default=secrets.randbelow(1 << 31))
    parser.add_argument("--faults", type=int, default=30, help="faults, in turns (30)")
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    seen, findings = run(options.seed, options.faults)
    print(*(f"{name}: {count}" for name, count in seen.items()), *findings[:20], sep="\n")
    return int(bool(findings))


if __name__ == "__main__":
    sys.exit(main())
