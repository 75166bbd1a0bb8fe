"""The versions of one model that a process has loaded, and which of them answers which stream.

A route names the champion, which answers, and the challenger, which answers a share of the streams:
the canary. The route of a model is replaced as a whole, and a batch takes it once: so a switch is
between two batches. A stream is a canary by a hash of its name, so that it is answered by the same
version whichever process it reaches, and as long as the share does not fall.
"""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b
from typing import NamedTuple

from service.core.errors import ModelNotFound
from service.core.values import FloatRows
from service.pipeline.served_model import ServedModel


class Route(NamedTuple):
    """Which version of a model answers which stream.

    Attributes:
        champion: answers all streams but the canaries.
        challenger: None if there is none.
        share: of the streams that the challenger answers, 0 to 1; 0 for a shadow, which answers
            none.
    """

    champion: ServedModel
    challenger: ServedModel | None = None
    share: float = 0.0

    @property
    def keeps_history(self) -> bool:
        """Whether the store keeps a history of the model's streams."""
        return self.champion.history is not None

    def answering(self, stream: str) -> ServedModel:
        """The version that answers a stream."""
        if self.challenger is None or not self.share:
            return self.champion
        return self.challenger if _place(self.champion.name, stream) < self.share else self.champion

    def shadow(self, answering: ServedModel) -> ServedModel | None:
        """The version that computes the chunks that another one answered; None if there is none."""
        return self.challenger if answering is self.champion else self.champion


class ModelVersions:
    """The versions of one model in one process.

    Attributes:
        name: of the model.
        route: the current one.
        loaded: the versions that are ready to answer, by fingerprint.
        checks_codes: whether versions have other categories, so that rows that are valid for one
            may be invalid for another.
    """

    def __init__(self, champion: ServedModel):
        self.name = champion.name
        self.route = Route(champion)
        self.loaded = {champion.fingerprint: champion}
        self.checks_codes = False

    def writer(self, fingerprint: bytes) -> ServedModel:
        """The version that wrote a state, if it is loaded; otherwise the champion."""
        return self.loaded.get(fingerprint, self.route.champion)

    def can_write(self, outputs: FloatRows, fingerprint: bytes) -> bool:
        """Whether stored outputs, of the version with a fingerprint, are laid out as those here.
        Those of a version that is not loaded may have the same number, and be codes of other
        categories."""
        layout = self.route.champion.outputs
        has_codes = any(output.categories_of for output in layout.outputs)
        is_known = fingerprint in self.loaded or not has_codes
        return outputs.shape[1] == layout.size and is_known

    def add(self, served: ServedModel) -> None:
        """Add a version that is warm."""
        # a new dictionary, so that others may iterate over the old one
        self.loaded = {**self.loaded, served.fingerprint: served}
        columns = [each.spec.columns for each in self.loaded.values()]
        self.checks_codes = len({tuple(each.codes for each in of) for of in columns}) > 1

    def keep(self, fingerprints: Iterable[bytes]) -> None:
        """Forget the versions that are neither among these nor part of the route."""
        route = {each.fingerprint for each in self.route[:2] if each is not None}
        kept = route.union(fingerprints)
        if not kept.issuperset(self.loaded):
            self.loaded = {key: served for key, served in self.loaded.items() if key in kept}


def model_not_found(name: str, models: Iterable[str]) -> ModelNotFound:
    """The error for a model that is not among these."""
    expected = sorted(models)
    return ModelNotFound(
        f"expected one of the models {expected}, got {name!r}", expected=expected, got=name
    )


def _place(model: str, stream: str) -> float:
    """The stream's place among all streams of its model, uniform in [0, 1)."""
    digest = blake2b(f"{model}/{stream}".encode(), digest_size=6, person=b"carry canary").digest()
    return int.from_bytes(digest, "big") / 2**48
