"""DQN-Replay logs: padding, stale rows, checkpoints, damage."""

import gzip
import os
from pathlib import Path

import numpy as np
import pytest

from etl import sources
from etl.sources import Rejection, SourceError
from etl.sources.atari import SOURCE, Options
from etl.tokenizers import image
from etl.tokenizers.timestep import TimestepTokenizer
from schemas.episode import ActionSpec
from schemas.vocabulary import by_name

OPTIONS = Options()


def store(folder, name, array, number=0):
    with gzip.open(folder / f"{name}_ckpt.{number}.gz", "wb") as file:
        np.save(file, array, allow_pickle=False)


def write(folder, lengths=(6, 4, 3), last_ends=False, number=0, padding=3, stale=1, add_count=True, seed=0, **changes):
    """A checkpoint as Dopamine writes it: padding in front of each episode, stale rows behind the last one.

    Returns the episodes' own rows: [(frames, actions, rewards)].
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    columns = {key: [] for key in ("observation", "action", "reward", "terminal")}
    episodes = []
    for index, length in enumerate(lengths):
        frames = rng.integers(1, 255, (length, 84, 84), dtype=np.uint8)
        action = rng.integers(0, 6, length, dtype=np.int32)
        reward = rng.integers(-1, 2, length).astype(np.float32)
        terminal = np.zeros(length, np.uint8)
        terminal[-1] = last_ends or index < len(lengths) - 1
        episodes.append((frames, action, reward))
        for key, values in zip(columns, (frames, action, reward, terminal)):
            columns[key] += [np.zeros((padding, *values.shape[1:]), values.dtype), values]
    written = sum(lengths) + padding * len(lengths)
    for values in columns.values():
        values.append(np.full((stale, *values[0].shape[1:]), 1, values[0].dtype))
    arrays = {key: np.concatenate(values) for key, values in columns.items()} | changes
    for key, array in arrays.items():
        if array is not None:
            store(folder, f"$store$_{key}", array, number)
    if add_count:
        capacity = written + stale
        store(folder, "add_count", np.array(number * capacity + written), number)
        store(folder, "invalid_range", (written - 1 + np.arange(5)) % capacity, number)
    return episodes


@pytest.fixture
def run(tmp_path):
    return tmp_path / "Pong" / "1" / "replay_logs"


def scan(folder, options=OPTIONS):
    return SOURCE.scan(SOURCE.resolve(folder, None, folder), options)


def read(folder, options=OPTIONS):
    (result,) = scan(folder, options)
    return list(sources.read(SOURCE, result.task, result.episodes))


def action_name(number=0):
    return f"Pong/1/replay_logs/$store$_action_ckpt.{number}.gz"


def test_task(run):
    write(run)
    (result,) = scan(run)
    task = result.task
    assert (task.name, task.environment.suite, task.environment.id) == ("pong-run1", "atari", "ALE/Pong-v5")
    assert (task.observation[0].key, task.observation[0].shape, task.observation[0].resized) == (
        "frame",
        (84, 84, 1),
        (64, 80),
    )
    assert task.action == ActionSpec.discrete(6)
    assert (task.score.kind, task.score.low, task.score.high) == ("human", -20.7, 14.6)
    assert task.max_episode_steps == 27_000


@pytest.mark.parametrize("padding", [0, 3])
def test_episodes_without_their_padding(run, padding):
    expected = write(run, padding=padding)
    (result,) = scan(run)
    assert [ref.timesteps for ref in result.episodes] == [6 + padding, 4 + padding, 3 + padding]
    assert result.rejected == ()
    for position, (episode, (frames, action, reward)) in enumerate(zip(read(run), expected, strict=True)):
        np.testing.assert_array_equal(episode.observation["frame"], frames[..., None])
        np.testing.assert_array_equal(episode.action, action)
        np.testing.assert_array_equal(episode.reward, reward)
        assert (episode.file, episode.position) == (action_name(), position)
        assert episode.row == result.episodes[position].start + padding
        assert (episode.terminated, episode.cut) == (position < 2, position == 2)


def test_black_frames_inside_an_episode_stay(run):
    frames = np.zeros((10, 84, 84), np.uint8)
    actions = np.arange(10, dtype=np.int32) % 6
    zero = np.zeros(10, np.float32)
    write(run, (10,), padding=0, stale=0, observation=frames, action=actions, reward=zero)
    (episode,) = read(run)
    assert episode.timesteps == 9 and episode.action[0] == 1  # only the row that is zero in every array
    write(run, (10,), padding=0, stale=0, observation=frames, action=actions * 0, reward=zero)
    assert read(run)[0].timesteps == 7  # never more than the padding


def test_rows_behind_the_write_position_are_left_out(run):
    write(run, stale=1)
    assert scan(run)[0].episodes[-1].stop == 13 + 9
    write(run, stale=5)
    (result,) = scan(run)
    assert result.episodes[-1].stop == 13 + 9
    assert [(r.reason, r.position, r.row) for r in result.rejected] == [("stale rows", -1, 22)]


def test_a_buffer_filled_exactly_and_one_without_a_count_are_whole(run):
    write(run, stale=0)
    assert scan(run)[0].episodes[-1].stop == 22
    write(run, stale=0, number=3)
    assert len(scan(run)[0].episodes) == 6
    for path in run.glob("add_count*"):
        path.unlink()
    assert len(scan(run)[0].episodes) == 6


def test_the_invalid_range_gives_the_write_position_where_the_count_is_missing(run):
    write(run, stale=4)
    (run / "add_count_ckpt.0.gz").unlink()
    assert [e.timesteps for e in read(run)] == [6, 4, 3]
    (result,) = scan(run)
    assert [(r.reason, r.row) for r in result.rejected] == [("stale rows", 22)]


@pytest.mark.parametrize("frames, size", [("80x64", (64, 80)), ("padded", (96, 96))])
def test_frames_are_brought_to_whole_patches(run, frames, size):
    (first, _, _), *_ = write(run)
    (result,) = scan(run, Options(frames=frames))
    (field,) = result.task.observation
    assert (field.shape, field.resized) == ((84, 84, 1), size)
    patches = TimestepTokenizer(result.task, by_name("seed")).encode_observation({"frame": first[..., None]}).patches
    back = image.from_patches(patches, size[0] // 16, size[1] // 16)[..., 0]
    expected = image.resize(first[..., None], size)[..., 0] if frames == "80x64" else np.zeros((6, 96, 96), np.uint8)
    if frames == "padded":
        expected[:, :84, :84] = first
    np.testing.assert_array_equal(back, expected)


def test_rgb_logs(run):
    frames = np.random.default_rng(0).integers(1, 255, (23, 210, 160, 3), dtype=np.uint8)
    write(run, observation=frames)
    (result,) = scan(run)
    assert (result.task.observation[0].shape, result.task.observation[0].resized) == ((210, 160, 3), (64, 80))
    episodes = read(run)
    assert [e.observation["frame"].shape for e in episodes] == [(n, 210, 160, 3) for n in (9, 7, 6)]  # none is padding
    np.testing.assert_array_equal(episodes[1].observation["frame"], frames[9:16])


def test_the_time_limit_truncates(run):
    write(run, (6, 4), last_ends=True)
    first, second = read(run, Options(max_episode_steps=6))
    assert (first.terminated, first.truncated) == (False, True)
    assert (second.terminated, second.truncated) == (True, False)


def test_checkpoints_are_separate_logs(run):
    for number in (0, 2, 10):
        write(run, number=number, seed=number)
    episodes = read(run)
    assert [e.file for e in episodes] == [action_name(n) for n in (0, 2, 10) for _ in range(3)]
    assert [e.position for e in episodes] == [0, 1, 2] * 3
    assert [e.cut for e in episodes] == [False, False, True] * 3


def test_an_episode_that_began_in_the_checkpoint_before_is_cut(run):
    write(run)
    write(run, lengths=(5, 4), padding=0, number=1)
    episodes = read(run)[3:]
    assert [(e.timesteps, e.cut) for e in episodes][0] == (5, True)


def test_read_skips_to_what_is_asked_for(run):
    expected = write(run)
    (result,) = scan(run)
    (episode,) = sources.read(SOURCE, result.task, result.episodes[2:])
    np.testing.assert_array_equal(episode.action, expected[2][1])


def test_games_and_runs_are_tasks(tmp_path):
    for name in ("Breakout/1", "Pong/2", "Pong/1"):
        write(tmp_path / name / "replay_logs")
    assert [s.task.name for s in scan(tmp_path)] == ["breakout-run1", "pong-run1", "pong-run2"]
    assert [s.task.name for s in scan(tmp_path / "Pong")] == ["pong-run1", "pong-run2"]
    assert [s.task.name for s in scan(tmp_path / "Pong" / "2")] == ["pong-run2"]
    picked = SOURCE.resolve(tmp_path, "Pong/2", tmp_path)
    assert [str(p.relative_to(tmp_path)) for p in picked] == [action_name().replace("Pong/1", "Pong/2")]
    one = tmp_path / "Pong" / "1" / "replay_logs" / "$store$_reward_ckpt.0.gz"
    assert [p.name for p in SOURCE.resolve(one, None, tmp_path)] == ["$store$_action_ckpt.0.gz"]
    files = SOURCE.resolve(tmp_path, None, tmp_path)
    assert SOURCE.scan(files, OPTIONS) == SOURCE.scan(files[::-1], OPTIONS)


def test_resolve_errors(tmp_path, run):
    with pytest.raises(SourceError, match="GAME/RUN/replay_logs"):
        SOURCE.resolve(tmp_path, None, tmp_path)
    write(run)
    with pytest.raises(SourceError, match="but Pong/1"):
        SOURCE.resolve(tmp_path, "Pong/2", tmp_path)
    with pytest.raises(SourceError, match="did you mean .*Breakout"):
        SOURCE.resolve(None, "Brakout/1", tmp_path)
    for dataset in ("Pong", "Pong/0", "Pong/6", "Pong/1/50", "Pong/1/2/3"):
        with pytest.raises(SourceError, match="GAME/RUN"):
            SOURCE.resolve(None, dataset, tmp_path)
    write(tmp_path / "copy" / "Pong" / "1" / "replay_logs")
    with pytest.raises(SourceError, match="both Pong/1"):
        scan(tmp_path)


def test_an_unknown_game_is_rejected(tmp_path):
    write(tmp_path / "Pongg" / "1" / "replay_logs")
    write(tmp_path / "Pong" / "1" / "replay_logs")
    good, bad = scan(tmp_path)
    assert good.task.name == "pong-run1"
    assert bad.task is None and bad.rejected[0].reason == "unknown game" and "Pong" in bad.rejected[0].detail


def test_an_action_that_the_game_does_not_have_costs_its_episode(run):
    actions = np.zeros(23, np.int32)
    actions[12] = 6
    write(run, action=actions)
    first, second, last = read(run)
    assert first.timesteps == 6 and last.timesteps == 3
    assert isinstance(second, Rejection) and second.reason == "out of range" and second.file == action_name()


@pytest.mark.parametrize(
    "reason, word, changes",
    [
        ("missing file", "reward", {"reward": None}),
        ("missing file", "action", {"action": None}),
        ("wrong length", "terminal", {"terminal": np.zeros(22, np.uint8)}),
        ("wrong shape", "observation", {"observation": np.zeros((23, 8, 8), np.uint8)}),
        ("wrong shape", "reward", {"reward": np.zeros((23, 2), np.float32)}),
        ("wrong dtype", "observation", {"observation": np.zeros((23, 84, 84), np.float32)}),
        ("wrong dtype", "action", {"action": np.zeros(23, np.float32)}),
    ],
)
def test_unusable_checkpoints_are_rejected_and_others_go_on(run, reason, word, changes):
    write(run, **changes)
    write(run, number=1)
    (result,) = scan(run)
    (rejection,) = result.rejected
    assert (rejection.file, rejection.position, rejection.reason) == (action_name(), -1, reason)
    assert word in rejection.detail and "\n" not in rejection.detail
    assert [Path(ref.file).name for ref in result.episodes] == ["$store$_action_ckpt.1.gz"] * 3


def damage(path, how):
    content = bytearray(path.read_bytes())
    if how == "cut":
        content = content[: len(content) * 2 // 3]
    elif how == "checksum":
        content[-8] ^= 1
    elif how == "text":
        content = bytearray(b"<html>not found</html>")
    elif how == "empty":
        content = bytearray()
    elif how == "not npy":
        content = bytearray(gzip.compress(b"plain text"))
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["cut", "checksum", "text", "empty", "not npy"])
@pytest.mark.parametrize("array", ["$store$_terminal", "$store$_action", "$store$_reward", "add_count"])
def test_damage_that_the_scan_sees(run, array, how):
    write(run)
    write(run, number=1)
    damage(run / f"{array}_ckpt.0.gz", how)
    (result,) = scan(run)
    (rejection,) = result.rejected
    assert rejection.position == -1 and rejection.file == action_name()
    assert rejection.reason == ("not npy" if how == "not npy" else "corrupt gzip")
    assert array in rejection.detail
    assert len(result.episodes) == 3


def test_observations_cut_off_cost_the_episodes_behind_the_cut(run):
    write(run, (20, 20, 20), stale=0)
    damage(run / "$store$_observation_ckpt.0.gz", "cut")
    first, _, last = read(run)
    assert first.timesteps == 20
    assert isinstance(last, Rejection) and (last.reason, last.position) == ("corrupt gzip", 2)
    assert last.file == action_name() and "$store$_observation_ckpt.0.gz" in last.detail


def test_observations_with_a_wrong_checksum_show_at_the_end(run):
    write(run, stale=0)
    damage(run / "$store$_observation_ckpt.0.gz", "checksum")
    assert [isinstance(r, Rejection) for r in read(run)] == [False, False, True]


def test_a_pickle_is_never_loaded(run):
    write(run)
    with gzip.open(run / "$store$_action_ckpt.0.gz", "wb") as file:
        np.save(file, np.array([{}] * 23, object), allow_pickle=True)
    assert scan(run)[0].rejected[0].reason == "not npy"


def test_registered():
    assert "atari" in sources.names() and sources.load("atari") is SOURCE


@pytest.mark.skipif("GATO_SHARED_DATA" not in os.environ, reason="GATO_SHARED_DATA names no folder of recorded logs")
@pytest.mark.parametrize("game, whole, mean", [("Pong", 5, 11.0), ("Breakout", 10, 36.5)])
def test_recorded_logs(game, whole, mean):
    """Breakout's raw return is 78; its rewards are logged clipped to 1."""
    episodes = read(Path(os.environ["GATO_SHARED_DATA"]) / "dqn_replay" / game)
    assert sum(e.timesteps for e in episodes) == 12_000
    assert [e.cut for e in episodes] == [False] * whole + [True]
    assert np.mean([e.reward.sum() for e in episodes if not e.cut]) == mean
