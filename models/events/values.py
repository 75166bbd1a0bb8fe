"""Values of single columns: standardised numbers, codes of categories, and rows of `inputs`.

The equations are in `models.events.encode`.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from models.errors import DataError, SpecError
from models.events.columns import IntArray
from models.events.schema import UNKNOWN_CODE, CategoricalField, Column, NumericField
from models.spec.heads import EXPONENT_LIMIT

FloatArray = NDArray[np.float32]

FINITE = "a number that is finite as a float32 once standardised"
"""What a number is, so that it can be encoded."""


def standardise(field: NumericField, values: ArrayLike) -> FloatArray:
    """Standardise values of a numeric field, given in its units, as in its encoded column.

    Values that are compared with an encoded column (such as a head's threshold) must be
    standardised by this function, so that equal values are equal after encoding.

    Args:
        field: a fitted field.
        values: any shape.

    Returns:
        float32 of the same shape; infinite if the result overflows.
    """
    given = np.asarray(values, np.float64)
    with np.errstate(over="ignore"):
        return _scale(apply_transform(field, given), field.mean, field.std)


def apply_transform(field: NumericField, values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Apply the field's transform, without standardising."""
    if field.transform == "signed_log1p":
        return np.asarray(np.copysign(np.log1p(np.abs(values)), values), np.float64)
    return values


def unstandardise(field: NumericField, standardised: NDArray[np.float64]) -> NDArray[np.float64]:
    """Undo standardisation and transform; the inverse of `standardise` in float64.

    Raises:
        SpecError: the field is not fitted.
    """
    if field.mean is None or field.std is None:
        raise SpecError(f"field {field.name!r}: expected a fitted one")
    values = standardised * field.std + field.mean
    if field.transform == "signed_log1p":
        values = np.copysign(np.expm1(np.minimum(np.abs(values), EXPONENT_LIMIT)), values)
    return np.asarray(values, np.float64)


def categorical_codes(
    field: CategoricalField, present: NDArray[np.bool_], values: NDArray[Any]
) -> IntArray:
    """Compute the codes int64 [T] of a categorical column: 0 unknown, 1..K known, K+1 absent."""
    code_of = field.code_of
    codes = np.fromiter(
        (code_of.get(value, UNKNOWN_CODE) for value in values), np.int64, len(values)
    )
    return np.where(present, codes, field.absent_code) if field.optional else codes


def log_gap(gap_ms: IntArray) -> NDArray[np.float64]:
    """log(1 + gap in seconds), before standardising."""
    return np.log1p(gap_ms / 1000.0)


def check_rows(columns: tuple[Column, ...], rows: FloatArray) -> None:
    """Validate rows of `inputs`: reject those that the encoder cannot produce.

    Args:
        columns: the F columns, `ModelSpec.columns`.
        rows: float32 [T, F].

    Raises:
        DataError: another number of columns, a value that is not finite, or a categorical's
            code that is not whole or not in 0..codes-1.
    """
    if rows.ndim != 2 or rows.shape[1] != len(columns):
        got = f"{rows.shape[1]} values" if rows.ndim == 2 else f"an array of shape {rows.shape}"
        raise DataError(expected=f"rows of {len(columns)} values", got=got)
    finite = np.isfinite(rows)
    if not finite.all():
        step, at = np.argwhere(~finite)[0]
        raise DataError(
            index=int(step),
            field=columns[at].name,
            expected="a finite float32",
            # as JSON writes it: NaN, Infinity
            got=json.dumps(float(rows[step, at])),
        )
    for at, column in enumerate(columns):
        if column.codes is None:
            continue
        codes = rows[:, at]
        wrong = (codes < 0) | (codes >= column.codes) | (codes != np.floor(codes))
        if wrong.any():
            step = int(np.argmax(wrong))
            raise DataError(
                index=step,
                field=column.name,
                expected=f"a whole code from 0 to {column.codes - 1}",
                got=f"{codes[step]:g}",
            )


def _scale(values: NDArray[np.float64], mean: float | None, std: float | None) -> FloatArray:
    if mean is None or std is None:
        raise ValueError("expected a fitted schema: mean and standard deviation are not known")
    return np.asarray((values - mean) / std, np.float32)
