"""Events in the forms that the schema's fields accept have one digest, on every path."""

from __future__ import annotations

from pathlib import Path

import pytest

from models.artifact.writing import write_artifact
from tests.service.transports.v1.harness import EVENT, EVENT_MS, harness
from tests.support.models import random_weights, small_spec
from tests.support.servers import RealServer


@pytest.mark.parametrize("fast_path", [True, False], ids=["fast path", "slow path"])
async def test_other_forms_are_replayed_as_the_usual_ones(
    pipeline_server: RealServer, tmp_path: Path, *, fast_path: bool
) -> None:
    spec = small_spec()
    assert spec.events is not None
    options = {"at": {"without_offset": "local", "epoch": "s"}, "heavy": {"coerce": True}}
    fields = [field.model_copy(update=options.get(field.name, {})) for field in spec.events.fields]
    schema = spec.events.model_copy(update={"fields": tuple(fields), "timezone": "UTC"})
    spec = spec.model_copy(update={"events": schema})
    models = {"small": write_artifact(tmp_path / "small", spec, random_weights(spec))}
    usual = {**EVENT, "at": "1970-01-01T00:00:10Z", "heavy": True}
    forms = [
        {"at": 10},
        {"at": 10.0},
        {"at": "1970-01-01T00:00:10"},
        {"heavy": 1},
        {"heavy": "TRUE"},
    ]
    async with harness(pipeline_server, models, fast_path=fast_path) as api:
        url = "/v1/models/small/streams/s/chunks"
        first = (await api.client.post(url, json={"position": 0, "events": [usual]})).json()
        for form in forms:
            body = {"position": 0, "events": [{**usual, **form}]}
            reply = (await api.client.post(url, json=body)).json()
            assert (reply["replayed"], reply["outputs"]) == (True, first["outputs"])
        wrong = await api.client.post(
            url, json={"position": 1, "events": [{**usual, "at": EVENT_MS}]}
        )
        assert wrong.status_code == 422
        assert "epoch seconds" in wrong.text
