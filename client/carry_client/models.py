"""A model without I/O: its description, predictions, the list of its streams."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from carry_client.calls import Call, Emit, Session
from carry_client.description import ModelDescription, read_description
from carry_client.replies import Prediction, ServedModel, read_alarm, read_outputs, unreadable
from carry_client.steps import Steps, body_member, to_steps
from carry_client.types import Events
from carry_client.wire import model_path

DEFAULT_CHUNK_EVENTS: Final = 256
VALUE_BYTES: Final = 48
"""A value of an event or a row takes fewer bytes in a body, with its name."""
DELETE_LIMIT: Final = 10_000
"""About how many streams one request deletes."""


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
        """How many events a chunk has, within the service's limits of events and of bytes."""
        if chunk_events is not None and chunk_events < 1:
            raise ValueError(f"expected at least one event a chunk, got {chunk_events}")
        known = yield from self.description()
        values = max(len(known.codes), len(known.fields or ()))
        fitting = max(1, known.max_body_bytes // (VALUE_BYTES * max(1, values)))
        return min(known.max_chunk_steps, fitting, chunk_events or DEFAULT_CHUNK_EVENTS)

    def check_rows(self, steps: Steps) -> Call[None]:
        """Raise ValueError if rows have another width than the model's.

        The service gets rows as bytes without a shape, and would cut them into other events. The
        description is read before anything is sent, also for events: without it no reply can be
        read, so that a chunk would be applied in vain.

        Raises:
            Forbidden: the access key does not allow `models`.
            Problem, ValueError
        """
        known = yield from self.description()
        if isinstance(steps, list):
            return
        width = steps.shape[1]
        if width != len(known.codes):
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

    def alarms(self, prefix: str) -> Call[None]:
        """List the model's open alarms, newest first; emits each."""
        params = {"prefix": prefix}
        while True:
            document = yield from self.session.request("GET", f"{self.path}/alarms", params=params)
            for alarm in document["alarms"]:
                yield Emit(read_alarm(alarm))
            if document["cursor"] is None:
                return
            params["cursor"] = document["cursor"]

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
