"""Writing a dataset: shards first, then index and rejections, the manifest last.

A shard is a plain uncompressed tar that an unmodified webdataset reads: one
sample is one episode, its members `KEY.tokens.npy`, `KEY.patches.npy`, ...,
`KEY.meta.json`. While writing, each member's byte offset is noted for the index.

Invariant: a shard's bytes depend on its samples alone (fixed tar metadata), and
a name without a leading dot is a complete file.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
from functools import lru_cache
from io import BytesIO

import numpy as np
import pyarrow as pa

from schemas.dataset import MANIFEST_NAME, MEMBERS, FileDigest, Manifest, SampleMeta, Shard
from shards.folder import Folder, digest_of

BLOCK = 512
PIECE = 2**18
SMALL = 2**14  # bytes: members below it are gathered, so that few calls write many
AHEAD = 2**23


def shard_name(number: int) -> str:
    return f"shard-{number:06d}.tar"


def sample_key(task: str, episode: int, start: int) -> str:
    """Name of a sample in its tar: of the piece of an episode that begins at timestep `start`."""
    return f"{task.replace('.', '_').replace('/', '_')}-{episode:07d}-{start:07d}"


class ShardWriter:
    """One shard, written to a temporary name; `close` makes it durable and gives it its name."""

    def __init__(self, folder: Folder, name: str):
        self.folder, self.name = folder, name
        self.temporary = folder.temporary(name)
        self.file = open(self.temporary, "wb")  # noqa: SIM115
        self.digest = hashlib.sha256()
        self.offset = self.written = self.started = self.samples = self.timesteps = 0
        self.waiting: list[bytes] = []

    def add(self, key: str, members: dict[str, np.ndarray], meta: SampleMeta) -> dict[str, int]:
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
            header = npy_header(array.dtype.str, array.shape)
            payload = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
            start = self._member(f"{key}.{name}.npy", header, payload)
            where |= {f"{name}_offset": start + len(header), f"{name}_bytes": len(payload)}
        self._member(f"{key}.meta.json", meta.to_json(), memoryview(b""))
        self.samples += 1
        self.timesteps += meta.timesteps
        return where

    def close(self) -> Shard:
        """Finish the tar, make it durable, give it its final name."""
        self._write(b"\0" * (2 * BLOCK))
        self._flush()
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        self.folder.publish(self.temporary, self.name)
        return Shard(self.name, self.offset, self.digest.hexdigest(), self.samples, self.timesteps)

    def abort(self) -> None:
        """Remove the temporary file."""
        self.file.close()
        self.temporary.unlink(missing_ok=True)

    def _member(self, name: str, head: bytes, body: memoryview) -> int:
        size = len(head) + len(body)
        start = self.offset + BLOCK
        header, padding = tar_header(name, size) + head, bytes(-size % BLOCK)
        if size < SMALL:
            self._write(b"".join((header, body, padding)))
            return start
        self._write(header)
        self._flush()
        self.offset += len(body)
        self._put(body)
        self._write(padding)
        return start

    def _write(self, data: bytes) -> None:
        """Small parts wait for others."""
        self.offset += len(data)
        self.waiting.append(data)
        if self.offset - self.written >= PIECE:
            self._flush()

    def _flush(self) -> None:
        self._put(memoryview(b"".join(self.waiting)))
        self.waiting = []

    def _put(self, data: memoryview) -> None:
        """Write piece by piece, hashed while the processor's cache still holds it."""
        for start in range(0, len(data), PIECE):
            piece = data[start : start + PIECE]
            self.file.write(piece)
            self.digest.update(piece)
        self.written = self.offset
        if self.written - self.started >= AHEAD and hasattr(os, "posix_fadvise"):
            # asks the disk to begin, so that `close` waits for the last bytes only
            os.posix_fadvise(self.file.fileno(), self.started, self.written - self.started, os.POSIX_FADV_DONTNEED)
            self.started = self.written


def tar_header(name: str, size: int) -> bytes:
    """The tar header of a file of mode 644 without owner or time, in the ustar format, as tarfile makes it."""
    encoded = name.encode()
    if len(encoded) > 100 or size >= 8**11:
        info = tarfile.TarInfo(name)
        info.size = size
        return info.tobuf(tarfile.USTAR_FORMAT)
    octal = b"%011o" % size
    checksum = b"%06o" % (_NO_FILE_SUM + sum(encoded) + sum(octal))
    return b"".join((encoded.ljust(100, b"\0"), _NO_FILE[100:124], octal, _NO_FILE[135:148], checksum, _NO_FILE[154:]))


_NO_FILE = tarfile.TarInfo("").tobuf(tarfile.USTAR_FORMAT)
# with spaces for the checksum, as its definition asks, and without the size
_NO_FILE_SUM = sum(_NO_FILE[:124]) + sum(_NO_FILE[135:148]) + 8 * ord(" ") + sum(_NO_FILE[156:])


@lru_cache(maxsize=4096)
def npy_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """The first bytes of an .npy file of such an array."""
    header = BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": dtype, "fortran_order": False, "shape": shape})
    return header.getvalue()


def write_table(folder: Folder, name: str, table: pa.Table) -> FileDigest:
    """Write index.arrow or shards.arrow, an Arrow IPC file of a single record batch, so that it maps without a copy."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks(), max_chunksize=max(1, table.num_rows))
    return write_file(folder, name, sink.getvalue().to_pybytes(), table.num_rows)


def write_file(folder: Folder, name: str, data: bytes, rows: int) -> FileDigest:
    """Write a small file in one step; returns its entry for the manifest."""
    folder.write(name, data)
    return FileDigest(name, len(data), digest_of(data), rows)


def write_manifest(folder: Folder, manifest: Manifest) -> None:
    """Write dataset.json, the last step of a build."""
    folder.write(MANIFEST_NAME, manifest.to_json().encode())
