"""The Kubernetes manifests: valid, consistent with the settings, and with each other."""

from __future__ import annotations

import subprocess
import textwrap
import tomllib
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import kubernetes_validate
import pytest
import yaml

from service.consumers.config import make_config
from service.settings import Settings
from tests.support.monitoring import DASHBOARDS, RULES, check_rules, rule_test
from tests.support.needs import needs_tools
from tests.support.pages import ROOT

pytestmark = needs_tools("kubectl")

KUBERNETES = ROOT / "deploy" / "kubernetes"
OVERLAYS = {
    "base": ["redis"],
    "overlays/cluster": ["redis-cluster"],
    "overlays/gateway": ["redis"],
    "overlays/keda": ["redis"],
    "overlays/sentinel": ["redis", "redis-sentinel"],
}
"""Names of the pods of each one's store."""

CONSUMER = "consumer"
"""The folder of the manifests of consumers, which do not need the base."""

EXTENSIONS = {
    "Gateway", "GRPCRoute", "HTTPRoute", "PodMonitor", "PrometheusRule", "ScaledObject",
    "ServiceMonitor",
}  # fmt: skip
"""Kinds of other projects, whose schemas Kubernetes does not have."""

MARGIN_S = 7
"""What a service takes at most beyond its drain time (docs/reference/process.md)."""

PROXY_IDLE_S = {"base": 90, "overlays/gateway": 600}
"""How long an ingress keeps an idle connection: Traefik's, and Google's gateways'. Those of nginx
and AWS keep it for 60 s."""


