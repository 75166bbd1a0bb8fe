"""Configuration of a consumer: its topics, and how their entries are read and written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    StringConstraints,
    ValidationError,
)

from models.spec.stream_name import STREAM_NAME_RULE, is_stream_name
from service.consumers.kafka_config import (
    PREFIX,
    KafkaTopic,
    Property,
    check_properties,
    parse_topic,
)
from service.consumers.webhook_config import Secret, WebhookConfig
from service.core.errors import OperatorError
from service.store.keys import KeySpace
from service.store.source_mark import parse_offset
from service.store.topics import TopicKeys, TopicRegistration

Name = Annotated[str, StringConstraints(min_length=1, max_length=256)]
TopicName = Annotated[str, StringConstraints(min_length=1, max_length=1024)]
START_IDS: Final = {"beginning": "0", "end": "$"}
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
    """Whether the name is the entry's key: of a record of Kafka, its key; of an entry of a Redis
    stream, the stream's own name."""

    def model_post_init(self, _: Any) -> None:
        if (self.field is not None) + (self.constant is not None) + self.key != 1:
            raise ValueError("expected `key`, or a mapping of either `field` or `constant`")
        if self.constant is not None and not is_stream_name(self.constant):
            raise ValueError(f"expected as `constant` {STREAM_NAME_RULE}")


def _stream_source(value: Any) -> Any:
    return {"key": True} if value == "key" else value


