"""D4RL logs: splitting, naming, damage."""

import os
from pathlib import Path

import h5py
import numpy as np
import pytest

from etl import sources
from etl.sources import Rejection, SourceError
from etl.sources._oddities import split
from etl.sources.d4rl import SOURCE, Options, task_name
from schemas.task import ActionSpec
from tests.etl.logkit import write_d4rl

OPTIONS = Options()


def write(path, rows=20, ends=(8, 15), limits=(), env_id="Hopper-v4", without=(), **changes):
    """A log in D4RL's layout with terminals in the rows `ends` and timeouts in the rows `limits`."""
    rng = np.random.default_rng(0)
    arrays = {
        "observations": rng.normal(size=(rows, 3)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (rows, 2)).astype(np.float32),
        "rewards": np.arange(rows, dtype=np.float32),
        "terminals": np.isin(np.arange(rows), ends),
        "timeouts": np.isin(np.arange(rows), limits),
    } | changes
    write_d4rl(path, arrays, env_id, without)
    return path


def scan(path, options=OPTIONS):
    (result,) = SOURCE.scan([path], options)
    return result


def read(path, options=OPTIONS):
    result = scan(path, options)
    return list(sources.read(SOURCE, result.task, result.episodes))


def test_episodes_and_their_ends(tmp_path):
    path = write(tmp_path / "log.hdf5", ends=(8,), limits=(15,))
    task = scan(path).task
    assert (task.name, task.environment.id, task.environment.suite) == ("log", "Hopper-v4", "mujoco")
    assert (task.observation[0].key, task.observation[0].shape, task.action.size) == ("observation", (3,), 2)
    assert (task.score.high, task.max_episode_steps) == (3234.3, 1000)
    first, second, last = read(path)
    assert [(e.row, e.timesteps) for e in (first, second, last)] == [(0, 9), (9, 7), (16, 4)]
    assert [(e.terminated, e.truncated, e.cut) for e in (first, second, last)] == [
        (True, False, False),
        (False, True, False),
        (False, False, True),
    ]
    with h5py.File(path) as file:
        np.testing.assert_array_equal(second.observation["observation"], file["observations"][9:16])
        np.testing.assert_array_equal(second.action, file["actions"][9:16])
    np.testing.assert_array_equal(second.reward, np.arange(9, 16, dtype=np.float32))


def test_a_log_that_ends_with_an_episode_has_no_cut_one(tmp_path):
    assert [e.cut for e in read(write(tmp_path / "log.hdf5", ends=(8, 19)))] == [False, False]


def test_without_timeouts_the_time_limit_splits(tmp_path):
    path = write(tmp_path / "log.hdf5", ends=(8,), without=("timeouts",))
    episodes = read(path, Options(max_episode_steps=5))
    assert [e.timesteps for e in episodes] == [5, 4, 5, 5, 1]
    assert [(e.terminated, e.truncated) for e in episodes] == [
        (False, True),
        (True, False),
        (False, True),
        (False, True),
        (False, False),
    ]


def test_without_timeouts_the_catalogues_limit_is_used(tmp_path):
    path = write(tmp_path / "kitchen-partial-v0.hdf5", 300, (), without=("timeouts",), env_id=None)
    assert [e.timesteps for e in read(path)] == [280, 20]


def test_without_timeouts_gymnasiums_own_limit_is_used(tmp_path):
    one = np.linspace(-1, 1, 1000, dtype=np.float32)
    path = write(tmp_path / "log.hdf5", 1000, (), env_id="MountainCarContinuous-v0", without=("timeouts",), actions=one)
    assert [e.timesteps for e in read(path)] == [999, 1]
    assert scan(path).task.max_episode_steps == 999


def test_actions_of_one_number_may_be_a_vector(tmp_path):
    one = np.linspace(-2, 2, 20, dtype=np.float32)
    path = write(tmp_path / "log.hdf5", ends=(8, 19), env_id="Pendulum-v1", actions=one)
    assert scan(path).task.action == ActionSpec.continuous(-2.0, 2.0, 1)
    np.testing.assert_array_equal(np.concatenate([e.action for e in read(path)]), one[:, None])


def test_without_timeouts_and_limit_the_file_is_rejected_with_the_remedy(tmp_path):
    result = scan(write(tmp_path / "log.hdf5", without=("timeouts",), env_id=None))
    assert result.task is None
    assert result.rejected[0].reason == "no time limit" and "--max-episode-steps" in result.rejected[0].detail


def test_an_episode_of_exactly_the_limit_that_terminates_is_not_truncated(tmp_path):
    path = write(tmp_path / "log.hdf5", 10, (4,), without=("timeouts",))
    first, second = read(path, Options(max_episode_steps=5))
    assert (first.terminated, first.truncated) == (True, False)
    assert (second.terminated, second.truncated) == (False, True)


