"""robomimic's HDF5: as its scripts wrote it (tests/etl/golden), and in the form of LIBERO and RoboCasa."""

import json
import lzma
from pathlib import Path

import h5py
import numpy as np
import pytest

from etl import sources
from etl.sources import Rejection
from schemas.dataset import DatasetError
from shards.reader import Dataset
from tests.etl.golden import make_robomimic
from tests.etl.logkit import build_here, episodes_of, same, scans_of

GOLDEN = Path(__file__).parent / "golden"
SAID = "pick up the red bowl"


def demos(path, count=11, kind="robomimic"):
    """A file of `count` demos by the written specification (robomimic.github.io/docs/datasets/overview.html); what is
    in them."""
    kept = []
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        for number in range(count):
            T = 4 + number % 3
            demo = data.create_group(f"demo_{number}")
            observation = {
                "agentview_image": rng.integers(0, 256, (T, 84, 84, 3), np.uint8),
                "robot0_eye_in_hand_image": rng.integers(0, 256, (T, 84, 84, 3), np.uint8),
                "robot0_eef_pos": rng.normal(size=(T, 3)),
            }
            arrays = {"actions": rng.uniform(-1, 1, (T, 7)), "rewards": 1.0 * (np.arange(T) == T - 1)}
            arrays |= {"dones": (np.arange(T) == T - 1).astype(np.int64), "states": rng.normal(size=(T, 45))}
            for key, values in (arrays | {f"obs/{k}": v for k, v in observation.items()}).items():
                demo.create_dataset(key, data=values, compression="gzip" if "image" in key else None)
            demo["next_obs/robot0_eef_pos"] = rng.normal(size=(T, 3))
            demo.attrs["num_samples"], demo.attrs["model_file"] = T, "<mujoco/>"
            said = None
            if kind == "robocasa":
                said = f"open the drawer {number}"
                demo.attrs["ep_meta"] = json.dumps({"lang": said, "layout_id": 1})
            kept.append((observation, arrays, said))
        data.attrs["total"] = sum(len(arrays["actions"]) for _, arrays, _ in kept)
        arguments = {"env_name": "Lift", "env_type": 1, "env_kwargs": {"robots": ["Panda"], "camera_heights": 84}}
        data.attrs["env_args"] = json.dumps(arguments)
        if kind == "libero":
            data.attrs["problem_info"] = json.dumps({"problem_name": "libero", "language_instruction": f'"{SAID}"'})
        names = [f"demo_{n}".encode() for n in range(count)]
        file["mask/train"], file["mask/valid"] = np.array(names[2:]), np.array(names[:2])
    return kept


@pytest.mark.parametrize("kind", ["robomimic", "libero", "robocasa"])
def test_demos_are_episodes_with_cameras_and_instructions(tmp_path, kind):
    kept = demos(tmp_path / "lift.hdf5", kind=kind)
    scan, found = episodes_of("robomimic", tmp_path)
    assert scan.task.name == "lift" and not scan.rejected and not scan.warnings
    assert [ref.position for ref in scan.episodes] == list(range(11))  # demo_10 after demo_9
    for episode, (observation, arrays, said) in zip(found, kept, strict=True):
        said = SAID if kind == "libero" else said
        text = {"instruction": said} if said else {}
        same(scan, episode, observation | text, arrays["actions"], arrays["rewards"])
        assert episode.terminated and not episode.truncated
    assert scan.task.action.low == (-1.0,) * 7
    recognition = sources.load("robomimic").recognise(tmp_path)
    assert recognition.certainty == 2 and recognition.evidence == "lift.hdf5, data's attribute env_args"


def test_a_file_that_robomimic_wrote(tmp_path):
    (tmp_path / "lift.hdf5").write_bytes(lzma.decompress((GOLDEN / "robomimic-lift.hdf5.xz").read_bytes()))
    scan, found = episodes_of("robomimic", tmp_path, held_out_mask="valid")
    assert not scan.rejected and not scan.warnings and scan.task.action.low == (-1.0,) * 7
    assert [ref.held_out for ref in scan.episodes] == [n == make_robomimic.VALID for n in range(4)]
    with h5py.File(tmp_path / "lift.hdf5") as file:
        for number, (episode, taken) in enumerate(zip(found, make_robomimic.actions(), strict=True)):
            demo = file[f"data/demo_{number}"]
            observation = {key: values[:] for key, values in demo["obs"].items()}
            assert len(observation) == 11
            same(scan, episode, observation, taken, demo["rewards"][:])
            assert (episode.terminated, episode.truncated) == (True, False)


def test_masks_hold_out_or_select(tmp_path):
    demos(tmp_path / "lift.hdf5")
    build_here("robomimic", tmp_path, tmp_path / "shards", held_out_mask="valid", megabytes=1.0)
    dataset = Dataset(tmp_path / "shards")
    assert set(dataset.column("position")[dataset.column("held_out")].tolist()) == {0, 1}
    scan, found = episodes_of("robomimic", tmp_path, mask="valid", observation_keys=("robot0_eef_pos",))
    assert [ref.position for ref in scan.episodes] == [0, 1] and len(scan.task.observation) == 1
    with pytest.raises(DatasetError, match="holds another dataset"):
        build_here("robomimic", tmp_path, tmp_path / "shards", mask="train", megabytes=1.0)
    (scan,) = scans_of("robomimic", tmp_path, mask="nonsense")
    assert scan.rejected[0].reason == "missing key" and "there are train, valid" in scan.rejected[0].detail


DAMAGE = {
    "missing group": lambda demo: demo.pop("obs"),
    "missing key": lambda demo: demo.pop("actions"),
    "wrong length": lambda demo: demo["obs"].move("robot0_eef_pos", "old") or put(demo, "obs/robot0_eef_pos", (2, 3)),
    "wrong shape": lambda demo: put(demo, "obs/robot0_eef_pos", (len(demo["actions"]), 5)),
    "not finite": lambda demo: put(demo, "actions", demo["actions"].shape, np.nan),
}


def put(demo, key, shape, value=0.0):
    if key in demo:
        del demo[key]
    demo[key] = np.full(shape, value)


@pytest.mark.parametrize("reason", DAMAGE)
def test_one_damaged_demo_costs_one_episode(tmp_path, reason):
    kept = demos(tmp_path / "lift.hdf5", count=3)
    with h5py.File(tmp_path / "lift.hdf5", "a") as file:
        DAMAGE[reason](file["data/demo_1"])
    bounds = {"action_low": (-1.0,), "action_high": (1.0,)}
    scan, found = episodes_of("robomimic", tmp_path, **bounds)
    (line,) = [*scan.rejected, *(one for one in found if isinstance(one, Rejection))]
    assert (line.file, line.position, line.reason) == ("lift.hdf5", 1, reason)
    good = [one for one in found if not isinstance(one, Rejection)]
    for episode, (observation, arrays, _) in zip(good, kept[::2], strict=True):
        same(scan, episode, observation, arrays["actions"], arrays["rewards"])


def test_a_truncated_file_is_refused_whole(tmp_path):
    demos(tmp_path / "lift.hdf5", count=2)
    data = (tmp_path / "lift.hdf5").read_bytes()
    (tmp_path / "lift.hdf5").write_bytes(data[: len(data) // 2])
    (scan,) = scans_of("robomimic", tmp_path)
    assert scan.task is None and [line.reason for line in scan.rejected] == ["truncated HDF5"]
    assert sources.load("robomimic").recognise(tmp_path) is None
