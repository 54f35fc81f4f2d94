"""Training from Python: the `deepspeed` launcher in a child process, exactly as the command starts it.

    recipe or TrainConfig + overrides -> checked here -> config.json -> gato-train --config -> export folder

The child is on purpose, for one process too: training takes signals, threads of communication and a watchdog that ends
its process, none of which belong into a notebook; what the child prints comes through.

Invariant: the run that this starts is the run of the command; either one resumes the other.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import IO, Any

import trainer
from gato.data import Folders, folder_list
from trainer.config import TrainConfig, check, from_dict, to_dict
from trainer.recipes import RECIPES

# The child must find the very package that this process uses, wherever it is installed.
ROOT = str(Path(trainer.__file__).parent.parent)
LAUNCH = (
    f"import sys; sys.path.insert(0, {ROOT!r}); from trainer.launcher import main; sys.exit(main(end_with_parent=True))"
)


class TrainingError(RuntimeError):
    """A training ended without its export; the message is the training's own."""


def train(
    recipe: str | TrainConfig = "tiny",
    folders: Folders = (),
    output: str | os.PathLike[str] | None = None,
    steps: int | None = None,
    *,
    processes: int = 1,
    launcher_arguments: tuple[str, ...] = (),
    **overrides: Any,
) -> Path:
    """Train, or resume a training that was interrupted, and return the folder of the export.

    Args:
        recipe: name of a recipe (trainer/recipes.py), or a whole configuration.
        folders: datasets: folders, URLs or what `gato.build` returned; by default all in the recipe's root.
        output: the run's folder; by default the recipe's.
        steps: steps in all, those of an interrupted run included.
        processes: one per GPU, or processes on the CPU.
        launcher_arguments: further flags of the deepspeed launcher, such as ("--include", "localhost:1").
        overrides: single settings, by the names of the command line: **{"optimiser.peak_lr": 1e-3, "seed": 1}.

    Returns:
        OUTPUT/export, for `gato.load`.

    Raises:
        TypeError: a setting that does not exist.
        ValueError: a recipe that does not exist, or a setting out of range.
        TrainingError: the training failed; what it printed is on stdout and stderr.
    """
    config = configuration(recipe, folders, output, steps, overrides)
    check(config, processes)
    name = recipe if isinstance(recipe, str) else "custom"
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "config.json"
        path.write_text(json.dumps({"recipe": name} | to_dict(config)), "utf-8")
        flags = ["--num_gpus", str(processes), "--master_port", str(_free_port()), *launcher_arguments]
        status, error = _run([sys.executable, "-P", "-c", LAUNCH, *flags, "--config", str(path)])
    export = config.run.output / "export"
    if status or not (export / "model.json").is_file():
        raise TrainingError(error or f"the training ended with status {status}; see its output")
    return export


def configuration(
    recipe: str | TrainConfig,
    folders: Folders = (),
    output: str | os.PathLike[str] | None = None,
    steps: int | None = None,
    overrides: dict[str, Any] | None = None,
) -> TrainConfig:
    """The configuration that `train` runs. TypeError for a setting that does not exist, ValueError for a value."""
    if not isinstance(recipe, str | TrainConfig):
        raise TypeError(f"recipe={recipe!r}: give a recipe's name, such as 'tiny', or a TrainConfig")
    if isinstance(recipe, str) and recipe not in RECIPES:
        near = difflib.get_close_matches(recipe, RECIPES, n=3, cutoff=0.4) or list(RECIPES)
        raise ValueError(f"unknown recipe '{recipe}'; perhaps {' or '.join(near)}")
    base = RECIPES[recipe] if isinstance(recipe, str) else recipe
    raw = to_dict(base)
    settings = dict(overrides or {})
    for name, value in (
        ("data.folders", folder_list(folders) or None),
        ("run.output", output or None),
        ("steps", steps),
    ):
        if value is not None:
            settings[name] = value
    for name, value in settings.items():
        _set(raw, name, value)
    config = from_dict(raw)
    return dataclasses.replace(config, run=dataclasses.replace(config.run, output=config.run.output.absolute()))


def _set(tree: dict[str, Any], name: str, value: Any) -> None:
    """Set the setting at a dotted name, spelt with '_' or '-'."""
    *parents, last = name.replace("-", "_").split(".")
    branch: Any = tree
    for parent in parents:
        branch = branch.get(parent) if isinstance(branch, dict) else None
    if not isinstance(branch, dict) or last not in branch:
        known = [f"{part}.{key}" for part, sub in tree.items() if isinstance(sub, dict) for key in sub]
        near = difflib.get_close_matches(name, [*tree, *known], n=3)
        raise TypeError(f"no setting '{name}'" + (f"; perhaps {' or '.join(near)}" if near else ""))
    branch[last] = os.fspath(value) if isinstance(value, os.PathLike) else value


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _run(command: list[str]) -> tuple[int, str]:
    """Exit status of the command, and its line for the user if it failed. What it prints goes to sys.stdout and
    sys.stderr. An interrupt lets it save and end first."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace")
    assert process.stdout and process.stderr
    errors: list[str] = []
    threads = [
        threading.Thread(target=_forward, args=(process.stdout, sys.stdout, errors), daemon=True),
        threading.Thread(target=_forward, args=(process.stderr, sys.stderr, errors), daemon=True),
    ]
    for thread in threads:
        thread.start()
    try:
        status = process.wait()
    except BaseException:
        process.send_signal(signal.SIGTERM)
        process.wait()
        raise
    for thread in threads:
        thread.join(10)
    return status, errors[0] if errors else ""


def _forward(pipe: IO[str], to: Any, errors: list[str]) -> None:
    for line in pipe:
        if line.startswith("error: "):
            errors.append(line.removeprefix("error: ").strip())
        to.write(line)
        to.flush()