@pytest.mark.parametrize("seed", range(20))
def test_stops_against_a_plain_loop(seed):
    rng = np.random.default_rng(seed)
    n, limit = int(rng.integers(1, 60)), int(rng.integers(1, 12))
    terminals, timeouts = rng.random(n) < 0.1, rng.random(n) < 0.1
    for given in (timeouts, None):
        expected, length = [], 0
        unset = given is None or not given.any()
        for row in range(n):
            length += 1
            if terminals[row] or (length == limit if unset else given[row]) or row == n - 1:
                expected.append(row + 1)
                length = 0
        assert list(split(terminals, given, limit).stops) == expected


def test_columns_of_real_files(tmp_path):
    """(N, 1) rewards, float terminals (kitchen), float64 observations."""
    terminals = np.zeros((20, 1), np.float32)
    terminals[9] = 1
    path = write(
        tmp_path / "log.hdf5",
        rewards=np.ones((20, 1), np.float64),
        terminals=terminals,
        observations=np.zeros((20, 3), np.float64),
    )
    first, second = read(path)
    assert first.terminated and first.reward.shape == (10,) and first.reward.dtype == np.float32
    assert second.observation["observation"].dtype == np.float32


def test_names_and_environments(tmp_path):
    assert task_name(Path("hopper_medium-v2.hdf5")) == "hopper-medium-v2"
    assert task_name(Path("hopper_mixed.hdf5")) == "hopper-medium-replay-v0"
    assert task_name(Path("hopper-medium-v4.hdf5")) == "hopper-medium-v4"
    known = scan(write(tmp_path / "walker2d_medium-v2.hdf5", env_id=None), Options("Swimmer-v4")).task
    assert (known.name, known.environment.id, known.score) == ("walker2d-medium-v2", "Swimmer-v4", None)
    known = scan(write(tmp_path / "walker2d_medium-v2.hdf5", env_id=None)).task
    assert (known.environment.id, known.score.high) == ("Walker2d-v4", 4592.3)
    logged = scan(write(tmp_path / "walker2d_expert-v2.hdf5", env_id="Walker2d-v5")).task
    assert logged.environment.id == "Walker2d-v5"
    given = scan(write(tmp_path / "mine.hdf5", env_id=None), Options("HalfCheetah-v5")).task
    assert (given.environment.id, given.score.low) == ("HalfCheetah-v5", -280.178953)
    unknown = scan(write(tmp_path / "own.hdf5", env_id=None)).task
    assert unknown.environment is None and unknown.score is None and unknown.max_episode_steps == 9


def test_a_mazes_goal_is_a_field_of_its_own(tmp_path):
    goals = np.arange(40, dtype=np.float32).reshape(20, 2)
    path = write(tmp_path / "log.hdf5", **{"infos/goal": goals, "infos/qpos": goals})
    assert [(f.key, f.shape) for f in scan(path).task.observation] == [("goal", (2,)), ("observation", (3,))]
    np.testing.assert_array_equal(read(path)[1].observation["goal"], goals[9:16])


def test_flags_may_be_floats_and_columns(tmp_path):
    ends = np.isin(np.arange(20), (8, 15)).astype(np.float32)
    path = write(tmp_path / "log.hdf5", terminals=ends[:, None], rewards=np.ones((20, 1), np.float64))
    assert [(e.row, e.timesteps, e.terminated) for e in read(path)] == [(0, 9, True), (9, 7, True), (16, 4, False)]


def test_known_datasets_and_what_is_cached(tmp_path):
    (tmp_path / "d4rl").mkdir()
    cached = tmp_path / "d4rl" / "hopper_medium-v2.hdf5"
    cached.touch()
    known = {one.id: one for one in SOURCE.known(tmp_path)}
    assert len(known) == 155 and [one.id for one in known.values() if one.cached] == ["hopper-medium-v2"]
    assert known["hopper-medium-v2"].cached == cached and known["hopper-medium-v2"].where.endswith(cached.name)


def test_one_bad_episode_leaves_the_others(tmp_path):
    observations = np.zeros((20, 3), np.float32)
    observations[10, 1] = np.nan
    path = write(tmp_path / "log.hdf5", observations=observations)
    first, bad, last = read(path)
    assert first.timesteps == 9 and last.timesteps == 4
    assert isinstance(bad, Rejection)
    assert (bad.task, bad.file, bad.position, bad.row, bad.reason) == ("log", "log.hdf5", 1, 9, "not finite")


