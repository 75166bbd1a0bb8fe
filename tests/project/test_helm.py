"""The Helm chart: its objects are those of the Kustomize manifests, and valid in several versions
of Kubernetes; wrong values are rejected by name."""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import redis
import yaml

from service.settings import Settings
from service.start_checks import run_checks
from service.store.embedded import server_binary
from tests.project.test_kubernetes import CONSUMER, EXTENSIONS, MARGIN_S, OVERLAYS, rendered
from tests.support.monitoring import check_rules, rule_test
from tests.support.needs import needs_tools
from tests.support.pages import ROOT, blocks
from tests.support.servers import until

pytestmark = needs_tools("helm", "kubectl")

CHART = ROOT / "deploy" / "helm" / "carry"
VALUES = ROOT / "deploy" / "helm" / "values"
KUBERNETES = ("1.31", "1.34", "1.37")

ADDED = {"Gateway", "GRPCRoute", "HTTPRoute", "ScaledObject"}
"""Kinds to which the overlays add no labels."""
OWN = {
    "app.kubernetes.io/instance", "app.kubernetes.io/component", "app.kubernetes.io/version",
    "app.kubernetes.io/managed-by", "helm.sh/chart", "checksum/settings", "imagePullPolicy",
}  # fmt: skip
"""Members that the Kustomize manifests do not have."""
HASHED = re.compile(r"\b(carry(?:-consumer)?(?:-settings)?)-[2456789bcdfghkmt]{10}\b")
"""Names of Kustomize's config maps, which end with a hash."""

INGRESS = """
grpc: true
expose:
  kind: ingress
  className: nginx
  host: carry.example.com
  grpcHost: grpc.carry.example.com
  annotations: {nginx.ingress.kubernetes.io/proxy-read-timeout: "3600"}
  from: [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: ingress-nginx}}}]
"""
(TEAM,) = [text for _, text in blocks("docs/how-to/deploy.md") if "networkPolicy:" in text]
VARIANTS = {
    "the guide's": TEAM,
    "defaults": "{}",
    "ingress": INGRESS,
    "existing gateway": """
expose: {kind: gateway, host: a.example.com, parentRefs: [{name: b}], from: [{podSelector: {}}]}
""",
    "bundled store": """
store: {bundled: {enabled: true}}
imagePullSecrets: [{name: registry}]
pod: {tolerations: [{key: stores, operator: Exists}]}
""",
    "address in a secret": """
store: {urlKey: url}
networkPolicy: {store: {to: [{ipBlock: {cidr: 10.0.0.0/24}}], ports: [{port: 6380}]}}
""",
    "no secret": """
store: {secret: "", url: "rediss://cache:6379/0"}
autoscaling: {kind: none}
networkPolicy: {enabled: false}
podDisruptionBudget: {enabled: false}
settings: {CARRY_DRAIN_S: 0.5, CARRY_LAME_DUCK_S: 0, CARRY_STATE_CACHE_BYTES: 67108864}
""",
    "values that YAML reads as numbers or aliases if unquoted": """
image: {tag: "1e3"}
store: {secret: "1", bundled: {enabled: true, storageClass: "1", storage: "10"}}
expose: {kind: ingress, className: "1", host: "*.example.com", tlsSecret: "1", from: [{}]}
monitoring: {namespace: "123"}
""",
    "wildcard of a gateway": "expose: {kind: gateway, className: a, host: '*.example.com'}",
    "models of a claim": "models: {claim: models}",
    "models of an image": "models: {image: registry.example.com/models:7}",
    "models of a registry": """
models: {pull: {flights: "models:/flights@champion"}, pullImage: carry-mlflow:1}
pod: {env: [{name: MLFLOW_TRACKING_URI, value: "http://mlflow"}], nodeSelector: {disk: ssd}}
networkPolicy: {egress: [{ports: [{port: 5000}]}]}
""",
    "consumers only": """
serve: false
consumerDefaults: {autoscaling: {kind: hpa}, egress: [{ports: [{port: 9092}]}]}
consumers:
  one: {config: {model: flights, from: "kafka://broker:9092/departures", to: scores}}
  two: {config: {model: rivers, from: levels, to: floods}, autoscaling: {kind: none}, replicas: 3}
""",
}


