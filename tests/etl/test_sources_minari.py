"""Minari datasets: real ones that the `minari` package wrote, read as it reads them; damage; downloads."""

import json
import os
import shutil
from pathlib import Path

import gymnasium
import gymnasium_robotics
import h5py
import minari
import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from minari.data_collector import EpisodeBuffer
from minari.storage import remotes
from minari.storage.remotes.cloud_storage import CloudStorage

from etl import sources
from etl.sources import Rejection, SourceError
from etl.sources.minari import SOURCE, Minari, Options, d4rl_environments, task_name
from schemas.dataset import load_manifest
from schemas.episode import ActionSpec, FieldSpec
from tests.conftest import run

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:minari", "ignore::DeprecationWarning:gymnasium")
OPTIONS = Options()
ACTION = spaces.Box(-1, 1, (2,), np.float32)


@pytest.fixture(autouse=True)
def _datasets_path(monkeypatch, tmp_path):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))


def columns(space, values):
    """A list of observations -> lists in the shape of the space, as Minari buffers them."""
    if isinstance(space, spaces.Dict):
        return {key: columns(sub, [v[key] for v in values]) for key, sub in space.spaces.items()}
    if isinstance(space, spaces.Tuple):
        return tuple(columns(sub, [v[i] for v in values]) for i, sub in enumerate(space.spaces))
    return list(values)


def play(env, seed, steps):
    """An episode of random actions, cut after `steps`."""
    observation, _ = env.reset(seed=seed)
    env.action_space.seed(seed)
    observations, actions, rows = [observation], [], []
    while len(rows) < steps:
        actions.append(env.action_space.sample())
        observation, reward, terminated, truncated, _ = env.step(actions[-1])
        observations.append(observation)
        rows.append((float(reward), terminated, truncated))
        if terminated or truncated:
            break
    rewards, terminations, truncations = map(list, zip(*rows))
    return EpisodeBuffer(
        observations=columns(env.observation_space, observations),
        actions=columns(env.action_space, actions),
        rewards=rewards,
        terminations=terminations,
        truncations=truncations,
        infos={},
    )


def record(environment, dataset, episodes=4, steps=25, **make):
    """A dataset of a real simulator, written by Minari; its main_data.hdf5."""
    gymnasium.register_envs(gymnasium_robotics)
    env = gymnasium.make(environment, **make)
    buffers = [play(env, seed, steps) for seed in range(episodes)]
    env.close()
    return data_of(minari.create_dataset_from_buffers(dataset, buffers, env=env))


def write(observation, action=ACTION, dataset="own/data-v0", episodes=3, steps=6, **about):
    """A dataset of samples of the spaces, written by Minari; its main_data.hdf5."""
    observation.seed(0), action.seed(0)
    rng = np.random.default_rng(0)
    buffers = [
        EpisodeBuffer(
            observations=columns(observation, [observation.sample() for _ in range(steps + number + 1)]),
            actions=columns(action, [action.sample() for _ in range(steps + number)]),
            rewards=list(rng.normal(size=steps + number)),
            terminations=[False] * (steps + number - 1) + [number % 2 == 0],
            truncations=[False] * (steps + number - 1) + [number % 2 == 1],
            infos={"extra": [0] * (steps + number + 1)},
        )
        for number in range(episodes)
    ]
    spaces_ = {"observation_space": observation, "action_space": action}
    return data_of(minari.create_dataset_from_buffers(dataset, buffers, **spaces_, **about))


def data_of(dataset):
    return Path(dataset.storage.data_path) / "main_data.hdf5"


def scan(path, options=OPTIONS, source=SOURCE):
    (result,) = source.scan([path], options)
    return result


def read(path, options=OPTIONS, source=SOURCE):
    result = scan(path, options, source)
    assert result.task is not None, result.rejected
    return list(sources.read(source, result.task, result.episodes))


def rejection(path):
    result = scan(path)
    (found,) = result.rejected
    assert result.task is None and found.position == -1 and "\n" not in found.detail
    return found


def theirs(path):
    return list(minari.MinariDataset(path.parent).iterate_episodes())


