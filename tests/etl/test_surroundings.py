"""A build in surroundings that users have: a full disk, a proxy, other people's files, a log that is being written."""

import ctypes
import os
import resource
import shutil
import subprocess
import sys
from contextlib import chdir
from pathlib import Path

import h5py
import pytest

from etl import sources
from etl.building import pipeline
from schemas.dataset import DatasetError
from schemas.files import disk_fault
from shards.folder import Folder
from shards.reader import Dataset
from tests.commands import run
from tests.trainer.launch import ROOT

CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000


def build(logs, output, *extra):
    return ("etl.build", "--source", "d4rl", "--input", logs, "--output", output, *map(str, extra))


@pytest.mark.process
@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_is_one_line_and_the_same_command_goes_on(logs, hopper, tmp_path, workers):
    """The kernel refuses files beyond a size, as a full disk does; the shards are larger."""
    words = [sys.executable, "-m", *map(str, build(logs / "d4rl", tmp_path, "--workers", workers))]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300,
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)))  # fmt: skip
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert (
        last == f"error: {tmp_path}: the disk is full (File too large); make room, then run the same command to go on"
    )
    run(*build(logs / "d4rl", tmp_path, "--workers", workers))
    (ours,), (theirs,) = Dataset(tmp_path, "full").manifest.tasks, Dataset(hopper).manifest.tasks
    assert (ours.episodes, ours.timesteps, ours.returns) == (theirs.episodes, theirs.timesteps, theirs.returns)


@pytest.mark.process
@pytest.mark.parametrize("names", [("http_proxy",), ("https_proxy",), ("http_proxy", "https_proxy", "grpc_proxy")])
def test_a_proxy_does_not_cut_off_the_workers(logs, tmp_path, names):
    usual = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    environment = usual | dict.fromkeys(names, "http://127.0.0.1:9")
    done = run(*build(logs / "d4rl", tmp_path, "--workers", 2), env=environment)
    assert "attempt" not in done.stderr and Dataset(tmp_path).manifest.tasks


def test_a_machine_that_cannot_reach_itself_is_one_line(capfd):
    """A namespace of its own for the network: its loopback interface is down."""
    child = os.fork()
    if not child:
        status = 77
        try:
            if not ctypes.CDLL(None).unshare(CLONE_NEWNET if os.geteuid() == 0 else CLONE_NEWNET | CLONE_NEWUSER):
                pipeline.require_loopback()
                status = 0
        except DatasetError as error:
            status = 1
            print(error, file=sys.stderr, flush=True)
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status == 77:
        pytest.skip("no namespaces here")
    line = capfd.readouterr().err
    assert status == 1 and "give --workers 1, or bring the loopback interface up" in line, line
    pipeline.require_loopback()  # here it is


def test_other_peoples_files_are_named_and_stay(logs, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    done = run(*build(logs / "d4rl", tmp_path))
    assert f"{tmp_path}: holds 1 files that are no dataset's, such as notes.txt, which stay" in done.stderr
    assert (tmp_path / "notes.txt").read_text() == "mine"
    again = run(*build(logs / "d4rl", tmp_path, "--overwrite", "--shard-megabytes", 1))
    assert again.stderr.count("notes.txt") == 1 and "shard-" not in again.stderr


def test_a_log_that_is_being_written_is_called_that(logs, tmp_path):
    copy = shutil.copy(next((logs / "d4rl").glob("*.hdf5")), tmp_path)
    with h5py.File(copy, "r+"):
        done = run(*build(tmp_path, tmp_path / "shards"), check=False)
    assert done.returncode == 1 and "locked HDF5" in done.stderr, done.stderr
    assert "another process has it open for writing; wait" in " ".join(done.stderr.split())
    run(*build(tmp_path, tmp_path / "shards"))


def test_a_log_whose_writer_was_killed_is_called_that(logs, tmp_path):
    """libhdf5's mark of a file that is open for writing, as a killed writer of its newer format leaves it."""
    script = f"""
import h5py, os
file = h5py.File({str(tmp_path / "body.hdf5")!r}, "w", libver="latest")
file["observations"] = [[1.0]]
file.swmr_mode = True
file.flush()
os._exit(9)
"""
    subprocess.run(["/usr/bin/env", sys.executable, "-c", script])
    done = run(*build(tmp_path, tmp_path / "shards"), check=False)
    assert done.returncode == 1 and "unfinished HDF5" in done.stderr and "h5clear" in done.stderr, done.stderr


@pytest.mark.process
@pytest.mark.parametrize("environment", ["Hopper-v4", "CartPole-v1", "ALE/Pong-v5"])
def test_a_full_disk_ends_a_recording_in_one_line_and_leaves_nothing(tmp_path, environment):
    """HDF5 itself would end the process by a segmentation fault, after tracebacks."""
    words = [
        "-m",
        "etl.record",
        "--environment",
        environment,
        "--policy",
        "random",
        "--steps",
        "100",
        "--output",
        tmp_path,
    ]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=300,
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)))  # fmt: skip
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert last.startswith(f"error: {tmp_path}: the disk is full (File too large)")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("output, message", [
    ("link", "is a link to nothing"),
    ("/dev/null", "is a file; give a folder"),
    ("~nobody_of_this_name/x", "no such home folder is known here; set HOME, or give the whole path"),
    ("x" * 300, "File name too long; give a shorter name"),
])  # fmt: skip
def test_an_output_that_can_be_no_folder_is_named(logs, tmp_path, output, message):
    (tmp_path / "link").symlink_to("nowhere")
    words = ("etl.record", "--environment", "Hopper-v4", "--policy", "random", "--steps", 9, "--output", output)
    for command in (build(logs / "d4rl", output), words):
        done = run(*map(str, command), cwd=tmp_path, check=False)
        assert done.returncode == 1 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_hidden_files_and_pipes_are_no_logs(logs, tmp_path):
    """A Mac leaves a "._" beside each file, Jupyter a copy in a hidden folder; nobody may ever write to a pipe."""
    folder = shutil.copytree(logs / "d4rl", tmp_path / "logs")
    (log,) = folder.iterdir()
    for place in (folder, folder / "__MACOSX"):
        place.mkdir(exist_ok=True)
        (place / f"._{log.name}").write_bytes(b"\0\5\x16\7")
    (folder / ".ipynb_checkpoints").mkdir()
    shutil.copy(log, folder / ".ipynb_checkpoints" / "log-checkpoint.hdf5")
    os.mkfifo(folder / "pipe.hdf5")
    (folder / "gone.hdf5").symlink_to("nowhere")  # its content may have been left out
    found = sources.load("d4rl").resolve(folder, None, tmp_path)
    assert [path.name for path in found] == ["gone.hdf5", log.name]
    (folder / "gone.hdf5").unlink()
    run(*build(folder, tmp_path / "shards"))
    assert [task.spec.name for task in Dataset(tmp_path / "shards").manifest.tasks] == [log.stem]


