"""A service that others reach: it starts with a key only, and every RPC, command and client needs
one until it is revoked."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
import uvloop

from carry_client import Carry, errors
from service.access.caller import Verb
from service.access.keys import parse_key
from service.access.limits import KeyLimits
from service.access.tokens import TokenClaims, sign_token
from tests.support.access import new_authorization
from tests.support.command import Result, carry
from tests.support.servers import opened, until
from tests.support.service import Service
from tests.support.v2_messages import METHODS, callable_of, message_class

OPEN = {"ServerLive", "ServerReady"}
NEEDED = {
    "ModelInfer": Verb.PREDICT,
    "ModelStreamInfer": Verb.PREDICT,
    **dict.fromkeys(METHODS.keys() - OPEN - {"ModelInfer", "ModelStreamInfer"}, Verb.MODELS),
}
MODEL = "post-lstm"

Create = Callable[..., str]


def keys(service: Service, *words: str) -> Result:
    """Run `carry keys`."""
    done = carry("keys", *words, "--data-dir", service.data_dir)
    assert done.exit_code == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Iterator[Service]:
    """A service on every address of this machine, which starts once it has a key."""
    models = tmp_path_factory.mktemp("models")
    (models / "lstm").symlink_to(model_dir / "lstm")
    options = ("--host", "0.0.0.0", "--grpc-port", "0")
    service = Service(tmp_path_factory.mktemp("service"), models, *options)
    service.launch()
    until(service.ended, "the refusal to start")
    assert service.process.returncode == 1
    assert "CARRY_INSECURE=1" in service.log()
    assert "`carry keys create NAME`" in service.log()
    keys(service, "create", "first")
    service.start(CARRY_ALLOWED_HOSTS="api.example.com")
    service.url = service.url.replace("0.0.0.0", "127.0.0.1")
    try:
        yield service
    finally:
        service.stop()


@pytest.fixture
def create(service: Service) -> Create:
    """Creates keys, and waits until the service knows them."""

    def new(*verbs: Verb, **scope: Any) -> str:
        socket = json.loads((service.data_dir / "valkey.json").read_text())["socket"]

        async def write() -> str:
            async with opened(f"unix://{socket}") as store:
                return await new_authorization(store.keys, verbs=verbs or tuple(Verb), **scope)

        key = uvloop.run(write()).removeprefix("Bearer ")
        if "expires_ms" not in scope:
            until(lambda: status(service, key) != 401, "the key to be known")
        return key

    return new


def status(service: Service, key: str | None) -> int:
    """The status of a request with this key."""
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    return httpx.get(f"{service.url}/v1/models", headers=headers, verify=False).status_code


def test_hosts_are_those_of_the_setting_and_addresses(service: Service) -> None:
    """Health checks name the address of a container, clients the name of the service."""
    hosts = {"api.example.com": 200, "10.1.2.3:8000": 200, "localhost": 200, "evil.example": 421}
    for host, expected in hosts.items():
        for path in ("/health/live", "/health/ready"):
            answer = httpx.get(service.url + path, headers={"host": host}, verify=False)
            assert answer.status_code == expected, host


def call(channel: grpc.Channel, method: str, key: str | None, stream: str = "acme:1") -> str:
    """Call a method about the model and the stream; the code of the outcome."""
    described = METHODS[method]
    message: Any = message_class(described.input_type.name)()
    for name in ("name", "model_name"):
        if name in described.input_type.fields_by_name:
            setattr(message, name, MODEL)
    if "parameters" in described.input_type.fields_by_name and method != "RepositoryIndex":
        message.parameters["sequence_id"].string_param = stream
        message.inputs.add(name="inputs", datatype="FP32", shape=[1, 1])
        message.raw_input_contents.append(bytes(4))
    metadata = () if key is None else (("authorization", f"Bearer {key}"),)
    try:
        if method == "ModelStreamInfer":
            (response,) = callable_of(channel, method)(iter([message]), metadata=metadata)
            return response.error_message.partition(":")[0] or "ok"
        callable_of(channel, method)(message, metadata=metadata)
    except grpc.RpcError as error:
        carried = dict(error.trailing_metadata())
        return str(carried["carry-error"])
    return "ok"


def test_every_rpc_needs_a_key_that_allows_it(service: Service, create: Create) -> None:
    everything, expired = create(), create(expires_ms=1)
    by_verb = {verb: create(verb) for verb in (Verb.PREDICT, Verb.MODELS, Verb.DELETE)}
    other_model, other_prefix = create(models=("pre*",)), create(prefix="acme2:")
    with grpc.insecure_channel(service.grpc_address().replace("0.0.0.0", "127.0.0.1")) as channel:
        assert {call(channel, method, None) for method in OPEN} == {"ok"}
        for method, verb in NEEDED.items():
            for wrong in (None, "carry", everything[:-1], expired):
                assert call(channel, method, wrong) == "unauthenticated", (method, wrong)
            denied = {"forbidden", "unauthenticated"}
            assert call(channel, method, everything) not in denied, method
            for each, key in by_verb.items():
                assert (call(channel, method, key) == "forbidden") == (each is not verb), method
            described = METHODS[method].input_type.fields_by_name
            if "name" in described or "model_name" in described:
                assert call(channel, method, other_model) == "forbidden", method
            if verb is Verb.PREDICT:
                assert call(channel, method, other_prefix) == "forbidden", method
                assert call(channel, method, other_prefix, "acme2:1") not in denied, method
    powerless, expired = by_verb[Verb.DELETE].split("_")[1], expired.split("_")[1]
    wanted = {(method, expired, "expired") for method in NEEDED} | {
        (method, powerless, f"verb {verb}") for method, verb in NEEDED.items()
    }

    def logged() -> set[tuple[str, str | None, str | None]]:
        """Method, key and reason of each call."""
        return {
            (str(line["route"]).rpartition("/")[2], line.get("key"), line.get("reason"))
            for line in service.lines()
            if line.get("method") == "GRPC" and "code" in line
        }

    until(lambda: wanted <= logged(), "the lines of rejected calls")


def test_limits_of_keys_and_tokens_hold_over_grpc(service: Service, create: Create) -> None:
    address = service.grpc_address().replace("0.0.0.0", "127.0.0.1")
    with grpc.insecure_channel(address) as channel:
        for method in ("ModelInfer", "ModelStreamInfer"):
            key = create(limits=KeyLimits(requests_per_s=0.001))
            outcomes = [call(channel, method, key, f"limited:{method}") for _ in range(2)]
            assert outcomes == ["ok", "limit_exceeded"]
            quota = create(limits=KeyLimits(streams=1))
            streams = (f"quota:{method}", f"quota2:{method}", f"quota:{method}")
            outcomes = [call(channel, method, quota, stream) for stream in streams]
            assert outcomes == ["ok", "limit_exceeded", "ok"]
            holder = parse_key(create())
            assert holder is not None
            token = sign_token(holder, TokenClaims(exp=9e9, prefix=f"token:{method}:"))
            streams = (f"token:{method}:a", "token:b")
            outcomes = [call(channel, method, token, stream) for stream in streams]
            assert outcomes == ["ok", "forbidden"]


def test_commands_and_clients_take_the_key_of_the_environment(
    service: Service, create: Create, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = create(Verb.PREDICT, Verb.MODELS, Verb.LIST, prefix="acme:")
    listing = ("streams", "list", MODEL, "--url", service.url)
    done = carry(*listing)
    assert (done.exit_code, done.stderr[:23]) == (1, "carry: unauthenticated:")
    with Carry(service.url, api_key=key) as client:
        client.model(MODEL).stream("acme:1").send(np.zeros((1, 1), np.float32))
        with pytest.raises(errors.Forbidden) as caught:
            client.model(MODEL).stream("b:1").send(np.zeros((1, 1), np.float32))
    assert (caught.value.model, caught.value.stream) == (MODEL, "b:1")
    assert key not in str(caught.value)
    file = tmp_path / "key"
    file.write_text(f"{key}\n")
    monkeypatch.setenv("CARRY_API_KEY_FILE", str(file))
    assert carry(*listing, "--prefix", "acme:").stdout == b"acme:1\n"
    with Carry(service.url, api_key="") as client, pytest.raises(errors.Unauthenticated):
        client.models()


def test_revoked_key_is_rejected_and_listed_as_revoked(service: Service, create: Create) -> None:
    key = create()
    key_id = key.split("_")[1]
    shown = json.loads(keys(service, "show", key_id).stdout)
    assert (shown["status"], shown["verbs"]) == ("active", sorted(Verb))
    assert key.split("_")[2] not in keys(service, "list").stdout.decode() + json.dumps(shown)
    address = service.grpc_address().replace("0.0.0.0", "127.0.0.1")
    with grpc.insecure_channel(address) as channel:
        metadata = (("authorization", f"Bearer {key}"),)
        open_stream = callable_of(channel, "ModelStreamInfer")(waiting(), metadata=metadata)
        assert next(open_stream).error_message
        assert keys(service, "revoke", key_id).stdout.decode() == f"revoked {key_id}, test\n"
        with pytest.raises(grpc.RpcError) as caught:
            next(open_stream)
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert status(service, key) == 401
    assert f"{key_id}  revoked  test" in keys(service, "list").stdout.decode()


def waiting() -> Iterator[Any]:
    """A request, and then none for longer than the test takes."""
    yield message_class("ModelInferRequest")(model_name=MODEL)
    with suppress(Exception):
        until(lambda: False, "the end", 30)
