"""Result rows on disk: Parquet files that a later comparison, the report and other programs read.

    EpisodeResult ... -> save_rows -> PATH.parquet in RESULT_SCHEMA -> load_rows -> table

Invariant: a file is written whole or not at all, and one of another schema is refused, never misread.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from schemas.files import atomic_write
from schemas.result import RESULT_SCHEMA, RESULT_SCHEMA_VERSION, EpisodeResult, ResultError, to_table


def save_rows(path: Path, results: Iterable[EpisodeResult]) -> None:
    """Write results as Parquet, one row per episode."""
    with atomic_write(path) as file:
        pq.write_table(to_table(results), file)


def load_rows(path: Path) -> pa.Table:
    """Read what `save_rows` wrote. ResultError for a missing or damaged file, or one of another schema."""
    try:
        with path.open("rb") as file:  # Arrow opens no path that is no Unicode
            table = pq.read_table(file)
    except FileNotFoundError:
        raise ResultError(f"{path}: no such results file; run python -m eval.compare") from None
    except (pa.ArrowException, OSError) as error:
        raise ResultError(f"{path}: not a Parquet file ({error}); run python -m eval.compare again") from None
    versions = table["schema_version"].unique().to_pylist() if "schema_version" in table.schema.names else [None]
    if wrong := [version for version in versions if version != RESULT_SCHEMA_VERSION]:
        raise ResultError(
            f"{path}: field 'schema_version' is {wrong[0]}, this package reads {RESULT_SCHEMA_VERSION}; "
            "run python -m eval.compare again"
        )
    if not table.schema.equals(RESULT_SCHEMA):
        odd = sorted(set(table.schema.names) ^ set(RESULT_SCHEMA.names)) or ["a column's type"]
        raise ResultError(f"{path}: not a results file's columns ({', '.join(odd)}); run python -m eval.compare again")
    return table
