"""`carry consume`: the process of a consumer, with a port for health and metrics."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from typing import Protocol

import structlog

from service.build import build_pipeline, tune_garbage_collector
from service.consumers.config import ConsumerConfig
from service.consumers.consumer import Consumer
from service.consumers.kafka import KafkaSource
from service.consumers.kafka_sink import KafkaSink
from service.consumers.metrics import KafkaMetrics, TopicMetrics
from service.consumers.relay import Relay, Sink
from service.consumers.repartition import Repartitioner
from service.consumers.store import TopicStore
from service.consumers.webhook import Webhook
from service.core.values import Check
from service.settings import Settings
from service.store.redis.redis_store import RedisStore
from service.transports.common.health_port import health_port

log = structlog.get_logger(__name__)


class Reader(Protocol):
    """What reads topics in this process."""

    async def run(self) -> None: ...

    def stop(self) -> None: ...

    def check(self) -> Check: ...


async def consume(settings: Settings, config: ConsumerConfig, port: int | None) -> None:
    """Consume until SIGTERM or SIGINT.

    Args:
        port: of health and metrics; 0 for any that is free, None for none.

    Raises:
        OperatorError, StoreUnavailable, StoreRefused, ArtifactError, OSError: it cannot start.
    """
    store = TopicStore(settings.store)
    service = build_pipeline(settings, store=store, model=config.model)
    consumer, recorder = Consumer(service, store, config), service.recorder
    relay = make_relay(settings, config, store)
    source = None
    if config.kafka_source is not None:
        source = KafkaSource(store, settings.store.keys, config)
    readers: list[Reader] = [each for each in (consumer, relay, source) if each is not None]

    async def checks() -> Sequence[Check]:
        return [*await service.pipeline.readiness(), *[each.check() for each in readers]]

    def stop() -> None:
        for each in readers:
            each.stop()

    _stop_on_signals(stop)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(service)
        await consumer.check_topics()
        if source is not None:
            await source.check_topic()
        if relay is not None:
            await relay.sink.check()
        if port is not None:
            host = settings.http.admin_host or settings.http.host
            serving = health_port(
                host, port, checks, lambda: (recorder.render(), recorder.content_type)
            )
            log.info("port_bound", host=host, port=await stack.enter_async_context(serving))
        metrics: list[TopicMetrics | KafkaMetrics] = [
            TopicMetrics(recorder.registry, consumer, config.input, "consumer")
        ]
        if relay is not None:
            stack.push_async_callback(relay.sink.close)
            metrics.append(TopicMetrics(recorder.registry, relay, config.output, "relay"))
        if source is not None:
            metrics.append(KafkaMetrics(recorder.registry, source, config.input))
        for each in metrics:
            stack.callback(asyncio.create_task(each.run()).cancel)
        tune_garbage_collector()
        log.info("ready", model=config.model, source=config.source, sink=config.sink)
        await _run_all(readers)
    log.info("stopped", **consumer.counts, **({} if relay is None else {"relay": relay.counts}))


def make_relay(settings: Settings, config: ConsumerConfig, store: RedisStore) -> Relay | None:
    """The relay of a configuration's outputs, if it has a sink; close its sink after use.

    Raises:
        OperatorError: the sink cannot be made.
    """
    sink: Sink
    if config.webhook is not None:
        sink = Webhook(config.webhook, is_json=config.outputs == "json")
    elif config.kafka_sink is not None:
        sink = KafkaSink(config.kafka_sink, config.kafka)
    else:
        return None
    keys = config.outboxes(settings.store.keys, is_cluster=settings.store.is_cluster)
    return Relay(store.topics, keys, config, sink)


async def _run_all(readers: Sequence[Reader]) -> None:
    """Run readers until all of them are stopped; if one fails, stop the others and raise."""
    tasks = [asyncio.create_task(each.run()) for each in readers]
    try:
        await asyncio.gather(*tasks)
    finally:
        for each in readers:
            each.stop()
        await asyncio.gather(*tasks, return_exceptions=True)


async def repartition(settings: Settings, config: ConsumerConfig, port: int | None) -> None:
    """Move the events of a topic to the topics of their partitions until SIGTERM or SIGINT.

    Args:
        port: as for `consume`; without metrics.

    Raises:
        OperatorError, StoreUnavailable, StoreRefused, OSError: it cannot start.
    """
    store = RedisStore(settings.store)
    mover = Repartitioner(store.topics, settings.store.keys, config)

    async def checks() -> Sequence[Check]:
        return [await store.monitor.check(), mover.check()]

    _stop_on_signals(mover.stop)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(store.close)
        await store.start()
        await mover.check_is_stream("from", config.source, may_be_missing=config.create)
        if port is not None:
            host = settings.http.admin_host or settings.http.host
            serving = health_port(host, port, checks, lambda: (b"", "text/plain"))
            log.info("port_bound", host=host, port=await stack.enter_async_context(serving))
        await mover.run()
    log.info("stopped", **mover.counts)


async def reset_offsets(settings: Settings, config: ConsumerConfig, start: str) -> None:
    """Continue to read a topic of Kafka at its beginning or its end.

    Raises:
        OperatorError, StoreUnavailable, StoreRefused: not everything was changed.
    """
    store = RedisStore(settings.store)
    try:
        await store.start()
        await KafkaSource(store, settings.store.keys, config).reset(start)
    finally:
        await store.close()


def _stop_on_signals(stop: Callable[[], None]) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
