"""Metrics of challengers, and the report that is read from the samples of all workers."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from prometheus_client import Metric

from service.pipeline.recorder import ShadowBatch
from service.telemetry.metrics import MULTIPROCESS_DIR, PrometheusRecorder
from service.telemetry.shadow_metrics import read_report
from tests.support.metrics import SHADOW_DIFFERENCES, shadow_batch


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> PrometheusRecorder:
    monkeypatch.delenv(MULTIPROCESS_DIR, raising=False)
    recorder = PrometheusRecorder()
    recorder.record_shadow("flights", "b2", shadow_batch())
    recorder.record_shadow("flights", "b2", shadow_batch())
    recorder.record_shadow("flights", "c3", ShadowBatch({"dropped": 5}))
    recorder.record_shadow("rivers", "b2", ShadowBatch({"dropped": 9}))
    recorder.record_shadow(
        "flights", "b2", ShadowBatch({"dropped": 0}, {"champion": 40}, {"champion": 0.002})
    )
    return recorder


def test_report_is_of_one_challenger(recorder: PrometheusRecorder) -> None:
    report = recorder.shadow_report("flights", "b2")
    assert report["chunks"] == {"computed": 6, "dropped": 2, "failed": 0}
    assert (report["events"], report["caught_up_events"]) == (20, 14)
    assert report["us_per_event"] == pytest.approx({"champion": 50.0, "challenger": 200.0})
    assert report["lag_s"] == pytest.approx(0.2)
    empty = recorder.shadow_report("flights", "c3")
    assert empty["chunks"] == {"dropped": 5}
    assert (empty["events"], empty["lag_s"], empty["differences"], empty["losses"]) == (
        (0, None, {}, {})
    )
    assert recorder.shadow_report("flights", "none")["chunks"] == {}


def test_report_has_differences_losses_and_calibration(recorder: PrometheusRecorder) -> None:
    report = recorder.shadow_report("flights", "b2")
    difference = report["differences"]["late"]
    assert difference["mean"] == pytest.approx(SHADOW_DIFFERENCES.mean())
    for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99)):
        exact = float(np.quantile(SHADOW_DIFFERENCES, share, method="inverted_cdf"))
        assert exact / 1.5 < difference[name] < exact * 1.5
    assert report["losses"]["late"]["log_loss"] == pytest.approx(
        {"champion": 0.5, "challenger": 0.25, "events": 12}
    )
    assert report["losses"]["odd"]["nll"]["challenger"] == pytest.approx(-0.75)
    champion = report["calibration"]["late"]["champion"]
    assert champion["bins"]["0.2"] == pytest.approx({"events": 8, "predicted": 0.25, "true": 0.75})
    assert champion["error"] == pytest.approx((4 * 0.5 + 2 * 0.1) / 6)
    assert report["calibration"]["late"]["challenger"]["error"] == 0


def test_order_of_labels_does_not_matter(recorder: PrometheusRecorder) -> None:
    """Files of several workers sort the labels of a sample by name."""
    recorder.flush()

    def sorted_labels() -> Iterator[Metric]:
        for metric in recorder.registry.collect():
            metric.samples = [
                sample._replace(labels=dict(sorted(sample.labels.items())))
                for sample in metric.samples
            ]
            yield metric

    again = read_report(sorted_labels(), "flights", "b2")
    assert again == recorder.shadow_report("flights", "b2")
