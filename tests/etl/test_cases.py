"""Logs of public reports that readers get wrong: each comes out right, or with a word that says why not.

inputs like the reports', synthetic -> build -> episodes, ends, returns, ranges and choices as they were made
"""

import bz2
import gzip
import io
import json
import lzma
import pickle
from dataclasses import replace
from itertools import pairwise

import h5py
import numpy as np
import pyarrow as pa
import pytest
from rich.console import Console

from etl import sources
from etl.build import beam_flags, build, parsed
from etl.building import oddities
from etl.tokenizers.timestep import TimestepTokenizer
from schemas.dataset import DatasetError, TaskSummary
from schemas.layout import layout_of
from schemas.task import ActionSpec, FieldSpec, TaskSpec
from schemas.vocabulary import DISJOINT
from shards.folder import Folder
from shards.reader import Dataset
from shards.verify import verify
from tests.etl.logkit import write_d4rl
from tests.etl.test_sources_atari import store


def walk(rng, lengths, size):
    """Smooth trajectories float32: steps of 0.01, starts about 1 apart."""
    parts = [rng.normal(size=size) + rng.normal(scale=0.01, size=(n, size)).cumsum(0) for n in lengths]
    return np.concatenate(parts).astype(np.float32)


def last_rows(lengths):
    ends = np.zeros(sum(lengths), bool)
    ends[np.cumsum(lengths) - 1] = True
    return ends


