"""Ends that lose nothing: a signal, a launcher that died, a second run of the same folder, a rank that hangs.

Invariant: a run stops between two steps, behind a checkpoint, and one folder has one run.
"""

from __future__ import annotations

import ctypes
import faulthandler
import fcntl
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import psutil

PATIENCE_SECONDS = 120.0  # for the last run of a folder to end
PR_SET_PDEATHSIG = 1


class Stop:
    """Whether this rank was asked to end: by SIGTERM, by SIGINT, or by the death of what launched it.

    A launcher that is killed leaves its ranks behind. The kernel tells a rank of its parent's death (Linux); the
    parent's own parent, the `deepspeed` command, is looked at here."""

    def __init__(self) -> None:
        self._signalled = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)
        self._launched = "LOCAL_RANK" in os.environ  # set by deepspeed, torchrun and the like
        if self._launched:
            hear_of_parents_death(signal.SIGTERM)
        self._parents = _parents()

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True

    @property
    def asked(self) -> bool:
        if self._launched and not self._signalled:
            self._signalled = _parents() != self._parents
        return self._signalled


def hear_of_parents_death(number: signal.Signals) -> None:
    """Get this signal when the process that started this one ends (Linux; nothing happens elsewhere)."""
    if hasattr(ctypes.CDLL(None), "prctl"):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


def _parents() -> tuple[int, int]:
    parent = os.getppid()
    try:
        return parent, psutil.Process(parent).ppid()
    except psutil.Error:
        return parent, 0


@contextmanager
def only_run(folder: Path, patience: float = PATIENCE_SECONDS) -> Iterator[None]:
    """Hold a run's folder. One that is ending is waited for; ValueError where another goes on."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        deadline, told = time.monotonic() + patience, False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    remedy = "wait for its end, end it, or give another --run.output"
                    raise ValueError(f"{folder}: another training writes there; {remedy}") from None
            if not told:
                print(f"{folder}: waiting for another training to end", flush=True)
                told = True
            time.sleep(0.2)
        yield


def expect_sign_of_life(minutes: float) -> None:
    """End the process with the stacks of its threads unless this is called again in time: a rank that hangs, or waits
    for one that does, must not hold its machines for days. 0: never."""
    if minutes > 0:
        faulthandler.dump_traceback_later(minutes * 60, exit=True)
    else:
        faulthandler.cancel_dump_traceback_later()
