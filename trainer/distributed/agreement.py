"""Agreement of all ranks before the first step: package, configuration, run folder, data.

    each rank: versions, settings, dataset fingerprints -> gathered -> the first rank that differs from rank 0, named
    rank 0: a file with a random name in the run folder -> every rank looks for it

Invariant: a run whose ranks would read, write or compute different things ends before its first step, on all ranks.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
import torch.distributed as dist

import trainer
from shards.stream import Stream
from trainer.config import TrainConfig, differences, to_dict
from trainer.distributed import ranks

SOURCES = ("schemas", "shards", "trainer")  # what decides a run's numbers
SECONDS_TO_APPEAR = 10.0  # a new file on a network file system, for another machine


def require_same_program(config: TrainConfig, body: Mapping[str, object]) -> None:
    """Every rank runs the same code with the same settings. `body`: the content of the DeepSpeed file. Collective.

    Raises:
        ValueError: a rank differs from rank 0; the message names it, its host and what differs.
    """
    everyone = ranks.gather((versions(), _shared_settings(config), dict(body)))
    usual_versions, usual_config, usual_body = everyone[0][1]
    for rank, (host, (theirs, config_, body_)) in enumerate(everyone):
        place = ranks.where(rank, host)
        for name, version in theirs.items():
            if version != usual_versions[name]:
                raise ValueError(
                    f"{place} runs {name} {version}, rank 0 {usual_versions[name]}; install the same on every machine"
                )
        for what, own, usual in (("settings", config_, usual_config), ("DeepSpeed file", body_, usual_body)):
            if changed := differences(own, usual):
                raise ValueError(
                    f"{place} has other {what} than rank 0: {'; '.join(changed)}; start every rank with the same"
                )


def _shared_settings(config: TrainConfig) -> dict[str, Any]:
    """All settings but where files are: data is compared by its fingerprint, the run folder by a file in it."""
    raw = to_dict(config)
    for name in ("folders", "root", "cache"):
        del raw["data"][name]
    del raw["run"]["output"]
    return raw


def versions() -> dict[str, str]:
    """Versions of what decides a run's numbers; of this package also a digest of its source."""
    digest = hashlib.sha256()
    root = Path(trainer.__file__).parent.parent
    for path in sorted(path for room in SOURCES for path in (root / room).rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    try:
        own = metadata.version("gato-open")
    except metadata.PackageNotFoundError:  # a checkout that is not installed
        own = "uninstalled"
    return {
        "gato-open": f"{own} (source {digest.hexdigest()[:12]})",
        "torch": torch.__version__,
        "deepspeed": metadata.version("deepspeed"),
    }


def require_same_folder(folder: Path) -> None:
    """Every rank sees the run folder of rank 0: a checkpoint has a part per rank, and a half on each machine can be
    resumed on none. Collective.

    Raises:
        ValueError: names the ranks that do not.
        OSError: rank 0 cannot write there.
    """
    mark = folder / ranks.on_rank_0(lambda: _mark(folder))
    seen = ranks.gather(_appears(mark, SECONDS_TO_APPEAR if dist.get_rank() else 0.0))
    if dist.get_rank() == 0:
        mark.unlink(missing_ok=True)
    if missing := [ranks.where(rank, host) for rank, (host, found) in enumerate(seen) if not found]:
        raise ValueError(
            f"--run.output {folder}: {', '.join(missing)} does not see the files that {ranks.where(0, seen[0][0])} "
            "writes there; give a folder on a file system that all machines share, by the same absolute path"
        )


def _mark(folder: Path) -> str:
    mark = folder / f".shared-{uuid4().hex}"
    mark.touch()
    return mark.name


def _appears(path: Path, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
        if path.parent.is_dir():
            os.listdir(path.parent)  # a network file system may remember for a while that a file is not there
    return True


def require_same_data(stream: Stream) -> None:
    """Every rank has the same datasets. Collective.

    Raises:
        ValueError: a rank's dataset differs from that of rank 0; the message names both.
    """
    own = {dataset.manifest.fingerprint: str(dataset.place) for dataset in stream.datasets}
    everyone = ranks.gather(own)
    usual = everyone[0][1]
    for rank, (host, theirs) in enumerate(everyone):
        place, remedy = ranks.where(rank, host), "copy the same files to every machine, or name a shared folder"
        for fingerprint in theirs.keys() - usual.keys():
            raise ValueError(
                f"{place}: dataset {theirs[fingerprint]} (fingerprint {fingerprint[:12]}) is not one of rank 0's "
                f"({', '.join(f'{name}: {one[:12]}' for one, name in usual.items())}); {remedy}"
            )
        for fingerprint in usual.keys() - theirs.keys():
            raise ValueError(f"{place}: rank 0's dataset {usual[fingerprint]} is missing there; {remedy}")
