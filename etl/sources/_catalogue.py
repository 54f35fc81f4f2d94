"""Facts about known datasets and games: the JSON tables beside this file.

`d4rl.json`: D4RL's 155 dataset ids (arXiv 2004.07219) with address, time limit, reference returns, and the
gymnasium environment that takes the same observations and actions, where there is one. The mazes have none
(their goal is fixed and unseen, gymnasium-robotics draws it), nor has the kitchen (60 values, not 59).
`atari.json`: games of the Arcade Learning Environment with the size of their minimal action set, the random and
human returns of human-normalised scores (arXiv 1511.06581), and whether DQN-Replay logged them.

Invariant: no simulator is imported; the tables are plain data, checked against the packages by tests.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from schemas.episode import EnvironmentSpec, ScoreReference
from simulators.registry import environment


@dataclass(frozen=True)
class Dataset:
    """One D4RL dataset. `environment` and `score` are None where there is no equal or no reference."""

    id: str
    url: str
    environment: EnvironmentSpec | None
    score: ScoreReference | None
    max_episode_steps: int


@dataclass(frozen=True)
class Game:
    """One Atari game: gymnasium's name ('SpaceInvaders'), minimal action set size, human reference if any."""

    name: str
    actions: int
    score: ScoreReference | None
    dqn_replay: bool


@cache
def d4rl_datasets() -> dict[str, Dataset]:
    """All D4RL datasets by id."""
    datasets = {}
    for name, row in _table("d4rl").items():
        spec = environment(row["environment"], row["kwargs"]) if row["environment"] else None
        score = _score("d4rl", row["low"], row["high"])
        datasets[name] = Dataset(name, row["url"], spec, score, row["max_episode_steps"])
    return datasets


@cache
def games() -> dict[str, Game]:
    """All games by normalised name: lower-case letters and digits only."""
    return {
        _normalise(name): Game(name, row["actions"], _score("human", row["random"], row["human"]), row["dqn_replay"])
        for name, row in _table("atari").items()
    }


def game(name: str) -> Game | None:
    """The game of that name, however it is spelt: 'SpaceInvaders', 'space_invaders'."""
    return games().get(_normalise(name))


def suggest(name: str, known: Iterable[str]) -> str:
    """'did you mean A, B?' for a name that is not among `known`; the empty string where nothing is near."""
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"; did you mean {', '.join(near)}?" if near else ""


@cache
def _table(name: str) -> dict[str, dict[str, Any]]:
    return json.loads((Path(__file__).parent / f"{name}.json").read_text("utf-8"))


def _score(kind: Literal["d4rl", "human"], low: float | None, high: float | None) -> ScoreReference | None:
    return None if low is None or high is None else ScoreReference(kind, low, high)


def _normalise(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
