"""Requests of the V2 protocol that name a version, while several answer."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest

from models.artifact.artifact import Artifact
from service.pipeline.model_versions import Route
from tests.service.transports.v2.v2 import V2, error_of, json_body, reply_of
from tests.support.numpy_runtime import numpy_served
from tests.support.pipelines import make_artifact, oracle_outputs, rows_of


@pytest.fixture(scope="session")
def new(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return make_artifact(tmp_path_factory.mktemp("new"), seed=2)


async def test_version_is_accepted_for_the_streams_that_it_answers(v2: V2, new: Artifact) -> None:
    versions = v2.api.pipeline.versions["probe"]
    challenger = numpy_served(new)
    versions.add(challenger)
    route = versions.route = Route(versions.route.champion, challenger, 0.5)
    random = np.random.default_rng(1)
    answered = set()
    for number in range(20):
        rows, stream = rows_of(random, 3), f"s{number}"
        answering = route.answering(stream)
        other = challenger if answering is route.champion else route.champion
        for position, named in ((0, "1"), (0, answering.version), (3, answering.version)):
            body = json_body(rows, parameters={"sequence_id": stream, "position": position})
            reply = reply_of(await v2.post(body, version=named))
            expected = None if answering is route.champion else answering.version
            assert reply.parameters.get("carry_version") == expected
        whole = oracle_outputs(answering.artifact, np.concatenate([rows, rows]))
        out = answering.outputs.slices["out"]
        np.testing.assert_allclose(reply.outputs["out"], whole[3:, out], rtol=1e-5, atol=1e-5)
        body = json_body(rows, parameters={"sequence_id": stream, "position": 6})
        error_of(await v2.post(body, version=other.version), 404, "model_not_found")
        answered.add(answering.version)
    assert len(answered) == 2
    # predictions are the champion's
    reply_of(await v2.post(json_body(rows), version=route.champion.version))
    error_of(await v2.post(json_body(rows), version=new.version), 404, "model_not_found")


async def test_retired_version_is_freed(v2: V2, new: Artifact) -> None:
    """Nothing that is cached between requests keeps the network of a retired version."""
    api, versions = v2.api, v2.api.pipeline.versions["probe"]
    rows = rows_of(np.random.default_rng(2), 3)
    freed = weakref.ref(versions.route.champion)

    async def send(stream: str) -> None:
        for position in (0, 3, 6):
            body = {"inputs": rows.tolist(), "position": position}
            assert (await api.chunk(body, stream=stream)).status_code == 200
            for binary in (False, True):
                await v2.infer(
                    rows, binary=binary, sequence_id=f"{stream}-{binary}", position=position
                )
        await v2.infer(rows)

    def switch(route: Route) -> None:
        versions.route = route
        versions.keep(())
        for on_switch in api.pipeline.aliases.on_switch:
            on_switch(versions)

    await send("a")
    versions.add(numpy_served(new))
    challenger = versions.loaded[new.fingerprint]
    switch(Route(challenger, versions.route.champion))
    await send("b")
    switch(Route(challenger))
    await send("c")
    gc.collect()
    assert freed() is None, [type(each) for each in gc.get_referrers(freed())]
