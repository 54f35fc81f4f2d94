"""Episodes of one LeRobot data file, with the frames of their videos.

EpisodeRef -> its rows (table.py), its frames (video.py), its instruction -> RawEpisode

Invariant: an episode's rows are all of one episode_index, in the order of frame_index, or EpisodeError says why not.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from etl.sources import EpisodeRef
from etl.sources._numbers import as_float32
from etl.sources.lerobot import metadata, table
from etl.sources.lerobot.fields import action_features, observable
from etl.sources.lerobot.metadata import AGAIN, INFO, Feature
from etl.sources.lerobot.video import Video
from schemas.episode import EpisodeError, FieldSpec, RawEpisode, TaskSpec

FILES_OPEN = 8  # videos


class Reader:
    """One data file of a dataset, and the videos of its episodes."""

    def __init__(self, task: TaskSpec, path: Path, stack: ExitStack):
        self.task, self.path, self.stack = task, path, stack
        self.dataset = metadata.load(root_of(path))
        keys = {feature.key: feature for feature in self.dataset.features.values() if observable(feature)}
        self.fields = [(spec, keys.get(spec.key)) for spec in task.observation]
        self.actions = action_features(self.dataset)
        names = pa.parquet.read_schema(path).names if path.is_file() else []
        optional = ("timestamp", "frame_index", "task_index", "next.reward", "next.done", "next.success")
        columns = [f.name for f in (*self.actions, *(f for _, f in self.fields if f)) if f.dtype != "video"]
        self.table = table.Table(path, [*dict.fromkeys(columns), *(n for n in optional if n in names), "episode_index"])
        self.videos: dict[Path, Video] = {}

    def episode(self, ref: EpisodeRef) -> RawEpisode:
        rows = self.table.rows(ref.start, ref.stop)
        self._check(rows, ref)
        spec = self.task.action
        assert spec is not None
        values = [table.numbers(rows, one).reshape(len(rows), -1) for one in self.actions]
        action = np.concatenate(values, axis=1)
        if spec.kind == "discrete":
            action = action.astype(np.int64).reshape((-1,) if spec.size == 1 else (-1, spec.size))
        done, success = self._flag(rows, "next.done"), self._flag(rows, "next.success")
        return RawEpisode(
            observation={field.key: self._field(field, feature, rows, ref) for field, feature in self.fields},
            action=action if spec.kind == "discrete" else as_float32(action),
            reward=self._rewards(rows),
            terminated=bool(success),
            truncated=not success and done is not False,
            file=self.path.relative_to(self.dataset.root).as_posix(),
            position=ref.position,
            row=ref.start,
        )

    def _field(self, spec: FieldSpec, feature: Feature | None, rows: pa.Table, ref: EpisodeRef) -> np.ndarray:
        if spec.kind == "text":
            return self._instructions(rows)
        if feature is None:
            raise EpisodeError("missing key", f"{INFO} has no feature for '{spec.key}'; {AGAIN}")
        if feature.dtype == "image":
            return table.pictures(rows, feature, self.dataset.root)
        if feature.dtype == "video":
            return self._frames(feature, rows, ref)
        values = table.numbers(rows, feature)
        return as_float32(values) if spec.kind == "continuous" else values.astype(np.int64)

    def _frames(self, feature: Feature, rows: pa.Table, ref: EpisodeRef) -> np.ndarray:
        clip, fps = self.dataset.clip(feature.name, ref.position), self.dataset.fps
        if "timestamp" in rows.column_names:
            times = table.numbers(rows, Feature("timestamp", "float32", ())).astype(np.float64)
            if not np.isfinite(times).all():
                raise EpisodeError("not finite", f"'timestamp' holds NaN or infinity; {AGAIN}")
        else:
            times = np.arange(len(rows)) / fps
        return self._video(clip.path).frames(clip.start + times, 0.5 / fps, feature.shape)

    def _video(self, path: Path) -> Video:
        if path not in self.videos:
            while len(self.videos) >= FILES_OPEN:
                oldest = next(iter(self.videos))
                self.videos.pop(oldest).__exit__(None, None, None)
            self.videos[path] = self.stack.enter_context(Video(path))
        return self.videos[path]

    def _instructions(self, rows: pa.Table) -> np.ndarray:
        known = self.dataset.instructions
        indices = table.numbers(rows, Feature("task_index", "int64", ()))
        unknown = set(np.unique(indices).tolist()) - set(known)
        if unknown:
            raise EpisodeError("missing key", f"meta/tasks has no task_index {min(unknown)}; {AGAIN}")
        return np.array([known[int(index)] for index in indices], np.str_)

    def _rewards(self, rows: pa.Table) -> np.ndarray:
        if "next.reward" not in rows.column_names:
            return np.zeros(len(rows), np.float32)
        return as_float32(table.numbers(rows, Feature("next.reward", "float32", ())))

    def _flag(self, rows: pa.Table, name: str) -> bool | None:
        """A flag of the last row; None where there is no such column."""
        if name not in rows.column_names:
            return None
        return bool(table.numbers(rows, Feature(name, "bool", ()))[-1])

    def _check(self, rows: pa.Table, ref: EpisodeRef) -> None:
        """EpisodeError unless these are all rows of that episode, in order."""
        own = table.numbers(rows, Feature("episode_index", "int64", ()))
        if (own != ref.position).any():
            raise EpisodeError("wrong length", f"the rows are no longer episode {ref.position}'s; {AGAIN}")
        if "frame_index" in rows.column_names:
            frames = table.numbers(rows, Feature("frame_index", "int64", ()))
            if (frames != np.arange(len(frames))).any():
                row = int(np.flatnonzero(frames != np.arange(len(frames)))[0])
                raise EpisodeError("wrong length", f"frame {row} is missing or out of order; {AGAIN}")


def root_of(path: Path) -> Path:
    """The dataset that a data file lies in."""
    for folder in path.parents:
        if folder.name == "data" and (folder.parent / INFO).is_file():
            return folder.parent
    raise EpisodeError("missing file", f"no {INFO} above {path.name}; {AGAIN}")
