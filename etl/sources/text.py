"""Text for the text range of the vocabulary: JSON lines, Parquet, plain text; one file or a folder, one task.

.jsonl   (also .json of lines)  one object a line, its text under --text-field ("text")
.parquet                        one document a row, in the string column of that name
.txt .md                        one document between blank lines
any but .parquet may be packed: .gz, .zst, .xz, .bz2; other archives are passed over, and named

JSON lines and Parquet files, with their field, are what text corpora come in (C4, The Pile, Dolma). `scan` reads
the files once and notes each document's place; `read` goes to it. A place is in bytes (JSON lines, plain text) or
in characters of a running count (Parquet, where the row is the position).

Invariant: documents come in the order of sorted files and places; an unreadable one is a rejection, not an end.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from etl.sources import (
    EpisodeRef,
    Known,
    NoOptions,
    Recognition,
    Rejection,
    SourceError,
    TaskScan,
    _packed,
    _recognition,
)
from schemas.episode import Document, FieldSpec, TaskSpec

SUFFIXES = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "plain", ".md": "plain"}
ARCHIVES = {".zip", ".tar", ".tgz", ".7z", ".rar", ".lz4", ".br", ".z"}  # which are not read
LONGEST = 2**24  # bytes a document: a longer line or paragraph is refused, so that memory stays bounded
BATCH = 64  # Parquet rows at a time


@dataclass(frozen=True)
class Options(NoOptions):
    """Options for reading texts."""

    text_field: str = "text"
    """Field of JSON lines and column of Parquet files that holds the text."""


class Text:
    """Source of text documents in .jsonl, .parquet, .txt and .md files."""

    name = "text"
    default_dataset = ""
    options = Options
    writer = None

    def known(self, cache: Path) -> list[Known]:
        """None: texts are the user's own."""
        return []

    def recognise(self, input: Path) -> Recognition | None:
        """By the endings of all or most files. A Parquet file counts where it has a column of strings, a .json file
        where its first line has a "text"."""
        files = _recognition.files_below(input)
        texts = [path for path in files if path.suffix in SUFFIXES]
        lines = _recognition.first_with(texts, ".json")
        if not all(isinstance(_parsed(_recognition.first_line(path), "text"), str) for path in lines):
            return None
        tables = [path for path in texts if SUFFIXES[path.suffix] == "parquet"][: _recognition.FEW]
        schemas = [schema for schema in map(_recognition.parquet_schema, tables) if schema is not None]
        strings = [any(pa.types.is_string(c.type) or pa.types.is_large_string(c.type) for c in s) for s in schemas]
        if 2 * len(texts) <= len(files) or (tables and not any(strings)):
            return None
        endings = ", ".join(sorted({path.suffix for path in texts}))
        certain = len(texts) == len(files) and all("text" in schema.names for schema in schemas)
        return Recognition(
            f"{len(texts)} of {len(files)} files end in {endings}",
            _recognition.LAYOUT if certain else _recognition.FALLBACK,
        )

    def resolve(self, input: Path | None, dataset: str | None, cache: Path) -> list[Path]:
        """The input file, or all text files below the input folder. SourceError where there is none."""
        if input is None:
            raise SourceError("source text has no download; give --input a .jsonl, .parquet or .txt file, or a folder")
        if dataset is not None:
            raise SourceError("source text knows no --dataset; give --input the file or folder you want")
        if input.is_file():
            if _kind(input) is None:
                raise SourceError(f"{input}: not a text file; {_ENDINGS}{_unpack([input])}")
            return [input]
        below = sorted(p for p in _recognition.all_files_below(input) if p.is_file())
        found = [p for p in below if _kind(p) is not None]
        archives = [p for p in below if _is_archive(p)]
        if not found:
            raise SourceError(f"{input}: no text file in it; {_ENDINGS}{_unpack(archives)}")
        return found + archives

    def scan(self, files: list[Path], options: Options) -> list[TaskScan]:
        """One TaskScan of all files, named after the folder or the only file that they lie in."""
        files = sorted(map(Path, files))
        archives = [path for path in files if _kind(path) is None]
        files = [path for path in files if _kind(path) is not None]
        name = f"text-{Path(_packed.plain_name(files[0])).stem if len(files) == 1 else _common(files).name}"
        task = TaskSpec(name, self.name, (FieldSpec(options.text_field, "text", (1,)),), None)
        refs: list[EpisodeRef] = []
        rejected: list[Rejection] = []
        for path in files:
            try:
                refs += _places(path, options.text_field)
            except _packed.DAMAGE as error:
                refs = [ref for ref in refs if ref.file != str(path)]
                rejected.append(Rejection(name, path.name, -1, 0, "unreadable", f"{_why(error)}; write the file again"))
        warnings = (f"{name}: passed over{_unpack(archives)}",) if archives else ()
        return [TaskScan(task if refs else None, tuple(refs), tuple(rejected), warnings=warnings)]

    def parts(self, file: str) -> list[Path]:
        """The file itself."""
        return [Path(file)]

    def read(self, task: TaskSpec, refs: Iterable[EpisodeRef]) -> Iterator[Document | Rejection]:
        """Documents in the order of refs."""
        field = task.observation[0].key
        for file, group in groupby(refs, key=lambda ref: ref.file):
            path = Path(file)
            for ref, result in _READERS[_kind(path) or "plain"](path, list(group), field):
                if isinstance(result, str):
                    yield Document(result, path.name, ref.position, ref.start)
                else:
                    yield Rejection(task.name, path.name, ref.position, ref.start, *result.args)


SOURCE = Text()


_ENDINGS = f"known endings: {', '.join(SUFFIXES)}, all but .parquet also with {', '.join(_packed.SUFFIXES)}"