def edit(path, **changes):
    """Changes entries of metadata.json."""
    file = path.with_name("metadata.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return path


def replace(path, key, change, episode=1):
    """Puts change(array) in the place of one array of an episode."""
    with h5py.File(path, "a") as file:
        group = file[f"episode_{episode}"]
        values = group[key][()]
        del group[key]
        group.create_dataset(key, data=change(values))


def test_hopper_as_minari_reads_it(tmp_path):
    path = record("Hopper-v5", "D4RL/hopper/medium-v0", reset_noise_scale=0.01)
    result = scan(path)
    task = result.task
    assert (task.name, task.source) == ("D4RL-hopper-medium-v0", "minari")
    assert task.observation == (FieldSpec("observation", "continuous", (11,)),)
    assert task.action == ActionSpec.continuous(-1.0, 1.0, 3)
    assert (task.environment.id, task.environment.suite) == ("Hopper-v5", "mujoco")
    assert task.environment.kwargs == {"reset_noise_scale": 0.01}
    assert (task.score, task.max_episode_steps) == (None, 1000)  # no returns were measured with that noise
    episodes = list(sources.read(SOURCE, task, result.episodes))
    row = 0
    for ref, ours, own in zip(result.episodes, episodes, theirs(path), strict=True):
        assert (ours.position, ours.row, ours.timesteps, ours.file) == (
            own.id,
            row,
            len(own),
            f"{task.name}/{path.name}",
        )
        np.testing.assert_array_equal(ours.observation["observation"], own.observations[:-1].astype(np.float32))
        np.testing.assert_array_equal(ours.action, own.actions)
        np.testing.assert_array_equal(ours.reward, own.rewards.astype(np.float32))
        assert (ours.terminated, ours.truncated) == (own.terminations[-1], own.truncations[-1])
        assert ref.total == pytest.approx(own.rewards.sum(), abs=1e-4)
        row += len(own)
    assert {e.terminated for e in episodes} == {True, False}
    assert {e.cut for e in episodes} == {True, False}


def test_goals_of_a_maze_are_fields_in_lexicographic_order(tmp_path):
    path = record("PointMaze_UMaze-v3", "D4RL/pointmaze/umaze-v2", continuing_task=False)
    task = scan(path).task
    shapes = [("achieved_goal", (2,)), ("desired_goal", (2,)), ("observation", (4,))]
    assert [(f.key, f.shape) for f in task.observation] == shapes
    assert (task.environment.suite, task.environment.kwargs["continuing_task"]) == ("robotics", False)
    for ours, own in zip(read(path), theirs(path), strict=True):
        for key, values in own.observations.items():
            np.testing.assert_array_equal(ours.observation[key], values[:-1].astype(np.float32))


def test_every_kind_of_space(tmp_path):
    observation = spaces.Dict(
        {
            "a": spaces.Dict({"b": spaces.Box(-9, 9, (2, 3), np.float32), "a": spaces.Discrete(5, start=-2)}),
            "a0": spaces.MultiBinary(3),
            "pair": spaces.Tuple((spaces.MultiDiscrete([3, 7], start=[1, 0]), spaces.Box(5, 9, (2,), np.int16))),
            "camera": spaces.Box(0, 255, (50, 40, 3), np.uint8),
            "symbols": spaces.Box(0, 10, (7, 7, 3), np.uint8),
            "words": spaces.Text(12),
        }
    )
    path = write(observation, spaces.MultiDiscrete([4, 9], start=[2, 1]))
    task = scan(path, Options(text_tokens=9)).task
    assert [(f.key, f.kind, f.shape, f.choices, f.resized) for f in task.observation] == [
        ("a/a", "discrete", (), (5,), None),
        ("a/b", "continuous", (2, 3), (), None),
        ("a0", "discrete", (3,), (2,), None),
        ("camera", "image", (50, 40, 3), (), (48, 48)),
        ("pair/0", "discrete", (2,), (3, 7), None),
        ("pair/1", "discrete", (2,), (5,), None),
        ("symbols", "discrete", (7, 7, 3), (11,), None),
        ("words", "text", (9,), (), None),
    ]
    assert task.action == ActionSpec.discrete((4, 9), start=(2, 1))
    assert [f.start for f in task.observation if f.kind == "discrete"] == [(-2,), (0,), (1, 0), (5,), (0,)]
    assert (task.environment, task.score, task.max_episode_steps) == (None, None, 8)
    for ours, own in zip(read(path), theirs(path), strict=True):
        expected = {
            "a/a": own.observations["a"]["a"],
            "a/b": own.observations["a"]["b"],
            "a0": own.observations["a0"],
            "camera": own.observations["camera"],
            "pair/0": own.observations["pair"][0],
            "pair/1": own.observations["pair"][1],
            "symbols": own.observations["symbols"],
            "words": np.array(own.observations["words"]),
        }
        assert ours.observation.keys() == expected.keys()
        for key, values in expected.items():
            np.testing.assert_array_equal(ours.observation[key], values[:-1])
        np.testing.assert_array_equal(ours.action, own.actions)


@pytest.mark.parametrize("shape", [(40, 64), (16, 31, 1), (84, 84, 3)])
@pytest.mark.parametrize("jpeg", [True, False])
def test_pictures_are_read_as_minari_stores_them(tmp_path, shape, jpeg):
    if jpeg and shape[2:] == (1,):
        pytest.skip("Pillow takes no (H, W, 1)")
    path = write(spaces.Box(0, 255, shape, np.uint8), jpeg_encoding=jpeg)
    (field,) = scan(path).task.observation
    assert (field.kind, field.shape) == ("image", shape if len(shape) == 3 else (*shape, 1))
    assert field.resized == {(40, 64): (48, 64), (16, 31, 1): (16, 32), (84, 84, 3): (80, 80)}[shape]
    for ours, own in zip(read(path), theirs(path), strict=True):
        frames = ours.observation["observation"]
        np.testing.assert_array_equal(frames.reshape(-1, *shape), own.observations[:-1])


def test_a_single_discrete_action_is_flat_and_keeps_its_start(tmp_path):
    path = write(spaces.Discrete(3), spaces.Discrete(4, start=3))
    assert scan(path).task.action == ActionSpec.discrete(4, start=3)
    for ours, own in zip(read(path), theirs(path), strict=True):
        np.testing.assert_array_equal(ours.action, own.actions)


DAMAGES = {
    "truncated": ("actions", lambda a: a[:-2], "wrong length"),
    "NaN": ("observations", lambda a: np.where(np.arange(a.size).reshape(a.shape) == 4, np.nan, a), "not finite"),
    "infinite": ("actions", lambda a: np.where(np.arange(a.size).reshape(a.shape) == 4, np.inf, a), "not finite"),
    "wrong dtype": ("observations", lambda a: a.astype("S8"), "wrong dtype"),
    "wrong length": ("truncations", lambda a: np.append(a, a), "wrong length"),
    "wrong shape": ("observations", lambda a: a[:, :2], "wrong shape"),
    "empty": ("rewards", lambda a: a[:0], "empty"),
    "text for rewards": ("rewards", lambda a: a.astype("S8"), "wrong dtype"),
    "reward beyond float32": ("rewards", lambda a: a * 1e300, "not finite"),
}


def check_one_bad(path, reason):
    result = scan(path)
    got = [*result.rejected, *sources.read(SOURCE, result.task, result.episodes)]
    (bad,) = [r for r in got if isinstance(r, Rejection)]
    assert (bad.task, bad.position, bad.reason) == (task_name(path), 1, reason)
    assert bad.file == f"{bad.task}/main_data.hdf5" and "\n" not in bad.detail
    good = {e.position: e for e in got if not isinstance(e, Rejection)}
    own = {e.id: e for e in theirs_without(path, 1)}
    assert good.keys() == own.keys() and len(good) >= 2
    for position, episode in good.items():
        assert episode.timesteps == len(own[position])


def theirs_without(path, number):
    dataset = minari.MinariDataset(path.parent)
    return list(dataset.iterate_episodes([i for i in dataset.episode_indices if i != number]))


@pytest.mark.parametrize("damage", DAMAGES)
def test_one_damaged_episode_costs_that_episode_only(tmp_path, damage):
    key, change, reason = DAMAGES[damage]
    path = write(spaces.Box(-np.inf, np.inf, (3,), np.float64))
    replace(path, key, change)
    check_one_bad(path, reason)


def test_an_action_out_of_range_costs_its_episode(tmp_path):
    path = write(spaces.Box(-1, 1, (3,), np.float32), spaces.Discrete(4))
    replace(path, "actions", lambda a: a + 4)
    check_one_bad(path, "out of range")


def test_each_element_of_an_action_has_its_own_range(tmp_path):
    path = write(spaces.Box(-1, 1, (3,), np.float32), spaces.MultiDiscrete([9, 2]))
    replace(path, "actions", lambda a: np.full_like(a, 5))
    check_one_bad(path, "out of range")


@pytest.mark.parametrize("key", ["", "/rewards", "/observations", "/actions"])
def test_a_missing_group_or_array_costs_its_episode(tmp_path, key):
    path = write(spaces.Box(-1, 1, (3,), np.float32))
    with h5py.File(path, "a") as file:
        del file[f"episode_1{key}"]
    check_one_bad(path, "missing key" if key else "missing group")


def test_links_out_of_the_file_are_not_followed(tmp_path):
    path = write(spaces.Box(-1, 1, (3,), np.float32))
    other = tmp_path / "other.hdf5"
    shutil.copy(path, other)
    with h5py.File(path, "a") as file:
        del file["episode_1"]
        file["episode_1"] = h5py.ExternalLink(str(other), "/episode_1")
    check_one_bad(path, "missing group")


def test_rows_that_were_never_written_are_not_read_as_zeros(tmp_path):
    path = write(spaces.Box(-1, 1, (3,), np.float32))
    with h5py.File(path, "a") as file:
        group = file["episode_1"]
        del group["observations"]
        group.create_dataset("observations", (8, 3), np.float32, chunks=(2, 3))
    check_one_bad(path, "wrong length")


def test_a_claimed_size_is_not_allocated(tmp_path):
    path = write(spaces.Box(-1, 1, (3,), np.float32))
    with h5py.File(path, "a") as file:
        del file["episode_1/rewards"]
        file["episode_1"].create_dataset("rewards", (2**40,), np.float64, chunks=(1024,), compression="gzip")
    check_one_bad(path, "wrong length")


@pytest.mark.parametrize(
    "content, reason", [(b"", "corrupt JPEG"), (b"\xff\xd8 no picture", "corrupt JPEG"), (None, "wrong shape")]
)
def test_a_damaged_picture_costs_its_episode(tmp_path, content, reason):
    other = write(spaces.Box(0, 255, (33, 32, 3), np.uint8), dataset="other-v0")
    path = write(spaces.Box(0, 255, (32, 32, 3), np.uint8))
    with h5py.File(path, "a") as file, h5py.File(other) as source:
        codes = list(file["episode_1/observations"][()])
        codes[2] = source["episode_1/observations"][0] if content is None else np.frombuffer(content, np.uint8)
        del file["episode_1/observations"]
        stored = file["episode_1"].create_dataset("observations", (len(codes),), h5py.vlen_dtype(np.uint8))
        for row, code in enumerate(codes):
            stored[row] = code
    check_one_bad(path, reason)


def test_text_that_is_not_utf8_costs_its_episode(tmp_path):
    path = write(spaces.Dict({"words": spaces.Text(9)}))
    with h5py.File(path, "a") as file:
        file["episode_1/observations/words"][3] = b"\xff\xfe"
    check_one_bad(path, "corrupt HDF5")


@pytest.mark.parametrize(
    "observation, action, reason, word",
    [
        (spaces.Discrete(3), spaces.Dict({"a": spaces.Discrete(2)}), "unsupported space", "Dict"),
        (spaces.Discrete(3), spaces.Discrete(1025), "too many choices", "1025"),
        (spaces.Discrete(1025), ACTION, "too many choices", "1025"),
        (spaces.Box(-(2**63), 2**63 - 1, (1,), np.int64), ACTION, "too many choices", "ids"),
        (spaces.Box(0, 1, (65_537,), np.float32), ACTION, "unsupported space", "65537"),
        (spaces.Box(0, 255, (4, 48, 48, 3), np.uint8), ACTION, "unsupported space", "newest"),
    ],
)
def test_spaces_without_tokens_are_rejected_with_the_remedy(tmp_path, observation, action, reason, word):
    found = rejection(write(observation, action, episodes=1, steps=1, jpeg_encoding=False))
    assert found.reason == reason and word in found.detail


@pytest.mark.parametrize("key", ["observation_space", "action_space"])
def test_a_huge_space_is_not_allocated(tmp_path, key):
    path = edit(write(spaces.Discrete(3)), **{key: '{"type": "MultiBinary", "n": 1000000000000}'})
    assert rejection(path).reason == "unsupported space"


@pytest.mark.parametrize(
    "text", ["[]", "{", '{"type": "Fancy"}', '{"type": "Box"}', '{"type": "Discrete", "n": 0}', "5"]
)
def test_damaged_spaces_reject_the_dataset(tmp_path, text):
    assert rejection(edit(write(spaces.Discrete(3)), observation_space=text)).reason == "corrupt metadata"


def test_unusable_files_are_rejected_and_others_go_on(tmp_path):
    good = write(spaces.Discrete(3), dataset="good-v0")
    whole = good.read_bytes()
    contents = {"empty": b"", "not HDF5": b"no HDF5", "truncated HDF5": whole[: len(whole) // 2]}
    for reason, content in contents.items():
        folder = tmp_path / reason.lower().replace(" ", "-")
        shutil.copytree(good.parents[1], folder)
        edit(folder / "data" / "main_data.hdf5", dataset_id=folder.name).write_bytes(content)
    no_metadata, no_data, broken = (tmp_path / n for n in ("no-metadata", "no-data", "broken"))
    for folder in (no_metadata, no_data, broken):
        shutil.copytree(good.parents[1], folder)
    (no_metadata / "data" / "metadata.json").unlink()
    (no_data / "data" / "main_data.hdf5").unlink()
    edit(no_data / "data" / "main_data.hdf5", dataset_id="no-data")
    (broken / "data" / "metadata.json").write_text("{" * 100_000)
    scans = SOURCE.scan(SOURCE.resolve(tmp_path, None, tmp_path), OPTIONS)
    assert [len(s.episodes) for s in scans if s.task] == [3]
    assert {s.rejected[0].task: s.rejected[0].reason for s in scans if s.rejected} == {
        "empty": "empty",
        "not-hdf5": "not HDF5",
        "truncated-hdf5": "truncated HDF5",
        "no-metadata": "missing file",
        "no-data": "missing file",
        "broken": "corrupt metadata",
    }


def test_a_file_that_disappears_or_shrinks_costs_its_episodes(tmp_path):
    path = write(spaces.Discrete(3))
    result = scan(path)
    replace(path, "rewards", lambda a: a[:-1], episode=2)
    last = list(sources.read(SOURCE, result.task, result.episodes))[2]
    assert isinstance(last, Rejection) and last.reason == "wrong length"
    path.unlink()
    lost = list(sources.read(SOURCE, result.task, result.episodes))
    assert [(r.position, r.reason) for r in lost] == [(n, "missing file") for n in range(3)]


def test_missing_groups_are_counted_in_one_line_when_they_are_many(tmp_path):
    path = edit(write(spaces.Discrete(3)), total_episodes=10**12)
    result = scan(path)
    (line,) = result.rejected
    assert len(result.episodes) == 3 and (line.position, line.reason) == (-1, "missing group")
    edit(path, total_episodes=5)
    assert [(r.position, r.reason) for r in scan(path).rejected] == [(3, "missing group"), (4, "missing group")]


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory):
    observation = spaces.Dict(
        {"a": spaces.Box(-1, 1, (3,), np.float32), "b": spaces.Text(5), "c": spaces.Box(0, 255, (32, 32, 3), np.uint8)}
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(tmp_path_factory.mktemp("fuzzed")))
        path = write(observation, spaces.Discrete(4))
    return path, path.read_bytes()


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_to_the_bytes_is_a_clear_rejection(fuzzed, data):
    path, whole = fuzzed
    content = bytearray(whole)
    place = st.one_of(st.integers(0, len(whole) - 1), st.integers(0, 4095))
    for _ in range(data.draw(st.integers(1, 5))):
        content[data.draw(place)] = data.draw(st.integers(0, 255))
    cut = data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))
    path.write_bytes(content[:cut])
    result = scan(path)
    got = list(sources.read(SOURCE, result.task, result.episodes)) if result.task else []
    assert len(got) == len(result.episodes)
    for line in [r for r in (*result.rejected, *got) if isinstance(r, Rejection)]:
        assert line.reason and line.detail and "\n" not in line.detail


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_to_the_metadata_is_a_clear_rejection(fuzzed, data):
    path, whole = fuzzed
    path.write_bytes(whole)
    file = path.with_name("metadata.json")
    before = file.read_bytes()
    content = bytearray(before)
    for _ in range(data.draw(st.integers(1, 5))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(32, 126))
    try:
        file.write_bytes(content)
        result = scan(path)
        got = list(sources.read(SOURCE, result.task, result.episodes)) if result.task else []
        assert len(got) == len(result.episodes)
    finally:
        file.write_bytes(before)