def hdf5(path, lengths, rng, width=5, env_id=None, without=(), **changes):
    """A log in D4RL's layout, ended by timeouts."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = sum(lengths)
    arrays = {
        "observations": walk(rng, lengths, width),
        "actions": rng.uniform(-1, 1, (rows, 3)).astype(np.float32),
        "rewards": np.ones(rows, np.float32),
        "terminals": np.zeros(rows, bool),
        "timeouts": last_rows(lengths),
    } | changes
    write_d4rl(path, arrays, env_id, without)
    return arrays


class Built:
    """What the command makes of an input, and what it says."""

    def __init__(self, source, place, output, *more):
        self.screen = io.StringIO()
        options, rest = parsed(["--source", source, "--input", str(place), "--output", str(output), *more])
        self.manifest = build(options, beam_flags(rest, 1), Console(file=self.screen, width=300))
        self.output, self.data = output, Dataset(output)

    @property
    def said(self):
        return self.screen.getvalue()

    def episodes(self, task=None):
        """(timesteps, terminated, truncated, return) of each episode in the order of the log."""
        number = [one.spec.name for one in self.manifest.tasks].index(task or self.manifest.tasks[0].spec.name)
        rows = [r for r in self.data.index.to_pylist() if r["task"] == number and r["start"] == 0]
        rows.sort(key=lambda r: r["episode"])
        return [(r["episode_timesteps"], r["terminated"], r["truncated"], r["episode_return"]) for r in rows]

    def actions(self):
        """All actions of the first task decoded from its tokens, in the order of the log."""
        spec, found = self.manifest.tasks[0].spec, {}
        tokenizer = TimestepTokenizer(spec, self.manifest.vocabulary)
        for row, about in enumerate(self.data.index.to_pylist()):
            if about["task"] == 0:
                found[about["episode"], about["start"]] = self.data.tokens(row)[:, layout_of(spec).observation :]
        return tokenizer.decode_action(np.concatenate([found[key] for key in sorted(found)]))


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def made(tmp_path):
    """Builds an input of this test, or says why it cannot."""

    def make(source, *more, place="in"):
        return Built(source, tmp_path / place, tmp_path / "built", *more)

    return make


def rows_of(lengths):
    return list(pairwise([0, *np.cumsum(lengths)]))


def lengths_of(built):
    return [episode[0] for episode in built.episodes()]


# where episodes end


def test_seams_show_in_next_observations(tmp_path, rng, made):
    """c01: `d4rl.qlearning_dataset` has no timeouts, and leaves out the last row of each trajectory."""
    recorded, reward = [1000] * 4, rng.random(4000).astype(np.float32)
    seen, kept = walk(rng, recorded, 17), np.flatnonzero(~last_rows([1000] * 4))
    hdf5(
        tmp_path / "in" / "halfcheetah-medium-v2.hdf5",
        [999] * 4,
        rng,
        observations=seen[kept],
        next_observations=seen[kept + 1],
        rewards=reward[kept],
        without=("timeouts",),
    )
    built = made("d4rl")
    assert lengths_of(built) == [999] * 4
    assert [episode[1:3] for episode in built.episodes()] == [(False, True)] * 4
    expected = [reward[kept][a:b].sum(dtype=np.float64) for a, b in rows_of([999] * 4)]
    np.testing.assert_allclose([episode[3] for episode in built.episodes()], expected)
    assert "3 episodes end where next_observations differ" in built.said


def test_without_seams_counting_is_said_and_strict_refuses_it(tmp_path, rng, made):
    hdf5(tmp_path / "in" / "halfcheetah-medium-v2.hdf5", [999] * 3, rng, without=("timeouts",))
    with pytest.raises(
        DatasetError, match=r"--strict: .*2 of 3 episodes end by counting 1,000 rows.*after row 998, 1997"
    ):
        made("d4rl", "--strict")
    built = made("d4rl")
    assert "no 'timeouts'" in built.said and "next_observations" in built.said
    assert lengths_of(built) == [1000, 1000, 997]


def test_timeouts_that_are_never_set(tmp_path, rng, made):
    seen = walk(rng, [41] * 5, 4)
    now, after = seen[~last_rows([41] * 5)], seen[1:][~last_rows([41] * 5)[:-1]]
    unset = {"timeouts": np.zeros(200, bool), "observations": now}
    hdf5(tmp_path / "in" / "own.hdf5", [40] * 5, rng, next_observations=after, **unset)
    built = made("d4rl")
    assert lengths_of(built) == [40] * 5 and "'timeouts' set nowhere: 4 episodes" in built.said
    hdf5(tmp_path / "long" / "own.hdf5", [400] * 5, rng, timeouts=np.zeros(2000, bool))
    with pytest.raises(DatasetError, match="neither 'terminals' nor 'timeouts' end an episode in its 2,000 rows"):
        made("d4rl", "--strict", place="long")


def test_terminals_inside_a_trajectory(tmp_path, rng, made):
    """c02: antmaze sets terminals near the goal while the trajectory goes on to its timeout."""
    near = np.zeros(1800, bool)
    for start in (300, 900, 1500):
        near[start + 100 : start + 300] = rng.random(200) < 0.3
    changes = {"terminals": near, "rewards": near.astype(np.float32)}
    hdf5(tmp_path / "in" / "maze.hdf5", [300] * 6, rng, width=29, **changes)
    built = made("d4rl")
    assert lengths_of(built) == [300] * 6
    assert [episode[3] for episode in built.episodes()] == [near[a:b].sum() for a, b in rows_of([300] * 6)]
    assert f"{near.sum()} rows with 'terminals' set" in built.said and "the trajectory goes on" in built.said
    with pytest.raises(DatasetError, match="--strict: .*'terminals'"):
        made("d4rl", "--strict", "--overwrite")


def test_real_terminals_in_a_row_stay(tmp_path, rng, made):
    """Where the observations jump after a terminal, it is one: two episodes of one row each are no fault."""
    lengths = [50, 1, 1, 1, 50, 1, 1, 60]
    ends = last_rows(lengths)
    timed = ends.copy()
    timed[:100] = False
    hdf5(tmp_path / "in" / "log.hdf5", lengths, rng, terminals=ends & ~timed, timeouts=timed, env_id="Hopper-v4")
    assert lengths_of(made("d4rl")) == lengths


def test_timeouts_of_training_iterations_are_no_limit(tmp_path, rng, made):
    """c03: medium-replay; the episode that is under way at the end of each 1,000 rows is cut."""
    lengths, whole = [], []
    for _ in range(5):
        left = 1000
        while left:
            wanted = int(rng.integers(60, 420))
            lengths.append(min(wanted, left))
            whole.append(wanted <= left)
            left -= lengths[-1]
    ends, finished = last_rows(lengths), np.repeat(whole, lengths)
    reward = (1 + 0.1 * rng.normal(size=sum(lengths))).astype(np.float32)
    flags = {"terminals": ends & finished, "timeouts": ends & ~finished, "rewards": reward}
    hdf5(tmp_path / "in" / "hopper_medium_replay-v2.hdf5", lengths, rng, **flags)
    built = made("d4rl")
    assert lengths_of(built) == lengths
    assert [terminated for _, terminated, _, _ in built.episodes()] == whole
    task = built.manifest.tasks[0]
    assert task.cut_episodes == whole.count(False) > 2
    totals = [reward[a:b].sum(dtype=np.float64) for (a, b), good in zip(rows_of(lengths), whole) if good]
    assert task.return_mean == pytest.approx(np.mean(totals))
    assert f"{task.cut_episodes} of {len(lengths)} episodes end by 'timeouts'" in built.said


def test_timeouts_at_goals_keep_their_returns(tmp_path, rng, made):
    """In maze2d, timeouts before the limit mark reached goals: returns must not become empty."""
    lengths = [120, 87, 93, 140, 61]
    hdf5(tmp_path / "in" / "maze2d-umaze-sparse-v1.hdf5", lengths, rng)
    built = made("d4rl")
    assert built.manifest.tasks[0].cut_episodes == 0 and built.manifest.tasks[0].return_mean == np.mean(lengths)
    assert "none at it: they count as whole" in built.said


def test_episodes_beyond_the_known_limit(tmp_path, rng, made):
    hdf5(tmp_path / "in" / "log.hdf5", [1000, 1700, 1000], rng, env_id="Hopper-v4")
    built = made("d4rl")
    assert lengths_of(built) == [1000, 1700, 1000]
    assert "1 of 3 episodes are longer than the limit of 1,000 (up to 1,700 rows)" in built.said
    assert "longer" not in made("d4rl", "--max-episode-steps", "1700", "--overwrite").said


def test_episode_terminals_of_d3rlpy(tmp_path, rng, made):
    """c04: MDPDataset.dump of d3rlpy 1.x; two episodes were ended by hand; torque in [-2, 2]."""
    lengths = [200, 120, 200, 200, 80, 200]
    torque = rng.uniform(-2, 2, (1000, 1)).astype(np.float32)
    own = {"episode_terminals": last_rows(lengths).astype(np.float32), "discrete_action": False, "version": "1.0"}
    changes = {"actions": torque, "terminals": np.zeros(1000, np.float32), "rewards": np.ones((1000, 1), np.float32)}
    hdf5(tmp_path / "in" / "pendulum.h5", lengths, rng, without=("timeouts",), **changes, **own)
    built = made("d4rl")
    assert lengths_of(built) == lengths
    assert [truncated for _, _, truncated, _ in built.episodes()] == [n == 200 for n in lengths]
    action = built.manifest.tasks[0].spec.action
    assert (action.low, action.high) == ((-2.0,), (2.0,))
    assert np.abs(built.actions() - torque).max() < 0.02
    assert "--action-low -2 --action-high 2" in built.said


def test_step_limits_of_newer_dopamine(tmp_path, rng, made):
    """c06: no terminal at the step limit; three rows of zeros begin the next episode. Nothing is unpickled."""
    lengths, ended = [50, 50, 37, 50, 21], ["limit", "limit", "terminal", "limit", "terminal"]
    columns = {"observation": [], "action": [], "reward": [], "terminal": []}
    for length, end in zip(lengths, ended):
        columns["observation"] += [0, 0, 0, *range(1, length + 1)]
        columns["action"] += [0, 0, 0, *rng.integers(0, 6, length)]
        columns["reward"] += [0, 0, 0, *rng.choice([-1, 0, 1], length)]
        columns["terminal"] += [0] * (length + 2) + [int(end == "terminal")]
    rows, folder = len(columns["action"]), tmp_path / "in" / "Pong" / "1" / "replay_logs"
    folder.mkdir(parents=True)
    kinds = {"observation": np.uint8, "action": np.int32, "reward": np.float32, "terminal": np.uint8}
    for key, values in columns.items():
        array = np.array([*values, 0], kinds[key])  # one row was never written
        store(
            folder, f"$store$_{key}", np.repeat(array, 84 * 84).reshape(-1, 84, 84) if key == "observation" else array
        )
    store(folder, "add_count", np.array(rows))
    (folder / "episode_end_indices_ckpt.0.gz").write_bytes(gzip.compress(pickle.dumps(Unpickled())))
    built = made("atari")
    assert lengths_of(built) == lengths
    assert [(t, r) for _, t, r, _ in built.episodes()] == [(end == "terminal", end == "limit") for end in ended]
    source = sources.load("atari")
    (found,) = source.scan(source.resolve(tmp_path / "in", None, tmp_path), source.options())
    for episode in sources.read(source, found.task, found.episodes):
        np.testing.assert_array_equal(episode.observation["frame"][:, 0, 0, 0], 1 + np.arange(episode.timesteps))
    assert "3 of 5 episodes have no terminal" in built.said


class Unpickled:
    def __reduce__(self):
        return exec, ("raise SystemExit('unpickled')",)


# ranges and kinds of actions


@pytest.mark.parametrize("column", [False, True])
def test_integers_are_choices(tmp_path, rng, made, column):
    """c05: int32 actions, (N,) or (N, 1)."""
    action = rng.integers(0, 4, 800).astype(np.int32)
    hdf5(tmp_path / "in" / "cartpole.h5", [100] * 8, rng, actions=action[:, None] if column else action)
    built = made("d4rl")
    assert (built.manifest.tasks[0].spec.action.kind, built.manifest.tasks[0].spec.action.choices) == ("discrete", (4,))
    np.testing.assert_array_equal(built.actions(), action)


def test_choices_that_were_recorded_as_floats(tmp_path, rng, made):
    action = rng.integers(0, 2, (400, 1)).astype(np.float32)
    hdf5(tmp_path / "in" / "cartpole.h5", [100] * 4, rng, width=4, actions=action, env_id="CartPole-v1")
    built = made("d4rl")
    assert built.manifest.tasks[0].spec.action.choices == (2,)
    np.testing.assert_array_equal(built.actions(), action[:, 0])
    hdf5(tmp_path / "more" / "own.h5", [100] * 4, rng, actions=rng.integers(0, 5, (400, 1)).astype(np.float32))
    assert (
        "All are whole numbers: if they are choices, record them as int64"
        in made("d4rl", "--overwrite", place="more").said
    )


def test_a_range_that_nothing_states_comes_from_the_values(tmp_path, rng, made):
    """c15: a valve's opening, 0 to 8."""
    opening = rng.uniform(0, 8, (1000, 2)).astype(np.float32)
    hdf5(tmp_path / "in" / "valve.hdf5", [100] * 10, rng, actions=opening)
    built = made("d4rl")
    task = built.manifest.tasks[0]
    assert (task.spec.action.low, task.spec.action.high, task.out_of_range_actions) == ((0, 0), (8, 8), 0)
    assert np.abs(built.actions() - opening).max() <= 8 / 2048 + 1e-6
    assert f"{(np.abs(opening) > 1.001).mean():.1%} of its action values lie outside [-1, 1]" in built.said
    with pytest.raises(DatasetError, match="--strict: .*--action-low 0 --action-high 8"):
        made("d4rl", "--strict", "--overwrite")
    assert "warning" not in made("d4rl", "--strict", "--overwrite", "--action-low", "0", "--action-high", "8").said
    wrong = ("--overwrite", "--action-low", "-1", "--action-high", "1")
    with pytest.raises(DatasetError, match=r"87\.\d% .*--max-clipped-share 0.5.*--action-bounds log.*share 1 they are"):
        made("d4rl", *wrong)
    made("d4rl", *wrong, "--max-clipped-share", "1")
    for again in ((), ("--overwrite",)):  # of what is already there, too
        with pytest.raises(DatasetError, match=r"more than the 0.01 of --strict.*, and without --strict they are"):
            made("d4rl", *wrong[1:], "--max-clipped-share", "1", "--strict", *again)
    assert made("d4rl", "--overwrite", "--action-bounds", "log").manifest.tasks[0].spec.action.high == (8, 8)


