"""Minari's datasets by name: the table of those that D4RL has there, and their download.

    minari.download_dataset -> .partial/ID -> whole -> CACHE/ID

Invariant: what lies under its own name in the cache has arrived whole.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path

from etl.sources import SourceError, _catalogue
from etl.sources.minari import disk
from etl.sources.minari.disk import DATA, METADATA

DEFAULT = "D4RL/pointmaze/umaze-v2"


@cache
def d4rl_environments() -> dict[str, str]:
    """D4RL's datasets by Minari's ids, with the gymnasium id of the environment each was recorded in."""
    return json.loads(Path(__file__).with_name("minari.json").read_text("utf-8"))


def address(dataset: str) -> str:
    repository, _, folder = dataset.partition("/")
    return f"https://huggingface.co/datasets/farama-minari/{repository}/tree/main/{folder}"


def download(dataset: str, cache: Path) -> Path:
    """main_data.hdf5 of the dataset in the cache: downloaded beside it, moved there when all of it arrived."""
    if not disk.is_id(dataset):
        raise SourceError(f"'{dataset}' is no Minari id; give --dataset one such as {DEFAULT}")
    target, partial = cache / dataset, cache / ".partial" / dataset.replace("/", "-")
    path = target / "data" / DATA
    if path.with_name(METADATA).is_file():
        return disk.place(path.parent)
    if target.exists():
        raise SourceError(f"{target}: not a whole Minari dataset; delete it to download it again")
    import minari

    before = os.environ.get("MINARI_DATASETS_PATH")
    os.environ["MINARI_DATASETS_PATH"] = str(partial)
    try:
        with redirect_stdout(sys.stderr):
            minari.download_dataset(dataset, force_download=(partial / dataset).exists())
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(partial / dataset, target)
    except Exception as error:  # the clients of the remote stores share no base class
        raise SourceError(
            f"cannot download Minari dataset '{dataset}' ({disk.brief(error)}); run `minari download {dataset}` where "
            f"there is a network, and give --input that folder{_hint(dataset)}"
        ) from error
    finally:
        if before is None:
            del os.environ["MINARI_DATASETS_PATH"]
        else:
            os.environ["MINARI_DATASETS_PATH"] = before
    shutil.rmtree(partial, ignore_errors=True)
    return disk.place(path.parent)


def _hint(dataset: str) -> str:
    known = d4rl_environments()
    return "" if dataset in known else _catalogue.suggest(dataset, known)
