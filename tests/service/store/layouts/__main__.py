"""Records the store that a version of Carry writes, for `test_layouts.py`.

Run it when the store's layout changes, before the change, with the name of the last version:

    python -m tests.service.store.layouts NAME [--checkout FOLDER]

The service of the checkout (this one by default) serves a small model with its embedded store, and
streams are fed over HTTP. `NAME/store.json` has every key, what was sent, and the replies; beside
it are the artifact, the append-only file, and a backup if that version makes one.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import redis

from tests.support.servers import free_port, until

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[3]
READY_S = 60
HISTORY = {"CARRY_HISTORY_EVENTS": "6", "CARRY_HISTORY_SNAPSHOTS": "2"}
OF_PROCESSES = b"carry:models:loaded"
"""The key of what each process has loaded."""

MAKE_ARTIFACT = """
import pathlib, sys
from tests.support.pipelines import make_artifact
print(make_artifact(pathlib.Path(sys.argv[1])).path)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name")
    parser.add_argument("--checkout", type=Path, default=ROOT)
    options = parser.parse_args()
    folder = FOLDER / options.name
    folder.mkdir()
    with tempfile.TemporaryDirectory() as data_dir:
        record(folder, options.checkout.resolve(), Path(data_dir))


def record(folder: Path, checkout: Path, data_dir: Path) -> None:
    """Run the service, feed it, and write what it stored."""

    def run(*arguments: str) -> subprocess.Popen[str]:
        environment = {**os.environ, "PYTHONPATH": str(checkout), **HISTORY}
        return subprocess.Popen(
            [sys.executable, *arguments],
            cwd=checkout,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )

    artifact = Path(run("-c", MAKE_ARTIFACT, str(folder)).communicate()[0].strip())
    artifact.rename(folder / "model")
    port = free_port()
    options = ("--models", str(folder / "model"), "--data-dir", str(data_dir))
    service = run("-m", "carry.cli", "serve", "--port", str(port), *options)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            until(lambda: _is_ready(client), "the service", READY_S)
            streams = feed(client)
            token = state_token(client)
        keys = _read_keys(data_dir)
    finally:
        service.terminate()
        service.communicate()
    document = {"streams": streams, "token": token, "keys": keys}
    (folder / "store.json").write_text(json.dumps(document) + "\n")
    shutil.copytree(data_dir / "appendonlydir", folder / "appendonlydir")
    backup = run("-m", "carry.cli", "backup", str(folder / "backup"), "--data-dir", str(data_dir))
    backup.communicate()


def _read_keys(data_dir: Path) -> dict[str, Any]:
    """Every key of the running embedded store: a string, list or hash, in base64."""
    socket = json.loads((data_dir / "valkey.json").read_text())["socket"]
    with redis.Redis(unix_socket_path=socket) as client:
        names = [name for name in sorted(client.keys()) if name != OF_PROCESSES]
        return {name.decode(): read_key(client, name) for name in names}


def read_key(client: redis.Redis, name: bytes | str) -> Any:
    """The value of a key as JSON has it; None if there is none."""
    kind = client.type(name)
    if kind == b"list":
        return list(map(_text_of, client.lrange(name, 0, -1)))
    if kind == b"hash":
        fields = client.hgetall(name)
        return {_text_of(field): _text_of(value) for field, value in sorted(fields.items())}
    return _text_of(client.get(name)) if kind == b"string" else None


def write_key(client: redis.Redis, name: str, value: Any) -> None:
    """The inverse of `read_key`, of a key that does not exist."""
    if isinstance(value, list):
        client.rpush(name, *map(base64.b64decode, value))
    elif isinstance(value, dict):
        decode = base64.b64decode
        client.hset(name, mapping={decode(each): decode(text) for each, text in value.items()})
    else:
        client.set(name, base64.b64decode(value))


def _text_of(value: bytes) -> str:
    return base64.b64encode(value).decode()


def _is_ready(client: httpx.Client) -> bool:
    try:
        return client.get("/health/ready").status_code == 200
    except httpx.HTTPError:
        return False


def feed(client: httpx.Client) -> dict[str, Any]:
    """Feed streams that end differently; returns their rows and last replies."""
    random = np.random.default_rng(7)
    streams: dict[str, Any] = {}

    def send(stream: str, position: int, count: int) -> None:
        rows = random.normal(size=(count, 3)).astype(np.float32).tolist()
        url = f"/v1/models/probe/streams/{stream}/chunks"
        body = {"position": position, "inputs": rows}
        reply = client.post(url, json=body).raise_for_status().json()
        entry = streams.setdefault(stream, {"inputs": []})
        entry["inputs"] += rows
        entry |= {"last": body, "reply": reply}

    send("one", 0, 3)
    send("several", 0, 3)
    send("several", 3, 1)
    send("several", 4, 5)
    # exists at position 0 before its first chunk, which therefore did not create it
    send("source", 0, 2)
    stored = client.get("/v1/models/probe/streams/source/state").raise_for_status().json()
    url = "/v1/models/probe/streams/restored/state"
    client.put(url, json={**stored, "position": 0}).raise_for_status()
    send("restored", 0, 2)
    streams["restored"]["inputs"] = streams["source"]["inputs"] + streams["restored"]["inputs"]
    send("deleted", 0, 4)
    client.delete("/v1/models/probe/streams/deleted").raise_for_status()
    return streams


def state_token(client: httpx.Client) -> dict[str, Any] | None:
    """A token of the state after a sequence; None if the version has none."""
    inputs = np.random.default_rng(8).normal(size=(4, 3)).astype(np.float32).tolist()
    url = "/v1/models/probe/predict?return_state_token=true"
    response = client.post(url, json={"sequences": [{"inputs": inputs}]})
    if response.is_client_error:
        return None
    (prediction,) = response.raise_for_status().json()["predictions"]
    return {"inputs": inputs, "token": prediction["state_token"]}


if __name__ == "__main__":
    main()
