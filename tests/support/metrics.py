"""Metrics in Prometheus' text format, as series and values."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

Series = tuple[str, frozenset[tuple[str, str]]]


def read(text: bytes) -> dict[Series, float]:
    """The value of each series of a page."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def series(name: str, **labels: str) -> Series:
    """A series by the name and the labels of its samples."""
    return name, frozenset(labels.items())
