"""The record of a model's versions and aliases, as the store has it, and its transitions.

Pure values: a transition returns the next record, or raises and changes nothing. The champion
answers. The challenger computes beside it, and answers a share of the streams. `previous` was the
champion before the last promotion, and is the challenger after it: a rollback turns both back,
once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Final, Literal

import msgspec
import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from models.artifact.fingerprint import version_of
from models.spec.layout import category_names
from service.core.errors import InvalidInput, VersionNotFound, VersionRejected
from service.pipeline.served_model import ServedModel

Action = Literal["shadow", "canary", "promote", "rollback"]

MIN_DIGITS: Final = 4
"""Fewest digits of a fingerprint that name a version."""


class VersionSource(msgspec.Struct, frozen=True, omit_defaults=True):
    """Where the artifact of a version is.

    Attributes:
        path: its folder, relative to that of the models.
        label: a readable name, as unique in its model as the fingerprint.
    """

    path: str
    label: str | None = None


class ModelRecord(msgspec.Struct, frozen=True, omit_defaults=True):
    """The versions and aliases of one model; versions by fingerprint, in hex.

    Attributes:
        versions: those that every process loads.
        share: of the streams that the challenger answers.
    """

    champion: str
    versions: Mapping[str, VersionSource]
    challenger: str | None = None
    share: float = 0.0
    previous: str | None = None

    def add(self, fingerprint: str, source: VersionSource) -> ModelRecord:
        """Add a version, or replace where it is.

        Raises:
            VersionRejected: another version has its label or its folder.
        """
        for other, known in self.versions.items():
            if other == fingerprint:
                continue
            if source.label is not None and known.label == source.label:
                raise VersionRejected(
                    f"label: version {version_of(other)} has the label {source.label!r}; choose "
                    "another, or retire that version first"
                )
            if known.path == source.path:
                raise VersionRejected(
                    f"path: version {version_of(other)} was loaded from {source.path!r}; each "
                    "needs a folder of its own"
                )
        return replace(self, versions={**self.versions, fingerprint: source})

    def change(self, action: Action, version: str | None, share: float | None) -> ModelRecord:
        """Change the aliases; repeated, it changes nothing, and a rollback is rejected.

        Args:
            version: its fingerprint; None for a rollback.
            share: of a canary.

        Raises:
            InvalidInput: the champion cannot be the challenger, or there is nothing to roll back.
        """
        if action == "rollback":
            if self.previous is None:
                raise InvalidInput(
                    "action: expected a promotion to take back, got none", at="action"
                )
            champion, old = self.previous, self.champion
            return replace(self, champion=champion, challenger=old, share=0.0, previous=None)
        if version is None:
            raise InvalidInput(f"{action}: expected a version, got none", at="version")
        if action == "promote":
            if version == self.champion:
                return self
            old = self.champion
            return replace(self, champion=version, challenger=old, share=0.0, previous=old)
        if version == self.champion:
            raise InvalidInput(
                f"version: expected another one than the champion, got {version_of(version)}",
                at="version",
            )
        return replace(self, challenger=version, share=share or 0.0)

    def retire(self, fingerprint: str) -> ModelRecord:
        """Forget a version.

        Raises:
            InvalidInput: it is the champion.
        """
        if fingerprint == self.champion:
            raise InvalidInput(
                f"version: expected another one than the champion {version_of(fingerprint)}; "
                "promote another one first",
                at="version",
            )
        kept = {name: source for name, source in self.versions.items() if name != fingerprint}
        record = replace(self, versions=kept)
        if self.previous == fingerprint:
            record = replace(record, previous=None)
        if self.challenger == fingerprint:
            record = replace(record, challenger=None, share=0.0)
        return record

    def find(self, name: str) -> str:
        """The fingerprint of a version by its label, or by the first digits of its fingerprint.

        Raises:
            VersionNotFound: there is none, or there are several: a label may look like the first
                digits of another version.
        """
        found = [
            key
            for key, source in self.versions.items()
            if source.label == name or (key.startswith(name) and len(name) >= MIN_DIGITS)
        ]
        if len(found) != 1:
            known = [source.label or version_of(key) for key, source in self.versions.items()]
            which = "several have this name" if found else "there is none"
            raise VersionNotFound(
                f"expected one of the versions {known}, got {name[:64]!r}: {which}",
                expected=known,
                got=name[:64],
            )
        return found[0]


def check_accepts_same_requests(champion: ServedModel, served: ServedModel) -> None:
    """Check that a version accepts the requests of the champion and answers with the same outputs.

    Statistics, normalisation and categories of fields may differ, so may the network.

    Raises:
        VersionRejected: naming the first difference.
    """
    for name, expected in _interface(champion).items():
        if (got := _interface(served)[name]) != expected:
            raise VersionRejected(
                f"version {served.version} does not accept the requests of model "
                f"{champion.name!r}: {name}: expected {expected}, as in version "
                f"{champion.version}, got {got}",
                at=name,
            )


def _interface(served: ServedModel) -> dict[str, object]:
    """What requests and replies of a version depend on, by a readable name."""
    spec, decoder = served.spec, served.spec.decoder
    fields = served.events.fields if served.events is not None else ()
    return {
        "name": served.name,
        "fields": [(each.name, each.kind, each.optional) for each in fields],
        "timezone": served.events.timezone if served.events is not None else None,
        "input_features": served.input_features,
        "outputs": [
            (each.name, tuple(each.shape), each.per, tuple(each.labels))
            for each in served.outputs.outputs
        ],
        "categories": {
            each.name: _digest(category_names(spec, each))
            for each in served.outputs.outputs
            if each.categories_of
        },
        "attention": list(served.outputs.attention),
        "chunking": (spec.chunking, served.chunk_limit),
        "blocks": None if spec.blocks is None else (spec.blocks.size, spec.blocks.lookahead),
        "detection": spec.detection is not None,
        "decoder": None
        if decoder is None
        else (
            [*decoder.targets],
            [*decoder.known],
            decoder.step_s,
            decoder.max_horizon,
            [*decoder.head.quantiles],
        ),
    }


def _digest(names: NDArray[np.str_]) -> str:
    digest = hashlib.sha256("\0".join(names.tolist()).encode()).hexdigest()[:12]
    return f"{len(names)} with digest {digest}"
