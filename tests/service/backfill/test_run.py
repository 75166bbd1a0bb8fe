"""A backfill equals the runner over each stream, in whatever steps, order and processes it ran."""

from __future__ import annotations

from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from models.artifact.artifact import Artifact, load_artifact
from models.artifact.writing import write_artifact
from models.errors import SpecError
from models.events.frame import columns_from_frame
from models.events.schema import NumericField
from models.events.values import FINITE
from models.offline.runner import EventTable, Runner
from models.spec.layout import output_spec
from models.spec.model import parse_spec, schema_of
from service.backfill import run as backfills
from service.backfill.bucket import compute_bucket
from service.backfill.engines import Processes, TaskError
from service.backfill.plan import BackfillError, Job, rows_in_memory
from service.backfill.record import BucketRecord, read_record
from service.backfill.run import BackfillOptions, plan_backfill, resume_plan, run_backfill
from service.core.values import StreamState
from service.store.backup import BackupReader
from tests.support.backfill import (
    EVENTS,
    Recording,
    files_of,
    job_of,
    random_events,
    time_column,
)
from tests.support.models import random_weights, small_spec


def run(job: Job, **options: Any) -> dict[str, Any]:
    return run_backfill(job, Recording(job), **options)


def states_of(job: Job) -> dict[str, StreamState]:
    states = {}
    for bucket in range(job.plan.buckets):
        with job.states(bucket).open("rb") as file:
            for block in BackupReader(file):
                states |= {key.stream: backed_up.state for key, backed_up in block}
    return states


def outputs_of(job: Job) -> pl.DataFrame:
    return pl.read_parquet(job.out / "outputs" / "*.parquet").sort("stream", "position")


@pytest.mark.parametrize("sizes", [(1, 1000), (4, 1000), (2, 7)], ids=str)
def test_outputs_and_states_equal_those_of_the_runner(
    artifact: Artifact,
    frame: pl.DataFrame,
    history: list[Path],
    tmp_path: Path,
    sizes: tuple[int, int],
) -> None:
    buckets, rows = sizes
    job = job_of(artifact, history, tmp_path / "out", buckets=buckets, piece_rows=rows)
    report = run(job)
    assert (report["events"], report["streams"], report["rejected_events"]) == (EVENTS, 9, 0)
    outputs, states = outputs_of(job), states_of(job)
    assert sorted(states) == sorted(frame["stream"].unique())
    columns = [name for each in output_spec(artifact.spec).outputs for name in each.column_names()]
    runner, start = Runner(artifact.spec, artifact.weights), np.zeros(1, np.int64)
    for name, state in states.items():
        events = frame.filter(pl.col("stream") == name)
        own = columns_from_frame(schema_of(artifact.spec), events)
        expected, after, _, _ = runner.run_table(EventTable(own, start))
        rows_of = outputs.filter(pl.col("stream") == name)
        np.testing.assert_allclose(rows_of.select(columns), expected, rtol=1e-5, atol=1e-5)
        assert rows_of["position"].to_list() == list(range(events.height))
        times = events[time_column(artifact)].to_list()
        assert rows_of["time"].dt.timestamp("ms").to_list() == times
        np.testing.assert_allclose(state.state.floats, after.floats[0], rtol=1e-5, atol=1e-5)
        assert state.state.ints.tolist() == after.ints[0].tolist()
        assert state.head.position == events.height
        assert (state.updated_ms, state.last, state.since) == (times[-1], None, None)
        assert state.fingerprint == artifact.fingerprint
    assert outputs.select("file", "row").n_unique() == EVENTS


def test_epoch_and_tag_are_of_the_events(
    artifact: Artifact, frame: pl.DataFrame, history: list[Path], tmp_path: Path
) -> None:
    def heads(name: str, files: list[Path], **changes: int) -> dict[str, bytes]:
        job = job_of(artifact, files, tmp_path / name, **changes)
        run(job)
        return {
            stream: state.head.epoch + state.head.tag for stream, state in states_of(job).items()
        }

    whole = heads("whole", history)
    frame.write_parquet(tmp_path / "sorted.parquet")
    assert heads("cut", [tmp_path / "sorted.parquet"], piece_rows=5, buckets=3) == whole
    assert len(set(whole.values())) == 9
    last = pl.int_range(pl.len()) == EVENTS - 1
    late = frame.with_columns(pl.col(time_column(artifact)) + pl.when(last).then(1).otherwise(0))
    late.write_parquet(tmp_path / "late.parquet")
    other = heads("late", [tmp_path / "late.parquet"])
    assert [name for name in whole if whole[name] != other[name]] == [frame["stream"][-1]]


