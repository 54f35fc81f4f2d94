"""Runs the jobs of a comparison, in this process or in several.

    parent: job number ──pipe──▶ worker: ComparisonRunner.run
    parent ◀──pipe── (number, line of progress) ... (number, JobResult)

Each worker has a pipe of its own and shares no lock, so a worker that dies or is killed at any moment leaves nobody
waiting. Ctrl-C and its like make a file descriptor readable while workers run: they interrupt no code at an arbitrary
line.

Invariant: every job gives one JobResult, and no worker outlives the parent.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context, parent_process, resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any

from eval.jobs import Job
from eval.options import Options
from eval.runner import ComparisonRunner, JobResult, ProgressCallback
from schemas.terminal import ENDING

SECONDS_TO_END = 5.0

MessageCallback = Callable[[int, str], None]
"""Called with a job's number and a line on what it is doing."""


def run_job(runner: ComparisonRunner, job: Job, progress: ProgressCallback) -> JobResult:
    """The result of a job. Whatever it raises becomes rows that say why, so that the other jobs go on."""
    try:
        return runner.run(job, progress)
    except Exception as error:  # a simulator may raise anything
        plain = isinstance(error, RuntimeError | ArithmeticError | ValueError | OSError) and str(error)
        reason = str(error) if plain else f"{type(error).__name__}: {error}"
        return JobResult(runner.failure(job, reason), reason, reason)


def run_jobs(
    runner: ComparisonRunner, processes: int, message: MessageCallback
) -> Generator[tuple[int, JobResult], None, None]:
    """Every job's number and result, as soon as it is ready.

    Raises:
        ChildProcessError: a worker was killed, or could not start.
        KeyboardInterrupt: Ctrl-C, SIGTERM or SIGHUP; what was finished is on disk.
    """
    if processes == 1:
        for number, job in enumerate(runner.jobs):
            yield number, run_job(runner, job, partial(message, number))
        return
    with _interrupts() as interrupted, _workers(runner.options, processes) as workers:
        waiting = iter(range(len(runner.jobs)))
        busy = [worker for worker in workers if _next_job(worker, waiting)]
        while busy:
            readable = wait([interrupted, *busy])
            if interrupted in readable:  # before a worker's end, which the same signal may have caused
                raise KeyboardInterrupt(os.read(interrupted, 1)[0])
            for ready in readable:
                assert isinstance(ready, Connection)
                number, outcome = _receive(ready)
                if isinstance(outcome, str):
                    message(number, outcome)
                    continue
                if not _next_job(ready, waiting):
                    busy.remove(ready)
                yield number, outcome


def _next_job(worker: Connection, waiting: Iterator[int]) -> bool:
    """Give a worker its next job; without one, close its pipe, at which it ends."""
    number = next(waiting, None)
    if number is None:
        worker.close()
        return False
    try:
        worker.send(number)
    except OSError:
        raise _killed() from None
    return True


def _receive(worker: Connection) -> tuple[int, str | JobResult]:
    try:
        number, outcome = worker.recv()
    except (EOFError, OSError):
        raise _killed() from None
    if number < 0:
        raise ChildProcessError(f"a process of the comparison could not start: {outcome}")
    return number, outcome


def _killed() -> ChildProcessError:
    remedy = "the same command keeps what was played; give fewer --processes if memory is short"
    return ChildProcessError(f"a process of the comparison was killed; {remedy}")


@contextmanager
def _interrupts() -> Iterator[int]:
    """A file descriptor that a signal which would raise KeyboardInterrupt makes readable instead, by a byte with its
    number. Outside the main thread, and for an ignored signal, nothing does."""
    readable, writable = os.pipe()
    os.set_blocking(writable, False)
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, *ENDING):
            if callable(signal.getsignal(number)):
                before[number] = signal.signal(number, lambda received, _: os.write(writable, bytes([received])))
    try:
        yield readable
    finally:
        for caught, handler in before.items():
            signal.signal(caught, handler)
        os.close(readable)
        os.close(writable)


@contextmanager
def _workers(options: Options, count: int) -> Iterator[list[Connection]]:
    """The parent's ends of the pipes to `count` workers, which are gone afterwards."""
    context = get_context("spawn")
    processes, connections = [], []
    resource_tracker.ensure_running()  # its own start would unblock SIGINT
    try:
        for _ in range(count):
            parents, childs = context.Pipe()
            process = context.Process(target=_work, args=(options, childs))
            # a terminal's signals reach children too; they inherit that these are blocked and leave them to the parent
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
            try:
                process.start()
                processes.append(process)
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            childs.close()
            connections.append(parents)
        yield connections
    finally:
        for connection in connections:
            connection.close()
        for process in processes:
            process.terminate()
        for process in processes:
            process.join(SECONDS_TO_END)
            if process.is_alive():
                process.kill()
                process.join()


def _work(options: Options, connection: Connection) -> None:
    """A worker: runs the jobs whose numbers arrive until the pipe closes, and ends when its parent does."""
    parent = parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    try:
        runner = ComparisonRunner(options)
    except Exception as error:
        connection.send((-1, f"{error}"))
        return
    while True:
        try:
            number = connection.recv()
        except EOFError:
            return
        connection.send((number, run_job(runner, runner.jobs[number], partial(_send_line, connection, number))))


def _send_line(connection: Connection, number: int, text: str) -> None:
    connection.send((number, text))