CONSUMED = "consumers.a.config.model=m,consumers.a.config.from=a,consumers.a.config.to=b"


def helm(*arguments: str | Path, values: str = "{}") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["helm", *arguments, "--values", "-"],
        input=values,
        capture_output=True,
        text=True,
        check=False,
    )


def render(*options: str | Path, values: str = "{}", chart: Path = CHART) -> list[dict[str, Any]]:
    """The objects of the release `carry`."""
    done = helm("template", "carry", chart, *options, values=values)
    assert done.returncode == 0, done.stderr
    return [each for each in yaml.safe_load_all(done.stdout) if each]


def files(*names: str) -> list[str]:
    """Options with files of values."""
    return [f"--values={VALUES / name}.yaml" for name in names]


def normalised(objects: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Objects by kind and name, without what Helm and Kustomize add on their own."""

    def drop(value: Any) -> Any:
        if isinstance(value, list):
            return [drop(each) for each in value]
        if not isinstance(value, dict):
            return value
        kept = {key: drop(each) for key, each in value.items() if key not in OWN}
        for key in ("annotations", "labels", "imagePullSecrets"):
            if not kept.get(key, True):
                del kept[key]
        for key in {"ports", "volumes", "volumeMounts"} & kept.keys():
            kept[key].sort(key=lambda each: json.dumps(each, sort_keys=True))
        if "consumer.yaml" in kept:
            kept["consumer.yaml"] = yaml.safe_load(kept["consumer.yaml"])
        return kept

    return {f"{each['kind']} {each['metadata']['name']}": drop(each) for each in objects}


@pytest.mark.parametrize("overlay", [*OVERLAYS, CONSUMER])
def test_objects_are_those_of_the_kustomization(overlay: str) -> None:
    name = Path(overlay).name
    objects = render(*files("monitoring", *([] if name == "base" else [name])))
    if overlay == CONSUMER:
        label = "app.kubernetes.io/name"
        objects = [each for each in objects if each["metadata"]["labels"][label] != "carry"]
    ours = json.dumps(objects).replace("carry-consumer-departures", "carry-consumer")
    theirs = list(yaml.safe_load_all(HASHED.sub(r"\1", rendered(overlay))))
    for each in theirs:
        if overlay != CONSUMER and each["kind"] in ADDED:
            each["metadata"]["labels"] = {"app.kubernetes.io/name": "carry"}
    assert normalised(json.loads(ours)) == normalised(theirs)


@pytest.mark.parametrize("name", [*VARIANTS, *(path.stem for path in VALUES.glob("*.yaml"))])
def test_objects_are_valid(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = files() if name in VARIANTS else files(name)
    objects = render(*options, values=VARIANTS.get(name, "{}"))
    names = [(each["kind"], each["metadata"]["name"]) for each in objects]
    assert len(set(names)) == len(names)
    for each in objects:
        for version in () if each["kind"] in EXTENSIONS else KUBERNETES:
            kubernetes_validate.validate(each, version, strict=True)
    settings_of = {each["metadata"]["name"]: each.get("data", {}) for each in objects}
    for each in objects:
        if each["kind"] != "Deployment":
            continue
        pod = each["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        (source,) = container["envFrom"]
        with monkeypatch.context() as patched:
            for key, value in settings_of[source["configMapRef"]["name"]].items():
                if not key.endswith("_PASSWORD_FILE"):
                    patched.setenv(key, value)
            settings = Settings.load()
        stopped_s = settings.processes.lame_duck_s + settings.processes.drain_s + MARGIN_S
        assert pod["terminationGracePeriodSeconds"] > stopped_s
        mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
        assert len(set(mounts)) == len(mounts)
        assert {mount["name"] for mount in container["volumeMounts"]} == {
            volume["name"] for volume in pod["volumes"]
        }
        folder = settings.models.models_dir
        assert ("/models" in mounts) == (Path("/models") in (folder, folder.parent))


def test_lint_has_no_warning() -> None:
    done = helm("lint", "--strict", CHART)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("option", "named"),
    [
        ("replica=3", "replica"),
        ("replicas=none", "replicas"),
        ("fullnameOverride=A.b", "fullnameOverride"),
        ("store.adress=redis://a", "adress"),
        ("store.url=http://a", "url"),
        ("settings.KEEP_ALIVE_S=3", "KEEP_ALIVE_S"),
        ("settings.CARRY_GRPC_PORT=9000", "settings.CARRY_GRPC_PORT: the chart sets it, by grpc"),
        ("settings.CARRY_PORT=9000", "settings.CARRY_PORT: the chart sets it, by the Service"),
        ("autoscaling.kind=vpa", "kind"),
        ("consumers.a.config.model=flights", "from"),
        ("consumers.a.replicas=3", "config"),
        ("consumers.A.config.model=flights", "A"),
        ("consumerDefaults.autoscaling.queueWaitMs=1", "queueWaitMs"),
        ("autoscaling.minReplicas=11", "carry: expected autoscaling.minReplicas of at most 10"),
        ("autoscaling.kind=keda,autoscaling.maxReplicas=1", "of at most 1 (maxReplicas), got 2"),
        (
            f"{CONSUMED},consumerDefaults.autoscaling.kind=keda,"
            "consumers.a.autoscaling.maxReplicas=1",
            "carry-consumer-a: expected autoscaling.minReplicas of at most 1",
        ),
        ("networkPolicy.clients=null", "clients"),
        ("models.pull.flights=s3://bucket/flights", "flights"),
        ("models.claim=a,models.image=b", "models.claim, models.image"),
        ("expose.kind=ingress,expose.host=a", "expose.from"),
        ("expose.kind=gateway", "expose.host"),
        ("expose.kind=gateway,expose.host=a", "expose.className"),
        ("expose.kind=gateway,expose.host=a,expose.grpcHost=b", "grpc: true"),
        ("expose.kind=gateway,expose.host=a,expose.grpcHost=a,grpc=true", "expose.grpcHost"),
        ("store.bundled.enabled=true,store.secret=", "store.secret"),
        ("store.urlKey=url,store.secret=", "store.secret"),
        ("store.url=redis://carry:s3cret@cache:6379", "store.url: expected no password"),
        (f"store.urlKey=url,{CONSUMED}", "consumerDefaults.store.url"),
    ],
)
def test_wrong_values_are_named(option: str, named: str) -> None:
    done = helm("template", "carry", CHART, "--set", option)
    assert done.returncode != 0
    assert named in done.stderr.partition("Error:")[2]


def test_consumers_use_the_store_of_the_service_as_another_user() -> None:
    other = f"--set=consumers.other.store.url=redis://own@other:6379/0,{CONSUMED}".replace(
        ".a.", ".other."
    )
    objects = {each["metadata"]["name"]: each for each in render(other, values=TEAM)}
    urls = [
        objects[f"carry-consumer-{name}-settings"]["data"]["CARRY_REDIS_URL"]
        for name in ("departures", "other")
    ]
    own = "rediss://consumer@cache.example.com:6380/0?ssl_ca_certs=/secrets/ca.crt"
    assert urls == [own, "redis://own@other:6379/0"]


def test_chart_has_the_version_of_the_project() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert (chart["version"], chart["appVersion"]) == (version, version)


@pytest.mark.parametrize("version", KUBERNETES)
def test_chart_installs_from_the_oldest_version_on(version: str) -> None:
    render("--kube-version", version)
    older = helm("template", "carry", CHART, "--kube-version", "1.30")
    assert "incompatible with Kubernetes v1.30" in older.stderr


def test_a_package_contains_rules_and_dashboards(tmp_path: Path) -> None:
    command = ["helm", "package", str(CHART), "--destination", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    (package,) = tmp_path.iterdir()
    options = files("monitoring")
    assert render(*options, chart=package) == render(*options)
    names = subprocess.run(["tar", "tzf", package], check=True, capture_output=True, text=True)
    assert "kustomization" not in names.stdout


def test_names_differ_between_releases() -> None:
    for release, name in (("carry", "carry"), ("staging", "staging-carry")):
        done = helm("template", release, CHART)
        named = {each["metadata"]["name"] for each in yaml.safe_load_all(done.stdout) if each}
        assert named == {name, f"{name}-settings"}


def test_names_of_any_release_are_valid_and_its_own() -> None:
    """Helm allows releases of 53 characters that begin with a digit and have dots."""
    releases = ["2024", "a.b", "a-b", *(f"carry-of-the-team-for-forecasts-{end}" for end in "ab")]
    names = set()
    for release in releases:
        objects = list(yaml.safe_load_all(helm("template", release, CHART).stdout))
        (service,) = [each for each in objects if each and each["kind"] == "Service"]
        names.add(service["metadata"]["name"])
    assert len(names) == len(releases)
    assert all(re.fullmatch("[a-z][-a-z0-9]{0,28}[a-z0-9]", name) for name in names)


@needs_tools("promtool")
def test_a_query_escapes_the_name_of_a_topic(tmp_path: Path) -> None:
    topic = """of "b\\ or é"""
    config = {"model": "flights", "from": topic, "to": "scores"}
    consumer = {"config": config, "autoscaling": {"kind": "keda"}}
    objects = render(values=yaml.safe_dump({"serve": False, "consumers": {"a": consumer}}))
    (scaler,) = [each for each in objects if each["kind"] == "ScaledObject"]
    series = {f"carry_consumer_lag{{topic={json.dumps(topic)}}}": "3000x9"}
    query = scaler["spec"]["triggers"][0]["metadata"]["query"]
    expected = {"expr": query, "eval_time": "5m"}
    expected["exp_samples"] = [{"labels": "{}", "value": 3000}]
    check_rules(tmp_path, [rule_test("query", series, promql_expr_test=[expected])])


@needs_tools("promtool")
def test_consumers_of_kafka_scale_by_the_records_and_entries_that_wait(tmp_path: Path) -> None:
    values = """
serve: false
consumers:
  a:
    config: {model: flights, group: night, from: "kafka://b:9092/departures", to: scores}
    autoscaling: {kind: keda}
"""
    (scaler,) = [each for each in render(values=values) if each["kind"] == "ScaledObject"]
    topic = 'topic="departures:night:flights"'
    series = {
        f"carry_consumer_lag{{{topic}}}": "3000x9",
        f'carry_kafka_lag{{{topic},partition="0"}}': "4000x9",
        f'carry_kafka_lag{{{topic},partition="1"}}': "500x9",
        'carry_consumer_lag{topic="departures"}': "9000x9",
    }
    samples = [{"labels": "{}", "value": 7500}]
    query = scaler["spec"]["triggers"][0]["metadata"]["query"]
    expected = {"expr": query, "eval_time": "5m", "exp_samples": samples}
    check_rules(tmp_path, [rule_test("query", series, promql_expr_test=[expected])])


PASSWORD = """12345 #"'\\x41 $HOME `id` é """


@contextmanager
def bundled_store(folder: Path) -> Iterator[str]:
    """Runs the script of the bundled store in a folder, on a unix socket; yields its address."""
    (folder / "password").write_text(f"{PASSWORD}\n", encoding="utf-8")
    (folder / "valkey-server").symlink_to(server_binary())
    (store,) = [
        each for each in render(values=VARIANTS["bundled store"]) if each["kind"] == "StatefulSet"
    ]
    (container,) = store["spec"]["template"]["spec"]["containers"]
    (script,) = container["args"]
    listen = f"dir {folder}\nport 0\nunixsocket {folder}/socket"
    script = script.replace("dir /data", listen).replace("/secrets/", f"{folder}/")
    environment = {"PATH": f"{folder}:/usr/bin:/bin"}
    with subprocess.Popen([*container["command"], script], env=environment) as process:
        try:
            until((folder / "socket").exists, "the socket")
            yield f"unix://{folder}/socket"
        finally:
            process.terminate()


def test_bundled_store_passes_the_checks() -> None:
    with (
        tempfile.TemporaryDirectory(prefix="carry-test-") as folder,
        bundled_store(Path(folder)) as url,
    ):
        settings = {"redis_url": url, "redis_password_file": Path(folder, "password")}
        results = {each.name: each for each in run_checks(Settings.load(settings), None, None)}
        assert all(each.ok for each in results.values()), results
        assert "noeviction, with an append-only file" in results["store"].detail
        client = redis.Redis(unix_socket_path=f"{folder}/socket")
        with client, pytest.raises(redis.AuthenticationError):
            client.ping()