def test_bytes_do_not_depend_on_engine_and_order(
    artifact: Artifact, history: list[Path], tmp_path: Path
) -> None:
    jobs = [job_of(artifact, history, tmp_path / name, buckets=4) for name in "abc"]
    run(jobs[0])
    run_backfill(jobs[1], Recording(jobs[1], last_first=True))
    with closing(Processes(jobs[2], 2)) as processes:
        report = run_backfill(jobs[2], processes)
    files = files_of(jobs[0].out)
    assert len(files) == 8
    assert files_of(jobs[1].out) == files
    assert files_of(jobs[2].out) == files
    assert report["peak_memory_bytes"] > 2**20


def test_an_interrupted_run_computes_what_is_missing(
    artifact: Artifact, history: list[Path], tmp_path: Path
) -> None:
    whole = job_of(artifact, history, tmp_path / "whole", buckets=4)
    run(whole)
    job = job_of(artifact, history, tmp_path / "cut", buckets=4)
    computed: Counter[Any] = Counter()
    for _ in range(8):
        engine = Recording(job, stop_after=3)
        try:
            run_backfill(job, engine)
            break
        except KeyboardInterrupt:
            pass
        finally:
            computed.update(each for each in engine.done if isinstance(each, int))
    assert computed == dict.fromkeys(range(4), 1)
    assert files_of(job.out) == files_of(whole.out)
    assert not (job.out / "shuffle").exists()
    again = Recording(job)
    before = backfills.read_report(job.out)
    assert run_backfill(job, again) == before
    assert again.done == []
    # a file that was removed or cut is computed again, from the sources
    job.outputs(1).write_bytes(job.outputs(1).read_bytes()[:-1])
    job.states(2).unlink()
    run_backfill(job, again)
    assert [each for each in again.done if isinstance(each, int)] == [1, 2]
    assert files_of(job.out) == files_of(whole.out)


def test_a_rejected_event_ends_its_stream_by_policy(
    artifact: Artifact, frame: pl.DataFrame, tmp_path: Path
) -> None:
    late = frame.filter(pl.col("stream") == "s3")[time_column(artifact)][5]
    is_wrong = (pl.col("stream") == "s3") & (pl.col(time_column(artifact)) == late)
    field = next(each for each in schema_of(artifact.spec).fields if each.kind == "categorical")
    frame.with_columns(
        pl.when(is_wrong).then(pl.lit("x" * 300)).otherwise(field.name).alias(field.name)
    ).write_parquet(tmp_path / "a.parquet")
    height = frame.filter(pl.col("stream") == "s3").height
    for policy, events, halted, rejected in (
        ("continue", height - 1, 0, 1),
        ("halt", 5, 1, height - 5),
    ):
        job = job_of(
            artifact, [tmp_path / "a.parquet"], tmp_path / policy, on_error=policy, piece_rows=9
        )
        report = run(job)
        assert states_of(job)["s3"].head.position == events
        assert outputs_of(job).filter(pl.col("stream") == "s3").height == events
        assert report["halted_streams"] == halted
        assert report["rejected_events"] == rejected
        assert report["events"] == EVENTS - rejected


def test_temporary_files_of_a_killed_run_are_removed(
    artifact: Artifact, history: list[Path], tmp_path: Path
) -> None:
    job = job_of(artifact, history, tmp_path / "out")
    run(job)
    left = job.out / "outputs" / f".{job.outputs(0).name}.0123456789ab.tmp"
    left.touch()
    run(job)
    assert not left.exists()


def test_the_record_has_the_checksums_of_the_files(
    artifact: Artifact, history: list[Path], tmp_path: Path
) -> None:
    import hashlib

    job = job_of(artifact, history, tmp_path / "out")
    run(job)
    record = read_record(job, 0)
    assert isinstance(record, BucketRecord)
    for file, checksum in (
        (job.outputs(0), record.outputs_blake2b),
        (job.states(0), record.states_blake2b),
    ):
        assert hashlib.blake2b(file.read_bytes(), digest_size=32).hexdigest() == checksum


