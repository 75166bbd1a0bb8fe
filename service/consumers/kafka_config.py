"""Configuration of a Kafka topic: its URL, and the properties of the client."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from pydantic import StrictBool, StrictFloat, StrictInt, StrictStr

from service.consumers.webhook_config import Secret, read_secret
from service.core.errors import OperatorError

PREFIX: Final = "kafka://"
_URL: Final = re.compile(r"kafka://([^/@\s]*)/([A-Za-z0-9._-]{1,249})").fullmatch

OWN_PROPERTIES: Final = {
    "acks",
    "auto.offset.reset",
    "client.id",
    "enable.auto.commit",
    "enable.auto.offset.store",
    "enable.idempotence",
    "group.id",
    "group.protocol",
    "partition.assignment.strategy",
}
"""Properties that the guarantees depend on, or that other members of the configuration set."""


Property = StrictBool | StrictInt | StrictFloat | StrictStr | Secret


class KafkaTopic(NamedTuple):
    """A topic of Kafka.

    Attributes:
        servers: addresses of brokers, `host:port` with commas; empty if the properties have them.
    """

    servers: str
    name: str

    def properties(self, configured: Mapping[str, Any]) -> dict[str, Any]:
        """The properties of a client.

        Raises:
            OperatorError: a secret is missing, or there are no addresses.
        """
        properties = {
            name: read_secret(value, f"kafka.{name}") if isinstance(value, Secret) else value
            for name, value in configured.items()
        }
        if self.servers:
            properties["bootstrap.servers"] = self.servers
        if not properties.get("bootstrap.servers"):
            raise OperatorError(
                f"kafka: expected brokers in the URL, kafka://HOST:PORT/{self.name}, or the "
                "property bootstrap.servers"
            )
        return properties


def parse_topic(text: str) -> KafkaTopic | None:
    """The topic of a URL `kafka://HOST:PORT[,HOST:PORT]/TOPIC`; None if it is no URL of Kafka.

    Raises:
        ValueError: it is malformed.
    """
    if not text.startswith(PREFIX):
        return None
    match = _URL(text)
    if match is None:
        raise ValueError(
            "expected kafka://HOST:PORT[,HOST:PORT]/TOPIC, with credentials in `kafka`"
        )
    return KafkaTopic(*match.groups())


def check_properties(properties: Mapping[str, Any]) -> None:
    """Check that no property is set that Carry sets.

    Raises:
        ValueError
    """
    if reserved := OWN_PROPERTIES & properties.keys():
        raise ValueError(f"{', '.join(sorted(reserved))}: set by Carry")
