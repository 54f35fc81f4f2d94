"""d3rlpy's files: as d3rlpy 2.8 (v2.1) and 1.1 (v1) wrote them (tests/etl/golden), and more of v1 by its form."""

import shutil
from itertools import pairwise
from pathlib import Path

import h5py
import numpy as np
import pytest

from etl import sources
from etl.sources import Rejection
from tests.etl.golden import make_d3rlpy_v1
from tests.etl.golden.make_d3rlpy import episodes
from tests.etl.logkit import episodes_of, same, scans_of

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("kind", ["continuous", "pixels", "tuples"])
def test_files_that_d3rlpy_wrote(tmp_path, kind):
    shutil.copy(GOLDEN / f"d3rlpy-{kind}.h5", tmp_path)
    scan, found = episodes_of("d3rlpy", tmp_path)
    assert scan.task.name == f"d3rlpy-{kind}" and not scan.rejected
    for episode, kept in zip(found, episodes(kind), strict=True):
        seen = kept["observations"]
        observation = {"observation": seen}
        if kind == "pixels":
            observation = {"observation": seen.transpose(0, 2, 3, 1)}
        elif kind == "tuples":
            observation = {"0": seen[0], "1": seen[1]}
        same(scan, episode, observation, kept["actions"], kept["rewards"][:, 0])
        assert (episode.terminated, episode.truncated) == (kept["terminated"], not kept["terminated"])
    if kind == "pixels":
        assert scan.task.action.choices == (4,)
    else:
        assert -2 <= scan.task.action.low[0] < -1 and "nothing says their range" in scan.warnings[0]
    assert "num_episodes" in sources.load("d3rlpy").recognise(tmp_path).evidence


def test_bounds_are_those_of_the_option_or_the_environment(tmp_path):
    shutil.copy(GOLDEN / "d3rlpy-continuous.h5", tmp_path)
    (scan,) = scans_of("d3rlpy", tmp_path, action_low=(-2.0,), action_high=(2.0,))
    assert scan.task.action.low == (-2.0,) and not scan.warnings
    (scan,) = scans_of("d3rlpy", tmp_path, environment="Pendulum-v1")
    assert scan.task.action.high == (2.0,) and not scan.warnings


@pytest.mark.parametrize("kind", ["continuous", "pixels"])
def test_v1_files_that_d3rlpy_wrote(tmp_path, kind):
    shutil.copy(GOLDEN / f"d3rlpy-v1-{kind}.h5", tmp_path)
    scan, found = episodes_of("d3rlpy", tmp_path)
    kept = make_d3rlpy_v1.rows(kind)
    assert not scan.rejected and not scan.warnings
    assert scan.task.action.kind == ("discrete" if kind == "pixels" else "continuous")
    for episode, (start, stop) in zip(found, pairwise([0, *make_d3rlpy_v1.STOPS]), strict=True):
        seen, actions, rewards = (kept[key][start:stop] for key in ("observations", "actions", "rewards"))
        seen = seen.transpose(0, 2, 3, 1) if kind == "pixels" else seen
        same(scan, episode, {"observation": seen}, actions, rewards)
        assert episode.terminated == (start <= make_d3rlpy_v1.TERMINAL < stop) != episode.truncated


def v1(path, closed=True):
    """A file as MDPDataset.dump of d3rlpy 1.x writes it, of episodes of 4, 6 and 3 rows."""
    rng = np.random.default_rng(1)
    rows, ends, terminals = 13, np.zeros(13), np.zeros(13)
    ends[[3, 9, 12] if closed else [3, 9]] = 1
    terminals[9] = 1
    arrays = {"observations": rng.normal(size=(rows, 2)).astype(np.float32), "rewards": rng.normal(size=rows)}
    arrays |= {"actions": rng.uniform(-1, 1, (rows, 2)).astype(np.float32), "terminals": terminals}
    with h5py.File(path, "w") as file:
        for key, values in (arrays | {"episode_terminals": ends}).items():
            file[key] = np.float32(values)
        file["discrete_action"], file["version"] = False, "1.0"
    return arrays


@pytest.mark.parametrize("closed", [True, False])
def test_v1_ends_episodes_where_episode_terminals_are_set(tmp_path, closed):
    kept = v1(tmp_path / "log.h5", closed)
    scan, found = episodes_of("d3rlpy", tmp_path)
    bounds = [(0, 4), (4, 10), (10, 13)]
    for episode, (start, stop) in zip(found, bounds, strict=True):
        part = {key: values[start:stop] for key, values in kept.items()}
        same(scan, episode, {"observation": part["observations"]}, part["actions"], part["rewards"])
    assert [(e.terminated, e.truncated, e.row) for e in found] == [
        (False, True, 0), (True, False, 4), (False, closed, 10)
    ]  # fmt: skip
    assert sources.load("d3rlpy").recognise(tmp_path).certainty == 2


