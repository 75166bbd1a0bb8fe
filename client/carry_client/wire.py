"""Paths, bodies and responses of the HTTP API, without a connection."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from math import isfinite
from os import PathLike
from ssl import SSLContext, create_default_context
from typing import Any, Final
from urllib.parse import quote

import httpx
import msgpack

from carry_client.errors import InvalidName, Problem, read_problem
from carry_client.types import Encoding, Json

_CONNECT_TIMEOUT_S: Final = 5.0

UNAVAILABLE: Final = 503
API_KEY: Final = "CARRY_API_KEY"
API_KEY_FILE: Final = "CARRY_API_KEY_FILE"
MAX_KEY_CHARACTERS: Final = 8192
"""More than a key or a token has; a file may be endless."""
_is_api_key = re.compile(r"[\x21-\x7e]+", re.ASCII).fullmatch
MEDIA: Final = {"json": "application/json", "msgpack": "application/msgpack"}


@dataclass(frozen=True)
class Request:
    """One attempt of a request.

    Attributes:
        path: relative to the address of the service.
        content: an encoded body.
        timeout_s: how long to wait for the response.
    """

    method: str
    path: str
    content: bytes | None
    headers: dict[str, str]
    params: dict[str, str | int] = field(default_factory=dict)
    timeout_s: float = 30.0


@dataclass(frozen=True)
class Response:
    """A response that arrived completely."""

    status: int
    content_type: str
    content: bytes
    retry_after: str = ""

    @staticmethod
    def of(response: httpx.Response) -> Response:
        """What is used of a response of httpx."""
        headers = response.headers
        return Response(
            response.status_code,
            headers.get("content-type", ""),
            response.content,
            headers.get("retry-after", ""),
        )


def authorization(api_key: str | None = None) -> dict[str, str]:
    """The header of an access key; no header without a key.

    Args:
        api_key: the key; None for that of the environment: `CARRY_API_KEY`, or the first line of
            the file that `CARRY_API_KEY_FILE` names. An empty one is none.

    Raises:
        ValueError: the file cannot be read, or it is no key; the message does not show it.
    """
    at = "api_key"
    if api_key is None:
        at, api_key = API_KEY, os.environ.get(API_KEY)
    file = None if api_key is not None else os.environ.get(API_KEY_FILE)
    if file:
        at = API_KEY_FILE
        try:
            with open(file, encoding="utf-8") as lines:
                api_key = lines.readline(MAX_KEY_CHARACTERS).strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise ValueError(f"{at}: expected a file with an access key: {reason}") from None
    if not api_key:
        return {}
    if not _is_api_key(api_key):
        raise ValueError(f"{at}: expected an access key, such as `carry keys create` prints")
    return {"authorization": f"Bearer {api_key}"}


def ssl_context(verify: SSLContext | str | PathLike[str] | None = None) -> SSLContext:
    """The SSL context that verifies the certificate of a service.

    Args:
        verify: a context, or a PEM file of certificates; None for the public authorities.

    Raises:
        ValueError: the file cannot be read, or has no certificates.
    """
    if isinstance(verify, SSLContext):
        return verify
    if verify is None:
        return _default_ssl_context()
    try:
        return create_default_context(cafile=verify)
    except OSError as error:
        detail = f"verify: expected a PEM file of certificates, got {verify}: {error}"
        raise ValueError(detail) from error


@lru_cache
def _default_ssl_context() -> SSLContext:
    """One for all clients: it takes 20 ms to create."""
    return httpx.create_ssl_context()


def http_timeout(timeout_s: float) -> httpx.Timeout:
    """The limits of one attempt."""
    return httpx.Timeout(timeout_s, connect=min(timeout_s, _CONNECT_TIMEOUT_S))


def base_url(url: str) -> str:
    """A service's address without a trailing slash.

    Raises:
        Problem: it is not an HTTP URL.
    """
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:
        parsed = httpx.URL()
    if parsed.scheme not in ("http", "https") or not parsed.host:
        detail = f"expected an address such as http://127.0.0.1:8000, got {url!r}"
        raise Problem(0, "invalid_url", detail)
    return url.rstrip("/")


class Addresses:
    """Addresses of one service, with failover: the next one is used if one does not answer."""

    def __init__(self, url: str | Sequence[str]) -> None:
        """Start with the first.

        Raises:
            Problem: one is not an HTTP URL, or there is none.
        """
        urls = [url] if isinstance(url, str) else url
        self._urls = [base_url(each) for each in urls] or [base_url("")]
        self._index = 0

    @property
    def current(self) -> str:
        """The address of the next request."""
        return self._urls[self._index]

    def fail_over(self, url: str) -> None:
        """Use the next address if this one is the current one."""
        if url == self.current:
            self._index = (self._index + 1) % len(self._urls)


def model_path(model: str) -> str:
    """The path of a model."""
    return f"/v1/models/{quote(model, safe='')}"


def stream_path(model: str, stream: str) -> str:
    """The path of a stream.

    Raises:
        InvalidName: a name that would be the path of something else; the service checks the others.
    """
    if stream in ("", ".", "..") or "/" in stream:
        detail = (
            "expected 1 to 256 characters of A-Z a-z 0-9 . _ : @ -, and neither . nor .., "
            f"got {stream!r}"
        )
        raise InvalidName(0, "invalid_name", detail)
    return f"{model_path(model)}/streams/{quote(stream, safe='')}"


def reply_params(
    return_sequences: bool, return_state: bool, return_attention: bool
) -> dict[str, str]:
    """The parameters that choose what a reply has; only those that differ from the default."""
    params = {} if return_sequences else {"return_sequences": "false"}
    if return_state:
        params["return_state"] = "true"
    if return_attention:
        params["return_attention"] = "true"
    return params


def media_headers(encoding: Encoding) -> dict[str, str]:
    """The headers of a request whose body and reply have an encoding."""
    return {"accept": MEDIA[encoding], "content-type": MEDIA[encoding]}


def encode_body(encoding: Encoding, document: object) -> bytes:
    """The bytes of a request's body.

    Raises:
        ValueError, TypeError: a value that the encoding does not have.
    """
    try:
        if encoding == "json":
            text = json.dumps(document, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
            return text.encode()
        packed: bytes = msgpack.packb(document)
        return packed
    except (TypeError, ValueError, OverflowError) as error:
        raise _unencodable(document, error) from error


def _unencodable(document: object, error: Exception, at: str = "") -> Exception:
    """The error with the place of the first value that cannot be encoded."""
    if isinstance(document, Mapping):
        items = [(f"{at}.{name}" if at else str(name), each) for name, each in document.items()]
    elif isinstance(document, (list, tuple)):
        items = [(f"{at}[{index}]", each) for index, each in enumerate(document)]
    else:
        if document is None or isinstance(document, (str, bytes)):
            return error
        if isinstance(document, float) and isfinite(document):
            return error
        if isinstance(document, int) and -(2**63) <= document < 2**64:
            return error
        kind = ValueError if isinstance(document, (int, float)) else TypeError
        return kind(f"{at}: expected a number, string, true, false or null, got {document!r}")
    for place, each in items:
        located = _unencodable(each, error, place)
        if located is not error:
            return located
    return error


def read_response(status: int, content_type: str, body: bytes, retry_after: str = "") -> Json:
    """The decoded document of a response; None for an empty one.

    Raises:
        Problem: the status is 400 or above, or the body is neither JSON nor MessagePack.
    """
    document: Json
    try:
        document = _decode(content_type, body)
    except ValueError:
        document = None
        if status < 400:
            detail = f"the body is not a document: {body[:200]!r}"
            raise Problem(status, "unreadable_reply", detail) from None
    if status >= 400:
        # a date instead of seconds is ignored
        seconds = float(retry_after) if retry_after.isdecimal() else 0.0
        raise read_problem(status, document, seconds)
    return document


def _decode(content_type: str, body: bytes) -> Any:
    if not body:
        return None
    if content_type.startswith(MEDIA["msgpack"]):
        return msgpack.unpackb(body)
    return json.loads(body)
