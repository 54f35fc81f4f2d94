"""Own arrays to a log, a dataset, batches and a training, from Python."""

import json
import subprocess
import sys

import numpy as np
import pytest
from gymnasium import spaces

import gato
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
        ({"actions": np.full(5, 7)}, "outside Discrete"),
        ({"actions": np.zeros((5, 2), int)}, "actions: shape"),
        ({"reward": np.ones(5)}, "unknown key 'reward'"),
        ({"observations": np.zeros((5, 2), np.int32)}, "give observation_space"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, change, message):
    good = {"observations": np.zeros((5, 2)), "actions": np.zeros(5, int), "rewards": np.ones(5)}
    with pytest.raises(ValueError, match=message):
        gato.write_logs(tmp_path, [good | change], "wrong", action_space=spaces.Discrete(3))
    assert not list(tmp_path.rglob("*"))


def test_the_range_of_actions_is_never_assumed(tmp_path):
    with pytest.raises(ValueError, match="range of actions"):
        gato.write_logs(tmp_path, [gato.Episode(np.zeros((5, 2)), np.zeros((5, 1)), np.ones(5))], "unbounded")
    with pytest.raises(ValueError, match="nowhere"):
        gato.write_logs(tmp_path, list(episodes()), "unknown", "nowhere:Thing-v0")


def test_build_names_wrong_options_and_inputs(tmp_path, dataset):
    with pytest.raises(TypeError, match="held_out_share"):
        gato.build(tmp_path, tmp_path / "out", "minari", held_out_shar=0.1)
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
    with pytest.raises(ValueError, match="unknown recipe 'tinny'; perhaps tiny"):
        gato.train("tinny", dataset, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.process
def test_importing_gato_loads_nothing_heavy():
    code = "import sys, gato; gato.__all__; print([m for m in ('torch', 'numpy', 'apache_beam') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
