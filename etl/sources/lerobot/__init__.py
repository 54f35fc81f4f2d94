"""LeRobotDataset v2.0, v2.1 and v3.0: robots' recordings with cameras and instructions (huggingface/lerobot).

meta/info.json        features, version      observation.* -> fields 'state', 'images/front', ...; task -> text 'task'
data/**/*.parquet     one row per frame      action -> action; next.reward, next.done, next.success where there are any
videos/**/*.mp4       a camera               decoded by timestamps (pip install 'gato-open[video]')
    -> an episode: the rows of one episode_index; without next.success it counts as ended by its recorder

One dataset is one task, or with --task-per-instruction one each. fields.py makes fields of features, scanner.py finds
the episodes, reader.py reads them; metadata.py, table.py and video.py open the files, hub.py downloads them.

Invariant: an episode is where its rows are, and has exactly the frames that its timestamps name.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path

from etl.sources import (
    EpisodeRef,
    Known,
    LogWriter,
    Recognition,
    Rejection,
    SourceError,
    TaskScan,
    _catalogue,
    _recognition,
    by_task,
)
from etl.sources.lerobot import hub, metadata, table
from etl.sources.lerobot.fields import Options
from etl.sources.lerobot.metadata import INFO
from etl.sources.lerobot.reader import Reader, root_of
from etl.sources.lerobot.scanner import SOURCE_NAME, rejection, scan_dataset
from schemas.episode import EpisodeError, RawEpisode, TaskSpec

__all__ = ["SOURCE", "LeRobot", "Options", "task_name"]


class LeRobot:
    """Source of LeRobot datasets, v2.0 to v3.0."""

    name = SOURCE_NAME
    default_dataset = hub.DEFAULT
    options = Options
    writer: type[LogWriter] | None = None

    def known(self, cache: Path) -> list[Known]:
        """Some of the hub's datasets, and what was downloaded; any other can be asked for by its repository's id."""
        return hub.known(cache / self.name)

    def recognise(self, input: Path) -> Recognition | None:
        """By the codebase_version in a meta/info.json."""
        for path in _infos(input):
            about = _recognition.json_of(path)
            if isinstance(about, dict) and "codebase_version" in about and "features" in about:
                evidence = f"{_recognition.below(input, path)}, codebase_version {str(about['codebase_version'])[:20]}"
                return Recognition(evidence, _recognition.MARK)
        return None

    def resolve(self, input: Path | None, dataset: str | None, cache: Path) -> list[Path]:
        """The meta/info.json of each dataset at or below the input, sorted; `dataset` (the folder's name) picks one.
        Without an input, `dataset`, a repository of the hub, is downloaded. SourceError where there is none."""
        if input is None:
            return [hub.download(dataset or self.default_dataset, cache / self.name)]
        found = sorted(_infos(Path(os.path.abspath(input))))
        if not found:
            raise SourceError(f"{input}: no LeRobot dataset in it; give --input a folder that holds {INFO}")
        files = [path for path in found if dataset is None or task_name(path) == dataset.replace("/", "-")]
        if not files:
            names = [task_name(path) for path in found]
            raise SourceError(f"{input}: no dataset '{dataset}' in it{_catalogue.suggest(str(dataset), names)}")
        return files

    def scan(self, files: list[Path], options: Options) -> list[TaskScan]:
        """One TaskScan a dataset, or one an instruction, by task name. SourceError where two have one name."""
        scans = [
            scan
            for name, path in by_task(files, task_name).items()
            for scan in scan_dataset(name, path.parents[1], options)
        ]
        names = [scan.task.name for scan in scans if scan.task]
        if len(set(names)) < len(names):
            twice = sorted({name for name in names if names.count(name) > 1})
            raise SourceError(f"two tasks would be called '{twice[0]}'; rename a dataset's folder")
        return sorted(scans, key=lambda scan: scan.task.name if scan.task else "")

    def parts(self, file: str) -> list[Path]:
        """A data file, the metadata and the videos of its episodes."""
        path = Path(file)
        found = [path]
        try:
            dataset = metadata.load(root_of(path))
            found += dataset.meta_files()
            cameras = [name for name, feature in dataset.features.items() if feature.dtype == "video"]
            if cameras:
                clips = {dataset.clip(name, run.episode).path for run in table.runs(path, None) for name in cameras}
                found += sorted(clip for clip in clips if clip.is_file())
        except EpisodeError:
            pass  # reading says so
        return found

    def read(self, task: TaskSpec, refs: Iterable[EpisodeRef]) -> Iterator[RawEpisode | Rejection]:
        """Episodes in the order of refs: float32, integers from 0, pictures (T, H, W, C) uint8, text (T,) strings."""
        for file, group in groupby(refs, key=lambda ref: ref.file):
            path = Path(file)
            with ExitStack() as stack:
                try:
                    reader = Reader(task, path, stack)
                except EpisodeError as error:
                    yield from (rejection(task.name, path, ref.position, ref.start, error) for ref in group)
                    continue
                for ref in group:
                    try:
                        yield reader.episode(ref)
                    except EpisodeError as error:
                        yield rejection(task.name, path, ref.position, ref.start, error)


SOURCE = LeRobot()


def task_name(path: Path) -> str:
    """The name of the dataset's folder, as a task's."""
    return re.sub(r"[^\w.-]+", "-", path.parents[1].name).strip("-.") or "lerobot"


def _infos(input: Path) -> list[Path]:
    """meta/info.json of each dataset at or below a folder; of that file itself, or of a dataset's own folder."""
    if input.is_file():
        return [input] if input.name == "info.json" and input.parent.name == "meta" else []
    if input.name in ("meta", "data", "videos") and (input.parent / INFO).is_file():
        return [input.parent / INFO]
    if (input / INFO).is_file():
        return [input / INFO]
    found = []
    for folder, below, _ in os.walk(input):
        below[:] = sorted(name for name in below if not name.startswith("."))
        if (Path(folder) / INFO).is_file():
            found.append(Path(folder) / INFO)
            below.clear()  # a dataset holds no other
    return found
