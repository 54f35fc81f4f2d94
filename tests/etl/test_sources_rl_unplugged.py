"""RL Unplugged's TFRecord files, written by protobuf as deepmind-research/rl_unplugged and TFDS read them."""

import gzip
import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from etl import sources
from etl.sources import Rejection
from etl.sources._gzip import Gunzip
from etl.sources._tfrecord import frame
from tests.etl.logkit import build_here, episodes_of, reversed_scan, same, scans_of
from tests.etl.tfexample import written


def png(picture):
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()


def store(path, examples, damage=lambda data: data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(damage(b"".join(map(frame, examples))), mtime=0))


def game(seed, T, terminal):
    """Frames (T + 4, 84, 84): three before the first, one after the last."""
    rng = np.random.default_rng(seed)
    frames = rng.integers(0, 256, (T + 4, 21, 21), np.uint8).repeat(4, axis=1).repeat(4, axis=2)
    return {"frames": frames, "action": rng.integers(0, 6, T), "reward": rng.normal(size=T).astype(np.float32),
            "discount": np.float32(np.arange(T) != T - 1 if terminal else np.ones(T))}  # fmt: skip


def transitions(one, number):
    codes = [png(picture) for picture in one["frames"]]
    return [
        written(
            o_t=codes[t : t + 4], o_tp1=codes[t + 1 : t + 5], a_t=[int(one["action"][t])], a_tp1=[0],
            r_t=[float(one["reward"][t])], d_t=[float(one["discount"][t])], episode_id=[number],
            episode_return=[float(one["reward"].sum())],
        )
        for t in range(len(one["action"]))
    ]  # fmt: skip


def atari(folder, mixed=False):
    """A file of three episodes' transitions, in turns where `mixed`; what is in them, by episode_id."""
    kept = {7: game(0, 5, True), -3: game(1, 4, False), 12: game(2, 6, True)}
    rows = [transitions(one, number) for number, one in kept.items()]
    if mixed:
        rows = [[own[t] for own in rows if t < len(own)] for t in range(6)]
    store(folder / "Pong" / "run_1-00000-of-00002", [row for own in rows for row in own])
    return [kept[number] for number in sorted(kept)]


@pytest.mark.parametrize("mixed", [False, True])
def test_transitions_become_episodes_by_their_id(tmp_path, mixed):
    kept = atari(tmp_path, mixed)
    scan, found = episodes_of("rl_unplugged", tmp_path)
    assert scan.task.name == "Pong-run_1" and not scan.rejected
    for episode, one in zip(found, kept, strict=True):
        same(scan, episode, {"frame": one["frames"][3:-1, ..., None]}, one["action"], one["reward"])
    assert [episode.terminated for episode in found] == [False, True, True]
    assert "holds transitions of" in sources.load("rl_unplugged").recognise(tmp_path).evidence
    assert "dataset.json" in build_here("rl_unplugged", tmp_path, tmp_path / "out")


def test_transitions_out_of_order_are_no_episode(tmp_path):
    rows = transitions(game(0, 5, True), 1)
    store(tmp_path / "Pong" / "run_1-00000-of-00001", rows[::-1] + transitions(game(1, 4, True), 2))
    scan, found = episodes_of("rl_unplugged", tmp_path)
    (line,) = scan.rejected
    assert (line.position, line.reason) == (0, "out of order") and "sort" in line.detail and len(found) == 1


def test_atari_episodes(tmp_path):
    kept = [game(seed, T, T == 5) for seed, T in enumerate((5, 3))]
    store(tmp_path / "Pong" / "run_2-00000-of-00050", [
        written(observations=[png(p) for p in one["frames"][3:-1]], actions=one["action"].tolist(),
                unclipped_rewards=one["reward"].tolist(), clipped_rewards=np.sign(one["reward"]).tolist(),
                discounts=one["discount"].tolist(), checkpoint_idx=[0], episode_idx=[n], episode_return=[0.0],
                clipped_episode_return=[0.0])
        for n, one in enumerate(kept)
    ])  # fmt: skip
    scan, found = episodes_of("rl_unplugged", tmp_path)
    for episode, one in zip(found, kept, strict=True):
        same(scan, episode, {"frame": one["frames"][3:-1, ..., None]}, one["action"], one["reward"])
    assert [(e.terminated, e.truncated) for e in found] == [(True, False), (False, True)]


def control(seed, T, ended=True, whole=True, camera=False, discount=1.0):
    rng = np.random.default_rng(seed)
    one = {"observation/position": rng.normal(size=(T + 1, 3)), "observation/velocity": rng.normal(size=(T + 1, 2)),
           "action": rng.uniform(-1, 1, (T + 1, 2)), "reward": rng.normal(size=T + 1)}  # fmt: skip
    one["discount"] = np.where(np.arange(T + 1) == T, discount, 1.0)
    one["step_type"] = np.array([0.0, *[1.0] * (T - 1), 2.0 if ended else 1.0])
    pictures = rng.integers(0, 256, (T + 1, 64, 64, 3), np.uint8)
    flat = {key: np.float32(values).ravel().tolist() for key, values in one.items()}
    if camera:
        flat["observation/walker/egocentric_camera"] = [picture.tobytes() for picture in pictures]
        one["observation/walker/egocentric_camera"] = pictures
    if whole:
        flat |= {"episode_id": [seed], "timestamp": [1]}
    return one, written(**flat)


def same_control(scan, episode, one, reward=slice(1, None)):
    seen = {key.removeprefix("observation/"): values[:-1] for key, values in one.items() if "observation/" in key}
    same(scan, episode, seen, one["action"][:-1], one["reward"][reward])


