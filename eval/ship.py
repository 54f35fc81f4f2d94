"""`python -m eval.ship RUN/export FOLDER`: a trained Gato that plays without its data, and as small as it goes.

    export + datasets -> the rows of the embedding table that its tasks can show + a prompt for each task -> FOLDER

Most of a small model is the table of text tokens, of which a control task uses none, or those of its instructions.
Without the other rows the model is the same function on its tasks: they are zero when the export is loaded, and actions
are chosen among their own ids. A word that no text of the datasets holds is zero too: it was never trained.

Invariant: FOLDER is an export like any other; its model.json is written last and has the hash of every other file.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from safetensors.numpy import save

from eval.agents.prompts import best_demonstration
from eval.jobs import known_tasks
from schemas.dataset import TEXT_MODEL_NAME, DatasetError
from schemas.files import atomic_write
from schemas.terminal import command
from schemas.vocabulary import VocabularyMismatch
from shards.folder import digest_of
from shards.reader import Dataset, Store
from shards.stream import find_datasets
from trainer.checkpoint import CheckpointError
from trainer.model.export import PROMPTS, ExportInfo, intact, load_export, save_export


@dataclass(frozen=True)
class Options:
    """Copy an export without what it does not need, and with what it needs to play."""

    source: Annotated[Path, tyro.conf.Positional]
    """Folder of an exported model."""
    output: Annotated[Path, tyro.conf.Positional]
    datasets: tuple[str, ...] = ()
    """Dataset folders or URLs that it was trained on, for prompts; all finished ones in --root where none is named."""
    root: str = "data/shards"
    picture_prompts: bool = True
    """Keep prompts of tasks with pictures, which may be most of the bytes."""


def tasks_in(info: ExportInfo, export: Path, datasets: list[Dataset]) -> dict[str, tuple[Dataset, int]]:
    """The export's tasks: name -> dataset and number in it. DatasetError or VocabularyMismatch for one that is in none
    of the datasets, in two, or is not what the export was trained on."""
    known = {task.spec.name: task for task in known_tasks(datasets)}
    found: dict[str, tuple[Dataset, int]] = {}
    for spec in info.tasks:
        if spec.name not in known:
            raise DatasetError(
                f"task '{spec.name}' of the export is in none of the datasets; name its folder (--datasets)"
            )
        held = known[spec.name]
        assert held.dataset is not None
        info.require_data(held.dataset.manifest, spec, str(held.dataset.place), str(export))
        found[spec.name] = held.dataset, held.number
    return found


def shown_in(
    info: ExportInfo, tasks: dict[str, tuple[Dataset, int]], pictures: bool
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Prompts and tokens of texts.

    Prompts: 'TASK/end/tokens' (T, stored) uint16, 'TASK/end/patches' uint8; the same of 'start'. T: the timesteps of a
    whole window. `pictures`: of tasks with pictures too. Tokens: ids, ascending, of all texts of the tasks."""
    found, texts = {}, [np.empty(0, np.uint16)]
    for name, (dataset, number) in tasks.items():
        layout = dataset.layouts[number]
        if layout.text:
            rows = np.concatenate([dataset.rows(number, held_out) for held_out in (False, True)])
            texts += [np.unique(dataset.tokens(int(row))[:, : layout.text]) for row in rows]
        if layout.patches and not pictures:
            continue
        for kind in ("end", "start"):
            prompt = best_demonstration(dataset, number, kind, info.sequence_length)
            found[f"{name}/{kind}/tokens"] = prompt.tokens
            if prompt.patches is not None:
                found[f"{name}/{kind}/patches"] = prompt.patches
    return found, np.unique(np.concatenate(texts))


def text_model(info: ExportInfo, export: Path, tasks: dict[str, tuple[Dataset, int]]) -> bytes | None:
    """The text model of the export's tasks: its own, or in an export from before 2026-11-29 that of their datasets."""
    if info.text_sha256:
        return intact(export / TEXT_MODEL_NAME, info.text_sha256).read_bytes()
    found = {dataset.text_model() for dataset, number in tasks.values() if dataset.layouts[number].text}
    if len(found) > 1:
        raise DatasetError(
            f"{export}: the datasets of its tasks have different text models; name those that it was trained on "
            "(--datasets)"
        )
    return next(iter(found), None)


def kept_rows(info: ExportInfo, texts: np.ndarray) -> tuple[tuple[int, int], ...]:
    """Rows [start, stop) of the embedding table: those of `texts`, and all but the text's; () for all of them."""
    text, size = info.vocabulary.text, info.vocabulary.padded_size
    if info.vocabulary.observation_discrete.start < text.stop:
        return ()  # ids are shared
    wanted = np.ones(size, bool)
    wanted[text.start : text.stop] = False
    wanted[texts] = True
    edges = np.flatnonzero(np.diff(wanted, prepend=False, append=False)).tolist()
    return tuple(zip(edges[::2], edges[1::2]))


def ship(options: Options) -> int:
    """Write the copy; its bytes in all."""
    if options.output.resolve() == options.source.resolve():
        raise DatasetError(f"{options.output}: is the export itself, which is kept; give another folder")
    model, info = load_export(options.source)
    if silent := [task.name for task in info.tasks if task.action is None]:
        raise DatasetError(f"{options.source}: task '{silent[0]}' has no actions and needs the whole table; use the "
                           "export itself")  # fmt: skip
    store = Store()
    folders = list(options.datasets) or find_datasets(options.root)
    datasets = [Dataset(folder, store=store) for folder in folders]
    tasks = tasks_in(info, options.source, datasets)
    found, texts = shown_in(info, tasks, options.picture_prompts)
    text = text_model(info, options.source, tasks)
    body = save(found)
    with atomic_write(options.output / PROMPTS) as file:
        file.write(body)
    kept = kept_rows(info, texts)
    weights = dict(model.state_dict())
    if kept:
        weights["tokens.weight"] = torch.cat([weights["tokens.weight"][start:stop] for start, stop in kept])
    info = replace(info, kept=kept, prompts_sha256=digest_of(body), text_sha256="")
    save_export(options.output, weights, info, text)
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
