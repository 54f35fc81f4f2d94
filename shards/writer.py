"""Writing a dataset: shards first, then index and rejections, the manifest last.

A shard is a plain uncompressed tar that an unmodified webdataset reads: one
sample is one episode, its members `KEY.tokens.npy`, `KEY.patches.npy`, ...,
`KEY.meta.json`. While writing, each member's byte offset is noted for the index.

Invariant: a shard's bytes depend on its samples alone (fixed tar metadata), and
a name without a leading dot is a whole file.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from io import BytesIO

import numpy as np
import pyarrow as pa

from schemas.dataset import INDEX_NAME, INDEX_SCHEMA, MANIFEST_NAME, MEMBERS, FileDigest, Manifest, Shard
from shards.folder import Folder, digest_of

BLOCK = 512


def shard_name(number: int) -> str:
    return f"shard-{number:06d}.tar"


class ShardWriter:
    """One shard, written to a temporary name; `close` makes it durable and gives it its name."""

    def __init__(self, folder: Folder, name: str):
        self.folder, self.name = folder, name
        self.temporary = folder.temporary(name)
        self.file = open(self.temporary, "wb")  # noqa: SIM115
        self.digest = hashlib.sha256()
        self.offset = self.samples = self.timesteps = 0

    def add(self, key: str, timesteps: int, members: dict[str, np.ndarray], meta: dict) -> dict[str, int]:
        """Append one sample. Returns `{member}_offset` and `{member}_bytes` of every known member,
        where the offset is that of the array's data; -1 and 0 where the sample has no such member."""
        if "." in key or "/" in key:
            raise ValueError(f"sample key '{key}' holds '.' or '/'")
        where: dict[str, int] = {}
        for name in MEMBERS:
            array = members.get(name)
            if array is None:
                where |= {f"{name}_offset": -1, f"{name}_bytes": 0}
                continue
            header = BytesIO()
            np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
            payload = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
            start = self._member(f"{key}.{name}.npy", header.getvalue(), payload)
            where |= {f"{name}_offset": start + len(header.getvalue()), f"{name}_bytes": len(payload)}
        self._member(f"{key}.meta.json", json.dumps(meta, sort_keys=True).encode(), memoryview(b""))
        self.samples += 1
        self.timesteps += timesteps
        return where

    def close(self) -> Shard:
        """Finish the tar, make it durable, give it its final name."""
        self._write(b"\0" * (2 * BLOCK))
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        self.folder.publish(self.temporary, self.name)
        return Shard(self.name, self.offset, self.digest.hexdigest(), self.samples, self.timesteps)

    def abort(self) -> None:
        """Leave nothing behind."""
        self.file.close()
        self.temporary.unlink(missing_ok=True)

    def _member(self, name: str, head: bytes, body: memoryview) -> int:
        info = tarfile.TarInfo(name)
        info.size = len(head) + len(body)
        info.mode = 0o644
        self._write(info.tobuf(tarfile.USTAR_FORMAT))
        start = self.offset
        self._write(head)
        self._write(body)
        self._write(b"\0" * (-info.size % BLOCK))
        return start

    def _write(self, data: bytes | memoryview) -> None:
        self.file.write(data)
        self.digest.update(data)
        self.offset += len(data)


def write_index(folder: Folder, columns: dict[str, list]) -> FileDigest:
    """Write index.arrow, an Arrow IPC file of a single record batch, so that it maps without a copy."""
    table = pa.table(columns, schema=INDEX_SCHEMA).combine_chunks()
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, INDEX_SCHEMA) as writer:
        writer.write_table(table, max_chunksize=max(1, table.num_rows))
    return write_file(folder, INDEX_NAME, sink.getvalue().to_pybytes(), table.num_rows)


def write_file(folder: Folder, name: str, data: bytes, rows: int) -> FileDigest:
    """Write a whole small file in one step and describe it for the manifest."""
    folder.write(name, data)
    return FileDigest(name, len(data), digest_of(data), rows)


def write_manifest(folder: Folder, manifest: Manifest) -> None:
    """The last act of a build."""
    folder.write(MANIFEST_NAME, manifest.to_json().encode())