def test_resolve(tmp_path):
    a = write(spaces.Discrete(3), dataset="D4RL/hopper/medium-v0")
    b = write(spaces.Discrete(3), dataset="other/set-v3")
    assert SOURCE.resolve(tmp_path, None, tmp_path) == [a, b]
    for place in (tmp_path / "D4RL", a.parents[1], a.parent, a):
        assert SOURCE.resolve(place, None, tmp_path) == [a]
    assert SOURCE.resolve(tmp_path, "other/set-v3", tmp_path) == [b]
    assert SOURCE.resolve(tmp_path, "other-set-v3", tmp_path) == [b]
    with pytest.raises(SourceError, match="did you mean D4RL/hopper/medium-v0"):
        SOURCE.resolve(tmp_path, "D4RL/hoper/medium-v0", tmp_path)
    (tmp_path / "none").mkdir()
    with pytest.raises(SourceError, match="no Minari dataset"):
        SOURCE.resolve(tmp_path / "none", None, tmp_path)
    assert SOURCE.parts(str(a)) == [a, a.with_name("metadata.json")]


def test_hidden_folders_and_links_to_folders_are_left_out(tmp_path):
    path = write(spaces.Discrete(3))
    shutil.copytree(path.parents[1], tmp_path / ".partial" / "copy-v0")
    (tmp_path / "round").symlink_to(tmp_path, target_is_directory=True)
    assert SOURCE.resolve(tmp_path, None, tmp_path) == [path]


