"""Vintix's trajectories, as its loader reads them (vintix-II/train/data/torch_dataloaders.py)."""

import json

import h5py
import numpy as np
import pytest

from etl import sources
from tests.etl.logkit import build_here, episodes_of, reversed_scan, same, scans_of

GROUP = 10  # rows; Vintix has 10,000


def trajectories(folder, lengths=((7, 9, 5), (12, 4)), discrete=False):
    """A task's folder of one file per tuple of episode lengths; what is in them."""
    folder.mkdir(parents=True)
    rng, kept = np.random.default_rng(0), []
    for number, own in enumerate(lengths):
        rows = sum(own)
        arrays = {
            "proprio_observation": rng.normal(size=(rows, 5)),
            "action": rng.integers(0, 3, rows) if discrete else rng.uniform(-1, 1, (rows, 2)),
            "reward": rng.normal(size=rows),
            "step_num": np.concatenate([np.arange(length) for length in own]),
            "expert_action": np.zeros((rows, 2)),
        }
        with h5py.File(folder / f"trajectories_{number:04d}.h5", "w") as file:
            for first in range(0, rows, GROUP):
                group = file.create_group(f"{first}-{min(first + GROUP, rows) - 1}")
                for key, values in arrays.items():
                    group.create_dataset(key, data=values[first : first + GROUP], compression="gzip")
        start = 0
        for length in own:
            kept.append({key: values[start : start + length] for key, values in arrays.items()})
            start += length
    (folder / f"{folder.name}.json").write_text(json.dumps({"task_name": folder.name, "reward_scale": 1.0}))
    return kept


@pytest.mark.parametrize("discrete", [False, True])
def test_episodes_go_on_across_groups(tmp_path, discrete):
    kept = trajectories(tmp_path / "ant_v4", discrete=discrete)
    scan, found = episodes_of("vintix", tmp_path)
    assert scan.task.name == "ant_v4" and not scan.rejected
    for episode, one in zip(found, kept, strict=True):
        same(scan, episode, {"observation": one["proprio_observation"]}, one["action"], one["reward"])
    assert [episode.cut for episode in found] == [False, False, True, False, True]
    assert [episode.row for episode in found] == [0, 7, 16, 0, 12]
    assert sources.load("vintix").recognise(tmp_path).evidence.endswith("has groups such as 0-9")
    assert reversed_scan("vintix", tmp_path) == [scan]
    assert "dataset.json" in build_here("vintix", tmp_path, tmp_path / "out")


@pytest.mark.parametrize("first", [0, 1])
def test_steps_that_are_missing_or_counted_from_one(tmp_path, first):
    trajectories(tmp_path / "ant_v4", lengths=((7, 9, 5),))
    path = tmp_path / "ant_v4/trajectories_0000.h5"
    with h5py.File(path, "a") as file:
        for group in file.values():
            group["step_num"][:] += first
    scan, found = episodes_of("vintix", tmp_path)
    assert [(e.timesteps, e.cut) for e in found] == [(7, False), (9, False), (5, True)] and not scan.warnings
    with h5py.File(path, "a") as file:  # the first step of the file and one within the second episode are lost
        numbers = np.concatenate([np.arange(1, 8), [0, 1, 2, 4, 5, 6, 7, 8, 9], np.arange(5)]) + first
        for start, group in ((0, file["0-9"]), (10, file["10-19"]), (20, file["20-20"])):
            group["step_num"][:] = numbers[start : start + 10]
    scan, found = episodes_of("vintix", tmp_path)
    assert [e.timesteps for e in found] == [7, 3, 6, 5] and all(e.cut for e in found)
    assert "2 of 4 pieces do not begin with the first step" in scan.warnings[0]


DAMAGE = {
    "missing key": lambda group: group.pop("reward"),
    "wrong length": lambda group: put(group, "action", np.zeros((3, 2))),
    "wrong shape": lambda group: put(group, "action", np.zeros((GROUP, 3))),
    "wrong dtype": lambda group: [put(group.file[name], "step_num", [b"a"] * 10) for name in group.file],
}


def put(group, key, values):
    del group[key]
    group[key] = values


@pytest.mark.parametrize("reason", DAMAGE)
def test_a_damaged_file_beside_a_good_one(tmp_path, reason):
    trajectories(tmp_path / "ant", lengths=((10, 10), (12, 8)))
    with h5py.File(tmp_path / "ant" / "trajectories_0000.h5", "a") as file:
        DAMAGE[reason](file["10-19"])
    scan, found = episodes_of("vintix", tmp_path)
    assert [(line.file, line.position, line.reason) for line in scan.rejected] == [("trajectories_0000.h5", -1, reason)]
    assert len(found) == 2


def test_a_damaged_chunk_costs_its_episodes(tmp_path):
    trajectories(tmp_path / "ant", lengths=((10, 10), (12, 8)))
    with h5py.File(tmp_path / "ant" / "trajectories_0000.h5", "a") as file:
        node = file["10-19/proprio_observation"]
        mask, packed = node.id.read_direct_chunk((0, 0))
        node.id.write_direct_chunk((0, 0), packed[: len(packed) // 2], mask)
    scan, found = episodes_of("vintix", tmp_path)
    assert [getattr(one, "reason", None) for one in found] == [None, "corrupt file", None, None]


def test_a_file_of_something_else(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["x"] = np.zeros(3)
    (scan,) = scans_of("vintix", tmp_path)
    assert scan.rejected[0].reason == "empty" and sources.load("vintix").recognise(tmp_path) is None
