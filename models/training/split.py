"""The split of a table into training, validation and test events.

Either by two times, the same for all streams, or by shares of each stream's events. What is
compared is `Streams.split_keys`: the time of an event, or its position within its stream. In both
cases every stream's validation events follow its training events, and its test events follow those.
By shares, one stream's test events can be at the time of another's training events: split by time
if streams depend on each other.
"""

from __future__ import annotations

from typing import NamedTuple

from models.errors import SpecError
from models.spec.model import ModelSpec, schema_of
from models.training.data import POSITIONS, moment_ms, training_of


class Split(NamedTuple):
    """Where validation and test begin.

    Attributes:
        validate, test: key of the first event of each.
        train_range, validation_range, test_range: the events of each, in words.
    """

    validate: int
    test: int
    train_range: str
    validation_range: str
    test_range: str


def split_of(spec: ModelSpec) -> Split:
    """The split of a spec with resolved `training`.

    Raises:
        SpecError: a time cannot be read, or the test begins before validation does.
    """
    schema, training = schema_of(spec), training_of(spec)
    if training.is_split_by_share:
        validate_share, test_share = training.validate_share or 0.0, training.test_share or 0.0
        return Split(
            round((1 - validate_share - test_share) * POSITIONS),
            round((1 - test_share) * POSITIONS),
            f"before the last {validate_share + test_share:.4g} of each stream",
            f"in the {validate_share:.4g} of each stream before its test events (validate_share)",
            f"in the last {test_share:.4g} of each stream",
        )
    validate_from, test_from = training.validate_from or "", training.test_from or ""
    split = Split(
        moment_ms(schema, validate_from, "training.validate_from"),
        moment_ms(schema, test_from, "training.test_from"),
        f"before {validate_from} (validate_from)",
        f"from {validate_from} to before {test_from} (test_from)",
        f"from {test_from} on",
    )
    if split.test < split.validate:
        raise SpecError(
            "training.test_from: expected a moment at or after validate_from "
            f"({validate_from!r}), got {test_from!r}"
        )
    return split
