"""Histories of streams of a topic, and consumers whose model gets another version."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from models.artifact.artifact import Artifact
from models.artifact.writing import write_artifact
from service.access.caller import ANYONE
from service.build import build_pipeline
from service.core.errors import VersionNotReady
from service.core.values import StreamKey
from service.settings import Settings
from service.store.history_codec import HistoryCodec
from tests.support.consumers import add, consuming, fields_of, interleaved, outputs_of, until_count
from tests.support.oracle import contracting_weights
from tests.support.pipelines import SPEC, make_artifact, oracle_outputs, rows_of
from tests.support.servers import WAIT_S, RealServer, opened, until_async

RANDOM = np.random.default_rng(5)


async def test_the_history_of_a_stream_has_the_events_of_its_topic(
    server: RealServer, client: Any, artifact: Artifact
) -> None:
    rows = {f"s{number}": rows_of(RANDOM, 40) for number in range(5)}
    entries = interleaved(rows)
    async with (
        opened(server.url) as store,
        consuming(server.url, artifact, {"history_events": "10"}),
    ):
        for at in range(0, 200, 40):
            add(client, "events", *entries[at : at + 40])
            await until_count(client, "scores", at + 40)
        codec = HistoryCodec(None, artifact.spec.input_features)
        for name, each in rows.items():
            found = await store.histories.read(StreamKey("probe", name), artifact.fingerprint)
            assert found.is_valid
            kept = [codec.decode(value).steps.rows for value in found.entries]
            joined = np.concatenate([part for part in kept if part is not None])
            assert len(joined) >= 10
            np.testing.assert_array_equal(joined, each[-len(joined) :])


async def test_streams_of_a_topic_continue_with_a_new_version(
    server: RealServer, client: Any, artifact: Artifact, tmp_path: Path
) -> None:
    new, settings = make_artifact(tmp_path, seed=2), {"history_events": "1000"}
    rows = {f"s{number}": rows_of(RANDOM, 20) for number in range(3)}
    entries = interleaved(rows)
    for version, stop, done in ((artifact, 30, 0), (new, 60, 30)):
        async with consuming(server.url, version, settings):
            add(client, "events", *entries[done:stop])
            await until_count(client, "scores", stop)
    for name, outputs in outputs_of(client, "scores").items():
        assert [position for position, _ in outputs] == [*range(20)]
        for version, part in ((artifact, slice(0, 10)), (new, slice(10, 20))):
            packed = [np.concatenate([np.ravel(each[key]) for key in each]) for _, each in outputs]
            exact = oracle_outputs(version, rows[name])[part]
            np.testing.assert_allclose(packed[part], exact, rtol=1e-4, atol=1e-5)
    assert not [fields for _, fields in client.xrange("scores") if b"warm" in fields]


async def test_consumer_follows_the_aliases_of_its_model(
    server: RealServer, client: Any, tmp_path: Path
) -> None:
    models = tmp_path / "models"
    old = write_artifact(models / "probe" / "a", SPEC, contracting_weights(SPEC, 1))
    settings = {"models_dir": models, "history_events": "1000"}
    rows = {f"s{number}": rows_of(RANDOM, 20) for number in range(3)}
    entries = interleaved(rows)

    async with consuming(server.url, old, settings):
        add(client, "events", *entries[:30])
        await until_count(client, "scores", 30)
        new = write_artifact(models / "probe" / "b", SPEC, contracting_weights(SPEC, 2))
        loaded = Settings.load({"redis_url": server.url, "store_wait_s": WAIT_S, **settings})
        async with build_pipeline(loaded) as other:
            aliases = other.pipeline.aliases
            await aliases.load(ANYONE, "probe", "probe/b", None)

            async def is_promoted() -> bool:
                with suppress(VersionNotReady):
                    await aliases.change(ANYONE, "probe", "promote", new.version)
                    return True
                return False

            async def is_followed() -> bool:
                processes = (await aliases.describe(ANYONE, "probe")).processes
                is_new = [each.loaded == {"probe": [new.fingerprint.hex()]} for each in processes]
                return len(is_new) == 2 and all(is_new)

            # once the consumer has loaded the version too
            await until_async(is_promoted)
            await aliases.retire(ANYONE, "probe", old.version)
            await until_async(is_followed)
        add(client, "events", *entries[30:])
        await until_count(client, "scores", 60)
    answered = [fields[b"version"].decode() for _, fields in client.xrange("scores")]
    assert answered == [old.version] * 30 + [new.version] * 30
    for name, outputs in outputs_of(client, "scores").items():
        for at, (_, each) in enumerate(outputs):
            exact = oracle_outputs(old if at < 10 else new, rows[name])[at]
            packed = np.concatenate([np.ravel(each[key]) for key in each])
            np.testing.assert_allclose(packed, exact, rtol=1e-4, atol=1e-5)


async def test_outputs_say_how_warm_a_state_is(
    server: RealServer, client: Any, artifact: Artifact, tmp_path: Path
) -> None:
    entries = [fields_of("s", row) for row in rows_of(RANDOM, 12)]
    async with consuming(server.url, artifact):
        add(client, "events", *entries[:4])
        await until_count(client, "scores", 4)
    async with consuming(server.url, make_artifact(tmp_path, seed=2), {"history_events": "3"}):
        for at in range(4, 12):
            add(client, "events", entries[at])
            await until_count(client, "scores", at + 1)
    warm = [fields.get(b"warm") for _, fields in client.xrange("scores")]
    assert warm == [None] * 4 + [b"0/3", b"1/3", b"2/3"] + [None] * 5