def test_two_datasets_of_one_name_are_an_error(tmp_path):
    path = write(spaces.Discrete(3))
    shutil.copytree(path.parents[1], tmp_path / "copy")
    with pytest.raises(SourceError, match="both dataset 'own-data-v0'"):
        SOURCE.scan(SOURCE.resolve(tmp_path, None, tmp_path), OPTIONS)


def test_an_id_that_leaves_the_folder_is_not_a_name(tmp_path):
    assert scan(edit(write(spaces.Discrete(3)), dataset_id="../../etc/passwd")).task.name == "data-v0"
    with pytest.raises(SourceError, match="no Minari id"):
        SOURCE.resolve(None, "../../etc", tmp_path)


def test_the_environment_of_evaluation_and_its_references(tmp_path):
    env = gymnasium.make("CartPole-v1", max_episode_steps=40)
    buffers = [play(env, seed, 9) for seed in range(2)]
    path = data_of(
        minari.create_dataset_from_buffers(
            "eval-v0", buffers, env=env, eval_env=gymnasium.make("CartPole-v0"), ref_min_score=3.0, ref_max_score=9.0
        )
    )
    task = scan(path).task
    assert (task.environment.id, task.max_episode_steps) == ("CartPole-v0", 200)
    assert (task.score.kind, task.score.low, task.score.high) == ("d4rl", 3.0, 9.0)


