"""What groups of settings have in common.

A group is a frozen dataclass in the package that it configures, and is passed whole to it;
`service/settings.py` composes and loads the groups. The name of a field is that of its setting:
`CARRY_` and the name in capitals is its variable, so no two groups share one. Only what is loaded
is validated: a group made in code may have any values.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, TypeVar, dataclass_transform

from pydantic import ConfigDict

PREFIX: Final = "CARRY_"
KIB: Final = 1024
MIB: Final = 1024 * KIB

T = TypeVar("T")


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def settings_group(group: type[T]) -> type[T]:
    """Make a class a frozen dataclass whose fields are settings, with their texts below them."""
    config = ConfigDict(extra="forbid", use_attribute_docstrings=True, protected_namespaces=())
    group.__pydantic_config__ = config  # type: ignore[attr-defined]
    return dataclass(frozen=True)(group)
