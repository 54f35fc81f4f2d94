"""Dataset files from the network into a cache folder, whole or not at all.

    URL -> NAME.part (resumed by Range) -> size and checksum -> NAME.sha256 -> rename to NAME

A cached file is checked against its NAME.sha256 at each use; one that somebody put there by hand gets its
NAME.sha256 at the first use. GATO_DATASET_MIRROR, where set, replaces scheme and host of every address.

Invariant: a file under its own name arrived completely and still has the bytes that arrived.
"""

from __future__ import annotations

import base64
import fcntl
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote, urlsplit

import requests
import urllib3
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from etl.sources import SourceError
from schemas.files import atomic_write, sha256_of, sync_folder

MIRROR_VARIABLE = "GATO_DATASET_MIRROR"
ATTEMPTS = 5  # in a row without one new byte
BACKOFF_SECONDS = 0.5  # doubled after each of them
TIMEOUT_SECONDS = (10, 60)  # to connect, between two reads
PIECE = 2**20
INTERRUPTIONS = (requests.RequestException, urllib3.exceptions.HTTPError, ConnectionError, TimeoutError)


class _Retry(Exception):
    """The attempt failed in a way that another one may not."""


def fetch(url: str, cache: Path, sha256: str | None = None, headers: Mapping[str, str] | None = None) -> Path:
    """The file behind `url` in the folder `cache`, downloaded if it is missing. `sha256`: hex digits of its bytes;
    `headers`: for the server, such as a token.

    SourceError, one line with file and remedy: no network, refused by the server, wrong checksum, cached file changed.
    """
    path = cache / unquote(urlsplit(url).path.rsplit("/", 1)[-1])
    if path.is_file():
        return _checked(path, sha256)
    cache.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    with open(part, "ab") as file, _without_leftover(part):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise SourceError(f"{part}: another process is downloading it; run again when it is done") from error
        _download(_mirrored(url), path, file, headers or {})
        file.flush()
        os.fsync(file.fileno())
        digest = sha256_of(part)
        if sha256 is not None and digest != sha256.lower():
            part.unlink()
            raise SourceError(f"{url}: arrived with sha256 {digest}, expected {sha256}; the file there has changed")
        _write_digest(path, digest)
        _validator(path).unlink(missing_ok=True)
        os.replace(part, path)
    sync_folder(cache)
    return path


def _checked(path: Path, sha256: str | None) -> Path:
    digest, sidecar = sha256_of(path), _sidecar(path)
    expected = sidecar.read_text("utf-8").split()[:1] if sidecar.is_file() else []
    for known in ([sha256.lower()] if sha256 else []) + expected:
        if digest != known:
            raise SourceError(
                f"{path}: no longer the file that was downloaded (sha256 {digest[:12]}…, expected {known[:12]}…); "
                f"delete it and {sidecar.name} to download it again"
            )
    if not expected:
        _write_digest(path, digest)
    return path


def _download(url: str, path: Path, file: BinaryIO, headers: Mapping[str, str]) -> None:
    """Fill `file` (open for appending) up to its last byte."""
    failures = 0
    with _progress(path.name) as (bar, task):
        while True:
            before = file.tell()
            try:
                _attempt(url, path, file, headers, lambda done, total: bar.update(task, completed=done, total=total))
                return
            except (_Retry, *INTERRUPTIONS) as error:
                failures = 1 if file.tell() > before else failures + 1
                if failures == ATTEMPTS:
                    file.flush()
                    raise SourceError(
                        f"cannot download {url} ({_brief(error)}); put the file at {path} yourself, "
                        "or record logs offline with python -m etl.record"
                    ) from error
            time.sleep(BACKOFF_SECONDS * 2 ** (failures - 1))


def _attempt(
    url: str, path: Path, file: BinaryIO, own: Mapping[str, str], report: Callable[[int, int | None], None]
) -> None:
    """One request, resuming where `file` ends if the server still holds the same bytes."""
    validator = _validator(path)
    if file.tell() and not validator.is_file():
        _restart(file)  # nothing says which version of the file these bytes were
    headers = {**own, "Accept-Encoding": "identity"}
    if file.tell():
        headers |= {"Range": f"bytes={file.tell()}-", "If-Range": validator.read_text("utf-8")}
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT_SECONDS) as response:
        if response.status_code == 416:
            _restart(file)
            raise _Retry("the server cannot resume")
        if response.status_code == 429 or response.status_code >= 500:
            raise _Retry(f"status {response.status_code}")
        if not response.ok:
            raise SourceError(
                f"cannot download {url} (status {response.status_code}); put the file at {path} yourself, "
                "or record logs offline with python -m etl.record"
            )
        if response.status_code != 206:
            _restart(file)
            if stamp := response.headers.get("ETag") or response.headers.get("Last-Modified"):
                validator.write_text(stamp, "utf-8")
            else:
                validator.unlink(missing_ok=True)
        total = _total(response, file.tell())
        for piece in response.raw.stream(PIECE, decode_content=False):
            file.write(piece)
            report(file.tell(), total)
    if total is not None and file.tell() != total:
        raise _Retry(f"{file.tell()} of {total} bytes arrived")
    file.flush()
    expected = _md5(response)
    if expected is not None and _md5_of(path.with_name(f"{path.name}.part")) != expected:
        _restart(file)
        raise _Retry("md5 differs from the server's")


def _restart(file: BinaryIO) -> None:
    file.seek(0)
    file.truncate()


def _total(response: requests.Response, start: int) -> int | None:
    """Bytes of the whole file. _Retry where the server resumes from another byte than asked."""
    if response.status_code == 206:
        match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
        if match is None or int(match[1]) != start:
            raise _Retry("the server resumes from another byte")
        return None if match[2] == "*" else int(match[2])
    length = response.headers.get("Content-Length")
    return None if length is None else int(length)


def _md5(response: requests.Response) -> bytes | None:
    """The md5 of the whole file, where the server sends one (Google's x-goog-hash, or Content-MD5)."""
    match = re.search(r"md5=([\w+/=]+)", response.headers.get("x-goog-hash", ""))
    if match is None and response.status_code == 200:
        match = re.fullmatch(r"([\w+/=]+)", response.headers.get("Content-MD5", ""))
    return base64.b64decode(match[1]) if match else None


def _md5_of(path: Path) -> bytes:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "md5").digest()


def _mirrored(url: str) -> str:
    mirror = os.environ.get(MIRROR_VARIABLE)
    return f"{mirror.rstrip('/')}{urlsplit(url).path}" if mirror else url


def _sidecar(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _validator(path: Path) -> Path:
    return path.with_name(f"{path.name}.part.etag")


def _write_digest(path: Path, digest: str) -> None:
    with atomic_write(_sidecar(path)) as file:
        file.write(f"{digest}  {path.name}\n".encode())


def _brief(error: Exception) -> str:
    """The innermost reason, on one line."""
    while getattr(error, "args", None) and isinstance(error.args[-1], Exception):
        error = error.args[-1]
    reason = getattr(error, "reason", None)
    return " ".join(str(reason or error).split())[:200] or type(error).__name__


@contextmanager
def _without_leftover(part: Path) -> Iterator[None]:
    try:
        yield
    finally:
        if part.is_file() and part.stat().st_size == 0:
            part.unlink()


@contextmanager
def _progress(name: str) -> Iterator[tuple[Progress, TaskID]]:
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn())
    with Progress(*columns, TransferSpeedColumn(), TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        yield bar, bar.add_task(name, total=None)
