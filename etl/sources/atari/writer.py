"""The DQN-Replay layout as etl.record writes it: GAME/RUN/replay_logs, gzipped .npy files in lockstep.

steps {"frame": (84, 84, 1)} -> raw spools -> packed at the end, when their number is known

Rewards are clipped to ±1, as DQN-Replay has them.

Invariant: a folder under its own name is whole.
"""

from __future__ import annotations

import gzip
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

from schemas.episode import EnvironmentSpec
from schemas.files import replace_folder
from simulators.rollout import Step

ARRAYS = {"observation": np.uint8, "action": np.int32, "reward": np.float32, "terminal": np.uint8}


class ReplayWriter:
    """One checkpoint of a replay buffer that holds the whole log."""

    folder = "data/logs/dqn_replay"

    @staticmethod
    def path(folder: Path, name: tuple[str, str], level: str, run: int) -> Path:
        return folder / name[0] / str(run) / "replay_logs"

    def __init__(self, path: Path, environment: EnvironmentSpec | None = None, algorithm: str = ""):
        self.final, self.temporary = path, path.with_name(f".{path.name}.tmp")
        shutil.rmtree(self.temporary, ignore_errors=True)
        self.temporary.mkdir(parents=True)
        self.spools = {name: open(self.temporary / f"{name}.raw", "w+b") for name in ARRAYS}  # noqa: SIM115
        self.count = 0

    def wrap(self, raw: gymnasium.Env) -> gymnasium.Env:
        """Its rows are what an agent sees."""
        return raw

    def append(self, step: Step) -> None:
        frame, reward = step.observation["frame"][..., 0], np.clip(step.reward, -1, 1)
        self.add({"observation": frame, "action": step.action, "reward": reward, "terminal": step.ended})

    def add(self, row: dict[str, Any]) -> None:
        """One row {name: value} of the arrays."""
        for name, dtype in ARRAYS.items():
            self.spools[name].write(np.asarray(row[name], dtype).tobytes())
        self.count += 1

    def close(self) -> None:
        for name, dtype in ARRAYS.items():
            shape = (self.count, 84, 84) if name == "observation" else (self.count,)
            self._pack(f"$store$_{name}_ckpt.0.gz", np.dtype(dtype), shape, self.spools[name])
            self.spools[name].close()
            (self.temporary / f"{name}.raw").unlink()
        for name, value in (("add_count", np.array(self.count)), ("invalid_range", np.zeros(5, np.int64))):
            with self._gzip(f"{name}_ckpt.0.gz") as packed:
                np.lib.format.write_array(packed, value)
        replace_folder(self.temporary, self.final)

    def discard(self) -> None:
        for spool in self.spools.values():
            with suppress(OSError):  # a full disk
                spool.close()
        shutil.rmtree(self.temporary, ignore_errors=True)

    def _pack(self, name: str, dtype: np.dtype, shape: tuple[int, ...], spool: Any) -> None:
        spool.seek(0)
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        with self._gzip(name) as packed:
            np.lib.format.write_array_header_1_0(packed, header)
            shutil.copyfileobj(spool, packed)

    def _gzip(self, name: str) -> gzip.GzipFile:
        return gzip.GzipFile(self.temporary / name, "wb", compresslevel=1, mtime=0)
