"""Engines: every task gives its result once, whatever becomes of the processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing

import pytest

from models.artifact.artifact import Artifact
from service.backfill.engines import Engine, Processes, RayCluster, TaskError
from service.backfill.plan import Job, Plan
from tests.support.backfill import double, fail, kill_always, kill_once, small_artifact


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return small_artifact(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture(scope="module")
def job(artifact: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Job:
    plan = Plan(
        model="small",
        fingerprint=artifact.fingerprint.hex(),
        sources=(),
        stream="stream",
        order=None,
        partitions=1,
        buckets=1,
    )
    return Job(plan, tmp_path_factory.mktemp("out"), artifact.spec, dict(artifact.weights))


OPEN: dict[str, Callable[[Job], Engine]] = {
    "processes": lambda job: Processes(job, 2),
    "ray": lambda job: RayCluster(job, cpus=2),
}


@pytest.fixture(scope="module", params=OPEN)
def engine(request: pytest.FixtureRequest, job: Job) -> Iterator[Engine]:
    with closing(OPEN[request.param](job._replace(out=job.out / request.param))) as opened:
        (job.out / request.param).mkdir()
        yield opened


def test_lost_processes_cost_their_tasks_only(engine: Engine) -> None:
    assert dict(engine.map(double, range(5), "task")) == {task: 2 * task for task in range(5)}
    assert dict(engine.map(kill_once, range(5), "task")) == {task: 2 * task for task in range(5)}
    assert all(peak > 0 for peak in engine.peaks.values())


def test_a_task_that_fails_or_kills_every_process_is_named(engine: Engine) -> None:
    with pytest.raises(TaskError, match=r"(?s)^task 7: Traceback.*LocalError: no 7"):
        dict(engine.map(fail, [7], "task"))
    with pytest.raises(TaskError, match=r"^task 3: "):
        dict(engine.map(kill_always, range(4), "task"))