def test_control_episodes_pair_an_action_with_the_reward_of_the_next_row(tmp_path):
    made = [control(0, 6), control(1, 4, discount=0.0), control(2, 5)]
    store(tmp_path / "walker_walk" / "train-00000-of-00100", [data for _, data in made])
    scan, found = episodes_of("rl_unplugged", tmp_path)
    assert scan.task.name == "walker_walk-train" and not scan.warnings
    for episode, (one, _) in zip(found, made, strict=True):
        same_control(scan, episode, one)
    assert [(e.terminated, e.truncated) for e in found] == [(False, True), (True, False), (False, True)]
    assert reversed_scan("rl_unplugged", tmp_path) == [scan]


def test_sequences_are_pieces_and_single_transitions_are_refused(tmp_path):
    made = [control(n, 5, ended=n == 1, whole=False, camera=True, discount=0.0) for n in range(2)]
    store(tmp_path / "humanoid_walls" / "train-00000-of-00100", [data for _, data in made])
    scan, found = episodes_of("rl_unplugged", tmp_path)
    for episode, (one, _) in zip(found, made, strict=True):
        same_control(scan, episode, one, reward=slice(0, -1))
    # an episode's last row is padding, of discount 0 however it ended
    assert [(e.cut, e.terminated, e.truncated) for e in found] == [(True, False, False), (False, False, True)]
    assert "pieces of episodes" in scan.notes[0]
    store(tmp_path / "b" / "train-00000-of-00100", [control(0, 1, whole=False)[1]])
    (scan,) = scans_of("rl_unplugged", tmp_path / "b")
    assert scan.task is None and "dm_control_suite_episodes" in scan.rejected[0].detail


@pytest.mark.parametrize(
    ("reason", "change"),
    [
        ("missing key", {"reward": None}),
        ("wrong length", {"action": [0.0] * 9}),
        ("wrong dtype", {"reward": [b"x"] * 5}),
        ("not finite", {"observation/position": [float("nan")] * 15}),
    ],
)
def test_one_damaged_example(tmp_path, reason, change):
    one, _ = control(1, 4)
    flat = {key: np.float32(values).ravel().tolist() for key, values in one.items()} | {"episode_id": [1]} | change
    bad = written(**{key: values for key, values in flat.items() if values is not None})
    store(tmp_path / "t" / "train-00000-of-00001", [control(0, 6)[1], bad, control(2, 5)[1]])
    scan, found = episodes_of("rl_unplugged", tmp_path)
    (line,) = [*scan.rejected, *(one for one in found if isinstance(one, Rejection))]
    assert (line.position, line.reason) == (1, reason)
    assert len(scan.episodes) - sum(isinstance(one, Rejection) for one in found) == 2


def test_damage_ends_a_file_and_not_the_others(tmp_path):
    made = [control(n, 4)[1] for n in range(3)]
    store(tmp_path / "t" / "train-00000-of-00002", made, lambda data: data[: len(data) * 2 // 3 + 20])
    store(tmp_path / "t" / "train-00001-of-00002", made, lambda data: data[:40] + b"\0" + data[41:])
    scan, found = episodes_of("rl_unplugged", tmp_path)
    assert [(line.file, line.position, line.reason) for line in scan.rejected] == [
        ("train-00000-of-00002", 2, "truncated TFRecord"), ("train-00001-of-00002", -1, "corrupt TFRecord")
    ]  # fmt: skip
    assert len(found) == 2
    kept = atari(tmp_path / "a")
    path = tmp_path / "a" / "Pong" / "run_1-00000-of-00002"
    path.write_bytes(path.read_bytes()[:-3000])
    scan, found = episodes_of("rl_unplugged", tmp_path / "a")
    assert [line.reason for line in scan.rejected] == ["corrupt gzip"] and len(found) in (2, 3)
    assert found[-1].cut and found[1].timesteps == len(kept[1]["action"])


@pytest.mark.parametrize(("kind", "times"), [("episodes", 1.5), ("transitions", 2.5)])
def test_a_thread_unpacks_a_file_once_for_all_its_shards(tmp_path, monkeypatch, kind, times):
    """Transitions twice: once to find those of an episode."""
    path = tmp_path / "Pong" / "run_1-00000-of-00001"
    numbers = range(6)
    if kind == "episodes":
        store(path, [control(n, 40)[1] for n in numbers])
    else:
        store(path, [row for n in numbers for row in transitions(game(n, 4, True), n)])
    scan, whole = episodes_of("rl_unplugged", tmp_path)
    source, size, unpacked, piece = (
        sources.load("rl_unplugged"),
        len(gzip.decompress(path.read_bytes())),
        0,
        Gunzip._piece,
    )

    def counted(file, most):
        nonlocal unpacked
        found = piece(file, most)
        unpacked += len(found)
        return found

    def read(refs):
        return list(source.read(scan.task, refs))

    monkeypatch.setattr(Gunzip, "_piece", counted)
    with ThreadPoolExecutor(1) as thread:  # the scan was this one's
        shards = [thread.submit(read, [ref]).result()[0] for ref in scan.episodes]
        assert size <= unpacked <= times * size
        for ref in [*scan.episodes, *scan.episodes[::-1]]:
            shards += thread.submit(read, [ref]).result()
        for found, expected in zip(shards, [*whole, *whole, *whole[::-1]], strict=True):
            assert np.array_equal(found.action, expected.action) and np.array_equal(found.reward, expected.reward)
            assert all(np.array_equal(found.observation[key], expected.observation[key]) for key in found.observation)
        store(path, [control(9, 40)[1]])  # another file by that name
        if kind == "episodes":
            (found,) = thread.submit(read, scan.episodes[:1]).result()
            assert np.array_equal(found.action, np.float32(control(9, 40)[0]["action"][:-1]))
