"""The image's target `lean`: it serves the pretrained model without TensorFlow."""

from __future__ import annotations

import ast
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from websockets.sync.client import connect

from tests.support.servers import until
from tests.support.v2_messages import callable_of, message_class, read_outputs

pytestmark = [pytest.mark.compose, pytest.mark.timeout(900)]

REPOSITORY = Path(__file__).resolve().parents[2]
IMAGE = "carry-test:lean"
READY_S = 60
LAYERS_MB = 150
"""Bound of what the image adds to the purged base image."""
IMAGE_MB = 250


def docker(*arguments: str) -> str:
    done = subprocess.run(
        ["docker", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.fail(f"docker {' '.join(arguments)}:\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
    return done.stdout.strip()


@pytest.fixture(scope="module")
def container() -> Iterator[str]:
    """A running container of the image, on a free port, with a store of its own."""
    # the argument without a value is taken from the environment, if it is there
    docker("build", "--build-arg", "PYTHON_IMAGE", "--target", "lean", "--tag", IMAGE, ".")
    options = ["--read-only", "--tmpfs", "/tmp", "--tmpfs", "/data:uid=10001,mode=0700"]
    options += ["--cap-drop", "ALL", "--memory", "256m"]
    options += ["--publish", "127.0.0.1::8000", "--publish", "127.0.0.1::8001"]
    options += ["--env", "CARRY_INSECURE=1", "--env", "CARRY_GRPC_PORT=8001"]
    started = docker("run", "--detach", "--rm", *options, IMAGE)
    try:
        yield started
    finally:
        docker("stop", "--time", "40", started)


def address(container: str, port: int) -> str:
    return docker("port", container, f"{port}/tcp").splitlines()[0]


def ready(container: str) -> str:
    """The URL, once it answers that it is ready."""
    url = f"http://{address(container, 8000)}"

    def answers() -> bool:
        try:
            return httpx.get(f"{url}/health/ready", timeout=5).status_code == 200
        except httpx.HTTPError:
            return False

    until(answers, "the container", READY_S)
    return url


def test_the_lean_image_serves_without_tensorflow(container: str) -> None:
    url = ready(container)
    assert "script" in httpx.get(f"{url}/console/").raise_for_status().text
    assert httpx.get(f"{url}/docs").raise_for_status().is_success
    seek = "import importlib.util as u; print(u.find_spec('tensorflow'), u.find_spec('keras'))"
    assert docker("exec", container, "python", "-c", seek) == "None None"
    assert_sbom_is_complete(container)


def test_each_transport_of_the_lean_image_continues_the_stream(container: str) -> None:
    url = ready(container)
    events = json.loads((REPOSITORY / "examples" / "first-chunk.json").read_text())["events"]
    path = "/v1/models/flights/streams/{}/chunks"

    def send(stream: str, *chunk: Any) -> list[float]:
        reply = httpx.post(url + path.format(stream), json={"events": chunk}, timeout=60)
        outputs: list[float] = reply.raise_for_status().json()["outputs"]["late"]
        return outputs

    outputs = send("parts", events[0])

    tensor = {"name": "events", "datatype": "BYTES", "shape": [1], "data": [json.dumps(events[1])]}
    body = {"inputs": [tensor], "parameters": {"sequence_id": "parts", "position": 1}}
    v2 = httpx.post(f"{url}/v2/models/flights/infer", json=body, timeout=60).raise_for_status()
    outputs += next(each["data"] for each in v2.json()["outputs"] if each["name"] == "late")

    message = message_class("ModelInferRequest")(model_name="flights")
    sent = message.inputs.add(name="events", datatype="BYTES", shape=[1])
    sent.contents.bytes_contents.append(json.dumps(events[2]).encode())
    message.parameters["sequence_id"].string_param = "parts"
    with grpc.insecure_channel(address(container, 8001)) as channel:
        outputs += read_outputs(callable_of(channel, "ModelInfer")(message))["late"].tolist()

    with connect(f"ws{url[4:]}/v1/models/flights/streams/parts/live") as socket:
        assert json.loads(socket.recv())["hello"]["position"] == 3
        socket.send(json.dumps({"position": 3, "events": events[3:]}))
        outputs += json.loads(socket.recv())["reply"]["outputs"]["late"]
    assert outputs == pytest.approx(send("whole", *events), rel=1e-5)


def test_the_lean_image_is_small(container: str) -> None:
    layers = docker("history", "--format", "{{.Size}}", "--human=false", IMAGE).split()
    size, base = sum(map(int, layers)), int(layers[-1])
    print(f"  the lean image: {size / 1e6:.0f} MB, {(size - base) / 1e6:.0f} MB without its base")
    assert size - base <= LAYERS_MB * 1e6
    image = os.environ.get("PYTHON_IMAGE", "python:3.13-slim")
    environment = docker("image", "inspect", "--format", "{{.Config.Env}}", image)
    # set in Docker's official images only
    if "PYTHON_VERSION=3.13" in environment:
        assert size <= IMAGE_MB * 1e6


def assert_sbom_is_complete(container: str) -> None:
    """The bill of materials names every package of the container, and the service itself."""
    sbom = json.loads(docker("exec", container, "cat", "/opt/carry/sbom.cdx.json"))
    assert sbom["bomFormat"] == "CycloneDX"
    listed = {(each["name"], each["version"]) for each in sbom["components"]}
    service = sbom["metadata"]["component"]
    listed.add((service["name"], service["version"]))
    lister = (
        "import importlib.metadata as m; print([(d.name, d.version) for d in m.distributions()])"
    )
    assert listed == set(ast.literal_eval(docker("exec", container, "python", "-c", lister)))
    print(f"  the bill of materials: {len(listed)} packages")
