"""The API document describes the members that the types of bodies have."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import fields

from models.artifact.artifact import Artifact, write_artifact
from models.events.reader import EventReader
from service.codec.body_types import BodyLimits, ForkBody, build_body_types, known_future_schema
from service.codec.media import Media
from service.codec.settings import RequestSettings
from service.pipeline.served_model import ServedModel
from service.transports.v1.openapi import body_schemas
from tests.support.decoders import decoder_spec
from tests.support.models import random_weights, small_spec
from tests.support.numpy_runtime import NumpyRuntime
from tests.support.oracle import contracting_weights


@pytest.fixture(params=["small", "weather"])
def artifact(request: pytest.FixtureRequest, tmp_path: Path) -> Artifact:
    if request.param == "small":
        spec = small_spec()
        return write_artifact(tmp_path / "small", spec, random_weights(spec))
    spec = decoder_spec()
    return write_artifact(tmp_path / "weather", spec, contracting_weights(spec, 4))


@pytest.mark.parametrize("media", Media)
def test_document_has_the_members_of_the_types(artifact: Artifact, media: Media) -> None:
    served, limits = ServedModel(artifact, NumpyRuntime(artifact)), RequestSettings()
    assert served.events is not None
    future = known_future_schema(served)
    types = build_body_types(
        served,
        BodyLimits.of(limits, served.chunk_limit),
        media,
        EventReader(served.events, marks_resets=True),
        None if future is None else EventReader(future),
    )
    schemas = body_schemas.build_body_schemas(served, limits)
    pairs = [
        (types.chunk, schemas.chunk),
        (types.item, schemas.item),
        (types.items, schemas.many),
        (types.predict, schemas.predict),
        (types.state, body_schemas.StateBody),
        (ForkBody, body_schemas.ForkBody),
    ]
    if types.forecast is not None and schemas.forecast is not None:
        pairs.append((types.forecast, schemas.forecast))
    assert (types.forecast is None) == (schemas.forecast is None)
    for decoded, described in pairs:
        required = {field.encode_name: field.required for field in fields(decoded)}
        assert required == {
            name: field.is_required() for name, field in described.model_fields.items()
        }
