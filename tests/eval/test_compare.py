"""The comparison as a user runs it: any number of processes, kills, several Gatos, the same table each time."""

import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from eval.options import Options
from eval.rows import load_rows, save_rows
from eval.runner import ComparisonRunner
from schemas.files import sha256_of
from schemas.result import from_table
from shards.reader import Dataset
from tests import warm
from tests.conftest import run
from trainer.model import Gato, ModelConfig
from trainer.model.export import ExportInfo, TrainingInfo, save_export

SMALL = ModelConfig(blocks=1, heads=2, width=32, feed_forward=64, head_size=16, patch_channels=16)


@pytest.fixture(scope="module")
def exports(hopper, pong, tmp_path_factory):
    """Two Gatos of different seeds, untrained: what is compared here is the comparison."""
    manifests, folders = [Dataset(folder).manifest for folder in (hopper, pong)], []
    tasks, vocabulary = tuple(m.tasks[0].spec for m in manifests), manifests[0].vocabulary
    for seed in (3, 5):
        folders.append(tmp_path_factory.mktemp("runs") / f"gato-{seed}" / "export")
        training = TrainingInfo(seed=seed)
        info = ExportInfo("gato.model", 1, SMALL, vocabulary, vocabulary.fingerprint, 120, 0, tasks, {}, training)
        save_export(folders[-1], dict(Gato(SMALL, vocabulary).initialise(seed).state_dict()), info)
    return folders


def arguments(output, exports, data, *extra):
    settings = ["--episodes", 2, "--step-limit", 15, "--film-seconds", 0, "--models", "random", "behaviour", "gato"]
    return ["eval.compare", "--gato", *exports, "--datasets", *data, "--output", output, *settings, *extra]


def rows(output):
    """All rows but for what may differ from run to run."""
    table = load_rows(output / "rows.parquet")
    return table.drop_columns(["seconds", "commit"]).to_pylist()


@pytest.mark.process
def test_the_table_does_not_depend_on_processes_and_kept_parts_are_kept(exports, hopper, pong, tmp_path):
    one = run(*arguments(tmp_path / "one", exports, [hopper, pong], "--processes", "1"))
    run(*arguments(tmp_path / "two", exports, [hopper, pong], "--processes", "2"))
    assert rows(tmp_path / "one") == rows(tmp_path / "two")
    found = {(row["dataset"], row["model"], row["model_seed"]) for row in rows(tmp_path / "one")}
    models = ("random", 0), ("behaviour", 0), ("gato", 3), ("gato", 5)
    wanted = {(task, *model) for task in ("hopper-random-v4", "pong-run1") for model in models}
    assert found == wanted - {("pong-run1", "behaviour", 0)}  # that log holds no whole episode
    parts = {path: path.stat().st_mtime_ns for path in (tmp_path / "one" / "parts").iterdir()}
    again = run(*arguments(tmp_path / "one", exports, [hopper, pong], "--processes", "2"))
    assert again.stderr.count("kept from before") == len(parts) == 8
    assert parts == {path: path.stat().st_mtime_ns for path in (tmp_path / "one" / "parts").iterdir()}
    assert again.stdout == one.stdout and "| hopper-random-v4 | Hopper-v4 |" in one.stdout
    assert "cut by --step-limit" in one.stdout
    older = next((tmp_path / "one" / "parts").glob("hopper-random-v4-gato-3-*"))
    save_rows(older, [replace(row, versions="{}") for row in from_table(load_rows(older))])
    anew = run(*arguments(tmp_path / "one", exports, [hopper, pong], "--processes", "2"))
    assert anew.stderr.count("kept from before") == 7 and rows(tmp_path / "one") == rows(tmp_path / "two")


def children(process):
    return [child for child in psutil.Process(process.pid).children() if "spawn_main" in " ".join(child.cmdline())]


