"""Engines: every task gives its result once, also if processes are lost."""

from __future__ import annotations

import gc
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import chdir, closing

import pytest

from models.artifact.artifact import Artifact
from models.spec.model import schema_of
from service.backfill.engines import Engine, Processes, RayCluster, TaskError, ThisProcess
from service.backfill.plan import Job
from service.backfill.run import run_backfill
from service.commands.backfill import open_engine
from service.core.errors import OperatorError
from tests.support.backfill import (
    double,
    fail,
    files_of,
    job_of,
    kill_always,
    kill_once,
    random_events,
    small_artifact,
)
from tests.support.servers import free_port


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return small_artifact(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture(scope="module")
def job(artifact: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("backfill")
    frame = random_events(schema_of(artifact.spec), 300, streams=9)
    frame.head(100).write_parquet(folder / "a.parquet")
    frame.tail(-100).write_csv(folder / "b.csv")
    return job_of(artifact, [folder / "a.parquet", folder / "b.csv"], folder / "out", buckets=4)


OPEN: dict[str, Callable[[Job], Engine]] = {
    "processes": lambda job: Processes(job, 2),
    "ray": lambda job: open_engine("ray", job, None, 2, 2048),
}


def test_an_address_without_a_cluster_is_rejected(job: Job) -> None:
    with pytest.raises(OperatorError, match="expected the address of a Ray cluster"):
        RayCluster(job, f"127.0.0.1:{free_port()}")


@pytest.fixture(scope="module", params=OPEN)
def own(request: pytest.FixtureRequest, job: Job) -> Job:
    """The job in a folder of each engine."""
    return job._replace(out=job.out / request.param)


@pytest.fixture(scope="module")
def engine(own: Job, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """Opened in a folder that has modules with the names of Carry's packages."""
    folder = tmp_path_factory.mktemp("foreign")
    for name in ("models", "service"):
        (folder / f"{name}.py").write_text("raise RuntimeError('of another project')")
    with chdir(folder), closing(OPEN[own.out.name](own)) as opened:
        yield opened
    # Ray waits only for a moment for a process that it kills, and drops it then
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


def test_a_backfill_has_the_same_bytes_on_every_engine(engine: Engine, own: Job, job: Job) -> None:
    here = job._replace(out=job.out / f"{own.out.name}-here")
    run_backfill(here, ThisProcess(here))
    assert run_backfill(own, engine)["events"] == 300
    assert files_of(own.out) == files_of(here.out)
    assert len(files_of(own.out)) == 8


@pytest.mark.usefixtures("engine")
def test_an_engine_leaves_the_log_of_its_process_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("service.backfill").warning("odd")
    [record] = caplog.records
    usual = logging.LogRecord("a", logging.INFO, "a.py", 1, "odd", None, None)
    assert vars(record).keys() - vars(usual).keys() <= {"message"}


def test_lost_processes_cost_their_tasks_only(engine: Engine) -> None:
    assert dict(engine.map(double, range(5), "task")) == {task: 2 * task for task in range(5)}
    assert dict(engine.map(kill_once, range(5), "task")) == {task: 2 * task for task in range(5)}
    assert all(peak > 0 for peak in engine.peaks.values())


def test_a_task_that_fails_or_kills_every_process_is_named(engine: Engine) -> None:
    with pytest.raises(TaskError, match=r"(?s)^task 7: Traceback.*LocalError: no 7"):
        dict(engine.map(fail, [7], "task"))
    with pytest.raises(TaskError, match=r"^task 3: "):
        dict(engine.map(kill_always, range(4), "task"))
