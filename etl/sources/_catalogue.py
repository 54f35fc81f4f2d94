"""What is known beforehand about datasets, environments and games: the JSON tables beside this file.

`d4rl.json`: D4RL's 155 dataset ids (arXiv 2004.07219) with address, time limit, reference returns, and the
gymnasium environment that takes the same observations and actions, where there is one. The mazes have none
(their goal is fixed and unseen, gymnasium-robotics draws it), nor has the kitchen (60 values, not 59).
`environments.json`: gymnasium ids with suite and time limit.
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
from simulators import oldgym


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


def environment(id: str, kwargs: dict[str, Any] | None = None) -> EnvironmentSpec:
    """The environment of a gymnasium id, or of the old gym's, written gym/ID; suite 'gymnasium' where the table does
    not know it."""
    suite = "minigrid" if id.startswith(("BabyAI-", "MiniGrid-")) else "gym" if is_old(id) else "gymnasium"
    return EnvironmentSpec(_table("environments").get(id, {}).get("suite", suite), id, dict(kwargs or {}))


def is_old(id: str) -> bool:
    """Whether it names an environment of the old gym or of d4rl: gym/ID."""
    return id.startswith(oldgym.PREFIX)


def time_limit(id: str) -> int | None:
    """max_episode_steps of a gymnasium id, None where the table does not know it."""
    return _table("environments").get(id, {}).get("max_episode_steps")


def body_reference(id: str) -> ScoreReference | None:
    """D4RL's reference returns of an environment's body, whatever the version: 'Hopper-v4' -> Hopper's."""
    return _body_references().get(_body(id))


def suggest(name: str, known: Iterable[str]) -> str:
    """'did you mean A, B?' for a name that is not among `known`; the empty string where nothing is near."""
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"; did you mean {', '.join(near)}?" if near else ""


@cache
def _body_references() -> dict[str, ScoreReference]:
    return {_body(d.environment.id): d.score for d in d4rl_datasets().values() if d.environment and d.score}


@cache
def _table(name: str) -> dict[str, dict[str, Any]]:
    return json.loads((Path(__file__).parent / f"{name}.json").read_text())


def _score(kind: Literal["d4rl", "human"], low: float | None, high: float | None) -> ScoreReference | None:
    return None if low is None or high is None else ScoreReference(kind, low, high)


def _body(id: str) -> str:
    return id.removeprefix(oldgym.PREFIX).rsplit("-v", 1)[0]


def _normalise(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
