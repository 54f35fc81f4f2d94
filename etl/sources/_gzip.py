"""A gzip file as a forward stream that can also go back: it remembers points to resume from.

compressed file -> zlib-ng -> bytes; every MARK bytes a copy of the decompressor's state (some 40 kB) is kept

Invariant: no byte is decompressed more than once, plus at most MARK bytes for each step back; memory does not
depend on the file's size but for one mark every MARK bytes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from zlib_ng import zlib_ng as zlib

DAMAGE: tuple[type[Exception], ...] = (OSError, EOFError, zlib.error)
CHUNK = 2**16  # compressed bytes a read
PIECE = 2**20  # decompressed bytes per step of skipping
MARK = 2**26


class Gunzip:
    """Decompressed bytes of a gzip file, of several members too. Reading raises zlib.error, or EOFError where the
    file ends in the middle; checksums are checked as members end."""

    def __init__(self, path: Path):
        self.file = open(path, "rb")  # noqa: SIM115
        self.position = 0
        self.pending = b""
        self.inflate: Any = zlib.decompressobj(31)
        self.ended = False
        # decompressed position, compressed position, state, bytes read but not consumed
        self.marks = [(0, 0, self.inflate.copy(), b"")]

    def read(self, count: int = -1, /) -> bytes:
        """Up to `count` bytes, fewer only at the end; without a count up to one step."""
        left = count if count >= 0 else PIECE
        pieces = []
        while left and (piece := self._piece(left)):
            pieces.append(piece)
            left -= len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def readinto(self, view: memoryview) -> int:
        """Some bytes into the front of `view`; 0 at the end."""
        piece = self._piece(len(view))
        view[: len(piece)] = piece
        return len(piece)

    def seek(self, position: int) -> None:
        """Move to a decompressed position: forwards by decompressing, backwards from the nearest mark."""
        if position < self.position:
            mark = max((m for m in self.marks if m[0] <= position), key=lambda m: m[0])
            self.position, offset, inflate, self.pending = mark
            self.inflate, self.ended = inflate.copy(), False
            self.file.seek(offset)
        while self.position < position:
            if not self._piece(min(PIECE, position - self.position)):
                raise EOFError(f"ends at byte {self.position} of {position}")

    def close(self) -> None:
        self.file.close()

    def _piece(self, most: int) -> bytes:
        """The next bytes, 1 to `most`; none at the end."""
        while not self.ended and most:
            if self.inflate.eof:
                rest = self.inflate.unused_data or self.file.read(CHUNK)
                if not rest.strip(b"\0"):  # zeros may pad the end
                    self.ended = True
                    break
                self.inflate, self.pending = zlib.decompressobj(31), rest
            if not self.pending:
                self.pending = self.file.read(CHUNK)
                if not self.pending:
                    raise EOFError("the compressed file ends in the middle")
            piece = self.inflate.decompress(self.pending, most)
            self.pending = self.inflate.unconsumed_tail
            if piece:
                self.position += len(piece)
                if self.position >= self.marks[-1][0] + MARK and not self.inflate.eof:
                    self.marks.append((self.position, self.file.tell(), self.inflate.copy(), self.pending))
                return piece
        return b""
