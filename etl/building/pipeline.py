"""Writing a plan's shards through Beam, on whichever runner.

plan -> Create | Reshuffle | ParDo(write_shard) -> shards and their records in the folder

Nothing but ShardPlans passes between workers: each worker reads its own episodes, writes its shard under a
temporary name, renames it, and then leaves a record of it. The chain is linear and its elements are small, so that
it runs on every runner, and order, retries and worker count cannot show in the bytes.

Invariant: when `run` returns every shard of the plan has been written; when it raises, what is finished is kept.
"""

from __future__ import annotations

import fcntl
import os
import re
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

import apache_beam as beam
import psutil
from apache_beam.options.pipeline_options import DirectOptions, PipelineOptions, PortableOptions

from etl.building import oddities
from etl.building.heartbeat import Watch, WorkerLost
from etl.building.plan import ShardPlan
from etl.building.shard import BUILD_FOLDER, write_shard
from etl.sources import SourceError
from schemas.dataset import (
    INDEX_NAME,
    MANIFEST_NAME,
    REJECTED_NAME,
    SHARDS_NAME,
    TEXT_MODEL_NAME,
    DatasetError,
    Manifest,
    parse_shards,
)
from schemas.files import gone
from shards.folder import Folder
from shards.writer import shard_name
from simulators import plugins

ATTEMPTS = 3  # of a build whose own worker processes die
OWN_NAMES = (MANIFEST_NAME, INDEX_NAME, SHARDS_NAME, REJECTED_NAME, TEXT_MODEL_NAME, oddities.NAME, "shard-*.tar")
NO_PROXY = "no_grpc_proxy"
CONNECT_SECONDS = 5.0
BEAM_THREADS = ("run_worker", "wait_until_finish_read", "beam_control_read")
OWN_ERROR = re.compile(r"(?:RuntimeError: )?(?:[\w.]+\.)?(?:DatasetError|SourceError): (.*)")
VANISHED = re.compile(r"FileNotFoundError: .*\.tmp'")  # a temporary file of the output, or its folder
LOOK_SECONDS = (0.25, 2.0)  # between looks into a local folder, into a remote one


class WriteShard(beam.DoFn):
    """A ShardPlan's bytes -> number of the shard written; everything else stays in the folder."""

    def __init__(self, place: str, imports: tuple[str, ...] = ()):
        self.place, self.imports = place, imports

    def setup(self) -> None:
        """A worker knows the user's sources too."""
        plugins.load(self.imports)

    def process(self, plan: bytes) -> Iterator[int]:
        yield write_shard(ShardPlan.from_bytes(plan), self.place).number


def run(
    plan: list[ShardPlan],
    folder: Folder,
    beam_arguments: list[str],
    message: Callable[[str], None] = lambda line: None,
    imports: tuple[str, ...] = (),
) -> None:
    """Write every shard of the plan with the chosen Beam runner; blocks until all are written. DatasetError where
    workers were lost and the build could not recover by itself."""
    _reach_own_workers()
    options = PipelineOptions(beam_arguments, save_main_session=False)
    own_workers = options.view_as(DirectOptions).direct_running_mode == "multi_processing"
    if own_workers:
        require_loopback()
    loopback = folder.local is not None and _external_here(options.view_as(PortableOptions))
    if any("FnApiRunner" in argument for argument in beam_arguments) and not own_workers:
        try:
            _write(plan, folder, options, imports)  # in this process: there is no other one to lose
        except (DatasetError, SourceError) as error:
            raise type(error)(_cause(error)) from None
        except RuntimeError as error:  # Beam wraps whatever a DoFn raises
            if "KeyboardInterrupt" in str(error):
                raise KeyboardInterrupt from None
            raise
        return
    log = (folder.local or Path(tempfile.gettempdir())) / BUILD_FOLDER / "workers.log"
    for attempt in range(1, ATTEMPTS + 1):
        try:
            with _stderr_into(log, own_workers):
                _watched(plan, folder, options, own_workers or loopback, imports)
            return
        except WorkerLost as error:
            if not own_workers or attempt == ATTEMPTS:
                raise DatasetError(
                    f"{folder}: {error}; the finished shards are kept: see that the workers run, and give the same "
                    "command again"
                ) from None
            message(f"{error}; starting the workers again (attempt {attempt + 1} of {ATTEMPTS})")
            end_children()
        except (DatasetError, SourceError):
            raise
        except Exception as error:  # each runner has exceptions of its own (gRPC's, Dask's)
            if own := OWN_ERROR.fullmatch(_cause(error)):
                raise DatasetError(own.group(1)) from None
            where = f"; see {log}" if own_workers else ""
            raise DatasetError(f"{folder}: the runner failed: {_cause(error)}{where}") from error


def _reach_own_workers() -> None:
    """gRPC asks the proxy of the environment for localhost too, unless it is excepted; Beam's processes talk to each
    other there."""
    excepted = [os.environ.get(NO_PROXY) or os.environ.get("no_proxy", "")]
    os.environ[NO_PROXY] = ",".join([*filter(None, excepted), "localhost", "127.0.0.1", "::1"])


