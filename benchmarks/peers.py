"""`python -m benchmarks.peers --neko CHECKOUT --jat CHECKOUT`: our builds against two open Gatos' own preprocessing.

d4rl and atari logs -> our whole build: read, tokenize, write shards (etl.build, in this process)
the same episodes, given in the peer's own input format beforehand -> the peer's own functions, from its checkout

NEKO (ManifoldRG/NEKO) has no build: its Trainer samples windows from Minari files at every step. Timed are
ControlTask.sample_batch (reads episodes, cuts windows, to tensors, pads frames) and GatoPolicy.tokenize_input_dicts
(mu-law, bins, patches; tokens and masks interleaved), once as its Trainer calls them, windows of 1024 tokens, and once
on whole episodes, one a call, which it never does but which reads every timestep only once.
JAT (huggingface/jat): scripts/tokenize_stream.py, its build, from Parquet files on disk to Arrow files, with the hub's
functions replaced by local files; and JatProcessor alone with that script's arguments, one episode a call, on lists
of floats and PIL images in memory.

Left out in the peers' favour: conversion of the logs to the peer's format; what is model in NEKO's tokenizing
(embeddings of width 0, no convolutions on patches, no gradients); writing in NEKO and JatProcessor, and any reading in
the latter. JAT quantizes nothing and cuts no patches. The peers are no dependency of this project: their checkouts come
by path, and what they import must be importable here (PYTHONPATH): minari 0.4, gymnasium 0.29, transformers 4 and
einops for NEKO; transformers 4, datasets and torchvision for JAT.

Invariant: both sides of a ratio get the same timesteps, in this run, in turn, on the same one core and thread.
Rates and the ratio are of wall time; the ratio of CPU time is beside it, for machines that others use too.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import tyro

from benchmarks.etl import FOLDERS, SHARED, build_once, logs, multiply, one_core, timesteps
from etl import sources
from schemas.episode import RawEpisode, TaskSpec

REPEATS, SLOW = 3, 60.0  # turns; one that took so many seconds is not repeated
NEKO_PATCH_SIZE, NEKO_WINDOW = 16, 1024  # defaults of its TrainingArgs
NEKO_BATCH = 4  # sequences of one task in one call
TIMESTEPS = {"d4rl": 1_000_000, "atari": 72_000}  # so many at least
JAT_CONTEXT = 512  # max_position_embeddings of its small model, in scripts/generate_config_jat.py
JAT_DOMAIN = {"d4rl": "mujoco", "atari": "atari"}
JAT_LENGTH = {"d4rl": None, "atari": 64}  # max_length of its scripts, by a task's domain

Episodes = list[tuple[TaskSpec, list[RawEpisode]]]
Work = Callable[[], object]


@dataclass
class Options:
    """Our builds against NEKO's and JAT's own preprocessing of the same logs, one core each."""

    neko: Path | None = None
    """Checkout of ManifoldRG/NEKO."""
    jat: Path | None = None
    """Checkout of huggingface/jat."""
    logs: Path | None = None
    """Folder with d4rl/ and dqn_replay/; without it $GATO_SHARED_DATA, or logs recorded here."""


def pair(name: str, ours: Work, theirs: Work, amount: int) -> None:
    """Print both rates of the best turn and their ratios, above 1 where ours is faster."""
    wall, cpu = [float("inf")] * 2, [float("inf")] * 2
    for _ in range(REPEATS):
        if max(wall) > SLOW and wall[1] < float("inf"):
            break
        for n, work in enumerate((ours, theirs)):
            begun, used = time.perf_counter(), time.process_time()
            with contextlib.redirect_stdout(io.StringIO()):
                work()
            wall[n], cpu[n] = min(wall[n], time.perf_counter() - begun), min(cpu[n], time.process_time() - used)
    rates = f"{amount / wall[0]:,.0f} against {amount / wall[1]:,.0f} timesteps/s, ratio {wall[1] / wall[0]:.2f}"
    print(f"{name}: {rates} (CPU time: {cpu[1] / cpu[0]:.2f})", flush=True)


@contextlib.contextmanager
def needs(checkout: Path) -> Iterator[None]:
    """The checkout's modules can be imported. SystemExit names the import that is missing."""
    if not checkout.is_dir():
        raise SystemExit(f"error: {checkout}: no such folder; give the path of a checkout")
    if str(checkout.resolve()) not in sys.path:
        sys.path.append(str(checkout.resolve()))  # last: the peers have an eval.py and a tests/ of their own
    try:
        yield
    except ImportError as error:
        raise SystemExit(
            f"error: {checkout}: {error}; install what this peer needs in a folder of its own and put it on PYTHONPATH"
        ) from None