def test_an_environment_in_a_wrapper_that_changes_what_is_seen_does_not_count(tmp_path):
    plain = gymnasium.wrappers.RecordEpisodeStatistics(gymnasium.make("CartPole-v1", max_episode_steps=40))
    path = data_of(minari.create_dataset_from_buffers("plain-v0", [play(plain, 0, 9)], env=plain))
    assert (scan(path).task.environment.id, scan(path).task.max_episode_steps) == ("CartPole-v1", 40)
    timed = gymnasium.wrappers.TimeAwareObservation(gymnasium.make("CartPole-v1", max_episode_steps=40))
    path = data_of(minari.create_dataset_from_buffers("timed-v0", [play(timed, 0, 9)], env=timed))
    assert (scan(path).task.environment, scan(path).task.max_episode_steps) == (None, 40)
    assert scan(path, Options("Acrobot-v1")).task.environment.id == "Acrobot-v1"


def test_what_the_dataset_does_not_say_the_command_line_may(tmp_path):
    path = write(spaces.Discrete(3))
    task = scan(path, Options("Hopper-v4", 77)).task
    assert (task.environment.id, task.score.high) == ("Hopper-v4", 3234.3)
    assert task.max_episode_steps == 77
    assert scan(path, Options("Hopper-v4")).task.max_episode_steps == 1000
    assert scan(path, Options(max_episode_steps=77)).task.max_episode_steps == 77
    assert scan(path).task.max_episode_steps == 8


