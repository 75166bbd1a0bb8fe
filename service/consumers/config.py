"""Configuration of a consumer: its topics, and how their entries are read and written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
)

from service.consumers.webhook_config import Secret, WebhookConfig
from service.core.errors import OperatorError
from service.core.values import STREAM_NAME_RULE, is_stream_name
from service.store.keys import KeySpace
from service.store.topics import TopicKeys, TopicRecord

Name = Annotated[str, StringConstraints(min_length=1, max_length=256)]
NamePart = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._-]+$", max_length=64)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class StreamSource(_Part):
    """Where the name of an entry's stream is: in a field, constant, or its key. One of them."""

    field: Name | None = None
    """The field of the entry with the name."""

    constant: Name | None = None
    """The one stream of all entries."""

    key: bool = False
    """Whether the name is the entry's key: of a Redis stream its own name."""

    def model_post_init(self, _: Any) -> None:
        if (self.field is not None) + (self.constant is not None) + self.key != 1:
            raise ValueError("expected `key`, or a mapping of either `field` or `constant`")
        if self.constant is not None and not is_stream_name(self.constant):
            raise ValueError(f"expected as `constant` {STREAM_NAME_RULE}")


def _stream_source(given: Any) -> Any:
    return {"key": True} if given == "key" else given


class EventSource(_Part):
    """Where an entry's event is."""

    field: Name | None = "event"
    """The field with the event; null: each other field of the entry is a member of the event."""

    format: Literal["json", "msgpack"] = "json"
    """How the field is encoded. Values of flat fields are JSON numbers, true, false or null,
    and otherwise strings."""


class ConsumerConfig(_Part):
    """What `carry consume` reads and writes."""

    model: Name
    """The model that computes the outputs."""

    source: Annotated[Name, Field(alias="from")]
    """The input topic, a Redis stream with the events; with `partitioned`, the last part of
    `carry{p0017}:in:NAME`."""

    sink: Annotated[Name, Field(alias="to")]
    """The output topic; with `partitioned`, the last part of `carry{p0017}:out:NAME`."""

    dead_letters: Name | None = None
    """The topic for entries that cannot be processed; by default the source's name and `:dead`,
    with `partitioned` `carry{p0017}:dead:NAME` of the source's name."""

    partitioned: bool | None = None
    """Whether there is a topic for each partition of the store; by default on a cluster only,
    where there must be."""

    group: NamePart = "carry"
    """The consumer group; services that each process all events need different ones."""

    stream: Annotated[StreamSource, BeforeValidator(_stream_source)] = StreamSource(field="stream")
    event: EventSource = EventSource()

    position: Name | None = "position"
    """The field with the event's position in its stream, which makes a repeated event a
    duplicate; entries without the field are appended. null: no entry has one."""

    start: Literal["beginning", "end"] = "beginning"
    """Where a new group starts to read a topic."""

    create: bool = False
    """Whether to create a topic that does not exist; topics of partitions are always created."""

    on_error: Literal["continue", "halt"] = "continue"
    """What a stream does after an event that cannot be processed: continue with the next, or halt:
    its later events become dead letters too, until they are replayed in order."""

    outputs: Literal["json", "msgpack"] = "json"
    """How the outputs are encoded."""

    where: Name | None = None
    """Which outputs are written: comparisons of outputs with numbers, such as `surprise > 4`, that
    `and` or `or` join; a name alone, such as `alarm`, means that it is not 0."""

    keep: Annotated[int, Field(ge=0)] = 0
    """About how many entries the output topic keeps; 0 for all."""

    delete: bool = False
    """Whether acknowledged entries are deleted from the input topic."""

    lease_s: Annotated[float, Field(ge=0.2, le=300)] = 5.0
    """Duration of a lease in seconds, after which another consumer acquires the topics of one that
    died. Choose it longer than pauses of a process or the network that should not move topics."""

    webhook: WebhookConfig | None = None
    """Where the outputs are posted, too."""

    def model_post_init(self, _: Any) -> None:
        if self.webhook is not None and self.keep:
            raise ValueError(
                "keep: expected 0 with `webhook`, since outputs that are not delivered would be "
                "removed; `delete: true` in `webhook` removes what is delivered"
            )
        if self.stream.key and not is_stream_name(self.source):
            raise ValueError(f"from: expected with `stream: key` {STREAM_NAME_RULE}")

    @property
    def constant_stream(self) -> str | None:
        """The one stream of all entries; None if each names its own."""
        return self.source if self.stream.key else self.stream.constant

    def record(self, *, is_cluster: bool) -> TopicRecord:
        """What the consumer group reads and writes.

        Raises:
            OperatorError: a cluster needs partitions, or two topics are the same.
        """
        partitioned = is_cluster if self.partitioned is None else self.partitioned
        if is_cluster and not partitioned:
            raise OperatorError(
                "partitioned: expected true, since the keys of a topic and of its streams must be "
                "in one slot of the cluster; `carry produce` writes to the right partition"
            )
        dead_letters = self.dead_letters or (self.source if partitioned else f"{self.source}:dead")
        names = self.source, self.sink, dead_letters
        if not partitioned and len({*names}) < len(names):
            got = "{!r}, {!r} and {!r}".format(*names)
            raise OperatorError(f"from, to, dead_letters: expected different topics, got {got}")
        return TopicRecord(self.group, *names, self.model, partitioned)

    def topics(self, space: KeySpace, *, is_cluster: bool) -> list[TopicKeys]:
        """The keys of each topic.

        Raises:
            OperatorError: as for `record`.
        """
        record = self.record(is_cluster=is_cluster)
        return record.keys(space, self.keep, deletes=self.delete)

    def outboxes(self, space: KeySpace, *, is_cluster: bool) -> list[TopicKeys]:
        """The keys by which a relay reads the output topics.

        Raises:
            OperatorError: as for `topics`.
        """
        deletes = self.webhook is not None and self.webhook.delete
        names = [keys.outputs for keys in self.topics(space, is_cluster=is_cluster)]
        group = f"{self.group}/relay"
        return [TopicKeys.of(name, name, f"{name}:dead", group, deletes=deletes) for name in names]


