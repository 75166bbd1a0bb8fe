"""The caller of a request: the holder of an access key or a token, or anyone.

A scope is a set of verbs, model patterns and a prefix of stream names. It allows a use case if all
three cover it; nothing else is looked up, so that a rejection reveals nothing about the store. Each
use case of the pipeline takes the caller and checks the scope before anything else.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from enum import StrEnum
from re import Match
from typing import Any, Final

from service.access.limits import KeyLimiter, KeyLimits, StreamQuota
from service.core.errors import Forbidden


class Verb(StrEnum):
    """What a key may do. `models`, `manage-models` and `metrics` are about no stream."""

    PREDICT = "predict"
    READ_STATE = "read-state"
    WRITE_STATE = "write-state"
    DELETE = "delete"
    LIST = "list"
    FORK = "fork"
    WATCH = "watch"
    MODELS = "models"
    MANAGE_MODELS = "manage-models"
    METRICS = "metrics"


is_model_pattern = re.compile(r"[a-z0-9_*-]{1,64}").fullmatch
"""Whether it is a model's name, in which each `*` stands for any characters."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who makes a request, and what they may do.

    Attributes:
        key_id: public part of the access key; None for anyone.
        name: what the key is for, as given at its creation.
        verbs: what it may do.
        models: patterns of the models that it may use.
        prefix: names of the streams that it may use begin with this; empty for all.
        expires_ms: epoch milliseconds from which on the key is rejected; None for never.
        limits: None for no limits.
        limiter: enforces the limits of rates and concurrent requests; None if there are none.
        quota: of the streams that it creates; None if it has none.
        signer: the holder of the key that signed the token of this one; None for a key.
        subject: the tenant that the token is for, as its signer says; None for a key.
        covers_model: matches the name of a model that it may use.
    """

    key_id: str | None
    name: str
    verbs: frozenset[Verb]
    models: tuple[str, ...]
    prefix: str = ""
    expires_ms: int | None = None
    limits: KeyLimits | None = None
    limiter: KeyLimiter | None = field(default=None, repr=False, compare=False)
    quota: StreamQuota | None = field(default=None, repr=False, compare=False)
    signer: Caller | None = None
    subject: str | None = None
    covers_model: Callable[[str], Match[str] | None] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "covers_model", _pattern(self.models).fullmatch)

    def check(
        self, verbs: Iterable[Verb], model: str | None = None, stream: str | None = None
    ) -> None:
        """Check that a scope covers one of these verbs, the model and the stream.

        Args:
            model: None if the use case is about no single model.
            stream: name of a stream, or the prefix that all of its streams have; None if the use
                case is about no stream.

        Raises:
            Forbidden
        """
        is_covered = (
            not self.verbs.isdisjoint(verbs)
            and (model is None or self.covers_model(model) is not None)
            and (stream is None or stream.startswith(self.prefix))
        )
        if not is_covered:
            raise self.forbidden(verbs, model, stream)

    def admit(
        self,
        verbs: Iterable[Verb],
        model: str | None,
        stream: str | None = None,
        events: int = 0,
    ) -> AbstractContextManager[None]:
        """Check the scope as `check` does, and count a request for the limits while it is answered.

        Raises:
            Forbidden
            LimitExceeded: when the context is entered.
        """
        self.check(verbs, model, stream)
        return _UNLIMITED if self.limiter is None else self.limiter.request(events)

    def audit_names(self) -> dict[str, str]:
        """The key and the tenant of the caller, as the audit log names them; empty for anyone."""
        names = {"key": self.key_id, "subject": self.subject}
        return {name: value for name, value in names.items() if value is not None}

    def forbidden(self, verbs: Iterable[Verb], model: str | None, stream: str | None) -> Forbidden:
        """The error for a use case that the scope does not cover."""
        verb = " or ".join(verbs)
        facts: dict[str, Any] = {"verb": verb}
        wanted = verb
        if model is not None:
            facts["model"] = model
            wanted += f" on model {model[:300]!r}"
        if stream is not None:
            facts["stream"] = stream
            wanted += f", streams {stream[:300]!r}"
        allowed_verbs = sorted(self.verbs)
        if self.verbs.isdisjoint(verbs):
            reason = f"verb {verb}"
        else:
            reason = "stream" if model is None or self.covers_model(model) else "model"
        return Forbidden(
            f"the key {self.key_id} does not allow {wanted}; it allows {', '.join(allowed_verbs)} "
            f"on models {', '.join(self.models)}, streams whose names begin with {self.prefix!r}",
            **facts,
            allowed={"verbs": allowed_verbs, "models": [*self.models], "prefix": self.prefix},
        ).with_key(reason, self.key_id)


_UNLIMITED: Final = nullcontext()


def _pattern(models: Iterable[str]) -> re.Pattern[str]:
    # `translate` makes atomic groups: a holder signs tokens with patterns of their own choice, and
    # backtracking through ten `*` would keep the process busy for hours
    return re.compile("|".join(map(fnmatch.translate, models)))


ANYONE: Final = Caller(None, "anyone", frozenset(Verb), ("*",))
"""The caller of each request while the service is open."""

PREDICT: Final = (Verb.PREDICT,)

DESCRIBE: Final = (Verb.PREDICT, Verb.LIST)
"""A stream's position and tag are in each of its replies, and part of a listing's use."""
