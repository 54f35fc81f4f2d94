"""Heartbeats, so that a worker that was killed ends a build instead of hanging it.

worker: one heartbeat file per shard, touched every second while the shard is being written
driver: a worker is lost when no heartbeat at all is seen for most of a minute, or when one on this machine stops

Beam's local runners wait forever for a worker that was killed. Runners of clusters notice one by themselves, and
where the driver sees no heartbeat at all (the workers are on other machines), it waits without a limit.

Invariant: a worker that lives is never taken for dead, however slow its shard is, and whatever the clocks say.
"""

from __future__ import annotations

import hashlib
import tempfile
import threading
import time
from pathlib import Path

from shards.folder import Folder

BEAT_SECONDS = 1.0
PATIENCE_SECONDS = 20.0  # a heartbeat older than this has stopped; a loaded machine delays one by a few seconds
LOOK_SECONDS = 5.0  # the most that one look counts for
SILENCE_SECONDS = 45.0  # between one shard and the next, or before the first one


class WorkerLost(RuntimeError):
    """A worker died, and its runner did not notice."""


def _place(folder: Folder) -> Path:
    if folder.local is not None:
        return folder.local / ".build"
    return Path(tempfile.gettempdir()) / f"gato-build-{hashlib.sha256(str(folder).encode()).hexdigest()[:16]}"


class Heartbeat:
    """While the block runs, a thread touches the shard's heartbeat file."""

    def __init__(self, folder: Folder, name: str):
        self.path = _place(folder) / f"{name}.alive"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._beat, daemon=True)

    def _beat(self) -> None:
        while not self.stop.wait(BEAT_SECONDS):
            self.path.touch()

    def __enter__(self) -> None:
        self.path.touch()
        self.thread.start()

    def __exit__(self, *exception: object) -> None:
        self.stop.set()
        self.thread.join()
        self.path.unlink(missing_ok=True)


class Watch:
    """The driver's side. `local`: the workers are on this machine, so their silence means something."""

    def __init__(self, folder: Folder, local: bool):
        self.place, self.local = _place(folder), local
        self.place.mkdir(parents=True, exist_ok=True)
        for path in self.place.glob("*.alive"):  # of an earlier build that was killed
            path.unlink(missing_ok=True)
        self.beats: dict[Path, tuple[int, float]] = {}  # mtime of each heartbeat, and when that was new
        self.watched, self.looked = 0.0, time.monotonic()
        self.heard, self.seen = 0.0, False
        self.finished: int | None = None

    def check(self, finished: int) -> None:
        """Look once; `finished` is the number of shards that are done. WorkerLost says what is missing."""
        # A build that was stopped (Ctrl-Z, a laptop asleep) has not watched, and files' times may be of another clock.
        now = time.monotonic()
        self.watched, self.looked = self.watched + min(now - self.looked, LOOK_SECONDS), now
        beats = {}
        for path in self.place.glob("*.alive"):
            try:
                time_ns = path.stat().st_mtime_ns
            except FileNotFoundError:
                continue  # its shard was finished this moment
            before = self.beats.get(path)
            beats[path] = before if before and before[0] == time_ns else (time_ns, self.watched)
            silent = self.watched - beats[path][1]
            if silent <= PATIENCE_SECONDS:
                self.heard, self.seen = self.watched, True
            elif self.local:  # else the runner gives the shard to another worker; silence of all is a loss
                raise WorkerLost(f"the worker that wrote {path.stem} gave no sign of life for {silent:.0f} s")
        self.beats = beats
        if self.finished is not None and finished != self.finished:
            self.heard, self.seen = self.watched, True
        self.finished = finished
        if (self.local or self.seen) and self.watched - self.heard > SILENCE_SECONDS:
            raise WorkerLost(f"no worker gave a sign of life for {SILENCE_SECONDS:.0f} s")
