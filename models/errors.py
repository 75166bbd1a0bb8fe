"""What can be wrong with a model, its files or the data given to it.

    ModelsError
      SpecError              a specification that cannot be built
      GraphUnsupportedError  a network that no ONNX graph can hold
      ArtifactError          an artifact that is damaged, foreign or does not fit itself
      StateError             state parts that do not fit the model's layout
      DataError              one sequence of events or rows that the model's schema refuses
      ImportedModelError     a Keras model that cannot be carried

The service wraps these at its boundary; none of them knows about HTTP.
"""

from __future__ import annotations


class ModelsError(Exception):
    """Base of everything this package raises on purpose."""


class SpecError(ModelsError):
    """The specification does not describe a network that can be built."""


class GraphUnsupportedError(ModelsError):
    """The network has something that its ONNX graph cannot hold; the message names it."""


class ArtifactError(ModelsError):
    """The artifact directory was refused; the message names the file and the reason."""


class StateError(ModelsError):
    """State parts with a wrong name, shape, dtype or value."""


class ImportedModelError(ModelsError):
    """The Keras model holds something that cannot be carried; the message names the layer."""


class DataError(ModelsError):
    """A sequence the schema refuses.

    Attributes:
        index: step of the first offending event, counted from 0 within the sequence,
            or None where the sequence as a whole is at fault.
        field: name of the event field or encoded column, or None.
        expected: what would have been accepted, in words.
        got: what came, in words.
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
