"""Exported models by name, folder or URL: what `--gato` and `gato.load` accept.

    "tiny" -> eval/weights/tiny    runs/x/export -> itself    s3://bucket/export -> the cache -> a local folder

Invariant: what is loaded has the sha256 that its model.json names, wherever it came from.
"""

from __future__ import annotations

import json
from pathlib import Path

from schemas.files import sha256_of
from shards.cache import Cache, CacheConfig
from shards.folder import Folder, digest_of, is_url
from trainer.checkpoint import CheckpointError

WEIGHTS = Path(__file__).resolve().parent / "weights"
MODEL, TENSORS, PROMPTS = "model.json", "weights.safetensors", "prompts.safetensors"
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
        return _download(str(place).removesuffix(f"/{MODEL}"), Cache(cache or CacheConfig()))
    folder = Path(place).expanduser()
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


def _download(url: str, cache: Cache) -> Path:
    """A local copy of a remote export, its folder named by the hash of model.json."""
    place = Folder(url)
    body = cache.read(place, MODEL)
    if body is None:
        raise CheckpointError(f"{url}: no {MODEL} there; give the URL of an export folder")
    try:
        parsed = json.loads(body)
        wanted = {TENSORS: parsed["weights_sha256"], PROMPTS: parsed.get("prompts_sha256", "")}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{url}/{MODEL}: not an export ({error}); give the URL of an export folder") from None
    folder = cache.folder.parent / "models" / digest_of(body)
    target = Folder(folder)
    for name, digest in wanted.items():
        path = folder / name
        if not digest or (path.is_file() and sha256_of(path) == digest):
            continue
        data = cache.read(place, name)
        if data is None or digest_of(data) != digest:
            problem = "is missing" if data is None else f"has another sha256 than {MODEL} names"
            raise CheckpointError(f"{url}/{name}: {problem}; upload the export again")
        target.write(name, data)
    target.write(MODEL, body)
    return folder
