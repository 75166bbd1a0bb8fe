"""A consumer as a team with Kafka would write it: Quix Streams, ONNX Runtime, the state per key.

    BENCH_QUIX=JSON python quix.py broker       # librdkafka's mock broker; reads commands
    BENCH_QUIX=JSON python quix.py app ADDRESS

It runs in an environment of its own (`tests/bench/quix.py`), without this project. The state of a
key is in Quix' local RocksDB and in its changelog topic; events are processed one at a time, at
least once.

The mock broker has no API of administration, so the app takes the topics' configuration from their
metadata (`Topics`); the broker creates topics when they are used.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from typing import Any

import numpy as np
from confluent_kafka import Consumer, Producer, TopicPartition

CONFIG: dict[str, Any] = json.loads(os.environ["BENCH_QUIX"])
SOURCE, SINK, GROUP = "events", "scores", "quix"
ENDS_WITHIN_S = 120.0
PROMPT = {"fetch.wait.max.ms": 10}
"""Unlike others, the mock broker answers a request without messages at the end of its time."""


def serve_broker() -> None:
    """Run a broker. Its address is printed; then, for each line with a list of events (name of the
    stream, number of the body), they are added, and a result is printed once their outputs are
    there: how many are missing, the seconds that it took, and the outputs of the first stream."""
    producer = Producer({"test.mock.num.brokers": 1, "bootstrap.servers": "mock", "linger.ms": 5})
    (broker,) = producer.list_topics(timeout=10).brokers.values()
    address = f"{broker.host}:{broker.port}"
    for name in (SOURCE, SINK):
        producer.list_topics(name, timeout=10)
    outputs = Consumer({"bootstrap.servers": address, "group.id": "bench", **PROMPT})
    partitions = producer.list_topics(SINK, timeout=10).topics[SINK].partitions
    outputs.assign([TopicPartition(SINK, each, 0) for each in partitions])
    print(address, flush=True)
    positions: Counter[str] = Counter()
    for line in sys.stdin:
        events = json.loads(line)
        started_s = time.perf_counter()
        for stream, body in events:
            producer.produce(SOURCE, CONFIG["bodies"][body], stream)
            producer.poll(0)
        producer.flush()
        missing, sampled = len(events), []
        while missing and time.perf_counter() < started_s + ENDS_WITHIN_S:
            for message in outputs.consume(1000, 0.1):
                stream, output = message.key().decode(), json.loads(message.value())
                assert output["position"] == positions[stream], (stream, output, positions[stream])
                positions[stream] += 1
                missing -= 1
                if stream == CONFIG["sampled"]:
                    sampled.append({"outputs": output["outputs"]})
        passed_s = time.perf_counter() - started_s
        result = {"missing": missing, "seconds": passed_s, "sampled": sampled}
        print(json.dumps(result), flush=True)


def run_app(address: str) -> None:
    """Consume until the process is ended."""
    import onnxruntime as ort
    from quixstreams import Application
    from quixstreams.models.topics import TopicAdmin, TopicConfig, TopicManager

    class Topics(TopicAdmin):
        def inspect_topics(self, topic_names: list[str], timeout: float = 30) -> Any:
            retention = {"retention.ms": "604800000", "retention.bytes": "-1"}
            found = {}
            for name in topic_names:
                topic = self.admin_client.list_topics(name, timeout).topics[name]
                found[name] = TopicConfig(len(topic.partitions), 1, retention)
            return found

        def create_topics(self, *_: Any, **__: Any) -> None:
            pass

    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = ort.InferenceSession(CONFIG["graph"], options, providers=["CPUExecutionProvider"])
    initial, lengths = np.zeros((1, CONFIG["state"]), np.float32), np.ones(1, np.int32)

    def step(event: list[float], state: Any) -> dict[str, Any]:
        stored = state.get_bytes("state")
        before = initial if stored is None else np.frombuffer(stored, np.float32).reshape(1, -1)
        rows = np.array([[event]], np.float32)
        outputs, after = session.run(None, {"rows": rows, "lengths": lengths, "states": before})
        position = state.get("position", 0)
        state.set_bytes("state", after.tobytes())
        state.set("position", position + 1)
        return {"position": position, "outputs": {CONFIG["output"]: outputs[0, 0].tolist()}}

    admin = Topics(address, "quix")
    app = Application(
        address,
        consumer_group=GROUP,
        auto_offset_reset="earliest",
        consumer_extra_config=PROMPT,
        state_dir=CONFIG["folder"],
        topic_manager=TopicManager(admin, GROUP),
        loglevel="WARNING",
    )
    source = app.topic(SOURCE, key_deserializer="str", value_deserializer="json")
    sink = app.topic(SINK, key_serializer="str", value_serializer="json")
    app.dataframe(source).apply(step, stateful=True).to_topic(sink)
    app.run()


if __name__ == "__main__":
    if sys.argv[1] == "broker":
        serve_broker()
    else:
        run_app(sys.argv[2])