def commit(checkout: Path) -> str:
    found = subprocess.run(["git", "-C", checkout, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
    return found.stdout.strip() or "no git commit"


def read_episodes(place: Path, source: str) -> Episodes:
    """All episodes of the logs, by task."""
    known = sources.load(source)
    read: Episodes = []
    for scan in known.scan(known.resolve(place, None, place), known.options()):
        assert scan.task is not None
        found = list(known.read(scan.task, scan.episodes))
        read.append((scan.task, [episode for episode in found if isinstance(episode, RawEpisode)]))
    return read


def observations(episode: RawEpisode) -> np.ndarray:
    """(T, D) float32 or (T, 84, 84) uint8."""
    (values,) = episode.observation.values()
    return values[..., 0] if values.ndim == 4 else values


def bare_tokenizer() -> Any:
    """A text tokenizer of one word: both peers want one in hand, and control data never comes to it."""
    (tokenizers, transformers) = importlib.import_module("tokenizers"), importlib.import_module("transformers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", model_max_length=JAT_CONTEXT)


def neko(checkout: Path, folder: Path, episodes: Episodes) -> tuple[Work, Work]:
    """All episodes once through NEKO's tasks and policy, in windows and whole; Minari datasets are written untimed."""
    os.environ["MINARI_DATASETS_PATH"] = str(folder)
    with needs(checkout):
        torch, gymnasium, minari = map(importlib.import_module, ("torch", "gymnasium", "minari"))
        control = importlib.import_module("gato.tasks.control_task")
        policies = importlib.import_module("gato.policy.gato_policy")
        bare_tokenizer().save_pretrained(folder / "tokenizer")
    policy = policies.GatoPolicy(
        "cpu", embed_dim=0, layers=0, heads=1, dropout=0.0, patch_size=NEKO_PATCH_SIZE, resid_mid_channels=128,
        context_len=NEKO_WINDOW, tokenizer_model_name=str(folder / "tokenizer"),
    ).eval()  # fmt: skip
    policy.image_embedding.patch_embedding = torch.nn.Identity()

    tasks = []
    for spec, of_task in episodes:
        environment = _spaces(gymnasium, spec, observations(of_task[0]))
        name = spec.name.replace("/", "-").lower().removesuffix("-v4")
        dataset = minari.create_dataset_from_buffers(f"{name}-v0", environment, [_buffer(e) for e in of_task])
        arguments = SimpleNamespace(patch_size=NEKO_PATCH_SIZE)
        task = control.ControlTask(environment.spec.id, environment, dataset, NEKO_WINDOW, arguments)
        tasks.append((task, [episode.timesteps for episode in of_task]))

    @torch.inference_mode()
    def windows() -> None:
        for task, lengths in tasks:
            window = NEKO_WINDOW // task.tokens_per_timestep
            for _ in range(round(sum(lengths) / (NEKO_BATCH * window))):
                policy.tokenize_input_dicts(task.sample_batch(NEKO_BATCH, {}, "cpu", max_tokens=NEKO_WINDOW))

    @torch.inference_mode()
    def whole() -> None:
        for task, lengths in tasks:
            budget = (max(lengths) + 1) * task.tokens_per_timestep
            for n in range(len(lengths)):
                batch = task.sample_batch_configurable(1, "cpu", [0], [None], max_tokens=budget, ep_ids=[n])
                policy.tokenize_input_dicts(batch)

    return windows, whole


def _spaces(gymnasium: ModuleType, spec: TaskSpec, values: np.ndarray) -> Any:
    """An environment that has the task's spaces and id and never runs."""
    assert spec.action is not None and spec.environment is not None
    environment = gymnasium.Env()
    if values.dtype == np.uint8:
        environment.observation_space = gymnasium.spaces.Box(0, 255, values.shape[1:], np.uint8)
    else:
        environment.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, values.shape[1:], np.float32)
    if spec.action.kind == "discrete":
        environment.action_space = gymnasium.spaces.Discrete(spec.action.choices[0])
    else:
        environment.action_space = gymnasium.spaces.Box(-1, 1, (spec.action.size,), np.float32)
    environment.spec = gymnasium.envs.registration.EnvSpec(spec.environment.id)
    return environment


def _buffer(episode: RawEpisode) -> dict[str, np.ndarray]:
    """As Minari takes it: one observation more than actions, an end flag on the last timestep."""
    values, last = observations(episode), np.arange(episode.timesteps) == episode.timesteps - 1
    return {
        "observations": np.concatenate([values, values[-1:]]),
        "actions": episode.action,
        "rewards": episode.reward,
        "terminations": last,
        "truncations": ~last & False,
    }


def jat(checkout: Path, folder: Path, source: str, episodes: Episodes) -> tuple[Work, Work]:
    """All episodes once, through JAT's script and through its processor alone; Parquet files are written untimed."""
    with needs(checkout):
        datasets, image, transformers = map(importlib.import_module, ("datasets", "PIL.Image", "transformers"))
        processing = importlib.import_module("jat.processing_jat")
        script = _script(checkout / "scripts" / "tokenize_stream.py")
    datasets.disable_progress_bars()
    processor = processing.JatProcessor(transformers.CLIPImageProcessor(), bare_tokenizer())
    sequence, value = datasets.Sequence, datasets.Value
    columns = {
        "image_observations": sequence(datasets.Image()),
        "continuous_observations": sequence(sequence(value("float32"))),
        "discrete_actions": sequence(value("int64")),
        "continuous_actions": sequence(sequence(value("float32"))),
        "rewards": sequence(value("float32")),
    }

    def example(episode: RawEpisode) -> dict[str, list]:
        kind = "discrete" if episode.action.ndim == 1 else "continuous"
        values = observations(episode)
        if values.dtype == np.uint8:
            seen = {"image_observations": [[image.fromarray(frame) for frame in values]]}
        else:
            seen = {"continuous_observations": [values.tolist()]}
        return seen | {f"{kind}_actions": [episode.action.tolist()], "rewards": [episode.reward.tolist()]}

    examples: list[dict[str, list]] = []
    files: dict[str, str] = {}
    for spec, of_task in episodes:
        found = [example(episode) for episode in of_task]
        features = datasets.Features({key: columns[key] for key in found[0]})
        rows = [datasets.Dataset.from_dict(one, features=features) for one in found]  # one by one: frames are large
        name = f"{JAT_DOMAIN[source]}-{spec.name.replace('/', '-').lower()}"
        files[name] = str(folder / f"{name}.parquet")
        datasets.concatenate_datasets(rows).to_parquet(files[name], batch_size=1)
        examples += found

    cache = folder / "cache"
    datasets.config.HF_DATASETS_CACHE = cache  # also where the script's Dataset.from_generator writes
    script.AutoProcessor = SimpleNamespace(from_pretrained=lambda *_, **__: processor)
    script.load_dataset = lambda _, task, streaming: datasets.load_dataset(
        "parquet", data_files={"train": files[task]}, streaming=streaming
    )
    script.datasets = SimpleNamespace(get_dataset_config_names=lambda _: [])
    script.DatasetDict = type("DatasetDict", (datasets.DatasetDict,), {"push_to_hub": lambda *_, **__: None})

    def whole() -> None:
        shutil.rmtree(cache, ignore_errors=True)
        sys.argv = ["tokenize_stream.py", "--model_name_or_path", "local", "--tasks", *files]
        script.main()

    def alone() -> None:
        for one in examples:
            processor(**one, padding="max_length", truncation="preserve", max_length=JAT_LENGTH[source])

    return whole, alone


def _script(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


def peers(options: Options, folder: Path, source: str, episodes: Episodes) -> Iterator[tuple[str, Work]]:
    if options.neko:
        name, place = f"NEKO {commit(options.neko)}", folder / f"neko-{source}"
        place.mkdir()
        windows, whole = neko(options.neko, place, episodes)
        yield f"{name}, windows as its Trainer samples them, no writing", windows
        yield f"{name}, whole episodes at once, no writing", whole
    if options.jat:
        name, place = f"JAT {commit(options.jat)}", folder / f"jat-{source}"
        place.mkdir()
        whole, alone = jat(options.jat, place, source, episodes)
        yield f"{name}, scripts/tokenize_stream.py", whole
        yield f"{name}, JatProcessor alone, no reading or writing", alone


def bench(options: Options, folder: Path, source: str) -> None:
    """Our build of one source against each peer."""
    place = logs(folder, source)
    times = -(-TIMESTEPS[source] // timesteps(place, source))
    many, output = multiply(place, folder / f"{source}-many", source, times), folder / f"{source}-shards"
    count = timesteps(many, source)
    episodes = read_episodes(place, source)
    assert count == times * sum(episode.timesteps for _, of_task in episodes for episode in of_task)

    def ours() -> None:
        shutil.rmtree(output, ignore_errors=True)
        build_once(source, many, output)

    for name, work in peers(options, folder, source, episodes):

        def theirs(work: Work = work) -> None:
            for _ in range(times):
                work()

        with one_core():
            pair(f"peers: {source} build / {name}", ours, theirs, count)


def main() -> None:
    options = tyro.cli(Options, prog="python -m benchmarks.peers")
    if not (options.neko or options.jat):
        raise SystemExit("error: no peer; give --neko or --jat, the path of a checkout")
    if options.logs:
        os.environ[SHARED] = str(options.logs.resolve())
    os.environ["OMP_NUM_THREADS"] = "1"
    importlib.import_module("torch").set_num_threads(1)
    warnings.filterwarnings("ignore")  # the peers' own, on versions newer than theirs
    with tempfile.TemporaryDirectory() as name:
        for source in FOLDERS:
            bench(options, Path(name), source)


if __name__ == "__main__":
    main()
