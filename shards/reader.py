"""Reading a dataset: index and shards are mapped when first touched, arrays are views of the maps.

    folder or URL -> dataset.json -> (index.arrow, shards.arrow) -> row -> shard -> map -> view

Opening reads the manifest alone; `check` then checks what `verify` asks. 'size': all sizes. 'full': all sizes and
hashes. 'auto': hashes up to 2 GiB in all, sizes up to 10,000 shards; beyond, a shard's size when it is first mapped.
The tables' hashes are checked whenever they are mapped.
A remote dataset's files come through the cache, which checks size and hash of each as it arrives.

Invariant: nothing is copied, nothing is scanned and nothing is unpickled; what a row's member holds follows from the
manifest's task layout, never from the shard's own headers.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from schemas.dataset import (
    INDEX_SCHEMA,
    MANIFEST_NAME,
    SHARD_SCHEMA,
    DatasetError,
    FileDigest,
    Shard,
    load_manifest,
    parse_manifest,
)
from schemas.files import sha256_of
from schemas.layout import layout_of
from shards.cache import SHA256_HEX, BadFile, Cache, CacheConfig, CacheFull
from shards.folder import Folder
from shards.maps import Maps, mapped_bytes

Verify = Literal["auto", "size", "full"]
AUTO_BYTES = 2 << 30
AUTO_SHARDS = 10_000
FULL_PAUSE = 0.2


class BadShard(BadFile):
    """A shard that cannot be read: number `shard` of `dataset`."""

    def __init__(self, message: str, dataset: Dataset, shard: int):
        super().__init__(message)
        self.dataset, self.shard = dataset, shard


class Store:
    """Resources that the datasets of a process share: open maps, and the cache of remote files."""

    def __init__(self, cache: CacheConfig | None = None):
        self.maps = Maps()
        self.cache = Cache(cache or CacheConfig())


class Dataset:
    """A finished dataset folder or its URL. `column(name)` is an index column; `tokens(row)` and its like are
    views of one sample's arrays. `verify` None: nothing is checked yet, `check` follows. With `skip`, bad shards are
    noted in `bad` (number -> reason) by `check` and not refused. DatasetError names file and remedy."""

    def __init__(
        self, place: Path | str, verify: Verify | None = "auto", store: Store | None = None, skip: bool = False
    ):
        self.place, self.store = Folder(place), store or Store()
        self.skip, self.bad = skip, dict[int, str]()
        if self.place.local is not None:
            self.manifest = load_manifest(self.place.local)
        else:
            data = self.store.cache.read(self.place, MANIFEST_NAME)
            if data is None:
                raise DatasetError(f"{place}: no {MANIFEST_NAME}, so no finished dataset; see python -m etl.build")
            self.manifest = parse_manifest(data, self.place.path(MANIFEST_NAME))
        self.layouts = [layout_of(task.spec) for task in self.manifest.tasks]
        self._columns: dict[str, np.ndarray] = {}
        self._shards: dict[int, Shard] = {}
        if verify is not None:
            check([self], verify)

    @cached_property
    def index(self) -> pa.Table:
        """index.arrow, mapped."""
        return self._table(self.manifest.index, INDEX_SCHEMA)

    @cached_property
    def shards(self) -> pa.Table:
        """shards.arrow, mapped."""
        return self._table(self.manifest.shards, SHARD_SCHEMA)

    def shard(self, number: int) -> Shard:
        """A row of shards.arrow; DatasetError for a name that leaves the folder."""
        if not 0 <= number < self.shards.num_rows:
            raise DatasetError(f"{self.place}: the index names shard {number} of {self.shards.num_rows}; rebuild it")
        if number not in self._shards:
            row = (column[number].as_py() for column in self.shards.columns)
            self._shards[number] = self._inside(Shard(*row))
        return self._shards[number]

    def column(self, name: str) -> np.ndarray:
        """One index column (rows,), zero-copy for numbers."""
        if name not in self._columns:
            column = self.index.column(name)  # one chunk, as the writer makes it; combining would copy it
            values = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
            number = pa.types.is_integer(values.type)  # which to_numpy would import pandas for, where there is one
            self._columns[name] = np.from_dlpack(values) if number else values.to_numpy(zero_copy_only=False)
        return self._columns[name]

    def span(self, task: int, held_out: bool) -> tuple[int, int]:
        """Rows [first, stop) of one task and split, ordered by episode and start."""
        about = self.manifest.tasks[task]
        stop = about.first_row + about.rows
        middle = stop - about.held_out_rows
        return (middle, stop) if held_out else (about.first_row, middle)

    def rows(self, task: int, held_out: bool) -> np.ndarray:
        """The rows of `span`, int64."""
        return np.arange(*self.span(task, held_out))

    def tokens(self, row: int) -> np.ndarray:
        """Stored tokens of a sample, uint16 (T, stored)."""
        return self._array(row, "tokens", np.uint16, (self.layouts[self.column("task")[row]].stored,))

    def patches(self, row: int) -> np.ndarray:
        """Pixels of a sample's patches, uint8 (T, *layout.patch_shape): (T, P, 16, 16, C), or bytes where pictures
        differ in channels; `layout.split_patches` and `level_patches` read them."""
        return self._array(row, "patches", np.uint8, self.layouts[self.column("task")[row]].patch_shape)

    def reward(self, row: int) -> np.ndarray:
        """float32 (T,)."""
        return self._array(row, "reward", np.float32, ())

    def observation(self, row: int) -> np.ndarray | None:
        """Raw observations of a control task, float32 (T, D); None where the sample has none."""
        return self._raw(row, "observation")

    def action(self, row: int) -> np.ndarray | None:
        """Raw continuous actions, float32 (T, A); None where actions are discrete."""
        return self._raw(row, "action")

    def _raw(self, row: int, member: str) -> np.ndarray | None:
        if self.column(f"{member}_offset")[row] < 0:
            return None
        width = int(self.column(f"{member}_bytes")[row]) // (4 * max(1, int(self.column("timesteps")[row])))
        return self._array(row, member, np.float32, (width,))

    def _array(self, row: int, member: str, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
        offset, T = int(self.column(f"{member}_offset")[row]), int(self.column("timesteps")[row])
        if offset < 0:
            raise DatasetError(f"{self.place}: sample {row} has no member '{member}'")
        number = int(self.column("shard")[row])
        data = self.mapped(number)
        try:
            return np.ndarray((T, *shape), dtype, data, offset)
        except (TypeError, ValueError):
            name = self.shard(number).name
            raise BadShard(
                f"{self.place.path(name)}: sample {row} points beyond its end; rebuild it", self, number
            ) from None

    def mapped(self, number: int) -> np.ndarray:
        """The bytes (n,) uint8 of a shard; BadShard where it is missing or damaged."""
        key = (self.place.place, number)
        found = self.store.maps.get(key)
        if found is not None:
            return found
        if number in self.bad:
            raise BadShard(self.bad[number], self, number)
        shard = self.shard(number)
        try:
            found = self.store.maps.open(key, self.verified_path(shard, hashed=False))
        except (BadFile, FileNotFoundError) as error:
            raise BadShard(str(error), self, number) from error
        except OSError as error:
            raise DatasetError(
                f"{self.place.path(shard.name)}: {error.strerror}; allow more open files (ulimit -n), or reading it"
            ) from error
        if len(found) != shard.bytes:
            raise BadShard(
                f"{self.place.path(shard.name)}: was cut while it was opened; {_again(self.place)}", self, number
            )
        return found

    def prefetch(self, number: int) -> None:
        """Bring a remote shard into the cache, unless it is mapped or bad. CacheFull where there is no room now."""
        if self.store.maps.get((self.place.place, number)) is None and number not in self.bad:
            with suppress(BadFile):  # whoever needs it will report it
                self.store.cache.fetch(self.place, self.shard(number))

    def text_model(self) -> bytes | None:
        """The model of its text tokenizer; None where it holds no text. BadFile where it is missing or damaged."""
        text = self.manifest.text_model
        return Path(self.verified_path(text.file, hashed=True)).read_bytes() if text else None

    def local(self, file: Shard | FileDigest) -> Path:
        """The path of a file on this machine; a remote one is fetched into the cache. BadFile, or DatasetError where
        the cache stays full."""
        if self.place.local is not None:
            return self.place.local / self._inside(file).name
        patience = time.monotonic() + self.store.cache.config.stall_seconds
        while True:
            try:
                return self.store.cache.fetch(self.place, self._inside(file))
            except CacheFull:
                if not self.store.maps.drop_oldest():
                    if time.monotonic() > patience:
                        raise
                    time.sleep(FULL_PAUSE)  # other processes may let go of theirs

    def _inside(self, file: Any) -> Any:
        if "/" in file.name or file.name in ("", ".", ".."):
            raise DatasetError(f"{self.place}: file name '{file.name}' leaves the folder; refused")
        if not SHA256_HEX.fullmatch(file.sha256):
            raise DatasetError(f"{self.place.path(file.name)}: sha256 '{file.sha256}' is none; refused")
        return file

    def _table(self, file: FileDigest, schema: pa.Schema) -> pa.Table:
        """A mapped table. Its hash is always checked, since whatever is read is found through it."""
        path = self.verified_path(file, hashed=True)
        try:
            table = pa.ipc.open_file(pa.py_buffer(mapped_bytes(path))).read_all()
            table.validate()
        except (pa.ArrowException, OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise DatasetError(f"{self.place.path(file.name)}: {reason}; {_again(self.place)}") from None
        if not table.schema.equals(schema):
            raise DatasetError(f"{self.place.path(file.name)}: unexpected columns; rebuild it with python -m etl.build")
        if table.num_rows != file.rows or any(column.null_count for column in table.columns):
            raise DatasetError(f"{self.place.path(file.name)}: rows or values are missing; {_again(self.place)}")
        return table

    def check(self, hashed: bool, shards: bool) -> None:
        """Sizes, and hashes where asked, of the tables and of the shards; a remote one's as each file arrives."""
        if self.place.local is not None:
            for file in self.manifest.files:
                self.verified_path(file, hashed)
        for number in range(self.manifest.shards.rows if shards else 0):
            try:
                self.verified_path(self.shard(number), hashed)
            except BadFile as error:
                if not self.skip:
                    raise
                self.bad[number] = str(error)

    def verified_path(self, file: Shard | FileDigest, hashed: bool) -> Path | str:
        """The path of a file on this machine, of the right size and, if asked, hash. BadFile where it is not; a copy in
        the cache is then fetched again."""
        if self.place.local is None:
            path = self.local(file)
            if hashed and sha256_of(path) != file.sha256:
                self.store.cache.discard(file)
                path = self.local(file)
            return path
        name = self.place.path(self._inside(file).name)
        try:
            size = os.stat(name).st_size
        except (FileNotFoundError, NotADirectoryError):
            raise BadFile(f"{name}: missing; {_again(self.place)}") from None
        if size != file.bytes:
            said = f"{size} bytes, the manifest says {file.bytes}"
            raise BadFile(f"{name}: {said}; remove it and {_again(self.place)}")
        if hashed and sha256_of(name) != file.sha256:
            said = "sha256 differs from the manifest, the file is damaged"
            raise BadFile(f"{name}: {said}; remove it and {_again(self.place)}")
        return name


def check(datasets: Sequence[Dataset], verify: Verify) -> None:
    """Check datasets as `verify` asks of all of them together. DatasetError names the first bad file."""
    small = sum(dataset.manifest.bytes for dataset in datasets) <= AUTO_BYTES
    few = sum(dataset.manifest.shards.rows for dataset in datasets) <= AUTO_SHARDS
    for dataset in datasets:
        local = dataset.place.local is not None
        hashed = verify == "full" or (verify == "auto" and small)
        dataset.check(hashed, shards=verify == "full" or (local and (few or verify == "size")))


def _again(place: Folder) -> str:
    return f"run python -m etl.build --output {place} again with the same arguments"
