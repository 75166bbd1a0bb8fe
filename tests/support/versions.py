"""Versions of the probe model, loaded from a folder with the oracle as runtime."""

from __future__ import annotations

from pathlib import Path

import pytest

from models.artifact.artifact import load_artifact
from service.pipeline.model_aliases import ModelAliases
from service.pipeline.served_model import ServedModel
from tests.support.numpy_runtime import numpy_served


class Versions:
    """Loads versions from a folder.

    Attributes:
        missing: paths that this process does not have.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self.missing: set[str] = set()

    def path_of(self, served: ServedModel) -> str:
        return served.artifact.path.name

    def __call__(self, model: str, path: str) -> ServedModel:
        if path in self.missing:
            raise FileNotFoundError(path)
        return numpy_served(load_artifact(self._folder / path))


def stop_polling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no process read records and report versions by itself: only requests use the store."""

    async def refresh(_: ModelAliases) -> None:
        pass

    monkeypatch.setattr(ModelAliases, "refresh", refresh)
