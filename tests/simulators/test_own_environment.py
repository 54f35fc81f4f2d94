"""A user's own environment, from record to table, without a changed line."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import h5py
import minari
import numpy as np
import pytest
from rich.console import Console

import simulators
from etl import record, sources
from etl.sources import minari as minari_source
from eval.environments import play
from schemas.episode import ActionSpec
from shards.reader import Dataset
from simulators import plugins
from simulators.experts import PolicyError
from simulators.policy import RandomPolicy
from tests.conftest import run

HERE = Path(__file__).resolve().parent
PATH = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), *filter(None, sys.path)])}


@pytest.fixture(autouse=True)
def on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))


def recorded(folder: Path, **options) -> Path:
    return record.record(record.Options(output=folder, **options), Console(quiet=True)).path


def task_of(source: str, folder: Path, **options):
    known = sources.load(source)
    (scan,) = known.scan(known.resolve(folder, None, folder), known.options(**options))
    assert scan.task is not None, scan.rejected
    assert not scan.warnings and not scan.rejected
    return scan.task, list(sources.read(known, scan.task, scan.episodes))


@pytest.mark.process
def test_from_record_to_table(tmp_path):
    """As commands, since each is a process of its own that must find the module."""
    run("etl.record", "-e", "reach:Reach-v0", "--policy", "reach:expert", "--steps", "300", "-o", tmp_path / "logs",
        env=PATH)  # fmt: skip
    (log,) = (tmp_path / "logs").iterdir()
    assert log.name == "reach-expert-v0.hdf5"
    with h5py.File(log) as file:
        assert file.attrs["env_id"] == "reach:Reach-v0" and file["metadata/algorithm"][()] == b"reach.expert"
        np.testing.assert_allclose(file.attrs["action_low"], [-2, -0.5])
        actions = file["actions"][()]
        assert (actions >= [-2, -0.5]).all() and (actions <= [2, 1]).all()
        assert actions[:, 0].max() > 1.2  # beyond what [-1, 1] would have kept
    run("etl.build", "--source", "d4rl", "--input", log, "--output", tmp_path / "shards", env=PATH)
    spec = Dataset(tmp_path / "shards").manifest.tasks[0].spec
    assert spec.action == ActionSpec.continuous((-2.0, -0.5), (2.0, 1.0))
    assert spec.environment == simulators.environment("reach:Reach-v0") and spec.environment.suite == "gymnasium"
    done = run("eval.compare", "--datasets", tmp_path / "shards", "--models", "random", "behaviour", "--episodes", "3",
               "-o", tmp_path / "out", env=PATH)  # fmt: skip
    line = next(line for line in done.stdout.splitlines() if line.startswith("| reach-expert-v0"))
    random, behaviour = (float(cell.split()[0]) for cell in line.split("|")[-3:-1])
    assert random < 2 * behaviour < 0


@pytest.mark.process
def test_a_plain_id_counts_with_the_modules_import(tmp_path):
    """`--import` registers the environment in the recorder, and in each process of a comparison."""
    options = ("--import", "reach", "--steps", "60", "--policy", "random")
    run("etl.record", "-e", "Reach-v0", *options, "-o", tmp_path / "logs", env=PATH)
    build = ("--source", "d4rl", "--input", tmp_path / "logs", "--output", tmp_path / "shards")
    assert "unknown environment 'Reach-v0'" in run("etl.build", *build, env=PATH).stderr.replace("\n", " ")
    assert "warning" not in run("etl.build", *build, "--import", "reach", "--overwrite", env=PATH).stderr
    play = ("--datasets", tmp_path / "shards", "--models", "random", "behaviour", "--episodes", "2", "--processes", "2")
    done = run("eval.compare", *play, "--import", "reach", "-o", tmp_path / "out", env=PATH)
    assert "error" not in done.stdout
    failed = run("eval.compare", *play, "--import", "reached", "-o", tmp_path / "out", env=PATH, check=False)
    assert failed.returncode == 1 and failed.stderr.startswith("error: --import reached: ModuleNotFoundError")


def test_an_edited_module_is_another_environment(tmp_path, monkeypatch):
    """By its module's name, by --import, by an entry point in another module; not for installed packages."""
    register = "gymnasium.register('{}-v0', entry_point='edited:Edited')\n"
    edited = "import gymnasium\nfrom reach import Reach\n\n\nclass Edited(Reach):\n    pass\n\n\n"
    (tmp_path / "edited.py").write_text(edited + register.format("Edited"))
    (tmp_path / "names.py").write_text("import gymnasium\n" + register.format("Named"))
    monkeypatch.syspath_prepend(str(tmp_path))
    plugins.load(["edited"])
    specs = [simulators.environment(id) for id in ("edited:Edited-v0", "Edited-v0", "names:Named-v0")]
    before = [simulators.settings(spec) for spec in specs]
    assert [len(found["module_sha256"]) for found in before] == [1, 1, 2]
    assert before == [simulators.settings(spec) for spec in specs]
    with (tmp_path / "edited.py").open("a") as file:
        file.write("GAIN = 2\n")
    assert all(simulators.settings(spec) != found for spec, found in zip(specs, before))
    for id in ("Hopper-v4", "CartPole-v1", "minigrid:MiniGrid-Empty-5x5-v0"):
        assert "module_sha256" not in simulators.settings(simulators.environment(id))


