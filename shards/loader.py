"""This rank's batches in order, assembled ahead of the trainer by threads of its own process.

    Stream (pure function of i) -> threads fill a ring of reused buffers -> next(): the micro-batches of one step

No worker processes and no queues of copies: a thread writes a micro-batch where the trainer reads it. Assembly is
copying, which lets other threads run. Where a dataset is remote, one more thread brings its shards into the cache.

Invariant: global batch n holds sequences [n G, (n + 1) G); a rank takes a contiguous slice of it, so the same global
batch is seen at any world size, any number of threads and after any restart.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from schemas.dataset import DatasetError
from schemas.layout import TEXT
from schemas.metrics import NAMED_TASKS
from shards.assembly import Plan
from shards.batch import Batch, BufferPool
from shards.stream import Stream

PLANNED = 2048  # sequences that are planned together
AHEAD = 4  # steps whose remote shards are fetched before they are needed


class Loader(Iterator[list[Batch]]):
    """Endless steps from sequence `start` on: this rank's micro-batches of each global batch. Buffers are reused: a
    batch is valid until the next call. After an error the same step is tried again. `threads` 0: all work is done
    inside `next`. ValueError for a global batch that ranks and micro-batches do not divide. `pinned`: see
    `BufferPool`."""

    def __init__(
        self,
        stream: Stream,
        start: int,
        global_batch: int,
        micro_batch: int,
        rank: int = 0,
        world: int = 1,
        threads: int = 1,
        pinned: bool = False,
    ):
        for name, value, least in (
            ("start", start, 0),
            ("global batch", global_batch, 1),
            ("micro-batch", micro_batch, 1),
            ("world size", world, 1),
            ("rank", rank, 0),
            ("threads", threads, 0),
        ):
            if value < least:
                raise ValueError(f"{name} {value}: must be {least} or more")
        if rank >= world:
            raise ValueError(f"rank {rank}: must be less than the world size {world}")
        if global_batch % (world * micro_batch):
            raise ValueError(
                f"global batch {global_batch} is not a multiple of world size {world} x micro-batch {micro_batch}"
            )
        self.stream, self.start, self.global_batch, self.micro_batch = stream, start, global_batch, micro_batch
        self.rank, self.share = rank, global_batch // world
        self.parts = self.share // micro_batch
        ahead = max(self.parts, threads) if threads else 0
        self._free = [BufferPool(pinned) for _ in range(self.parts + ahead)]
        self._held: list[BufferPool] = []
        self._pending: deque[tuple[BufferPool, Future[tuple[Batch, int]]]] = deque()
        self._pool = ThreadPoolExecutor(threads, "stream") if threads else None
        self._asked = self.step = self.redrawn = 0  # micro-batches asked for; steps given, their redrawn sequences
        self._together = max(1, PLANNED // micro_batch)
        self._plans: dict[int, Plan] = {}
        self._planning = threading.Lock()
        self._waited, self._since, self._tokens, self._padding = 0.0, time.monotonic(), 0, 0
        with_text = [t for t in stream.timelines if t.layout.text and (t.layout.action or t.layout.captioned)]
        self._paddings = sorted({timeline.padding for timeline in with_text if timeline.padding >= 0})
        self._remote = any(dataset.place.local is None for dataset in stream.datasets)
        self._closed = threading.Event()
        if self._remote:
            threading.Thread(target=self._prefetch, name="prefetch", daemon=True).start()

    def __next__(self) -> list[Batch]:
        begun = time.monotonic()
        self._free += self._held
        self._held = []
        self._ask()
        try:
            parts = [self._give() for _ in range(self.parts)]
        except BaseException:
            self._start_over()
            raise
        batches = [batch for batch, _ in parts]
        self.step += 1
        self.redrawn += sum(redrawn for _, redrawn in parts)
        self._waited += time.monotonic() - begun
        for batch in batches:
            self._tokens += batch.tokens.size
            self._padding += self._padded(batch)
        return batches

    def _give(self) -> tuple[Batch, int]:
        if self._pool is None:
            self._held.append(self._free.pop())
            return self._part(self._next(), self._held[-1])
        buffers, future = self._pending.popleft()
        self._held.append(buffers)
        return future.result()

    def _start_over(self) -> None:
        """After an error: the next call tries the same step again."""
        for buffers, future in self._pending:
            if not future.cancel():
                future.exception()
            self._free.append(buffers)
        self._pending.clear()
        self._free += self._held
        self._held = []
        self._asked = self.step * self.parts

    def _ask(self) -> None:
        while self._pool is not None and self._free:
            buffers = self._free.pop()
            self._pending.append((buffers, self._pool.submit(self._part, self._next(), buffers)))

    def _next(self) -> int:
        self._asked += 1
        return self._asked - 1

    def _part(self, number: int, buffers: BufferPool) -> tuple[Batch, int]:
        """Micro-batch `number` of this rank, and how many of its sequences were drawn again."""
        plan, first = self._planned(number)
        begin = (number - first) * self.micro_batch
        return self.stream.fill(plan, begin, begin + self.micro_batch, buffers)

    def _planned(self, number: int) -> tuple[Plan, int]:
        """The plan that holds a micro-batch, and the first micro-batch of that plan. Many are planned together, which
        costs little more than one; the very first alone, so that it is there at once."""
        group = -(-number // self._together)
        first = max(0, (group - 1) * self._together + 1)
        with self._planning:
            if group not in self._plans:
                for old in [g for g in self._plans if g < group - 1]:
                    del self._plans[old]
                numbers = np.arange(first, group * self._together + 1)
                step, part = np.divmod(numbers, self.parts)
                starts = self.start + step * self.global_batch + self.rank * self.share + part * self.micro_batch
                self._plans[group] = self.stream.plan((starts[:, None] + np.arange(self.micro_batch)).reshape(-1))
            return self._plans[group], first

    def _prefetch(self) -> None:
        """Shards of this rank's sequences, some steps before they are assembled. An error is left to the assembly,
        which meets it again and tells the trainer."""
        done = 0
        while not self._closed.wait(0.05 if done > self.step + AHEAD else 0):
            if done <= self.step + AHEAD:
                try:
                    self.stream.prefetch(self.start + done * self.global_batch + self.rank * self.share, self.share)
                except (DatasetError, OSError):
                    self._closed.wait(1.0)
                done += 1

    def _padded(self, batch: Batch) -> int:
        """Tokens that fill a text up to its length."""
        if not self._paddings:
            return 0
        return int(np.isin(batch.tokens[batch.roles == TEXT], self._paddings).sum())

    def metrics(self) -> dict[str, float]:
        """Since the last call: the share of the time that the trainer waited, of tokens that are padding. Since
        sequence 0: sequences and epochs of each task (of each domain, where tasks are many), of all ranks. Since this
        process began: the cache's counts."""
        now = time.monotonic()
        stream, counts = self.stream, self.stream.store.cache.counts
        seen = stream.sampler.seen(self.start + self.step * self.global_batch)
        metrics = {
            "data/wait_share": self._waited / max(1e-9, now - self._since),
            "data/padding_share": self._padding / max(1, self._tokens),
        }
        many, totals = len(stream.tasks) > NAMED_TASKS, dict[str, tuple[int, int]]()
        for timeline, count in zip(stream.timelines, seen.tolist()):
            name = timeline.spec.domain if many else timeline.name
            sequences, windows = totals.get(name, (0, 0))
            totals[name] = sequences + count, windows + timeline.windows
        for name, (sequences, windows) in totals.items():
            metrics |= {f"data/sequences/{name}": sequences, f"data/epochs/{name}": sequences / windows}
        if self._remote:
            metrics |= {f"cache/{name}": value for name, value in vars(counts).items()}
        if bad := sum(len(dataset.bad) for dataset in stream.datasets):
            metrics |= {"data/bad_shards": bad, "data/redrawn_sequences": self.redrawn}
        self._waited, self._since, self._tokens, self._padding = 0.0, now, 0, 0
        return metrics

    def close(self) -> None:
        """Stop the threads."""
        self._closed.set()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
