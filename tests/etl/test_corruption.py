"""Corruption: the good episodes of a damaged log come out as if nothing had happened, the bad ones by name.

log -> build -> `before`;  the same log, damaged in places -> build -> every other episode byte for byte as before,
each damaged one a line of rejected.jsonl with a reason that fits, and counts that add up
"""

import gzip
import io
import json
import shutil
import zlib

import h5py
import minari
import numpy as np
import pytest
from gymnasium import spaces
from minari.data_collector import EpisodeBuffer
from rich.console import Console

from etl.build import Options, beam_flags, build
from etl.building.plan import BuildConfig
from shards.verify import verify
from tests.etl.test_build import d4rl_file
from tests.etl.test_sources_atari import action_name
from tests.etl.test_sources_atari import store as store_atari
from tests.etl.test_sources_atari import write as write_atari

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:minari")
EPISODES, ACTIONS = 200, 5
WHOLE = -1  # the position of a rejected file


def build_here(source, place, output, megabytes=0.05, share=0.1):
    """Builds as the command does, and verifies what it wrote."""
    config = BuildConfig(shard_megabytes=megabytes)
    options = Options(source, str(place), str(output), config=config, max_rejected_share=share)
    build(options, beam_flags([], 1), Console(file=io.StringIO()))
    return verify(output, full=True)


def episodes(dataset):
    """(file, position) -> all that the dataset holds of an episode, its timesteps first."""
    found = {}
    for row, about in enumerate(dataset.index.to_pylist()):
        key = about["file"], about["position"]
        assert key not in found and about["start"] == 0
        patches = dataset.patches(row) if about["patches_offset"] >= 0 else None
        arrays = (dataset.tokens(row), dataset.reward(row), patches, dataset.observation(row), dataset.action(row))
        kept = ("timesteps", "episode_timesteps", "episode_return", "terminated", "truncated")
        found[key] = (*(about[name] for name in kept), *(None if a is None else a.tobytes() for a in arrays))
    return found


def rejections(dataset):
    """(file, position) -> its line; no two lines speak of the same one."""
    lines = [json.loads(line) for line in dataset.local(dataset.manifest.rejected).read_text().splitlines()]
    assert all(line["reason"] and line["detail"] and "\n" not in line["detail"] for line in lines)
    found = {(line["file"], line["position"]): line for line in lines}
    assert len(found) == len(lines) == dataset.manifest.rejected.rows
    return found


def check(before, after, expected):
    """`expected`: (file, position) -> reason; with WHOLE for the position, of all the file's episodes."""
    old, new, lines = episodes(before), episodes(after), rejections(after)
    assert {key: line["reason"] for key, line in lines.items()} == expected
    lost = {(file, n) for file, n in old if {(file, n), (file, WHOLE)} & set(expected)}
    assert set(new) == set(old) - lost
    assert [key for key in new if new[key] != old[key]] == []
    planned = {task.spec.name: task for task in before.manifest.tasks}
    for number, task in enumerate(after.manifest.tasks):
        (rows,) = np.nonzero(after.column("task") == number)
        timesteps = int(after.column("timesteps")[rows].sum())
        own = [line for line in lines.values() if line["task"] == task.spec.name]
        assert (task.episodes, task.timesteps, task.rejected_episodes) == (len(rows), timesteps, len(own))
        assert task.tokens == timesteps * after.layouts[number].length
        if all(line["position"] != WHOLE for line in own):
            assert task.episodes + task.rejected_episodes == planned[task.spec.name].episodes
    assert set(planned) - {task.spec.name for task in after.manifest.tasks} <= {line["task"] for line in lines.values()}
    timesteps, samples = (sum(after.shards.column(name).to_pylist()) for name in ("timesteps", "samples"))
    assert timesteps == sum(about[0] for about in new.values())
    assert len(new) == after.index.num_rows == samples


def put(group, key, values, **how):
    """In the place of an array, another one."""
    del group[key]
    return group.create_dataset(key, data=values, **how)


