"""Logs on disk in the formats users have, written row by row: D4RL's HDF5, DQN-Replay's gzip, Minari's folders.

row {name: value} -> append -> ... -> close: the log gets its name; discard: what has not got it is removed

Invariant: a log under its own name is whole.
"""

from __future__ import annotations

import gzip
import os
import shutil
import string
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import gymnasium
import h5py
import numpy as np
from gymnasium import spaces

from schemas.files import sync_folder

CHUNK = 4096
ATARI_ARRAYS = {"observation": np.uint8, "action": np.int32, "reward": np.float32, "terminal": np.uint8}


class Columns(Protocol):
    """Named columns that grow on disk under a temporary name; `close` gives them their name, `discard` removes
    what has not got it."""

    def append(self, row: dict[str, Any]) -> None: ...

    def close(self) -> None: ...

    def discard(self) -> None: ...


class Hdf5Log:
    """D4RL's layout: one growing dataset a key, attribute env_id, metadata as datasets."""

    def __init__(self, path: Path, environment: str, algorithm: str):
        self.path, self.temporary = path, path.with_name(f".{path.name}.{os.getpid()}.tmp")
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = h5py.File(self.temporary, "w", track_order=False)
        self.file.attrs["env_id"] = environment
        self.file["metadata/algorithm"] = algorithm
        self.rows: dict[str, list] = {}

    def append(self, row: dict[str, Any]) -> None:
        for key, value in row.items():
            self.rows.setdefault(key, []).append(value)
        if len(self.rows["rewards"]) >= CHUNK:
            self.flush()

    def flush(self) -> None:
        for key, values in self.rows.items():
            block = np.stack(values)
            if key not in self.file:
                shape = block.shape[1:]
                self.file.create_dataset(
                    key, (0, *shape), block.dtype, maxshape=(None, *shape), chunks=(CHUNK, *shape), compression="gzip",
                    compression_opts=1,
                )  # fmt: skip
            dataset = self.file[key]
            dataset.resize(len(dataset) + len(block), axis=0)
            dataset[-len(block) :] = block
            values.clear()

    def close(self) -> None:
        self.flush()
        self.file.close()
        os.replace(self.temporary, self.path)
        sync_folder(self.path.parent)

    def discard(self) -> None:
        self.file.close()
        self.temporary.unlink(missing_ok=True)


class ReplayLog:
    """The DQN-Replay layout: gzipped .npy files in lockstep. Rows are spooled raw and packed at the end, when
    their number is known."""

    def __init__(self, folder: Path):
        self.folder, self.temporary = folder, folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
        shutil.rmtree(self.temporary, ignore_errors=True)
        self.temporary.mkdir(parents=True)
        self.spools = {name: open(self.temporary / f"{name}.raw", "w+b") for name in ATARI_ARRAYS}  # noqa: SIM115
        self.count = 0

    def append(self, row: dict[str, Any]) -> None:
        for name, dtype in ATARI_ARRAYS.items():
            self.spools[name].write(np.asarray(row[name], dtype).tobytes())
        self.count += 1

    def close(self) -> None:
        for name, dtype in ATARI_ARRAYS.items():
            shape = (self.count, 84, 84) if name == "observation" else (self.count,)
            self._pack(f"$store$_{name}_ckpt.0.gz", np.dtype(dtype), shape, self.spools[name])
            self.spools[name].close()
            (self.temporary / f"{name}.raw").unlink()
        for name, value in (("add_count", np.array(self.count)), ("invalid_range", np.zeros(5, np.int64))):
            with self._gzip(f"{name}_ckpt.0.gz") as packed:
                np.lib.format.write_array(packed, value)
        shutil.rmtree(self.folder, ignore_errors=True)
        os.replace(self.temporary, self.folder)
        sync_folder(self.folder.parent)

    def discard(self) -> None:
        for spool in self.spools.values():
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


class MinariLog:
    """A Minari dataset, written by the minari package, one episode at a time. Rows come from `wrap`ped simulators'
    raw observations; the log's end truncates a last episode, as Minari marks it."""

    def __init__(self, folder: Path, dataset: str, algorithm: str):
        folder = folder.absolute()  # Minari joins a relative one to itself
        self.folder, self.dataset, self.algorithm = folder, dataset, algorithm
        self.temporary = folder / f".{dataset.replace('/', '-')}.{os.getpid()}.tmp"
        self.rows: list[dict[str, Any]] = []

    def wrap(self, env: gymnasium.Env) -> gymnasium.Env:
        """The simulator, its raw observations kept for the log."""
        from minari.dataset.minari_storage import MinariStorage

        space = env.observation_space
        if isinstance(space, spaces.Dict) and "mission" in space.spaces:  # minigrid's own space is not Minari's
            space = spaces.Dict(space.spaces | {"mission": spaces.Text(1024, charset=string.printable)})
        data = self.temporary / "data"
        data.mkdir(parents=True)
        self.storage = MinariStorage.new(data, space, env.action_space, env.spec, "hdf5", jpeg_encoding=False)
        about = {"dataset_id": self.dataset, "algorithm_name": self.algorithm, "minari_version": version("minari")}
        self.storage.update_metadata(about)
        self.raw = _Raw(env)
        return self.raw

    def append(self, row: dict[str, Any]) -> None:
        """`row`: action, reward, terminated, truncated of the latest timestep."""
        self.rows.append(row | {"before": self.raw.before, "after": self.raw.after})
        if row["terminated"] or row["truncated"]:
            self.flush()

    def flush(self) -> None:
        from minari.data_collector import EpisodeBuffer

        rows, self.rows = self.rows, []
        observations = [rows[0]["before"], *(row["after"] for row in rows)]
        columns = {key: [observation[key] for observation in observations] for key in observations[0]}
        episode = EpisodeBuffer(
            observations={k: v if isinstance(v[0], str) else np.stack(v) for k, v in columns.items()},
            actions=np.stack([row["action"] for row in rows]),
            rewards=[row["reward"] for row in rows],
            terminations=[row["terminated"] for row in rows],
            truncations=[row["truncated"] for row in rows],
        )
        self.storage.update_episodes([episode])

    def close(self) -> None:
        if self.rows:
            self.rows[-1]["truncated"] = True
            self.flush()
        final = self.folder / self.dataset
        final.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(self.temporary, final)
        sync_folder(final.parent)

    def discard(self) -> None:
        shutil.rmtree(self.temporary, ignore_errors=True)


class _Raw(gymnasium.Wrapper):
    """Remembers the observation before and after the latest step."""

    def reset(self, **arguments: Any) -> Any:
        self.after, info = self.env.reset(**arguments)
        return self.after, info

    def step(self, action: Any) -> Any:
        self.before = self.after
        self.after, *rest = self.env.step(action)
        return self.after, *rest
