"""ManiSkill's trajectories: as its RecordEpisode wrote them (tests/etl/golden), and more in the same form."""

import json
from pathlib import Path

import h5py
import numpy as np
import pytest

from etl import sources
from etl.sources import Rejection
from tests.etl.golden import make_maniskill
from tests.etl.logkit import build_here, episodes_of, reversed_scan, same, scans_of

GOLDEN = Path(__file__).parent / "golden/maniskill"
NAME = "trajectory.rgb.pd_ee_delta_pose.physx_cpu"


def trajectories(folder, observed="rgb", count=3, rewards=True):
    """NAME.h5 and NAME.json of `count` trajectories; what is in them."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, kept, listed = np.random.default_rng(0), [], []
    with h5py.File(folder / f"{NAME}.h5", "w") as file:
        for number in range(count):
            T = 5 + number
            group = file.create_group(f"traj_{number}", track_order=True)
            seen = {}
            if observed == "rgb":
                seen = {"agent/qpos": rng.normal(size=(T + 1, 9)).astype(np.float32)}
                for camera in ("base_camera", "hand_camera"):
                    pictures = rng.integers(0, 256, (T + 1, 64, 64, 3), np.uint8)
                    seen[f"sensor_data/{camera}/rgb"] = pictures
                for key, values in seen.items():
                    packed = {"compression": "gzip", "compression_opts": 5} if "rgb" in key else {}
                    group.create_dataset(f"obs/{key}", data=values, **packed)
            elif observed == "state":
                seen = {"observation": rng.normal(size=(T + 1, 42)).astype(np.float32)}
                group["obs"] = seen["observation"]
            actions, end = rng.uniform(-1, 1, (T, 7)).astype(np.float32), np.arange(T) == T - 1
            group["actions"], group["terminated"], group["truncated"] = (
                actions,
                end & (number != 1),
                end & (number == 1),
            )
            group["success"] = end & (number != 1)
            group["env_states/actors/cube"] = rng.normal(size=(T + 1, 13)).astype(np.float32)
            reward = rng.normal(size=T).astype(np.float32)
            if rewards:
                group["rewards"] = reward
            kept.append((seen, actions, reward))
            listed.append({"episode_id": number, "episode_seed": number, "control_mode": "pd", "elapsed_steps": T})
    info = {"env_id": "PickCube-v1", "max_episode_steps": 50, "env_kwargs": {"obs_mode": observed}}
    (folder / f"{NAME}.json").write_text(json.dumps({"env_info": info, "episodes": listed}))
    return kept


def test_files_that_maniskill_wrote():
    scan, found = episodes_of("maniskill", GOLDEN)
    assert scan.task.name == f"PickCube-v1-{make_maniskill.NAME}" and not scan.rejected
    assert scan.task.max_episode_steps == make_maniskill.LIMIT and scan.task.action.high == (1.0,) * 8
    kept = make_maniskill.episodes()
    for episode, one, (T, end) in zip(found, kept, make_maniskill.ENDS, strict=True):
        seen = {"agent/qpos": one["qpos"][:T], "sensor_data/base_camera/rgb": one["rgb"][:T]}
        same(scan, episode, seen, one["actions"], one["rewards"])
        assert (episode.terminated, episode.truncated) == (end == "terminated", end == "truncated")
    assert "PickCube-v1" in sources.load("maniskill").recognise(GOLDEN).evidence


@pytest.mark.parametrize("observed", ["rgb", "state"])
def test_trajectories_are_episodes_without_their_last_observation(tmp_path, observed):
    kept = trajectories(tmp_path, observed)
    scan, found = episodes_of("maniskill", tmp_path)
    assert scan.task.name == f"PickCube-v1-{NAME}" and scan.task.max_episode_steps == 50 and not scan.rejected
    assert scan.task.environment.id == "PickCube-v1" and scan.task.action.high == (1.0,) * 7
    for episode, (seen, actions, reward) in zip(found, kept, strict=True):
        same(scan, episode, {key: values[:-1] for key, values in seen.items()}, actions, reward)
    assert [(e.terminated, e.truncated) for e in found] == [(True, False), (False, True), (True, False)]
    recognition = sources.load("maniskill").recognise(tmp_path)
    assert recognition.certainty == 2 and recognition.evidence == f"{NAME}.json, env_info of PickCube-v1"


def test_without_rewards_or_observations(tmp_path):
    kept = trajectories(tmp_path / "a", rewards=False)
    scan, found = episodes_of("maniskill", tmp_path / "a")
    same(scan, found[0], {key: values[:-1] for key, values in kept[0][0].items()}, kept[0][1])
    assert any("no rewards" in line for line in scan.notes)
    trajectories(tmp_path / "b", observed="none")
    (scan,) = scans_of("maniskill", tmp_path / "b")
    assert scan.task is None and all("replay_trajectory" in line.detail for line in scan.rejected)


def test_files_of_one_name_in_folders_of_their_own(tmp_path):
    for how in ("motionplanning", "rl"):
        trajectories(tmp_path / how, "state")
    scans = scans_of("maniskill", tmp_path)
    assert [scan.task.name for scan in scans] == [f"PickCube-v1-{NAME}-{how}" for how in ("motionplanning", "rl")]
    assert reversed_scan("maniskill", tmp_path) == scans
    assert "dataset.json" in build_here("maniskill", tmp_path, tmp_path / "out")


def put(group, key, values):
    del group[key]
    group[key] = values


DAMAGE = {
    "missing key": lambda file: file["traj_1"].pop("actions"),
    "missing group": lambda file: file.pop("traj_1"),
    "wrong length": lambda file: put(file, "traj_1/obs", np.zeros((6, 42), np.float32)),
    "wrong shape": lambda file: put(file, "traj_1/actions", np.zeros((6, 5), np.float32)),
    "wrong dtype": lambda file: put(file, "traj_1/obs", np.array([b"a"] * 7)),
}


@pytest.mark.parametrize("reason", DAMAGE)
def test_one_damaged_trajectory(tmp_path, reason):
    trajectories(tmp_path, "state")
    with h5py.File(tmp_path / f"{NAME}.h5", "a") as file:
        DAMAGE[reason](file)
    scan, found = episodes_of("maniskill", tmp_path)
    (line,) = [*scan.rejected, *(one for one in found if isinstance(one, Rejection))]
    assert (line.position, line.reason) == (1, "wrong shape" if reason == "wrong dtype" else reason)


def test_a_damaged_json_loses_only_what_it_says(tmp_path):
    trajectories(tmp_path, "state")
    (tmp_path / f"{NAME}.json").write_text("{")
    scan, found = episodes_of("maniskill", tmp_path)
    assert scan.task.name == NAME and len(found) == 3 and scan.task.environment is None
    (tmp_path / f"{NAME}.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(50))
    (scan,) = scans_of("maniskill", tmp_path)
    assert scan.rejected[0].reason == "corrupt HDF5"