def test_an_output_that_vanishes_during_a_build_is_named(logs, tmp_path, monkeypatch):
    def publish(self, temporary, name, usual=Folder.publish):
        shutil.rmtree(tmp_path / "shards")
        return usual(self, temporary, name)

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "publish", publish)
        done = run(*build(logs / "d4rl", tmp_path / "shards"), check=False)
    last = f"error: {tmp_path / 'shards'}: was removed or renamed while it was written; see to its place, then"
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith(last), done.stderr
    run(*build(logs / "d4rl", tmp_path / "shards"))


@pytest.mark.parametrize("damage", ["", "{}", "["])
def test_a_manifest_that_cannot_be_read_names_the_remedy_that_works(logs, tmp_path, damage):
    (tmp_path / "dataset.json").write_text(damage)
    done = run(*build(logs / "d4rl", tmp_path), check=False)
    assert done.returncode == 1 and done.stderr.strip().endswith("give --overwrite to build it again"), done.stderr
    if damage == "[":
        run(*build(logs / "d4rl", tmp_path, "--overwrite"))


def test_a_current_folder_that_is_gone_is_named(tmp_path):
    (tmp_path / "gone").mkdir()
    with chdir(tmp_path / "gone"):
        (tmp_path / "gone").rmdir()
        try:
            Path("x").absolute()
        except OSError as error:
            assert disk_fault(error, "x").startswith("the current folder is gone")


def test_a_folder_in_a_files_place_has_a_remedy(tmp_path):
    error = IsADirectoryError(21, "Is a directory", str(tmp_path))
    assert disk_fault(error, "") == f"{tmp_path}: Is a directory; move it away, or give another folder"
    error = PermissionError(13, "Permission denied", str(tmp_path))
    assert disk_fault(error, "") == f"{tmp_path}: Permission denied; change its rights, or give another folder"
    assert not disk_fault(FileNotFoundError(2, "No such file or directory", str(tmp_path)), "")


LATIN = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.process
def test_a_locale_of_few_letters_changes_nothing(logs, tmp_path):
    """Names of files are bytes that it cannot decode; what is written is UTF-8 all the same."""
    place, environment = tmp_path / "größe", os.environ | LATIN
    run(*build(logs / "d4rl", place), env=environment, cold=True)
    run("etl.inspect", place, "--output", tmp_path / "ü.html", env=environment, cold=True)
    quick = ("--episodes", "1", "--step-limit", "20", "--film-seconds", "0", "--processes", "1", "--models", "random")
    for _ in range(2):  # the second time it reads what the first one wrote
        run("eval.compare", "--datasets", place, "--output", tmp_path / "ç", *quick, env=environment, cold=True)
    assert "±" in (tmp_path / "ç" / "table.md").read_text("utf-8")
    assert Dataset(place, "full").manifest.tasks and "<html" in (tmp_path / "ü.html").read_text("utf-8")