def test_another_plan_is_rejected_unless_it_is_overwritten(
    artifact: Artifact, history: list[Path], tmp_path: Path
) -> None:
    job = job_of(artifact, history, tmp_path / "out")
    run(job)
    other = job_of(artifact, history[:1], tmp_path / "out")
    with pytest.raises(BackfillError, match=r"of another backfill: the history lacks .*b\.csv;"):
        run(other)
    assert run(other, overwrite=True)["events"] == 150
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    for overwrite in (False, True):
        with pytest.raises(BackfillError, match="expected a new folder"):
            run(job_of(artifact, history, tmp_path / "mine"), overwrite=overwrite)


@pytest.mark.parametrize("overwrite", [False, True])
def test_units_that_are_half_removed_are_written_again(
    artifact: Artifact,
    history: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    overwrite: bool,
) -> None:
    job = job_of(artifact, history, tmp_path / "out")
    run(job)
    expected = files_of(job.out)
    if overwrite:
        job.record(0).unlink()
        with pytest.raises(KeyboardInterrupt):
            run_backfill(job, Recording(job, stop_after=2))
    job.states(0).unlink()

    def remove_some(folder: Path, *_: Any, **__: Any) -> None:
        for file in folder.glob("*.parquet"):
            file.unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(backfills.shutil, "rmtree", remove_some)
        with pytest.raises(KeyboardInterrupt):
            run(job, overwrite=overwrite)
    job.states(0).unlink(missing_ok=True)

    run(job)

    assert files_of(job.out) == expected


def test_a_unit_that_is_damaged_or_lost_costs_no_events(
    artifact: Artifact, history: list[Path], tmp_path: Path
) -> None:
    job = job_of(artifact, history, tmp_path / "out", unit_rows=50)
    with pytest.raises(KeyboardInterrupt):
        run_backfill(job, Recording(job, stop_after=len(history)))
    unit = job.unit(1)
    unit.write_bytes(unit.read_bytes()[:100])
    with pytest.raises(BackfillError, match="out/shuffle: a unit cannot be read"):
        run(job)
    unit.unlink()
    assert run(job)["events"] == EVENTS