def minari(folder, episodes, observation, action, **about):
    """A dataset in Minari's layout; spaces as its metadata spells them."""
    (folder / "data").mkdir(parents=True)
    with h5py.File(folder / "data" / "main_data.hdf5", "w") as file:
        for number, arrays in enumerate(episodes):
            steps, group = len(arrays["actions"]), file.create_group(f"episode_{number}")
            ends = {"terminations": np.zeros(steps, bool), "truncations": np.arange(steps) == steps - 1}
            for key, value in (ends | arrays).items():
                group.create_dataset(key, data=value, compression="gzip")
            group.attrs.update({"id": number, "total_steps": steps})
    about |= {"total_episodes": len(episodes), "data_format": "hdf5", "dataset_id": f"own/{folder.name}-v0"}
    about |= {"observation_space": json.dumps(observation), "action_space": json.dumps(action)}
    (folder / "data" / "metadata.json").write_text(json.dumps(about))


def box(low, high, shape, dtype):
    sides = {"low": np.full(shape, low).tolist(), "high": np.full(shape, high).tolist()}
    return {"type": "Box", "dtype": dtype, "shape": list(shape)} | sides


THREE = {"type": "Discrete", "dtype": "int64", "start": 0, "n": 3}


def test_actions_that_the_environment_clips(tmp_path, rng, made):
    """c17: Meta-World's experts act up to 22 in Box(-1, 1)."""
    episodes, clipped = [], 0
    for _ in range(20):
        distance = rng.uniform(-2.2, 2.2, (1, 3)) * np.exp(-np.arange(100)[:, None] / 15)
        action = np.c_[10 * distance, rng.choice([-1.0, 1.0], 100)].astype(np.float32)
        clipped += int((np.abs(action) > 1).sum())
        episodes.append({"observations": walk(rng, [101], 9), "actions": action, "rewards": rng.random(100)})
    minari(tmp_path / "in" / "assembly", episodes, box(-np.inf, np.inf, (9,), "float64"), box(-1, 1, (4,), "float32"))
    built = made("minari")
    task = built.manifest.tasks[0]
    assert (task.episodes, task.rejected_episodes, task.out_of_range_actions) == (20, 0, clipped)
    assert np.abs(built.actions()).max() <= 1
    assert f"{clipped / 8000:.1%} of its action values lie beyond their range and are clipped" in built.said


