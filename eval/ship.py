"""`python -m eval.ship RUN/export FOLDER`: a trained Gato that plays without its data, and as small as it goes.

    export + datasets -> the rows of the embedding table that its tasks can show + a prompt for each task -> FOLDER

Most of a small model is the table of text tokens, which a control task never uses. Without those rows the model is the
same function on its tasks: they are zero when the export is loaded, and actions are chosen among their own ids.

Invariant: FOLDER is an export as any other; its model.json is written last and vouches for both files by hash.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from safetensors.numpy import load_file, save

from eval.agents.prompts import AgentConfig, Prompt, best_demonstration
from schemas.dataset import DatasetError
from schemas.files import atomic_write, sha256_of
from schemas.terminal import command
from schemas.vocabulary import VocabularyMismatch
from shards.reader import Dataset, Store
from shards.stream import find_datasets
from trainer.checkpoint import CheckpointError
from trainer.model.export import PROMPTS, ExportInfo, load_export, save_export


@dataclass(frozen=True)
class Options:
    """Copy an export without what it does not need, and with what it needs to play."""

    source: Annotated[Path, tyro.conf.Positional]
    """Folder of an exported model."""
    output: Annotated[Path, tyro.conf.Positional]
    datasets: tuple[str, ...] = ()
    """Dataset folders or URLs that it was trained on, for prompts; all finished ones in --root where none is named."""
    root: str = "data/shards"


def prompts(info: ExportInfo, datasets: list[Dataset]) -> dict[str, np.ndarray]:
    """Prompts of the agent: 'TASK/end/tokens' (T, stored) uint16, 'TASK/end/patches' uint8; the same
    of 'start'. T: the timesteps of a whole window."""
    names, found = {task.name for task in info.tasks}, {}
    for dataset in datasets:
        for number, task in enumerate(dataset.manifest.tasks):
            if task.spec.name not in names or task.spec.action is None:
                continue
            window = info.sequence_length // dataset.layouts[number].length
            for kind, shown in (("end", slice(-window, None)), ("start", slice(window))):
                prompt = best_demonstration(dataset, number, kind)  # type: ignore[arg-type]
                found[f"{task.spec.name}/{kind}/tokens"] = prompt.tokens[shown].copy()
                if prompt.patches is not None:
                    found[f"{task.spec.name}/{kind}/patches"] = prompt.patches[shown].copy()
    if missing := sorted(names - {key.rsplit("/", 2)[0] for key in found}):
        raise DatasetError(f"task '{missing[0]}' of the export is in none of the datasets; name its folder")
    return found


def shipped_prompt(folder: Path, info: ExportInfo, task: str, config: AgentConfig) -> Prompt | None:
    """A task's prompt from the folder of the weights; None where none is wanted or none was shipped."""
    if config.prompt == "none" or not info.prompts_sha256:
        return None
    path = folder / PROMPTS
    if not path.is_file() or sha256_of(path) != info.prompts_sha256:
        raise CheckpointError(f"{path}: missing or damaged (sha256 differs from model.json); ship the export again")
    found, key = load_file(path), f"{task}/{config.prompt}"
    return Prompt(found[f"{key}/tokens"], found.get(f"{key}/patches"))


def ship(options: Options) -> int:
    """Write the copy; its bytes in all."""
    if options.output.resolve() == options.source.resolve():
        raise DatasetError(f"{options.output}: is the export itself, which is kept; give another folder")
    model, info = load_export(options.source)
    if any(field.kind == "text" for task in info.tasks for field in task.observation):
        raise DatasetError(f"{options.source}: its tasks have text, whose tokenizer is not part of an export")
    store = Store()
    folders = list(options.datasets) or find_datasets(options.root)
    body = save(prompts(info, [Dataset(folder, store=store) for folder in folders]))
    with atomic_write(options.output / PROMPTS) as file:
        file.write(body)
    first = info.vocabulary.text.stop if info.vocabulary.observation_discrete.start >= info.vocabulary.text.stop else 0
    weights = dict(model.state_dict())
    weights["tokens.weight"] = weights["tokens.weight"][first:].contiguous()
    info = replace(info, first_id=first, prompts_sha256=sha256_of(options.output / PROMPTS))
    save_export(options.output, weights, info)
    return sum(path.stat().st_size for path in options.output.iterdir() if path.is_file())


@command
def main() -> int:
    """The command; its exit status."""
    options = tyro.cli(Options, prog="python -m eval.ship", description=(__doc__ or "").splitlines()[0])
    try:
        size = ship(options)
    except (DatasetError, CheckpointError, VocabularyMismatch, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{options.output}: {size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