class Halved(Minari):
    """Leaves 'skip' out, and turns symbols of 2 x 2 into a picture."""

    name = "halved"

    def field(self, key, space):
        if key == "skip":
            return None
        return FieldSpec(key, "image", (16, 16, 3)) if key == "symbols" else super().field(key, space)

    def values(self, spec, space, stored):
        if spec.key != "symbols":
            return super().values(spec, space, stored)
        return np.kron(stored, np.ones((1, 8, 8, 1), np.uint8)) * np.uint8(9)


def test_a_subclass_may_convert_fields_of_its_own(tmp_path):
    symbols = spaces.Box(0, 9, (2, 2, 3), np.uint8)
    path = write(spaces.Dict({"symbols": symbols, "skip": spaces.Discrete(2), "mission": spaces.Text(9)}))
    source = Halved()
    task = scan(path, source=source).task
    assert (task.source, [(f.key, f.kind) for f in task.observation]) == (
        "halved",
        [("mission", "text"), ("symbols", "image")],
    )
    for ours, own in zip(read(path, source=source), theirs(path), strict=True):
        np.testing.assert_array_equal(ours.observation["symbols"][:, ::8, ::8], own.observations["symbols"][:-1] * 9)


class FolderStorage(CloudStorage):
    """A remote of Minari that is a folder of this machine."""

    def __init__(self, name, token=None):
        self.root = Path(name)

    def list_datasets(self, prefix=None):
        found = (p.parents[1].relative_to(self.root).as_posix() for p in self.root.rglob("metadata.json"))
        return [name for name in found if name.startswith(prefix or "")]

    def get_dataset_metadata(self, dataset_id):
        return json.loads((self.root / dataset_id / "data" / "metadata.json").read_text())

    def download_dataset(self, dataset_id, path):
        shutil.copytree(self.root / dataset_id, path / dataset_id, dirs_exist_ok=True)

    def list_namespaces(self):
        return [p.parent.relative_to(self.root).as_posix() for p in self.root.rglob("namespace_metadata.json")]

    def download_namespace_metadata(self, namespace, path):
        (path / namespace).mkdir(parents=True, exist_ok=True)
        shutil.copy(self.root / namespace / "namespace_metadata.json", path / namespace)

    def upload_dataset(self, dataset_id):
        raise NotImplementedError

    def upload_namespace(self, namespace):
        raise NotImplementedError


