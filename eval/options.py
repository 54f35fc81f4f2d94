"""Options of `python -m eval.compare`, and the check of their values.

command line, or gato.compare's arguments -> Options -> check

Invariant: options that make no sense are refused before anything is trained or played.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from eval.agents import AgentConfig
from schemas.files import require_folder
from schemas.ranges import require
from simulators import plugins
from simulators.rollout import COMPARED

Model = Literal["random", "behaviour", "dt", "tt", "gato"]
Budget = Literal["quick", "cpu", "long", "paper"]


@dataclass(frozen=True)
class Options:
    """Play the real simulators with DT, TT and Gato; print and save
    `Dataset | Environment | DT | TT | Gato | Random | Behaviour`."""

    gato: tuple[str, ...] = ()
    """Exported models: folders (RUN/export), URLs or shipped names (tiny), trained with different seeds where there
    are several. Default: the newest runs/*/export, or else the shipped tiny."""
    datasets: tuple[str, ...] = ()
    """Dataset folders or URLs; all finished ones in --root where none is named."""
    root: str = "data/shards"
    tasks: tuple[str, ...] = ()
    """Only these tasks of the datasets."""
    models: tuple[Model, ...] = ("random", "behaviour", "dt", "tt", "gato")
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("results/compare")
    baselines: Path = Path("runs/baselines")
    """Folder of trained baselines."""
    budget: Budget = "quick"
    """Size and training steps of the baselines: a minute of one core, some minutes, half an hour, or those of their
    papers."""
    episodes: int = 10
    """Episodes of each model, environment and model seed."""
    seeds: int = 1
    """Model seeds of each baseline; Gato has those it was trained with."""
    first_seed: int = COMPARED.start
    """Episode n is reset with first_seed + n, the same for every model."""
    step_limit: int | None = None
    """End episodes after this many timesteps; part of the protocol that every row names. Where an environment has no
    limit of its own, 100 times the log's longest episode."""
    film_seconds: float = 6.0
    """Length of each rollout picture; 0 for none."""
    processes: int = 0
    """Parts that are trained and played at once; 0: one per CPU core, or a single one with a GPU."""
    threads: int = 1
    """Threads of a process. The last digits of a float depend on it, and so may an action."""
    imports: plugins.Imports = ()
    """Module to import first, here and in every worker process: it registers environments or suites. May be given
    several times."""
    agent: AgentConfig = field(default_factory=AgentConfig)


def check(options: Options) -> None:
    """ValueError names a setting that makes no sense."""
    for name, value, least, most in (
        ("episodes", options.episodes, 1, 10**6),
        ("seeds", options.seeds, 1, 10**4),
        ("first-seed", options.first_seed, 0, 2**31),
        ("step-limit", 1 if options.step_limit is None else options.step_limit, 1, 10**9),
        ("processes", options.processes, 0, 4096),
        ("threads", options.threads, 1, 4096),
        ("film-seconds", options.film_seconds, 0, 3600),
    ):
        require(name, value, least, most)
    options.agent.check()
    require_folder("output", options.output)
    require_folder("baselines", options.baselines)