def test_modules_in_packages_of_the_current_folder(tmp_path, monkeypatch):
    """my_tasks.reach:Id and my_tasks.reach:expert, without PYTHONPATH or --import, as a console script finds them."""
    (tmp_path / "my_tasks").mkdir()
    (tmp_path / "my_tasks/reach.py").write_text(
        "import gymnasium\nfrom reach import Reach, expert\ngymnasium.register('InPackage-v0', entry_point=Reach)\n"
    )
    monkeypatch.chdir(tmp_path)
    options = {"environment": "my_tasks.reach:InPackage-v0", "policy": "my_tasks.reach:expert", "steps": 20}
    assert recorded(tmp_path / "logs", **options).name == "inpackage-expert-v0.hdf5"
    with pytest.raises(PolicyError, match=r"my_tasks.reach:nothing: AttributeError"):
        recorded(tmp_path / "logs", **options | {"policy": "my_tasks.reach:nothing"})
    with pytest.raises(PolicyError, match=r"reach:expert.zip: no such policy file"):
        recorded(tmp_path / "logs", **options | {"policy": "my_tasks.reach:expert.zip"})


def test_nested_observations_of_every_kind(tmp_path):
    path = recorded(tmp_path, environment="reach:Cameras-v0", policy="reach:presser", steps=40)
    assert path.parts[-2:] == ("cameras", "presser-v0")
    first = next(minari.MinariDataset(path / "data").iterate_episodes())
    assert isinstance(first.observations["arm"], tuple)
    assert len(np.unique(first.observations["camera"]["left"].reshape(13, -1)[:, 0])) > 6  # one buffer, copied
    task, (episode, *_) = task_of("minari", tmp_path, text_tokens=4)
    fields = {field.key: field for field in task.observation}
    assert [field.key for field in task.observation] == [
        "arm/0", "arm/1", "buttons", "camera/left", "camera/wrist", "gears", "task",
    ]  # fmt: skip
    assert (fields["arm/1"].choices, fields["arm/1"].start) == ((4,), (2,))
    assert (fields["gears"].shape, fields["gears"].choices) == ((2,), (3, 7))
    assert (fields["camera/left"].kind, fields["camera/left"].shape) == ("image", (20, 30, 3))
    assert fields["camera/wrist"].shape == (12, 9, 1) and fields["arm/0"].shape == (2, 2)
    assert task.action == ActionSpec.discrete(3, 1) and task.environment.id == "reach:Cameras-v0"
    assert episode.action.tolist() == [2, 3, 1, 2, 3, 1, 2, 3, 1, 2, 3, 1]
    assert episode.observation["arm/1"].tolist() == [2, 3, 4, 5] * 3
    # what is played has the fields of the log, and the same first observation
    env = simulators.make(task.environment)
    assert [replace(f, shape=(4,)) if f.kind == "text" else f for f in simulators.observation_fields(env)] == [
        *task.observation
    ]
    observation, _ = env.reset(seed=0)
    for key, value in observation.items():
        np.testing.assert_array_equal(value, episode.observation[key][0])
    (one,) = play(RandomPolicy(task.action), task, [5], film=3)
    assert (one.ending, one.timesteps, one.error, one.frames) == ("terminated", 12, "", [])


