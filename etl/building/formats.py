"""The logs of several formats that `etl.record --suite` wrote, one build after the other.

    FOLDER/recorded.json -> FOLDER/{d4rl,minari,babyai,dqn_replay} -> one dataset each: OUTPUT/{d4rl,minari,...}

Invariant: a dataset's bytes are those that its own folder as --input gives.
"""

from __future__ import annotations

from pathlib import Path

from schemas.files import parse_json
from shards.folder import is_url

TABLE = "recorded.json"
DEFAULT_OUTPUT = "data/shards"


def formats_of(source: str | None, given: str | None) -> list[Path]:
    """The folder of each format in what etl.record wrote; none for any other input, or where a source is named.
    ValueError for a damaged recorded.json."""
    place = Path((given or "").removeprefix("file://"))
    if source is not None or not given or is_url(given.removeprefix("file://")) or not (place / TABLE).is_file():
        return []
    try:
        paths = [Path(row["path"]) for row in parse_json((place / TABLE).read_bytes()).values()]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        remedy = "record again, or give --input the folder of one format"
        raise ValueError(f"{place / TABLE}: not a table of recorded logs ({error}); {remedy}") from None
    return [place / name for name in sorted({path.parts[0] for path in paths}) if (place / name).is_dir()]


def output_of(folder: Path, output: str | None) -> str:
    """Where the dataset of one format goes."""
    return f"{(output or DEFAULT_OUTPUT).rstrip('/')}/{folder.name}"
