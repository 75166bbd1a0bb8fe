"""A model without I/O: its description, many streams in a request, predictions."""

from __future__ import annotations

from base64 import b64encode
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

from carry_client.calls import LOG, Attempts, Call, Emit, Session, Sleep
from carry_client.chunks import Chunk
from carry_client.description import ModelDescription, read_description
from carry_client.errors import (
    AlreadyApplied,
    CarryError,
    EpochMismatch,
    PositionAhead,
    PositionBehind,
    Problem,
    StateChanged,
    StreamMoved,
    read_problem,
)
from carry_client.replies import Prediction, Reply, ServedModel, read_outputs, unreadable
from carry_client.steps import Steps, body_member, to_steps
from carry_client.types import Events
from carry_client.wire import model_path

if TYPE_CHECKING:
    from carry_client.streams import StreamCore

DEFAULT_CHUNK_EVENTS: Final = 256
STREAMS_PER_REQUEST: Final = 256
DELETE_LIMIT: Final = 10_000
"""About how many streams one request deletes."""

OTHER_HEAD: Final = (StateChanged, PositionAhead, PositionBehind, EpochMismatch)
"""Rejections of a chunk because the stream is not where this client left it."""


class ModelCore:
    """One served model; see the module."""

    def __init__(self, session: Session, name: str) -> None:
        """Nothing is requested yet."""
        self.session, self.name = session, name
        self.path = model_path(name)
        self._description: ModelDescription | None = None

    def describe(self) -> Call[ModelDescription]:
        """Read the description from the service."""
        document = yield from self.session.request("GET", self.path)
        try:
            self._description = read_description(document)
        except ValueError as error:
            raise unreadable(error, document) from error
        return self._description

    def description(self, reply: Mapping[str, Any] | None = None) -> Call[ModelDescription]:
        """The description, read again where a reply is of another version."""
        known = self._description
        if known is None or (reply is not None and reply.get("version") != known.version):
            known = yield from self.describe()
        return known

    def chunk_events(self, chunk_events: int | None = None) -> Call[int]:
        """How many events a chunk has, within the service's limit."""
        if chunk_events is not None and chunk_events < 1:
            raise ValueError(f"expected at least one event a chunk, got {chunk_events}")
        limit = (yield from self.description()).max_chunk_steps
        return min(limit, chunk_events or DEFAULT_CHUNK_EVENTS)

    def check_rows(self, steps: Steps) -> Call[None]:
        """Raise ValueError if rows have another width than the model's.

        The service gets rows as bytes without a shape, and would cut them into other events.
        """
        if isinstance(steps, list):
            return
        width = steps.shape[1]
        if width != len((yield from self.description()).codes):
            # a newer version may take rows of another width
            features = len((yield from self.describe()).codes)
            if width != features:
                raise ValueError(
                    f"expected rows of shape [T, {features}] for model {self.name!r}, "
                    f"got shape {list(steps.shape)}"
                )

    def predict(
        self,
        sequences: Iterable[Events],
        params: Mapping[str, str],
        *,
        tokens: Sequence[bytes | None] | None,
        resets: Sequence[Sequence[int]] | None,
    ) -> Call[list[Prediction]]:
        """Compute sequences from the initial state, or from the states of their tokens."""
        encoding = self.session.encoding
        steps = [to_steps(sequence) for sequence in sequences]
        for each in steps:
            yield from self.check_rows(each)
        members = [body_member(each, encoding) for each in steps]
        for name, values in (("state_tokens", tokens), ("resets", resets)):
            if values is not None and len(values) != len(steps):
                raise ValueError(f"{name}: expected one for each sequence, got {len(values)}")
        for member, token in zip(members, tokens or (), strict=False):
            if token is not None:
                is_json = encoding == "json"
                member["state_token"] = b64encode(token).decode() if is_json else token
        for member, own in zip(members, resets or (), strict=False):
            member["resets"] = list(own)
        body = {"sequences": members}
        path = f"{self.path}/predict"
        document = yield from self.session.request("POST", path, body, params=params)
        description = yield from self.description(document)
        is_last_alone = params.get("return_sequences") == "false"
        try:
            return [
                Prediction(**read_outputs(description, each, len(rows) - 1 if is_last_alone else 0))
                for each, rows in zip(document["predictions"], steps, strict=True)
            ]
        except (KeyError, TypeError, ValueError) as error:
            raise unreadable(error, document) from error

    def send_many(
        self, chunks: Sequence[tuple[StreamCore, Events]], params: Mapping[str, str]
    ) -> Call[dict[str, Reply | CarryError]]:
        """Send one chunk to each of many streams; see `Model.send_many`."""
        names = Counter(stream.name for stream, _ in chunks)
        others = {stream.model.name for stream, _ in chunks} - {self.name}
        if others:
            raise ValueError(f"expected streams of model {self.name!r}, got some of {others}")
        if len(names) < len(chunks):
            twice = [name for name, count in names.items() if count > 1]
            raise ValueError(f"expected each stream once, got twice: {twice[:3]}")
        with ExitStack() as stack:
            for stream, _ in chunks:
                stack.enter_context(stream.in_use())
            return (yield from self._deliver_many(chunks, params))

    def _deliver_many(
        self, chunks: Sequence[tuple[StreamCore, Events]], params: Mapping[str, str]
    ) -> Call[dict[str, Reply | CarryError]]:
        """The outcomes by name, in the order of the streams."""
        waiting: dict[StreamCore, Chunk] = {}
        outcomes: dict[str, Reply | CarryError] = {}
        steps = [to_steps(events) for _, events in chunks]
        for each in steps:
            yield from self.check_rows(each)
        for (stream, _), each in zip(chunks, steps, strict=True):
            try:
                head = yield from stream.known_head()
            except StreamMoved as error:
                outcomes[stream.name] = error
            else:
                stream.is_uncertain = True
                waiting[stream] = Chunk(head.position, each)
        limit = min(STREAMS_PER_REQUEST, (yield from self.description()).max_items)
        attempts = Attempts(self.session)
        while waiting:
            some = dict(islice(waiting.items(), limit))
            try:
                results = yield from self._attempt_many(some, params, attempts)
            except Problem as problem:
                outcomes.update({stream.name: problem for stream in waiting})
                break
            failed: Problem | None = None
            for (stream, chunk), result in zip(some.items(), results, strict=True):
                outcome = yield from _read_outcome(stream, chunk, result, params)
                outcomes[stream.name] = outcome
                del waiting[stream]
                if isinstance(outcome, Problem) and outcome.is_retryable:
                    failed, waiting[stream] = outcome, chunk
            if failed is not None:
                try:
                    delay_s = attempts.next_delay_s(failed)
                except Problem:
                    break
                yield Sleep(delay_s)
        return {stream.name: outcomes[stream.name] for stream, _ in chunks}

    def _attempt_many(
        self, chunks: Mapping[StreamCore, Chunk], params: Mapping[str, str], attempts: Attempts
    ) -> Call[list[Any]]:
        """The results of a request for many streams."""
        items = []
        for stream, chunk in chunks.items():
            head = stream.head
            match = {"if_match": head.etag} if head is not None and head.epoch else {}
            items.append(
                {"stream": stream.name, "position": chunk.start, **match, **stream.member(chunk)}
            )
        path = f"{self.path}/chunks"
        body = {"chunks": items}
        document = yield from self.session.request(
            "POST", path, body, params=params, attempts=attempts
        )
        results = document.get("results") if isinstance(document, dict) else None
        if not isinstance(results, list) or len(results) != len(items):
            raise unreadable(ValueError(f"expected {len(items)} results"), document)
        return results

    def streams(self, prefix: str) -> Call[None]:
        """List the model's streams; emits each name once."""
        cursor: str | None = None
        seen: set[str] = set()
        while True:
            params = {"prefix": prefix, **({} if cursor is None else {"cursor": cursor})}
            document = yield from self.session.request("GET", f"{self.path}/streams", params=params)
            for name in document["streams"]:
                if name not in seen:
                    seen.add(name)
                    yield Emit(name)
            cursor = document["cursor"]
            if cursor is None:
                return

    def delete_streams(self, prefix: str) -> Call[int]:
        """Delete all streams of a prefix, in requests of bounded size; how many were deleted."""
        deleted, cursor = 0, None
        while True:
            params = {"prefix": prefix, "limit": str(DELETE_LIMIT)}
            if cursor is not None:
                params["cursor"] = cursor
            document = yield from self.session.request(
                "DELETE", f"{self.path}/streams", params=params
            )
            deleted += int(document["deleted"])
            cursor = document["cursor"]
            if cursor is None:
                return deleted


