"""Clients of Kafka (librdkafka), their logs, and what a topic is. Needs the extra `kafka`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

from service.core.errors import OperatorError

if TYPE_CHECKING:
    from confluent_kafka import KafkaError

Client = TypeVar("Client")

REQUEST_TIMEOUT_S: Final = 5.0


class TopicDescription(NamedTuple):
    """A topic as its brokers describe it.

    Attributes:
        id: identifies the topic: one that is created again has another.
        partitions: how many it has.
    """

    id: str
    partitions: int


def load_library() -> ModuleType:
    """The library of the clients.

    Raises:
        OperatorError: it is not installed.
    """
    try:
        import confluent_kafka
        import confluent_kafka.admin
    except ImportError as error:
        raise OperatorError(
            f"a topic of Kafka needs the extra kafka: pip install 'carry[kafka]' ({error})"
        ) from error
    return confluent_kafka


def with_logs(properties: Mapping[str, Any]) -> dict[str, Any]:
    """Add the logger `kafka` to the properties of a client."""
    return {"log.connection.close": False, **properties, "logger": logging.getLogger("kafka")}


def make_client(kind: Callable[[dict[str, Any]], Client], properties: Mapping[str, Any]) -> Client:
    """Make a client of a class of the library.

    Raises:
        OperatorError: a property does not exist, or has an invalid value.
    """
    try:
        return kind(dict(properties))
    except load_library().KafkaException as error:
        raise OperatorError(f"kafka: {error.args[0].str()}") from error


def describe_topic(properties: Mapping[str, Any], name: str) -> TopicDescription:
    """Ask the brokers for a topic.

    Raises:
        OperatorError: there is none, the client is not authorized to see it, or no broker answers.
    """
    library = load_library()
    # errors of connections, since a request only reports that it had no answer
    errors: list[KafkaError] = []
    admin = make_client(library.admin.AdminClient, {**properties, "error_cb": errors.append})
    topics = library.TopicCollection([name])
    described = admin.describe_topics(topics, request_timeout=REQUEST_TIMEOUT_S)
    try:
        topic = described[name].result()
    except library.KafkaException as error:
        admin.poll(0)
        raise OperatorError(explain((*errors, error.args[0])[0], name)) from error
    return TopicDescription(str(topic.topic_id), len(topic.partitions))


def explain(error: KafkaError, name: str) -> str:
    """Describe an error of a topic in a sentence."""
    code = load_library().KafkaError
    causes = {
        code.UNKNOWN_TOPIC_OR_PART: "there is no such topic",
        code._UNKNOWN_TOPIC: "there is no such topic",
        code.TOPIC_AUTHORIZATION_FAILED: "the client is not authorized to use the topic",
        code.GROUP_AUTHORIZATION_FAILED: "the client is not authorized to use the consumer group",
        code.SASL_AUTHENTICATION_FAILED: "the broker rejected the credentials",
        code._AUTHENTICATION: "the broker rejected the credentials",
        code._TIMED_OUT: "no broker answers",
        code._TRANSPORT: "no broker answers",
        code._ALL_BROKERS_DOWN: "no broker answers",
    }
    cause = causes.get(error.code(), "failed")
    return f"kafka topic {name!r}: {cause} ({error.str()})"
