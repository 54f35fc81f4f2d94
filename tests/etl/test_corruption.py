"""Corruption: of every format's logs, the good episodes come out as if nothing had happened, the bad ones by name.

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
from etl.plan import BuildConfig
from shards.verify import verify
from tests.etl.test_sources_atari import action_name
from tests.etl.test_sources_atari import store as store_atari
from tests.etl.test_sources_atari import write as write_atari
from tests.etl.test_sources_d4rl import write as write_d4rl

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:minari")
EPISODES, ACTIONS = 800, 5
WHOLE = -1  # the position of a rejected file


def build_here(source, place, output, megabytes=0.05, share=0.1):
    """Builds as the command does, and verifies what it wrote."""
    options = Options(
        source, str(place), str(output), config=BuildConfig(shard_megabytes=megabytes), max_rejected_share=share
    )
    build(options, beam_flags([], 1), Console(file=io.StringIO()))
    return verify(output, full=True)


def episodes(dataset):
    """(file, position) -> all that the dataset holds of an episode."""
    found = {}
    for row, about in enumerate(dataset.index.to_pylist()):
        key = about["file"], about["position"]
        assert key not in found and about["start"] == 0
        raw = [None if a is None else a.tobytes() for a in (dataset.observation(row), dataset.action(row))]
        patches = dataset.patches(row).tobytes() if about["patches_offset"] >= 0 else b""
        kept = ("timesteps", "episode_timesteps", "episode_return", "terminated", "truncated")
        arrays = (dataset.tokens(row).tobytes(), dataset.reward(row).tobytes(), patches, *raw)
        found[key] = (*(about[name] for name in kept), *arrays)
    return found


def rejections(dataset):
    """(file, position) -> its line; no two lines speak of the same one."""
    lines = [json.loads(line) for line in (dataset.folder / "rejected.jsonl").read_text().splitlines()]
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
    different = [key for key in new if new[key] != old[key]]
    assert different == []
    summaries = {task.spec.name: task for task in after.manifest.tasks}
    for task in before.manifest.tasks:
        ordinals = [n for n, t in enumerate(after.manifest.tasks) if t.spec.name == task.spec.name]
        own = [line for line in lines.values() if line["task"] == task.spec.name]
        if not ordinals:
            assert [line["position"] for line in own] == [WHOLE]
            continue
        (rows,) = np.nonzero(after.column("task") == ordinals[0])
        summary, timesteps = summaries[task.spec.name], int(after.column("timesteps")[rows].sum())
        assert (summary.episodes, summary.timesteps, summary.rejected_episodes) == (len(rows), timesteps, len(own))
        assert summary.tokens == timesteps * after.layouts[ordinals[0]].length
        if all(line["position"] != WHOLE for line in own):
            assert summary.episodes + summary.rejected_episodes == task.episodes
    assert sum(summary.timesteps for summary in summaries.values()) == sum(s.timesteps for s in after.manifest.shards)
    assert len(new) == after.index.num_rows == sum(s.samples for s in after.manifest.shards)
    assert len(new) + len(lost) == len(old) == before.index.num_rows


def minari_log(folder, count=EPISODES):
    """A dataset of `count` episodes of 10 to 20 timesteps, written by Minari; its main_data.hdf5."""
    rng = np.random.default_rng(0)
    buffers = []
    for number in range(count):
        T = int(rng.integers(10, 21))
        ended = [False] * (T - 1) + [True]
        buffers.append(
            EpisodeBuffer(
                observations=list(rng.normal(size=(T + 1, 3)).astype(np.float32)),
                actions=list(rng.integers(0, ACTIONS, T)),
                rewards=list(rng.normal(size=T)),
                terminations=ended if number % 2 else [False] * T,
                truncations=[False] * T if number % 2 else ended,
            )
        )
    space = spaces.Box(-9, 9, (3,), np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(folder))
        minari.create_dataset_from_buffers(
            "own/log-v0", buffers, observation_space=space, action_space=spaces.Discrete(ACTIONS)
        )
    return folder / "own" / "log-v0" / "data" / "main_data.hdf5"


MINARI = "own-log-v0/main_data.hdf5"


def put(group, key, values, **how):
    """In the place of an array, another one."""
    del group[key]
    return group.create_dataset(key, data=values, **how)


def poison(group, key, value):
    values = group[key][()]
    values[len(values) // 2] = value
    put(group, key, values)


def truncate(group):
    """Packed with gzip, as h5repack does it, and the second half of its bytes lost."""
    node = put(group, "observations", group["observations"][()], chunks=(8, 3), compression="gzip")
    mask, packed = node.id.read_direct_chunk((0, 0))
    node.id.write_direct_chunk((0, 0), packed[: len(packed) // 2], mask)


def empty(group):
    for key in ("observations", "actions", "rewards", "terminations", "truncations"):
        group[key].resize(0, axis=0)


def duplicate(group):
    """A copy of the episode before."""
    before = group.file[f"episode_{int(group.name.split('_')[-1]) - 1}"]
    for key in list(group):
        del group[key]
        before.copy(before[key], group, key)


DAMAGE = {
    "truncated": (truncate, "corrupt HDF5", "does not end"),
    "NaN": (lambda g: poison(g, "observations", np.nan), "not finite", "observation"),
    "infinite": (lambda g: poison(g, "rewards", -np.inf), "not finite", "reward"),
    "wrong dtype": (lambda g: put(g, "actions", g["actions"][()] / 2), "wrong dtype", "actions"),
    "wrong length": (lambda g: g["terminations"].resize(len(g["rewards"]) - 1, axis=0), "wrong length", "terminations"),
    "action out of range": (lambda g: poison(g, "actions", ACTIONS), "out of range", "action"),
    "empty": (empty, "empty", "no row"),
    "duplicated": (duplicate, "duplicate", "a copy of episode"),
}


def damaged(log, folder, places):
    """A copy of the log with one kind of damage at each place."""
    shutil.copytree(log.parent, folder)
    with h5py.File(folder / log.name, "a") as file:
        for place, (change, _, _) in zip(places, DAMAGE.values(), strict=True):
            change(file[f"episode_{place}"])
    return folder / log.name


def held_out(dataset):
    return {n for n, held in zip(dataset.column("position"), dataset.column("held_out")) if held}


def test_one_percent_of_episodes_damaged_in_eight_ways(tmp_path):
    log = minari_log(tmp_path / "log")
    undamaged = build_here("minari", log, tmp_path / "a")
    places = [0, 799, 100, 101, 102, 400, 650, 300]
    after = build_here("minari", damaged(log, tmp_path / "data", places), tmp_path / "b")
    expected = {(MINARI, n): reason for n, (_, reason, _) in zip(places, DAMAGE.values(), strict=True)}
    assert len(expected) * 100 == EPISODES and len(undamaged.manifest.shards) > 10
    check(undamaged, after, expected)
    lines = rejections(after)
    for n, (_, _, word) in zip(places, DAMAGE.values(), strict=True):
        assert word in lines[MINARI, n]["detail"]
    assert lines[MINARI, places[-1]]["detail"].startswith(f"a copy of episode {places[-1] - 1} ")
    assert held_out(after) == held_out(undamaged) - set(places)
    counted = json.loads((log.parent / "metadata.json").read_text())
    (task,) = after.manifest.tasks
    assert task.episodes + task.rejected_episodes == counted["total_episodes"] == EPISODES
    lost = sum(about[0] for (_, n), about in episodes(undamaged).items() if n in places)
    assert task.timesteps + lost == counted["total_steps"]


def test_shards_of_bad_episodes_alone_leave_no_trace(tmp_path):
    """Each episode in a shard of its own."""
    log = minari_log(tmp_path / "log", count=20)
    before = build_here("minari", log, tmp_path / "a", megabytes=0.001)
    places = [0, 1, 2, 3, 4, 5, 19, 9]
    after = build_here("minari", damaged(log, tmp_path / "data", places), tmp_path / "b", megabytes=0.001, share=0.5)
    assert (len(before.manifest.shards), len(after.manifest.shards)) == (20, 12)
    assert sorted(p.name for p in after.folder.glob("shard-*")) == [shard.name for shard in after.manifest.shards]
    check(before, after, {(MINARI, n): reason for n, (_, reason, _) in zip(places, DAMAGE.values(), strict=True)})


LENGTH, COUNT = 12, 20


def d4rl_files(folder):
    """Files of 20 episodes of 12 rows; chunks end where episodes do."""
    folder.mkdir()
    rows = LENGTH * COUNT
    for n, name in enumerate("abcdefghijkl"):
        rng = np.random.default_rng(n)
        path = write_d4rl(
            folder / f"{name}.hdf5",
            rows,
            ends=range(LENGTH - 1, rows, LENGTH),
            observations=rng.normal(size=(rows, 3)).astype(np.float32),
            actions=rng.uniform(-1, 1, (rows, 2)).astype(np.float32),
            rewards=rng.normal(size=rows).astype(np.float32),
        )
        with h5py.File(path, "a") as file:
            put(file, "observations", file["observations"][()], chunks=(LENGTH, 3), compression="gzip")
    return folder


def copy_of_5_at_8(file):
    for key in ("observations", "actions", "rewards"):
        file[key][8 * LENGTH : 9 * LENGTH] = file[key][5 * LENGTH : 6 * LENGTH]


def cut_chunk_of_6(file):
    node, at = file["observations"], (6 * LENGTH, 0)
    mask, packed = node.id.read_direct_chunk(at)
    node.id.write_direct_chunk(at, packed[: len(packed) // 2], mask)


def set_at(key, row, value):
    def change(file):
        file[key][row] = value

    return change


D4RL_DAMAGE = {
    ("a.hdf5", 6): ("corrupt HDF5", cut_chunk_of_6),
    ("b.hdf5", 0): ("not finite", set_at("observations", 0, np.nan)),
    ("c.hdf5", 19): ("not finite", set_at("rewards", LENGTH * COUNT - 1, np.inf)),
    ("d.hdf5", 7): ("out of range", set_at("actions", 7 * LENGTH + 3, 11.0)),
    ("e.hdf5", 8): ("duplicate", copy_of_5_at_8),
    ("f.hdf5", WHOLE): ("wrong length", lambda f: put(f, "rewards", f["rewards"][:-1])),
    ("g.hdf5", WHOLE): ("wrong dtype", lambda f: put(f, "actions", f["actions"][()].astype(np.int32))),
    ("h.hdf5", WHOLE): ("empty", lambda f: [put(f, key, f[key][:0]) for key in list(f)]),
    ("i.hdf5", WHOLE): ("empty", b""),
    ("j.hdf5", WHOLE): ("truncated HDF5", None),
    ("k.hdf5", WHOLE): ("missing key", lambda f: f.pop("rewards")),
}


def test_d4rl_files_damaged_in_every_way_beside_a_good_one(tmp_path):
    before = build_here("d4rl", d4rl_files(tmp_path / "good"), tmp_path / "a")
    bad = shutil.copytree(tmp_path / "good", tmp_path / "bad")
    for (name, _), (_, change) in D4RL_DAMAGE.items():
        if callable(change):
            with h5py.File(bad / name, "a") as file:
                change(file)
        else:
            content = (bad / name).read_bytes()
            (bad / name).write_bytes(content[: len(content) // 2] if change is None else change)
    after = build_here("d4rl", bad, tmp_path / "b")
    check(before, after, {key: reason for key, (reason, _) in D4RL_DAMAGE.items()})
    assert [task.episodes for task in after.manifest.tasks] == [19] * 5 + [20]


ATARI_LENGTHS = (9, 12, 9, 12, 9, 12, 9, 12, 9, 12)  # of equal lengths and returns, so that copies are looked for
ATARI_ROWS = sum(ATARI_LENGTHS) + 3 * len(ATARI_LENGTHS)


def atari_files(folder, numbers):
    """Checkpoints of ten episodes, three rows of padding in front of each."""
    for number in numbers:
        rng = np.random.default_rng(number)
        rewards = np.concatenate([np.repeat([0, 1], [n + 2, 1]) for n in ATARI_LENGTHS]).astype(np.float32)
        actions = rng.integers(0, 6, ATARI_ROWS, np.int32)
        for start in atari_starts():
            actions[start - 3 : start] = 0
        write_atari(
            folder / "Pong" / "1" / "replay_logs",
            ATARI_LENGTHS,
            True,
            number,
            stale=0,
            seed=number,
            reward=rewards,
            action=actions,
        )
    return folder


def atari_starts():
    """First row of each episode, behind its padding."""
    return [sum(ATARI_LENGTHS[:n]) + 3 * (n + 1) for n in range(len(ATARI_LENGTHS))]


def array_of(folder, number, name):
    return folder / "Pong" / "1" / "replay_logs" / f"$store$_{name}_ckpt.{number}.gz"


def change_array(name, change):
    """One array of a checkpoint, changed and stored again."""

    def apply(folder, number):
        path = array_of(folder, number, name)
        with gzip.open(path) as file:
            values = np.load(file)
        store_atari(path.parent, f"$store$_{name}", change(values), number)

    return apply


def change_bytes(name, share):
    def apply(folder, number):
        path = array_of(folder, number, name)
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])

    return apply


def at(row, value):
    def change(values):
        values[row] = value
        return values

    return change


def copy_of_2_at_6(folder, number):
    start = atari_starts()
    for name in ("observation", "action", "reward"):

        def change(values):
            values[start[6] : start[6] + 9] = values[start[2] : start[2] + 9]
            return values

        change_array(name, change)(folder, number)


def nothing_left(folder, number):
    for name in ("observation", "action", "reward", "terminal"):
        change_array(name, lambda values: values[:0])(folder, number)


ATARI_DAMAGE = {  # checkpoint, episode
    (1, WHOLE): ("corrupt gzip", change_bytes("reward", 0.6)),
    (2, 4): ("out of range", change_array("action", at(atari_starts()[4] + 5, 6))),
    (3, WHOLE): ("corrupt gzip", change_bytes("observation", 0)),
    (4, WHOLE): ("wrong length", change_array("terminal", lambda values: values[:-1])),
    (5, 6): ("duplicate", copy_of_2_at_6),
    (6, WHOLE): ("wrong dtype", change_array("reward", lambda values: values.astype(np.int32))),
    (7, 9): ("not finite", change_array("reward", at(-1, np.nan))),
    (8, 0): ("not finite", change_array("reward", at(4, np.inf))),
    (9, WHOLE): ("empty", nothing_left),
    (10, WHOLE): ("corrupt gzip", change_bytes("action", 0.6)),
}


def rows_left(path, row_bytes):
    """Whole rows that a cut .npy.gz still gives, by zlib's word; the header of a .npy is 128 bytes."""
    return (len(zlib.decompressobj(31).decompress(path.read_bytes())) - 128) // row_bytes


