"""The settings of the service, composed of the groups of its packages, and how they are loaded.

A setting comes from a flag of `carry serve`, otherwise from the environment variable `CARRY_` and
its name, otherwise from its default. An unknown `CARRY_` variable is rejected, so that a misspelt
one is never ignored. Settings are immutable, and their representations never show a password.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Final, Literal, Self

from pydantic import TypeAdapter, ValidationError

from service.access.settings import AccessSettings
from service.codec.settings import RequestSettings
from service.core.errors import OperatorError
from service.core.settings import PREFIX
from service.pipeline.settings import BatchingSettings, ModelSettings
from service.server.settings import (
    ConnectionSettings,
    HttpSettings,
    WebSocketSettings,
    WorkerSettings,
)
from service.store.redis.address import redact_url
from service.store.settings import StoreSettings
from service.telemetry.settings import TelemetrySettings
from service.transports.v2.settings import V2Settings

CLIENT_VARIABLES: Final = ("CARRY_API_KEY", "CARRY_API_KEY_FILE")
"""Read by clients of a service, such as `carry streams`; no settings of the service itself."""

AT_LEAST: Final = {"max_pending_body_bytes": "max_body_bytes", "max_timeout_s": "timeout_s"}
"""Settings that must not be less than another one."""

_EXPECTED: Final = {"bool_parsing": "expected true or false", "bool_type": "expected true or false"}
"""What is said in place of Pydantic's message, by the type of its error."""

Origin = Literal["flag", "env", "default"]

_is_service_link = re.compile(
    r"""CARRY (_[A-Z0-9_]+)? (
      _SERVICE_HOST=[0-9a-fA-F.:]+
    | _SERVICE_PORT (_[A-Z0-9_]+)? =\d+
    | _PORT (_\d+_[A-Z]+)? =[a-z]+://.+
    | _PORT_\d+_[A-Z]+_ (PROTO=[a-z]+ | PORT=\d+ | ADDR=[0-9a-fA-F.:]+)
    )""",
    re.VERBOSE,
).fullmatch


class SettingsError(OperatorError, ValueError):
    """Settings that cannot be used; the message names each and says what was expected."""


@dataclass(frozen=True, slots=True)
class EffectiveSetting:
    """A setting as it is in force, with its secrets hidden."""

    name: str
    value: str
    origin: Origin


@dataclass(frozen=True)
class Settings:
    """The settings in force; load them with `Settings.load`.

    Attributes:
        origins: where each setting comes from that is not a default.
    """

    http: HttpSettings = field(default_factory=HttpSettings)
    connections: ConnectionSettings = field(default_factory=ConnectionSettings)
    requests: RequestSettings = field(default_factory=RequestSettings)
    websocket: WebSocketSettings = field(default_factory=WebSocketSettings)
    v2: V2Settings = field(default_factory=V2Settings)
    access: AccessSettings = field(default_factory=AccessSettings)
    processes: WorkerSettings = field(default_factory=WorkerSettings)
    models: ModelSettings = field(default_factory=ModelSettings)
    batching: BatchingSettings = field(default_factory=BatchingSettings)
    store: StoreSettings = field(default_factory=StoreSettings)
    telemetry: TelemetrySettings = field(default_factory=TelemetrySettings)
    origins: Mapping[str, Origin] = field(default_factory=dict)

    @classmethod
    def load(cls, flags: Mapping[str, Any] | None = None) -> Self:
        """The settings from flags, the environment and the defaults, in this order.

        Args:
            flags: values by setting name; None counts as not set.

        Raises:
            SettingsError: a `CARRY_` variable is unknown, or a value is invalid.
        """
        reject_unknown(os.environ)
        flag_values = {name: value for name, value in (flags or {}).items() if value is not None}
        values = {**_read_environment(os.environ), **flag_values}
        origins: dict[str, Origin] = {
            name: "flag" if name in flag_values else "env" for name in values
        }
        groups, errors = {}, list[str]()
        for group, names in GROUPS.items():
            chosen = {name: values[name] for name in names if name in values}
            try:
                groups[group] = TypeAdapter(TYPES[group]).validate_python(chosen)
            except ValidationError as error:
                errors += _explain(error, origins)
        if not errors:
            settings = cls(**groups, origins=origins)
            errors = _check_order(settings, values)
        if errors:
            raise SettingsError(" ".join(errors))
        return settings

    def changed(self, **values: Any) -> Self:
        """The settings with other values, by setting name, for this process and its workers."""
        groups = {
            group: replace(getattr(self, group), **{name: values[name] for name in chosen})
            for group, names in GROUPS.items()
            if (chosen := values.keys() & set(names))
        }
        added: dict[str, Origin] = dict.fromkeys(values, "env")
        return replace(self, **groups, origins=added | dict(self.origins))

    def value(self, name: str) -> Any:
        """The value of a setting."""
        return getattr(getattr(self, GROUP_OF[name]), name)

    def effective(self) -> list[EffectiveSetting]:
        """Every setting in force and where it comes from, secrets hidden; for the start."""
        return [
            EffectiveSetting(
                name, _format_value(name, self.value(name)), self.origins.get(name, "default")
            )
            for name in GROUP_OF
        ]

    def environment(self) -> dict[str, str]:
        """Environment variables for the workers: settings that are set by flags or in code."""
        return {PREFIX + name.upper(): str(self.value(name)) for name in self.origins}


