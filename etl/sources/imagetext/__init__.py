"""Pictures with captions in WebDataset tars, as img2dataset writes them: the paper's third kind of data.

KEY.jpg | .png  the picture       KEY.txt  the caption, or KEY.json with it under --caption-key ("caption")
    -> a timestep of its own: the picture's patches, then the caption's tokens and an end; no action

A picture is resized to --picture-size, a caption cut or padded to --caption-tokens. The caption is the target and the
picture is input: schemas/layout.py puts patches before text where a task has no action, and loss falls on text alone,
its padding left out. A folder of tars is one task. `scan` reads headers; `read` goes through a tar once.

Invariant: pairs come in the order of the sorted tars and their members; one without a picture, without a caption or
with a damaged one is a rejection.
"""

from __future__ import annotations

import json
import os
import tarfile
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, urlencode

import numpy as np
from PIL import Image

from etl.sources import (
    EpisodeRef,
    Known,
    NoOptions,
    Recognition,
    Rejection,
    SourceError,
    TaskScan,
    _pictures,
    _recognition,
)
from etl.sources._arrays import KEYS, path_of, rejection
from etl.sources._recognition import all_files_below
from schemas.episode import EpisodeError, FieldSpec, RawEpisode, TaskSpec
from schemas.layout import PATCH_SIZE
from schemas.ranges import require

PICTURES, TEXT, JSON = ("jpg", "jpeg", "png"), "txt", "json"
PICTURE, CAPTION = "picture", "caption"
HUB = "pixparse/cc3m-wds"
MEMBER_BYTES = 2**26
BLOCK = tarfile.BLOCKSIZE
MAGIC = (tarfile.POSIX_MAGIC, tarfile.GNU_MAGIC)
AGAIN = "download or pack the tar again"
DAMAGE: tuple[type[Exception], ...] = (tarfile.TarError, OSError, EOFError, ValueError, OverflowError)


@dataclass(frozen=True)
class Options(NoOptions):
    """Options for reading pictures with captions."""

    picture_size: tuple[int, int] = (128, 128)
    """Height and width in pixels, multiples of 16, that every picture is resized to."""
    caption_tokens: int = 32
    """Tokens of a caption, its end among them; longer ones are cut, and counted."""
    caption_key: str = "caption"
    """Key of the caption in a .json member, where there is no .txt."""

    def check(self) -> None:
        require("caption-tokens", self.caption_tokens, 2, 2**13)
        for side in self.picture_size:
            if side % PATCH_SIZE or not PATCH_SIZE <= side <= 2**12:
                raise ValueError(f"--picture-size {self.picture_size}: give multiples of {PATCH_SIZE}")


class Pair(NamedTuple):
    """Places of one sample's members in a tar: (first byte, bytes); None where there is none. `start`: where the
    first one's header does, -1 where reading cannot begin there."""

    start: int
    key: str
    picture: tuple[int, int] | None
    text: tuple[int, int] | None
    about: tuple[int, int] | None


