"""One dataset from logs: the options of `etl.build`, and the steps from them to a manifest.

recognise source -> resolve files -> scan -> filter -> plan -> Beam pipeline (progress by shards) -> gather

Invariant: a folder holds a dataset when `build` has returned, or one that says the same of the same files already; a
build that fails keeps its finished shards, and the dataset that was there, unless it may be overwritten.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.markup import escape

from etl import sources
from etl.building import filters, oddities, pipeline, summary
from etl.building.gather import gather, require_values
from etl.building.plan import BuildConfig, ShardPlan, given_options, make_plan, manifest_config, with_pictures
from etl.building.renaming import names_of, unlike_environment, with_names
from etl.fetch import remote
from etl.sources import Source, SourceError, TaskScan
from etl.tokenizers import text as texts
from schemas.dataset import MANIFEST_NAME, TEXT_MODEL_NAME, DatasetError, Manifest, parse_manifest
from schemas.episode import Document
from schemas.files import home_expanded, require_folder
from schemas.layout import PATCH_SIZE, layout_of
from schemas.vocabulary import by_name
from shards.folder import Folder, is_url
from simulators import plugins


@dataclass(frozen=True)
class Options:
    """Tokenize offline-RL logs into a dataset of WebDataset shards, through Apache Beam.

    Beam's own flags pass through: --runner, --direct_num_workers, --flink_master and so on.
    """

    source: str | None = None
    """Log format: d4rl, minari, atari, lerobot, rlds, ... or one of your own; by default what the input looks like."""
    input: Annotated[str | None, tyro.conf.arg(aliases=["-i"])] = None
    """A file or a folder of logs, or the fsspec URL of one (s3://bucket/logs); of what etl.record --suite wrote, every
    format becomes a dataset in a folder of its own. Without it, --dataset is downloaded."""
    output: Annotated[str | None, tyro.conf.arg(aliases=["-o"])] = None
    """Dataset folder to write, or its fsspec URL; data/shards/SOURCE where not given."""
    dataset: str | None = None
    """A dataset by name, such as hopper-medium-v2, Pong/1 or D4RL/hopper/medium-v0; see --list."""
    list: bool = False
    """Show the datasets that --dataset knows, and which of them are in the cache; build nothing."""
    cache: Path = Path(os.environ.get("GATO_CACHE", "~/.cache/gato"))
    """Where downloads are kept."""
    workers: int = 1
    """Processes on this machine (Beam's multi_processing mode when above 1)."""
    max_rejected_share: float = 0.1
    """The build fails when more than this share of the episodes had to be rejected; a file that cannot be read counts
    as one, exact copies do not count."""
    max_clipped_share: float = 0.5
    """The build fails when more than this share of a task's action values lies beyond their range: the range is wrong,
    then."""
    strict: bool = False
    """Refuse what may be read wrongly, where otherwise a warning is given, and what is lost: more than 1 in 100 action
    values that are clipped, or more than one observation value clipped or text cut per 100 timesteps."""
    overwrite: bool = False
    """Replace a different dataset in the output folder."""
    text_model: Path = texts.DEFAULT_MODEL
    """SentencePiece model of text tokens; one of 32,000 pieces ships."""
    train_tokenizer: bool = False
    """Train a SentencePiece model on the input's own texts first; it is kept in the dataset as text.model."""
    tokenizer_pieces: int = 32_000
    """Pieces of the model that --train-tokenizer makes."""
    imports: plugins.Imports = ()
    """Module to import first, here and in every worker: it registers sources, suites or environments. May be given
    several times."""
    config: tyro.conf.OmitArgPrefixes[BuildConfig] = field(default_factory=BuildConfig)
    scan: tyro.conf.Suppress[Any] = None
    """Options of the source, a `sources.load(source).options`; its defaults where None. Flat on the command line."""
    evidence: tyro.conf.Suppress[str] = ""
    """Why the source was chosen, where `with_source` chose it."""


def build(options: Options, beam_arguments: list[str], console: Console) -> Manifest:
    """Make the dataset. DatasetError or SourceError name what is wrong."""
    plugins.load(options.imports)
    options = with_source(options, console)
    assert options.source is not None
    source = with_names(sources.load(options.source), options.config.rename)
    if options.evidence:
        console.print(f"{options.input}: read as {source.name} ({options.evidence})", highlight=False, soft_wrap=True)
    scan_options = options.scan or source.options()
    _check(options, scan_options)
    options = replace(options, config=replace(options.config, source_options=given_options(scan_options)))
    output = (options.output or f"data/shards/{options.source}").removeprefix("file://")
    folder = Folder(output if is_url(output) else Path(output).absolute())  # a worker may stand in another folder
    files, origins = _inputs(options, source, console)
    found = [with_pictures(scan, options.config) for scan in source.scan(files, scan_options)]
    scans = [filters.apply(source, scan, options.config.filter) for scan in found]
    scans = [_with_size(scan) for scan in scans]
    if getattr(scan_options, "environment", None):
        scans = [_with_environment(scan) for scan in scans]
    text = _text_model(options, source, scans)
    plan = make_plan(source.name, scans, options.config, text.fingerprint if text else None, origins)
    doubts = [*_links(options.input), *(line for scan in scans for line in scan.warnings)]
    for kind, lines in (("warning", doubts), ("note", [line for scan in scans for line in scan.notes])):
        for line in lines:
            console.print(f"[yellow]{kind}[/] {escape(line)}", highlight=False, soft_wrap=True)
    for rejection in (r for scan in scans for r in scan.rejected if r.position < 0):
        console.print(f"[yellow]rejected[/] {rejection.file}: {rejection.reason}: {rejection.detail}", highlight=False)
    if options.strict and doubts:
        more = f" (and {len(doubts) - 1} more)" if len(doubts) > 1 else ""
        raise DatasetError(f"--strict: {doubts[0]}{more}")
    if not plan:
        raise DatasetError(f"nothing usable in the input: {_why_nothing(scans)}")
    existing = _existing_dataset(options, folder, plan, console)
    if existing is not None:
        require_values(folder, existing, options.max_clipped_share, options.strict)
        summary.show_oddities(oddities.load(folder), console)
        return existing
    if foreign := pipeline.foreign_files(folder):
        shown = f"{len(foreign)} files that are no dataset's, such as {foreign[0]}, which stay"
        console.print(f"[yellow]warning[/] {folder}: holds {shown}", highlight=False, soft_wrap=True)
    with pipeline.exclusive(folder):
        pipeline.remove_dataset(folder)
        if text is not None:
            folder.write(TEXT_MODEL_NAME, text.bytes)
        look = pipeline.LOOK_SECONDS[folder.local is None]
        with summary.Progress(plan, lambda: pipeline.finished_numbers(folder), console, look) as progress:
            pipeline.run(plan, folder, beam_arguments, progress.message, options.imports)
        rejected, clipped = options.max_rejected_share, options.max_clipped_share
        manifest = gather(plan, scans, folder, options.config, rejected, text, clipped, options.strict)
    summary.show_oddities(oddities.load(folder), console)
    return manifest


def _with_size(scan: TaskScan) -> TaskScan:
    """The scan, with a note where a timestep of its task is longer than a context."""
    line = oddities.too_long(scan.task) if scan.task and scan.episodes else None
    return replace(scan, notes=(*scan.notes, f"{scan.task.name}: {line}")) if scan.task and line else scan


def _with_environment(scan: TaskScan) -> TaskScan:
    """The scan, with a note where the environment of the command line has other fields than its task."""
    line = unlike_environment(scan.task) if scan.task and scan.episodes else None
    return replace(scan, notes=(*scan.notes, f"{scan.task.name}: {line}")) if scan.task and line else scan


def with_source(options: Options, console: Console) -> Options:
    """The options with a source: the one given, or what the input looks like, or else the one that knows the dataset.
    SourceError where that is none or several, ValueError where the output cannot be a folder."""
    if options.output and not is_url(options.output):
        require_folder("output", options.output.removeprefix("file://"))
    if options.source is not None:
        return options
    if options.input:
        place, _ = _place(options, console)
        source, evidence = sources.recognise(place)
        return replace(options, source=source.name, evidence=evidence)
    return replace(options, source=sources.of_dataset(options.dataset, _cache(options)))


def _check(options: Options, scan: Any) -> None:
    """ValueError names the first option whose value makes no sense."""
    config, filter = options.config, options.config.filter
    by_name(config.vocabulary)
    names_of(config.rename)
    scan.check()
    for name, value, low, high in (
        ("workers", options.workers, 1, 2**16),
        ("max-rejected-share", options.max_rejected_share, 0, 1),
        ("max-clipped-share", options.max_clipped_share, 0, 1),
        ("tokenizer-pieces", options.tokenizer_pieces, 1, 2**16),
        ("shard-megabytes", config.shard_megabytes, 2**-20, 2**20),
        ("piece-timesteps", config.piece_timesteps, 1, 2**30),
        ("held-out-share", config.held_out_share, 0, 1),
        ("frame-stack", config.frame_stack, 1, 2**10),
        ("min-return", filter.min_return, -math.inf, math.inf),
        ("expert-share", filter.expert_share, 0, math.inf),
        ("first-episodes", filter.first_episodes, 1, 2**62),
        ("max-timesteps", filter.max_timesteps, 1, 2**62),
    ):
        if value is not None and not low <= value <= high:
            raise ValueError(f"--{name} {value}: give a number from {low:g} to {high:g}")
    size = config.image_size
    if size is not None and any(side % PATCH_SIZE or not 0 < side <= 2**12 for side in size):
        raise ValueError(f"--image-size {size[0]} {size[1]}: give height and width in multiples of {PATCH_SIZE}")
    for name, place in (("input", options.input), ("output", options.output)):
        if place == "":
            raise ValueError(f"--{name} is empty; give a folder, or leave it out")


def _inputs(options: Options, source: Source, console: Console) -> tuple[list[Path], dict[str, str]]:
    """Files to read, and where those that were fetched came from."""
    place, origins = _place(options, console) if options.input else (None, {})
    return source.resolve(place, options.dataset, _cache(options)), origins


def _place(options: Options, console: Console) -> tuple[Path, dict[str, str]]:
    """The input on this machine, fetched where it is a URL, and where its files came from."""
    given = (options.input or "").removeprefix("file://")
    if is_url(given):
        return remote.fetch(given, _cache(options), console)
    place = Path(given).absolute()  # a worker may stand in another folder
    if not place.exists():
        raise SourceError(f"{place}: no such file or folder; give --input an existing one")
    return place, {}


def _cache(options: Options) -> Path:
    return home_expanded(options.cache).absolute()


def _links(given: str | None) -> list[str]:
    """A line where the input folder holds links to folders: they are not followed, since they may lead anywhere."""
    place = Path((given or "").removeprefix("file://"))
    if not given or is_url(given) or not place.is_dir():
        return []
    found = [Path(folder) / name for folder, below, _ in os.walk(place) for name in below]
    links = sorted(str(path.relative_to(place)) for path in found if path.is_symlink())
    if not links:
        return []
    more = f" and {len(links) - 3} more" if len(links) > 3 else ""
    return [f"{place}: links to folders are not followed: {', '.join(links[:3])}{more}; copy them, or give each as "
            "--input"]  # fmt: skip


def _text_model(options: Options, source: Source, scans: list[TaskScan]) -> texts.TextTokenizer | None:
    """The text model, where any task holds text; trained first where asked."""
    holding = [scan for scan in scans if scan.task and scan.episodes and layout_of(scan.task).text]
    if options.train_tokenizer and not any(scan.task and scan.task.action is None for scan in holding):
        raise SourceError(f"--train-tokenizer needs documents to train on, and source '{source.name}' gave none")
    if not holding:
        return None
    vocabulary = by_name(options.config.vocabulary)
    if not options.train_tokenizer:
        return texts.TextTokenizer(options.text_model, vocabulary)

    def documents() -> Iterator[str]:
        for scan in holding:
            assert scan.task is not None
            read = source.read(scan.task, scan.episodes)
            yield from (document.text for document in read if isinstance(document, Document))

    return texts.TextTokenizer(texts.train(documents(), options.tokenizer_pieces), vocabulary)


def _existing_dataset(options: Options, folder: Folder, plan: list[ShardPlan], console: Console) -> Manifest | None:
    """The dataset that is in the folder already, if it is complete and this plan would make it again. DatasetError
    where it is another one, unless it may be overwritten."""
    data = folder.read(MANIFEST_NAME)
    if data is None:
        return None
    try:
        existing = parse_manifest(data, folder.path(MANIFEST_NAME))
    except ValueError as error:
        if options.overwrite:
            return None
        raise DatasetError(f"{str(error).partition(';')[0]}; give --overwrite to build it again") from None
    # a reference score that has become known since then changes no token
    then = {task.spec.name: task.spec.score for task in existing.tasks}
    tasks = [replace(shard.task, score=then.get(shard.task.name, shard.task.score)) for shard in plan]
    config = manifest_config([replace(shard, task=task) for shard, task in zip(plan, tasks)], options.config)
    if "source_options" not in existing.config and _before_source_options(folder):
        config.pop("source_options", None)
    if existing.config == config and not _newer(plan, folder):
        damaged = pipeline.damaged_file(folder, existing)
        if damaged is None:
            console.print(f"{folder}: already built from these files with these options", highlight=False)
            return existing
        console.print(f"{folder.path(damaged)}: missing or damaged; building the dataset again", highlight=False)
    elif not options.overwrite:
        raise DatasetError(f"{folder}: holds another dataset; give another --output, or --overwrite to replace it")
    return None


def _before_source_options(folder: Folder) -> bool:
    """True if a version made the dataset that kept no options of its source: one without oddities beside it."""
    return folder.read(oddities.NAME) is None


def _newer(plan: list[ShardPlan], folder: Folder) -> bool:
    """True if an input file was changed after the dataset was finished."""
    if folder.local is None:
        return False
    made = (folder.local / MANIFEST_NAME).stat().st_mtime_ns
    return any(time > made for shard in plan for path, _, time in shard.stamps if path not in shard.origins)


def _why_nothing(scans: list[TaskScan]) -> str:
    lines = [r for scan in scans for r in scan.rejected]
    if lines:
        return f"{lines[0].file}: {lines[0].reason}: {lines[0].detail}"
    filtered = sum(scan.filtered for scan in scans)
    return f"the filters left out all of its {filtered} episodes" if filtered else "it holds no episode"
