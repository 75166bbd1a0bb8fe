"""Calls without I/O: generators that yield what a driver has to do, and receive the outcome.

    call = session.request("GET", "/v1/models")
    effect = next(call)                 a Request
    effect = call.send(response)        or call.throw(NoAnswer(error)); then Sleep, Request, ...

`Carry` and `AsyncCarry` are the two drivers, so that both follow the same rules. A call returns by
`StopIteration`, as generators do.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any, Final, TypeVar

from carry_client.errors import NoAnswer, Problem
from carry_client.retry import Retry
from carry_client.types import Encoding
from carry_client.wire import MEDIA, Request, encode_body, media_headers, read_response

LOG: Final = logging.getLogger("carry_client")
END: Final = object()
"""Outcome of `Read`: the source is exhausted."""
LATE: Final = object()
"""Outcome of `Read`: nothing came in time."""

GRACE_S: Final = 1.0
"""A client waits this much longer than the service, so that the service's answer arrives."""

T = TypeVar("T")


@dataclass(frozen=True)
class Sleep:
    """Wait; the outcome is None."""

    seconds: float


@dataclass(frozen=True)
class Open:
    """Begin to read a source of events; the outcome is its reader.

    Attributes:
        is_timed: reads have to end in time.
    """

    source: Any
    is_timed: bool = False


@dataclass(frozen=True)
class Read:
    """Read the next item; the outcome is it, `END` or `LATE`.

    Attributes:
        wait_s: how long to wait; None without a limit.
    """

    reader: Any
    wait_s: float | None = None


@dataclass(frozen=True)
class Emit:
    """Hand a value to the caller who iterates over the call; the outcome is None."""

    value: Any


Effect = Request | Sleep | Open | Read | Emit
Call = Generator[Effect, Any, T]


@dataclass(frozen=True)
class Failed:
    """The outcome of an effect that failed; the call may handle the error."""

    error: Exception


def resume(call: Call[Any], outcome: object) -> Effect:
    """Give a call the outcome of its effect; the next effect, or StopIteration with the result."""
    try:
        return call.throw(outcome.error) if isinstance(outcome, Failed) else call.send(outcome)
    finally:
        # an error would refer to itself by its traceback
        del outcome


class Attempts:
    """The attempts of one call, until its deadline.

    Attributes:
        retries: attempts that failed and were repeated.
    """

    def __init__(self, session: Session) -> None:
        self.retries = 0
        self._session = session
        self._end_s = session.clock() + session.deadline_s
        self._retry = Retry(session.deadline_s, session.random, clock=session.clock)

    def timeout_s(self) -> float:
        """How long the next attempt may take."""
        remaining_s = self._end_s - self._session.clock()
        return max(0.01, min(self._session.timeout_s, remaining_s))

    def next_delay_s(self, problem: Problem) -> float:
        """How long to wait before the next attempt.

        Raises:
            Problem: the one that was passed; it is not retryable, or the deadline comes first.
        """
        try:
            delay_s = self._retry.next_delay_s(problem)
            if self._session.clock() + delay_s >= self._end_s:
                raise problem
            extra = {"code": problem.code}
            if isinstance(problem, NoAnswer) and not self._session.has_warned:
                self._session.has_warned = True
                limit_s = self._session.deadline_s
                text = "%s; retrying until %g s after the first attempt"
                LOG.warning(text, problem, limit_s, extra=extra)
            else:
                LOG.info("retrying in %.2f s after %s", delay_s, problem, extra=extra)
        finally:
            # it would refer to itself by its traceback, and keep the callers' frames
            del problem
        self.retries += 1
        return delay_s


class Session:
    """What all calls to one service share.

    Attributes:
        timeout_s: how long one attempt may take; the service learns it from `Carry-Timeout`.
        deadline_s: how long a call may take with all its attempts.
        has_warned: whether a retry after no answer was logged as a warning.
    """

    def __init__(
        self,
        *,
        encoding: Encoding = "msgpack",
        timeout_s: float = 30.0,
        deadline_s: float = 120.0,
        headers: Mapping[str, str] | None = None,
        clock: Callable[[], float] = time.monotonic,
        random: Random | None = None,
    ) -> None:
        if encoding not in MEDIA:
            raise ValueError(f"encoding: expected msgpack or json, got {encoding!r}")
        self.encoding, self.timeout_s, self.deadline_s = encoding, timeout_s, deadline_s
        self.has_warned = False
        self.clock = clock
        self.random = random or Random()  # noqa: S311
        self._headers = {**media_headers(encoding), **(headers or {})}

    def attempt(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        headers: Mapping[str, str] | None = None,
        params: Mapping[str, str | int] | None = None,
        timeout_s: float | None = None,
    ) -> Request:
        """One attempt.

        Args:
            body: a document, or bytes that are encoded already.
            timeout_s: `Carry-Timeout`; None without one.
        """
        every = {**self._headers, **(headers or {})}
        if timeout_s is not None and method == "POST":
            every["carry-timeout"] = f"{timeout_s:.3f}"
        return Request(
            method=method,
            path=path,
            content=body
            if body is None or isinstance(body, bytes)
            else encode_body(self.encoding, body),
            headers=every,
            params=dict(params or {}),
            timeout_s=self.timeout_s if timeout_s is None else timeout_s + GRACE_S,
        )

    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        if_match: str | None = None,
        params: Mapping[str, str | int] | None = None,
        attempts: Attempts | None = None,
    ) -> Call[Any]:
        """The document of the reply, after retries.

        Only for requests that may be carried out twice.

        Raises:
            Problem: not retryable, or the last one before the deadline.
        """
        attempts = attempts or Attempts(self)
        content = None if body is None else encode_body(self.encoding, body)
        headers = {} if if_match is None else {"if-match": if_match}
        while True:
            try:
                response = yield self.attempt(
                    method,
                    path,
                    content,
                    headers=headers,
                    params=params,
                    timeout_s=attempts.timeout_s(),
                )
                return read_response(
                    response.status,
                    response.content_type,
                    response.content,
                    response.retry_after,
                )
            except Problem as problem:
                delay_s = attempts.next_delay_s(problem)
            yield Sleep(delay_s)
