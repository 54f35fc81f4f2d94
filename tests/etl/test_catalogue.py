"""The tables agree with the packages they describe."""

import importlib.util
import runpy
from pathlib import Path

import pytest

import simulators
from etl.sources import _catalogue
from simulators.suites.mujoco import body_reference, environments


def test_d4rl_ids_and_references():
    datasets = _catalogue.d4rl_datasets()
    assert len(datasets) == 155
    assert sum(d.score is not None for d in datasets.values()) == 147
    hopper = datasets["hopper-medium-v2"]
    assert hopper.environment == simulators.environment("Hopper-v4") and hopper.environment.suite == "mujoco"
    assert (hopper.score.low, hopper.score.high, hopper.max_episode_steps) == (-20.272305, 3234.3, 1000)
    assert datasets["antmaze-umaze-v2"].environment is None and datasets["antmaze-umaze-v2"].max_episode_steps == 700
    assert datasets["pen-human-v1"].environment.suite == "robotics"


def test_a_body_has_one_reference_in_all_versions():
    assert body_reference("Walker2d-v5").high == 4592.3
    assert body_reference("Ant-v4").low == -325.6
    assert body_reference("Humanoid-v4") is None


def test_downloads_have_distinct_names():
    stems = [Path(d.url).stem for d in _catalogue.d4rl_datasets().values()]
    assert len(set(stems)) == len(stems)


def test_suggestions():
    assert "hopper-medium-v2" in _catalogue.suggest("hoper-medium-v2", _catalogue.d4rl_datasets())
    assert _catalogue.suggest("zzzz", ["hopper"]) == ""


def test_games():
    games = _catalogue.games()
    assert sum(g.score is not None for g in games.values()) == 57
    assert sum(g.dqn_replay for g in games.values()) == 60
    assert _catalogue.game("space_invaders") == _catalogue.game("SpaceInvaders")
    assert (_catalogue.game("pong").score.low, _catalogue.game("pong").score.high) == (-20.7, 14.6)
    assert all(g.score.high > g.score.low for g in games.values() if g.score)


def test_action_sets_are_the_emulators():
    import ale_py
    from ale_py import roms

    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    emulator = ale_py.ALEInterface()
    roms_by_name = {name.replace("_", ""): name for name in roms.get_all_rom_ids()}
    for name in ("Pong", "Breakout", "SpaceInvaders", "Freeway", "Skiing", "MontezumaRevenge"):
        emulator.loadROM(roms.get_rom_path(roms_by_name[name.lower()]))
        assert _catalogue.game(name).actions == len(emulator.getMinimalActionSet()), name


def test_environments_are_gymnasiums():
    import gymnasium

    known = environments()
    registered = {id: spec for id, spec in gymnasium.registry.items() if id in known}
    assert "Hopper-v4" in registered
    for id, spec in registered.items():
        assert known[id]["max_episode_steps"] == spec.max_episode_steps, id


def test_environments_take_what_the_logs_hold():
    import gymnasium

    for dataset, size in (("hopper-medium-v2", 11), ("ant-medium-v2", 111)):
        spec = _catalogue.d4rl_datasets()[dataset].environment
        with pytest.warns(DeprecationWarning):
            environment = gymnasium.make(spec.id, **spec.kwargs)
        assert environment.observation_space.shape == (size,)
        environment.close()


def test_oracle_d4rl():
    """D4RL's own registry, loaded by file: importing the package itself needs MuJoCo 2.1."""
    found = importlib.util.find_spec("d4rl")
    if found is None or not found.submodule_search_locations:
        pytest.skip("d4rl is not installed: pip install --no-deps d4rl==1.1")
    infos = runpy.run_path(str(Path(found.submodule_search_locations[0]) / "infos.py"))
    from eval.scores import normalised

    ours = _catalogue.d4rl_datasets()
    assert {name: d.url for name, d in ours.items()} == infos["DATASET_URLS"]
    assert {name: d.score.low for name, d in ours.items() if d.score} == infos["REF_MIN_SCORE"]
    assert {name: d.score.high for name, d in ours.items() if d.score} == infos["REF_MAX_SCORE"]
    for name, low in infos["REF_MIN_SCORE"].items():
        high, value = infos["REF_MAX_SCORE"][name], 12.5
        theirs = (value - low) / (high - low)  # d4rl.get_normalized_score
        assert normalised(value, ours[name].score) == pytest.approx(100 * theirs, rel=1e-12), name
