"""A hand-written service as a competent team would first write it: ONNX Runtime behind FastAPI.

    BENCH_ARTIFACT=DIR BENCH_SOCKET=PATH uvicorn tests.bench.baselines.competent:app

One request, one chunk: read state and position from Redis in one pipeline, run the network,
write both back in one transaction, answer. Everything it uses is quick (pydantic reads the
body, orjson writes the reply, redis.asyncio keeps its connections, one compute thread). What
it lacks is what Carry is for: requests are not batched, and between the read and the write of
a stream another request may read, so that concurrent chunks of one stream lose updates.
"""

import json
import os
from pathlib import Path
from typing import Annotated

import numpy as np
import orjson
import redis.asyncio as redis
from fastapi import FastAPI, Response
from pydantic import BaseModel, Field

from models.onnx.library import onnxruntime as ort

artifact = Path(os.environ["BENCH_ARTIFACT"])
manifest = json.loads((artifact / "manifest.json").read_text())
STATE_VALUES = sum(int(np.prod(part["shape"])) for part in manifest["state"].values())
OUTPUT = next(iter(manifest["outputs"]))

options = ort.SessionOptions()
options.intra_op_num_threads = 1
options.inter_op_num_threads = 1
session = ort.InferenceSession(
    str(artifact / "graph.onnx"), options, providers=["CPUExecutionProvider"]
)
store = redis.Redis(unix_socket_path=os.environ["BENCH_SOCKET"])
app = FastAPI()


class ChunkBody(BaseModel):
    """What a client sends."""

    position: Annotated[int, Field(ge=0)] | None = None
    inputs: list[list[float]]


@app.post("/v1/models/{model}/streams/{stream}/chunks")
async def post_chunk(model: str, stream: str, body: ChunkBody) -> Response:
    """Continue the stream by one chunk."""
    keys = f"{model}:{stream}:state", f"{model}:{stream}:position"
    async with store.pipeline(transaction=False) as pipe:
        stored, counted = await pipe.get(keys[0]).get(keys[1]).execute()
    position = int(counted or 0)
    if body.position is not None and body.position != position:
        return Response(orjson.dumps({"expected": position}), 409, media_type="application/json")
    state = (
        np.zeros((1, STATE_VALUES), np.float32)
        if stored is None
        else np.frombuffer(stored, np.float32).reshape(1, STATE_VALUES)
    )
    rows = np.array([body.inputs], np.float32)
    lengths = np.array([rows.shape[1]], np.int32)
    outputs, after = session.run(None, {"rows": rows, "lengths": lengths, "states": state})
    position += rows.shape[1]
    async with store.pipeline(transaction=True) as pipe:
        await pipe.set(keys[0], after.tobytes()).set(keys[1], position).execute()
    reply = {"stream": stream, "position": position, "outputs": {OUTPUT: outputs[0]}}
    return Response(
        orjson.dumps(reply, option=orjson.OPT_SERIALIZE_NUMPY), media_type="application/json"
    )