def test_discrete_observations_and_several_discrete_actions(tmp_path):
    recorded(tmp_path, environment="reach:Switches-v0", policy="random", steps=40, seed=3)
    task, episodes = task_of("minari", tmp_path)
    (field,) = task.observation
    assert (field.key, field.kind, field.choices, field.start) == ("observation", "discrete", (5,), (-1,))
    assert task.action == ActionSpec.discrete((2, 4))
    actions = np.concatenate([episode.action for episode in episodes])
    assert actions.shape[1] == 2 and actions.max(axis=0).tolist() == [1, 3]
    played = play(RandomPolicy(task.action), task, [1, 2, 3])
    assert [(one.ending, one.timesteps) for one in played] == [("terminated", 8)] * 3
    (filmed,) = play(RandomPolicy(task.action), task, [1], film=9, film_every=2)
    assert [int(frame[0, 0, 0]) for frame in filmed.frames] == [0, 2, 4, 6]
    assert filmed.episode_return == played[0].episode_return


def test_a_policy_takes_a_generator_or_none(tmp_path):
    def actions(folder: str, policy: str, seed: int = 0) -> np.ndarray:
        path = recorded(tmp_path / folder, environment="reach:Reach-v0", policy=policy, steps=5, seed=seed)
        with h5py.File(path) as file:
            return file["actions"][()]

    assert (actions("a", "reach:without_rng") == 0.5).all()
    drawn = actions("b", "reach:with_rng")
    np.testing.assert_array_equal(drawn, actions("c", "reach:with_rng"))
    assert (drawn != actions("d", "reach:with_rng", seed=1)).all()


def test_what_the_command_line_says_counts_more(tmp_path):
    recorded(tmp_path / "minari", environment="reach:Switches-v0", policy="random", steps=20)
    recorded(tmp_path / "d4rl", environment="reach:Reach-v0", policy="random", steps=20)
    for source in ("minari", "d4rl"):
        known = sources.load(source)
        files = known.resolve(tmp_path / source, None, tmp_path)
        (scan,) = known.scan(files, known.options(environment="Hopper-v4"))
        assert scan.task.environment == simulators.environment("Hopper-v4")
        (scan,) = known.scan(files, known.options(environment="reach:NoSuch-v0"))
        assert "reach registers no 'NoSuch-v0'; it has Reach-v0, Cameras-v0, Switches-v0" in " ".join(scan.notes)


def test_an_entry_point_names_the_module(tmp_path):
    """A dataset that another program collected says 'Cameras-v0' and entry point 'reach:Cameras'."""
    path = recorded(tmp_path, environment="reach:Cameras-v0", policy="random", steps=20)
    metadata = path / "data/metadata.json"
    metadata.write_text(metadata.read_text().replace("reach:Cameras-v0", "Unheard-v0"))
    about = minari_source.disk.metadata(path / "data/main_data.hdf5")
    spec, _ = minari_source.SOURCE.environment(about, minari_source.Options())
    assert spec.id == "reach:Unheard-v0"


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("reach:nothing", "--policy reach:nothing: AttributeError.*MODULE:FUNCTION"),
        ("reached:expert", "--policy reached:expert: ModuleNotFoundError"),
        ("builtins:id", "--policy builtins:id: returned a int; return a function observation"),
        ("builtins:repr", "returned a str"),
        ("reach:three", r"--policy reach:three: act\(observation, rng, state\): give it .*observation, rng"),
        ("reach:failing", r"reach:failing: the policy raised KeyError: 'velocity' \(reach.py, line \d+\); correct"),
        ("reach:silent", "reach:silent: returned the action None; return 2 finite numbers"),
        ("reach:presser", "reach:presser: returned the action 2; return 2 finite numbers"),
    ],
)
def test_a_policy_that_does_not_fit(policy, message, tmp_path):
    with pytest.raises(PolicyError, match=message):
        recorded(tmp_path, environment="reach:Reach-v0", policy=policy, steps=5)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ("Reach-v9", "unknown environment 'Reach-v9'.*MODULE:Reach-v9.*--import"),
        ("reach:Reach-v9", "reach registers no 'Reach-v9'; it has Reach-v0"),
        ("reached:Reach-v0", "cannot import reached.*PYTHONPATH"),
    ],
)
def test_an_environment_that_there_is_not(environment, message):
    with pytest.raises(simulators.SimulatorError, match=message):
        simulators.environment_spec(environment)
