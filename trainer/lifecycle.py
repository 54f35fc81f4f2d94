"""Ends that lose nothing: a signal, a launcher that died, a second run in the same folder, a rank that hangs.

    SIGTERM, SIGINT, SIGHUP, a dead launcher -> StopRequest -> the loop ends between two steps, after a checkpoint

Invariant: a run stops only after a saved checkpoint, and one folder has at most one run at a time.
"""

from __future__ import annotations

import ctypes
import faulthandler
import fcntl
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

import psutil

from schemas.terminal import ignored

WAIT_SECONDS = 120.0  # for an earlier run in the same folder to end
PR_SET_PDEATHSIG = 1


class StopRequest:
    """Request to this rank to end: by SIGTERM, SIGINT or SIGHUP (unless it is ignored, as under nohup), or
    because its launcher died.

    A launcher that is killed leaves its ranks behind. The kernel signals a rank when its parent dies (Linux); who
    started that one is looked up here."""

    def __init__(self) -> None:
        self._signalled = False
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if number != signal.SIGHUP or not ignored(number):
                signal.signal(number, self._on_signal)
        self._launched = "LOCAL_RANK" in os.environ  # set by deepspeed, torchrun and the like
        if self._launched:
            signal_on_parent_death(signal.SIGTERM)
        self._launchers = _launchers()
        self.left_alone = self._launched and _left_alone()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True

    @property
    def requested(self) -> bool:
        # a signal may arrive while the launchers are looked up: what it set is never overwritten
        if self._launched and not self._signalled and _launchers() != self._launchers:
            self._signalled = True
        return self._signalled


def signal_on_parent_death(number: signal.Signals) -> None:
    """Get this signal when the process that started this one ends (Linux; does nothing elsewhere)."""
    if hasattr(ctypes.CDLL(None), "prctl"):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


def _launchers() -> tuple[int, ...]:
    """Process ids of the parents that the run depends on: the one that started this rank and, above DeepSpeed's process
    for this machine, the `deepspeed` command, or the ssh session through which pdsh started it (that outlives pdsh).
    Above torchrun and mpirun is the user's shell, which may end while the run goes on."""
    found: list[int] = []
    with suppress(psutil.Error):
        process: psutil.Process | None = psutil.Process()
        while process is not None and (process := process.parent()) is not None:
            found.append(process.pid)
            if "deepspeed.launcher.launch" not in " ".join(process.cmdline()):
                break
    return tuple(found)


def _left_alone() -> bool:
    """True if the `deepspeed` command or its launcher ended before this rank could look: by a Ctrl-C that was lost on
    the way to the rank, while Python loaded DeepSpeed. Its process group has lost its leader, and the rank or the
    launcher above it is the child of a process of another session, such as init."""
    with suppress(psutil.Error, OSError):
        process = psutil.Process()
        leader, session = os.getpgid(0), os.getsid(0)
        if psutil.pid_exists(leader) and psutil.Process(leader).status() != psutil.STATUS_ZOMBIE:
            return False
        parent = process.parent()
        if parent is not None and "deepspeed.launcher.launch" in " ".join(parent.cmdline()):
            parent = parent.parent()
        return parent is None or os.getsid(parent.pid) != session
    return False


@contextmanager
def exclusive_run(folder: Path, wait_seconds: float = WAIT_SECONDS, stop: StopRequest | None = None) -> Iterator[None]:
    """Lock a run's folder while the block runs, after waiting up to `wait_seconds` for an earlier run to end.

    Raises:
        ValueError: another run still writes there, or `stop` is requested meanwhile.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w", encoding="utf-8") as file:
        deadline, announced = time.monotonic() + wait_seconds, False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    remedy = "wait for it to end, stop it, or give another --run.output"
                    raise ValueError(f"{folder}: another training writes there; {remedy}") from None
            if stop is not None and stop.requested:
                raise ValueError(f"{folder}: stopped while waiting for another training to end")
            if not announced:
                print(f"{folder}: waiting for another training to end", flush=True)
                announced = True
            time.sleep(0.2)
        yield


def restart_watchdog(minutes: float) -> None:
    """End the process, with the stacks of its threads, unless this is called again within `minutes` and a quarter: a
    rank that hangs must not hold its machines for days. One that waits for another rank gives up after `minutes`, with
    a line (`engine.start`). 0 switches the watchdog off."""
    if minutes > 0:
        faulthandler.dump_traceback_later(1.25 * minutes * 60, exit=True)
    else:
        faulthandler.cancel_dump_traceback_later()
