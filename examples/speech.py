"""Find speech in a recording, sent to a service chunk by chunk as a microphone would.

    carry import silero_vad.onnx vad --constant sr=16000 --features 512 --context 64
    carry serve --models vad
    python examples/speech.py RECORDING.wav [URL]

The service keeps the state of the network and the last samples of each stream. A second run finds
that the recording has been sent.
"""

from __future__ import annotations

import sys
import wave
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import numpy as np

from carry_client import Carry, CarryError

RATE, SAMPLES = 16_000, 512
"""Samples a second, and of an event."""


def read_chunks(path: Path) -> np.ndarray:
    """The samples of a WAV file, -1 to 1, as rows of one event each; the last one is padded."""
    with wave.open(str(path)) as recording:
        if recording.getparams()[:3] != (1, 2, RATE):
            raise SystemExit(f"{path}: expected one channel of 16-bit samples at {RATE} Hz")
        samples = np.frombuffer(recording.readframes(recording.getnframes()), "<i2")
    padded = np.pad(samples, (0, -len(samples) % SAMPLES))
    return padded.reshape(-1, SAMPLES).astype(np.float32) / 32768


def find_speech(probabilities: np.ndarray, first: int) -> Iterator[tuple[float, float]]:
    """Begin and end, in seconds, of the events that are likely speech."""
    events = enumerate(probabilities, first)
    for is_speech, group in groupby(events, lambda event: event[1] > 0.5):
        if is_speech:
            places = [place for place, _ in group]
            yield places[0] * SAMPLES / RATE, (places[-1] + 1) * SAMPLES / RATE


def main(recording: str, url: str = "http://127.0.0.1:8000") -> None:
    """Send a recording, and print where it contains speech."""
    path = Path(recording)
    try:
        with Carry(url) as carry:
            stream = carry.model("silero-vad").stream(path.stem)
            replies = list(stream.send_all(read_chunks(path), chunk_events=32))
    except CarryError as error:
        raise SystemExit(str(error)) from error
    if replies:
        probabilities = np.concatenate([reply.outputs["output"][:, 0] for reply in replies])
        for begin_s, end_s in find_speech(probabilities, replies[0].first_position):
            print(f"speech from {begin_s:.2f} s to {end_s:.2f} s")
    print(f"{path.stem} is at position {stream.position}")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        raise SystemExit("usage: python examples/speech.py RECORDING.wav [URL]")
    main(*sys.argv[1:])