def _read_outcome(
    stream: StreamCore, chunk: Chunk, result: Any, params: Mapping[str, str]
) -> Call[Reply | CarryError]:
    """The outcome of one item; a stream that is elsewhere is recovered by itself."""
    try:
        if "error" not in result:
            return (yield from stream.accept_reply(chunk, result["reply"], params))
        problem = read_problem(int(result["status"]), result["error"])
        if isinstance(problem, AlreadyApplied):
            stream.accept(chunk, problem.head)
        if isinstance(problem, OTHER_HEAD):
            return (yield from stream.deliver(chunk, params))
        if problem.is_retryable:
            LOG.info("stream %r: %s", stream.name, problem)
        return problem
    except CarryError as error:
        return error
    except (KeyError, TypeError, ValueError) as error:
        return unreadable(error, result)


def list_models(session: Session) -> Call[list[ServedModel]]:
    """The served models."""
    document = yield from session.request("GET", "/v1/models")
    try:
        return [
            ServedModel(
                name=str(each["name"]),
                version=str(each["version"]),
                description=str(each["description"]),
                input_features=int(each["input_features"]),
                takes_events=bool(each["events"]),
                outputs=tuple(each["outputs"]),
                runtime=str(each.get("runtime", "")),
            )
            for each in document["models"]
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise unreadable(error, document) from error
