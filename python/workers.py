"""Runs tasks side by side in worker processes that stop cleanly: on Ctrl-C, when one fails, and when the parent is
killed.

``run_all`` starts the workers once (importing torch takes seconds) and hands each the next task when it is free.
Parent and worker share one pipe and nothing else: no lock that a killed process could keep. The worker sends progress
and the result; the parent sends tasks and the wish to stop, for which the task asks through its ``Link``. A pipe that
closes means that the other side is gone.
"""

from __future__ import annotations

import multiprocessing
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

GRACE_SECONDS = 20.0
"""How long workers may take to write a last checkpoint when asked to stop."""


class UserError(Exception):
    """A failure whose message says all: a wrong setting, a missing package. Shown without a traceback."""


class Stopped(Exception):  # noqa: N818
    """A task ended early because it was asked to."""


class WorkerFailed(Exception):  # noqa: N818
    """A task failed or its process died; ``details`` is the traceback, where it helps."""

    def __init__(self, task: int, message: str, details: str = "") -> None:
        super().__init__(message)
        self.task = task
        self.details = details


class Link:
    """A task's side of the pipe."""

    def __init__(self, connection: Connection, seconds_between_reports: float = 0.1) -> None:
        self._connection = connection
        self._pause = seconds_between_reports
        self._last = 0.0

    def report(self, progress: Any) -> None:
        """Sends progress to the parent, at most ten times a second."""
        if time.monotonic() - self._last >= self._pause:
            self._last = time.monotonic()
            self._connection.send(("progress", progress))

    def stop_requested(self) -> bool:
        """Whether the parent asked to stop, or is gone: anything that arrives while a task runs means that."""
        return self._connection.poll()


Work = Callable[[Any, Link], Any]


def _serve(connection: Connection, work: Work) -> None:
    """The life of a worker: task after task, until ``None`` comes or the parent is gone."""
    try:
        while (task := connection.recv()) is not None:
            answer: tuple[Any, ...]
            try:
                answer = ("done", work(task, Link(connection)))
            except Stopped:
                return
            except UserError as error:
                answer = ("failed", str(error), "")
            except Exception as error:
                answer = ("failed", f"{type(error).__name__}: {error}", traceback.format_exc())
            connection.send(answer)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection
    task: int | None = None


def run_all(
    tasks: Sequence[Any], work: Work, num_workers: int, on_event: Callable[[str, int, Any], None] = lambda *event: None
) -> list[Any]:
    """Runs ``work(task, link)`` for every task in up to ``num_workers`` processes.

    Args:
        tasks: what ``work`` gets; anything that pickles.
        work: a function of a module (workers import it). It calls ``link.report(...)`` as it likes, and, where
            ``link.stop_requested()``, puts its work in a safe place and raises ``Stopped``.
        num_workers: processes side by side.
        on_event: called here as ``on_event(kind, task_index, payload)`` with kinds ``"started"``, ``"progress"`` and
            ``"done"``, and ``"stopping"`` (of no task) when what follows is only waiting for the workers to save and
            end.

    Returns:
        The results, in the order of the tasks.

    Raises:
        WorkerFailed: a task raised or its process died. The others have been asked to stop, and have stopped.
    """
    context = multiprocessing.get_context("spawn")
    results: dict[int, Any] = {}
    waiting = list(range(len(tasks)))
    workers: list[_Worker] = []
    try:
        for _ in range(min(num_workers, len(tasks))):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, work), daemon=True)
            with _stop_signals_ignored():
                process.start()
            theirs.close()
            workers.append(_Worker(process, ours))
        for worker in workers:
            _hand_out(worker, waiting, tasks, on_event)
        while len(results) < len(tasks):
            ready = wait([worker.connection for worker in workers if worker.task is not None])
            for worker in workers:
                if worker.connection in ready and worker.task is not None:
                    kind, *payload = _receive(worker)
                    if kind == "failed":
                        failed, worker.task = worker.task, None
                        raise WorkerFailed(failed, *payload)
                    on_event(kind, worker.task, payload[0])
                    if kind == "done":
                        results[worker.task] = payload[0]
                        _hand_out(worker, waiting, tasks, on_event)
        return [results[index] for index in range(len(tasks))]
    except BaseException:
        on_event("stopping", -1, None)
        raise
    finally:
        _stop(workers)


@contextmanager
def _stop_signals_ignored() -> Iterator[None]:
    """Processes started inside never see Ctrl-C, which reaches the whole group, nor a scheduler's SIGTERM to all of
    it: the parent decides what follows.

    Ignoring is inherited, so it holds before a worker's first line. (A blocked signal mask would be too, but
    ``multiprocessing`` undoes it.) What arrives in these milliseconds is lost.
    """
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _hand_out(
    worker: _Worker, waiting: list[int], tasks: Sequence[Any], on_event: Callable[[str, int, Any], None]
) -> None:
    worker.task = waiting.pop(0) if waiting else None
    if worker.task is not None:
        on_event("started", worker.task, None)
        try:
            worker.connection.send(tasks[worker.task])
        except (BrokenPipeError, ConnectionResetError):
            pass  # it died before it had anything to do; receiving says so


def _receive(worker: _Worker) -> tuple[Any, ...]:
    assert worker.task is not None
    try:
        message: tuple[Any, ...] = worker.connection.recv()
        return message
    except (EOFError, ConnectionResetError):
        worker.process.join()
        code = worker.process.exitcode or 0
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        hint = "; is the machine out of memory?" if code == -signal.SIGKILL else ""
        raise WorkerFailed(worker.task, f"the worker process was {how}{hint}") from None


def _stop(workers: list[_Worker]) -> None:
    """Lets every worker finish the step it is in, then ends whatever is still there."""
    for worker in workers:
        try:
            worker.connection.send(None)
        except (BrokenPipeError, ConnectionResetError):
            pass
    deadline = time.monotonic() + GRACE_SECONDS
    try:
        for worker in workers:
            while worker.process.is_alive() and time.monotonic() < deadline:
                # Reading on: a worker that fills its pipe with progress would wait for ever.
                ready = wait([worker.process.sentinel, worker.connection], timeout=deadline - time.monotonic())
                if worker.connection in ready:
                    try:
                        worker.connection.recv()
                    except (EOFError, ConnectionResetError):
                        worker.process.join(max(0.0, deadline - time.monotonic()))
    finally:
        for worker in workers:
            if worker.process.is_alive():
                worker.process.kill()
            worker.process.join()
            worker.connection.close()
