"""Settings: their sources, rejected values, and redacted passwords."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from models.spec.model import parse_spec
from service.settings import GROUP_OF, Settings, SettingsError, service_links
from service.store.redis.address import check_address
from tests.support.models import SMALL

Environment = dict[str, str]


@pytest.fixture(autouse=True)
def no_settings_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in GROUP_OF:
        monkeypatch.delenv(f"CARRY_{name.upper()}", raising=False)


def set_all(monkeypatch: pytest.MonkeyPatch, environment: Environment) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


def origins(settings: Settings) -> dict[str, str]:
    return {setting.name: setting.origin for setting in settings.effective()}


def values(settings: Settings) -> dict[str, str]:
    return {setting.name: setting.value for setting in settings.effective()}


def test_defaults_listen_on_loopback_and_need_no_redis() -> None:
    settings = Settings.load()
    assert settings == Settings()
    assert settings.http.host == "127.0.0.1"
    assert settings.store.redis_url is None
    assert set(origins(settings).values()) == {"default"}
    directory = settings.models.models_dir
    assert directory.parts[-2:] == ("models", "pretrained")
    assert directory.is_absolute()


def test_flags_override_environment_overrides_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, {"CARRY_PORT": "8001", "CARRY_WORKERS": "3", "CARRY_REDIS_URL": ""})
    set_all(monkeypatch, {"PORT": "x", "CARRYING_PORT": "x"})  # not ours
    settings = Settings.load({"port": 8002, "host": None})
    assert (settings.http.port, settings.processes.workers) == (8002, 3)
    assert settings.store.redis_url is None
    found = origins(settings)
    assert (found["port"], found["workers"]) == ("flag", "env")
    assert (found["host"], found["redis_url"]) == ("default", "default")


REJECTED: list[tuple[Environment, str]] = [
    *(
        ({name: "1"}, f"^{name} is not a setting; did you mean {nearest}\\?$")
        for name, nearest in (
            ("CARRY_REDIS_URI", "CARRY_REDIS_URL"),
            ("CARRY_MAX_BATCH_ROW", "CARRY_MAX_BATCH_ROWS"),
            ("CARRY_PROT", "CARRY_PORT"),
            ("carry_wrokers", "CARRY_WORKERS"),
        )
    ),
    *(
        ({name: value}, name)
        for name, value in (
            ("CARRY_NAMESPACE", "no spaces"),
            ("CARRY_NAMESPACE", "{tag}"),
            ("CARRY_PARTITIONS", "0"),
            ("CARRY_WORKERS", "0"),
            ("CARRY_MAX_QUEUE", "-1"),
            ("CARRY_STORE_WAIT_S", "0"),
            ("CARRY_REDIS_URL", "http://example.test"),
            ("CARRY_RUNTIME", "onnx"),
            ("CARRY_PORT", "80.5"),
            # they resemble variables that Kubernetes sets
            ("CARRY_PORT", "8001x"),
            ("CARRY_PROT", "tcp://10.96.12.7:8000"),
            ("CARRY_REDIS_PORT", "6379"),
            ("CARRY_SERVICE_PORT", "http"),
            ("CARRY_SERVICE_HOSTS", "10.96.12.7"),
        )
    ),
    *(
        ({name: "maybe"}, f"^{name}: expected true or false, got 'maybe'\\.$")
        for name in ("CARRY_TRACING", "CARRY_REQUIRE_KEYS")
    ),
    ({"CARRY_TIMEOUT_S": "301"}, r"CARRY_MAX_TIMEOUT_S: .*CARRY_TIMEOUT_S, which is 301"),
    ({"CARRY_MAX_TIMEOUT_S": "29"}, r"CARRY_TIMEOUT_S, which is 30\.0, got '29'"),
    ({"CARRY_MAX_BODY_BYTES": "300000000"}, r"CARRY_MAX_PENDING_BODY_BYTES: .*300000000"),
]


@pytest.mark.parametrize(("environment", "message"), REJECTED)
def test_unknown_and_invalid_settings_are_rejected(
    monkeypatch: pytest.MonkeyPatch, environment: Environment, message: str
) -> None:
    set_all(monkeypatch, environment)
    with pytest.raises(SettingsError, match=message):
        Settings.load()


def test_a_setting_may_equal_its_maximum() -> None:
    Settings.load({"timeout_s": 40, "max_timeout_s": 40, "max_body_bytes": 1 << 28})


def test_invalid_values_are_reported_with_their_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CARRY_LOG_LEVEL", "loud")
    with pytest.raises(SettingsError) as caught:
        Settings.load({"port": 70000})
    message = str(caught.value)
    assert "--port: input should be less than or equal to 65535, got '70000'." in message
    assert "CARRY_LOG_LEVEL:" in message
    assert "'loud'" in message
    assert "\n" not in message


def test_no_password_is_shown() -> None:
    url = "redis://ann:s3cr3t@cache.test:6379/0?password=s3cr3t"
    settings = Settings.load({"redis_url": url})
    assert settings.store.url == url
    assert "s3cr3t" not in repr(settings) + str(settings)
    assert values(settings)["redis_url"] == "redis://ann:***@cache.test:6379/0?password=***"
    with pytest.raises(SettingsError) as caught:
        Settings.load({"redis_url": "http://:s3cr3t@cache.test"})
    assert "s3cr3t" not in str(caught.value)
    assert "redis://, rediss://, unix://" in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://cache.test:6379/0", "redis://:a%2Fb%3F@cache.test:6379/0"),
        ("rediss://ann@a?ssl_ca_certs=ca", "rediss://ann:a%2Fb%3F@a?ssl_ca_certs=ca"),
        ("redis+cluster://ann@a:1,b:2", "redis+cluster://ann:a%2Fb%3F@a:1,b:2"),
        ("unix://ann@/run/store?db=1", "unix://ann:a%2Fb%3F@/run/store?db=1"),
    ],
)
def test_password_file_completes_the_address(tmp_path: Path, url: str, expected: str) -> None:
    (tmp_path / "password").write_text("a/b?\n")
    settings = Settings.load({"redis_url": url, "redis_password_file": tmp_path / "password"})
    assert settings.store.url == expected
    check_address(expected)
    for secret in ("a/b", "a%2Fb"):
        assert secret not in repr(settings) + str(values(settings))


def test_file_of_the_sentinels_password_completes_their_address(tmp_path: Path) -> None:
    for name in ("servers", "sentinels"):
        (tmp_path / name).write_text(f"{name}/?")
    files = {
        "redis_password_file": tmp_path / "servers",
        "redis_sentinel_password_file": tmp_path / "sentinels",
    }
    settings = Settings.load({"redis_url": "redis+sentinel://ann@a,b/main", **files})
    url = settings.store.url
    assert url == "redis+sentinel://ann:servers%2F%3F@a,b/main?sentinel_password=sentinels%2F%3F"
    check_address(url)
    assert "sentinels/" not in repr(settings)
    for wrong in ("redis://a", "redis+sentinel://a/main?sentinel_password=x"):
        with pytest.raises(SettingsError, match=r"REDIS_SENTINEL_PASSWORD_FILE|sentinel-password"):
            Settings.load({"redis_url": wrong, **files})


ENDLESS = b"endless"
"""The content of a file without an end."""


@pytest.mark.parametrize(
    ("content", "url", "message"),
    [
        (None, "redis://cache.test", "expected a file with a password .*: No such file"),
        (b"", "redis://cache.test", "the file's first line, which is empty"),
        (b"\xff", "redis://cache.test", "it is not UTF-8"),
        (ENDLESS, "redis://cache.test", "a password of at most 4096 characters, got more"),
        (b"a" * 5000, "redis://cache.test", "a password of at most 4096 characters, got more"),
        (b"a", None, "expected CARRY_REDIS_URL too"),
        (b"a", "redis://:s3cr3t@cache.test", "expected no password in the store's address"),
        (b"a", "redis://cache.test?password=s3cr3t", "expected no password in the store's address"),
    ],
)
def test_unusable_password_file_is_rejected(
    tmp_path: Path, content: bytes | None, url: str | None, message: str
) -> None:
    file = Path("/dev/zero") if content == ENDLESS else tmp_path / "password"
    if content not in (None, ENDLESS):
        file.write_bytes(content)
    with pytest.raises(SettingsError, match=f"--redis-password-file: .*{message}") as caught:
        Settings.load({"redis_url": url, "redis_password_file": file})
    assert "s3cr3t" not in str(caught.value)


def test_kubernetes_service_links_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those in every pod of a namespace with the Services `carry` and `carry-redis`."""
    links = {
        "CARRY_SERVICE_HOST": "10.96.12.7",
        "CARRY_SERVICE_PORT": "8000",
        "CARRY_SERVICE_PORT_HTTP": "8000",
        "CARRY_PORT": "tcp://10.96.12.7:8000",
        "CARRY_PORT_8000_TCP_PROTO": "tcp",
        "CARRY_PORT_8000_TCP_PORT": "8000",
        "CARRY_PORT_8000_TCP_ADDR": "10.96.12.7",
        "CARRY_REDIS_SERVICE_HOST": "fd00::7",
        "CARRY_REDIS_PORT": "tcp://[fd00::7]:6379",
    }
    set_all(monkeypatch, links)
    settings = Settings.load()
    assert settings.http.port == 8000
    assert set(origins(settings).values()) == {"default"}
    assert service_links(os.environ) == sorted(links)