def test_minaris_flags_that_are_odd(tmp_path, rng, made):
    def episodes(**flags):
        about = {"actions": rng.integers(0, 3, 20), "rewards": rng.random(20)}
        return [{"observations": walk(rng, [21], 3), **about, **flags} for _ in range(4)]

    seen, unset = box(-np.inf, np.inf, (3,), "float64"), {"truncations": np.zeros(20, bool)}
    minari(tmp_path / "in" / "never", episodes(**unset), seen, THREE)
    built = made("minari")
    assert built.manifest.tasks[0].cut_episodes == 4 and "none of 4 episodes looked at has terminations" in built.said
    built = made("minari", "--max-episode-steps", "20", "--overwrite")
    assert built.manifest.tasks[0].cut_episodes == 0 and "warning" not in built.said
    assert (
        "4 of 4 episodes are longer than the limit of 15"
        in made("minari", "--max-episode-steps", "15", "--overwrite").said
    )
    minari(tmp_path / "more" / "inside", episodes(terminations=np.arange(20) % 7 == 6), seen, THREE)
    with pytest.raises(
        DatasetError, match="--strict: .*4 of 4 episodes looked at have terminations or truncations before"
    ):
        made("minari", "--strict", "--overwrite", place="more")


def test_one_range_for_all_joints_wastes_bins(tmp_path, rng, made):
    joints = (rng.uniform(-1, 1, (400, 3)) * [1, 0.02, 0.5]).astype(np.float32)
    hdf5(tmp_path / "in" / "arm.hdf5", [100] * 4, rng, actions=joints)
    said = made("d4rl").said
    assert "action[1] uses 2.0% of its range [-1, 1]; one range" in said and "action[2]" not in said
    assert "uses" not in made("d4rl", "--overwrite", "--action-bounds", "log").said


