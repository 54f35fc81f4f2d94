"""The build command: one digest whatever the workers and kills, bad input named, nothing half-written."""

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import h5py
import numpy as np
import pytest

from schemas.dataset import load_manifest
from tests.conftest import run
from tests.etl.test_sources_atari import write as write_checkpoint

SMALL = ("--shard-megabytes", "0.02")


def d4rl_file(path, episodes=6, length=40, **damage):
    """A real D4RL layout in miniature; `damage` maps keys to arrays, or to None to leave one out."""
    rng = np.random.default_rng(0)
    rows = episodes * length
    body = {
        "observations": rng.normal(size=(rows, 4)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (rows, 2)).astype(np.float32),
        "rewards": rng.normal(size=rows).astype(np.float32),
        "terminals": np.arange(rows) % length == length - 1,
        "timeouts": np.zeros(rows, bool),
    } | damage
    with h5py.File(path, "w") as file:
        for key, values in body.items():
            if values is not None:
                file[key] = values
        file.attrs["env_id"] = "Hopper-v4"
    return path


def digests(folder):
    manifest = load_manifest(folder)
    return manifest.shards.sha256, manifest.index.sha256, manifest.fingerprint


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    d4rl_file(folder / "a-medium-v4.hdf5")
    d4rl_file(folder / "b-expert-v4.hdf5", episodes=30)
    return folder


@pytest.fixture(scope="module")
def built(inputs, tmp_path_factory):
    output = tmp_path_factory.mktemp("built") / "d"
    run("etl.build", "--input", inputs, "--output", output, *SMALL)
    return output


def test_the_manifest_counts_what_is_there(built):
    manifest = load_manifest(built)
    assert [(t.spec.name, t.episodes, t.timesteps) for t in manifest.tasks] == [
        ("a-medium-v4", 6, 240),
        ("b-expert-v4", 30, 1200),
    ]
    assert manifest.shards.rows > 2 and manifest.rejected.rows == 0
    assert not (built / ".build").exists()
    assert manifest.tasks[0].tokens == 240 * (4 + 1 + 2)


@pytest.mark.process
def test_two_workers_write_the_same_bytes(inputs, built, tmp_path):
    run("etl.build", "--input", inputs, "--output", tmp_path / "d", *SMALL, "--workers", "2")
    assert digests(tmp_path / "d") == digests(built)


@pytest.mark.process
def test_a_killed_build_goes_on_to_the_same_bytes(inputs, built, tmp_path):
    command = [sys.executable, "-m", "etl.build", "--input", str(inputs), "--output", str(tmp_path / "d"), *SMALL]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "d").glob("shard-*.tar")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    if process.returncode == -signal.SIGKILL:
        assert not (tmp_path / "d" / "dataset.json").exists()
    run("etl.build", "--input", inputs, "--output", tmp_path / "d", *SMALL)
    assert digests(tmp_path / "d") == digests(built)
    assert not [p.name for p in (tmp_path / "d").iterdir() if p.name.startswith(".shard")]


def test_building_again_is_nothing_to_do_and_other_data_is_refused(inputs, built, tmp_path):
    before = (built / "dataset.json").stat().st_mtime_ns
    assert "already built" in run("etl.build", "--input", inputs, "--output", built, *SMALL).stderr
    assert (built / "dataset.json").stat().st_mtime_ns == before
    other = d4rl_file(tmp_path / "c-medium-v4.hdf5")
    done = run("etl.build", "--input", other, "--output", built, *SMALL, check=False)
    assert done.returncode == 1 and "--overwrite" in done.stderr


def test_a_damaged_dataset_is_made_whole_again(inputs, built, tmp_path):
    copy = shutil.copytree(built, tmp_path / "d")
    (copy / "shard-000001.tar").unlink()
    assert "building the dataset again" in run("etl.build", "--input", inputs, "--output", copy, *SMALL).stderr
    assert digests(copy) == digests(built)


def nan_at(row):
    observations = np.random.default_rng(0).normal(size=(240, 4)).astype(np.float32)
    observations[row] = np.nan
    return observations


def truncated(path):
    d4rl_file(path)
    path.write_bytes(path.read_bytes()[:3000])


BAD_FILES = {
    "empty": lambda p: p.write_bytes(b""),
    "truncated": truncated,
    "no actions": lambda p: d4rl_file(p, actions=None),
    "no rewards": lambda p: d4rl_file(p, rewards=None),
    "rows differ": lambda p: d4rl_file(p, actions=np.zeros((7, 2), np.float32)),
    "flat observations": lambda p: d4rl_file(p, observations=np.zeros(240, np.float32)),
    "all NaN": lambda p: d4rl_file(p, observations=np.full((240, 4), np.nan, np.float32)),
}


@pytest.mark.parametrize("what", BAD_FILES)
def test_a_bad_file_alone_is_one_clear_error(tmp_path, what):
    path = tmp_path / "bad-medium-v4.hdf5"
    BAD_FILES[what](path)
    done = run("etl.build", "--input", path, "--output", tmp_path / "d", check=False)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and len(errors) == 1 and "bad-medium-v4" in errors[0], done.stderr
    assert not (tmp_path / "d" / "dataset.json").exists()


