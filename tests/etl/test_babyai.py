"""BabyAI from the bot's play to tokens: pictures as minigrid draws them, instructions as text, both decoded back."""

import gymnasium
import minigrid
import numpy as np
import pytest
from minigrid.utils.baby_ai_bot import BabyAIBot
from minigrid.wrappers import RGBImgPartialObsWrapper

import simulators
from etl import sources
from etl.sources import SourceError, babyai
from etl.tokenizers import image
from etl.tokenizers.text import TextTokenizer
from etl.tokenizers.timestep import TimestepTokenizer
from schemas.layout import ACTION, TEXT
from shards.reader import Dataset
from shards.stream import Stream, StreamConfig
from simulators.experts import policies
from simulators.rollout import rollout
from simulators.suites import minigrid as gridworld
from tests.conftest import run

LEVEL = "BabyAI-GoToLocal-v0"


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    folder = tmp_path_factory.mktemp("babyai")
    run("etl.record", "--environment", LEVEL, "--steps", "150", "--output", folder)
    return folder


@pytest.fixture(scope="module")
def built(log):
    run("etl.build", "--source", "babyai", "--input", log, "--output", log / "shards")
    return log / "shards"


@pytest.mark.parametrize("level", [LEVEL, "BabyAI-UnlockPickup-v0", "BabyAI-PutNextLocal-v0"])
def test_pictures_equal_minigrids_own(level):
    gymnasium.register_envs(minigrid)
    raw = gymnasium.make(level)
    shown = RGBImgPartialObsWrapper(raw, tile_size=gridworld.TILE)
    observation, _ = shown.reset(seed=3)
    bot, ended = BabyAIBot(raw.unwrapped), False
    while not ended:
        view = raw.unwrapped.gen_obs()["image"]
        np.testing.assert_array_equal(gridworld.draw(view[None])[0], observation["image"])
        observation, _, terminated, truncated, _ = shown.step(bot.replan())
        ended = terminated or truncated


def test_a_cell_that_minigrid_does_not_know_is_refused():
    with pytest.raises(ValueError, match="no cell"):
        gridworld.draw(np.full((1, 7, 7, 3), 99, np.uint8))


def episodes(log):
    files = babyai.SOURCE.resolve(log, None, log)
    (scan,) = babyai.SOURCE.scan(files, babyai.SOURCE.options())
    return scan.task, list(sources.read(babyai.SOURCE, scan.task, scan.episodes))


def test_tokens_decode_to_the_log(log, built):
    task, read = episodes(log)
    dataset = Dataset(built)
    tokenizer = TimestepTokenizer(
        task, dataset.manifest.vocabulary, TextTokenizer(built / "text.model", dataset.manifest.vocabulary)
    )
    assert [spec.key for spec in tokenizer.fields] == ["mission", "image", "direction"]
    for row in range(dataset.index.num_rows):
        episode = next(e for e in read if e.position == dataset.index.column("position")[row].as_py())
        back = tokenizer.decode_observation(dataset.tokens(row)[:, :-1])
        assert list(back["mission"]) == list(episode.observation["mission"])
        np.testing.assert_array_equal(back["direction"], episode.observation["direction"])
        np.testing.assert_array_equal(tokenizer.decode_action(dataset.tokens(row)[:, -1:]), episode.action)
        frames = image.from_patches(dataset.patches(row), 4, 4)
        np.testing.assert_array_equal(frames[:, :56, :56], episode.observation["image"])
        assert not frames[:, 56:].any() and not frames[:, :, 56:].any()


def test_the_bot_solves_its_levels_and_the_log_says_so(built):
    (task,) = Dataset(built).manifest.tasks
    assert task.returns[0] > 0 and task.cut_episodes == 0
    assert task.spec.environment.suite == "minigrid" and task.spec.environment.id == LEVEL


def test_a_simulator_gives_the_logs_tokens(log, built):
    """The recorder's first level again: what an agent will see there is what the log holds."""
    task, read = episodes(log)
    observation, _ = simulators.make(task.environment).reset(seed=0)
    first = next(e for e in read if e.position == 0)
    for key, value in observation.items():
        np.testing.assert_array_equal(value, first.observation[key][0])


def test_no_loss_on_padding(built):
    stream = Stream([built], StreamConfig(sequence_length=256, prompt_probability=0.0), seed=0)
    padding = stream.datasets[0].manifest.text_model.padding
    sequence = stream.sequence(0)
    text = sequence.roles == TEXT
    assert (text & (sequence.tokens == padding)).any()
    assert not (sequence.supervised & text & (sequence.tokens == padding)).any()
    assert (sequence.supervised & text & (sequence.tokens != padding)).any()
    assert sequence.supervised[sequence.roles == ACTION].all()


def test_instructions_that_are_too_long_are_counted(log, tmp_path):
    done = run("etl.build", "--source", "babyai", "--input", log, "--output", tmp_path / "d", "--text-tokens", "3")
    assert "--text-tokens" in done.stderr and Dataset(tmp_path / "d").manifest.tasks[0].cut_texts > 100


def test_a_relative_output_is_where_it_says(tmp_path):
    run("etl.record", "--environment", LEVEL, "--steps", "20", "--output", "logs", cwd=tmp_path)
    run("etl.build", "--source", "babyai", "--input", "logs", "--output", "d", cwd=tmp_path)
    assert Dataset(tmp_path / "d").index.num_rows


def test_the_bot_takes_no_noise(tmp_path):
    done = run("etl.record", "-e", LEVEL, "--noise", "0.1", "--steps", "20", "-o", tmp_path, check=False)
    assert done.returncode == 1 and "leave --noise out" in done.stderr


def test_without_minigrid_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(type(gridworld.SUITE), "module", "a_package_that_is_not_there")
    with pytest.raises(SourceError, match=r"pip install 'gato-open\[minigrid\]'"):
        babyai.SOURCE.scan([], babyai.SOURCE.options())


def test_a_plan_that_searches_without_end_is_given_up():
    """With seed 6 of this level minigrid's own bot never returns from one of its plans."""
    env = simulators.make(simulators.environment_spec("BabyAI-GoToImpUnlock-v0"))
    policy = policies.load("expert", env)
    steps = list(rollout(policy, [env], [6], np.random.default_rng(0)))
    assert 1 < policy.player.tries <= policy.player.TRIES and steps[-1].ended and steps[-1].error is None
