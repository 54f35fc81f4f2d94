"""Files of a dataset repository of the Hugging Face hub, over plain HTTP.

OWNER/NAME[@REVISION][/FOLDER] -> listing -> the wanted files into CACHE/OWNER/NAME[@REVISION], one by one -> DONE

HF_ENDPOINT replaces the hub's address, HF_TOKEN is sent to it. Each file is checked by the sha256 that the listing has.

Invariant: a folder that holds DONE arrived completely; no file is written outside the repository's folder.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import quote

import requests

from etl.fetch.download import INTERRUPTIONS, TIMEOUT_SECONDS, fetch
from etl.sources import Known, SourceError

DONE = ".complete"
PAGES = 10_000  # of a listing
_ID = re.compile(r"(?P<id>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>[\w-][\w.-]*))?(/(?P<folder>[^\\:?*]+?))?/?")


class Place(NamedTuple):
    """A repository, a revision of it, and a folder in it: '' is all of it."""

    id: str
    revision: str
    folder: str

    def root(self, cache: Path) -> Path:
        return cache / (self.id if self.revision == "main" else f"{self.id}@{self.revision}")


def endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def place_of(dataset: str, example: str) -> Place:
    """OWNER/NAME[@REVISION][/FOLDER] in parts; SourceError for what is none."""
    match = _ID.fullmatch(dataset)
    if match is None or any(part in ("", ".", "..") for part in dataset.rstrip("/").split("/")):
        raise SourceError(f"'{dataset}' is no repository of the hub; give --dataset one such as {example}")
    return Place(match["id"], match["revision"] or "main", match["folder"] or "")


def download(place: Place, root: Path, wanted: Callable[[str], bool], first: Callable[[str], Any] = str) -> list[str]:
    """Bring the wanted files below the place's folder into `root`, in the order of `first`, and leave DONE; returns
    their names. SourceError: what to fetch, and where to put it."""
    try:
        files = {name: sha256 for name, sha256 in _listing(place) if wanted(name)}
    except (*INTERRUPTIONS, ValueError) as error:
        if isinstance(error, SourceError):
            raise
        raise SourceError(f"cannot reach {endpoint()} ({_brief(error)}); {by_hand(place.id)}") from error
    for name, sha256 in sorted(files.items(), key=lambda file: (first(file[0]), file[0])):
        url = f"{endpoint()}/datasets/{place.id}/resolve/{quote(place.revision, safe='')}/{quote(name)}"
        try:
            fetch(url, root / PurePosixPath(name).parent, sha256, _headers())
        except SourceError as error:
            raise SourceError(f"{error}; {by_hand(place.id)}") from error
    if files:
        (root / place.folder / DONE).write_text(f"{len(files)} files\n", "utf-8")
    return sorted(files)


def logs(
    dataset: str,
    cache: Path,
    example: str,
    what: str,
    wanted: Callable[[str], bool],
    below: Callable[[Path], list[Path]],
) -> list[Path]:
    """The files that `below` finds in a dataset, downloaded into `cache` unless it is there. `what` they are, and an
    `example` of a dataset, are for messages. SourceError: there are none, or what to fetch and where to put it."""
    place = place_of(dataset, example)
    root = place.root(cache)
    if not here(place, root):
        download(place, root, wanted)
    found = below(root / place.folder) if (root / place.folder).is_dir() else []
    if not found:
        raise SourceError(f"{endpoint()}/datasets/{dataset}: no {what} in it; give --dataset one such as {example}")
    return found


def known(cache: Path, listed: Iterable[str] = ()) -> list[Known]:
    """Datasets that are `listed`, and those in the cache."""
    here = {path.parent.relative_to(cache).as_posix(): path.parent for path in cache.rglob(DONE)}
    return [Known(id, "-", f"{endpoint()}/datasets/{id}", here.get(id)) for id in sorted({*listed, *here})]


def here(place: Place, root: Path) -> bool:
    """True if the place's folder, or all of the repository, is in `root`."""
    return any((folder / DONE).is_file() for folder in (root, root / place.folder))


def by_hand(id: str) -> str:
    command = f"hf download {id} --repo-type dataset --local-dir FOLDER"
    return f"run `{command}` where there is a network, and give --input FOLDER"


def _listing(place: Place) -> Iterator[tuple[str, str | None]]:
    """(path, sha256 where the hub has it) of each file below the place's folder."""
    where, inside = f"{endpoint()}/datasets/{place.id}", f"/{quote(place.folder)}" if place.folder else ""
    url: str | None = (
        f"{endpoint()}/api/datasets/{place.id}/tree/{quote(place.revision, safe='')}{inside}?recursive=true"
    )
    for _ in range(PAGES):
        if url is None:
            return
        response = requests.get(url, headers=_headers(), timeout=TIMEOUT_SECONDS)
        if response.status_code in (401, 403):
            raise SourceError(f"{where} is gated, private or not there (status {response.status_code}): ask for access "
                              f"on its page and set HF_TOKEN to a token of yours; or {by_hand(place.id)}")  # fmt: skip
        if not response.ok:
            raise SourceError(f"{where}{inside}: status {response.status_code}; check its name; {by_hand(place.id)}")
        for entry in response.json():
            if entry.get("type") == "file":
                yield _safe(str(entry["path"])), _sha256(entry)
        url = response.links.get("next", {}).get("url")


def _safe(name: str) -> str:
    parts = name.split("/")
    if "\\" in name or any(part in ("", ".", "..") for part in parts):
        raise SourceError(f"the hub lists a file '{name[:80]}', which leads out of the dataset; it was left alone")
    return name


def _sha256(entry: dict[str, Any]) -> str | None:
    oid = (entry.get("lfs") or {}).get("oid")
    return oid if isinstance(oid, str) and re.fullmatch(r"[0-9a-f]{64}", oid) else None


def _headers() -> dict[str, str]:
    token = os.environ.get("HF_TOKEN", "").strip()
    return {"Authorization": f"Bearer {token}"} if token else {}


def _brief(error: BaseException) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
