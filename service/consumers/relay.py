"""Delivers output topics to a sink outside the store, at least once, each topic in order.

An output topic is an outbox: the script that commits a chunk writes it. A relay reads it by a
consumer group of its own, gives a batch to the sink, and acknowledges it once the sink has
confirmed it; what fails is delivered again. So an output arrives twice only with the same stream,
epoch and position, by which a receiver recognises it. A batch of each topic is in delivery at a
time, and `DELIVERIES_AT_ONCE` of all; a slow sink delays no commit.

To add a sink, write a class with the members of `Sink`, a part of `ConsumerConfig` for its
settings, and make it in `service.consume.make_relay`.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from typing import Final, Protocol

import structlog

from service.consumers.config import ConsumerConfig
from service.consumers.outputs import dead_letter
from service.consumers.shared_topics import LeasedTopic, SharedTopics
from service.core.values import Check
from service.store.topics import Entry, TopicItem, TopicKeys, Topics

DELIVERIES_AT_ONCE: Final = 16
RETRY_S: Final = 0.5
MAX_RETRY_S: Final = 60.0
"""Pause before an entry is delivered again, doubled with each failure in a row, with jitter."""

REJECTED: Final = "delivery_rejected"

log = structlog.get_logger(__name__)


class DeliveryFailed(Exception):
    """The sink has not confirmed the entries, some of which may have arrived.

    Args:
        retry_after_s: shortest pause before they are delivered again.
    """

    def __init__(self, reason: str, retry_after_s: float = 0.0):
        super().__init__(reason)
        self.retry_after_s = retry_after_s


class DeliveryRejected(Exception):
    """The sink will never accept the entries, or one of them."""


class Sink(Protocol):
    """Where a relay delivers entries.

    Attributes:
        batch: most entries of a delivery.
        on_error: what follows a rejection: the entry becomes a dead letter (`continue`), or is
            delivered again until it is accepted (`halt`).
    """

    @property
    def batch(self) -> int: ...

    @property
    def on_error(self) -> str: ...

    async def check(self) -> None:
        """Check, before the first delivery, what can be known of the sink.

        Raises:
            OperatorError
        """

    async def deliver(self, topic: str, entries: Sequence[Entry]) -> None:
        """Deliver entries of a topic in order, and return once all of them are confirmed.

        Deliveries of different topics overlap, those of one topic do not. Entries that were
        delivered may be delivered again, also in other batches.

        Args:
            entries: at least one; each has fields.

        Raises:
            DeliveryFailed, DeliveryRejected
        """

    async def close(self) -> None:
        """Close connections."""


class Relay(SharedTopics["RelayedTopic"]):
    """Delivers the output topics of a configuration.

    Attributes:
        counts: entries by result: `delivered`, `dead_letters`, `deleted`; deliveries that failed
            (`failures`); and `losses` of topics.
    """

    def __init__(
        self, store: Topics, keys: Sequence[TopicKeys], config: ConsumerConfig, sink: Sink
    ):
        pool = f"{config.group}/relay:{config.output}"
        room = sink.batch * DELIVERIES_AT_ONCE
        super().__init__(store, keys, config, pool=pool, room=room)
        # outputs that were written before the relay's first start are delivered, too
        self.start = "0"
        self.sink = sink
        self.deliveries = asyncio.Semaphore(DELIVERIES_AT_ONCE)

    def check(self, name: str = "relay") -> Check:
        return super().check(name)

    def _make_topic(self, keys: TopicKeys) -> RelayedTopic:
        return RelayedTopic(keys, self)


class _InterruptedError(Exception):
    """The topic was released or lost before its entries were delivered."""


class RelayedTopic(LeasedTopic):
    """An output topic."""

    def __init__(self, keys: TopicKeys, relay: Relay):
        super().__init__(keys, relay, min_read=relay.sink.batch, max_read=relay.sink.batch)
        self._sink = relay.sink
        self._deliveries = relay.deliveries
        self._interrupted = asyncio.Event()

    def release(self) -> None:
        """Stop reading; `run` ends after the delivery that is in progress."""
        super().release()
        self._interrupted.set()

    def lose(self, reason: str) -> None:
        super().lose(reason)
        self._interrupted.set()

    async def _prepare(self) -> None:
        self._interrupted.clear()

    async def _process(self, entries: Sequence[Entry]) -> None:
        """Deliver entries, then acknowledge them."""
        deleted = [entry.id for entry in entries if entry.fields is None]
        items = [("deleted", TopicItem([entry_id])) for entry_id in deleted]
        try:
            items += await self._deliver([each for each in entries if each.fields is not None])
        except _InterruptedError:
            self._shared.release(len(entries))
        else:
            await self._acknowledge(items)

    async def _deliver(self, entries: Sequence[Entry]) -> list[tuple[str, TopicItem]]:
        """Deliver entries; halve those that are rejected, down to the ones that become dead
        letters.

        Raises:
            _InterruptedError
        """
        if not entries:
            return []
        reason = await self._deliver_or_reject(entries)
        if reason is None:
            return [("delivered", TopicItem([entry.id for entry in entries]))]
        if len(entries) > 1:
            middle = len(entries) // 2
            return [*await self._deliver(entries[:middle]), *await self._deliver(entries[middle:])]
        (entry,) = entries
        log.warning(
            "delivery_rejected", topic=self.keys.topic, entry=entry.id.decode(), reason=reason
        )
        fields = entry.fields or ()
        stream = dict(zip(fields[::2], fields[1::2], strict=True)).get(b"stream", b"")
        letter = dead_letter(entry, REJECTED, reason, stream.decode("latin-1"))
        return [("dead_letters", TopicItem([entry.id], [letter]))]

    async def _deliver_or_reject(self, entries: Sequence[Entry]) -> str | None:
        """Deliver entries as often as needed; returns why they are rejected, if they are.

        Raises:
            _InterruptedError
        """
        failures = 0
        while not self._interrupted.is_set():
            shortest_s = 0.0
            try:
                async with self._deliveries:
                    if self._interrupted.is_set():
                        break
                    await self._sink.deliver(self.keys.topic, entries)
                return None
            except DeliveryRejected as error:
                if self._sink.on_error == "continue":
                    return str(error)
                reason = str(error)
            except DeliveryFailed as error:
                reason, shortest_s = str(error), error.retry_after_s
            except Exception as error:  # a defect: the outputs wait, events are still processed
                log.exception("delivery_defect", topic=self.keys.topic)
                reason = repr(error)
            self._shared.counts["failures"] += 1
            longest_s = min(MAX_RETRY_S, RETRY_S * 2 ** min(failures, 10))
            pause_s = max(shortest_s, random.uniform(longest_s / 2, longest_s))  # noqa: S311
            failures += 1
            log.warning(
                "delivery_failed",
                topic=self.keys.topic,
                entries=len(entries),
                failures=failures,
                pause_s=round(pause_s, 3),
                reason=reason,
            )
            try:
                async with asyncio.timeout(pause_s):
                    await self._interrupted.wait()
            except TimeoutError:
                pass
        raise _InterruptedError
