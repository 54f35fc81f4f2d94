"""LeRobot datasets by their id on the Hugging Face hub (etl/fetch/hub.py).

ID[@REVISION] -> meta/, data/ and videos/ into CACHE/ID

Invariant: a folder that holds DONE is a whole LeRobot dataset.
"""

from __future__ import annotations

import re
from pathlib import Path

from etl.fetch import hub
from etl.fetch.hub import DONE
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
FOLDERS = ("meta", "data", "videos", "images")
_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w-][\w./-]*)?")


def known(cache: Path) -> list[Known]:
    """Those of LISTED, and what is in the cache."""
    here = {path.parent.relative_to(cache).as_posix(): path.parent for path in cache.glob(f"*/*/{DONE}")}
    return [
        Known(id, "-", f"{hub.endpoint()}/datasets/{id}", here[id] / INFO if id in here else None)
        for id in sorted({*LISTED, *here})
    ]


def download(dataset: str, cache: Path) -> Path:
    """The meta/info.json of a dataset in the cache, downloaded unless it is there. SourceError: what to fetch, and
    where to put it."""
    if not _ID.fullmatch(dataset) or ".." in dataset:
        raise SourceError(f"'{dataset}' is no repository of the hub; give --dataset one such as {DEFAULT}")
    id, _, revision = dataset.partition("@")
    place, root = hub.Place(id, revision or "main", ""), cache / dataset
    if not hub.here(place, root):
        files = hub.download(place, root, _wanted, lambda name: not name.startswith("meta/"))
        if INFO not in files:
            (root / DONE).unlink(missing_ok=True)
            raise SourceError(f"{hub.endpoint()}/datasets/{id}: no {INFO} in it; it is no LeRobot dataset")
    return root / INFO


def _wanted(name: str) -> bool:
    return name.split("/")[0] in FOLDERS
