"""robomimic's HDF5 (robomimic.github.io), which LIBERO, RoboCasa and MimicGen write too: one file is one task.

data            attributes env_args (JSON: env_name, env_kwargs), problem_info (LIBERO: JSON with language_instruction)
data/demo_N     obs/KEY (T, ...), actions, rewards, dones; attributes num_samples, ep_meta (RoboCasa: JSON with lang)
mask/NAME       names of demos: with --held-out-mask valid these are held out, with --mask NAME only these are read
    -> an episode per demo; pictures of every camera, an `instruction` where there is one

Without `obs` (raw demonstrations) there is nothing to see but simulator states: robomimic's dataset_states_to_obs.py
makes the observations.

Invariant: demos come by their number; what a demo lacks, the others do not lose.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from etl.sources import _hdf5
from etl.sources._arrays import INSTRUCTION, ArrayOptions, Log, StoredEpisode, names_of, path_of
from etl.sources._hdf5 import AGAIN
from etl.sources._hdf5_log import (
    HDF5Log,
    HDF5Source,
    attribute,
    columns,
    group_of,
    json_attribute,
    last_flag,
    optional,
    required,
)
from etl.sources._hdf5_log import column as column_of
from etl.sources._recognition import MARK, Recognition, below, files_below, first_with, hdf5_attributes, hdf5_keys
from schemas.episode import EpisodeError

_DEMO = re.compile(r"demo_(0|[1-9]\d{0,8})")


@dataclass(frozen=True)
class Options(ArrayOptions):
    """Options for reading robomimic's files."""

    held_out_mask: str = ""
    """Name below mask/ of the demos to hold out, such as valid; by a hash where not given."""
    mask: str = ""
    """Name below mask/ of the only demos to read, such as train or 20_percent; all of them where not given."""
    action_key: str = "actions"
    """Array of the actions, such as actions or actions_abs."""


class Robomimic(HDF5Source):
    """Source of robomimic's HDF5 files (LIBERO, RoboCasa, MimicGen)."""

    name = "robomimic"
    options = Options
    suffixes = (".hdf5", ".h5")
    keys = ("held_out_mask", "mask", "action_key")
    what = ".hdf5 file"
    hub = "robomimic/robomimic_datasets/v1.5/lift/ph"
    fetch = "download a dataset (robomimic's download_datasets.py, LIBERO's download_libero_datasets.py)"

    def recognise(self, input: Path) -> Recognition | None:
        """By data/demo_N, or by the attribute env_args."""
        for path in first_with(files_below(input), *self.suffixes):
            if "data" in hdf5_keys(path):
                marks = {"env_args", "problem_info"} & set(hdf5_attributes(path, "data"))
                if marks:
                    return Recognition(f"{below(input, path)}, data's attribute {sorted(marks)[0]}", MARK)
        return None

    def open(self, place: str) -> Log:
        return _Demos(path_of(place), names_of(place))


SOURCE = Robomimic()


class _Demos(HDF5Log):
    """One file's demos."""

    def __init__(self, path: Path, given: dict[str, str]):
        super().__init__(path)
        try:
            self.data = group_of(self.file, "data")
            self.action_key = given.get("action_key", Options.action_key)
            numbers = {int(match[1]) for key in self.data if (match := _DEMO.fullmatch(key))}
            if not numbers:
                raise EpisodeError("empty", f"no group data/demo_N in it; {AGAIN}")
            if name := given.get("mask"):
                numbers &= self._masked(name)
            if name := given.get("held_out_mask"):
                held = self._masked(name)
                self.held_out = {number: number in held for number in numbers}
            self.numbers = sorted(numbers)
        except BaseException:
            self.close()
            raise
        arguments = json_attribute(self.data, "env_args")
        self.instruction = _instruction(json_attribute(self.data, "problem_info"), arguments)
        kwargs = arguments.get("env_kwargs")
        horizon = kwargs.get("horizon") if isinstance(kwargs, dict) else None
        self.max_episode_steps = horizon if isinstance(horizon, int) and horizon > 0 else None

    def positions(self) -> Iterable[int]:
        return self.numbers

    def episode(self, position: int) -> StoredEpisode:
        demo = group_of(self.data, f"demo_{position}")
        node = required(demo, *self.action_key.split("/"))
        T = len(node)
        counted = demo.attrs.get("num_samples")
        if isinstance(counted, int | np.integer) and int(counted) != T:
            raise EpisodeError("wrong length", f"'{self.action_key}' has {T} rows of {int(counted)} that "
                               f"num_samples counts; {AGAIN}")  # fmt: skip
        if "obs" not in demo:
            raise EpisodeError("missing group", "a demo without 'obs'; make observations with robomimic's "
                               "dataset_states_to_obs.py")  # fmt: skip
        said = _instruction(json_attribute(demo, "ep_meta"), {}) or attribute(demo, "language_instruction")
        said = said or self.instruction
        texts = {INSTRUCTION: said} if said else {}
        observation: dict[str, Any] = dict(columns(group_of(demo, "obs")))
        for key, seen in observation.items():
            if seen.shape[0] != T:
                raise EpisodeError("wrong length", f"'obs/{key}' has {seen.shape[0]} rows of {T}; {AGAIN}")
        ended = last_flag(optional(demo, "dones"), T, "dones")
        # a demonstration ends where it succeeded or was given up: its end is an end of the episode
        reward = optional(demo, "rewards")
        return StoredEpisode(T, observation, column_of(node, self.action_key), reward, ended, not ended, 0, texts)

    def _masked(self, name: str) -> set[int]:
        if not _hdf5.holds(self.file, "mask"):
            raise EpisodeError("missing group", f"no 'mask' in it, so no '{name}'; leave out --mask and "
                               "--held-out-mask")  # fmt: skip
        rows = column_of(required(group_of(self.file, "mask"), name), name)[:]
        found = (_DEMO.fullmatch(str(row)) for row in rows.tolist())
        return {int(match[1]) for match in found if match}


def _instruction(about: dict[str, Any], arguments: dict[str, Any]) -> str | None:
    """The instruction of a demo: LIBERO's language_instruction, RoboCasa's lang."""
    kwargs = arguments.get("env_kwargs")
    for place in (about, arguments, kwargs if isinstance(kwargs, dict) else {}):
        for key in ("language_instruction", "lang", "language"):
            said = place.get(key)
            said = said[0] if isinstance(said, list) and said else said
            if isinstance(said, str) and said.strip():
                return said.strip().strip('"')
    return None
