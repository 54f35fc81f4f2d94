"""TFRecord files of tf.train.Example, read without TensorFlow.

file (plain or gzip) -> frames: length u64, its masked CRC-32C, data, the data's -> `Records`
data -> protobuf's wire format: Features.feature, a map of name to one list -> {name: array}

Lists of floats are views of the record, lists of integers are decoded by numpy, strings and pictures are slices.

Invariant: a record is given whole and with a right checksum, or an EpisodeError says which one is damaged; nothing is
allocated that the file's own bytes do not fill.
"""

from __future__ import annotations

import os
import threading
from array import array
from collections.abc import Container, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from etl.sources import _gzip
from schemas.episode import EpisodeError

AGAIN = "download or write the file again"
RECORD_BYTES = 2**31  # protobuf's own limit
HEADER, FOOTER = 12, 4
MASK_DELTA = 0xA282EAD8
VARINT_BYTES = 10
FEW = 32  # bytes of integers that numpy takes longer for
FLOAT = np.dtype("<f4")
OUTLINE_BYTES = 2**14  # beside the packed values, of a record whose outline is kept
PACKED = (2, 3)  # lists of floats and of integers
Values = np.ndarray | list[bytes]
Outline = list[tuple[str, int, list[int | tuple[int, int]]]]


class Records:
    """The records of one file, in order, by position or by offset. EpisodeError ('truncated TFRecord', 'corrupt
    TFRecord', 'missing file') names the byte."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self.stamp = _stamp(path)
            self.size = self.stamp[0]
            with open(path, "rb") as file:
                head = file.read(HEADER)
            self.gzip = head[:2] == b"\x1f\x8b" and not _is_header(head)
            self.file: Any = _gzip.Gunzip(path) if self.gzip else open(path, "rb")  # noqa: SIM115
        except OSError as error:
            raise EpisodeError("missing file", f"{path.name} cannot be opened ({error.strerror}); {AGAIN}") from None
        self.starts = array("q", [0])  # bytes where the records known so far begin, and where the next one does

    def __enter__(self) -> Records:
        return self

    def __exit__(self, *_: Any) -> None:
        self.file.close()

    def is_of(self, path: Path) -> bool:
        """True if that file is this one, as it was when it was opened."""
        try:
            return path == self.path and _stamp(path) == self.stamp
        except OSError:
            return False

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        """(offset, data) of each record. A damaged one ends the iteration: where the next begins is unknown."""
        at = 0
        self._seek(0)
        while (length := self._header(at)) is not None:
            yield at, self._data(at, length)
            at += HEADER + length + FOOTER

    def record(self, position: int, check: bool = True) -> bytes | None:
        """The `position`-th record; None where the file ends before it. Those before it are skipped by their headers.
        `check`: its checksum, which a scan may leave to the reading."""
        while position >= len(self.starts) - 1:
            at = self.starts[-1]
            self._seek(at)
            if (length := self._header(at)) is None:
                return None
            self.starts.append(at + HEADER + length + FOOTER)
            if position == len(self.starts) - 2:
                return self._data(at, length, check)
        return self.read(self.starts[position], check)

    def wanted(self, position: int) -> bytes:
        """The `position`-th record. EpisodeError where the file ends before it, or it is damaged."""
        data = self.record(position)
        if data is None:
            raise EpisodeError("empty", f"no record {position} in it; {AGAIN}")
        return data

    def read(self, offset: int, check: bool = True) -> bytes:
        """The record that begins at that byte."""
        self._seek(offset)
        length = self._header(offset)
        if length is None:
            raise self._truncated(offset)
        return self._data(offset, length, check)

    def _header(self, at: int) -> int | None:
        """Length of the record whose header comes next; None at the end of the file."""
        head = self._bytes(HEADER)
        if not head:
            return None
        if len(head) < HEADER:
            raise self._truncated(at)
        if not _is_header(head):
            raise EpisodeError("corrupt TFRecord", f"{self.path.name}: no record begins at byte {at}; {AGAIN}")
        length = int.from_bytes(head[:8], "little")
        if length > RECORD_BYTES:
            raise EpisodeError("too large", f"{self.path.name}: a record of {length} bytes; store shorter episodes")
        if not self.gzip and at + HEADER + length + FOOTER > self.size:
            raise self._truncated(at)
        return length

    def _data(self, at: int, length: int, check: bool = True) -> bytes:
        data, stored = self._bytes(length), self._bytes(FOOTER)
        if len(data) < length or len(stored) < FOOTER:
            raise self._truncated(at)
        if check and masked_crc32c(data) != int.from_bytes(stored, "little"):
            where = f"{self.path.name}: the record at byte {at} does not match its checksum"
            raise EpisodeError("corrupt TFRecord", f"{where}; {AGAIN}")
        return data

    def _bytes(self, count: int) -> bytes:
        try:
            return self.file.read(count)
        except _gzip.DAMAGE as error:
            raise EpisodeError("corrupt gzip", f"{self.path.name}: {error}; {AGAIN}") from None

    def _seek(self, at: int) -> None:
        try:
            self.file.seek(at)
        except _gzip.DAMAGE as error:
            raise EpisodeError("corrupt gzip", f"{self.path.name}: {error}; {AGAIN}") from None

    def _truncated(self, at: int) -> EpisodeError:
        return EpisodeError("truncated TFRecord", f"{self.path.name} ends in the record at byte {at}; {AGAIN}")


def _stamp(path: Path) -> tuple[int, int, int, int]:
    status = path.stat()
    return status.st_size, status.st_ino, status.st_mtime_ns, os.getpid()  # a fork shares its parent's place in files


def frame(data: bytes) -> bytes:
    """One record as it is written."""
    length = len(data).to_bytes(8, "little")
    return b"".join((length, _masked(length), data, _masked(data)))


def example(data: bytes, wanted: Container[str] | None = None) -> dict[str, Values]:
    """The features of a tf.train.Example: float32 (N,), int64 (N,) or a list of bytes each; an unset one is an empty
    list. `wanted`: only these names. EpisodeError ('corrupt Example') for bytes that are none."""
    found: dict[str, Values] = {}
    for name, kind, spans in outline(data) if wanted is None else parsed(data, wanted):
        found[name] = _values(data, kind, spans)
    return found


_outlines = threading.local()


def outline(data: bytes) -> Outline:
    """`parsed`, or the outline of the record before it where this one differs in packed values alone."""
    held = getattr(_outlines, "last", None)
    if held is not None and len(data) == held[0] and _between(data, held[1]) == held[2]:
        return held[3]
    found = parsed(data)
    packed = sorted(span for _, kind, spans in found if kind in PACKED for span in spans if isinstance(span, tuple))
    if len(data) - sum(stop - start for start, stop in packed) <= OUTLINE_BYTES:
        _outlines.last = len(data), packed, _between(data, packed), found
    return found


def _between(data: bytes, spans: list[tuple[int, int]]) -> bytes:
    """All bytes but those of the spans, which are ascending and apart."""
    edges = [0, *chain(*spans), len(data)]
    return b"".join([data[start:stop] for start, stop in zip(edges[::2], edges[1::2])])


def parsed(data: bytes, wanted: Container[str] | None = None) -> Outline:
    """Each wanted feature of a record: its name, the kind of its list, and where the values lie. It reads no packed
    value, so records that differ in those alone have one outline."""
    found: Outline = []
    for number, features in _fields(data, 0, len(data)):
        if number == 1:
            for tag, entry in _fields(data, *_span(features)):
                if tag == 1:
                    name, feature = _entry(data, *_span(entry))
                    if wanted is None or name in wanted:
                        found.append((name, *_lists(data, *(feature or (0, 0)))))
    return found


def _entry(data: bytes, start: int, stop: int) -> tuple[str, tuple[int, int] | None]:
    name, feature = "", None
    for number, value in _fields(data, start, stop):
        if number == 1:
            try:
                name = data[slice(*_span(value))].decode()
            except UnicodeDecodeError:
                raise _wrong() from None
        elif number == 2:
            feature = _span(value)
    return name, feature


def _lists(data: bytes, start: int, stop: int) -> tuple[int, list[int | tuple[int, int]]]:
    """A Feature: bytes_list 1, float_list 2, int64_list 3; each holds `value` 1, packed or one by one."""
    kind, found = 0, (0, 0)
    for number, value in _fields(data, start, stop):
        if number in (1, 2, 3):
            kind, found = number, _span(value)
    return kind, [value for number, value in _fields(data, *found) if number == 1]


def _values(data: bytes, kind: int, values: list[int | tuple[int, int]]) -> Values:
    if kind not in PACKED:
        return [data[slice(*_span(value))] for value in values]
    dtype: type = np.float32 if kind == 2 else np.int64
    parts: list[np.ndarray] = []
    for value in values:
        if isinstance(value, tuple):
            first, last = value
            if kind == 2:
                if (last - first) % 4:
                    raise _wrong()
                parts.append(np.frombuffer(data, FLOAT, (last - first) // 4, first))
            elif last - first <= FEW:
                parts.append(_few_varints(data[first:last]))
            else:
                parts.append(_varints(np.frombuffer(data, np.uint8, last - first, first)))
        elif kind == 2:
            parts.append(np.array([value], np.uint32).view("<f4"))
        else:
            parts.append(np.array([value], np.uint64).view(np.int64))
    return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, dtype), *parts])


def _fields(data: bytes, start: int, stop: int) -> Iterator[tuple[int, int | tuple[int, int]]]:
    """(number, value) of each field of a message: an integer, or the (start, stop) of bytes."""
    at = start
    while at < stop:
        tag, at = (data[at], at + 1) if data[at] < 128 else _varint(data, at, stop)
        wire = tag & 7
        if wire == 0:
            value, at = _varint(data, at, stop)
            yield tag >> 3, value
            continue
        if wire == 2:
            size, at = _varint(data, at, stop)
        else:
            size = {1: 8, 5: 4}.get(wire, -1)
        if size < 0 or at + size > stop:
            raise _wrong()
        yield tag >> 3, (at, at + size) if wire == 2 else int.from_bytes(data[at : at + size], "little")
        at += size


def _varint(data: bytes, at: int, stop: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 7 * VARINT_BYTES, 7):
        if at >= stop:
            break
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value & (2**64 - 1), at
    raise _wrong()


def _varints(packed: np.ndarray) -> np.ndarray:
    """All of a packed list, (N,) int64."""
    last = packed < 128
    if last.all():
        return packed.astype(np.int64)
    stops = np.flatnonzero(last)
    starts = np.concatenate([[0], stops[:-1] + 1]) if len(stops) else stops
    if not last[-1] or (stops - starts).max() >= VARINT_BYTES:
        raise _wrong()
    place = np.arange(len(packed)) - np.repeat(starts, stops - starts + 1)
    shifted = (packed & 127).astype(np.uint64) << (7 * place).astype(np.uint64)
    return np.add.reduceat(shifted, starts).view(np.int64)


def _few_varints(packed: bytes) -> np.ndarray:
    """`_varints` of FEW bytes."""
    values: list[int] = []
    value = shift = 0
    for byte in packed:
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            values.append(value & (2**64 - 1))
            value = shift = 0
        elif shift == 7 * VARINT_BYTES:
            raise _wrong()
    if shift:
        raise _wrong()
    return np.array(values, np.uint64).view(np.int64)


def _span(value: int | tuple[int, int]) -> tuple[int, int]:
    if not isinstance(value, tuple):
        raise _wrong()
    return value


def _wrong() -> EpisodeError:
    return EpisodeError("corrupt Example", f"a record is no tf.train.Example; {AGAIN}")


def masked_crc32c(data: bytes) -> int:
    """The checksum that TFRecord stores."""
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + MASK_DELTA) & 0xFFFFFFFF


def _is_header(head: bytes) -> bool:
    return len(head) == HEADER and _masked(head[:8]) == head[8:]


def _masked(data: bytes) -> bytes:
    return masked_crc32c(data).to_bytes(4, "little")
