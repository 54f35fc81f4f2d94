"""LeRobot datasets by their id on the Hugging Face hub, over plain HTTP.

ID[@REVISION] -> listing of the repository -> meta/, data/ and videos/ into CACHE/ID, one file after the other -> DONE

HF_ENDPOINT replaces the hub's address, HF_TOKEN is sent to it. Each file is checked by the sha256 that the listing has.

Invariant: a folder that holds DONE arrived completely; no file is written outside it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

import requests

from etl.fetch.download import INTERRUPTIONS, TIMEOUT_SECONDS, fetch
from etl.sources import Known, SourceError
from etl.sources.lerobot.metadata import INFO

DEFAULT = "lerobot/pusht"
LISTED = (
    DEFAULT,
    "lerobot/aloha_sim_insertion_human",
    "lerobot/aloha_sim_transfer_cube_human",
    "lerobot/metaworld_mt50",
    "lerobot/pusht_image",
    "lerobot/xarm_lift_medium",
)
DONE = ".complete"
FOLDERS = ("meta", "data", "videos", "images")
PAGES = 10_000  # of a listing
_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w-][\w./-]*)?")


def endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def known(cache: Path) -> list[Known]:
    """Those of LISTED, and what is in the cache."""
    here = {path.parent.relative_to(cache).as_posix(): path.parent for path in cache.glob(f"*/*/{DONE}")}
    return [
        Known(id, "-", f"{endpoint()}/datasets/{id}", here[id] / INFO if id in here else None)
        for id in sorted({*LISTED, *here})
    ]


def download(dataset: str, cache: Path) -> Path:
    """The meta/info.json of a dataset in the cache, downloaded unless it is there. SourceError: what to fetch, and
    where to put it."""
    if not _ID.fullmatch(dataset) or ".." in dataset:
        raise SourceError(f"'{dataset}' is no repository of the hub; give --dataset one such as {DEFAULT}")
    id, _, revision = dataset.partition("@")
    root = cache / dataset
    if (root / DONE).is_file():
        return root / INFO
    try:
        files = dict(_listing(id, revision or "main"))
    except (*INTERRUPTIONS, ValueError) as error:
        if isinstance(error, SourceError):
            raise
        raise SourceError(f"cannot reach {endpoint()} ({_brief(error)}); {_by_hand(id)}") from error
    if INFO not in files:
        raise SourceError(f"{endpoint()}/datasets/{id}: no {INFO} in it; it is no LeRobot dataset")
    for name, sha256 in sorted(files.items(), key=lambda file: (not file[0].startswith("meta/"), file[0])):
        url = f"{endpoint()}/datasets/{id}/resolve/{quote(revision or 'main', safe='')}/{quote(name)}"
        try:
            fetch(url, root / PurePosixPath(name).parent, sha256, _headers())
        except SourceError as error:
            raise SourceError(f"{error}; {_by_hand(id)}") from error
    (root / DONE).write_text(f"{len(files)} files\n", "utf-8")
    return root / INFO


def _listing(id: str, revision: str) -> Iterator[tuple[str, str | None]]:
    """(path, sha256 where the hub has it) of each file that belongs to the dataset."""
    url: str | None = f"{endpoint()}/api/datasets/{id}/tree/{quote(revision, safe='')}?recursive=true"
    for _ in range(PAGES):
        if url is None:
            return
        response = requests.get(url, headers=_headers(), timeout=TIMEOUT_SECONDS)
        if response.status_code in (401, 403):
            where = f"{endpoint()}/datasets/{id}"
            raise SourceError(f"{where} is gated, private or not there (status {response.status_code}): ask for access "
                              f"on its page and set HF_TOKEN to a token of yours; or {_by_hand(id)}")  # fmt: skip
        if not response.ok:
            raise SourceError(
                f"{endpoint()}/datasets/{id}: status {response.status_code}; check its name; {_by_hand(id)}"
            )
        for entry in response.json():
            name = str(entry["path"])
            if entry.get("type") == "file" and name.split("/")[0] in FOLDERS:
                yield _safe(name), _sha256(entry)
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


def _by_hand(id: str) -> str:
    command = f"hf download {id} --repo-type dataset --local-dir FOLDER"
    return f"run `{command}` where there is a network, and give --input FOLDER"


def _brief(error: BaseException) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
