"""Errors of the models package: invalid specifications, artifacts, states and data.

    ModelsError
      SpecError              an invalid specification
      GraphUnsupportedError  a network that cannot be exported as an ONNX graph
      ArtifactError          an artifact that is damaged, of another format or inconsistent
      StateError             state parts that do not match the model's layout
      DataError              a sequence of events or rows that the model's schema rejects
      ImportedModelError     a Keras model that cannot be imported
      VerdictError           a model that does not pass a required verdict

The service wraps these at its boundary; none of them knows about HTTP.
"""

from __future__ import annotations


class ModelsError(Exception):
    """Base class of the package's errors."""


class SpecError(ModelsError):
    """The specification does not describe a valid network."""


class LibraryError(ModelsError, ImportError):
    """The compiled library of detection is missing, or of other sources."""


class GraphUnsupportedError(ModelsError):
    """The network uses a feature that its ONNX graph cannot represent; the message names it."""


class ArtifactError(ModelsError):
    """The artifact directory is invalid; the message names the file and the reason."""


class StateError(ModelsError):
    """A state part has an invalid name, shape, dtype or value."""


class ImportedModelError(ModelsError):
    """The Keras model contains a layer that cannot be imported; the message names it."""


class VerdictError(ModelsError):
    """A model does not pass a required verdict; `carry` exits with a status of its own."""

    exit_status = 3


class DataError(ModelsError):
    """The schema rejects a sequence.

    Attributes:
        index: index of the first invalid event, counted from 0 within the sequence; None if the
            sequence as a whole is invalid.
        field: name of the event field or encoded column, or None.
        expected: description of valid values.
        got: description of the actual value.
    """

    def __init__(
        self, *, expected: str, got: str, index: int | None = None, field: str | None = None
    ):
        self.index = index
        self.field = field
        self.expected = expected
        self.got = got
        where = "" if index is None else f"event {index}: "
        what = "" if field is None else f"field {field!r}: "
        super().__init__(f"{where}{what}expected {expected}, got {got}")

    def in_table(self, source: str, first_row: int = 0) -> DataError:
        """The error as one of a table: `source` and its row, from 1, in place of the index.

        Args:
            first_row: number of rows before those that the index counts.
        """
        at = "" if self.index is None else f", row {first_row + self.index + 1}"
        return DataError(field=self.field, expected=f"{source}{at}: {self.expected}", got=self.got)
