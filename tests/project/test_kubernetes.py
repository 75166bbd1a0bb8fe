"""The Kubernetes manifests: valid, consistent with the settings, and with each other."""

from __future__ import annotations

import subprocess
from pathlib import PurePosixPath
from typing import Any

import kubernetes_validate
import pytest
import yaml

from service.settings import Settings
from tests.support.needs import needs_tools
from tests.support.pages import ROOT

pytestmark = needs_tools("kubectl")

KUBERNETES = ROOT / "deploy" / "kubernetes"
EXTENSIONS = {"ServiceMonitor", "ScaledObject"}
"""Kinds of other projects, whose schemas Kubernetes does not have."""

MARGIN_S = 7
"""What a service takes at most beyond its drain time (docs/reference/process.md)."""


def manifests(overlay: str) -> dict[str, dict[str, Any]]:
    """The manifests of an overlay by kind."""
    done = subprocess.run(
        ["kubectl", "kustomize", str(KUBERNETES / overlay)],
        check=True,
        capture_output=True,
        text=True,
    )
    return {each["kind"]: each for each in yaml.safe_load_all(done.stdout)}


@pytest.mark.parametrize("overlay", ["base", "overlays/cluster", "overlays/keda"])
def test_manifests_are_valid_and_select_the_same_pods(overlay: str) -> None:
    found = manifests(overlay)
    for kind, manifest in found.items():
        if kind not in EXTENSIONS:
            kubernetes_validate.validate(manifest, "1.32", strict=True)
    labels = found["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert found["Deployment"]["spec"]["selector"]["matchLabels"] == labels
    assert found["Service"]["spec"]["selector"] == labels
    assert found["Service"]["metadata"]["labels"] == labels
    assert found["ServiceMonitor"]["spec"]["selector"]["matchLabels"] == labels
    assert found["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    policy = found["NetworkPolicy"]["spec"]
    assert policy["podSelector"]["matchLabels"] == labels
    assert (
        not labels.items() & policy["ingress"][0]["from"][0]["podSelector"]["matchLabels"].items()
    )
    monitor = found["ServiceMonitor"]["spec"]["endpoints"]
    assert [each["port"] for each in monitor] == ["admin"]
    reached = {each["ports"][0]["port"]: each["from"] for each in policy["ingress"]}
    assert set(reached) == {each["name"] for each in found["Service"]["spec"]["ports"]}
    assert all(set(each) == {"namespaceSelector"} for each in reached["admin"])
    scaler = found.get("ScaledObject") or found["HorizontalPodAutoscaler"]
    assert scaler["spec"]["scaleTargetRef"]["name"] == found["Deployment"]["metadata"]["name"]


@pytest.mark.parametrize("overlay", ["base", "overlays/cluster"])
def test_settings_and_times_fit_together(overlay: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = manifests(overlay)
    pod = found["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    data = found["ConfigMap"]["data"]
    assert container["envFrom"] == [
        {"configMapRef": {"name": found["ConfigMap"]["metadata"]["name"]}}
    ]
    file = PurePosixPath(data.pop("CARRY_REDIS_PASSWORD_FILE"))
    mounted = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert mounted[str(file.parent)] == "secrets"
    for name, value in data.items():
        monkeypatch.setenv(name, value)
    settings = Settings.load()
    probe = container["readinessProbe"]
    unready_s = probe["periodSeconds"] * probe["failureThreshold"] + probe["timeoutSeconds"]
    assert settings.lame_duck_s > unready_s
    stopped_s = settings.lame_duck_s + settings.drain_s + MARGIN_S
    assert pod["terminationGracePeriodSeconds"] > stopped_s
    assert container["ports"] == [
        {"name": "http", "containerPort": settings.port},
        {"name": "admin", "containerPort": settings.admin_port},
    ]