def test_workers_get_the_settings_through_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CARRY_DURABILITY", "fsync")
    settings = Settings.load({"port": 0, "data_dir": Path("there"), "metrics": False})
    settings = settings.changed(port=1234, redis_url="redis://:a@b")
    assert origins(settings)["port"] == "flag"
    set_all(monkeypatch, settings.environment())
    assert values(Settings.load()) == values(settings)
    assert Settings.load().store.url == "redis://:a@b"


def test_histories_of_the_settings_take_precedence_over_the_specification() -> None:
    own = parse_spec({**SMALL, "history": {"events": 64, "snapshots": 4}})
    none = parse_spec({**SMALL, "name": "other"})

    def histories(**flags: object) -> list[tuple[int, int] | None]:
        models = Settings.load(flags).models
        found = map(models.history_of, (own, none))
        return [each and (each.events, each.snapshots) for each in found]

    assert histories() == [(64, 4), None]
    assert histories(history_events="16") == [(16, 4), (16, 8)]
    assert histories(history_events="0", history_snapshots=3) == [None, None]
    assert histories(history_events=f"other=5,{own.name}=6", history_snapshots=2) == [
        (6, 2),
        (5, 2),
    ]
    assert histories(history_events="other=5") == [(64, 4), (5, 8)]
    with pytest.raises(SettingsError, match="history-events"):
        histories(history_events="many")
    with pytest.raises(SettingsError, match="history-snapshots"):
        histories(history_snapshots=1)
