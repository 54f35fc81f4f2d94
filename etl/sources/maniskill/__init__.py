"""ManiSkill's trajectories (maniskill.readthedocs.io): an HDF5 file with a JSON of the same name, one task.

NAME.h5     traj_N: actions (T, A), terminated, truncated, success (T,), rewards (T,) where recorded,
            obs (T + 1, ...), an array or nested groups; env_states are the simulator's own
NAME.json   env_info (env_id, max_episode_steps, env_kwargs), episodes (episode_id, elapsed_steps, success)
    -> an episode per trajectory; the last observation, which no action follows, is left out

Without `obs` (what the hub holds before it is replayed) there is nothing to see: ManiSkill's replay_trajectory makes
observations.

Invariant: which episodes there are, and how long, is said twice; where the two disagree the episode is rejected.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from etl.sources import _hdf5
from etl.sources._arrays import ArrayOptions, Log, StoredEpisode
from etl.sources._hdf5 import AGAIN
from etl.sources._hdf5_log import HDF5Log, HDF5Source, column, columns, group_of, last_flag, optional, required
from etl.sources._recognition import MARK, Recognition, below, files_below, first_with, json_of
from schemas.episode import EpisodeError
from simulators.registry import environment

_TRAJECTORY = re.compile(r"traj_(0|[1-9]\d{0,8})")


@dataclass(frozen=True)
class Options(ArrayOptions):
    """Options for reading ManiSkill's trajectories."""


class ManiSkill(HDF5Source):
    """Source of ManiSkill's trajectories."""

    name = "maniskill"
    options = Options
    suffixes = (".h5",)
    what = ".h5 file of trajectories"
    hub = "haosulab/ManiSkill_Demonstrations"
    fetch = "run `python -m mani_skill.utils.download_demo ENV` and replay_trajectory with --save-traj --obs-mode"

    def recognise(self, input: Path) -> Recognition | None:
        """By the JSON beside an .h5 file."""
        for path in first_with(files_below(input), *self.suffixes):
            about = json_of(path.with_suffix(".json"))
            info = about.get("env_info") if isinstance(about, dict) else None
            if isinstance(info, dict) and "env_id" in info and "episodes" in about:
                where = below(input, path.with_suffix(".json")) if input != path else path.with_suffix(".json").name
                return Recognition(f"{where}, env_info of {str(info['env_id'])[:60]}", MARK)
        return None

    def below(self, folder: Path) -> list[Path]:
        return [path for path in super().below(folder) if path.with_suffix(".json").exists()] or super().below(folder)

    def tasks(self, files: list[Path]) -> dict[str, list[Path]]:
        """A task per file, by environment and the file's own name: PickCube-v1-trajectory.rgb.pd_joint_pos."""
        named: dict[str, list[Path]] = {}
        for path in sorted(map(Path, files)):
            info = _about(path).get("env_info")
            id = info.get("env_id") if isinstance(info, dict) else None
            name = f"{re.sub(r'[^A-Za-z0-9_.-]', '-', id)[:80]}-{path.stem}" if isinstance(id, str) else path.stem
            named.setdefault(name, []).append(path)
        for name, same in list(named.items()):  # several of one name, in folders of their own
            if len(same) > 1:
                del named[name]
                named |= {f"{name}-{path.parent.name}": [path] for path in same}
        return dict(sorted(named.items()))

    def parts(self, file: str) -> list[Path]:
        """The HDF5 file and its JSON, where there is one."""
        beside = Path(file).with_suffix(".json")
        return [Path(file), *([beside] if beside.is_file() else [])]

    def open(self, place: str) -> Log:
        return _Trajectories(Path(place))


SOURCE = ManiSkill()


class _Trajectories(HDF5Log):
    """One file's trajectories."""

    def __init__(self, path: Path):
        super().__init__(path)
        about = _about(path)
        info = about.get("env_info")
        info = info if isinstance(info, dict) else {}
        if isinstance(id := info.get("env_id"), str) and id:
            kwargs = info.get("env_kwargs")
            self.environment = environment(id, dict(kwargs) if isinstance(kwargs, dict) else {})
        limit = info.get("max_episode_steps")
        self.max_episode_steps = limit if isinstance(limit, int) and 0 < limit < 2**30 else None
        listed = about.get("episodes")
        entries = [one for one in listed if isinstance(one, dict)] if isinstance(listed, list) else []
        self.steps = {one.get("episode_id"): one.get("elapsed_steps") for one in entries if _number(one)}
        self.numbers = {int(match[1]) for key in self.file if (match := _TRAJECTORY.fullmatch(key))}
        if not self.numbers:
            self.close()
            raise EpisodeError("empty", f"no group traj_N in it; {AGAIN}")

    def positions(self) -> Iterable[int]:
        return sorted(self.numbers | {number for number in self.steps if isinstance(number, int)})

    def episode(self, position: int) -> StoredEpisode:
        group = group_of(self.file, f"traj_{position}")
        node = required(group, "actions")
        T = len(node)
        counted = self.steps.get(position)
        if isinstance(counted, int) and counted != T:
            raise EpisodeError("wrong length", f"'actions' has {T} rows of {counted} in the JSON; {AGAIN}")
        seen = _hdf5.dataset(group, "obs")
        observation: dict[str, Any] = {"observation": column(seen, "obs")} if seen is not None else {}
        if seen is None:
            if "obs" not in group:
                raise EpisodeError("missing group", "a trajectory without 'obs'; replay it with ManiSkill's "
                                   "replay_trajectory --save-traj --obs-mode state (or rgb)")  # fmt: skip
            observation = dict(columns(group_of(group, "obs")))
        for key, one in observation.items():
            if one.shape[0] != T + 1:
                raise EpisodeError("wrong length", f"'obs/{key}' has {one.shape[0]} rows, expected {T + 1}; {AGAIN}")
        terminated = last_flag(optional(group, "terminated"), T, "terminated")
        truncated = last_flag(optional(group, "truncated"), T, "truncated")
        return StoredEpisode(T, observation, column(node, "actions"), optional(group, "rewards"), terminated, truncated)


def _about(path: Path) -> dict[str, Any]:
    about = json_of(path.with_suffix(".json"))
    return about if isinstance(about, dict) else {}


def _number(entry: dict[str, Any]) -> bool:
    number = entry.get("episode_id")
    return isinstance(number, int) and not isinstance(number, bool) and 0 <= number < 10**9
