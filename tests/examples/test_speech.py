"""The example that finds speech, against a service with a model that calls loud samples speech."""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np
import pytest

from examples.speech import RATE, SAMPLES, main
from tests.support.onnx_graphs import graphs, import_here
from tests.support.service import running

CONTEXT = 64
QUIET, LOUD = 31, 50
"""Events before the loud ones, and loud ones."""


def write_detector(path: Path) -> None:
    """A graph with the inputs of a voice activity detector, whose output follows the power."""
    g = graphs.Builder("power", 1)
    power = g.add("ReduceMean", g.add("Mul", "input", "input"), g.constant([1]), keepdims=1)
    above = g.add("Sub", power, g.constant(np.float32(0.01)))
    g.add("Sigmoid", g.add("Mul", above, g.constant(np.float32(1e4))), outputs=["output"])
    width = SAMPLES + CONTEXT
    g.save(path, {"input": ["batch", width]}, {"output": ["batch", 1]})


def write_recording(path: Path) -> None:
    """Silence, a tone and silence; the last event is not complete."""
    samples = np.zeros((QUIET + LOUD + 30) * SAMPLES - 100)
    loud = slice(QUIET * SAMPLES, (QUIET + LOUD) * SAMPLES)
    samples[loud] = 0.2 * np.sign(np.sin(np.arange(LOUD * SAMPLES)))
    with wave.open(str(path), "wb") as recording:
        recording.setparams((1, 2, RATE, 0, "NONE", ""))
        recording.writeframes((samples * 32768).astype("<i2").tobytes())


def test_the_loud_part_of_a_recording_is_speech(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_detector(tmp_path / "power.onnx")
    import_here(tmp_path / "power.onnx", tmp_path / "models", "silero-vad", context=CONTEXT)
    write_recording(tmp_path / "desk.wav")
    with running(tmp_path, tmp_path / "models") as service:
        main(str(tmp_path / "desk.wav"), service.url)
        first = capsys.readouterr().out
        main(str(tmp_path / "desk.wav"), service.url)
        second = capsys.readouterr().out
    place = f"desk is at position {QUIET + LOUD + 30}\n"
    assert first == f"speech from 0.99 s to 2.59 s\n{place}"
    assert second == place


def test_a_recording_of_another_rate_is_rejected(tmp_path: Path) -> None:
    with wave.open(str(tmp_path / "low.wav"), "wb") as recording:
        recording.setparams((1, 2, 8000, 0, "NONE", ""))
    with pytest.raises(SystemExit, match="expected one channel of 16-bit samples at 16000 Hz"):
        main(str(tmp_path / "low.wav"))
