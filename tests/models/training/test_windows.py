import numpy as np
import pytest

from models.training.plan import groups_of, segments_of, windows_of

SPANS = [(0, 37), (37, 38), (38, 38), (38, 120), (120, 133)]


def run(segment_steps: int, batch_size: int, window_steps: int) -> list[list[np.ndarray]]:
    """Rows read, window by window, of every segment."""
    segments = segments_of(SPANS, segment_steps)
    rows_read: list[list[np.ndarray]] = [[] for _ in segments]
    for group in groups_of(segments, batch_size):
        group_segments = [segments[index] for index in group]
        for window in windows_of(group_segments, batch_size, window_steps):
            assert window.index.shape[0] == batch_size
            assert window.index.shape[1] <= window_steps
            assert (window.lengths[len(group) :] == 0).all()
            for slot, index in enumerate(group):
                rows_read[index].append(window.index[slot, : window.lengths[slot]])
    return rows_read


@pytest.mark.parametrize("segment_steps", [1, 8, 1000])
@pytest.mark.parametrize("batch_size", [1, 3, 16])
@pytest.mark.parametrize("window_steps", [1, 7, 64])
def test_every_step_is_read_once_and_in_order(segment_steps, batch_size, window_steps):
    segments = segments_of(SPANS, segment_steps)
    rows_read = run(segment_steps, batch_size, window_steps)
    for segment, parts in zip(segments, rows_read, strict=True):
        np.testing.assert_array_equal(np.concatenate(parts), np.arange(segment.start, segment.stop))
    assert sum(segment.steps for segment in segments) == 133


def test_segments_follow_one_another_within_a_stream():
    segments = segments_of(SPANS, 8)
    starts = {start for start, stop in SPANS if stop > start}
    for segment in segments:
        if segment.before is None:
            assert segment.start in starts
        else:
            assert segments[segment.before].stop == segment.start
            assert segment.start not in starts


def test_padding_is_bounded():
    spans = [(at * 81, at * 81 + 81) for at in range(100)]
    segments = segments_of(spans, 1024)
    padded = used = 0
    for group in groups_of(segments, 20):
        for window in windows_of([segments[index] for index in group], 20, 64):
            padded += window.index.size
            used += int(window.lengths.sum())
    assert used == 8100
    assert used / padded > 0.8
