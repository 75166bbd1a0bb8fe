"""Event schema: the fields of an event and the encoded columns that they become.

A `SPEC.yaml` specifies the fields; training fits the values that depend on data
(means, standard deviations, vocabularies), and the artifact contains the fitted schema, so
that training and serving encode with the same numbers. Encoding is in `models.events.encode`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal, Self
from zoneinfo import ZoneInfo

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

FieldName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,63}$")]

UNKNOWN_CODE = 0
"""The code of a category outside of the vocabulary."""

MAX_CATEGORY_CHARS = 256
"""The longest category, in characters (Unicode code points)."""

MAX_SEASON_VALUES = 64_000
"""Most values of the seasons of all fields. The store's header counts the values of a state that
are not float32 in u16; up to 771 others are the clock and the moments of 256 fields."""

CalendarPart = Literal["hour", "weekday", "yearday"]
CALENDAR_PARTS: tuple[CalendarPart, ...] = ("hour", "weekday", "yearday")
DEFAULT_CALENDAR: tuple[CalendarPart, ...] = ("hour", "weekday")


class Frozen(BaseModel):
    """Base of all specifications: immutable, without unknown keys, with finite numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    later_options: ClassVar[frozenset[str]] = frozenset()
    """Options that older versions do not know: they are left out at their defaults."""

    @model_serializer(mode="wrap")
    def _omit_later_defaults(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        data: dict[str, Any] = serialize(self)
        fields = type(self).model_fields
        for name in self.later_options & data.keys():
            if getattr(self, name) == fields[name].default:
                del data[name]
        return data

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Return a validated copy with changed values.

        Pydantic's copy keeps cached properties, which would then have values from
        before the change, and does not validate.
        """
        values = {name: getattr(self, name) for name in type(self).model_fields}
        return type(self).model_validate({**values, **(update or {})})


class Normalisation(Frozen):
    """Standardisation of a numeric field by each stream's own running mean and deviation.

    The equations are in `models.events.statistics`.

    Attributes:
        memory_events: time constant of mean and deviation, in values: the newest value's weight
            once the stream has had as many; before, all values weigh the same.
        prior_events: values over which the share of the prior deviation `std` falls to 0.
        minimum_std: least deviation, as a share of `std`.
        clip: bound of a standardised value, also for its effect on mean and deviation.
        std: the usual deviation of a stream, fitted: the median over the training streams.
    """

    memory_events: Annotated[int, Field(ge=2, le=10_000_000)] = 1000
    prior_events: Annotated[int, Field(ge=1, le=100_000)] = 20
    minimum_std: Annotated[float, Field(gt=0, lt=1)] = 0.001
    clip: Annotated[float, Field(ge=1, le=1e6)] = 10.0
    std: Annotated[float, Field(gt=0)] | None = None


class NumericField(Frozen):
    """A number, standardised as (transform(value) - mean) / std.

    `transform` is applied before standardising: `signed_log1p` is sign(v) * log(1 + |v|).
    An `optional` field adds the column `<name>.missing` (1 if absent; the value is then 0).

    With `normalisation`, mean and std are the stream's own, as of the event before. The columns
    `<name>.mean` and `<name>.std`, as of the event itself, put forecasts into the stream's units;
    `<name>.value`, standardised by the field's own mean and std, is compared with bounds. Layers do
    not read them. `season_events` adds the column `<name>.season`: the value one season before the
    next event, standardised as a forecast of it would be.
    """

    later_options = frozenset({"normalisation", "season_events"})

    kind: Literal["numeric"] = "numeric"
    name: FieldName
    optional: bool = False
    transform: Literal["none", "signed_log1p"] = "none"
    mean: float | None = None
    std: Annotated[float, Field(gt=0)] | None = None
    normalisation: Normalisation | None = None
    season_events: Annotated[int, Field(ge=2, le=4096)] | None = None
    description: str = ""

    @property
    def fitted(self) -> bool:
        """Whether mean and standard deviation are known, and the usual one of a stream."""
        own = self.normalisation
        has_prior = own is None or own.std is not None
        return self.mean is not None and self.std is not None and has_prior

    @property
    def has_statistics(self) -> bool:
        """Whether the encoding depends on earlier values of the stream."""
        return self.normalisation is not None or self.season_events is not None


class CategoricalField(Frozen):
    """A string from a vocabulary, embedded inside the network.

    Codes: 0 is unknown, 1..K are the vocabulary in order, K+1 is absent if `optional`. A fitted
    vocabulary has the `max_vocabulary` most frequent categories that occur `min_count` times or
    more: the others are what the network learns of unknown ones.
    """

    later_options = frozenset({"min_count"})

    kind: Literal["categorical"] = "categorical"
    name: FieldName
    optional: bool = False
    embedding: Annotated[int, Field(ge=1, le=1024)] = 8
    max_vocabulary: Annotated[int, Field(ge=1, le=1_000_000)] = 1000
    min_count: Annotated[int, Field(ge=1)] = 1
    vocabulary: tuple[str, ...] | None = None
    description: str = ""

    @field_validator("vocabulary")
    @classmethod
    def _distinct(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if value is not None and len(set(value)) != len(value):
            raise ValueError("expected distinct categories")
        for category in value or ():
            if not 1 <= len(category) <= MAX_CATEGORY_CHARS:
                raise ValueError(
                    f"expected categories of 1 to {MAX_CATEGORY_CHARS} characters, "
                    f"got one of {len(category)}"
                )
        return value

    @property
    def fitted(self) -> bool:
        """Whether the vocabulary is known."""
        return self.vocabulary is not None

    @property
    def codes(self) -> int:
        """Number of codes: unknown, the vocabulary, and absent if optional."""
        return 1 + len(self.vocabulary or ()) + (1 if self.optional else 0)

    @property
    def absent_code(self) -> int:
        """The code of an absent value; only an `optional` field has one."""
        return 1 + len(self.vocabulary or ())

    @cached_property
    def code_of(self) -> dict[str, int]:
        """The code of every category in the vocabulary."""
        return {category: code for code, category in enumerate(self.vocabulary or (), start=1)}

    @property
    def labels(self) -> tuple[str, ...]:
        """The label of each code, in code order."""
        absent = ("<absent>",) if self.optional else ()
        return ("<unknown>", *(self.vocabulary or ()), *absent)


class BooleanField(Frozen):
    """true or false, encoded as 1 or 0; `optional` adds the column `<name>.missing`.

    With `coerce`, also the numbers 1 and 0 and the strings true, false, 1 and 0 in any case, in
    tables and in requests. By default as the table that it is trained on.
    """

    later_options = frozenset({"coerce"})

    kind: Literal["boolean"] = "boolean"
    name: FieldName
    optional: bool = False
    coerce: bool | None = None
    description: str = ""

    @property
    def fitted(self) -> bool:
        """Always True: there is nothing to fit."""
        return True


class TimestampField(Frozen):
    """The time of the event: RFC 3339 or an epoch time, at most one per schema.

    Numbers are epoch milliseconds, or seconds with `epoch: s`. Dates and times without an offset
    are `local` to the schema's time zone or rejected, in tables and in requests; by default as the
    table that it is trained on.

    Columns: `<name>.gap` (log(1 + seconds since the stream's last event), standardised; 0
    seconds for the first event and for one out of order), and the parts of `calendar` as angles in
    the schema's time zone: the time of day (`.hour_sin`, `.hour_cos`), the day of the week
    (`.weekday_sin`, `.weekday_cos`), the day of the year (`.yearday_sin`, `.yearday_cos`);
    `optional` adds `<name>.missing`.
    """

    later_options = frozenset({"without_offset", "epoch", "calendar"})

    kind: Literal["timestamp"] = "timestamp"
    name: FieldName
    optional: bool = False
    epoch: Literal["ms", "s"] = "ms"
    without_offset: Literal["local", "reject"] | None = None
    gap_mean: float | None = None
    gap_std: Annotated[float, Field(gt=0)] | None = None
    calendar: tuple[CalendarPart, ...] = DEFAULT_CALENDAR
    description: str = ""

    @field_validator("calendar")
    @classmethod
    def _in_order(cls, value: tuple[CalendarPart, ...]) -> tuple[CalendarPart, ...]:
        if len(set(value)) != len(value):
            raise ValueError(f"expected distinct parts, got {list(value)}")
        return tuple(part for part in CALENDAR_PARTS if part in value)

    @property
    def calendar_features(self) -> tuple[str, ...]:
        """The columns of the calendar, in order, as suffixes of the field's name."""
        return tuple(f"{part}_{kind}" for part in self.calendar for kind in ("sin", "cos"))

    @property
    def features(self) -> tuple[str, ...]:
        """All columns except that of a missing value, in order, as suffixes of the field's name."""
        return ("gap", *self.calendar_features)

    @property
    def fitted(self) -> bool:
        """Whether the gap's mean and standard deviation are known."""
        return self.gap_mean is not None and self.gap_std is not None


EventField = Annotated[
    NumericField | CategoricalField | BooleanField | TimestampField, Field(discriminator="kind")
]


@dataclass(frozen=True, slots=True)
class Column:
    """One encoded column, that is one value of a row of `inputs`.

    Attributes:
        name: the field's name, with a suffix if a field becomes several columns.
        field: the field it comes from, or None for a model without an event schema.
        codes: for a categorical, the number of codes (the value is a whole number in
            0..codes-1); otherwise None.
        embedding: for a categorical, the width of its embedding; otherwise None.
        statistic: whether it is a statistic of the stream, which heads read and layers do not.
            Such columns are the last ones of a row.
    """

    name: str
    field: str | None = None
    codes: int | None = None
    embedding: int | None = None
    statistic: bool = False

    @property
    def width(self) -> int:
        """Number of values of this column in the input of the first layer."""
        if self.statistic:
            return 0
        return 1 if self.embedding is None else self.embedding


class EventSchema(Frozen):
    """The fields of one event, in order, and the time zone of its calendar features."""

    timezone: str = "UTC"
    fields: Annotated[tuple[EventField, ...], Field(min_length=1, max_length=256)]

    @field_validator("timezone")
    @classmethod
    def _known_zone(cls, value: str) -> str:
        try:
            ZoneInfo(value)
        except Exception as error:
            raise ValueError(
                f"expected an IANA time zone such as 'Europe/Vienna', got {value!r}"
            ) from error
        return value

    @model_validator(mode="after")
    def _consistent(self) -> EventSchema:
        names = [field.name for field in self.fields]
        if len(set(names)) != len(names):
            raise ValueError(f"expected distinct field names, got {names}")
        if sum(field.kind == "timestamp" for field in self.fields) > 1:
            raise ValueError("expected at most one timestamp field")
        seasons = [f.season_events for f in self.fields if isinstance(f, NumericField)]
        values = sum(1 + season for season in seasons if season is not None)
        if values > MAX_SEASON_VALUES:
            raise ValueError(
                f"season_events: expected at most {MAX_SEASON_VALUES} in all fields together, with "
                f"1 more for each field, since the state holds them; got {values}"
            )
        return self

    @property
    def fitted(self) -> bool:
        """Whether every field is fitted, so that events can be encoded."""
        return all(field.fitted for field in self.fields)

    @cached_property
    def timestamp(self) -> TimestampField | None:
        """The timestamp field, if there is one."""
        return next((f for f in self.fields if isinstance(f, TimestampField)), None)

    def field(self, name: str) -> EventField:
        """The field with a name; raises KeyError if there is none."""
        for field in self.fields:
            if field.name == name:
                return field
        raise KeyError(name)

    @cached_property
    def columns(self) -> tuple[Column, ...]:
        """The encoded columns, in the order of a row of `inputs`."""
        read = tuple(column for field in self.fields for column in _columns_of(field))
        return (*read, *(column for field in self.fields for column in _statistics_of(field)))

    @cached_property
    def column_index(self) -> dict[str, int]:
        """The index of each encoded column in a row."""
        return {column.name: index for index, column in enumerate(self.columns)}


STATISTICS = ("mean", "std")
"""The columns of a stream's mean and deviation, in order, as suffixes of the field's name."""


def _columns_of(field: EventField) -> Iterator[Column]:
    match field:
        case CategoricalField():
            yield Column(field.name, field.name, codes=field.codes, embedding=field.embedding)
            return
        case TimestampField():
            for feature in field.features:
                yield Column(f"{field.name}.{feature}", field.name)
        case NumericField(season_events=int()):
            yield Column(field.name, field.name)
            yield Column(f"{field.name}.season", field.name)
        case NumericField() | BooleanField():
            yield Column(field.name, field.name)
    if field.optional:
        yield Column(f"{field.name}.missing", field.name)


def _statistics_of(field: EventField) -> Iterator[Column]:
    if isinstance(field, NumericField) and field.normalisation is not None:
        for name in (*STATISTICS, "value"):
            yield Column(f"{field.name}.{name}", field.name, statistic=True)
