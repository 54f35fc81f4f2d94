"""Reading a dataset: the index is mapped, shards are mapped when first touched, arrays are views.

Opening checks the manifest, every file's size, and sha256 as `verify` asks:
'size' (sizes only), 'full' (every hash), 'auto' (every hash up to 2 GiB in all).

Invariant: nothing is copied and nothing is unpickled; what a row's member holds
follows from the manifest's task layout, never from the shard's own headers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa

from schemas.dataset import INDEX_NAME, INDEX_SCHEMA, DatasetError, load_manifest
from schemas.files import sha256_of
from schemas.layout import PATCH_SIZE, layout_of

Verify = Literal["auto", "size", "full"]
AUTO_LIMIT = 2 << 30


class Dataset:
    """A finished dataset folder. `column(name)` is an index column; `tokens(row)` and its like are
    views of one sample's arrays. DatasetError names file and remedy."""

    def __init__(self, folder: Path, verify: Verify = "auto"):
        self.folder = Path(folder)
        self.manifest = load_manifest(self.folder)
        self._check_files(verify)
        with pa.memory_map(str(self.folder / INDEX_NAME)) as source:
            try:
                self.index = pa.ipc.open_file(source).read_all()
            except pa.ArrowInvalid as error:
                raise DatasetError(f"{self.folder / INDEX_NAME}: {error}; rebuild the dataset") from None
        if not self.index.schema.equals(INDEX_SCHEMA):
            raise DatasetError(f"{self.folder / INDEX_NAME}: unexpected columns; rebuild it with python -m etl.build")
        self._columns: dict[str, np.ndarray] = {}
        self._maps: dict[int, np.memmap] = {}
        self.layouts = [layout_of(task.spec) for task in self.manifest.tasks]

    def column(self, name: str) -> np.ndarray:
        """One index column (rows,), zero-copy for numbers."""
        if name not in self._columns:
            chunk = self.index.column(name).combine_chunks()
            self._columns[name] = chunk.to_numpy(zero_copy_only=False)
        return self._columns[name]

    def rows(self, task: int, held_out: bool) -> np.ndarray:
        """Rows of one task and split, ordered by episode and start, int64."""
        rows = np.flatnonzero((self.column("task") == task) & (self.column("held_out") == held_out))
        return rows[np.lexsort((self.column("start")[rows], self.column("episode")[rows]))]

    def tokens(self, row: int) -> np.ndarray:
        """Stored tokens of a sample, uint16 (T, stored)."""
        layout = self.layouts[self.column("task")[row]]
        return self._array(row, "tokens", np.uint16).reshape(-1, layout.stored)

    def patches(self, row: int) -> np.ndarray:
        """uint8 (T, P, 16, 16, C)."""
        layout = self.layouts[self.column("task")[row]]
        shape = (-1, layout.patches, PATCH_SIZE, PATCH_SIZE, layout.channels)
        return self._array(row, "patches", np.uint8).reshape(shape)

    def reward(self, row: int) -> np.ndarray:
        """float32 (T,)."""
        return self._array(row, "reward", np.float32)

    def observation(self, row: int) -> np.ndarray | None:
        """Raw observations of a control task, float32 (T, D); None where the sample has none."""
        return self._rows_of(row, "observation")

    def action(self, row: int) -> np.ndarray | None:
        """Raw continuous actions, float32 (T, A); None where actions are discrete."""
        return self._rows_of(row, "action")

    def _rows_of(self, row: int, member: str) -> np.ndarray | None:
        if self.column(f"{member}_offset")[row] < 0:
            return None
        return self._array(row, member, np.float32).reshape(int(self.column("timesteps")[row]), -1)

    def _array(self, row: int, member: str, dtype: type) -> np.ndarray:
        offset = int(self.column(f"{member}_offset")[row])
        size = int(self.column(f"{member}_bytes")[row])
        if offset < 0:
            raise DatasetError(f"{self.folder}: sample {row} has no member '{member}'")
        shard = int(self.column("shard")[row])
        if shard not in self._maps:
            self._maps[shard] = np.memmap(self.folder / self.manifest.shards[shard].name, np.uint8, "r")
        return np.ndarray(size // np.dtype(dtype).itemsize, dtype, buffer=self._maps[shard], offset=offset)

    def _check_files(self, verify: Verify) -> None:
        files = self.manifest.files
        full = verify == "full" or (verify == "auto" and sum(file.bytes for file in files) <= AUTO_LIMIT)
        for file in files:
            path = self.folder / file.name
            remedy = "remove it and run python -m etl.build again with the same arguments"
            if Path(file.name).name != file.name:
                raise DatasetError(f"{self.folder}: file name '{file.name}' leaves the folder; refused")
            if not path.is_file():
                raise DatasetError(f"{path}: missing; run python -m etl.build again with the same arguments")
            if path.stat().st_size != file.bytes:
                raise DatasetError(f"{path}: {path.stat().st_size} bytes, the manifest says {file.bytes}; {remedy}")
            if full and sha256_of(path) != file.sha256:
                raise DatasetError(f"{path}: sha256 differs from the manifest, the file is damaged; {remedy}")
