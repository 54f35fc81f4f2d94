"""Own arrays to a log, a dataset, batches and a training, from Python."""

import json
import subprocess
import sys
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from gymnasium import spaces
from rich.console import Console

import gato
from etl.building import summary
from shards.reader import Dataset as ShardedDataset

BODY = spaces.Dict({"body": spaces.Box(-np.inf, np.inf, (3,), np.float32), "mode": spaces.Discrete(4)})
REACH = spaces.Box(np.array([-2, -1], np.float32), np.array([2, 1], np.float32))


def episodes(count=6, T=30):
    """Dict observations, T + 1 of them, and actions in [-2, 2] x [-1, 1]."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        body = rng.normal(size=(T + 1, 3))
        yield gato.Episode(
            observations={"body": body, "mode": rng.integers(0, 4, T + 1)},
            actions=np.tanh(body[:T, :2]) * [2, 1],
            rewards=body[:T, 0],
            truncated=True,
        )


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    log = gato.write_logs(
        folder / "logs", episodes(), "my-task", "my_module:Own-v0", observation_space=BODY, action_space=REACH
    )
    assert log == folder / "logs" / "my-task"
    return gato.build(log, folder / "shards", held_out_share=0.2)


def test_own_arrays_become_a_dataset(dataset):
    assert dataset.tasks == ["my-task"]
    summary = dataset.manifest.tasks[0]
    assert (summary.episodes, summary.timesteps, summary.rejected_episodes) == (6, 180, 0)
    assert summary.spec.environment.id == "my_module:Own-v0"
    assert [(field.key, field.kind) for field in summary.spec.observation] == [
        ("body", "continuous"),
        ("mode", "discrete"),
    ]
    stored = ShardedDataset(dataset.folder)
    first = next(episodes())
    row = next(r for r in range(stored.index.num_rows) if stored.column("position")[r] == 0)
    assert np.allclose(stored.action(row), first.actions, atol=1e-6)
    assert np.allclose(stored.observation(row), first.observations["body"][:-1], atol=1e-6)


def test_an_episode_that_neither_ended_nor_reached_its_limit_is_cut(tmp_path):
    one, cut = list(episodes(2))
    cut = gato.Episode(cut.observations, cut.actions, cut.rewards)
    log = gato.write_logs(tmp_path, [one, cut], "cut", observation_space=BODY, action_space=REACH)
    summary = gato.build(log, tmp_path / "shards").manifest.tasks[0]
    assert (summary.episodes, summary.cut_episodes) == (2, 1)
    assert summary.return_mean == pytest.approx(float(np.sum(one.rewards)), abs=1e-4)


def test_a_vector_needs_only_its_action_space(tmp_path):
    log = gato.write_logs(
        tmp_path, [{"observations": np.zeros((5, 2)), "actions": [0, 1, 2, 1, 0], "rewards": np.ones(5)}], "vector",
        action_space=spaces.Discrete(3),
    )  # fmt: skip
    built = gato.build(log, tmp_path / "shards")
    assert built.manifest.tasks[0].timesteps == 5 and built.manifest.tasks[0].spec.action.kind == "discrete"


def test_spaces_come_from_the_environment(tmp_path):
    pytest.importorskip("mujoco")
    rng = np.random.default_rng(0)
    own = gato.Episode(rng.normal(size=(7, 11)), rng.uniform(-1, 1, (7, 3)), np.ones(7), terminated=True)
    log = gato.write_logs(tmp_path, [own], "hopper-own", "Hopper-v4")
    about = json.loads((log / "data" / "metadata.json").read_text())
    assert json.loads(about["env_spec"])["max_episode_steps"] == 1000
    assert gato.build(log, tmp_path / "shards").manifest.tasks[0].spec.max_episode_steps == 1000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rewards": np.ones(4)}, "episode 0: actions: 5 rows, expected one per reward"),
        ({"observations": np.zeros((9, 2))}, "observations: 9 rows"),
        ({"observations": np.full((5, 2), np.nan)}, "NaN"),
        ({"observations": np.array([[0, 0]] * 4 + [[0, 1e39]])}, "observations: timestep 4: .* infinity as float32"),
        ({"observations": [[0.0], [1.0, 2.0]]}, "episode 0: observations: .*its rows of one shape"),
        ({"actions": np.array([0, 1, 7, 0, 0])}, r"episode 0: actions: timestep 2: 7 is outside \[0, 2\]; .*a space"),
        ({"rewards": np.array([1, 1, 1, np.nan, 1])}, "episode 0: rewards: timestep 3: NaN"),
        ({"rewards": 1.0}, r"rewards are \(\), expected \(T,\)"),
        ({"actions": np.zeros((5, 2), int)}, "actions: shape"),
        ({"reward": np.ones(5)}, "unknown key 'reward'"),
        ({"terminated": "no"}, "episode 0: terminated='no'; give True or False, for its last timestep"),
        ({"truncated": np.zeros(5, bool)}, "episode 0: truncated=array.*; give True or False"),
        ({"observations": np.zeros((5, 2), np.int32)}, "give observation_space"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, change, message):
    good = {"observations": np.zeros((5, 2)), "actions": np.zeros(5, int), "rewards": np.ones(5)}
    with pytest.raises(ValueError, match=message):
        gato.write_logs(tmp_path, [good | change], "wrong", action_space=spaces.Discrete(3))
    assert not list(tmp_path.rglob("*"))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"name": Path("own")}, ValueError, "name PosixPath.*: use letters"),
        ({"action_space": "box"}, TypeError, "action_space='box': give a space, such as"),
        ({"observation_space": spaces.Box}, TypeError, "observation_space=.*: give a space, such as"),
        ({"max_episode_steps": 0}, ValueError, "max_episode_steps=0: give timesteps, 1 or more"),
        ({"max_episode_steps": "x"}, ValueError, "max_episode_steps='x': give timesteps"),
        ({"reference_returns": (1, 1)}, ValueError, r"reference_returns=\(1, 1\): give two numbers, a low return"),
        ({"reference_returns": "ab"}, ValueError, "reference_returns='ab': give two numbers"),
        ({"environment_kwargs": {"a": object()}}, ValueError, "environment_kwargs: .*; give numbers, texts"),
    ],
)
def test_arguments_that_make_no_sense_are_named(tmp_path, change, error, message):
    good = {"observations": np.zeros((5, 2), np.float32), "actions": np.zeros(5, int), "rewards": np.ones(5)}
    given = {"name": "own", "action_space": spaces.Discrete(3), "observation_space": spaces.Box(-1, 1, (2,))}
    with pytest.raises(error, match=message):
        gato.write_logs(tmp_path, [good], environment="own:Own-v0", **given | change)
    assert not list(tmp_path.rglob("*"))


BOXES = {
    "observation_space": spaces.Box(np.array([-np.inf, 0], np.float32), np.array([np.inf, 0.3], np.float32)),
    "action_space": spaces.Box(-1, 1, (2,), np.float32),
}


@pytest.mark.parametrize(
    ("field", "place", "value", "message"),
    [
        ("actions", (1, 0), 1.01, r"episode 1: actions: timestep 1, value 0: 1.01 is outside \[-1.0, 1.0\]"),
        ("actions", (2, 1), -np.inf, r"actions: timestep 2, value 1: -inf is outside"),
        ("observations", (4, 1), -0.1, r"observations: timestep 4, value 1: -0.1 is outside \[0.0, 0.3"),
        ("observations", (4, 0), np.nan, "episode 1: observations: timestep 4: NaN"),
    ],
)
def test_a_value_outside_its_box_is_refused(tmp_path, field, place, value, message):
    good = {"observations": np.full((5, 2), 0.1 * 3), "actions": np.full((5, 2), 1 + 1e-7), "rewards": np.ones(5)}
    good["observations"][:, 0] = 1e9  # no bound
    gato.write_logs(tmp_path, [good], "rounded", **BOXES)
    bad = good | {field: good[field].copy()}
    bad[field][place] = value
    with pytest.raises(ValueError, match=message):
        gato.write_logs(tmp_path, [good, bad], "wrong", **BOXES)


@pytest.mark.parametrize(
    ("space", "good", "bad"),
    [
        (spaces.Discrete(3, start=-1), [-1, 0, 1], [-1, 0, 2]),
        (spaces.MultiDiscrete([2, 3]), [[1, 2], [0, 0]], [[1, 2], [2, 0]]),
        (spaces.MultiBinary(2), [[0, 1], [1, 1]], [[0, 1], [257, 1]]),  # 1 as int8
        (spaces.Box(0, 255, (2,), np.uint8), [[0, 255], [1, 1]], [[0, 256], [1, 1]]),
        (spaces.Dict(part=spaces.Discrete(2)), {"part": [0, 1]}, {"part": [0, 2]}),
    ],
)
def test_a_value_outside_a_discrete_space_is_refused(tmp_path, space, good, bad):
    for name, actions in (("good", good), ("bad", bad)):
        T = len(actions["part"] if isinstance(actions, dict) else actions)
        one = {"observations": np.zeros((T, 1)), "actions": actions, "rewards": np.ones(T)}
        if name == "good":
            gato.write_logs(tmp_path, [one], name, action_space=space)
            continue
        with pytest.raises(ValueError, match="episode 0: actions.*: timestep .* is outside"):
            gato.write_logs(tmp_path, [one], name, action_space=space)


def test_episodes_of_different_fields_are_named(tmp_path):
    one = {"observations": {"a": np.zeros((2, 1)), "b": np.zeros((2, 1))}, "actions": [0, 1], "rewards": [0, 0]}
    for other, message in (
        ({"a": np.zeros((2, 1))}, "episode 1: observations/b is missing"),
        (one["observations"] | {"c": np.zeros((2, 1))}, "episode 1: observations/c is not in episode 0"),
        (np.zeros((2, 1)), "episode 1: observations/a is missing"),
        ({"a": ["x", "y"], "b": np.zeros((2, 1))}, "episode 1: observations/a: "),
    ):
        with pytest.raises(ValueError, match=message):
            gato.write_logs(tmp_path, [one, one | {"observations": other}], "n", action_space=spaces.Discrete(2))
    texts = one | {"observations": ["x", "y"]}
    with pytest.raises(ValueError, match="episode 1: observations: not texts"):
        gato.write_logs(tmp_path, [texts, one], "n", action_space=spaces.Discrete(2))


def test_a_list_of_episodes_is_needed(tmp_path):
    one = next(episodes())
    for given in (None, [1, 2], one, vars(one), "log.hdf5"):
        with pytest.raises(TypeError, match="give a list of episodes"):
            gato.write_logs(tmp_path, given, "n", observation_space=BODY, action_space=REACH)
    with pytest.raises(ValueError, match="'_', and '/' between them"):
        gato.write_logs(tmp_path, [one], "a//b", observation_space=BODY, action_space=REACH)
    log = gato.write_logs(tmp_path, [one], "a/b", observation_space=BODY, action_space=REACH)
    assert log == tmp_path / "a" / "b" and gato.build(log, tmp_path / "shards").manifest.tasks[0].timesteps == 30


def test_build_warns_of_clipped_values_as_the_command_does(tmp_path):
    far = {"observations": np.array([[0.0], [1e6], [-1e6]]), "actions": [0, 1, 0], "rewards": np.ones(3)}
    log = gato.write_logs(tmp_path, [far], "far", action_space=spaces.Discrete(2))
    for _ in range(2):  # built, and found built
        with pytest.warns(UserWarning, match="^far: 2 observation values beyond the mu-law's range were clipped$"):
            dataset = gato.build(log, tmp_path / "shards")
    assert repr(dataset) == f"Dataset('{tmp_path}/shards', tasks=['far'], timesteps=3)"
    screen = StringIO()
    summary.show(dataset.manifest, Console(file=screen, width=200))
    assert "far: 2 observation values beyond the mu-law's range were clipped\n" in screen.getvalue()


def test_a_task_that_gato_does_not_know_is_marked_in_the_table(tmp_path):
    pytest.importorskip("mujoco")
    rng = np.random.default_rng(0)
    own = gato.Episode(rng.normal(size=(9, 11)), rng.uniform(-1, 1, (9, 3)), np.ones(9), terminated=True)
    notes = {}
    for name in ("hopper-medium-v4", "hopper-own"):
        dataset = gato.build(gato.write_logs(tmp_path / "logs", [own], name, "Hopper-v4"), tmp_path / name)
        options = {"models": ["random", "gato"], "episodes": 1, "step_limit": 3, "processes": 1, "film_seconds": 0.0}
        outcome = gato.compare("tiny", dataset, tmp_path / "out" / name, **options)
        note = "not among the tasks that this Gato was trained on"
        notes[name] = [note in outcome.table, note in outcome.report.read_text()]
        assert outcome.error == "" and outcome.rows.num_rows == 2
    assert notes == {"hopper-medium-v4": [False, False], "hopper-own": [True, True]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"models": ["random", "nope"]}, "--models 'nope': Input should be 'random', 'behaviour', 'dt'"),
        ({"models": "nope"}, "--models 'nope': Input should be"),
        ({"budget": "large"}, "--budget 'large': Input should be 'quick', 'cpu', 'long' or 'paper'"),
        ({"episodes": 2.5}, "--episodes 2.5: Input should be a valid integer"),
        ({"agent": {"decoding": "gready"}}, "--agent.decoding 'gready': Input should be"),
        ({"agent": {"temprature": 0.5}}, "--agent.temprature 0.5: Unexpected"),
        ({"agent": {"asked_return": float("nan")}}, "--agent.asked-return nan: must be from"),
    ],
)
def test_compare_refuses_values_that_mean_nothing(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        gato.compare("tiny", output=tmp_path / "out", root=str(tmp_path), **options)
    assert not list(tmp_path.iterdir())


def test_the_range_of_actions_is_never_assumed(tmp_path):
    with pytest.raises(ValueError, match="range of actions"):
        gato.write_logs(tmp_path, [gato.Episode(np.zeros((5, 2)), np.zeros((5, 1)), np.ones(5))], "unbounded")
    with pytest.raises(ValueError, match="nowhere"):
        gato.write_logs(tmp_path, list(episodes()), "unknown", "nowhere:Thing-v0")


def test_build_names_wrong_options_and_inputs(tmp_path, dataset):
    with pytest.raises(TypeError, match="held_out_share"):
        gato.build(tmp_path, tmp_path / "out", "minari", held_out_shar=0.1)
    for option, value in (("action_bounds", "lgo"), ("held_out_share", "few"), ("image_size", [64])):
        with pytest.raises(ValueError, match=f"--{option.replace('_', '-')} .*: (Input|Field)"):
            gato.build(f"{dataset.folder}/../logs", tmp_path / "out", "minari", **{option: value})
    with pytest.raises(ValueError, match="holds no log"):
        gato.build(tmp_path, tmp_path / "out")
    with pytest.raises(ValueError, match="another dataset"):
        gato.build(f"{dataset.folder}/../logs", dataset.folder, piece_timesteps=7)
    assert gato.build(f"{dataset.folder}/../logs", dataset.folder, held_out_share=0.2).manifest == dataset.manifest


def test_a_stream_is_what_training_sees_and_continues(dataset):
    stream = gato.Stream(dataset, sequence_length=60, batch_size=4, seed=3)
    batches = [batch for batch, _ in zip(stream, range(3))]
    assert batches[0].tokens.shape == (4, 60) and stream.tasks == ["my-task"]
    assert np.array_equal(batches[1].sequence, [4, 5, 6, 7])
    for number, batch in enumerate(batches):
        assert np.array_equal(batch.tokens, stream.sequences.batch(4 * number, 4).tokens)
    rest = next(iter(gato.Stream(dataset, 60, 4, seed=3, start=8)))
    assert np.array_equal(rest.tokens, batches[2].tokens)
    shares = [next(iter(gato.Stream(dataset, 60, 2, seed=3, rank=rank, world=2))) for rank in (0, 1)]
    assert np.array_equal(np.concatenate([share.tokens for share in shares]), batches[0].tokens)
    with pytest.raises(TypeError, match="prompt_probability"):
        gato.Stream(dataset, prompts=0.5)
    with pytest.raises(ValueError, match="--weights.my-task 'two': Input should be a valid number"):
        gato.Stream(dataset, weights={"my-task": "two"})
    for odd in ({"batch_size": 1.5}, {"start": 2.5}, {"seed": "x"}, {"world": True}, {"threads": None}):
        with pytest.raises(TypeError, match=rf"Stream\({next(iter(odd))}=.*: give an integer"):
            gato.Stream(dataset, **odd)
    with pytest.raises(TypeError, match="held_out='yes'.: give True or False"):
        gato.Stream(dataset, held_out="yes")


SMALL = {
    "model.blocks": 1, "model.heads": 2, "model.width": 32, "model.feed_forward": 64, "model.head_size": 16,
    "model.patch_channels": 16, "data.global_batch": 4, "data.micro-batch": 2, "data.stream.sequence_length": 60,
    "data.stream.mixture_block": 8, "run.log_every": 1, "run.evaluate_sequences": 2,
}  # fmt: skip


@pytest.mark.process
def test_training_returns_an_export_and_resumes(dataset, tmp_path, capfd):
    export = gato.train("tiny", dataset, tmp_path / "run", steps=2, **SMALL)
    assert export == tmp_path / "run" / "export" and (export / "model.json").is_file()
    assert gato.train("tiny", [dataset], tmp_path / "run", steps=3, **SMALL) == export
    assert "resuming at step 2" in capfd.readouterr().out
    with pytest.raises(gato.TrainingError, match="another configuration.*seed 1"):
        gato.train("tiny", dataset, tmp_path / "run", steps=4, seed=1, **SMALL)


def test_training_checks_settings_before_it_starts(dataset, tmp_path):
    with pytest.raises(TypeError, match="optimiser.peak_lr"):
        gato.train("tiny", dataset, tmp_path, **{"optimiser.peak_rate": 1.0})
    with pytest.raises(ValueError, match="--optimiser.peak-lr"):
        gato.train("tiny", dataset, tmp_path, **{"optimiser.peak_lr": -1.0})
    with pytest.raises(ValueError, match="--steps 0: must be from 1 to "):
        gato.train("tiny", dataset, tmp_path, steps=0)
    with pytest.raises(ValueError, match="unknown recipe 'tinny'; perhaps tiny"):
        gato.train("tinny", dataset, tmp_path)
    with pytest.raises(TypeError, match="recipe=3: give a recipe's name, such as 'tiny'"):
        gato.train(3, dataset, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.process
def test_importing_gato_loads_nothing_heavy():
    code = "import sys, gato; gato.__all__; print([m for m in ('torch', 'numpy', 'apache_beam') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