def require_loopback() -> None:
    """DatasetError unless this machine reaches itself as Beam's processes reach each other: gRPC tries for ever."""
    try:
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        with socket.create_server(("", 0), family=family, dualstack_ipv6=both) as server:
            socket.create_connection(("localhost", server.getsockname()[1]), CONNECT_SECONDS).close()
    except OSError as error:
        raise DatasetError(
            f"--workers: processes on this machine cannot reach each other at localhost ({error.strerror or error}); "
            "give --workers 1, or bring the loopback interface up (ip link set lo up) and see that /etc/hosts has "
            "'127.0.0.1 localhost'"
        ) from None


def _external_here(options: PortableOptions) -> bool:
    """True if the job service and the worker pool are on this machine. A job service alone says nothing: that of a
    cluster is often started here, and the cluster may let a job wait."""
    places = (options.job_endpoint or "", options.environment_config or "")
    return options.environment_type == "EXTERNAL" and all(p.startswith(("localhost", "127.0.0.1")) for p in places)


def _cause(error: Exception) -> str:
    """The telling line of an exception: gRPC's details, or the last one, since Beam packs a worker's exception with
    its traceback into its own."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    cause = next((line for line in lines if line.startswith("details = ")), lines[-1])
    return cause.partition(" [while running")[0][:600]


def _write(plan: list[ShardPlan], folder: Folder, options: PipelineOptions, imports: tuple[str, ...]) -> None:
    try:
        with beam.Pipeline(options=options) as pipeline:
            _ = (
                pipeline
                | "plan" >> beam.Create([shard.to_bytes() for shard in plan], reshuffle=False)
                | "spread" >> beam.Reshuffle()
                | "write" >> beam.ParDo(WriteShard(str(folder), imports))
            )
    except Exception as error:  # each runner has exceptions of its own
        if VANISHED.search(_cause(error)):
            raise DatasetError(gone(str(folder))) from None
        raise


def _watched(
    plan: list[ShardPlan], folder: Folder, options: PipelineOptions, local: bool, imports: tuple[str, ...]
) -> None:
    """The pipeline in a thread, which may hang for ever once a worker is lost; WorkerLost then."""
    errors: list[BaseException] = []

    def work() -> None:
        try:
            _write(plan, folder, options, imports)
        except BaseException as error:  # handed to the thread that waits
            errors.append(error)

    watch = Watch(folder, local)
    threading.excepthook = _quiet
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(LOOK_SECONDS[folder.local is None])
        watch.check(len(finished_numbers(folder)))
    if errors:
        raise errors[0]


@contextmanager
def _stderr_into(log: Path, redirect: bool) -> Iterator[None]:
    """Sends to a file what Beam's workers and gRPC write to stderr, some twenty lines per worker."""
    if not redirect:
        yield
        return
    log.parent.mkdir(parents=True, exist_ok=True)
    kept, file = os.dup(2), os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    sys.stderr.flush()
    os.dup2(file, 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)
        os.close(file)


def _quiet(about: threading.ExceptHookArgs) -> None:
    """Beam's threads that wait for a worker print a traceback when it was killed: the watch says it in a line."""
    if about.thread is None or not any(name in about.thread.name for name in BEAM_THREADS):
        threading.__excepthook__(about)


def end_children() -> None:
    """Kill what worker processes are left."""
    for child in psutil.Process().children(recursive=True):
        try:
            child.kill()
        except psutil.NoSuchProcess:
            continue


def finished_numbers(folder: Folder) -> list[int]:
    """Numbers of the shards that this build has finished so far."""
    return [int(name.split("-")[1].split(".")[0]) for name in folder.names("shard-*.json", BUILD_FOLDER)]


@contextmanager
def exclusive(folder: Folder) -> Iterator[None]:
    """Keep other builds out of a local folder while the block runs, and sweep up what killed ones left under
    temporary names. DatasetError where another build is at work in it."""
    if folder.local is None:
        yield
        return
    place = folder.local / BUILD_FOLDER
    place.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder.local, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DatasetError(
                f"{folder}: another build is writing it; wait for it, or give another --output"
            ) from None
        for base in (folder.local, place):
            for path in base.glob(".*.tmp"):
                path.unlink(missing_ok=True)
        yield
    finally:
        os.close(descriptor)


def damaged_file(folder: Folder, manifest: Manifest) -> str | None:
    """Name of the first file that is missing or differs from the manifest's hash, or None."""
    for file in manifest.files:
        if not folder.holds(file.name, file.bytes, file.sha256):
            return file.name
    for shard in parse_shards(folder.read(SHARDS_NAME) or b""):
        if not folder.holds(shard.name, shard.bytes, shard.sha256):
            return shard.name
    return None


def foreign_files(folder: Folder) -> list[str]:
    """Names in the folder that no build made."""
    own = (*OWN_NAMES, BUILD_FOLDER, ".*.tmp")
    return [name for name in folder.names("*") if not any(fnmatch(name, pattern) for pattern in own)]


def remove_dataset(folder: Folder) -> None:
    """Take back a finished dataset: manifest first, so that no half-removed folder looks whole."""
    folder.remove(MANIFEST_NAME)
    folder.remove(oddities.NAME)
    for name in folder.names(shard_name(0).replace("000000", "*")):
        folder.remove(name)