def poison(group, key, value, row=None):
    values = group[key][()]
    values[len(values) // 2 if row is None else row] = value
    put(group, key, values)


def cut(group, key, rows, row=0):
    """Packed with gzip in chunks of so many rows, as h5repack does it, and half the bytes of one chunk lost."""
    values = group[key][()]
    node = put(group, key, values, chunks=(rows, values.shape[1]), compression="gzip")
    mask, packed = node.id.read_direct_chunk((row, 0))
    node.id.write_direct_chunk((row, 0), packed[: len(packed) // 2], mask)


def minari_log(folder, count=EPISODES):
    """A dataset of `count` episodes of 10 to 20 timesteps, written by Minari; its main_data.hdf5."""
    rng = np.random.default_rng(0)
    buffers = []
    for number in range(count):
        T = int(rng.integers(10, 21))
        endings = [False] * T, [False] * (T - 1) + [True]
        buffers.append(
            EpisodeBuffer(
                observations=list(rng.normal(size=(T + 1, 3)).astype(np.float32)),
                actions=list(rng.integers(0, ACTIONS, T)),
                rewards=list(rng.normal(size=T)),
                terminations=endings[number % 2],
                truncations=endings[1 - number % 2],
            )
        )
    given = {"observation_space": spaces.Box(-9, 9, (3,), np.float32), "action_space": spaces.Discrete(ACTIONS)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(folder))
        minari.create_dataset_from_buffers("own/log-v0", buffers, **given)
    return folder / "own" / "log-v0" / "data" / "main_data.hdf5"


def empty(group):
    for key in ("observations", "actions", "rewards", "terminations", "truncations"):
        group[key].resize(0, axis=0)


def duplicate(group):
    """A copy of the episode before."""
    before = group.file[f"episode_{int(group.name.split('_')[-1]) - 1}"]
    for key in list(group):
        del group[key]
        before.copy(before[key], group, key)
    group.attrs["total_steps"] = before.attrs["total_steps"]


MINARI = "own-log-v0/main_data.hdf5"
MINARI_DAMAGE = {
    "truncated": (lambda g: cut(g, "observations", 8), "corrupt HDF5", "does not end"),
    "NaN": (lambda g: poison(g, "observations", np.nan), "not finite", "observation"),
    "infinite": (lambda g: poison(g, "rewards", -np.inf), "not finite", "reward"),
    "wrong dtype": (lambda g: put(g, "actions", g["actions"][()] / 2), "wrong dtype", "actions"),
    "wrong length": (lambda g: g["terminations"].resize(len(g["rewards"]) - 1, axis=0), "wrong length", "terminations"),
    "action out of range": (lambda g: poison(g, "actions", ACTIONS), "out of range", "action"),
    "empty": (empty, "empty", "no row"),
    "duplicated": (duplicate, "duplicate", "a copy of episode"),
}


def damaged(log, folder, places):
    """A copy of the log with one kind of damage at each place, and what should become of it."""
    shutil.copytree(log.parent, folder)
    with h5py.File(folder / log.name, "a") as file:
        for place, (change, _, _) in zip(places, MINARI_DAMAGE.values(), strict=True):
            change(file[f"episode_{place}"])
    reasons = [reason for _, reason, _ in MINARI_DAMAGE.values()]
    return folder / log.name, {(MINARI, n): reason for n, reason in zip(places, reasons, strict=True)}


def held_out(dataset):
    return {n for n, held in zip(dataset.column("position"), dataset.column("held_out")) if held}


@pytest.mark.process
def test_a_few_of_many_episodes_damaged_in_eight_ways(tmp_path):
    log = minari_log(tmp_path / "log")
    before = build_here("minari", log, tmp_path / "a", megabytes=0.0125)
    places = [0, 199, 100, 101, 102, 40, 165, 75]  # the first, the last, neighbours
    bad, expected = damaged(log, tmp_path / "data", places)
    assert before.shards.num_rows > 10
    after = build_here("minari", bad, tmp_path / "b", megabytes=0.0125)
    check(before, after, expected)
    for n, (_, _, word) in zip(places, MINARI_DAMAGE.values()):
        assert word in rejections(after)[MINARI, n]["detail"]
    assert rejections(after)[MINARI, 75]["detail"].startswith("a copy of episode 74 ")
    assert held_out(after) == held_out(before) - set(places)
    (task,), written = after.manifest.tasks, json.loads((log.parent / "metadata.json").read_text())
    lost = sum(about[0] for (_, n), about in episodes(before).items() if n in places)
    assert task.episodes + task.rejected_episodes == written["total_episodes"] == EPISODES
    assert task.timesteps + lost == written["total_steps"]


def test_shards_of_bad_episodes_alone_leave_no_trace(tmp_path):
    """Each episode in a shard of its own."""
    log = minari_log(tmp_path / "log", count=20)
    bad, expected = damaged(log, tmp_path / "data", [0, 1, 2, 3, 4, 5, 19, 9])
    before = build_here("minari", log, tmp_path / "a", megabytes=0.001)
    after = build_here("minari", bad, tmp_path / "b", megabytes=0.001, share=0.5)
    assert (before.shards.num_rows, after.shards.num_rows) == (20, 12)
    assert sorted(p.name for p in after.place.local.glob("shard-*")) == after.shards.column("name").to_pylist()
    check(before, after, expected)


def test_an_episode_shorter_than_its_log_says_is_rejected(tmp_path):
    """All its arrays end early together; only Minari's attribute `total_steps` tells."""
    log = minari_log(tmp_path / "log", count=20)
    before = build_here("minari", log, tmp_path / "a")
    with h5py.File(log, "a") as file:
        group = file["episode_7"]
        assert group.attrs["total_steps"] == len(group["rewards"]) > 5
        for key, rows in {"observations": 6, "actions": 5, "rewards": 5, "terminations": 5, "truncations": 5}.items():
            group[key].resize(rows, axis=0)
    check(before, build_here("minari", log, tmp_path / "b"), {(MINARI, 7): "wrong length"})


ROWS, COUNT = 12, 20  # of an episode, episodes of a D4RL file


def copy_of_5_at_8(file):
    for key in ("observations", "actions", "rewards"):
        file[key][8 * ROWS : 9 * ROWS] = file[key][5 * ROWS : 6 * ROWS]


D4RL_DAMAGE = {
    ("a.hdf5", 6): ("corrupt HDF5", lambda f: cut(f, "observations", ROWS, 6 * ROWS)),
    ("b.hdf5", 0): ("not finite", lambda f: poison(f, "observations", np.nan, 0)),
    ("c.hdf5", 19): ("not finite", lambda f: poison(f, "rewards", np.inf, -1)),
    ("d.hdf5", 7): ("out of range", lambda f: poison(f, "actions", 500.0, 7 * ROWS + 3)),
    ("e.hdf5", 8): ("duplicate", copy_of_5_at_8),
    ("f.hdf5", WHOLE): ("wrong length", lambda f: put(f, "rewards", f["rewards"][:-1])),
    ("g.hdf5", WHOLE): ("wrong dtype", lambda f: put(f, "observations", f["observations"][()].astype(np.int32))),
    ("h.hdf5", WHOLE): ("empty", lambda f: [put(f, key, f[key][:0]) for key in list(f)]),
    ("i.hdf5", WHOLE): ("missing key", lambda f: f.pop("rewards")),
    ("j.hdf5", WHOLE): ("empty", 0.0),  # so much of the file is left
    ("k.hdf5", WHOLE): ("truncated HDF5", 0.5),
}


def shorten(path, share):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def test_d4rl_files_damaged_in_every_way_beside_a_good_one(tmp_path):
    good = tmp_path / "good"
    good.mkdir()
    for name in "abcdefghijkl":
        d4rl_file(good / f"{name}.hdf5", COUNT, ROWS)
    bad = shutil.copytree(good, tmp_path / "bad")
    for (name, _), (_, change) in D4RL_DAMAGE.items():
        if isinstance(change, float):
            shorten(bad / name, change)
        else:
            with h5py.File(bad / name, "a") as file:
                change(file)
    before, after = build_here("d4rl", good, tmp_path / "a"), build_here("d4rl", bad, tmp_path / "b")
    check(before, after, {key: reason for key, (reason, _) in D4RL_DAMAGE.items()})
    assert [task.episodes for task in after.manifest.tasks] == [COUNT - 1] * 5 + [COUNT]


LENGTHS = (9, 12) * 5
STARTS = [sum(LENGTHS[:n]) + 3 * (n + 1) for n in range(len(LENGTHS))]  # behind three rows of padding each
ARRAYS = ("observation", "action", "reward", "terminal")


def atari_files(folder, checkpoints):
    """Ten episodes a checkpoint; of equal returns, so that copies are looked for among all of one length."""
    rewards = np.zeros(STARTS[-1] + LENGTHS[-1], np.float32)
    for number in range(checkpoints):
        place = folder / "Pong" / "1" / "replay_logs"
        write_atari(place, LENGTHS, True, number, stale=0, seed=number, reward=rewards)
    return folder


def array_of(folder, number, name):
    return folder / "Pong" / "1" / "replay_logs" / f"$store$_{name}_ckpt.{number}.gz"


def changed(change, *names):
    """Arrays of a checkpoint, changed and stored again."""

    def apply(folder, number):
        for name in names:
            path = array_of(folder, number, name)
            with gzip.open(path) as file:
                values = np.load(file)
            store_atari(path.parent, f"$store$_{name}", change(values), number)

    return apply


def shortened(name, share):
    return lambda folder, number: shorten(array_of(folder, number, name), share)


def at(row, value):
    return lambda values: np.concatenate([values[:row], np.array([value], values.dtype), values[row + 1 :]])


def copy_of_2_at_6(values):
    values[STARTS[6] : STARTS[6] + 9] = values[STARTS[2] : STARTS[2] + 9]
    return values


ATARI_DAMAGE = {  # checkpoint, episode
    (1, WHOLE): ("corrupt gzip", shortened("reward", 0.6)),
    (2, 4): ("out of range", changed(at(STARTS[4] + 5, 6), "action")),
    (3, WHOLE): ("corrupt gzip", shortened("observation", 0)),
    (4, WHOLE): ("wrong length", changed(lambda values: values[:-1], "terminal")),
    (5, 6): ("duplicate", changed(copy_of_2_at_6, *ARRAYS[:3])),
    (6, WHOLE): ("wrong dtype", changed(lambda values: values.astype(np.int32), "reward")),
    (7, 9): ("not finite", changed(at(STARTS[9] + 11, np.nan), "reward")),
    (8, 0): ("not finite", changed(at(STARTS[0], np.inf), "reward")),
    (9, WHOLE): ("empty", changed(lambda values: values[:0], *ARRAYS)),
    (10, WHOLE): ("corrupt gzip", shortened("action", 0.6)),
}


def cut_observations(folder):
    """Of checkpoint 0; what should become of its episodes, by zlib's own word. A .npy has a header of 128 bytes."""
    path = array_of(folder, 0, "observation")
    shorten(path, 0.6)
    rows = (len(zlib.decompressobj(31).decompress(path.read_bytes())) - 128) // 84**2
    behind = [n for n, (start, length) in enumerate(zip(STARTS, LENGTHS)) if start + length > rows]
    assert 3 < len(behind) < 7
    return {(action_name(0), n): "corrupt gzip" for n in behind}


def test_checkpoints_damaged_in_every_way_beside_a_good_one(tmp_path):
    good = atari_files(tmp_path / "good", 12)
    bad = shutil.copytree(good, tmp_path / "bad")
    for (number, _), (_, change) in ATARI_DAMAGE.items():
        change(bad, number)
    expected = {(action_name(number), n): reason for (number, n), (reason, _) in ATARI_DAMAGE.items()}
    expected |= cut_observations(bad)
    before, after = (build_here("atari", folder, tmp_path / f"of {folder.name}", 0.3, 0.5) for folder in (good, bad))
    check(before, after, expected)


def test_episodes_in_front_of_a_cut_are_kept_after_those_behind_it_were_asked_for(tmp_path):
    """The search for copies reads all episodes of one length and return first, those behind the cut too."""
    good = atari_files(tmp_path / "good", 1)
    bad = shutil.copytree(good, tmp_path / "bad")
    expected = cut_observations(bad)
    before, after = (build_here("atari", folder, tmp_path / f"of {folder.name}", 0.3, 1.0) for folder in (good, bad))
    check(before, after, expected)
