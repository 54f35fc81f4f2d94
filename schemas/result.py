"""Evaluation results: one row per episode, the only thing that the table is made from.

    EpisodeResult (a row in Python) <-> RESULT_SCHEMA (a row in Parquet), derived from it field by field

Every number in the table, the plots and the report is an aggregate of these rows, so it can be traced to episodes,
seeds, weights, data and versions. Invariant: this class is the one place that knows the columns, their types and their
order.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any

import pyarrow as pa

RESULT_SCHEMA_VERSION = 1
MODELS = ("random", "behaviour", "dt", "tt", "gato")


def _column(kind: pa.DataType, name: str = "", **default: Any) -> Any:
    """A field that is stored as a column of this type, under another name where one is given."""
    return field(metadata={"type": kind, "name": name}, **default)


class ResultError(ValueError):
    """Result rows cannot be used; the message names the row or file and the remedy."""


@dataclass(frozen=True, kw_only=True)
class EpisodeResult:
    """One episode that was played, shown from a log (behaviour), or could not be played (ending 'error')."""

    schema_version: int = _column(pa.int32(), default=RESULT_SCHEMA_VERSION)
    dataset: str = _column(pa.string())
    """Task name, such as hopper-medium-v2."""
    dataset_fingerprint: str = _column(pa.string())
    """Of the manifest of the shards; empty without a dataset."""
    environment: str = _column(pa.string())
    """Gymnasium id with its version; empty for behaviour."""
    model: str = _column(pa.string())
    """One of MODELS."""
    model_seed: int = _column(pa.int64())
    model_sha256: str = _column(pa.string())
    """Hash of the weights file; empty where there is none."""
    protocol: str = _column(pa.string())
    """JSON: settings of the simulator, decoding, prompt, step limit."""
    episode: int = _column(pa.int32())
    episode_seed: int = _column(pa.int64())
    episode_return: float = _column(pa.float64(), "return")
    """Raw, unclipped, undiscounted."""
    score: float = _column(pa.float64())
    """Normalised; NaN where the task has no reference."""
    score_kind: str = _column(pa.string())
    """d4rl, human, success (0 or 100) or empty."""
    timesteps: int = _column(pa.int32())
    ending: str = _column(pa.string())
    """terminated, truncated, step limit or error."""
    error: str = _column(pa.string())
    seconds: float = _column(pa.float64())
    commit: str = _column(pa.string())
    versions: str = _column(pa.string())
    """JSON: package -> version."""
    hardware: str = _column(pa.string())

    @property
    def failed(self) -> bool:
        """The episode could not be played to its end."""
        return self.ending == "error"


COLUMNS = {one.metadata["name"] or one.name: one.name for one in fields(EpisodeResult)}
"""Column name -> field name; they differ where the column's name is a word of Python."""
RESULT_SCHEMA = pa.schema(
    [pa.field(one.metadata["name"] or one.name, one.metadata["type"]) for one in fields(EpisodeResult)]
)


def to_table(results: Iterable[EpisodeResult]) -> pa.Table:
    """The rows as a table in RESULT_SCHEMA."""
    rows = [{column: getattr(one, name) for column, name in COLUMNS.items()} for one in results]
    return pa.Table.from_pylist(rows, schema=RESULT_SCHEMA)


def from_table(table: pa.Table) -> list[EpisodeResult]:
    """The rows of a table in RESULT_SCHEMA."""
    return [EpisodeResult(**{COLUMNS[column]: value for column, value in row.items()}) for row in table.to_pylist()]