def test_a_file_older_than_1_0_may_have_rewards_one_row_late(tmp_path):
    """MDPDataset before 1.0 held r_t, which action t - 1 brought, in row t (takuseno/d3rlpy issue 135), and dumped no
    version; get_d4rl began each episode with a reward of 0."""
    kept = v1(tmp_path / "log.h5")
    bounds = [(0, 4), (4, 10), (10, 13)]
    late = np.float32(kept["rewards"])
    late[[0, 4, 10]] = 0
    with h5py.File(tmp_path / "log.h5", "a") as file:
        del file["version"]
        file["rewards"][:] = late
    scan, found = episodes_of("d3rlpy", tmp_path)
    assert "first reward of 3 of 3 episodes" in scan.warnings[0] and "--reward-row next" in scan.warnings[0]
    same(scan, found[1], {"observation": kept["observations"][4:10]}, kept["actions"][4:10], late[4:10])
    scan, found = episodes_of("d3rlpy", tmp_path, reward_row="next")
    assert not scan.warnings
    for episode, (start, stop) in zip(found, bounds, strict=True):
        rows = slice(start, stop - 1)
        same(scan, episode, {"observation": kept["observations"][rows]}, kept["actions"][rows], late[start + 1 : stop])
    assert [episode.terminated for episode in found] == [False, True, False]
    with pytest.raises(ValueError, match="--reward-row"):
        sources.load("d3rlpy").options(reward_row="later").check()


def test_choices_that_were_dumped_as_floats(tmp_path):
    v1(tmp_path / "log.h5")
    choices = np.arange(13) % 2
    with h5py.File(tmp_path / "log.h5", "a") as file:
        del file["discrete_action"], file["actions"]
        file["discrete_action"], file["actions"] = True, np.float32(choices)
    scan, found = episodes_of("d3rlpy", tmp_path)
    assert scan.task.action.choices == (2,) and found[1].action.tolist() == choices[4:10].tolist()
    with h5py.File(tmp_path / "log.h5", "a") as file:
        file["actions"][5] = 0.5
    scan, _ = episodes_of("d3rlpy", tmp_path)
    assert [(line.position, line.reason) for line in scan.rejected] == [(1, "wrong dtype")]


def put(file, key, values):
    del file[key]
    file[key] = values


DAMAGE = {
    "missing key": lambda file: file.pop("actions_1"),
    "wrong length": lambda file: put(file, "observations_1", np.zeros((3, 3), np.float32)),
    "wrong shape": lambda file: put(file, "observations_1", np.zeros((7, 2), np.float32)),
    "wrong dtype": lambda file: put(file, "rewards_1", np.array([b"a"] * 7)),
    "not finite": lambda file: put(file, "rewards_1", np.full((7, 1), np.inf)),
}


@pytest.mark.parametrize("reason", DAMAGE)
def test_one_damaged_episode(tmp_path, reason):
    shutil.copy(GOLDEN / "d3rlpy-continuous.h5", tmp_path / "log.h5")
    with h5py.File(tmp_path / "log.h5", "a") as file:
        DAMAGE[reason](file)
    scan, found = episodes_of("d3rlpy", tmp_path)
    (line,) = [*scan.rejected, *(one for one in found if isinstance(one, Rejection))]
    assert (line.file, line.position, line.reason) == ("log.h5", 1, reason)


def test_other_versions_and_files_without_rows_are_refused(tmp_path):
    shutil.copy(GOLDEN / "d3rlpy-continuous.h5", tmp_path / "a.h5")
    with h5py.File(tmp_path / "a.h5", "a") as file:
        put(file, "version", "2.0")
    v1(tmp_path / "b.h5")
    with h5py.File(tmp_path / "b.h5", "a") as file:
        put(file, "rewards", np.zeros(3))
    (tmp_path / "c.h5").write_bytes((GOLDEN / "d3rlpy-pixels.h5").read_bytes()[:9000])
    reasons = [line.reason for scan in scans_of("d3rlpy", tmp_path) for line in scan.rejected]
    assert reasons == ["wrong version", "wrong length", "truncated HDF5"]
