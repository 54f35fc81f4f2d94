"""Evaluation rows: one row an episode played, the only thing the table is made from.

Every figure in the table, the plots and the report is an aggregate of these rows,
so a figure can be traced to episodes, seeds, weights, data and versions.
"""

from __future__ import annotations

import pyarrow as pa

RESULT_SCHEMA_VERSION = 1

RESULT_SCHEMA = pa.schema(
    [
        pa.field("schema_version", pa.int32()),
        pa.field("dataset", pa.string()),  # task name, e.g. hopper-medium-v2
        pa.field("dataset_fingerprint", pa.string()),  # manifest fingerprint of the shards
        pa.field("environment", pa.string()),  # gymnasium id with version; empty for behaviour rows
        pa.field("model", pa.string()),  # random | behaviour | dt | tt | gato
        pa.field("model_seed", pa.int64()),
        pa.field("model_sha256", pa.string()),  # hash of the weights file; empty where there is none
        pa.field("protocol", pa.string()),  # JSON: simulator's settings, decoding, prompt, step limit
        pa.field("episode", pa.int32()),
        pa.field("episode_seed", pa.int64()),
        pa.field("return", pa.float64()),  # raw, unclipped, undiscounted
        pa.field("score", pa.float64()),  # normalised; NaN where the task has no reference
        pa.field("score_kind", pa.string()),  # d4rl | human | success (0 or 100) | empty
        pa.field("timesteps", pa.int32()),
        pa.field("ending", pa.string()),  # terminated | truncated | step limit | error
        pa.field("error", pa.string()),
        pa.field("seconds", pa.float64()),
        pa.field("commit", pa.string()),
        pa.field("versions", pa.string()),  # JSON: package -> version
        pa.field("hardware", pa.string()),
    ]
)

MODELS = ("random", "behaviour", "dt", "tt", "gato")
