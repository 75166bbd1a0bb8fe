"""Drives calls in a thread: sends their requests, sleeps, reads their sources."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from ssl import SSLContext
from typing import Any, Final, TypeVar

import httpx

from carry_client.calls import END, LATE, Call, Effect, Emit, Failed, Open, Read, Sleep, resume
from carry_client.errors import NoAnswer, cut_causes
from carry_client.wire import UNAVAILABLE, Addresses, Request, Response, http_timeout

_PUT_S: Final = 0.5

T = TypeVar("T")


class Driver:
    """Connections to one service, for any number of threads, also after a fork."""

    def __init__(self, addresses: Addresses, context: SSLContext) -> None:
        """Nothing is requested yet."""
        self._addresses, self._context = addresses, context
        self._client = self._new_client()
        self._process = os.getpid()
        self._inherited: list[httpx.Client] = []

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def send(self, request: Request) -> Response:
        """One attempt of a request.

        Raises:
            NoAnswer
        """
        if self._process != os.getpid():
            # after a fork: the connections are the parent's, and closing them might end its TLS
            self._inherited.append(self._client)
            self._client, self._process = self._new_client(), os.getpid()
        url = self._addresses.current
        try:
            response = self._client.request(
                request.method,
                url + request.path,
                content=request.content,
                headers=request.headers,
                params=request.params,
                timeout=http_timeout(request.timeout_s),
            )
        except httpx.HTTPError as error:
            self._addresses.fail_over(url)
            raise NoAnswer(error, url) from cut_causes(error)
        if response.status_code == UNAVAILABLE:
            self._addresses.fail_over(url)
        return Response.of(response)

    def run(self, call: Call[T]) -> T:
        """The result of a call."""
        try:
            effect = next(call)
            while True:
                effect = resume(call, self._outcome(effect))
        except StopIteration as stop:
            result: T = stop.value
            return result
        finally:
            call.close()

    def iterate(self, call: Call[None]) -> Iterator[Any]:
        """The values that a call emits."""
        try:
            effect = next(call)
            while True:
                if isinstance(effect, Emit):
                    yield effect.value
                    effect = next(call)
                else:
                    effect = resume(call, self._outcome(effect))
        except StopIteration:
            return
        finally:
            call.close()

    def _new_client(self) -> httpx.Client:
        return httpx.Client(verify=self._context)

    def _outcome(self, effect: Effect) -> object:
        try:
            return self._perform(effect)
        except Exception as error:
            return Failed(error)

    def _perform(self, effect: Effect) -> object:
        if isinstance(effect, Request):
            return self.send(effect)
        if isinstance(effect, Sleep):
            time.sleep(effect.seconds)
            return None
        if isinstance(effect, Open):
            return (_TimedReader if effect.is_timed else _Reader)(effect.source)
        if isinstance(effect, Read):
            return effect.reader.read(effect.wait_s)
        raise TypeError(f"{effect} belongs to a call that is iterated over")


class _Reader:
    """Reads an iterable."""

    def __init__(self, source: Iterable[Any]) -> None:
        self._items = iter(source)

    def read(self, wait_s: float | None) -> object:
        """The next item, or END."""
        return next(self._items, END)

    def close(self) -> None:
        """Nothing is left to do."""


class _TimedReader:
    """Reads an iterable in a thread, so that a read can end in time.

    The thread reads one item ahead.
    """

    def __init__(self, source: Iterable[Any]) -> None:
        self._items: queue.Queue[object] = queue.Queue(maxsize=1)
        self._is_closed = threading.Event()
        threading.Thread(target=self._fill, args=(source,), daemon=True).start()

    def close(self) -> None:
        """Let the thread end, once it has the item that it waits for."""
        self._is_closed.set()

    def read(self, wait_s: float | None) -> object:
        """The next item, END, or LATE after `wait_s`; raises what the iterable raised."""
        try:
            item = self._items.get(timeout=wait_s)
        except queue.Empty:
            return LATE
        if isinstance(item, Failed):
            raise item.error
        return item

    def _fill(self, source: Iterable[Any]) -> None:
        try:
            for item in source:
                self._put(item)
                if self._is_closed.is_set():
                    return
        except Exception as error:
            self._put(Failed(error))
        else:
            self._put(END)

    def _put(self, item: object) -> None:
        while not self._is_closed.is_set():
            with suppress(queue.Full):
                return self._items.put(item, timeout=_PUT_S)
        return None
