"""The Kubernetes manifests: valid, consistent with the settings, and with each other."""

from __future__ import annotations

import math
import subprocess
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import kubernetes_validate
import pytest
import yaml

from service.settings import Settings
from tests.support.monitoring import check_rules
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


def replicas(spec: dict[str, Any], current: int, measured: Sequence[float]) -> int:
    """How many replicas the HPA that KEDA makes wants, from the value of each trigger.

    The documented formula: `Value` and `Utilization` scale the current number by value / target,
    `AverageValue`, KEDA's default, divides the value by the target.
    """
    wanted = []
    for trigger, value in zip(spec["triggers"], measured, strict=True):
        target = float(trigger["metadata"].get("threshold") or trigger["metadata"]["value"])
        is_average = trigger.get("metricType", "AverageValue") == "AverageValue"
        wanted.append(math.ceil((1 if is_average else current) * value / target))
    return int(min(max(*wanted, spec["minReplicaCount"]), spec["maxReplicaCount"]))


@pytest.mark.parametrize(
    ("wait_ms", "cpu_percent", "expected"),
    [(40, 30, 10), (30, 30, 9), (20, 30, 6), (10, 30, 3), (0, 65, 6), (0, 90, 8), (0, 10, 2)],
)
def test_pods_are_added_while_chunks_wait(
    wait_ms: float, cpu_percent: float, expected: int
) -> None:
    spec = manifests("overlays/keda")["ScaledObject"]["spec"]
    assert [trigger["type"] for trigger in spec["triggers"]] == ["prometheus", "cpu"]
    assert replicas(spec, 6, (wait_ms, cpu_percent)) == expected
    assert spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]["scaleDown"] == {
        "stabilizationWindowSeconds": 300,
        "policies": [{"type": "Pods", "value": 1, "periodSeconds": 60}],
    }


@needs_tools("promtool")
@pytest.mark.parametrize(
    ("per_minute", "wait_ms"), [(100, 45), (0, 0), (None, None)], ids=["busy", "idle", "unknown"]
)
def test_scaler_reads_the_wait(
    tmp_path: Path, per_minute: int | None, wait_ms: float | None
) -> None:
    trigger = manifests("overlays/keda")["ScaledObject"]["spec"]["triggers"][0]["metadata"]
    name = 'carry_chunk_stage_seconds_%s{pod="%s",model="flights",stage="queue"%s}'
    # of two pods; half of the chunks wait for up to 50 ms, the others for less
    bounds = {"0.025": 0.5, "0.05": 1, "+Inf": 1}
    series = {}
    if per_minute is not None:
        for pod in ("a", "b"):
            for bound, share in bounds.items():
                values = f"0+{share * per_minute:g}x9"
                series[name % ("bucket", pod, f',le="{bound}"')] = values
            series[name % ("count", pod, "")] = f"0+{per_minute}x9"
    samples = [] if wait_ms is None else [{"labels": "{}", "value": wait_ms}]
    expected = {"expr": trigger["query"], "eval_time": "5m", "exp_samples": samples}
    check_rules(tmp_path, series, promql_expr_test=[expected])
    # without metrics KEDA reports an error, and the number of pods stays
    assert trigger["ignoreNullValues"] == "false"