def _kind(path: Path) -> str | None:
    """How documents lie in a file, by its name: json, plain or parquet; None where it is no text."""
    kind = SUFFIXES.get(Path(_packed.plain_name(path)).suffix)
    return None if kind == "parquet" and path.suffix in _packed.SUFFIXES else kind


def _is_archive(path: Path) -> bool:
    return path.suffix.lower() in ARCHIVES or (path.suffix in _packed.SUFFIXES and ".tar" in path.suffixes)


def _unpack(archives: list[Path]) -> str:
    """Advice on files that are no text as they are; '' without any."""
    packed = [path for path in archives if _is_archive(path)]
    if not packed:
        return ""
    more = f" and {len(packed) - 3} more" if len(packed) > 3 else ""
    return f"; {', '.join(path.name for path in packed[:3])}{more} must be unpacked first"


def _why(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


class _Bad(ValueError):
    """(reason, detail) of a document that cannot be used."""


def _places(path: Path, field: str) -> Iterator[EpisodeRef]:
    """Place of each document in a file. OSError, ArrowException or ValueError where the file is none."""
    if _kind(path) == "parquet":
        yield from _rows(path, field)
        return
    blank_lines = _kind(path) == "plain"
    position = start = stop = 0
    file = _packed.opened(path)
    file.seek(0)
    while line := file.readline(LONGEST):
        begin, stop = stop, stop + len(line)
        if not blank_lines:
            if line.strip():
                yield EpisodeRef(str(path), position, begin, stop)
                position += 1
        elif not line.strip():
            if begin > start:
                yield EpisodeRef(str(path), position, start, begin)
                position += 1
            start = stop
        elif stop - start > LONGEST:
            yield EpisodeRef(str(path), position, start, stop)  # a paragraph without end: cut here
            position, start = position + 1, stop
    if blank_lines and stop > start:
        yield EpisodeRef(str(path), position, start, stop)


def _rows(path: Path, field: str) -> Iterator[EpisodeRef]:
    running = 0
    for first, column in _columns(path, field):
        sizes = pc.binary_length(column).fill_null(0).to_pylist()
        for n, size in enumerate(sizes):
            yield EpisodeRef(str(path), first + n, running, running + max(1, size))
            running += max(1, size)


def _columns(path: Path, field: str, wanted: int = 0) -> Iterator[tuple[int, pa.Array]]:
    """(first row, texts) of each batch of a Parquet file from the row group of row `wanted` on."""
    file = pa.parquet.ParquetFile(path)
    names = file.schema_arrow.names
    kind = file.schema_arrow.field(field).type if names.count(field) == 1 else None
    if kind is None or not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise ValueError(f"no one string column '{field}' (there is {_few(names)}); name one with --text-field")
    first = 0
    for group in range(file.num_row_groups):
        rows = file.metadata.row_group(group).num_rows
        if first + rows <= wanted:
            first += rows
            continue
        for batch in file.iter_batches(BATCH, row_groups=[group], columns=[field]):
            yield first, batch.column(0)
            first += len(batch)


def _read_bytes(path: Path, refs: list[EpisodeRef], field: str) -> Iterator[tuple[EpisodeRef, str | _Bad]]:
    file = _packed.opened(path)
    for ref in refs:
        try:
            file.seek(ref.start)
            data = file.read(ref.stop - ref.start)
            if len(data) < ref.stop - ref.start:
                raise EOFError(f"ends at byte {ref.start + len(data)} of {ref.stop}")
        except _packed.DAMAGE as error:
            yield ref, _Bad("unreadable", f"{_why(error)}; write the file again")
            continue
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            yield ref, _Bad("not UTF-8", f"{error.reason} at byte {ref.start + error.start}; save it as UTF-8")
            continue
        yield ref, _parsed(text, field) if _kind(path) == "json" else text.strip()


def _parsed(line: str, field: str) -> str | _Bad:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        return _Bad("not JSON", f"{str(error)[:120]}; write one object a line")
    text = value.get(field) if isinstance(value, dict) else None
    if not isinstance(text, str):
        found = _few(list(value)) if isinstance(value, dict) else type(value).__name__
        return _Bad("missing key", f"no text under '{field}' (there is {found}); name the field with --text-field")
    return _clean(text)


def _read_rows(path: Path, refs: list[EpisodeRef], field: str) -> Iterator[tuple[EpisodeRef, str | _Bad]]:
    """Row groups before the first wanted row and after the last one are not read."""
    wanted = iter(refs)
    ref = next(wanted, None)
    try:
        for first, column in _columns(path, field, refs[0].position):
            while ref is not None and first <= ref.position < first + len(column):
                value = column[ref.position - first].as_py()
                yield ref, _Bad("missing key", f"no text under '{field}'") if value is None else _clean(value)
                ref = next(wanted, None)
            if ref is None:
                return
    except (OSError, pa.ArrowException, ValueError) as error:
        while ref is not None:
            yield ref, _Bad("unreadable", f"{str(error).splitlines()[0][:200]}; write the file again")
            ref = next(wanted, None)


def _few(names: list[str]) -> str:
    return ", ".join(name[:40] for name in names[:8]) or "none"


def _clean(text: str) -> str | _Bad:
    """Half surrogates, which JSON can spell, are no text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return _Bad("not UTF-8", f"{error.reason} at character {error.start}")
    return text


_READERS = {"json": _read_bytes, "plain": _read_bytes, "parquet": _read_rows}


def _common(files: list[Path]) -> Path:
    """The deepest folder that holds all files."""
    folder = files[0].parent
    while not all(path.is_relative_to(folder) for path in files):
        folder = folder.parent
    return folder