def test_a_remote_dataset_is_downloaded_once(tmp_path, monkeypatch, capsys):
    path = write(spaces.Discrete(3), dataset="D4RL/own/data-v1")
    monkeypatch.setitem(remotes._registry, "folder", lambda: FolderStorage)
    monkeypatch.setenv("MINARI_REMOTE", f"folder://{tmp_path}")
    cache = tmp_path / "cache"
    (found,) = SOURCE.resolve(None, "D4RL/own/data-v1", cache)
    assert found == cache / "minari" / "D4RL/own/data-v1" / "data" / "main_data.hdf5"
    assert found.read_bytes() == path.read_bytes() and not list(cache.rglob(".partial/*"))
    assert os.environ["MINARI_DATASETS_PATH"] == str(tmp_path) and capsys.readouterr().out == ""
    known = {one.id: one for one in SOURCE.known(cache)}
    assert known["D4RL/own/data-v1"].cached == found and known["D4RL/door/human-v2"].cached is None
    shutil.rmtree(path.parents[1])
    assert SOURCE.resolve(None, "D4RL/own/data-v1", cache) == [found]
    with pytest.raises(SourceError, match="data-v2.*minari download"):
        SOURCE.resolve(None, "D4RL/own/data-v2", cache)
    monkeypatch.delenv("MINARI_DATASETS_PATH")
    with pytest.raises(SourceError):
        SOURCE.resolve(None, "D4RL/own/data-v2", cache)
    assert "MINARI_DATASETS_PATH" not in os.environ


