"""BabyAI's levels (arXiv 1810.08272) as Minari has them: instruction, view and facing, one discrete action.

Minari dataset of minigrid: observations/{direction (T+1,), image (T+1, 7, 7, 3) uint8 symbols, mission strings}
    -> fields 'mission' (text), 'image' (56x56x3, padded to 64x64: 16 patches), 'direction' (0 to 3)

`image` is drawn as minigrid draws it (simulators/suites/minigrid.py). Minari's `minigrid/BabyAI-LEVEL/optimal-v0`
are such datasets, and so is what `python -m etl.record -e BabyAI-GoToLocal-v0` writes from minigrid's bot. All else is
as in etl/sources/minari/.

Invariant: a log's picture is the one that the simulator shows to an agent in the same state.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces

from etl.sources import Known, Recognition, SourceError, TaskScan, _recognition
from etl.sources.minari import Minari, disk, is_babyai
from etl.sources.minari.writer import MinariWriter
from schemas.episode import EpisodeError, FieldSpec
from simulators.suite import SimulatorError
from simulators.suites.minigrid import SUITE, TILE, draw

VIEW = (7, 7, 3)
PICTURE = (VIEW[1] * TILE, VIEW[0] * TILE, 3)
RESIZED = (64, 64)


class BabyAIWriter(MinariWriter):
    """Minari's layout in a folder of its own: the pictures of such logs are drawn when they are read."""

    folder = "data/logs/babyai"


class BabyAI(Minari):
    """Source of BabyAI's logs in Minari's format, their symbols drawn as pictures."""

    name = "babyai"
    writer = BabyAIWriter
    default_dataset = "minigrid/BabyAI-GoToLocal/optimal-v0"

    def known(self, cache: Path) -> list[Known]:
        """Downloaded datasets; Minari lists a group 'minigrid/BabyAI-LEVEL' for each level."""
        return [one for one in super().known(cache) if re.search(r"(?i)babyai|minigrid", one.id)]

    def recognise(self, input: Path) -> Recognition | None:
        """By the level that a Minari dataset names."""
        marks = disk.marks(input)
        return Recognition(f"{marks[0][0]} of BabyAI", _recognition.MARK) if is_babyai(marks) else None

    def scan(self, files: list[Path], options: Any) -> list[TaskScan]:
        """As Minari's. SourceError where minigrid, which draws the pictures, is missing."""
        try:
            SUITE.register()
        except SimulatorError as error:
            raise SourceError(str(error)) from None
        return super().scan(files, options)

    def field(self, key: str, space: spaces.Space) -> FieldSpec | None:
        """As Minari's, but for the symbolic view."""
        if key != "image":
            return super().field(key, space)
        if disk.shape_of(space) != VIEW:
            raise EpisodeError(
                "unsupported space",
                f"'image' is {disk.shape_of(space)}; BabyAI's agents see {VIEW} symbols: take the partial view, "
                "or read pictures with --source minari",
            )
        return FieldSpec(key, "image", PICTURE, resized=RESIZED, fit="pad")

    def values(self, spec: FieldSpec, space: spaces.Space, stored: np.ndarray) -> np.ndarray:
        """As Minari's; symbols (T, 7, 7, 3) become pictures (T, 56, 56, 3)."""
        if spec.kind != "image":
            return super().values(spec, space, stored)
        try:
            return draw(stored)
        except ValueError as error:
            raise EpisodeError("out of range", str(error)) from error


SOURCE = BabyAI()