def test_a_bad_file_beside_good_ones_is_a_line_of_rejected(inputs, tmp_path):
    mixed = shutil.copytree(inputs, tmp_path / "inputs")
    (mixed / "z-medium-v4.hdf5").write_bytes(b"")
    d4rl_file(mixed / "y-medium-v4.hdf5", episodes=6, observations=nan_at(50))
    run("etl.build", "--input", mixed, "--output", tmp_path / "d", "--max-rejected-share", "0.5")
    lines = [json.loads(line) for line in (tmp_path / "d" / "rejected.jsonl").read_text().splitlines()]
    assert {(line["file"], line["position"]) for line in lines} == {("z-medium-v4.hdf5", -1), ("y-medium-v4.hdf5", 1)}
    assert {t.spec.name: t.episodes for t in load_manifest(tmp_path / "d").tasks}["y-medium-v4"] == 5
    done = run("etl.build", "--input", mixed, "--output", tmp_path / "e", "--max-rejected-share", "0.01", check=False)
    assert done.returncode == 1 and "max-rejected-share" in done.stderr
    assert not (tmp_path / "e" / "dataset.json").exists()


def test_lost_files_count_as_rejected(inputs, tmp_path):
    mixed = shutil.copytree(inputs, tmp_path / "inputs")
    for n in range(9):
        (mixed / f"bad{n}-medium-v4.hdf5").write_bytes(b"")
    done = run("etl.build", "--input", mixed, "--output", tmp_path / "d", check=False)
    assert done.returncode == 1 and "--max-rejected-share" in done.stderr


def test_rows_left_over_are_no_damage(tmp_path):
    write_checkpoint(tmp_path / "Pong" / "1" / "replay_logs", stale=2)
    run("etl.build", "--source", "atari", "--input", tmp_path, "--output", tmp_path / "d", "--max-rejected-share", "0")
    assert "stale rows" in (tmp_path / "d" / "rejected.jsonl").read_text()


def test_a_file_url_is_a_folder(inputs, built, tmp_path):
    run("etl.build", "--input", f"file://{inputs}", "--output", f"file://{tmp_path}/d", *SMALL)
    assert digests(tmp_path / "d")[0] == digests(built)[0]


@pytest.mark.process
def test_one_interrupt_ends_a_build_with_one_line(tmp_path):
    d4rl_file(tmp_path / "a-medium-v4.hdf5", episodes=3000)
    place = tmp_path / "d"
    command = [sys.executable, "-m", "etl.build", "-i", str(tmp_path), "-o", str(place), *SMALL]
    # a shell's background jobs ignore interrupts, and so would this one
    listen = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=listen)
    while process.poll() is None and len(list(place.glob("shard-*.tar"))) < 3:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    words = process.communicate(timeout=60)[1]
    assert process.returncode == 130, words
    assert "keeps the finished shards" in words and "Traceback" not in words


def test_corrupt_gzip_is_named(logs, tmp_path):
    copy = shutil.copytree(logs / "dqn_replay", tmp_path / "dqn")
    path = next(copy.rglob("*terminal_ckpt*"))
    path.write_bytes(gzip.compress(b"nonsense"))
    done = run("etl.build", "--source", "atari", "--input", copy, "--output", tmp_path / "d", check=False)
    assert done.returncode == 1 and "terminal_ckpt" in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("error: ")]) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--source", "nonsense"), "known: atari, babyai, d3rlpy, d4rl,"),
        (("--dataset", "hopper-mediun-v2"), "hopper-medium-v2"),
        (("--input", "/does/not/exist"), "no such file"),
        (("--vocabulary", "nonsense"), "known: disjoint, paper"),
        (("--ouput", "x"), "--ouput"),
        (("--shard-megabytes", "0"), "--shard-megabytes 0"),
        (("--piece-timesteps", "-5"), "give a number from 1"),
        (("--source", "babyai", "--text-tokens", "-3"), "--text-tokens -3"),
        (("--min-return", "nan"), "--min-return nan"),
        (("--held-out-share", "1.5"), "from 0 to 1"),
        (("--first-episodes", "-2"), "--first-episodes -2"),
        (("--input", ""), "--input is empty"),
    ],
)
def test_wrong_arguments_are_explained(tmp_path, arguments, message):
    done = run("etl.build", "--output", tmp_path / "d", "--cache", tmp_path, *arguments, check=False)
    assert done.returncode == 1 and message in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("error: ")]) == 1


def test_real_logs_equal_their_description(tmp_path):
    """The figures of the shared logs' own README, to the digit."""
    shared = os.environ.get("GATO_SHARED_DATA")
    if not shared:
        pytest.skip("GATO_SHARED_DATA names no folder with d4rl/ and dqn_replay/")
    run("etl.build", "--input", f"{shared}/d4rl", "--output", tmp_path / "d")
    run("etl.build", "--source", "atari", "--input", f"{shared}/dqn_replay", "--output", tmp_path / "a")
    tasks = {t.spec.name: t for folder in "da" for t in load_manifest(tmp_path / folder).tasks}
    found = {
        name: (t.episodes, t.timesteps, round(t.return_mean or 0), round(t.return_std or 0))
        for name, t in tasks.items()
    }
    assert found["hopper-medium-v4"] == (101, 40234, 1220, 359)
    assert found["hopper-expert-v4"] == (41, 40473, 3561, 284)
    assert found["halfcheetah-medium-v4"] == (40, 40000, 4204, 846)
    assert found["halfcheetah-expert-v4"] == (40, 40000, 11902, 164)
    assert found["walker2d-medium-v4"] == (41, 40684, 3855, 167)  # 167.50: the README truncates
    assert found["walker2d-expert-v4"] == (45, 40635, 4787, 1459)
    assert found["pong-run1"][:3] == (6, 12000, 11) and tasks["pong-run1"].cut_episodes == 1
    assert found["breakout-run1"][:2] == (11, 12000) and tasks["breakout-run1"].cut_episodes == 1
