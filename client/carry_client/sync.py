"""The client: `Carry`, `Model`; `Stream` is in `sync_stream.py`.

They only drive the calls of `models.py` and `many_streams.py`. `aio.py`, the same for an event
loop, is generated from this file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from os import PathLike
from ssl import SSLContext
from typing import TYPE_CHECKING

from carry_client.calls import Session
from carry_client.description import ModelDescription
from carry_client.errors import CarryError
from carry_client.heads import Save, open_save
from carry_client.many_streams import send_many
from carry_client.models import ModelCore, list_models
from carry_client.replies import (
    Alarm,
    Prediction,
    Reply,
    ServedModel,
)
from carry_client.streams import StreamCore
from carry_client.sync_driver import Driver
from carry_client.sync_stream import Stream
from carry_client.types import Encoding, Events, Head, Json, ReplayFrom
from carry_client.wire import Addresses, authorization, read_response, reply_params, ssl_context

if TYPE_CHECKING:
    from typing_extensions import Self


class Carry:
    """A running service.

    A service and its models may be used by any number of threads; a stream by one at a time.

    Attributes:
        url: its first address.
    """

    def __init__(
        self,
        url: str | Sequence[str],
        *,
        timeout_s: float = 30.0,
        deadline_s: float = 120.0,
        encoding: Encoding = "msgpack",
        api_key: str | None = None,
        headers: Mapping[str, str] | None = None,
        verify: SSLContext | str | PathLike[str] | None = None,
    ) -> None:
        """Nothing is requested yet.

        Args:
            url: address of the service, such as `http://127.0.0.1:8000`; or several for
                failover: the next one is used if one does not answer or is unavailable (503).
            timeout_s: how long one attempt may take, in seconds; sent as `Carry-Timeout`.
            deadline_s: how long a call may take with all its attempts, in seconds. `send_all` has
                this time for each chunk.
            encoding: of the bodies.
            api_key: an access key of the service; None for that of the environment,
                `CARRY_API_KEY` or the first line of the file `CARRY_API_KEY_FILE`; "" for none.
            headers: sent with every request.
            verify: certificates that an `https` service is trusted by: a PEM file, or a context,
                which may also have a client's certificate; None for the public authorities.

        Raises:
            Problem: `invalid_url`.
            ValueError: another encoding, no access key, or `verify` cannot be read or has no
                certificates.
        """
        addresses = Addresses(url)
        self.url = addresses.current
        self._session = Session(
            encoding=encoding,
            timeout_s=timeout_s,
            deadline_s=deadline_s,
            headers={**authorization(api_key), **(headers or {})},
        )
        self._driver = Driver(addresses, ssl_context(verify))

    def models(self) -> list[ServedModel]:
        """The served models.

        Raises:
            Problem
        """
        return self._driver.run(list_models(self._session))

    def model(self, name: str) -> Model:
        """One of the models; nothing is requested yet."""
        return Model(self._driver, ModelCore(self._session, name))

    def wait_until_ready(self) -> None:
        """Wait until the service is ready, at most for the deadline.

        Raises:
            Problem: the last one.
        """
        self._driver.run(self._session.request("GET", "/health/ready"))

    def request(
        self,
        method: str,
        path: str,
        body: Json | bytes = None,
        *,
        headers: Mapping[str, str] | None = None,
        params: Mapping[str, str | int] | None = None,
    ) -> Json:
        """Send one request of the HTTP API, in one attempt.

        Args:
            body: a document, or bytes that are encoded already.

        Returns:
            The document of the reply; None for an empty one.

        Raises:
            Problem
        """
        attempt = self._session.attempt(method, path, body, headers=headers, params=params)
        response = self._driver.send(attempt)
        return read_response(
            response.status, response.content_type, response.content, response.retry_after
        )

    def text(self, path: str) -> str:
        """The body of a page such as `/metrics`, in one attempt.

        Raises:
            Problem
        """
        response = self._driver.send(self._session.attempt("GET", path))
        if response.status >= 400:
            read_response(response.status, response.content_type, response.content)
        return response.content.decode()

    def close(self) -> None:
        """Close the connections."""
        self._driver.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class Model:
    """A model of a service.

    Attributes:
        name: its name.
    """

    def __init__(self, driver: Driver, core: ModelCore) -> None:
        self._driver, self._core = driver, core
        self.name = core.name

    def describe(self) -> ModelDescription:
        """Its events, outputs and limits, read from the service.

        Raises:
            ModelNotFound, Problem
        """
        return self._driver.run(self._core.describe())

    def stream(
        self,
        name: str,
        *,
        save: Save | None = None,
        head: Head | None = None,
        replay_from: ReplayFrom | None = None,
        buffer_events: int = 10_000,
        false_alarms_per_day: float | None = None,
    ) -> Stream:
        """One of the model's streams; nothing is requested yet.

        The stream continues at the position that the service has. It notices by epoch and tag if
        the service is elsewhere than this client's last reply:

        - at an earlier head of the same history, or missing (the store lost its last writes, or
          the stream was deleted): the missing events are sent again, from the buffer or from
          `replay_from`; otherwise `StreamRolledBack` is raised;
        - anywhere else: `StreamDiverged` is raised, and `refresh` accepts the service's head.

        Args:
            save: a file, or a function that is called, to keep the head after each reply, so that a
                later process notices the same.
            head: the head that such a function kept.
            replay_from: given a position, returns the stream's events from there on.
            buffer_events: how many events are kept in memory to be sent again; 0 for none.
            false_alarms_per_day: for a model with detection, the expected number of false alarms
                of the stream in a day, by which the alarms of all chunks that are sent open and
                close; None for the model's.

        Raises:
            ValueError: the file holds the head of another stream.
        """
        saved, keep = open_save(save, head, self.name, name)
        core = StreamCore(
            *(self._core.session, self._core, name),
            saved=saved,
            save=keep,
            replay_from=replay_from,
            buffer_events=buffer_events,
            false_alarms_per_day=false_alarms_per_day,
        )
        return Stream(self._driver, core)

    def streams(self, prefix: str = "") -> Iterator[str]:
        """Names of the streams that begin with `prefix`, each once, in no order, page by page.

        A stream that exists throughout comes; others may.

        Raises:
            Problem
        """
        yield from self._driver.iterate(self._core.streams(prefix))

    def alarms(self, prefix: str = "") -> Iterator[Alarm]:
        """Open alarms of the streams that begin with `prefix`, newest first, page by page.

        Raises:
            Problem
        """
        yield from self._driver.iterate(self._core.alarms(prefix))

    def delete_streams(self, prefix: str) -> int:
        """Delete the streams that begin with `prefix`, all of them for `""`; returns how many.

        Raises:
            Problem
        """
        return self._driver.run(self._core.delete_streams(prefix))

    def send_many(
        self,
        events: Mapping[Stream, Events],
        *,
        return_sequences: bool = True,
        return_state: bool = False,
        return_attention: bool = False,
    ) -> dict[str, Reply | CarryError]:
        """Send one chunk to each of many streams, up to 256 in a request.

        Items that fail with a retryable problem are sent again without the others. A stream whose
        head is not known yet is read first.

        Args:
            events: by stream, as `Stream.send` takes them.
            return_sequences, return_state, return_attention: as for `Stream.send`.

        Returns:
            By name, each stream's outcome: its reply, or the error that `Stream.send` raises.

        Raises:
            Problem: the head of a stream, or the model, cannot be read.
            ValueError, TypeError: some are no events, or no streams of this model, each once;
                nothing was sent.
        """
        if not all(isinstance(stream, Stream) for stream in events):
            raise TypeError(f"expected events by Stream, got keys {list(events)[:3]}")
        chunks = [(stream._core, each) for stream, each in events.items()]
        params = reply_params(return_sequences, return_state, return_attention)
        return self._driver.run(send_many(self._core, chunks, params))

    def predict(
        self,
        sequences: Iterable[Events],
        *,
        state_tokens: Sequence[bytes | None] | None = None,
        resets: Sequence[Sequence[int]] | None = None,
        return_state_token: bool = False,
        return_sequences: bool = True,
        return_state: bool = False,
        return_attention: bool = False,
    ) -> list[Prediction]:
        """Compute sequences, from the model's initial state unless tokens say otherwise; no stream
        is read or changed.

        Args:
            sequences: each as `Stream.send` takes it.
            state_tokens: for each sequence the `state_token` of a prediction that it continues.
            resets: for each sequence as for `Stream.send`.
            return_state_token: each prediction has the state after it as a token, with which a
                later sequence continues: only the caller keeps the state.
            return_sequences, return_state, return_attention: as for `Stream.send`.

        Raises:
            StateTokenInvalid, StateTokenOfOtherModel, StateTokenOfOtherVersion, InvalidInput,
                ChunkTooLong, Problem
        """
        params = reply_params(return_sequences, return_state, return_attention)
        token = {"return_state_token": "true"} if return_state_token else {}
        call = self._core.predict(
            sequences, {**params, **token}, tokens=state_tokens, resets=resets
        )
        return self._driver.run(call)