class ImageText:
    """Source of pictures with captions (WebDataset of img2dataset)."""

    name = "imagetext"
    default_dataset = ""
    options = Options
    writer = None

    def known(self, cache: Path) -> list[Known]:
        """Datasets in the cache; any repository of such tars can be asked for by its id."""
        from etl.fetch import hub  # which needs this package

        return hub.known(cache / self.name)

    def recognise(self, input: Path) -> Recognition | None:
        """By the endings of a tar's first members."""
        for path in _recognition.first_with(_recognition.files_below(input), ".tar"):
            try:
                first = next(_pairs(path), None)
            except EpisodeError:
                continue
            if first and first.picture and (first.text or first.about):
                where = _recognition.below(input, path)
                return Recognition(f"{where} holds pictures with captions, such as {first.key[:60]}", 1)
        return None

    def resolve(self, input: Path | None, dataset: str | None, cache: Path) -> list[Path]:
        """The input tar, or all tars below the input folder, sorted. Without an input, `dataset`, a repository of the
        hub or a folder in one, is downloaded. SourceError where there is none."""
        if input is None and dataset is not None:
            from etl.fetch import hub  # which needs this package

            return hub.logs(dataset, cache / self.name, HUB, ".tar", lambda name: name.endswith(".tar"), _tars)
        if input is None:
            raise SourceError(f"source imagetext needs --input; give --dataset with a repository of the Hugging Face "
                              f"hub ({HUB}); or run img2dataset with --output_format webdataset, and give --input its "
                              "folder")  # fmt: skip
        if dataset is not None:
            raise SourceError("source imagetext knows no --dataset in a folder; give --input the file or folder you "
                              "want")  # fmt: skip
        found = [input] if input.is_file() else _tars(input)
        if not found:
            raise SourceError(f"{input}: no .tar in it; give --input img2dataset's folder")
        return found

    def scan(self, files: list[Path], options: Options) -> list[TaskScan]:
        """One TaskScan of all tars, named after their folder or the only one."""
        files = sorted(map(Path, files))
        folder = Path(os.path.commonpath([path.parent for path in files])).name
        name = f"imagetext-{files[0].stem if len(files) == 1 else folder}"
        fields = (
            FieldSpec(PICTURE, "image", (*options.picture_size, 3), resized=options.picture_size),
            FieldSpec(CAPTION, "text", (options.caption_tokens,)),
        )
        refs: list[EpisodeRef] = []
        rejected: list[Rejection] = []
        for path in files:
            named = options.caption_key != Options.caption_key
            place = f"{path}{KEYS}{urlencode({'caption_key': options.caption_key})}" if named else str(path)
            position = -1
            try:
                for position, _ in enumerate(_pairs(path)):
                    refs.append(EpisodeRef(place, position, position, position + 1))
            except EpisodeError as error:
                rejected.append(rejection(name, path.name, position + 1 if position >= 0 else -1, 0, error))
        task = TaskSpec(name, self.name, fields, None, max_episode_steps=1) if refs else None
        return [TaskScan(task, tuple(refs), tuple(rejected))]

    def parts(self, file: str) -> list[Path]:
        """The tar itself."""
        return [path_of(file)]

    def read(self, task: TaskSpec, refs: Iterable[EpisodeRef]) -> Iterator[RawEpisode | Rejection]:
        """Pairs in the order of refs: one timestep each, 'picture' (1, H, W, 3) uint8 and 'caption' (1,)."""
        height, width, _ = next(spec.shape for spec in task.observation if spec.key == PICTURE)
        for place, group in groupby(refs, key=lambda ref: ref.file):
            path, key = path_of(place), dict(parse_qsl(place.partition(KEYS)[2])).get("caption_key", "caption")
            own = list(group)
            try:
                file = open(path, "rb", buffering=0)  # noqa: SIM115
            except OSError as error:
                gone = EpisodeError("missing file", f"{path.name} cannot be opened ({error.strerror}); {AGAIN}")
                yield from (rejection(task.name, path.name, ref.position, ref.start, gone) for ref in own)
                continue
            with file:
                for ref, found in zip(own, _wanted(path, own, os.fstat(file.fileno())), strict=True):
                    try:
                        if isinstance(found, EpisodeError):
                            raise found
                        yield _read(found, file.fileno(), key, (height, width), path.name, ref)
                    except EpisodeError as error:
                        yield rejection(task.name, path.name, ref.position, ref.start, error)


SOURCE = ImageText()


def _tars(folder: Path) -> list[Path]:
    return sorted(path for path in all_files_below(folder) if path.suffix == ".tar")


def _pairs(path: Path, start: int = 0) -> Iterator[Pair]:
    """The samples of a tar, from the one whose header begins at `start` on: successive members of one name up to its
    first dot. EpisodeError ('corrupt tar') where its headers make no sense, or its end is missing."""
    try:
        size = path.stat().st_size
        with tarfile.open(path, "r:") as archive:
            for key, group in groupby(_members(archive, size, start), key=lambda member: member[0]):
                members = list(group)
                at = {ending: place for _, ending, place, _ in members}
                picture = next((at[ending] for ending in PICTURES if ending in at), None)
                yield Pair(members[0][3], key, picture, at.get(TEXT), at.get(JSON))
    except EpisodeError:
        raise
    except DAMAGE as error:
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise EpisodeError("corrupt tar", f"{path.name}: {why}; {AGAIN}") from error


def _members(archive: tarfile.TarFile, size: int, at: int) -> Iterator[tuple[str, str, tuple[int, int], int]]:
    for name, start, count, header in _headers(archive, at):
        folder, _, base = name.rpartition("/")
        stem, dot, ending = base.partition(".")
        if start + count > size:
            raise EpisodeError("truncated tar", f"it ends in {name[:100]}; {AGAIN}")
        if dot and stem and not base.startswith("."):
            yield f"{folder}/{stem}" if folder else stem, ending.lower(), (start, count), header


def _headers(archive: tarfile.TarFile, at: int) -> Iterator[tuple[str, int, int, int]]:
    """(name, first byte, bytes, byte of the header) of the regular files of a tar just opened, from the header at `at`
    on. Plain headers are read here, in a tenth of the time; tarfile reads the others."""
    file: Any = archive.fileobj
    archive.firstmember = None  # type: ignore[attr-defined]  # it would come again
    while True:
        block = os.pread(file.fileno(), BLOCK, at)
        if not archive.pax_headers and (found := _plain(block)):
            name, count = found
            yield name, at + BLOCK, count, at
            at += BLOCK + count + -count % BLOCK
            continue
        archive.offset = at
        file.seek(at)
        if (member := archive.next()) is None:
            if block.strip(b"\0"):  # tarfile takes it for the end
                raise EpisodeError("corrupt tar", f"byte {at} begins no member; {AGAIN}")
            return
        archive.members = []  # type: ignore[attr-defined]  # or it remembers all of them
        begun, at = -1 if archive.pax_headers else at, archive.offset  # those hold for all members after them
        if member.isreg() and member.sparse is None:
            yield member.name, member.offset_data, member.size, begun


