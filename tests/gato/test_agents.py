"""Agents in one's own loop: they act as the comparison plays them, and refuse what they cannot use."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import fsspec
import gymnasium
import numpy as np
import pytest
import torch

import gato
from eval.exports import WEIGHTS, find_export
from eval.rows import load_rows
from gato.agents import Model
from gato.observations import Observations
from schemas.task import ActionSpec, EnvironmentSpec, FieldSpec, TaskSpec
from schemas.vocabulary import DISJOINT
from shards.cache import CacheConfig
from trainer.model import Gato, ModelConfig
from trainer.model.export import ExportInfo, TrainingInfo

SMALL = ModelConfig(blocks=1, heads=2, width=32, feed_forward=64, head_size=16, patch_channels=16)
STEPS = 60


@pytest.fixture(scope="module")
def model():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the comparison does: the last digits of a float depend on it
    yield gato.load("tiny", device="cpu")
    torch.set_num_threads(threads)


def untrained(*tasks: TaskSpec) -> Model:
    info = ExportInfo("gato.model", 1, SMALL, DISJOINT, DISJOINT.fingerprint, 400, 0, tasks, {}, TrainingInfo(seed=3))
    return Model(Gato(SMALL, DISJOINT).initialise(3).eval(), info, WEIGHTS / "tiny")


def task(name, fields, action, environment="Own-v0"):
    return TaskSpec(name, "d4rl", fields, action, EnvironmentSpec("gymnasium", environment))


def played(agent, seed, steps=STEPS):
    env = gymnasium.make("Hopper-v4")
    observation, _ = env.reset(seed=seed)
    agent.reset(seed=seed)
    total, ended = 0.0, False
    while not ended and steps:
        observation, reward, terminated, truncated, _ = env.step(agent.act(observation))
        total, ended, steps = total + float(reward), terminated or truncated, steps - 1
    return total


@pytest.mark.parametrize("decoding", ["auto", "sample"])
def test_a_loop_of_ones_own_earns_what_the_comparison_shows(model, tmp_path, decoding):
    options = {"models": ["gato"], "tasks": ["hopper-medium-v4"], "episodes": 2, "step_limit": STEPS, "processes": 1}
    options |= {"film_seconds": 0.0, "root": str(tmp_path), "agent": {"decoding": decoding}}
    outcome = gato.compare(gato="tiny", output=tmp_path / "out", **options)
    rows = outcome.rows.to_pylist()
    agent = model.agent("hopper-medium-v4", decoding=decoding)
    assert [played(agent, row["episode_seed"]) for row in rows] == [row["return"] for row in rows]
    assert outcome.error == "" and "| hopper-medium-v4 | Hopper-v4 |" in outcome.table and outcome.report.is_file()
    assert load_rows(tmp_path / "out/rows.parquet").equals(outcome.rows)


def test_a_batch_acts_as_each_one_alone(model):
    observations = np.random.default_rng(0).normal(size=(5, 3, 11))
    agent, alone = (model.agent("hopper-medium-v4", decoding="sample") for _ in range(2))
    agent.reset(batch=3, seed=7)
    together = [agent.act(each, reward=np.zeros(3)) for each in observations]
    assert together[0].shape == (3, 3) and together[0].dtype == np.float32
    alone.reset(seed=8)
    assert all(np.array_equal(alone.act(each[1]), three[1]) for each, three in zip(observations, together))
    agent.reset(batch=3, seed=[7, 1, 9])
    active = np.array([True, False, True])
    for each, three in zip(observations, together):
        actions = agent.act({"observation": each}, active=active)
        assert np.array_equal(actions[[0, 2]], three[[0, 2]]) and not actions[1].any()
    with pytest.raises(ValueError, match="episode 1 had ended"):
        agent.act(observations[0], active=np.ones(3, bool))


def test_what_an_ended_environment_shows_is_ignored():
    agent = untrained(NESTED).agent()
    good = {"arm/angle": np.zeros((3, 2)), "arm/grip": np.zeros(3, int), "camera": np.zeros((3, 32, 32, 1), np.uint8)}
    bad = good | {"arm/angle": np.array([[0, 0], [np.nan, 0], [0, 0]]), "arm/grip": np.array([0, 99, 0])}
    agent.reset(batch=3)
    expected = [agent.act(good), agent.act(good, active=[True, False, True])]
    agent.reset(batch=3)
    assert np.array_equal(agent.act(good), expected[0])
    for active in ([False] * 3, [True] * 2, [True] * 3):  # refused, and forgotten
        with pytest.raises(ValueError, match="every episode has ended|active has shape|NaN"):
            agent.act(bad, active=active)
    assert np.array_equal(agent.act(bad, active=[True, False, True]), expected[1])
    assert not agent.act(bad)[1].any()  # it stays out
    with pytest.raises(ValueError, match="NaN"):
        agent.act({**bad, "arm/angle": np.full((3, 2), np.nan)})


def test_an_action_is_the_environments_own_form():
    fields = (FieldSpec("observation", "continuous", (2,)),)
    seen = np.zeros(2)
    steer = untrained(task("steer", fields, ActionSpec.discrete(3, start=-1))).agent(decoding="sample", temperature=9.0)
    steer.reset()
    actions = [steer.act(seen) for _ in range(40)]
    assert set(actions) == {-1, 0, 1} and all(type(action) is int for action in actions)
    steer.reset(batch=4)
    assert steer.act(np.zeros((4, 2))).shape == (4,)
    several = untrained(task("several", fields, ActionSpec.discrete((2, 5)))).agent()
    several.reset()
    action = several.act(seen)
    assert action.dtype == np.int64 and action.shape == (2,) and gymnasium.spaces.MultiDiscrete([2, 5]).contains(action)
    wide = untrained(task("wide", fields, ActionSpec.continuous((-2.0, 0.0), (2.0, 8.0)))).agent()
    wide.reset()
    space = gymnasium.spaces.Box(np.array([-2, 0], np.float32), np.array([2, 8], np.float32))
    assert space.contains(wide.act(seen))


NESTED = task(
    "nested",
    (
        FieldSpec("camera", "image", (32, 32, 1)),
        FieldSpec("arm/angle", "continuous", (2,)),
        FieldSpec("arm/grip", "discrete", (), choices=(4,), start=(-1,)),
    ),
    ActionSpec.continuous(-1.0, 1.0, 2),
)


def nested(**change):
    arm = {"angle": np.zeros(2, np.float32), "grip": np.int64(2)}
    return {"arm": arm, "camera": np.zeros((32, 32), np.uint8)} | change


def test_nested_observations_are_found():
    agent = untrained(NESTED).agent("Own-v0")
    agent.reset()
    first = agent.act(nested())
    agent.reset()
    flat = {"arm/angle": np.zeros(2), "arm/grip": 2, "camera": np.zeros((32, 32, 1), np.uint8)}
    assert first.shape == (2,) and np.array_equal(agent.act(flat), first)
    arrays = Observations(NESTED).check(nested(), None)
    assert {key: (value.shape, value.dtype.name) for key, value in arrays.items()} == {
        "camera": ((1, 32, 32, 1), "uint8"),
        "arm/angle": ((1, 2), "float32"),
        "arm/grip": ((1,), "int64"),
    }
    pair = task("pair", (FieldSpec("0", "continuous", (2,)), FieldSpec("1", "discrete", (), choices=(3,))), None)
    assert Observations(pair).check((np.ones(2), 2), None)["1"].tolist() == [2]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"arm": {"angle": np.zeros(2)}}, "observation 'arm/grip' is missing; task 'nested' has 'camera'"),
        ({"speed": np.zeros(1)}, "unknown observation 'speed'"),
        ({"arm": {"angle": np.zeros(2), "grip": 0, "wrist": 1.0}}, "unknown observation 'arm/wrist'"),
        ({"arm": {"angle": np.array([0, np.nan]), "grip": 0}}, "'arm/angle' holds NaN or infinity"),
        ({"arm": {"angle": np.zeros(3), "grip": 0}}, r"'arm/angle' has shape \(3,\): the task has \(2,\)"),
        ({"arm": {"angle": np.zeros(2, int), "grip": 0}}, "'arm/angle' is int64, .* floats"),
        ({"arm": {"angle": np.zeros(2), "grip": 3}}, r"'arm/grip' is 3, outside \[-1, 2\]"),
        ({"arm": {"angle": np.zeros(2), "grip": 0.5}}, "'arm/grip' is float64, .* integers"),
        ({"camera": np.zeros((32, 32), np.float32)}, "'camera' is float32, the task has an image field: .* uint8"),
        ({"camera": np.zeros((32, 32, 3), np.uint8)}, r"'camera' has shape \(32, 32, 3\)"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    agent = untrained(NESTED).agent()
    agent.reset()
    with pytest.raises(ValueError, match=message):
        agent.act(nested(**change))


def test_a_call_out_of_order_is_refused(model):
    one, eight = np.zeros(11), np.zeros((8, 11))
    agent = model.agent("hopper-medium-v4")
    with pytest.raises(ValueError, match="act before reset; call agent.reset"):
        agent.act(one)
    agent.reset(batch=8)
    with pytest.raises(ValueError, match=r"single one, after reset\(batch=8\)"):
        agent.act(one)
    agent.reset()
    with pytest.raises(ValueError, match=r"a batch of 8; call agent.reset\(batch=8\) first"):
        agent.act(eight)
    with pytest.raises(ValueError, match="observation, info = env.reset"):
        agent.act((one, {"seed": 1}))
    with pytest.raises(ValueError, match="give the number of environments"):
        agent.reset(batch=0)
    with pytest.raises(ValueError, match="'observation' is no array: its rows differ in length"):
        agent.act([[1.0], [2.0, 3.0]])
    with pytest.raises(ValueError, match="reward='x': give a number"):
        agent.act(one, reward="x")
    for active in ("no", 0.5, [1]):
        with pytest.raises(ValueError, match="give True for each environment whose episode runs"):
            agent.act(one, active=active)
    for batch in ("x", 2.5, True):
        with pytest.raises(TypeError, match="an integer of 1 or more"):
            agent.reset(batch=batch)
    agent.reset(batch=np.int64(8), seed=np.int64(3))
    assert agent.act(eight).shape == (8, 3)
    with pytest.raises(ValueError, match="2 seeds for 8 environments"):
        agent.reset(batch=8, seed=[1, 2])
    with pytest.raises(ValueError, match="give a seed of 0 or more"):
        agent.reset(seed=-1)
    for seed in (None, 1.5, "one"):
        with pytest.raises(TypeError, match="give an integer, or one for each environment"):
            agent.reset(seed=seed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decoding": "gready"}, "--decoding 'gready': Input should be 'auto', 'sample', 'greedy', 'mean' or 'value'"),
        ({"prompt": "beginning"}, "--prompt 'beginning': Input should be"),
        ({"window": 3}, "--window 3: Input should be 'rolling' or 'exact'"),
        ({"temperature": "warm"}, "--temperature 'warm': Input should be a valid number"),
        ({"temperature": float("nan")}, "--agent.temperature nan: must be from"),
        ({"decoding": "sample", "temperature": 0}, "--agent.temperature 0.0: must be from"),
        ({"prompt_share": 2}, "--agent.prompt-share 2.0: must be from 0 to 1"),
    ],
)
def test_an_agent_refuses_options_that_mean_nothing(model, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        model.agent("hopper-medium-v4", **options)


def test_names_that_are_not_there_are_refused_with_those_that_are(model, tmp_path):
    for name in ("tinny", tmp_path, "./tiny"):
        with pytest.raises(ValueError, match="known: suite, tiny"):
            gato.load(name)
    with pytest.raises(TypeError, match="give a shipped name such as 'tiny', a folder or a URL"):
        gato.load(None)
    for device in ("cudaa", "meta", 1.5):
        with pytest.raises(ValueError, match=rf"device {device!r} cannot be used here .*; give 'cpu'"):
            gato.load("tiny", device=device)
    with pytest.raises(ValueError, match="name one: breakout-run1, .*, hopper-medium-v4"):
        model.agent()
    with pytest.raises(ValueError, match="unknown task 'Ant-v4'; .*hopper-medium-v4"):
        model.agent("Ant-v4")
    with pytest.raises(ValueError, match="several tasks are played in 'Hopper-v4': hopper-expert-v4, hopper-medium-v4"):
        model.agent("Hopper-v4")
    with pytest.raises(ValueError, match="perhaps decoding"):
        model.agent("hopper-medium-v4", decodin="greedy")
    with pytest.raises(TypeError, match="perhaps episodes"):
        gato.compare(episods=3)
    two = untrained(NESTED, replace(NESTED, name="other"))
    with pytest.raises(ValueError, match="several tasks are played in 'Own-v0': nested, other"):
        two.agent("Own-v0")
    with pytest.raises(ValueError, match="needs a prompt"):
        two.agent("nested")
    text = untrained(replace(NESTED, observation=(FieldSpec("mission", "text", (8,)),)))
    with pytest.raises(ValueError, match="reads text, and the tokenizer is not with these weights.* dataset=FOLDER"):
        text.agent()


def test_a_url_is_fetched_once_and_checked(tmp_path, model):
    store = fsspec.filesystem("memory")
    for path in (WEIGHTS / "tiny").iterdir():
        store.pipe_file(f"/exports/tiny/{path.name}", path.read_bytes())
    cache = CacheConfig(tmp_path / "shards", attempts=1)
    folder = find_export("memory://exports/tiny", cache)
    assert folder == find_export("memory://exports/tiny/", cache) and str(tmp_path) in str(folder)
    assert gato.load(folder).info == model.info
    weights = store.cat_file("/exports/tiny/weights.safetensors")
    store.pipe_file("/exports/tiny/weights.safetensors", weights[:-1] + b"?")
    assert find_export("memory://exports/tiny", cache) == folder  # here already
    with pytest.raises(ValueError, match="weights.safetensors: has another sha256 than model.json names"):
        find_export("memory://exports/tiny", CacheConfig(tmp_path / "other" / "shards", attempts=1))
    store.rm("/exports/tiny/weights.safetensors")
    with pytest.raises(ValueError, match="weights.safetensors: is missing"):
        find_export("memory://exports/tiny", CacheConfig(tmp_path / "other" / "shards", attempts=1))
    with pytest.raises(ValueError, match="no model.json there"):
        find_export("memory://exports", cache)
    store.pipe_file("/exports/other/model.json", json.dumps([1]).encode())
    with pytest.raises(ValueError, match="not an export"):
        find_export("memory://exports/other", cache)


@pytest.mark.process
def test_importing_gato_imports_nothing_heavy():
    code = "import sys, gato; print(sorted({'torch', 'numpy', 'pyarrow', 'gymnasium', 'deepspeed'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert done.stdout.strip() == "[]", done.stderr
    assert {"load", "Model", "Agent", "compare"} <= set(dir(gato))
    with pytest.raises(AttributeError, match="has no attribute 'lod'"):
        gato.lod  # noqa: B018
