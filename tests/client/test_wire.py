"""Responses and addresses of the HTTP client, without a service."""

from __future__ import annotations

import orjson
import pytest

from carry_client import (
    AsyncCarry,
    Carry,
    Problem,
    read_response,
    stream_path,
)


@pytest.mark.parametrize(
    ("status", "body", "code", "is_retryable"),
    [
        (200, b"<html>", "unreadable_reply", False),
        (404, b"<html>", "status_404", False),
        (502, b"<html>", "status_502", True),
        (503, b'{"code": "outcome_unknown", "retryable": false}', "outcome_unknown", False),
    ],
)
def test_response_without_a_reply_is_a_problem(
    status: int, body: bytes, code: str, is_retryable: bool
) -> None:
    with pytest.raises(Problem) as caught:
        read_response(status, "application/json", body)
    assert (caught.value.code, caught.value.is_retryable) == (code, is_retryable)


def test_position_problem_names_the_position() -> None:
    document = {"code": "already_applied", "position": 7}
    with pytest.raises(Problem) as caught:
        read_response(409, "application/problem+json", orjson.dumps(document))
    assert caught.value.has_stream_position
    assert caught.value.position == 7


@pytest.mark.parametrize("name", ["", ".", "..", "a/b"])
def test_stream_name_that_is_another_path_is_rejected(name: str) -> None:
    assert stream_path("m", "a b") == "/v1/models/m/streams/a%20b"
    with pytest.raises(Problem, match="expected 1 to 256 characters"):
        stream_path("m", name)


@pytest.mark.parametrize("client", [Carry, AsyncCarry])
@pytest.mark.parametrize("url", ["ftp://here", "here:8000", "http://", ""])
def test_an_invalid_address_is_rejected_before_any_request(
    client: type[Carry] | type[AsyncCarry], url: str
) -> None:
    with pytest.raises(Problem, match="expected an address such as http") as raised:
        client(url)
    assert not raised.value.is_retryable
