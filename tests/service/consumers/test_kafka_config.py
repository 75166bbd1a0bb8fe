"""The configuration of a consumer of Kafka, without a broker or a store."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from service.consumers.config import make_config
from service.consumers.kafka_client import load_library
from service.core.errors import OperatorError
from tests.support.consumers import PROBE


def test_configuration_is_checked() -> None:
    def fails(message: str, **config: Any) -> None:
        with pytest.raises(OperatorError, match=message):
            make_config(PROBE | config, "test")

    url = "kafka://127.0.0.1:9092/events"
    fails(r"expected kafka://HOST:PORT", **{"from": "kafka://user:secret@host/events"})
    fails(r"expected kafka://HOST:PORT", **{"from": "kafka://host"})
    fails("group.id: set by Carry", **{"from": url, "kafka": {"group.id": "a"}})
    fails("expected `env` or `file`", **{"from": url, "kafka": {"sasl.password": {}}})
    fails("expected a field", **{"from": url, "event": {"field": None}})


def test_groups_and_models_have_topics_of_their_own() -> None:
    shared = PROBE | {"from": "kafka://127.0.0.1:9092/events"}
    one = make_config(shared | {"group": "a-b", "model": "c"}, "test")
    other = make_config(shared | {"group": "a", "model": "b-c"}, "test")
    assert one.input != other.input
    assert one.kafka_group != other.kafka_group


def test_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "confluent_kafka", None)
    with pytest.raises(OperatorError, match=r"pip install 'carry\[kafka\]'"):
        load_library()
