"""The image's target `lean`: it serves the pretrained model without TensorFlow."""

from __future__ import annotations

import ast
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.servers import until

pytestmark = [pytest.mark.compose, pytest.mark.timeout(900)]

REPOSITORY = Path(__file__).resolve().parents[2]
IMAGE = "carry-test:lean"
READY_S = 60


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
    options += ["--cap-drop", "ALL", "--memory", "256m", "--publish", "127.0.0.1::8000"]
    options += ["--env", "CARRY_INSECURE=1"]
    started = docker("run", "--detach", "--rm", *options, IMAGE)
    try:
        yield started
    finally:
        docker("stop", "--time", "40", started)


def ready(container: str) -> str:
    """The address, once it answers that it is ready."""
    port = docker("port", container, "8000/tcp").rpartition(":")[2]
    url = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        try:
            return httpx.get(f"{url}/health/ready", timeout=5).status_code == 200
        except httpx.HTTPError:
            return False

    until(answers, "the container", READY_S)
    return url


def test_the_lean_image_serves_without_tensorflow(container: str) -> None:
    url = ready(container)
    body = json.loads((REPOSITORY / "examples" / "first-chunk.json").read_text())
    path = "/v1/models/flights/streams/lean/chunks"
    reply: dict[str, Any] = httpx.post(url + path, json=body, timeout=60).raise_for_status().json()
    assert reply["position"] == len(body["events"])
    assert len(reply["outputs"]["late"]) == len(body["events"])
    assert "script" in httpx.get(f"{url}/console/").raise_for_status().text
    seek = "import importlib.util as u; print(u.find_spec('tensorflow'), u.find_spec('keras'))"
    assert docker("exec", container, "python", "-c", seek) == "None None"
    assert_sbom_is_complete(container)
    image = json.loads(docker("image", "inspect", IMAGE))[0]
    print(f"  the lean image: {image['Size'] / 2**20:.0f} MiB")


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
