"""What the codec needs to know of a model that is served."""

from __future__ import annotations

from typing import Protocol

from models.events.schema import EventSchema
from models.spec.decoder import DecoderSpec
from models.spec.layout import OutputSpec
from models.spec.model import ModelSpec
from models.spec.state import StateSpec


class CodecModel(Protocol):
    """A served model, as its readers and writers see it."""

    @property
    def name(self) -> str:
        """The name in URLs."""

    @property
    def version(self) -> str:
        """The first 12 hex digits of the fingerprint."""

    @property
    def spec(self) -> ModelSpec:
        """The specification."""

    @property
    def events(self) -> EventSchema | None:
        """The event schema; None for a model that takes `inputs` only."""

    @property
    def chunk_limit(self) -> int | None:
        """Maximum steps of one chunk; None if a chunk may be split anywhere."""

    @property
    def state(self) -> StateSpec:
        """The layout of a stream's state."""

    @property
    def outputs(self) -> OutputSpec:
        """The layout of one step's outputs."""

    def check_alarm_rate(self, rate: float, at: str) -> None:
        """Reject a rate of false alarms that the model's alarms cannot have."""

    def require_decoder(self) -> DecoderSpec:
        """The model's decoder; raises ForecastUnsupported."""
