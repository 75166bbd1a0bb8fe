"""KServe's objects: valid, consistent with each other and with the settings.

The schema of KServe's resources is large; the fields that are used were compared with it (version
0.20.0), and what they contain of Kubernetes is validated here as a pod.
"""

from __future__ import annotations

import tomllib
from typing import Any

import kubernetes_validate
import pytest
import yaml

from service.settings import Settings
from tests.project.test_kubernetes import MARGIN_S
from tests.support.pages import ROOT

FOLDER = ROOT / "deploy" / "kserve"
SCALING = {"minReplicas", "maxReplicas", "scaleMetric", "scaleTarget", "deploymentStrategy"}
"""What KServe adds to the fields of a pod, in a predictor."""


def spec_of(name: str) -> dict[str, Any]:
    return yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))["spec"]


def test_objects_are_consistent_and_what_they_contain_is_valid(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runtime, predictor = spec_of("serving-runtime"), spec_of("inference-service")["predictor"]
    (container,) = runtime["containers"]
    pod = {key: value for key, value in predictor.items() if key not in {*SCALING, "model"}}
    pod |= {"containers": [container], "volumes": runtime["volumes"]}
    manifest = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, "spec": pod}
    kubernetes_validate.validate(manifest, "1.34", strict=True)

    model = predictor["model"]
    (format_,) = runtime["supportedModelFormats"]
    assert (model["modelFormat"]["name"], format_["autoSelect"]) == (format_["name"], True)
    assert model["protocolVersion"] in runtime["protocolVersions"]
    # KServe finds the container by its name, and mounts the models at this path
    assert container["name"] == "kserve-container"
    for each in container["env"]:
        if "value" in each:
            monkeypatch.setenv(each["name"], each["value"])
    settings = Settings.load()
    assert str(settings.models.models_dir) == "/mnt/models"
    ports = {each["name"]: each["containerPort"] for each in container["ports"]}
    # the first one is port 80 of the service
    assert list(ports.items()) == [("http", settings.http.port), ("grpc", settings.v2.grpc_port)]
    assert runtime["annotations"]["prometheus.kserve.io/port"] == str(settings.http.admin_port)
    stopped_s = settings.processes.lame_duck_s + settings.processes.drain_s + MARGIN_S
    assert predictor["terminationGracePeriodSeconds"] > stopped_s
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert container["image"] == f"carry:{version}"