TYPES: Final[dict[str, type[Any]]] = {
    group: type(value) for group, value in vars(Settings()).items() if group != "origins"
}
"""The types of the groups, by name."""

GROUPS: Final = {group: [each.name for each in fields(TYPES[group])] for group in TYPES}
"""The names of the settings, by group."""

GROUP_OF: Final = {name: group for group, names in GROUPS.items() for name in names}
"""The group of each setting, by its name."""


def reject_unknown(environ: Mapping[str, str]) -> None:
    """Reject unknown `CARRY_` variables, with a suggestion for each.

    Raises:
        SettingsError: naming them all.
    """
    known = [PREFIX + name.upper() for name in GROUP_OF]
    others = {*service_links(environ), *CLIENT_VARIABLES}
    unknown = sorted(
        name
        for name in environ
        if name.upper().startswith(PREFIX) and name.upper() not in known and name not in others
    )
    if not unknown:
        return
    hints = []
    for name in unknown:
        nearest = difflib.get_close_matches(name.upper(), known, n=1, cutoff=0.0)
        hints.append(f"{name} is not a setting; did you mean {nearest[0]}?")
    raise SettingsError(" ".join(hints))


def service_links(environ: Mapping[str, str]) -> list[str]:
    """The variables that Kubernetes sets in pods for a Service named `carry` or `carry-...`.

    They are not settings, although they have the prefix, and `CARRY_PORT` the name of a setting.
    """
    return sorted(name for name, value in environ.items() if _is_service_link(f"{name}={value}"))


def _read_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Settings in the environment, by name; empty variables count as not set."""
    return {
        name.upper().removeprefix(PREFIX).lower(): value
        for name, value in environ.items()
        if name.upper().removeprefix(PREFIX).lower() in GROUP_OF
        and name.upper().startswith(PREFIX)
        and value
        and not _is_service_link(f"{name.upper()}={value}")
    }


def _format_value(name: str, value: object) -> str:
    if value is None:
        return "not set"
    return redact_url(str(value)) if name == "redis_url" else str(value)


def _explain(error: ValidationError, origins: Mapping[str, Origin]) -> list[str]:
    """One sentence for each value that does not fit; no value of a secret."""
    sentences = []
    for problem in error.errors(include_url=False):
        name = str(problem["loc"][0])
        message = _EXPECTED.get(problem["type"]) or problem["msg"].removeprefix("Value error, ")
        # the password of a malformed address cannot be found, so none of it is shown
        got = "" if name == "redis_url" else f", got {str(problem['input'])!r}"
        sentences.append(f"{_source_name(name, origins)}: {message[0].lower()}{message[1:]}{got}.")
    return sentences


def _check_order(settings: Settings, values: Mapping[str, Any]) -> list[str]:
    """One sentence for each value that is less than another one that it must reach."""
    return [
        f"{_source_name(name, settings.origins)}: expected at least {PREFIX}{other.upper()}, "
        f"which is {settings.value(other)}, got {str(values.get(name, settings.value(name)))!r}."
        for name, other in AT_LEAST.items()
        if settings.value(name) < settings.value(other)
    ]


def _source_name(name: str, origins: Mapping[str, Origin]) -> str:
    if origins.get(name) == "flag":
        return f"--{name.replace('_', '-')}"
    return PREFIX + name.upper()
