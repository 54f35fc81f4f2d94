"""Writes the JAT files of this folder by `datasets`, as the hub's dataset was made.

    pip install datasets pillow; python make_jat.py FOLDER

Invariant: the values are those of `episodes`, which the tests make again.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

LENGTHS = (5, 3, 4)


def episodes(kind: str) -> list[dict[str, list]]:
    """Rows of a subset: mujoco-hopper, atari-pong or babyai-go-to."""
    rng = np.random.default_rng(0)
    rows = []
    for T in LENGTHS:
        row: dict[str, list] = {"rewards": rng.normal(size=T).astype(np.float32).tolist()}
        if kind.startswith("mujoco"):
            row["continuous_observations"] = rng.normal(size=(T, 11)).astype(np.float32).tolist()
            row["continuous_actions"] = rng.uniform(-1, 1, (T, 3)).astype(np.float32).tolist()
        elif kind.startswith("atari"):
            blocks = rng.integers(0, 256, (T, 21, 21, 4), np.uint8)
            row["image_observations"] = list(blocks.repeat(4, axis=1).repeat(4, axis=2))
            row["discrete_actions"] = rng.integers(0, 6, T).tolist()
        else:
            row["text_observations"] = ["go to the red ball"] * T
            row["discrete_observations"] = rng.integers(0, 10, (T, 148)).tolist()
            row["discrete_actions"] = rng.integers(0, 7, T).tolist()
        rows.append(row)
    return rows


def main() -> None:
    from datasets import Dataset, Features, Image, Sequence, Value

    kinds = {
        "rewards": Sequence(Value("float32")),
        "continuous_observations": Sequence(Sequence(Value("float32"))),
        "continuous_actions": Sequence(Sequence(Value("float32"))),
        "image_observations": Sequence(Image()),
        "discrete_actions": Sequence(Value("int64")),
        "discrete_observations": Sequence(Sequence(Value("int64"))),
        "text_observations": Sequence(Value("string")),
    }
    for kind in ("mujoco-hopper", "atari-pong", "babyai-go-to"):
        rows = episodes(kind)
        features = Features({key: kinds[key] for key in rows[0]})
        folder = Path(sys.argv[1]) / kind
        folder.mkdir(exist_ok=True)
        for split, part in (("train", rows[:2]), ("test", rows[2:])):
            data = Dataset.from_dict({key: [row[key] for row in part] for key in features}, features=features)
            data.to_parquet(folder / f"{split}-00000-of-00001.parquet")


if __name__ == "__main__":
    main()
