"""Exported models by name, folder or URL: what `--gato` and `gato.load` accept.

    "tiny" -> eval/weights/tiny    runs/x/export -> itself    s3://bucket/export -> the cache -> a local folder

Invariant: what is loaded has the sha256 that its model.json names, wherever it came from.
"""

from __future__ import annotations

from pathlib import Path

from schemas.files import home_expanded
from shards.cache import Cache, CacheConfig
from shards.folder import is_url
from trainer.checkpoint import CheckpointError
from trainer.model.export import MODEL, download_export

WEIGHTS = Path(__file__).resolve().parent / "weights"
DEFAULT = "tiny"


def shipped_names() -> list[str]:
    """Names of the models that come with the package."""
    return sorted(path.parent.name for path in WEIGHTS.glob(f"*/{MODEL}"))


def find_export(place: str | Path, cache: CacheConfig | None = None) -> Path:
    """The local folder of an exported model.

    Args:
        place: a shipped name ("tiny"), the folder of an export or of a training run, or the export's URL (any that
            fsspec reads: s3://, gs://, https://). A folder whose name is a shipped one is written "./tiny".
        cache: where files of URLs are kept.

    Raises:
        CheckpointError: there is no export; the message lists the shipped names.
        DatasetError: the URL's protocol is unknown, or its store does not answer.
    """
    if isinstance(place, str) and place in shipped_names():
        return WEIGHTS / place
    if is_url(place):
        return download_export(str(place), Cache(cache or CacheConfig()))
    folder = home_expanded(place)
    for candidate in (folder, folder / "export"):
        if (candidate / MODEL).is_file():
            return candidate
    known = ", ".join(shipped_names()) or "none"
    raise CheckpointError(
        f"{place}: no {MODEL} there, and no shipped model of that name (known: {known}); give the export folder of a "
        "training run, RUN/export"
    )


def newest_export(root: Path = Path("runs")) -> Path:
    """The most recently finished export in runs/; the shipped model where there is none."""
    found = sorted(root.glob(f"*/export/{MODEL}"), key=lambda path: path.stat().st_mtime)
    return found[-1].parent if found else find_export(DEFAULT)