def test_an_interrupted_download_is_no_dataset(tmp_path, monkeypatch):
    write(spaces.Discrete(3), dataset="own-v0")
    monkeypatch.setitem(remotes._registry, "folder", lambda: FolderStorage)
    monkeypatch.setenv("MINARI_REMOTE", f"folder://{tmp_path}")
    left = tmp_path / "cache" / "minari" / ".partial" / "own-v0" / "own-v0" / "data"
    left.mkdir(parents=True)
    (left / "main_data.hdf5").write_bytes(b"half")
    assert len(read(SOURCE.resolve(None, "own-v0", tmp_path / "cache")[0])) == 3


@pytest.mark.process
def test_an_unreachable_remote_is_one_line_with_the_remedy(tmp_path):
    arguments = (
        "--source",
        "minari",
        "--dataset",
        "D4RL/pointmaze/umaze-v9",
        "--cache",
        tmp_path,
        "--output",
        tmp_path,
    )
    nowhere = {"MINARI_REMOTE": "hf://farama-minari", "HF_ENDPOINT": "http://127.0.0.1:9"}
    done = run("etl.build", *arguments, check=False, env=os.environ | nowhere)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "did you mean D4RL/pointmaze/umaze-v2" in line and "minari download" in line and "--input" in line


def test_known_datasets_of_d4rl(tmp_path):
    known = SOURCE.known(tmp_path / "nothing")
    assert len(known) == len(d4rl_environments()) == 31
    assert SOURCE.default_dataset in d4rl_environments()
    where = {one.id: one.where for one in known}["D4RL/pointmaze/umaze-v2"]
    assert where == "https://huggingface.co/datasets/farama-minari/D4RL/tree/main/pointmaze/umaze-v2"
    gymnasium.register_envs(gymnasium_robotics)
    unknown = {e for e in d4rl_environments().values() if e not in gymnasium.registry}
    assert all(e.startswith("MiniGrid-") for e in unknown)


def test_registered():
    assert "minari" in sources.names() and sources.load("minari") is SOURCE


def test_end_to_end(tmp_path, monkeypatch):
    logs = tmp_path / "logs"
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(logs))
    maze = record("PointMaze_UMaze-v3", "D4RL/pointmaze/umaze-v2", 6)
    record("CartPole-v1", "cartpole/random-v0", 6)
    replace(maze, "actions", lambda a: a[:-2])
    output = tmp_path / "shards"
    run("etl.build", "--source", "minari", "--input", logs, "--output", output, "--max-rejected-share", "0.2")
    manifest = load_manifest(output)
    tasks = {task.spec.name: task for task in manifest.tasks}
    assert {name: task.episodes for name, task in tasks.items()} == {
        "D4RL-pointmaze-umaze-v2": 5,
        "cartpole-random-v0": 6,
    }
    (line,) = map(json.loads, (output / "rejected.jsonl").read_text().splitlines())
    assert (line["position"], line["reason"]) == (1, "wrong length")
    own = [e.rewards.sum() for e in theirs(logs / "cartpole" / "random-v0" / "data" / "main_data.hdf5")]
    assert tasks["cartpole-random-v0"].timesteps == sum(own)
    run("shards.verify", "--full", output)
