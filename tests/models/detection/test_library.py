"""The compiled library of detection: its sources, and calls of it."""

from __future__ import annotations

import sys
import threading
import zlib

import numpy as np
import pytest

from models.detection.detector import Detector
from models.detection.kernel import Kernel
from models.detection.library import load_library
from models.errors import ModelsError
from models.spec.layout import detection_state
from tests.models.detection.test_detector import events
from tests.models.detection.test_stream_tails import ONE_TARGET, fitted_to_events


def test_a_library_of_other_sources_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    Kernel(ONE_TARGET)
    monkeypatch.setattr(zlib, "crc32", lambda _: 1)
    load_library.cache_clear()
    with pytest.raises(ModelsError, match="of other sources than those beside it: run scripts/se"):
        Kernel(ONE_TARGET)


def test_other_threads_go_on_during_a_long_chunk() -> None:
    spec, steps = fitted_to_events(ONE_TARGET), 500_000
    rows, outputs = (
        np.repeat(each, steps // 500, axis=0)
        for each in (events(np.random.default_rng(2), spec, 500))
    )
    state = detection_state(spec).zero().floats[np.newaxis]
    detector, done = Detector(spec), threading.Event()

    def score() -> None:
        detector.step(rows[np.newaxis], np.array([steps]), outputs[np.newaxis], state)
        done.set()

    interval = sys.getswitchinterval()
    # a thread runs on until it releases the lock
    sys.setswitchinterval(1000)
    try:
        (thread := threading.Thread(target=score)).start()
        has_ended = done.is_set()
        thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not has_ended