@cache
def rendered(overlay: str) -> str:
    """The manifests of an overlay."""
    command = ["kubectl", "kustomize", str(KUBERNETES / overlay)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def manifests(overlay: str) -> dict[str, dict[str, Any]]:
    """The manifests of an overlay by kind; the dashboards as `Dashboards`, and the configuration of
    a consumer as `Consumer`."""
    found = {}
    for each in yaml.safe_load_all(rendered(overlay)):
        kind = each["kind"]
        if each["metadata"]["name"] == "carry-dashboards":
            kind = "Dashboards"
        elif "consumer.yaml" in each.get("data", {}):
            kind = "Consumer"
        assert kind not in found
        found[kind] = each
    return found


def validate(found: dict[str, dict[str, Any]]) -> None:
    """Check manifests by the schemas of Kubernetes."""
    for kind, manifest in found.items():
        if kind not in EXTENSIONS:
            kubernetes_validate.validate(manifest, "1.32", strict=True)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_manifests_are_valid_and_select_the_same_pods(overlay: str) -> None:
    found = manifests(overlay)
    validate(found)
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
    monitor = found["ServiceMonitor"]["spec"]
    assert [each["port"] for each in monitor["endpoints"]] == ["admin"]
    # the job that the alerts name
    assert labels[monitor["jobLabel"]] == "carry"
    reached = {port["port"]: rule["from"] for rule in policy["ingress"] for port in rule["ports"]}
    assert set(reached) == {each["name"] for each in found["Service"]["spec"]["ports"]}
    assert all(set(each) == {"namespaceSelector"} for each in reached["admin"])
    scaler = found.get("ScaledObject") or found["HorizontalPodAutoscaler"]
    assert scaler["spec"]["scaleTargetRef"]["name"] == found["Deployment"]["metadata"]["name"]


@pytest.mark.parametrize("overlay", OVERLAYS)
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
    assert settings.processes.lame_duck_s > unready_s
    stopped_s = settings.processes.lame_duck_s + settings.processes.drain_s + MARGIN_S
    assert pod["terminationGracePeriodSeconds"] > stopped_s
    assert settings.connections.keep_alive_s > PROXY_IDLE_S.get(overlay, PROXY_IDLE_S["base"])
    ports = {
        "http": settings.http.port,
        "admin": settings.http.admin_port,
        "grpc": settings.v2.grpc_port,
    }
    assert {each["name"]: each["containerPort"] for each in container["ports"]} == {
        name: port for name, port in ports.items() if port is not None
    }


@pytest.mark.parametrize(("overlay", "pods"), [*OVERLAYS.items(), (CONSUMER, ["redis"])])
def test_egress_is_limited_to_the_store(overlay: str, pods: list[str]) -> None:
    found = manifests(overlay)
    store, *others = found["NetworkPolicy"]["spec"]["egress"]
    assert store["to"] == [
        {"podSelector": {"matchLabels": {"app.kubernetes.io/name": name}}} for name in pods
    ]
    named = urlsplit(found["ConfigMap"]["data"]["CARRY_REDIS_URL"]).netloc.rpartition("@")[2]
    hosts = [host.partition(":") for host in named.split(",")]
    # pods of a StatefulSet are named below their service
    assert {name.rpartition(".")[2] for name, _, _ in hosts} <= set(pods)
    reached = {each["port"] for each in store["ports"]}
    # the Sentinels name the servers
    assert reached == {6379, *(int(port) for _, _, port in hosts)}
    assert all(rule["to"] and rule["ports"] for rule in others)


@pytest.mark.parametrize("folder", ["base", CONSUMER])
def test_image_has_the_tag_of_the_version(folder: str) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    (container,) = manifests(folder)["Deployment"]["spec"]["template"]["spec"]["containers"]
    assert container["image"] == f"carry:{version}"


def test_consumers_are_valid_and_apart_from_the_service(monkeypatch: pytest.MonkeyPatch) -> None:
    found = manifests(CONSUMER)
    validate(found)
    pod = found["Deployment"]["spec"]["template"]
    labels = pod["metadata"]["labels"]
    for kind in ("Deployment", "PodDisruptionBudget", "PodMonitor"):
        assert found[kind]["spec"]["selector"]["matchLabels"] == labels, kind
    assert found["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"] == labels
    # the service's own selectors do not find them
    assert manifests("base")["Service"]["spec"]["selector"] != labels
    (rule,) = found["NetworkPolicy"]["spec"]["ingress"]
    assert all(set(each) == {"namespaceSelector"} for each in rule["from"])

    (container,) = pod["spec"]["containers"]
    mounts = {each["mountPath"]: each["name"] for each in container["volumeMounts"]}
    volumes = {each["name"]: each for each in pod["spec"]["volumes"]}
    command, path = container["args"]
    assert (command, PurePosixPath(path).name) == ("consume", "consumer.yaml")
    volume = volumes[mounts[str(PurePosixPath(path).parent)]]
    assert volume["configMap"]["name"] == found["Consumer"]["metadata"]["name"]
    data = dict(found["ConfigMap"]["data"])
    file = PurePosixPath(data.pop("CARRY_REDIS_PASSWORD_FILE"))
    assert mounts[str(file.parent)] == "secrets"
    for name, value in data.items():
        monkeypatch.setenv(name, value)
    settings = Settings.load()
    assert (settings.http.admin_host, urlsplit(data["CARRY_REDIS_URL"]).username) == (
        "0.0.0.0",
        "consumer",
    )
    (port,) = container["ports"]
    assert (port["containerPort"], port["name"]) == (settings.http.admin_port, "admin")
    (endpoint,) = found["PodMonitor"]["spec"]["podMetricsEndpoints"]
    assert endpoint["port"] == port["name"]
    assert {rule["ports"][0]["port"]} == {port["name"]}
    stopped_s = settings.processes.drain_s + MARGIN_S
    assert pod["spec"]["terminationGracePeriodSeconds"] > stopped_s


@needs_tools("promtool")
def test_consumers_scale_by_the_lag_of_their_topic(tmp_path: Path) -> None:
    found = manifests(CONSUMER)
    config = make_config(yaml.safe_load(found["Consumer"]["data"]["consumer.yaml"]), "manifest")
    assert config.partitioned
    scaler = found["ScaledObject"]["spec"]
    assert scaler["scaleTargetRef"]["name"] == found["Deployment"]["metadata"]["name"]
    trigger = scaler["triggers"][0]["metadata"]
    series = {
        f'carry_consumer_lag{{pod="{pod}",topic="{topic}"}}': f"{lag}x9"
        for pod, topic, lag in (
            ("a", config.source, 3000), ("b", config.source, 4000), ("b", "other", 9000)
        )
    }  # fmt: skip
    samples = [{"labels": "{}", "value": 7000}]
    expected = {"expr": trigger["query"], "eval_time": "5m", "exp_samples": samples}
    check_rules(tmp_path, [rule_test("query", series, promql_expr_test=[expected])])
    # without metrics KEDA reports an error, and the number of pods stays
    assert trigger["ignoreNullValues"] == "false"


def test_rules_and_dashboards_are_those_of_the_files() -> None:
    found = manifests("base")
    dashboards = {path.name: path.read_text(encoding="utf-8") for path in DASHBOARDS}
    assert found["Dashboards"]["data"] == dashboards
    manifest = KUBERNETES / "base" / "prometheus-rule.yaml"
    _, _, spec = manifest.read_text(encoding="utf-8").partition("\nspec:\n")
    _, start, groups = RULES.read_text(encoding="utf-8").partition("groups:\n")
    assert spec == textwrap.indent(start + groups, "  "), "`make rules` writes it"
    assert found["PrometheusRule"]["spec"] == yaml.safe_load(RULES.read_text(encoding="utf-8"))


def test_gateway_routes_to_ports_of_the_service() -> None:
    found = manifests("overlays/gateway")
    service = found["Service"]
    ports = {each["name"]: each for each in service["spec"]["ports"]}
    routes = {"http": found["HTTPRoute"]["spec"], "grpc": found["GRPCRoute"]["spec"]}
    for name, route in routes.items():
        assert [each["name"] for each in route["parentRefs"]] == [
            found["Gateway"]["metadata"]["name"]
        ]
        ((backend,),) = [rule["backendRefs"] for rule in route["rules"]]
        assert backend == {"name": service["metadata"]["name"], "port": ports[name]["port"]}
    # a listener rejects the second kind of route for a host
    assert not set(routes["http"]["hostnames"]) & set(routes["grpc"]["hostnames"])
    assert ports["grpc"]["appProtocol"] == "kubernetes.io/h2c"


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
    check_rules(tmp_path, [rule_test("query", series, promql_expr_test=[expected])])
    # without metrics KEDA reports an error, and the number of pods stays
    assert trigger["ignoreNullValues"] == "false"
