"""A hand-written consumer as a competent team would first write it: ONNX Runtime in a loop.

    BENCH_ARTIFACT=DIR BENCH_SOCKET=PATH python -m tests.bench.baselines.loop SOURCE SINK

Many entries are read at a time; for each of them the state is read from a hash, the network runs,
and state, output and acknowledgement are written in one transaction. It lacks what `carry consume`
is for: events of different streams are not batched, a second process would lose updates of states,
and an entry that is read but not acknowledged is not processed after a restart.
"""

import os
import sys
from pathlib import Path

import numpy as np
import orjson
import redis

from models.artifact.artifact import load_artifact
from models.onnx.library import onnxruntime as ort

GROUP, NAME = "loop", "only"
READ_AT_ONCE = 100


def main(source: str, sink: str) -> None:
    """Consume until the process is ended."""
    folder = Path(os.environ["BENCH_ARTIFACT"])
    artifact = load_artifact(folder)
    output = artifact.outputs.outputs[0].name
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    graph = str(folder / "graph.onnx")
    session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    store = redis.Redis(unix_socket_path=os.environ["BENCH_SOCKET"])
    store.xgroup_create(source, GROUP, "0", mkstream=True)
    initial = np.zeros((1, artifact.state.float_size), np.float32)
    lengths = np.ones(1, np.int32)
    while True:
        for _, entries in store.xreadgroup(GROUP, NAME, {source: ">"}, READ_AT_ONCE, block=100):
            for entry_id, fields in entries:
                key = b"loop:" + fields[b"stream"]
                stored, counted = store.hmget(key, "state", "position")
                position = int(counted or 0)
                state = initial
                if stored is not None:
                    state = np.frombuffer(stored, np.float32).reshape(1, -1)
                rows = np.array([[orjson.loads(fields[b"event"])]], np.float32)
                sent = {"rows": rows, "lengths": lengths, "states": state}
                outputs, after = session.run(None, sent)
                written = orjson.dumps({output: outputs[0, 0]}, option=orjson.OPT_SERIALIZE_NUMPY)
                entry = {"stream": fields[b"stream"], "position": position, "outputs": written}
                with store.pipeline(transaction=True) as pipe:
                    pipe.hset(key, mapping={"state": after.tobytes(), "position": position + 1})
                    pipe.xadd(sink, entry).xack(source, GROUP, entry_id).execute()


if __name__ == "__main__":
    main(*sys.argv[1:])
