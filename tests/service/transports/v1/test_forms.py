"""Events in the forms that the schema's fields accept have one digest, on every path."""

from __future__ import annotations

from pathlib import Path

import pytest
from structlog.testing import capture_logs

from carry_client.description import read_description
from models.artifact.writing import write_artifact
from tests.service.transports.v1.harness import EVENT, EVENT_MS, harness
from tests.support.models import random_weights, small_spec
from tests.support.servers import RealServer


def write_model_of_other_forms(folder: Path) -> dict[str, Path]:
    spec = small_spec()
    assert spec.events is not None
    options = {"at": {"without_offset": "local", "epoch": "s"}, "heavy": {"coerce": True}}
    fields = [field.model_copy(update=options.get(field.name, {})) for field in spec.events.fields]
    schema = spec.events.model_copy(update={"fields": tuple(fields), "timezone": "UTC"})
    spec = spec.model_copy(update={"events": schema})
    return {"small": write_artifact(folder / "small", spec, random_weights(spec))}


@pytest.mark.parametrize("fast_path", [True, False], ids=["fast path", "slow path"])
async def test_other_forms_are_replayed_as_the_usual_ones(
    pipeline_server: RealServer, tmp_path: Path, *, fast_path: bool
) -> None:
    models = write_model_of_other_forms(tmp_path)
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


async def test_epoch_seconds_for_milliseconds_are_logged_once_for_each_model(
    pipeline_server: RealServer, tmp_path: Path
) -> None:
    """They are accepted: a table may begin in 1970."""
    spec = small_spec()
    models = {"small": write_artifact(tmp_path / "small", spec, random_weights(spec))}
    async with harness(pipeline_server, models) as api:
        with capture_logs() as lines:
            for at in (EVENT_MS, "1970-01-20T00:00:00Z", EVENT_MS // 1000, EVENT_MS // 1000 + 60):
                body = {"events": [{**EVENT, "at": at}]}
                reply = await api.client.post("/v1/models/small/streams/s/chunks", json=body)
                assert reply.status_code == 200
                if isinstance(at, str):
                    assert not [each for each in lines if each["event"] == "timestamps_in_seconds"]
    (line,) = [each for each in lines if each["event"] == "timestamps_in_seconds"]
    assert (line["log_level"], line["model"]) == ("warning", "small")
    assert (line["expected"][:18], line["got"]) == ("epoch milliseconds", EVENT_MS // 1000)


async def test_the_client_reads_the_kinds_of_fields_of_other_forms(
    pipeline_server: RealServer, tmp_path: Path
) -> None:
    async with harness(pipeline_server, write_model_of_other_forms(tmp_path)) as api:
        description = read_description((await api.client.get("/v1/models/small")).json())
    kinds = {field.name: field.kind for field in description.fields or ()}
    assert (kinds["at"], kinds["heavy"]) == ("timestamp", "boolean")
