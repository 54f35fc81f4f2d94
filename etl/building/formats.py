"""The logs of several formats that `etl.record --suite` wrote, one build after the other.

    FOLDER/recorded.json -> FOLDER/{d4rl,minari,babyai,dqn_replay} -> one dataset each: OUTPUT/{d4rl,minari,...}

Invariant: a dataset's bytes are those that its own folder as --input gives.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from schemas.files import parse_json
from shards.folder import is_url

TABLE = "recorded.json"
DEFAULT_OUTPUT = "data/shards"


@dataclass(frozen=True)
class Row:
    """One log in recorded.json. `path` is relative to it; returns are of whole episodes, unclipped,
    None where there is none."""

    path: str
    suite: str
    episodes: int
    timesteps: int
    mean_return: float | None
    std_return: float | None
    seconds: float
    bytes: int
    sha256: str
    asked: dict[str, object]
    """Options that decided the log's bytes and place: episodes or steps, seed, noise, policy, level, run."""


def recorded(folder: Path, remedy: str) -> dict[str, Row]:
    """The logs that etl.record wrote into a folder, by the environment's id; none without a recorded.json. ValueError
    with the remedy for a damaged one."""
    path = folder / TABLE
    if not path.is_file():
        return {}
    try:
        rows = {id: Row(**row) for id, row in parse_json(path.read_bytes()).items()}
        for id, row in rows.items():
            parts = Path(row.path).parts
            if not parts or parts[0] == os.sep or ".." in parts:
                raise ValueError(f"'{row.path}', the path of {id}, leads out of the folder")
        return rows
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a table of recorded logs ({error}); {remedy}") from None


def formats_of(source: str | None, given: str | None) -> list[Path]:
    """The folder of each format in what etl.record wrote; none for any other input, or where a source is named.
    ValueError for a damaged recorded.json."""
    place = Path((given or "").removeprefix("file://"))
    if source is not None or not given or is_url(given.removeprefix("file://")):
        return []
    logs = recorded(place, "record again, or give --input the folder of one format").values()
    return [place / name for name in sorted({Path(log.path).parts[0] for log in logs}) if (place / name).is_dir()]


def output_of(folder: Path, output: str | None) -> str:
    """Output folder of one format's dataset."""
    return f"{(output or DEFAULT_OUTPUT).rstrip('/')}/{folder.name}"
