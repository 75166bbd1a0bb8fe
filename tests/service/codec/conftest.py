"""Models whose requests are read."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from models.artifact.writing import write_artifact
from service.transports.v1.context import ModelCodec
from tests.service.codec.paths import (
    codec_of,
)
from tests.support.models import random_weights, small_spec
from tests.support.pipelines import make_artifact


@pytest.fixture(scope="module")
def codecs(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, ModelCodec]:
    """`small` takes events, `probe` rows of three numbers."""
    folder = tmp_path_factory.mktemp("models")
    spec = small_spec()
    small = write_artifact(folder / "small", spec, random_weights(spec))
    return {
        name: codec_of(artifact)
        for name, artifact in (("small", small), ("probe", make_artifact(folder)))
    }
