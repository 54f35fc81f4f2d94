"""Input files from object stores and web servers (any fsspec URL), kept as local files while they are read.

URL of a file or a folder -> listing -> CACHE/remote/PROTOCOL/HOST/PATH, one file each -> the same sources as ever

HDF5 and gzip are read in place, forwards and backwards, which a local copy serves best. The driver fetches what it
scans; a worker on another machine fetches the files of its shard by the address in its plan item.

Invariant: a file in the cache arrived whole; one whose size changed at its origin is fetched again.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import fsspec
from rich.console import Console
from rich.progress import track

from etl.sources import SourceError
from schemas.files import sync_folder


def fetch(url: str, cache: Path, console: Console) -> tuple[Path, dict[str, str]]:
    """The local copy of a remote file or folder, and the origin of each of its files (path -> URL). SourceError
    where it cannot be listed or read."""
    try:
        store, root = fsspec.core.url_to_fs(url)
        found = store.find(root, detail=True) or {root: store.info(root)}
        paths = {path: info.get("size") for path, info in found.items() if info.get("type", "file") == "file"}
        protocol = url.split("://", 1)[0]
        base = cache / "remote" / protocol
        origins = {}
        for path, size in track(sorted(paths.items()), "fetching", console=console, transient=True):
            local = base / _safe(path)
            origins[str(local)] = store.unstrip_protocol(path)
            if not local.is_file() or (size is not None and local.stat().st_size != size):
                _copy(store, path, local)
    except (OSError, ImportError, ValueError) as error:
        raise SourceError(f"{url}: {_first_line(error)}; check the address, the credentials and the network") from error
    except Exception as error:  # each store has exceptions of its own
        raise SourceError(f"{url}: {type(error).__name__}: {_first_line(error)}") from error
    if not paths:
        raise SourceError(f"{url}: no file there; give --input a file or a folder of logs")
    return base / _safe(root), origins


def ensure(path: Path, url: str) -> None:
    """Fetch one file, unless it is there: what a worker on another machine needs."""
    if path.is_file():
        return
    store, root = fsspec.core.url_to_fs(url)
    _copy(store, root, path)


def _copy(store: fsspec.AbstractFileSystem, path: str, local: Path) -> None:
    local.parent.mkdir(parents=True, exist_ok=True)
    part = local.with_name(f".{local.name}.{os.getpid()}.part")
    try:
        store.get_file(path, str(part))
        os.replace(part, local)
    finally:
        part.unlink(missing_ok=True)
    sync_folder(local.parent)


def _safe(path: str) -> str:
    """A store's path as a relative one: no scheme, no leading slash, no way up."""
    parts = [part for part in re.sub(r"^[a-z0-9+]+://", "", path).split("/") if part not in ("", ".", "..")]
    return "/".join(parts)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
