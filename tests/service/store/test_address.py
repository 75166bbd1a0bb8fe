"""Addresses of stores: validation, and redaction of passwords."""

from __future__ import annotations

import traceback

import pytest

from service.core.errors import StoreRefused
from service.settings import Settings, SettingsError
from service.store.redis.address import Address, StoreAddress, redact_url
from service.store.redis.redis_store import RedisStore
from service.store.settings import StoreSettings


@pytest.mark.parametrize(
    "url",
    [
        "redis://cache.test",
        "redis://ann:pass@[::1]:6379/0?db=1",
        "rediss://:pass@cache.test:6379/1?ssl_cert_reqs=none&ssl_password=hush",
        "unix:///run/a@b.sock?db=1",
        "unix://:pass@/run/redis.sock",
        "redis+cluster://ann:pass@one.test:6379,two.test",
        "rediss+cluster://one.test:6379?password=a@b",
        "redis://:p%23ss@cache.test/0",
        "redis://:p@ss:w@cache.test/1",
    ],
)
async def test_valid_addresses_are_accepted(url: str) -> None:
    assert Settings.load({"redis_url": url}).store.redis_url == url
    await RedisStore(StoreSettings(url)).close()


SECRET_PARTS = ("s3c", "r3t")


@pytest.mark.parametrize(
    "url",
    [
        "redis://ann:s3c#r3t@cache.test:6379/0",
        "redis://s3c:12#r3t@cache.test:6379/0",
        "redis+cluster://ann:s3c#r3t@one.test:6379,two.test",
        "redis://:s3c/r3t@cache.test/0",
        "redis://s3c:12/r3t@cache.test/0",
        "unix://:s3c/r3t@/run/redis.sock",
        "redis://:s3c?r3t@cache.test/0",
        "redis://s3c:12?r3t=4@cache.test/0",
        "redis+cluster://ann:s3c?r3t=4@one.test",
        "redis://:s3c[r3t@cache.test/0",
        "redis://:s3c\N{ACCOUNT OF}r3t@cache.test/0",
        "s3cr3t",
        "http://:s3cr3t@cache.test",
    ],
)
def test_a_malformed_address_is_rejected_without_repeating_it(url: str) -> None:
    with pytest.raises(SettingsError) as caught:
        Settings.load({"redis_url": url})
    with pytest.raises(StoreRefused) as refused:
        RedisStore(StoreSettings(url))
    for error in (caught.value, refused.value):
        chain = "".join(traceback.format_exception(error)).replace(repr(url), "")
        assert not any(part in chain for part in SECRET_PARTS)


def test_repr_of_store_settings_has_no_address() -> None:
    assert "s3cr3t" not in repr(StoreSettings("redis://:s3cr3t@cache.test"))


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        (
            "rediss+cluster://ann:pass@one.test:6379,two.test",
            "rediss+cluster://ann:***@one.test:6379,two.test",
        ),
        ("redis://cache.test:6379/0", "redis://cache.test:6379/0"),
        ("rediss://:pass@cache.test/1", "rediss://:***@cache.test/1"),
        ("redis://:p@ss:w@cache.test/1", "redis://:***@cache.test/1"),
        ("redis://ann:p/ss@cache.test/1", "redis://ann:***@cache.test/1"),
        ("redis://ann@cache.test", "redis://ann@cache.test"),
        ("unix://:pass@/run/redis.sock?db=1", "unix://:***@/run/redis.sock?db=1"),
        ("unix:///run/r.sock?Password=p&db=1", "unix:///run/r.sock?Password=***&db=1"),
        (
            "rediss://c.test?ssl_certfile=/c.pem&ssl_password=p&pass%77ord=q",
            "rediss://c.test?ssl_certfile=/c.pem&ssl_password=***&pass%77ord=***",
        ),
        ("redis://c.test:6379/0?password=a@b", "redis://***"),
        ("redis://:p#ss@cache.test/1", "redis://***"),
    ],
)
def test_passwords_are_redacted(url: str, shown: str) -> None:
    assert redact_url(url) == shown


@pytest.mark.parametrize(
    ("url", "message"),
    [
        *((url, "redis://.*rediss://.*unix://") for url in ("http://localhost", "localhost:6379")),
        *((url, "redis://.*rediss://.*unix://") for url in ("", "memory://")),
        ("unix://", "unix:///path"),
        ("redis://localhost:port/0", "address"),
        ("redis://localhost?decode_responses=true", "only the options"),
        ("redis://one.test?sentinel_password=secret", "only the options"),
        ("redis+cluster://", "node 1"),
        ("redis+cluster://localhost:port", "node 1"),
        ("redis+cluster://localhost,,other", "node 2"),
        ("redis+cluster://localhost/1", "database 0 only"),
        ("redis+cluster://localhost?decode_responses=true", "only the options"),
        ("redis+sentinel://one.test,two.test:1", "NAME"),
        ("redis+sentinel://one.test/", "NAME"),
        ("redis+sentinel://one.test/main/x", "NAME"),
        ("redis+sentinel://one.test,,two.test/main", "node 2"),
        ("redis+sentinel://one.test:port/main", "node 1"),
        ("redis+sentinel://one.test/main?decode_responses=true", "only the options"),
    ],
)
def test_an_unusable_address_is_rejected(url: str, message: str) -> None:
    with pytest.raises(StoreRefused, match=message):
        RedisStore(StoreSettings(url))


def test_address_has_the_parts_of_servers_and_sentinels() -> None:
    address = StoreAddress.parse(
        "rediss+sentinel://ann:p%23s@one.test,[::1]:5/main/3"
        "?sentinel_password=s%2Fe&ssl_ca_certs=%2Fca.pem"
    )
    assert str(address) == "rediss+sentinel://one.test:26379,[::1]:5/main/3"
    assert address.server_url(Address("ten.test", 7)) == (
        "rediss://ann:p%23s@ten.test:7/3?ssl_ca_certs=%2Fca.pem"
    )
    assert address.sentinel_options == {"password": "s/e"}
