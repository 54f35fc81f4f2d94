"""Frames of a video by their timestamps, decoded as a stream by PyAV.

(mp4, seconds) -> seek to the keyframe before -> decode forward, nearest frame each -> (T, H, W, C) uint8

Invariant: a frame lies within `tolerance` seconds of the time asked for, or EpisodeError says which time has none:
no frame is repeated to fill a gap. Memory holds the frames asked for and two more.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from schemas.episode import EpisodeError

EXTRA = "pip install 'gato-open[video]'"
EPISODE_BYTES = 2**32  # of one camera, decoded
AGAIN = "download or record the video again"


def require_av() -> Any:
    """The module av. EpisodeError names the extra that brings it."""
    try:
        import av
    except ImportError as error:
        raise EpisodeError("missing package", f"videos are decoded by PyAV ({error}); {EXTRA}") from error
    return av


class Video:
    """One open file; `frames` may be asked for any times, ascending ones of one call after the other cost no seek."""

    def __init__(self, path: Path):
        av = require_av()
        self.path = path
        self.error = av.FFmpegError
        if not path.is_file():
            raise EpisodeError("missing file", f"video {path.name} is not there; {AGAIN}")
        try:
            self.container = av.open(str(path))
            self.stream = self.container.streams.video[0]
            self.stream.codec_context.thread_count = 1  # the build's own processes share the cores; no codec: None
        except (self.error, OSError, IndexError, ValueError, AttributeError) as error:
            raise EpisodeError("corrupt video", f"{path.name} cannot be opened ({_brief(error)}); {AGAIN}") from error
        self.pending: list[Any] = []  # decoded frames that the next call may need
        self.decoded: Any = None

    def __enter__(self) -> Video:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.container.close()

    def frames(self, times: np.ndarray, tolerance: float, shape: tuple[int, ...]) -> np.ndarray:
        """(T, *shape) uint8 for T ascending times in seconds; `shape`: (height, width, 1 or 3)."""
        if len(times) * np.prod(shape, dtype=np.int64) > EPISODE_BYTES:
            raise EpisodeError("too large", f"{len(times)} frames of {shape}; record shorter episodes")
        if len(times) > 1 and not (np.diff(times) > 0).all():
            row = int(np.flatnonzero(np.diff(times) <= 0)[0]) + 1
            raise EpisodeError("out of range", f"timestamps do not increase at timestep {row}; {AGAIN}")
        out: np.ndarray | None = None
        try:
            for row, frame in enumerate(self._nearest(times, tolerance)):
                picture = frame.to_ndarray(format="gray" if shape[2] == 1 else "rgb24")
                picture = picture.reshape(*picture.shape[:2], -1)
                if picture.shape != tuple(shape):
                    detail = f"{self.path.name} shows {picture.shape}, info.json says {tuple(shape)}; {AGAIN}"
                    raise EpisodeError("wrong shape", detail)
                if out is None:
                    out = np.empty((len(times), *shape), np.uint8)
                out[row] = picture
        except (self.error, OSError, ValueError, MemoryError) as error:
            if isinstance(error, EpisodeError):
                raise
            raise EpisodeError(
                "corrupt video", f"{self.path.name} cannot be decoded ({_brief(error)}); {AGAIN}"
            ) from error
        assert out is not None
        return out

    def _nearest(self, times: np.ndarray, tolerance: float) -> Any:
        """The frame nearest to each time."""
        before, after = self._start(float(times[0]), tolerance)
        for row, time in enumerate(times):
            while after is not None and after.time < time:
                before, after = after, self._next()
            near = [frame for frame in (before, after) if frame is not None]
            best = min(near, key=lambda frame: abs(frame.time - time), default=None)
            if best is None or abs(best.time - time) > tolerance:
                there = "it ends before" if best is None or after is None else f"the nearest is at {best.time:.3f} s"
                detail = f"{self.path.name} has no frame at {time:.3f} s (timestep {row}): {there}; {AGAIN}"
                raise EpisodeError("wrong length" if after is None else "missing frame", detail)
            yield best
        self.pending = [frame for frame in (before, after) if frame is not None]

    def _start(self, time: float, tolerance: float) -> tuple[Any, Any]:
        """Frames around where to begin: those at hand if the time lies right after them, else by a seek."""
        at_hand, self.pending = self.pending, []
        if at_hand and at_hand[0].time <= time <= at_hand[-1].time + 2 * tolerance:
            return (at_hand[0], at_hand[1]) if len(at_hand) == 2 else (at_hand[0], self._next())
        base = self.stream.time_base or 1
        first = self.stream.start_time or 0
        self.container.seek(max(first, int((time - tolerance) / base)), stream=self.stream, backward=True)
        self.decoded = self.container.decode(self.stream)
        return None, self._next()

    def _next(self) -> Any:
        for frame in self.decoded:
            if frame.time is not None:
                return frame
        return None


def _brief(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:160]