def read_config(path: Path, overrides: Mapping[str, Any]) -> ConsumerConfig:
    """Read the configuration of a YAML file; values that are not None override it.

    Raises:
        OperatorError: naming the file, the place, what was expected and what came.
    """
    try:
        document = yaml.safe_load(path.read_text())
    except OSError as error:
        raise OperatorError(f"{path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise OperatorError(f"{path}: expected YAML: {reason}") from error
    if not isinstance(document, dict):
        raise OperatorError(f"{path}: expected a mapping, got {type(document).__name__}")
    return make_config(document, str(path), overrides)


def read_any_config(path: Path | None, overrides: Mapping[str, Any]) -> ConsumerConfig:
    """The configuration of a command that reads topics and computes nothing: of a file, or of the
    name of the source.

    Raises:
        OperatorError: as for `read_config`, or neither is given.
    """
    if path is not None:
        return read_config(path, overrides)
    if overrides.get("from") is None:
        raise OperatorError("expected a configuration, or --from TOPIC")
    return make_config({"model": "-", "to": "-"}, "options", overrides)


def make_config(
    document: Mapping[str, Any], origin: str, overrides: Mapping[str, Any] | None = None
) -> ConsumerConfig:
    """Validate a configuration.

    Args:
        origin: names the configuration in errors.

    Raises:
        OperatorError: as for `read_config`.
    """
    given = {name: value for name, value in (overrides or {}).items() if value is not None}
    try:
        return ConsumerConfig.model_validate({**document, **given})
    except ValidationError as error:
        raise OperatorError(f"{origin}: {'; '.join(_explain(error))}") from error


_PARTS: Final[dict[str, type[BaseModel]]] = {
    each.__name__: each for each in (StreamSource, EventSource, WebhookConfig, Secret)
}


def _explain(error: ValidationError) -> Iterator[str]:
    known = {field.alias or name for name, field in ConsumerConfig.model_fields.items()}
    for problem in error.errors(include_url=False):
        place = ".".join(map(str, problem["loc"]))
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            among = f" among {', '.join(sorted(known))}" if len(problem["loc"]) == 1 else ""
            message = f"expected a member{among}"
        elif problem["type"] == "model_type":
            part = _PARTS[problem["ctx"]["class_name"]]
            message = f"expected a mapping of {', '.join(part.model_fields)}"
        if message[1:2].islower():
            message = f"{message[0].lower()}{message[1:]}"
        # values of a webhook may be secret
        shows_value = problem["type"] != "missing" and place.partition(".")[0] not in (
            "",
            "webhook",
        )
        got = f", got {problem['input']!r}" if shows_value else ""
        yield f"{place}: {message}{got}".removeprefix(": ")