# pictures


@pytest.mark.parametrize("shape", [(4, 84, 84), (2, 64, 64), (3, 64, 64), (4, 16, 16)])
def test_channels_first(tmp_path, rng, made, shape):
    """c07: frame stacks and colours with the channels first."""
    pixels = rng.integers(0, 256, (11, *shape), np.uint8)
    episode = {"observations": pixels, "actions": rng.integers(0, 3, 10), "rewards": np.ones(10)}
    minari(tmp_path / "in" / "stack", [episode] * 2, box(0, 255, shape, "uint8"), THREE)
    built = made("minari", "--keep-duplicates", "--image-size", str(shape[1] // 16 * 16), str(shape[2] // 16 * 16))
    (spec,) = built.manifest.tasks[0].spec.observation
    assert (spec.kind, spec.shape) == ("image", (*shape[1:], shape[0]))
    assert lengths_of(built) == [10, 10]
    if shape[1] % 16 == 0:  # not resized: the very bytes
        layout = layout_of(built.manifest.tasks[0].spec)
        patches = layout.split_patches(built.data.patches(0))
        first = patches[0].reshape(10, shape[1] // 16, shape[2] // 16, 16, 16, -1).transpose(0, 1, 3, 2, 4, 5)
        first = first.reshape(10, *shape[1:], -1)
        np.testing.assert_array_equal(first, pixels[:10].transpose(0, 2, 3, 1)[..., : first.shape[-1]])


def test_floats_in_the_unit_range_are_pictures(tmp_path, rng, made):
    pixels = rng.integers(0, 256, (11, 32, 48, 3))
    episode = {"observations": (pixels / 255).astype(np.float32), "actions": rng.integers(0, 3, 10)}
    episode["rewards"] = np.ones(10)
    minari(tmp_path / "in" / "unit", [episode], box(0, 1, (32, 48, 3), "float32"), THREE)
    built = made("minari")
    assert built.manifest.tasks[0].spec.observation[0].kind == "image"
    np.testing.assert_array_equal(built.data.patches(0)[:, 0], pixels[:10, :16, :16])


@pytest.mark.parametrize("kind", ["uint8", "float32"])
def test_flattened_pictures(tmp_path, rng, made, kind):
    """c20: carla's rows are 48x48x3 pictures."""
    pixels = rng.integers(0, 256, (80, 6912))
    place = tmp_path / "in" / "carla_lane_follow_flat-v0.hdf5"
    hdf5(place, [20] * 4, rng, observations=pixels.astype(kind))
    built = made("d4rl")
    (spec,) = built.manifest.tasks[0].spec.observation
    assert (spec.kind, spec.shape, layout_of(built.manifest.tasks[0].spec).patches) == ("image", (48, 48, 3), 9)
    order = np.argsort(built.data.column("episode"))
    np.testing.assert_array_equal(built.data.patches(order[0])[:, 0], pixels[:20].reshape(20, 48, 48, 3)[:, :16, :16])
    place.rename(place.with_name("mine.hdf5"))
    if kind == "uint8":
        with pytest.raises(DatasetError, match="6,912 numbers of uint8, each a token; give --picture-shape 48 48 3"):
            made("d4rl", "--overwrite")
    else:
        with pytest.raises(DatasetError, match="--strict: .*6,912 numbers of float32.*--picture-shape 48 48 3"):
            made("d4rl", "--strict", "--overwrite")
    built = made("d4rl", "--overwrite", "--picture-shape", "48", "48", "3")
    assert built.manifest.tasks[0].spec.observation[0].shape == (48, 48, 3)


def test_pictures_beyond_a_context_are_said_and_resized(tmp_path, rng, made):
    pixels = np.repeat(rng.integers(0, 256, (3, 1), np.uint8), 480 * 640, 1).reshape(3, 480, 640, 1)
    episode = {"observations": pixels, "actions": rng.integers(0, 3, 2), "rewards": np.ones(2)}
    minari(tmp_path / "in" / "large", [episode], box(0, 255, (480, 640, 1), "uint8"), THREE)
    said = made("minari").said
    assert "a timestep has 1,202 tokens (1,200 patches, 1 actions), a usual context 1,024" in said
    assert "give --image-size" in said
    small = made("minari", "--image-size", "48", "64", "--overwrite")
    assert "a usual context" not in small.said and layout_of(small.manifest.tasks[0].spec).length == 14
    with pytest.raises(ValueError, match="--image-size 50 64: give height and width in multiples of 16"):
        made("minari", "--image-size", "50", "64", "--overwrite")


def test_only_the_newest_frame_of_a_stack(tmp_path, rng, made):
    pixels = rng.integers(0, 256, (11, 32, 32, 4), np.uint8)
    episode = {"observations": pixels, "actions": rng.integers(0, 3, 10), "rewards": np.ones(10)}
    minari(tmp_path / "in" / "stack", [episode], box(0, 255, (32, 32, 4), "uint8"), THREE)
    built = made("minari", "--frame-stack", "4")
    np.testing.assert_array_equal(built.data.patches(0)[:, 0], pixels[:10, :16, :16, 3:])


# files


def test_packed_texts(tmp_path, made):
    """c11: .json.gz and .jsonl.zst beside a plain file."""
    (tmp_path / "in").mkdir()
    lines = ["".join(json.dumps({"text": f"{name} {n} " + "words " * 40}) + "\n" for n in range(count)).encode()
             for name, count in (("gz", 50), ("zst", 30), ("xz", 7), ("bz2", 3), ("plain", 5))]  # fmt: skip
    (tmp_path / "in" / "c4-train.00000-of-01024.json.gz").write_bytes(gzip.compress(lines[0]))
    with pa.CompressedOutputStream(str(tmp_path / "in" / "shard_00000.jsonl.zst"), "zstd") as file:
        file.write(lines[1])
    (tmp_path / "in" / "a.jsonl.xz").write_bytes(lzma.compress(lines[2][:200]) + lzma.compress(lines[2][200:]))
    (tmp_path / "in" / "b.txt.bz2").write_bytes(bz2.compress(b"one\n\ntwo\n\nthree"))
    (tmp_path / "in" / "notes.jsonl").write_bytes(lines[4])
    built = made("text", "--shard-megabytes", "0.01")
    assert built.manifest.tasks[0].episodes == 50 + 30 + 7 + 3 + 5 and built.manifest.rejected.rows == 0
    files = built.data.column("file")
    assert {name: int((files == name).sum()) for name in set(files.tolist())}["shard_00000.jsonl.zst"] == 30
    (tmp_path / "in" / "rest.jsonl.zip").write_bytes(b"PK")
    assert "rest.jsonl.zip must be unpacked first" in made("text", "--overwrite").said


def test_numbered_files_of_one_episode_are_one_task(tmp_path, rng, made):
    """c13: a file for each episode."""
    lengths = [int(n) for n in rng.integers(20, 40, 21)]
    for number, length in enumerate(lengths):
        ends = {"terminals": last_rows([length]), "timeouts": np.zeros(length, bool)}
        hdf5(tmp_path / "in" / f"episode_{number}.hdf5", [length], rng, env_id="Hopper-v4", **ends)
    built = made("d4rl")
    (task,) = built.manifest.tasks
    assert (task.spec.name, task.episodes) == ("in", 21) and lengths_of(built) == lengths
    assert task.held_out_episodes > 0 and "21 numbered files of one episode each are one task" in built.said
    apart = made("d4rl", "--files", "tasks", "--overwrite")
    assert len(apart.manifest.tasks) == 21 and apart.said.count("nothing is held out") == 21


def test_numbered_files_of_several_episodes_stay_tasks(tmp_path, rng, made):
    for number in range(3):
        hdf5(tmp_path / "in" / f"run_{number}.hdf5", [20, 30], rng)
    assert [task.spec.name for task in made("d4rl").manifest.tasks] == ["run_0", "run_1", "run_2"]


def test_links_to_folders_are_said(tmp_path, rng, made):
    hdf5(tmp_path / "in" / "log.hdf5", [20, 30], rng)
    hdf5(tmp_path / "elsewhere" / "other.hdf5", [20, 30], rng)
    (tmp_path / "in" / "more").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "in" / "file.hdf5").symlink_to(tmp_path / "elsewhere" / "other.hdf5")
    with pytest.raises(DatasetError, match="--strict: .*links to folders are not followed: more"):
        made("d4rl", "--strict")
    built = made("d4rl")
    assert "links to folders are not followed: more" in built.said
    assert [task.spec.name for task in built.manifest.tasks] == ["file", "log"]


# what is said, and kept


def test_the_summary_says_what_is_odd_and_keeps_it(tmp_path, rng, made):
    lengths = [30, 1, 40, 30]
    seen = walk(rng, lengths, 3)
    seen[:, 1] = 7
    same = {"observations": seen, "rewards": np.zeros(101, np.float32)}
    arrays = hdf5(tmp_path / "in" / "log.hdf5", lengths, rng, **same)
    with h5py.File(tmp_path / "in" / "log.hdf5", "a") as file:  # the last episode is a copy of the first
        for key in ("observations", "actions"):
            file[key][71:] = arrays[key][:30]
    built = made("d4rl")
    for line in (
        "1 exact copies of episodes are left out",
        "1 of 3 episodes have a single timestep",
        "all returns are 0",
        "observation[1] never changes",
    ):
        assert f"odd log: {line}" in built.said
    kept = oddities.load(Folder(built.output))["log"]
    assert kept.lengths == (1, 30, 40) and len(kept.found) == 4
    assert made("d4rl").said.count("odd log:") == 4  # when it is there already, too
    verify(built.output, full=True)
    (built.output / oddities.NAME).write_text("{")
    assert oddities.load(Folder(built.output)) == {} and verify(built.output, full=True)


def test_observations_that_tokens_cannot_tell_apart_are_named_with_their_range(tmp_path, rng, made):
    observations = walk(rng, [20] * 3, 5)
    observations[:, 1] *= 1e5
    observations[:, 3] *= 1e-6
    hdf5(tmp_path / "in/log.hdf5", [20] * 3, rng, observations=observations)
    said = made("d4rl").said
    low, high = observations[:, 1].min(), observations[:, 1].max()
    assert f"odd log: observation[1] goes from {low:g} to {high:g}: what is beyond 256 or -256 is clipped" in said
    assert "odd log: observation[3] goes from " in said and ", less than 4 of 1,024 bins: centre and multiply" in said
    count = int((np.abs(observations) > 256).sum())
    with pytest.raises(DatasetError, match=rf"--strict: .*in 60 timesteps of 'log' {count} observation values beyond "):
        made("d4rl", "--strict")


def test_bins_are_counted_in_the_vocabulary_of_the_build():
    task = TaskSpec("log", "d4rl", (FieldSpec("observation", "continuous", (2,)),), ActionSpec.continuous(-1, 1, 1))
    summary = TaskSummary(task, 3, 0, 0, 0, 0, 60, 0, 0, 3, 0, 480, 0, None, None, None, 0, 0, 0)
    columns = oddities.Columns((-9.0, 0.0), (9.0, 1.0), (-1.0,), (1.0,), (0,))
    coarse = replace(DISJOINT, name="coarse", bins=16, scale=8.0)
    assert oddities._of_columns(summary, columns, DISJOINT) == []
    found = " ".join(oddities._of_columns(summary, columns, coarse))
    assert "observation[0] goes from -9 to 9: what is beyond 8 or -8 is clipped" in found
    assert "observation[1] goes from 0 to 1, less than 4 of 16 bins" not in found
    columns = replace(columns, observation_low=(-9.0, 0.5))
    assert "observation[1] goes from 0.5 to 1, less than 4 of 16 bins" in " ".join(
        oddities._of_columns(summary, columns, coarse)
    )