@pytest.mark.parametrize(
    "reason, word, changes",
    [
        ("missing key", "rewards", {"without": ("rewards",)}),
        ("wrong length", "actions", {"actions": np.zeros((19, 2), np.float32)}),
        ("wrong length", "timeouts", {"timeouts": np.zeros(21, bool)}),
        ("wrong shape", "observations", {"observations": np.zeros(20, np.float32)}),
        ("wrong shape", "rewards", {"rewards": np.zeros((20, 2), np.float32)}),
        ("wrong dtype", "observations", {"observations": np.zeros((20, 3), np.int64)}),
        (
            "empty",
            "observations",
            {"rows": 0, "ends": (), "observations": np.zeros((0, 3), "f4"), "actions": np.zeros((0, 2), "f4")},
        ),
    ],
)
def test_unusable_files_are_rejected_and_others_go_on(tmp_path, reason, word, changes):
    bad, good = write(tmp_path / "bad.hdf5", **changes), write(tmp_path / "good.hdf5")
    first, second = SOURCE.scan([good, bad], OPTIONS)
    (rejection,) = first.rejected
    assert (rejection.file, rejection.position, rejection.reason) == ("bad.hdf5", -1, reason)
    assert word in rejection.detail and "\n" not in rejection.detail
    assert second.task.name == "good" and len(second.episodes) == 3


def test_damaged_files_are_rejected(tmp_path):
    whole = write(tmp_path / "whole.hdf5").read_bytes()
    for name, content in (("empty", b""), ("text", b"no HDF5"), ("half", whole[: len(whole) // 2])):
        (tmp_path / f"{name}.hdf5").write_bytes(content)
    reasons = {s.rejected[0].file: s.rejected[0].reason for s in SOURCE.scan(files_of(tmp_path), OPTIONS) if s.rejected}
    assert reasons == {"empty.hdf5": "empty", "text.hdf5": "not HDF5", "half.hdf5": "truncated HDF5"}


def files_of(folder):
    return SOURCE.resolve(folder, None, folder)


def test_a_damaged_chunk_costs_the_episodes_in_it(tmp_path):
    path = write(tmp_path / "log.hdf5")
    with h5py.File(path) as file:
        start = file["observations"].id.get_chunk_info(0).byte_offset
    content = bytearray(path.read_bytes())
    content[start : start + 40] = bytes(40)
    path.write_bytes(content)
    results = read(path)
    assert len(results) == 3 and all(isinstance(r, Rejection) and r.reason == "corrupt HDF5" for r in results)


def test_a_file_that_disappears_costs_its_episodes(tmp_path):
    path = write(tmp_path / "log.hdf5")
    result = scan(path)
    path.unlink()
    assert [r.position for r in sources.read(SOURCE, result.task, result.episodes)] == [0, 1, 2]


def test_resolve(tmp_path):
    (tmp_path / "deep").mkdir()
    a, b = write(tmp_path / "a.hdf5"), write(tmp_path / "deep" / "hopper_medium-v2.h5")
    assert SOURCE.resolve(tmp_path, None, tmp_path) == [a, b]
    assert SOURCE.resolve(a, None, tmp_path) == [a]
    assert SOURCE.resolve(tmp_path, "hopper-medium-v2", tmp_path) == [b]
    with pytest.raises(SourceError, match="hopper-medium-v2"):
        SOURCE.resolve(tmp_path, "hopper-medium-v1", tmp_path)
    (tmp_path / "none").mkdir()
    with pytest.raises(SourceError, match="no .hdf5"):
        SOURCE.resolve(tmp_path / "none", None, tmp_path)
    with pytest.raises(SourceError, match="did you mean .*hopper-medium-v2"):
        SOURCE.resolve(None, "hoper-medium-v2", tmp_path)


def test_two_files_of_one_name_are_an_error(tmp_path):
    (tmp_path / "other").mkdir()
    write(tmp_path / "hopper-medium-v2.hdf5"), write(tmp_path / "other" / "hopper_medium-v2.hdf5")
    with pytest.raises(SourceError, match="both dataset 'hopper-medium-v2'"):
        SOURCE.scan(files_of(tmp_path), OPTIONS)


def test_registered():
    assert "d4rl" in sources.names() and sources.load("d4rl") is SOURCE


@pytest.mark.skipif("GATO_SHARED_DATA" not in os.environ, reason="GATO_SHARED_DATA names no folder of recorded logs")
@pytest.mark.parametrize(
    "name, count, steps, mean, std",
    [
        ("hopper-medium-v4", 101, 40234, 1220, 359),
        ("hopper-expert-v4", 41, 40473, 3561, 284),
        ("halfcheetah-medium-v4", 40, 40000, 4204, 846),
        ("halfcheetah-expert-v4", 40, 40000, 11902, 164),
        ("walker2d-medium-v4", 41, 40684, 3855, 167),
        ("walker2d-expert-v4", 45, 40635, 4787, 1459),
    ],
)
def test_recorded_logs(name, count, steps, mean, std):
    episodes = read(Path(os.environ["GATO_SHARED_DATA"]) / "d4rl" / f"{name}.hdf5")
    returns = [e.reward.sum(dtype=np.float64) for e in episodes]
    assert (len(episodes), sum(e.timesteps for e in episodes)) == (count, steps)
    assert (round(np.mean(returns)), round(np.std(returns))) == (mean, std)
