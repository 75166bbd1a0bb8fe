"""Conditions on outputs: which of them are written."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from models.detection.alarms import CLOSED, OPENED
from models.spec.layout import OutputSpec
from service.core.errors import OperatorError
from service.core.values import FloatRows

_COMPARISON: Final = re.compile(
    r"(?P<name>[^<>=!]+?)\s*(?:(?P<sign>[<>]=?|[!=]=)\s*(?P<number>\S+))?"
)
_SIGNS: Final[dict[str, Callable[[Any, Any], Any]]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
}

Condition = Callable[[FloatRows], NDArray[np.bool_]]
"""Returns for each row of outputs [T, O] whether it is written."""


def parse_condition(text: str, outputs: OutputSpec, alarm: str | None = None) -> Condition:
    """Parse comparisons that `and` or `or` join, such as `surprise > 4` or `alarm`.

    A comparison is the name of an output, a sign and a number; a name alone means that it is not 0,
    and that of alarms that one opens or closes: an alarm that continues is no news. The name of a
    value in an output with several is `NAME[LABEL]`. `and` binds closer than `or`.

    Args:
        alarm: the name of the output of alarms, if there is one.

    Raises:
        OperatorError: naming what was expected and what came.
    """
    columns = _columns(outputs)
    alternatives = [
        [_parse_comparison(part.strip(), columns, alarm) for part in alternative.split(" and ")]
        for alternative in text.split(" or ")
    ]

    def holds(rows: FloatRows) -> NDArray[np.bool_]:
        found = np.zeros(len(rows), bool)
        for comparisons in alternatives:
            found |= np.all([compare(rows) for compare in comparisons], axis=0)
        return found

    return holds


def _parse_comparison(text: str, columns: dict[str, int], alarm: str | None) -> Condition:
    match = _COMPARISON.fullmatch(text)
    name = match["name"].strip() if match else text
    ends = [each for each in columns if each.rpartition(".")[2] == name]
    if name not in columns and len(ends) == 1:
        (name,) = ends
    if match is None or name not in columns:
        raise OperatorError(
            f"where: expected comparisons of {', '.join(columns)}, such as "
            f"`{next(iter(columns))} > 1`, got {text!r}"
        )
    if name == alarm and match["sign"] is None:
        return lambda rows: np.isin(rows[:, columns[name]], (OPENED, CLOSED))
    column, sign = columns[name], _SIGNS[match["sign"] or "!="]
    try:
        number = float(match["number"] or 0)
    except ValueError:
        raise OperatorError(f"where: expected a number, got {match['number']!r}") from None
    return lambda rows: sign(rows[:, column], np.float32(number))


def _columns(outputs: OutputSpec) -> dict[str, int]:
    """The columns of packed rows by the names of their values."""
    found: dict[str, int] = {}
    for output in outputs.outputs:
        start = outputs.slices[output.name].start
        names = output.column_names()
        found |= {name: start + at for at, name in enumerate(names)}
    return found