def _parse_start(value: Any) -> Any:
    if value in ("beginning", "end"):
        return value
    if isinstance(value, dict) and value:
        numbers = [each for pair in value.items() for each in pair]
        if all(type(each) is int and 0 <= each < 2**63 for each in numbers):
            return value
    if type(value) in (int, str):
        with suppress(ValueError):
            return "{}-{}".format(*parse_offset(str(value)))
    raise ValueError(
        "expected beginning, end, the id of an entry such as 1700000000000-3, or with a topic of "
        "Kafka the offset of each partition, such as {0: 1200, 1: 800}"
    )


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

    source: Annotated[TopicName, Field(alias="from")]
    """The input topic, a Redis stream with the events; with `partitioned`, the last part of
    `carry{p0017}:in:NAME`. Or a topic of Kafka, `kafka://HOST:PORT/TOPIC`."""

    sink: Annotated[TopicName, Field(alias="to")]
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

    start: Annotated[str | dict[int, int], PlainValidator(_parse_start)] = "beginning"
    """Where a new group starts to read a topic: `beginning`, `end`, or behind the entry with an id;
    of Kafka at the offset of each partition, such as `{0: 1200, 1: 800}`, and at the beginning of
    those that are not named."""

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
    """The receiver that outputs are also posted to."""

    kafka: dict[str, Property] = {}
    """Properties of the Kafka clients (librdkafka), such as `security.protocol`; a secret is
    `{env: NAME}` or `{file: PATH}`."""

    tombstones: Literal["dead_letter", "skip"] = "dead_letter"
    """Whether Kafka records without a value become dead letters or are skipped."""

    def model_post_init(self, _: Any) -> None:
        if self.has_relay and self.keep:
            raise ValueError(
                "keep: expected 0 with `webhook` or a topic of Kafka, since outputs that are not "
                "delivered would be removed; `delete: true` in `webhook` removes what is delivered"
            )
        if self.webhook is not None and self.kafka_sink is not None:
            raise ValueError("to: expected a topic of the store with `webhook`, got one of Kafka")
        check_properties(self.kafka)
        is_kafka, is_offsets = self.kafka_source is not None, isinstance(self.start, dict)
        if is_offsets and not is_kafka:
            raise ValueError("start: expected beginning, end or an id with a topic of the store")
        if is_kafka and not is_offsets and self.start not in START_IDS:
            raise ValueError("start: expected beginning, end or offsets with a topic of Kafka")
        if self.kafka_source is not None:
            if self.event.field is None:
                raise ValueError("event: expected a field with a topic of Kafka, got null")
        elif self.stream.key and not is_stream_name(self.source):
            raise ValueError(f"from: expected with `stream: key` {STREAM_NAME_RULE}")

    @property
    def start_id(self) -> str:
        """The id behind which a new group starts; of Kafka all of what was read."""
        if isinstance(self.start, dict) or self.kafka_source is not None:
            return START_IDS["beginning"]
        return START_IDS.get(self.start, self.start)

    @property
    def constant_stream(self) -> str | None:
        """The one stream of all entries; None if each names its own."""
        is_own_name = self.stream.key and self.kafka_source is None
        return self.source if is_own_name else self.stream.constant

    @property
    def stream_field(self) -> str | None:
        """The field of an entry with the name of its stream; None if it is constant."""
        is_key = self.stream.key and self.kafka_source is not None
        return "stream" if is_key else self.stream.field

    @property
    def kafka_source(self) -> KafkaTopic | None:
        """The topic of Kafka that the events come from, if they do."""
        return parse_topic(self.source)

    @property
    def kafka_group(self) -> str:
        """The consumer group of Kafka, one for each model. No group or model contains a colon."""
        return f"{self.group}:{self.model}"

    @property
    def input(self) -> str:
        """The name of the input topic in the store. Of a topic of Kafka each group has its own."""
        topic = self.kafka_source
        return self.source if topic is None else f"{topic.name}:{self.kafka_group}"

    @property
    def kafka_sink(self) -> KafkaTopic | None:
        """The topic of Kafka that the outputs are delivered to, if they are."""
        return parse_topic(self.sink)

    @property
    def has_relay(self) -> bool:
        """Whether the outputs are delivered to a sink outside the store."""
        return self.webhook is not None or self.kafka_sink is not None

    @property
    def output(self) -> str:
        """The name of the output topic in the store; from there a relay delivers to Kafka."""
        topic = self.kafka_sink
        return self.sink if topic is None else f"{topic.name}:{self.kafka_group}"

    @property
    def deletes(self) -> bool:
        """Whether acknowledged entries are deleted: those of records of Kafka always are."""
        return self.delete or self.kafka_source is not None

    def registration(self, *, is_cluster: bool) -> TopicRegistration:
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
        source = self.input
        dead_letters = self.dead_letters or (source if partitioned else f"{source}:dead")
        names = source, self.output, dead_letters
        if not partitioned and len({*names}) < len(names):
            got = "{!r}, {!r} and {!r}".format(*names)
            raise OperatorError(f"from, to, dead_letters: expected different topics, got {got}")
        return TopicRegistration(self.group, *names, self.model, partitioned)

    def topics(self, space: KeySpace, *, is_cluster: bool) -> list[TopicKeys]:
        """The keys of each topic.

        Raises:
            OperatorError: as for `registration`.
        """
        registration = self.registration(is_cluster=is_cluster)
        return registration.keys(space, self.keep, deletes=self.deletes)

    def outboxes(self, space: KeySpace, *, is_cluster: bool) -> list[TopicKeys]:
        """The keys by which a relay reads the output topics.

        Raises:
            OperatorError: as for `topics`.
        """
        deletes = self.kafka_sink is not None or bool(self.webhook and self.webhook.delete)
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
    if overrides["from"].startswith(PREFIX):
        raise OperatorError("expected a configuration, since the topic is one of Kafka")
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
    "stream": StreamSource,
    "event": EventSource,
    "webhook": WebhookConfig,
}
"""The members that are mappings."""


def _members_at(place: Sequence[str | int]) -> list[str]:
    """The names that are known beside the one at a place."""
    part: type[BaseModel] = ConsumerConfig
    if Secret.__name__ in place:
        part = Secret
    elif len(place) > 1:
        part = _PARTS[str(place[0])]
    return sorted(field.alias or name for name, field in part.model_fields.items())


def _explain(error: ValidationError) -> Iterator[str]:
    for problem in error.errors(include_url=False):
        place = ".".join(map(str, problem["loc"]))
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            message = f"expected a member among {', '.join(_members_at(problem['loc']))}"
        elif problem["type"] == "model_type":
            names = ", ".join(_members_at((*problem["loc"], "")))
            message = f"expected a mapping of {names}"
        if message[1:2].islower():
            message = f"{message[0].lower()}{message[1:]}"
        # values of these may be secret, and those of unknown members
        is_secret = place.partition(".")[0] in ("", "webhook", "kafka")
        shows_value = problem["type"] not in ("missing", "extra_forbidden") and not is_secret
        got = f", got {problem['input']!r}" if shows_value else ""
        yield f"{place}: {message}{got}".removeprefix(": ")
