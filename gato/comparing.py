"""The comparison from Python: python -m eval.compare as a function.

    models + datasets -> eval.compare -> Outcome(rows, table, report)

Invariant: the same call and the same command give the same rows.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from rich.console import Console

from eval.compare import Outcome
from eval.compare import compare as run_comparison
from eval.display import lossy_console
from eval.options import Options
from schemas.ranges import typed
from shards.folder import is_url

Place = str | os.PathLike[str]


def compare(
    gato: Place | Iterable[Place] = (),
    datasets: Place | Iterable[Place] = (),
    output: Place = "results/compare",
    *,
    progress: bool = False,
    **options: Any,
) -> Outcome:
    """Play DT, TT, Gato, random actions and the logs' behaviour against each other, and write table and report.

    What was played before with the same weights, data and protocol is read again, so an interrupted call resumes.

    Args:
        gato: exported models as `gato.load` takes them; by default the newest in runs/, or the shipped one.
        datasets: dataset folders or URLs; by default all in data/shards. Without any, the tasks of the models.
        output: folder of rows.parquet, table.md, report.html, rollouts/ and parts/.
        progress: show progress on stderr.
        options: the command's other options, with underscores: models=["random", "gato"], episodes=20,
            step_limit=100, processes=1, ..., and those of the agent: agent={"decoding": "sample"}.

    Returns:
        Outcome: `rows`, a pyarrow table with one row per episode (schemas.result.RESULT_SCHEMA); `table`, Markdown;
        `report`, the path of report.html; `error`, why nothing could be played, or ''.

    Raises:
        TypeError: an option that does not exist.
        ValueError: an option, dataset or model cannot be used, or there is nothing to play; the message says why.
        OSError: a file cannot be written, or a worker process was killed.

    Example:
        >>> outcome = gato.compare(gato="tiny", models=["random", "gato"], episodes=3, output="results/tiny")
        >>> print(outcome.table)

    Several processes are started with `spawn`: a script calls this below `if __name__ == "__main__":`, or gives
    processes=1.
    """
    known = [field.name for field in fields(Options)]
    for name in options:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            raise TypeError(f"compare has no option '{name}'; {f'perhaps {near[0]}' if near else f'known: {known}'}")
    for name in ("models", "tasks", "imports"):
        if isinstance(options.get(name), str):
            options[name] = (options[name],)
    places = {"gato": _places(gato), "datasets": _places(datasets), "output": output}
    chosen = typed(Options, places | options)
    return run_comparison(chosen, lossy_console() if progress else Console(quiet=True))


def _places(given: Place | Iterable[Place]) -> tuple[str, ...]:
    """As text; a path keeps being a folder, though a shipped model may have its name."""
    each = [given] if isinstance(given, str | os.PathLike) else list(given)
    return tuple(
        os.fspath(one) if isinstance(one, str) or is_url(os.fspath(one)) else str(Path(one).absolute()) for one in each
    )