def test_checkpoints_damaged_in_every_way_beside_good_ones(tmp_path):
    before = build_here("atari", atari_files(tmp_path / "good", range(12)), tmp_path / "a", megabytes=0.3)
    bad = shutil.copytree(tmp_path / "good", tmp_path / "bad")
    for (number, _), (_, change) in ATARI_DAMAGE.items():
        change(bad, number)
    expected = {(action_name(number), n): reason for (number, n), (reason, _) in ATARI_DAMAGE.items()}
    change_bytes("observation", 0.6)(bad, 0)
    rows = rows_left(array_of(bad, 0, "observation"), 84 * 84)
    behind = [n for n, start in enumerate(atari_starts()) if start + ATARI_LENGTHS[n] > rows]
    assert 3 < len(behind) < 7
    expected |= {(action_name(0), n): "corrupt gzip" for n in behind}
    after = build_here("atari", bad, tmp_path / "b", megabytes=0.3, share=0.5)
    check(before, after, expected)


def test_episodes_in_front_of_a_cut_are_kept_after_those_behind_it_were_asked_for(tmp_path):
    """The search for copies reads every episode of one length and return first, those behind the cut too."""
    before = build_here("atari", atari_files(tmp_path / "good", [0]), tmp_path / "a")
    bad = shutil.copytree(tmp_path / "good", tmp_path / "bad")
    change_bytes("observation", 0.6)(bad, 0)
    rows = rows_left(array_of(bad, 0, "observation"), 84 * 84)
    behind = [n for n, start in enumerate(atari_starts()) if start + ATARI_LENGTHS[n] > rows]
    after = build_here("atari", bad, tmp_path / "b", share=1.0)
    check(before, after, {(action_name(0), n): "corrupt gzip" for n in behind})