def _plain(block: bytes) -> tuple[str, int] | None:
    """(name, bytes) of a regular file's header that needs nothing else; None where tarfile has to read it."""
    if len(block) < BLOCK or block[156:157] != b"0" or block[257:265] not in MAGIC or block[345]:
        return None
    name, size, checksum = block[:100].rstrip(b"\0"), block[124:135], block[148:154]
    if not (size + checksum).isdigit() or int(checksum, 8) != sum(block) - sum(block[148:156]) + 8 * ord(" "):
        return None
    return (name.decode(), int(size, 8)) if name.isascii() and b"\0" not in name else None


_last = threading.local()


def _wanted(path: Path, refs: list[EpisodeRef], status: os.stat_result) -> Iterator[Pair | EpisodeError]:
    """The pair of each ref. Where this thread read the same tar before, for the shard before this one, it goes on at
    the last pair."""
    stamp = (path, status.st_ino, status.st_size, status.st_mtime_ns)
    held, position, start = getattr(_last, "place", (None, 0, 0))
    if held != stamp or not refs or refs[0].position < position:
        position, start = 0, 0
    pairs, at = enumerate(_pairs(path, start), position), position - 1
    wrong: EpisodeError | None = None
    for ref in refs:
        if ref.position <= at:
            pairs, at = enumerate(_pairs(path)), -1
        found: Pair | None = None
        try:
            while at < ref.position:
                at, found = next(pairs, (ref.position, None))
        except EpisodeError as error:
            found, wrong = None, error
        if found is not None and found.start >= 0:
            _last.place = stamp, at, found.start
        yield found or wrong or EpisodeError("missing key", f"no {ref.position}-th sample in it; {AGAIN}")


def _read(pair: Pair, file: int, caption_key: str, size: tuple[int, int], label: str, ref: EpisodeRef) -> RawEpisode:
    if pair.picture is None:
        raise EpisodeError("missing key", f"sample {pair.key} has no picture ({', '.join(PICTURES)})")
    if pair.text is not None:
        caption = _decoded(_bytes(file, pair.text, pair.key), pair.key)
    elif pair.about is not None:
        caption = _of_json(_bytes(file, pair.about, pair.key), caption_key, pair.key)
    else:
        raise EpisodeError("missing key", f"sample {pair.key} has no caption (.{TEXT} or .{JSON})")
    if not caption.strip():
        raise EpisodeError("empty", f"sample {pair.key} has a caption without text")
    with _pictures.opened(_bytes(file, pair.picture, pair.key), pair.key) as image:
        picture = _fitted(image, size)[None]
    observation = {PICTURE: picture, CAPTION: np.array([caption.strip()], np.str_)}
    nothing = np.zeros((1, 0), np.float32), np.zeros(1, np.float32)
    return RawEpisode(observation, *nothing, True, False, label, ref.position, ref.start)


def _fitted(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """A picture of any size and 1 to 4 channels as (*size, 3) uint8; what is transparent is seen against white."""
    if image.mode in ("LA", "RGBA"):
        frame = np.asarray(image, np.uint8)
        share = frame[..., -1:].astype(np.uint32)
        frame = ((frame[..., :-1] * share + 255 * (255 - share) + 127) // 255).astype(np.uint8)
        image = Image.fromarray(frame[..., 0] if image.mode == "LA" else frame)
    if (image.height, image.width) != size:
        image = image.resize((size[1], size[0]), Image.Resampling.BILINEAR)
    pixels = np.asarray(image, np.uint8)
    return np.repeat(pixels[..., None], 3, axis=2) if pixels.ndim == 2 else pixels


def _bytes(file: int, place: tuple[int, int], key: str) -> bytes:
    start, count = place
    if count > MEMBER_BYTES:
        raise EpisodeError("too large", f"sample {key} has a member of {count} bytes; shrink it")
    data = os.pread(file, count, start)
    if len(data) < count:
        raise EpisodeError("truncated tar", f"it ends in sample {key}; {AGAIN}")
    return data


def _decoded(data: bytes, key: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise EpisodeError("not UTF-8", f"caption of sample {key}: {error.reason}; save it as UTF-8") from None


def _of_json(data: bytes, caption_key: str, key: str) -> str:
    try:
        about = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise EpisodeError("not JSON", f"sample {key}: {str(error)[:120]}; {AGAIN}") from None
    caption = about.get(caption_key) if isinstance(about, dict) else None
    if not isinstance(caption, str):
        names = ", ".join(str(name)[:40] for name in list(about)[:8]) if isinstance(about, dict) else "no object"
        raise EpisodeError("missing key", f"sample {key} has no text under '{caption_key}' (there is {names}); name "
                           "the key with --caption-key")  # fmt: skip
    try:
        caption.encode()
    except UnicodeEncodeError as error:
        raise EpisodeError("not UTF-8", f"caption of sample {key}: {error.reason}") from None
    return caption