def started(output, exports, data):
    """A comparison of two processes that has made a first part and is at others."""
    command = [sys.executable, "-m", *map(str, arguments(output, exports, data, "--processes", "2"))]
    long = ["--step-limit", "1000", "--episodes", "30"]
    process = warm.Popen([*command, *long], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not list(output.glob("parts/*.parquet")):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    return process, children(process)


@pytest.mark.parametrize("who", ["all", "a worker"])
@pytest.mark.process
def test_a_killed_comparison_leaves_nobody_and_goes_on(exports, pong, tmp_path, who):
    process, workers = started(tmp_path / "killed", exports, [pong])
    victim = process.pid if who == "all" else workers[0].pid
    psutil.Process(victim).send_signal(signal.SIGKILL)
    _, told = process.communicate(timeout=60)
    assert process.returncode == (-signal.SIGKILL if who == "all" else 1)
    assert who == "all" or "error: a process of the comparison was killed" in told
    assert not psutil.wait_procs(workers, timeout=20)[1]
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").glob("parts/*.parquet")}
    assert kept and not (tmp_path / "killed" / "rows.parquet").exists()


def test_two_exports_of_one_seed_are_refused(exports, hopper, tmp_path):
    twice = arguments(tmp_path / "out", [exports[0], exports[0]], [hopper], "--processes", "1")
    done = run(*twice, check=False)
    assert done.returncode == 1 and "error:" in done.stderr and "seed 3" in done.stderr


def test_every_episode_of_a_seed_that_failed_whole_is_counted(exports, hopper, tmp_path, monkeypatch):
    whole = ComparisonRunner._play

    def fail(runner, job, progress):
        if job.seed == 5:
            raise RuntimeError("no memory")
        return whole(runner, job, progress)

    monkeypatch.setattr(ComparisonRunner, "_play", fail)
    done = run(*arguments(tmp_path, exports, [hopper], "--processes", "1"))
    assert "2 of 4 episodes ended in an error and were left out: no memory" in done.stdout
    failed = [(row["episode"], row["episode_seed"]) for row in rows(tmp_path) if row["ending"] == "error"]
    assert failed == [(0, 1000), (1, 1001)]


def test_baselines_that_cannot_be_kept_are_not_trained(hopper, tmp_path):
    place = Path("/proc/gato")
    runner = ComparisonRunner(Options(datasets=(str(hopper),), models=("dt",), output=tmp_path, baselines=place))
    said: list[str] = []
    with pytest.raises(OSError, match="/proc/gato"):
        runner.baseline(runner.jobs[0], said.append)
    assert not said


def test_a_task_of_two_datasets_is_refused(exports, hopper, tmp_path):
    shutil.copytree(hopper, tmp_path / "copy")
    for data in ([hopper, hopper], [hopper, tmp_path / "copy"]):
        done = run(*arguments(tmp_path / "out", exports, data, "--processes", "1"), check=False)
        assert done.returncode == 1 and "'hopper-random-v4' is in more than one dataset folder" in done.stderr


def test_a_folder_of_datasets_is_no_dataset(exports, hopper, tmp_path):
    for data, words in ((hopper.parent, f"a folder of some; give {hopper}"), (tmp_path, "no finished dataset; give")):
        done = run(*arguments(tmp_path / "out", exports, [data], "--processes", "1"), check=False)
        assert done.returncode == 1 and words in done.stderr


def test_a_film_of_no_length_that_makes_sense_is_refused(exports, hopper, tmp_path):
    for seconds in ("-1", "nan", "inf"):
        command = arguments(tmp_path / "out", exports, [hopper], "--processes", "1", "--film-seconds", seconds)
        done = run(*command, check=False)
        assert done.returncode == 1 and "must be from 0 to 3600" in done.stderr


def test_a_film_is_of_the_weights_whose_figures_are_beside_it(exports, hopper, tmp_path):
    film, shown = tmp_path / "rollouts" / "hopper-random-v4-gato.gif", []
    for export, seconds in ((0, 1), (1, 1), (0, 0), (0, 1)):
        how = ["--processes", "1", "--models", "gato", "--film-seconds", seconds]
        run(*arguments(tmp_path, [exports[export]], [hopper], *how))
        shown.append((film.read_bytes(), (tmp_path / "report.html").read_text().count("data:image/gif")))
    assert [count for _, count in shown] == [1, 1, 0, 1]
    assert shown[0][0] != shown[1][0] == shown[2][0] != shown[3][0]


@pytest.mark.parametrize("prompt", ["end", "start"])
def test_a_shipped_gato_plays_without_data_as_it_does_with_it(exports, hopper, pong, tmp_path, prompt):
    data, empty = [hopper, pong], tmp_path / "nothing"
    print(run("eval.ship", exports[0], tmp_path / "small", "--datasets", *data).stdout)
    how = ["--agent.prompt", prompt, "--agent.decoding", "sample", "--processes", "1"]
    run(*arguments(tmp_path / "with", exports[:1], data, *how))
    command = arguments(tmp_path / "without", [tmp_path / "small"], [], *how, "--root", empty)
    command.remove("--datasets")
    assert "no finished dataset" in run(*command).stderr
    found, small = ({r["dataset"]: [] for r in rows(tmp_path / name)} for name in ("with", "without"))
    for name, into in (("with", found), ("without", small)):
        for row in rows(tmp_path / name):
            into[row["dataset"]] += [row["return"]] if row["model"] == "gato" else []
    assert found == small and all(len(returns) == 2 for returns in found.values())
    sizes = [(folder / "weights.safetensors").stat().st_size for folder in (exports[0], tmp_path / "small")]
    assert sizes[0] - sizes[1] == pytest.approx(4 * 32 * 32000, abs=100)
    (tmp_path / "small" / "prompts.safetensors").write_bytes(b"")
    assert "prompts.safetensors: missing or damaged" in run(*command, "--episodes", "3", check=False).stderr


def test_an_export_is_not_shipped_onto_itself(exports, hopper):
    before = sha256_of(exports[0] / "weights.safetensors")
    done = run("eval.ship", exports[0], exports[0], "--datasets", hopper, check=False)
    assert done.returncode == 1 and "give another folder" in done.stderr
    assert sha256_of(exports[0] / "weights.safetensors") == before


def test_a_curve_is_of_one_protocol_and_the_weights_that_are_there(exports, hopper):
    folder = exports[1].parent
    command = ["eval.curve", folder, "--datasets", hopper, "--episodes", "1"]
    lines = [run(*command).stdout, run(*command).stdout, run(*command, "--agent.decoding", "greedy").stdout]
    assert lines[0].startswith("step 0: ") and lines[1] == "" and lines[2].startswith("step 0: ")
    assert len((folder / "returns.jsonl").read_text().splitlines()) == 1
    for odd, words in (
        (("--episodes", "0"), "--episodes 0: must be from 1"),
        (("--agent.temperature", "0"), "--agent.temperature 0.0: must be from"),
        (("--tasks", "hoper"), "unknown task 'hoper'; tasks: hopper-random-v4"),
    ):
        done = run(*command[:4], *odd, check=False)
        assert done.returncode == 1 and words in done.stderr
