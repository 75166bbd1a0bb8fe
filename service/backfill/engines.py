"""Engines: what runs the tasks of a backfill, on the cores of one machine or on a Ray cluster.

An engine runs a function over tasks and yields each result as it comes. It keeps few tasks in
flight. A process that ends before its task does costs this task only: another one computes it
again, and after `ATTEMPTS` of them the run ends with an error that names the task. An error of the
function ends the run.

The processes are started, not forked: Polars and ONNX Runtime have threads. Each computes with one
thread. Loads Polars nowhere, so that the variables of a process are set before Polars is loaded.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import platform
import shutil
import signal
import socket
import tempfile
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import chdir, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import connection, resource_tracker
from multiprocessing.process import BaseProcess, parent_process
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

from models.errors import ModelsError
from service.core.errors import CarryError, OperatorError

if TYPE_CHECKING:
    from service.backfill.plan import Job

ATTEMPTS = 3
ONE_THREAD = {"POLARS_MAX_THREADS": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
IN_FLIGHT_PER_CPU = 2
"""Tasks of a cluster that are submitted at once, so that its CPUs never wait for the next."""
SIGNALS = (signal.SIGINT, signal.SIGTERM)
"""That end a backfill."""
ADDRESS_TIMEOUT_S = 10
OBJECT_STORE_BYTES = 128 * 2**20
"""Memory that a Ray of this machine shares between processes: results are small, and the job is put
there once."""

Task = TypeVar("Task")
Result = TypeVar("Result")
Function = Callable[["Job", Task], Result]


class Outcome(NamedTuple):
    """Of one task: its result, or the error; and the process that ran it.

    Attributes:
        error: one line, or the traceback of an unexpected error; empty if there is none.
        is_expected: whether it is one line, which needs no name of the task.
        peak_bytes: the most memory that the process has had.
    """

    result: Any
    error: str
    is_expected: bool
    process: str
    peak_bytes: int


class Engine(Protocol):
    """Runs tasks.

    Attributes:
        peaks: the most memory of each process so far, in bytes.
    """

    peaks: dict[str, int]

    def map(
        self, function: Function[Task, Result], tasks: Sequence[Task], what: str
    ) -> Iterator[tuple[Task, Result]]:
        """Run a function over tasks, started in their order; yields each as it is done.

        Args:
            function: of a module, with a result that can be pickled; a repetition does no harm.
            what: what a task is, for errors.

        Raises:
            OperatorError: a task failed; it is named.
        """

    def close(self) -> None:
        """End the processes, whatever they do."""


class TaskError(OperatorError):
    """A task that failed; the message names it."""


def run_task(function: Function[Any, Any], job: Job, task: Any) -> Outcome:
    """Run one task in this process."""
    result, error, is_expected = None, "", False
    try:
        result = function(job, task)
    except (CarryError, ModelsError, OperatorError, OSError, ModuleNotFoundError) as expected:
        error, is_expected = str(expected), True
    except Exception:
        error = traceback.format_exc()
    ((process, peak_bytes),) = peak_memory().items()
    return Outcome(result, error, is_expected, process, peak_bytes)


def peak_memory() -> dict[str, int]:
    """The most memory that this process has had, in bytes, by its name."""
    return {f"{platform.node()} {os.getpid()}": _peak_bytes()}


def _peak_bytes() -> int:
    import resource

    try:
        with open("/proc/self/status") as status:
            for line in status:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def unpack_outcome(task: str, outcome: Outcome, peaks: dict[str, int]) -> Any:
    """The result of an outcome.

    Raises:
        TaskError: it failed.
    """
    peaks[outcome.process] = max(outcome.peak_bytes, peaks.get(outcome.process, 0))
    if outcome.error:
        raise TaskError(outcome.error if outcome.is_expected else f"{task}: {outcome.error}")
    return outcome.result


class ThisProcess:
    """Runs tasks in this process, one after the other: for few events."""

    def __init__(self, job: Job):
        self._job = job
        self.peaks: dict[str, int] = {}

    def map(
        self, function: Function[Task, Result], tasks: Sequence[Task], what: str
    ) -> Iterator[tuple[Task, Result]]:
        """Run a function over tasks, as `Engine` says."""
        for task in tasks:
            outcome = run_task(function, self._job, task)
            yield task, unpack_outcome(f"{what} {task}", outcome, self.peaks)

    def close(self) -> None:
        """Do nothing: there are no other processes."""


@dataclass(frozen=True, slots=True, eq=False)
class _Worker:
    process: BaseProcess
    pipe: connection.Connection


class Processes:
    """Processes of this machine.

    Args:
        job: sent to each process.
        count: number of processes.
    """

    def __init__(self, job: Job, count: int):
        self._job, self._count = job, count
        self._workers: list[_Worker] = []
        self.peaks: dict[str, int] = {}

    def map(
        self, function: Function[Task, Result], tasks: Sequence[Task], what: str
    ) -> Iterator[tuple[Task, Result]]:
        """Run a function over tasks, as `Engine` says."""
        waiting = list(reversed(tasks))
        losses: Counter[int] = Counter()
        busy: dict[_Worker, Task] = {}
        try:
            while waiting or busy:
                while waiting and len(busy) < self._count:
                    worker, task = self._find_idle_worker(busy), waiting.pop()
                    busy[worker] = task
                    self._send(worker, (function, task))
                ready = connection.wait([worker.pipe for worker in busy])
                for worker in [each for each in busy if each.pipe in ready]:
                    task = busy.pop(worker)
                    try:
                        outcome = worker.pipe.recv()
                    except (EOFError, OSError):
                        self._remove(worker)
                        losses[id(task)] += 1
                        if losses[id(task)] == ATTEMPTS:
                            raise TaskError(
                                f"{what} {task}: its process ended {ATTEMPTS} times, the last time "
                                f"with {_describe_exit(worker.process)}"
                            ) from None
                        waiting.append(task)
                    else:
                        yield task, unpack_outcome(f"{what} {task}", outcome, self.peaks)
        finally:
            for worker in busy:
                self._remove(worker)

    def close(self) -> None:
        """End the processes, whatever they do."""
        for worker in list(self._workers):
            self._remove(worker)

    def _find_idle_worker(self, busy: Collection[_Worker]) -> _Worker:
        for worker in self._workers:
            if worker not in busy:
                return worker
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs,), daemon=True)
        with _setting_environment(ONE_THREAD), _blocking_signals():
            process.start()
            self._workers.append(_Worker(process, ours))
        theirs.close()
        # not an argument: its start would wait, with blocked signals, until it is read
        self._send(self._workers[-1], self._job)
        return self._workers[-1]

    def _send(self, worker: _Worker, message: object) -> None:
        """Send to a process; its loss is noticed when its result is waited for."""
        with suppress(OSError):
            worker.pipe.send(message)

    def _remove(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        worker.process.kill()
        worker.process.join()
        worker.pipe.close()


@contextmanager
def _blocking_signals() -> Iterator[None]:
    """Block SIGINT and SIGTERM: processes that are started meanwhile inherit it, and have all that
    is sent to them once signals arrive again.

    Handlers run then, too: of a signal that another thread receives, Python would run the handler
    in the main thread, although that blocks the signal.
    """
    # its start would unblock them on Python 3.11
    resource_tracker.ensure_running()
    handlers: dict[signal.Signals, Callable[..., object]] = {}
    received: list[int] = []
    if threading.current_thread() is threading.main_thread():
        found = {number: signal.getsignal(number) for number in SIGNALS}
        handlers = {number: each for number, each in found.items() if callable(each)}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        for number in handlers:
            signal.signal(number, lambda number, _: received.append(number))
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for each in received:
            signal.raise_signal(each)


@contextmanager
def _setting_environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set variables of the environment for processes that are started meanwhile."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _work(pipe: connection.Connection) -> None:
    """Run tasks of a job until the pipe is closed, or the process that started this one has ended.

    Receives the job first, then each task with its function.
    """
    # SIGINT stays blocked: the terminal sends it to all; the parent decides
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with suppress(EOFError):
        job = pipe.recv()
        while True:
            function, task = pipe.recv()
            pipe.send(run_task(function, job, task))


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _describe_exit(process: BaseProcess) -> str:
    code = process.exitcode or 0
    if code >= 0:
        return f"status {code}"
    hint = ", perhaps by lack of memory" if code == -signal.SIGKILL else ""
    return f"{signal.Signals(-code).name}{hint}"


def _check_address(address: str) -> None:
    """Reject an address at which nobody answers; Ray itself would try for many minutes.

    Raises:
        OperatorError
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        return  # `auto`, or another form that Ray knows
    try:
        socket.create_connection((host.strip("[]"), int(port)), ADDRESS_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        raise OperatorError(
            f"{address}: expected the address of a Ray cluster, such as ray://head:10001, got "
            f"{error}"
        ) from error


class RayCluster:
    """A Ray cluster, or one of this machine.

    Ray computes the tasks of a lost process or node again.

    Args:
        address: of the cluster; None for that of RAY_ADDRESS, or else one of this machine.
        cpus: of one of this machine; None for all.
    """

    def __init__(self, job: Job, address: str | None = None, cpus: int | None = None):
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        make_record = logging.getLogRecordFactory()
        import ray

        # Ray's adds a field to every record of the process, and its levels are set here
        logging.setLogRecordFactory(make_record)
        logging.getLogger("ray").setLevel(logging.ERROR)
        self._ray = ray
        address = address or os.environ.get("RAY_ADDRESS")
        if address:
            _check_address(address)
        local: dict[str, Any] = {}
        self._folder = None
        if not address:
            self._folder = tempfile.mkdtemp(prefix="carry-ray-")
            weights_bytes = sum(each.nbytes for each in job.weights.values())
            local = {
                "num_cpus": cpus,
                "include_dashboard": False,
                "object_store_memory": OBJECT_STORE_BYTES + 4 * weights_bytes,
                "_temp_dir": self._folder,
            }
        # Ray's processes look for modules in the working directory first: in that of Carry's
        # packages, not in one that may have other packages of these names
        with chdir(Path(__file__).parents[2]):
            ray.init(
                address,
                log_to_driver=False,
                configure_logging=False,
                runtime_env={
                    "env_vars": ONE_THREAD,
                    # tasks name their functions as of the package `service`
                    "worker_process_setup_hook": "carry.own_packages.load_own_packages",
                },
                **local,
            )
        self._job = ray.put(job)
        self._run = ray.remote(max_retries=ATTEMPTS - 1, num_cpus=1)(run_task)
        self.peaks: dict[str, int] = {}

    def map(
        self, function: Function[Task, Result], tasks: Sequence[Task], what: str
    ) -> Iterator[tuple[Task, Result]]:
        """Run a function over tasks, as `Engine` says."""
        waiting = list(reversed(tasks))
        in_flight: dict[Any, Task] = {}
        try:
            while waiting or in_flight:
                while waiting and len(in_flight) < IN_FLIGHT_PER_CPU * self._count_cpus():
                    task = waiting.pop()
                    in_flight[self._run.remote(function, self._job, task)] = task
                (ready, *_), _ = self._ray.wait(list(in_flight))
                task = in_flight.pop(ready)
                try:
                    outcome = self._ray.get(ready)
                except self._ray.exceptions.RayError as error:
                    raise TaskError(f"{what} {task}: {error}") from error
                yield task, unpack_outcome(f"{what} {task}", outcome, self.peaks)
        finally:
            for running in in_flight:
                self._ray.cancel(running, force=True)

    def _count_cpus(self) -> int:
        """The CPUs of the cluster, which may grow and shrink."""
        resources: dict[str, float] = self._ray.cluster_resources()  # type: ignore[no-untyped-call]
        return max(1, int(resources.get("CPU", 1)))

    def close(self) -> None:
        """Cancel what runs, and leave the cluster."""
        self._ray.shutdown()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
