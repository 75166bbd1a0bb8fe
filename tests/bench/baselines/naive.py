"""A hand-written service as a first attempt looks: Keras `predict` behind FastAPI.

    BENCH_ARTIFACT=DIR BENCH_SOCKET=PATH uvicorn tests.bench.baselines.naive:app

The model takes and returns its layers' states, as the Keras guide shows; each request reads
the stream's states from Redis, calls `predict`, and writes them back. It knows the benchmark's
network only: LSTM layers, then one Dense head. It loses updates as `competent` does.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import keras
import numpy as np
import redis
from fastapi import FastAPI
from pydantic import BaseModel
from safetensors.numpy import load_file

artifact = Path(os.environ["BENCH_ARTIFACT"])
spec = json.loads((artifact / "manifest.json").read_text())["spec"]
weights = load_file(artifact / "weights.safetensors")


def build() -> keras.Model:
    """Events and states in, outputs and states out."""
    events = keras.Input((None, spec["features"]))
    states_in, states_out = [], []
    x: Any = events
    layers = []
    for layer in spec["layers"]:
        pair = [keras.Input((layer["units"],)), keras.Input((layer["units"],))]
        lstm = keras.layers.LSTM(layer["units"], return_sequences=True, return_state=True)
        x, hidden, carry = lstm(x, initial_state=pair)
        states_in += pair
        states_out += [hidden, carry]
        layers.append((layer["name"], lstm))
    head = spec["heads"][0]
    dense = keras.layers.Dense(head["units"])
    x = dense(x)
    model = keras.Model([events, *states_in], [x, *states_out])
    for name, lstm in layers:
        kinds = ("kernel", "recurrent_kernel", "bias")
        lstm.set_weights([weights[f"{name}.{kind}"] for kind in kinds])
    dense.set_weights([weights[f"heads.{head['name']}.{kind}"] for kind in ("kernel", "bias")])
    return model


model = build()
sizes = [size for layer in spec["layers"] for size in (layer["units"], layer["units"])]
ends = np.cumsum(sizes)[:-1]
store = redis.Redis(unix_socket_path=os.environ["BENCH_SOCKET"])
app = FastAPI()


class ChunkBody(BaseModel):
    """What a client sends."""

    position: int | None = None
    inputs: list[list[float]]


@app.post("/v1/models/{name}/streams/{stream}/chunks")
async def post_chunk(name: str, stream: str, body: ChunkBody) -> dict[str, Any]:
    """Continue the stream by one chunk."""
    stored = store.get(f"{name}:{stream}:state")
    position = int(store.get(f"{name}:{stream}:position") or 0)
    packed = np.zeros(sum(sizes), np.float32) if stored is None else np.frombuffer(stored, "f4")
    states = [part[None] for part in np.split(packed, ends)]
    outputs, *after = model.predict([np.array([body.inputs], "f4"), *states], verbose=0)
    position += len(body.inputs)
    store.set(f"{name}:{stream}:state", np.concatenate(after, axis=1).tobytes())
    store.set(f"{name}:{stream}:position", position)
    head = spec["heads"][0]["name"]
    return {"stream": stream, "position": position, "outputs": {head: outputs[0].tolist()}}
