"""The plan of a cluster: its schedule, what bounds it, and the figures of the page."""

from dataclasses import replace

import pytest

from tests.backfill.plan import Rates, Workload, draw_buckets, plan, schedule

WORKLOAD = Workload(events=1e9, streams=1e6, machines=4, cores=8, buckets=512, exponent=0.3)
RATES = Rates()


def test_schedule_gives_the_largest_task_first() -> None:
    assert schedule([1, 1, 1, 3], 2) == 3
    assert schedule([5], 4) == 5
    # the last of many equal tasks waits for a worker
    assert schedule([1.0] * 9, 8) == 2


def test_every_event_is_in_a_bucket() -> None:
    for skew in (0.0, 0.1):
        events, longest = draw_buckets(replace(WORKLOAD, skew=skew))
        assert events.sum() == pytest.approx(1e9)
        assert (longest <= events).all()
    assert longest.max() == pytest.approx(1e8)


def test_more_cores_take_less_time_and_the_same_machine_hours() -> None:
    few = plan(replace(WORKLOAD, buckets=4096), RATES)
    many = plan(replace(WORKLOAD, buckets=4096, machines=8), RATES)
    assert many.compute_s < 0.6 * few.compute_s
    assert many.machine_hours == pytest.approx(few.machine_hours, rel=0.2)
    assert few.bound_by == "cores"
    assert few.busy > 0.9


def test_one_long_stream_bounds_a_run() -> None:
    made = plan(replace(WORKLOAD, skew=0.1), RATES)
    assert made.bound_by == "the longest stream"
    alone_s = 1e8 / RATES.alone_events_s + 1e8 / RATES.shuffle_events_s
    assert made.compute_s == pytest.approx(alone_s, rel=0.05)


def test_small_units_and_slow_disks_bound_a_run() -> None:
    made = plan(replace(WORKLOAD, unit_rows=10_000, opens_per_s=1e4), RATES)
    assert made.bound_by == "opening files"
    made = plan(replace(WORKLOAD, disk_mb_s=10.0), RATES)
    assert made.bound_by == "bandwidth"