def test_overwriting_can_be_interrupted_and_repeated(
    artifact: Artifact, history: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_of(artifact, history, tmp_path / "out")
    run(job)
    report = job.out / "report.json"
    unlink = Path.unlink

    def interrupt(path: Path, *, missing_ok: bool = False) -> None:
        unlink(path, missing_ok=missing_ok)
        if path.parent == job.out:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", interrupt)
        while report.exists():
            with pytest.raises(KeyboardInterrupt):
                run(job, overwrite=True)
    assert run(job, overwrite=True)["events"] == EVENTS


def test_a_plan_by_which_nothing_was_done_can_be_corrected(
    artifact: Artifact, history: list[Path], tmp_path: Path
) -> None:
    mistyped = job_of(artifact, history, tmp_path / "out", stream="devise")
    with pytest.raises(TaskError, match="'devise'"):
        run(mistyped)
    job = job_of(artifact, history, tmp_path / "out")
    assert resume_plan(job.out, job.plan) == job.plan
    assert run(job)["events"] == EVENTS
    with pytest.raises(BackfillError, match="of another backfill"):
        run(mistyped)


def test_an_output_folder_that_is_a_file_is_rejected(
    artifact: Artifact, history: list[Path]
) -> None:
    job = job_of(artifact, history[:1], history[1])
    with pytest.raises(BackfillError, match="as OUT, the last argument, got a file"):
        resume_plan(job.out, job.plan)


def test_events_have_one_order(artifact: Artifact, history: list[Path]) -> None:
    options = BackfillOptions(stream="stream", order_by="x", file_order=True)
    with pytest.raises(BackfillError, match="--order-by or --file-order, got both"):
        plan_backfill(artifact, [str(path) for path in history], options)


def test_one_run_at_a_time_works_in_a_folder(
    artifact: Artifact, history: list[Path], tmp_path: Path
) -> None:
    job = job_of(artifact, history, tmp_path / "out")
    with (
        backfills.open_folder(job.out, job.plan, overwrite=False),
        pytest.raises(BackfillError, match="another run"),
    ):
        run(job, overwrite=True)


def test_models_that_depend_on_cuts_are_rejected(artifact: Artifact, tmp_path: Path) -> None:
    both_ways = parse_spec(
        {
            "name": "both",
            "events": small_spec().events,
            "layers": [{"kind": "bidirectional", "units": 2}],
            "heads": [{"kind": "sequence", "name": "y"}],
        }
    )
    write_artifact(tmp_path / "both", both_ways, random_weights(both_ways))
    with pytest.raises(SpecError, match="do not depend on how a stream is cut"):
        plan_backfill(load_artifact(tmp_path / "both"), [], BackfillOptions(stream="stream"))
    with pytest.raises(SpecError, match="--stream"):
        plan_backfill(artifact, [], BackfillOptions())


def test_outputs_that_are_not_finite_are_rejected_with_their_place(
    artifact: Artifact, frame: pl.DataFrame, tmp_path: Path
) -> None:
    weights = {name: np.full_like(each, 3e38) for name, each in artifact.weights.items()}
    write_artifact(tmp_path / "wild", artifact.spec, weights)
    frame.write_parquet(tmp_path / "a.parquet")
    job = job_of(load_artifact(tmp_path / "wild"), [tmp_path / "a.parquet"], tmp_path / "out")
    with pytest.raises(TaskError, match=r"a\.parquet, row \d+, stream 's\d': finite"):
        run(job)


def test_numbers_that_cannot_be_encoded_are_rejected(
    artifact: Artifact, frame: pl.DataFrame, tmp_path: Path
) -> None:
    field = next(
        each.name
        for each in schema_of(artifact.spec).fields
        if isinstance(each, NumericField) and each.transform != "signed_log1p"
    )
    row = pl.int_range(pl.len()) == 7
    frame.with_columns(
        pl.when(row).then(1e300).otherwise(pl.col(field)).alias(field)
    ).write_parquet(tmp_path / "a.parquet")
    report = run(job_of(artifact, [tmp_path / "a.parquet"], tmp_path / "out"))
    assert report["events"] == EVENTS - 1
    (rejected,) = report["rejected"]
    assert (rejected["column"], rejected["reason"], rejected["events"]) == (
        *(field, f"expected {FINITE}", 1),
    )
    assert rejected["places"] == [f"{tmp_path / 'a.parquet'}, row 8"]


def test_the_largest_bucket_is_computed_first(artifact: Artifact, tmp_path: Path) -> None:
    frame = random_events(schema_of(artifact.spec), EVENTS, streams=9)
    frame.with_columns(
        stream=pl.when(pl.int_range(pl.len()) < EVENTS // 2)
        .then(pl.lit("long"))
        .otherwise("stream")
    ).write_parquet(tmp_path / "a.parquet")
    job = job_of(artifact, [tmp_path / "a.parquet"], tmp_path / "out", buckets=8)
    engine = Recording(job)
    run_backfill(job, engine)
    order = [each for each in engine.done if isinstance(each, int)]
    sizes = [record.events for each in order if (record := read_record(job, each))]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] >= EVENTS // 2


def test_events_of_many_values_are_computed_in_smaller_pieces(artifact: Artifact) -> None:
    spec = artifact.spec
    unit_rows, piece_rows = rows_in_memory(spec)
    schema = schema_of(spec)
    more = tuple(NumericField(name=f"f{at}", mean=0.0, std=1.0) for at in range(200))
    events = schema.model_copy(update={"fields": schema.fields + more})
    wide = spec.model_copy(update={"events": events})
    assert rows_in_memory(wide)[0] < unit_rows / 6
    assert rows_in_memory(wide)[1] < piece_rows / 4


def test_a_bucket_that_is_finished_is_not_computed_again(
    artifact: Artifact, history: list[Path], tmp_path: Path
) -> None:
    """As by an engine that lost the process that computed it, with its result."""
    job = job_of(artifact, history, tmp_path / "out", buckets=2)
    run(job)
    before = job.outputs(1).stat().st_ino
    assert compute_bucket(job, 1) == read_record(job, 1)
    assert job.outputs(1).stat().st_ino == before
