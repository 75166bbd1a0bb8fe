"""Carry and AsyncCarry: the HTTP API of a service, one attempt a call.

A call returns the decoded document, and raises `Problem` for everything else. Whether it is
repeated is the caller's choice, by way of `Retry`.
"""

from __future__ import annotations

import json
from functools import lru_cache
from ssl import SSLContext
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Literal
from urllib.parse import quote

import httpx
import msgpack

from carry_client.problem import Problem, no_answer, read_response

if TYPE_CHECKING:
    from typing_extensions import Self

Encoding = Literal["json", "msgpack"]

_MEDIA: Final = {"json": "application/json", "msgpack": "application/msgpack"}
_TIMEOUT_S: Final = 30.0
_CONNECT_TIMEOUT_S: Final = 5.0


def model_path(model: str) -> str:
    """The path of a model."""
    return f"/v1/models/{quote(model, safe='')}"


def stream_path(model: str, stream: str) -> str:
    """The path of a stream.

    Raises:
        Problem: `.` and `..`, which an HTTP client removes from a URL.
    """
    if stream in (".", ".."):
        raise Problem(0, "invalid_stream_name", f"{stream!r} is not a valid stream name")
    return f"{model_path(model)}/streams/{quote(stream, safe='')}"


def encode_body(encoding: Encoding, document: Any) -> bytes:
    """The bytes of a request's body."""
    if encoding == "json":
        text = json.dumps(document, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        return text.encode()
    packed: bytes = msgpack.packb(document)
    return packed


class _Requests:
    """How requests are built and responses are read, without a connection."""

    def __init__(self, encoding: Encoding) -> None:
        self.encoding = encoding
        self._media = _MEDIA[encoding]

    def headers(self, headers: dict[str, str] | None) -> dict[str, str]:
        return {"accept": self._media, "content-type": self._media, **(headers or {})}

    def content(self, body: Any) -> bytes | None:
        return body if body is None or isinstance(body, bytes) else encode_body(self.encoding, body)


def _read(response: httpx.Response) -> Any:
    content_type = response.headers.get("content-type", "")
    return read_response(response.status_code, content_type, response.content)


@lru_cache
def _ssl_context() -> SSLContext:
    """One for all clients: it takes 20 ms to create."""
    return httpx.create_ssl_context()


def _base_url(url: str) -> str:
    """A service's address without a trailing slash.

    Raises:
        Problem: it is no address of HTTP.
    """
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:
        parsed = httpx.URL()
    if parsed.scheme not in ("http", "https") or not parsed.host:
        detail = f"expected an address such as http://127.0.0.1:8000, got {url!r}"
        raise Problem(0, "invalid_url", detail)
    return url.rstrip("/")


def _timeout(timeout_s: float) -> httpx.Timeout:
    return httpx.Timeout(timeout_s, connect=min(timeout_s, _CONNECT_TIMEOUT_S))


class Carry:
    """A service, from any number of threads."""

    def __init__(self, url: str, *, timeout_s: float = _TIMEOUT_S, encoding: Encoding = "json"):
        """Nothing is requested yet.

        Raises:
            Problem: the address is invalid.
        """
        self.url = _base_url(url)
        self._requests = _Requests(encoding)
        self._client = httpx.Client(
            base_url=self.url, timeout=_timeout(timeout_s), verify=_ssl_context()
        )

    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        headers: dict[str, str] | None = None,
        params: dict[str, str | int] | None = None,
    ) -> Any:
        """Send one request.

        Args:
            body: a document, or bytes that are encoded already.

        Raises:
            Problem
        """
        try:
            response = self._client.request(
                method,
                path,
                content=self._requests.content(body),
                headers=self._requests.headers(headers),
                params=params,
            )
        except httpx.HTTPError as error:
            raise no_answer(error) from error
        return _read(response)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class AsyncCarry:
    """A service, from one event loop.

    Each request in flight has an `httpx.AsyncClient` with one connection: httpx's own pool looks at
    every connection at every request, which made 64 concurrent requests four times slower.
    """

    def __init__(self, url: str, *, timeout_s: float = _TIMEOUT_S, encoding: Encoding = "json"):
        """Nothing is requested yet.

        Raises:
            Problem: the address is invalid.
        """
        self.url = _base_url(url)
        self._requests = _Requests(encoding)
        self._timeout = _timeout(timeout_s)
        self._idle: list[httpx.AsyncClient] = []

    async def request(
        self, method: str, path: str, body: Any = None, *, headers: dict[str, str] | None = None
    ) -> Any:
        """As `Carry.request`."""
        return _read(await self._send(method, path, body, headers))

    async def text(self, path: str) -> str:
        """The text of a page such as `/metrics`."""
        response = await self._send("GET", path, None, None)
        if response.status_code >= 400:
            _read(response)
        return response.text

    async def close(self) -> None:
        """Close the idle connections."""
        while self._idle:
            await self._idle.pop().aclose()

    async def _send(
        self, method: str, path: str, body: Any, headers: dict[str, str] | None
    ) -> httpx.Response:
        client = self._idle.pop() if self._idle else self._new_client()
        try:
            return await client.request(
                method,
                path,
                content=self._requests.content(body),
                headers=self._requests.headers(headers),
            )
        except httpx.HTTPError as error:
            raise no_answer(error) from error
        finally:
            self._idle.append(client)

    def _new_client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self.url, timeout=self._timeout, verify=_ssl_context())

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()
