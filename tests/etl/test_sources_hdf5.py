"""Files of an episode each: ALOHA, V-D4RL, OGBench, and whatever their keys are named by options."""

import io
import zipfile

import h5py
import numpy as np
import pytest
from PIL import Image

from etl import sources
from etl.sources import Rejection, SourceError
from shards.reader import Dataset
from tests.etl.logkit import build_here, episodes_of, reversed_scan, same, scans_of

CAMERAS = ("top", "left_wrist")


def jpeg(picture):
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG")
    return buffer.getvalue()


def aloha(folder, episodes=3, coded="", T=7):
    """Files as ALOHA's record_sim_episodes.py writes them; what is in them."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = []
    for number in range(episodes):
        rng = np.random.default_rng(number)
        pictures = {name: rng.integers(0, 256, (T, 48, 64, 3), np.uint8) for name in CAMERAS}
        arrays = {"qpos": rng.normal(size=(T, 14)), "qvel": rng.normal(size=(T, 14))}
        action = rng.normal(size=(T, 14)) * 1.6
        with h5py.File(folder / f"episode_{number}.hdf5", "w", rdcc_nbytes=1024**2 * 2) as file:
            file.attrs["sim"] = True
            group = file.create_group("observations")
            images = group.create_group("images")
            for name, frames in pictures.items():
                if coded:
                    codes = [jpeg(frame) for frame in frames]
                    pictures[name] = np.stack([np.asarray(Image.open(io.BytesIO(code))) for code in codes])
                if coded == "padded":
                    longest = max(map(len, codes))
                    images[name] = np.stack([np.frombuffer(c.ljust(longest, b"\0"), np.uint8) for c in codes])
                elif coded:
                    rows = images.create_dataset(name, (T,), h5py.vlen_dtype(np.uint8))
                    for t, code in enumerate(codes):
                        rows[t] = np.frombuffer(code, np.uint8)
                else:
                    images.create_dataset(name, data=frames, dtype="uint8", chunks=(1, 48, 64, 3))
            for name, values in arrays.items():
                group[name] = values
            file["action"] = action
        kept.append((arrays | {f"images/{name}": frames for name, frames in pictures.items()}, action))
    return kept


@pytest.mark.parametrize("coded", ["", "padded", "of variable length"])
def test_aloha_is_one_task_of_several_cameras(tmp_path, coded):
    kept = aloha(tmp_path / "cube", coded=coded)
    scan, found = episodes_of("hdf5", tmp_path / "cube")
    assert scan.task.name == "cube" and not scan.rejected
    for episode, (observation, action) in zip(found, kept, strict=True):
        same(scan, episode, observation, action)
        assert episode.truncated and not episode.terminated
    spans = np.array([(a.min(axis=0), a.max(axis=0)) for _, a in kept])
    low, high, width = scan.task.action.low, scan.task.action.high, np.ptp([spans[:, 0].min(0), spans[:, 1].max(0)], 0)
    assert ((low <= spans[:, 0].min(axis=0)) & (low >= spans[:, 0].min(axis=0) - 0.1 * width)).all()
    assert ((high >= spans[:, 1].max(axis=0)) & (high <= spans[:, 1].max(axis=0) + 0.1 * width)).all()
    assert "nothing says their range" in scan.warnings[0] and "no rewards" in scan.notes[0]
    assert sources.load("hdf5").recognise(tmp_path).certainty == 1


def test_episodes_are_held_out_within_the_one_task(tmp_path):
    aloha(tmp_path / "cube", episodes=5)
    first = build_here("hdf5", tmp_path, tmp_path / "a", megabytes=0.2)
    (task,) = Dataset(tmp_path / "a").manifest.tasks
    assert (task.episodes, task.held_out_episodes) == (5, 1)
    assert build_here("hdf5", tmp_path / "cube", tmp_path / "b", megabytes=0.2)["index.arrow"] == first["index.arrow"]
    assert reversed_scan("hdf5", tmp_path / "cube") == scans_of("hdf5", tmp_path / "cube")


def dreamer(T=6, seed=0):
    rng = np.random.default_rng(seed)
    arrays = {"image": rng.integers(0, 256, (T + 1, 64, 64, 3), np.uint8)}
    arrays["action"] = np.concatenate([np.zeros((1, 2)), rng.uniform(-1, 1, (T, 2))]).astype(np.float32)
    arrays["reward"] = np.concatenate([[0], rng.normal(size=T)]).astype(np.float32)
    arrays["discount"] = np.ones(T + 1, np.float32)
    arrays["is_first"], arrays["is_last"] = np.arange(T + 1) == 0, np.arange(T + 1) == T
    return arrays | {"is_terminal": np.zeros(T + 1, bool)}


def test_v_d4rl_npz_and_its_action_of_the_row_before(tmp_path):
    """As conversion_scripts/hdf5_to_npz.py of V-D4RL writes them."""
    for seed in range(3):
        np.savez_compressed(tmp_path / f"2022-{seed}-7.npz", **dreamer(seed=seed))
    scan, found = episodes_of("hdf5", tmp_path)
    for seed, episode in enumerate(found):
        kept = dreamer(seed=seed)
        same(scan, episode, {"image": kept["image"][:-1]}, kept["action"][1:], kept["reward"][1:])
        assert episode.truncated and not episode.terminated
    assert any("--action-row same" in line for line in scan.notes)
    scan, found = episodes_of("hdf5", tmp_path, action_row="same")
    same(scan, found[0], {"image": dreamer()["image"]}, dreamer()["action"], dreamer()["reward"])


def test_v_d4rl_hdf5_of_many_episodes_channels_first(tmp_path):
    """As conversion_scripts/npz_to_hdf5.py of V-D4RL writes it."""
    kept = [dreamer(T=5 + seed, seed=seed) for seed in range(3)]
    step_type = [np.array([0, *[1] * (4 + seed), 2.0]) for seed in range(3)]
    with h5py.File(tmp_path / "data.hdf5", "w") as file:
        put = {key: np.concatenate([one[key] for one in kept]) for key in ("action", "discount", "reward")}
        put["observation"] = np.concatenate([one["image"].transpose(0, 3, 1, 2) for one in kept])
        for key, values in (put | {"step_type": np.concatenate(step_type)}).items():
            file.create_dataset(key, data=values, compression="gzip")
    scan, found = episodes_of("hdf5", tmp_path)
    assert [episode.timesteps for episode in found] == [5, 6, 7]
    for episode, one in zip(found, kept, strict=True):
        same(scan, episode, {"observation": one["image"][:-1]}, one["action"][1:], one["reward"][1:])


def test_ogbench_leaves_out_last_states_and_holds_its_val_file_out(tmp_path):
    rng = np.random.default_rng(0)
    rows, ends = 30, np.arange(30) % 10 == 9
    for name in ("cube-single-play-v0", "cube-single-play-v0-val"):
        arrays = {"observations": rng.normal(size=(rows, 4)).astype(np.float32), "terminals": 1.0 * ends}
        arrays |= {"actions": rng.uniform(-1, 1, (rows, 2)).astype(np.float32), "qpos": rng.normal(size=(rows, 3))}
        np.savez_compressed(tmp_path / f"{name}.npz", **arrays)
    scan, found = episodes_of("hdf5", tmp_path)
    assert scan.task.name == "cube-single-play-v0" and [e.timesteps for e in found] == [9] * 6
    same(scan, found[2], {"observation": arrays["observations"][20:29]}, arrays["actions"][20:29])
    assert [ref.held_out for ref in scan.episodes] == [True] * 3 + [None] * 3
    build_here("hdf5", tmp_path, tmp_path / "shards")
    held = Dataset(tmp_path / "shards")
    assert [name.endswith("-val.npz") for name in held.column("file")] == held.column("held_out").tolist()
    (other,) = scans_of("hdf5", tmp_path / "cube-single-play-v0.npz")
    assert other.task.name == "cube-single-play-v0" and len(other.episodes) == 3


def test_keys_of_ones_own(tmp_path):
    rng = np.random.default_rng(0)
    kept = {"joints": rng.normal(size=(8, 3)), "cmd": rng.integers(0, 4, 8), "r": rng.normal(size=8)}
    with h5py.File(tmp_path / "one.h5", "w") as file:
        for key, values in (kept | {"junk": np.zeros((8, 2)), "over": np.arange(8) == 7}).items():
            file[key] = values
    scan, _ = episodes_of("hdf5", tmp_path)
    (line,) = scan.rejected
    assert line.reason == "missing key" and "there are cmd, joints" in line.detail and "--action-key" in line.detail
    keys = {"action_key": "cmd", "reward_key": "r", "terminal_key": "over", "observation_keys": ("joints",)}
    scan, found = episodes_of("hdf5", tmp_path, **keys)
    same(scan, found[0], {"joints": kept["joints"]}, kept["cmd"], kept["r"])
    assert found[0].terminated and scan.task.action.choices == (4,)
    assert sources.load("hdf5").parts(scan.episodes[0].file) == [tmp_path / "one.h5"]
    assert build_here("hdf5", tmp_path, tmp_path / "out", **keys)["dataset.json"]


DAMAGE = {
    "missing key": lambda file: file.pop("action"),
    "wrong length": lambda file: put(file, "observations/qpos", np.zeros((3, 14))),
    "wrong shape": lambda file: put(file, "observations/qpos", np.zeros((7, 13))),
    "wrong dtype": lambda file: put(file, "observations/images/top", np.zeros((7, 48, 64, 3), np.int32)),
    "not finite": lambda file: put(file, "observations/qvel", np.full((7, 14), np.nan)),
}


def test_flags_named_as_gymnasium_does_and_arrays_that_nothing_reads(tmp_path):
    rng = np.random.default_rng(0)
    with h5py.File(tmp_path / "own.h5", "w") as file:
        file["obs"], file["action"] = rng.normal(size=(12, 3)), rng.uniform(-1, 1, (12, 2))
        file["terminations"], file["truncations"] = np.arange(12) == 4, np.arange(12) == 11
        file["goal"] = rng.normal(size=(12, 2))
    scan, found = episodes_of("hdf5", tmp_path)
    assert [len(one.action) for one in found] == [5, 7]
    assert [(one.terminated, one.truncated) for one in found] == [(True, False), (False, True)]
    assert any("arrays that are not read: goal" in line for line in scan.notes)


@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (0.0, 1000.0)])
def test_pictures_of_floats_that_cannot_be_read_as_such_are_warned_of(tmp_path, low, high):
    rng = np.random.default_rng(0)
    with h5py.File(tmp_path / "own.h5", "w") as file:
        file["obs/camera"] = rng.uniform(low, high, (6, 16, 16, 3))
        file["action"] = rng.uniform(-1, 1, (6, 2))
    (scan,) = scans_of("hdf5", tmp_path)
    (line,) = scan.warnings
    assert (
        "'camera' has the shape of pictures and is read as 768 numbers" in line and "record pictures as uint8" in line
    )
    with h5py.File(tmp_path / "own.h5", "a") as file:
        file["obs/camera"][...] = rng.uniform(0, 1, (6, 16, 16, 3))
    (scan,) = scans_of("hdf5", tmp_path)
    assert not scan.warnings and scan.task.observation[0].kind == "image"


def put(file, key, values):
    del file[key]
    file[key] = values


@pytest.mark.parametrize("reason", [*DAMAGE, "truncated HDF5", "empty"])
def test_one_damaged_file_costs_one_episode(tmp_path, reason):
    kept = aloha(tmp_path)
    path = tmp_path / "episode_1.hdf5"
    if reason in DAMAGE:
        with h5py.File(path, "a") as file:
            DAMAGE[reason](file)
    else:
        path.write_bytes(path.read_bytes()[: 0 if reason == "empty" else 5000])
    scan, found = episodes_of("hdf5", tmp_path)
    lines = [*scan.rejected, *(one for one in found if isinstance(one, Rejection))]
    ((line),) = lines
    assert (line.file, line.reason) == ("episode_1.hdf5", "wrong shape" if reason == "wrong dtype" else reason)
    good = [one for one in found if not isinstance(one, Rejection)]
    for episode, (observation, action) in zip(good, kept[::2], strict=True):
        same(scan, episode, observation, action)


def test_damaged_npz(tmp_path):
    for seed in range(2):
        np.savez(tmp_path / f"{seed}.npz", **dreamer(seed=seed))
    data = (tmp_path / "0.npz").read_bytes()
    (tmp_path / "0.npz").write_bytes(data[: len(data) // 2])
    with zipfile.ZipFile(tmp_path / "2.npz", "w") as archive:
        for key, values in dreamer().items():
            buffer = io.BytesIO()
            np.save(buffer, values)
            archive.writestr(f"{key}.npy", buffer.getvalue()[: -5 if key == "image" else None])
    np.savez(tmp_path / "3.npz", **(dreamer() | {"action": np.array([{}] * 7)}))
    np.savez_compressed(tmp_path / "4.npz", **dreamer())
    packed = bytearray((tmp_path / "4.npz").read_bytes())
    start = 30 + int.from_bytes(packed[26:28], "little") + int.from_bytes(packed[28:30], "little")
    packed[start : start + 20] = b"\xff" * 20  # no deflate
    (tmp_path / "4.npz").write_bytes(packed)
    scan, found = episodes_of("hdf5", tmp_path)
    assert [(line.file, line.reason) for line in scan.rejected] == [
        ("0.npz", "corrupt npz"), ("2.npz", "wrong length"), ("3.npz", "wrong dtype"), ("4.npz", "corrupt npz")
    ]  # fmt: skip
    assert len(found) == 1 and "pickled" in scan.rejected[2].detail


def test_what_there_is_not_is_said(tmp_path):
    source = sources.load("hdf5")
    with pytest.raises(SourceError, match="no .hdf5, .h5 or .npz file"):
        source.resolve(tmp_path, None, tmp_path)
    with pytest.raises(SourceError, match=r"--dataset with a repository of the Hugging Face hub \(OWNER/NAME\)"):
        source.resolve(None, None, tmp_path)
    with pytest.raises(ValueError, match="--action-row other"):
        source.options(action_row="other").check()
    (tmp_path / "a.h5").write_bytes(b"x")
    assert source.recognise(tmp_path) is None
