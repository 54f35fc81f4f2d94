"""Suites and sources of other packages: by entry point, by --import, in worker processes too."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

import simulators
from etl import sources
from shards.reader import Dataset
from simulators.suite import Suite
from tests.conftest import run

ROOT = Path(__file__).resolve().parents[2]
SUITE = """
import gymnasium
import numpy as np

from simulators import Suite

class Count(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(0, 99, (1,), np.float32)
    action_space = gymnasium.spaces.Box(-3, 3, (1,), np.float32)

    def __init__(self, length):
        self.length = length

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.n = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.n += 1
        return np.full(1, self.n, np.float32), 1.0, self.n == self.length, False, {}


class Three:
    algorithm = "three"

    def reset(self):
        pass

    def act(self, observation, rng):
        return np.full(1, 3, np.float32)


class Acme(Suite):
    name = "acme"
    distributions = ("acme",)
    experts = {"Count-": lambda env: Three()}

    def owns(self, id):
        return id.startswith("Count-")

    def require(self, id):
        pass

    def build(self, environment, render):
        return Count(12)

    def settings(self, environment):
        return {"length": 12}

    def score(self, episode_return, reference):
        return 10 * episode_return, "tenfold"


SUITE = Acme()
"""
SOURCE = '''
"""Logs as lines of numbers: observation, action, reward; an empty line ends an episode."""
from dataclasses import dataclass

import numpy as np

from etl.sources import EpisodeRef, LogOptions, SourceError, TaskScan
from schemas.episode import ActionSpec, FieldSpec, RawEpisode, TaskSpec
from simulators import environment


@dataclass(frozen=True)
class Options(LogOptions):
    separator: str = ","
    """What stands between two numbers."""


class Lines:
    name = "lines"
    default_dataset = ""
    options = Options
    writer = None

    def known(self, cache):
        return []

    def resolve(self, input, dataset, cache):
        if input is None:
            raise SourceError("give --input a folder")
        return sorted(input.glob("*.lines"))

    def scan(self, files, options):
        refs = []
        for path in files:
            row = 0
            for n, block in enumerate(path.read_text().strip().split("\\n\\n")):
                count = len(block.splitlines())
                refs.append(EpisodeRef(str(path), n, row, row + count, None))
                row += count
        fields = (FieldSpec("observation", "continuous", (1,)), FieldSpec("separator", "text", (2,)))[:1]
        spec = environment(options.environment) if options.environment else None
        self.separator = options.separator
        return [TaskScan(TaskSpec("counting", self.name, fields, ActionSpec.continuous(-3.0, 3.0), spec), tuple(refs))]

    def parts(self, file):
        from pathlib import Path

        return [Path(file)]

    def read(self, task, refs):
        for ref in refs:
            block = open(ref.file).read().strip().split("\\n\\n")[ref.position]
            numbers = np.array([line.split(",") for line in block.splitlines()], np.float32)
            yield RawEpisode({"observation": numbers[:, :1]}, numbers[:, 1:2], numbers[:, 2], True, False,
                             "counting", ref.position, ref.start)


SOURCE = Lines()
'''


@pytest.fixture
def installed(tmp_path) -> dict[str, str]:
    """The environment of a process that finds a package `acme` installed, with both entry points."""
    site = tmp_path / "site"
    about = site / "acme-1.5.dist-info"
    about.mkdir(parents=True)
    (site / "acme_suite.py").write_text(SUITE)
    (site / "acme_source.py").write_text(SOURCE)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1.5\n")
    points = "[gato.suites]\nacme = acme_suite:SUITE\n[gato.sources]\nlines = acme_source:SOURCE\n"
    (about / "entry_points.txt").write_text(points)
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(site), *filter(None, sys.path)])}


@pytest.mark.process
def test_an_installed_package_brings_a_suite_and_a_source(installed, tmp_path):
    run("etl.record", "-e", "Count-v0", "--steps", "36", "-o", tmp_path / "logs", env=installed)
    (log,) = (tmp_path / "logs").iterdir()
    assert log.name == "count-expert-v0.hdf5"
    logs = tmp_path / "lines"
    logs.mkdir()
    for n in range(3):
        blocks = ["\n".join(f"{t},{t % 4 - 1},{n}" for t in range(5 + e)) for e in range(4)]
        (logs / f"{n}.lines").write_text("\n\n".join(blocks) + "\n")
    options = ("--source", "lines", "--environment", "Count-v0", "--workers", "2", "--shard-megabytes", "0.02")
    run("etl.build", *options, "--input", logs, "--output", tmp_path / "shards", env=installed)
    dataset = Dataset(tmp_path / "shards")
    assert dataset.manifest.tasks[0].spec.environment.suite == "acme" and dataset.shards.num_rows > 1
    assert dataset.manifest.tasks[0].episodes == 12
    helped = run("etl.build", "--source", "lines", "--help", env=installed).stdout
    assert "--separator" in helped and "--frames" not in helped and "What stands between" in helped
    wrong = run("etl.build", "--source", "d4rl", "--separator", ";", env=installed, check=False)
    assert wrong.returncode == 1 and "--separator is an option of source lines" in wrong.stderr
    play = ("--datasets", tmp_path / "shards", "--models", "random", "--episodes", "2", "--processes", "1")
    table = run("eval.compare", *play, "-o", tmp_path / "out", env=installed).stdout
    assert "12.0 ± 0.0 (120.0)" in table and "tenfold" in table


@pytest.mark.process
def test_import_brings_them_to_every_worker(installed, tmp_path):
    """Without entry points: a module that registers the source, named on the command line."""
    site = tmp_path / "plain"
    site.mkdir()
    (site / "mine.py").write_text(SOURCE + "\nimport etl.sources\netl.sources.register(SOURCE)\n")
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(site), *filter(None, sys.path)])}
    logs = tmp_path / "lines"
    logs.mkdir()
    for n in range(2):
        (logs / f"{n}.lines").write_text("\n".join(f"{t},0,{n}" for t in range(9)) + "\n")
    options = ("--source", "lines", "--input", logs, "--workers", "2", "--shard-megabytes", "0.001")
    absent = run("etl.build", *options, "--output", tmp_path / "shards", env=env, check=False)
    assert absent.returncode == 1 and "unknown source 'lines'" in absent.stderr and "--import" in absent.stderr
    run("etl.build", "--import", "mine", *options, "--output", tmp_path / "shards", env=env)
    assert Dataset(tmp_path / "shards").shards.num_rows == 2


def test_a_registered_suite_is_asked_first(monkeypatch):
    class Own(Suite):
        name = "own"

        def owns(self, id):
            return id == "Hopper-v4"

    monkeypatch.setattr(simulators.registry, "_registered", {})
    simulators.register(Own())
    assert simulators.environment("Hopper-v4").suite == "own"
    assert simulators.environment("Hopper-v5").suite == "mujoco"


@pytest.mark.process
def test_a_broken_plug_in_is_named(installed, tmp_path):
    (tmp_path / "site/acme_suite.py").write_text("raise OSError('no licence')\n")
    done = run("etl.record", "-e", "Hopper-v4", "-o", tmp_path, env=installed, check=False)
    assert done.returncode == 1
    assert (
        "acme: entry point acme = acme_suite:SUITE of gato.suites cannot be loaded (OSError: no licence)" in done.stderr
    )


def test_nothing_outside_its_file_names_a_suite():
    names = "|".join(suite for suite in simulators.registry.all_suites() if suite != "gymnasium")
    ids = r"""["'](ALE|BabyAI|MiniGrid|gym)[/-]"""
    asks = re.compile(rf"""suite\s*[=!]=|startswith\(\(?{ids}|EnvironmentSpec\(["']({names})""")
    rooms = ("schemas", "simulators", "shards", "etl", "trainer", "eval")
    files = [path for room in rooms for path in (ROOT / room).rglob("*.py")]
    own = ROOT / "simulators/suites"
    found = [path for path in files if own not in path.parents and asks.search(path.read_text())]
    assert len(files) > 80 and found == []
    assert asks.search('if spec.suite == "atari"') and asks.search('id.startswith("ALE/")')


def test_every_source_says_what_its_options_mean():
    for name in sources.names():
        options = sources.load(name).options
        assert options().check() is None and options.__dataclass_params__.frozen, name
    assert sources.owners("frames") == ["atari"] and sources.owners("text_field") == ["text"]
    owners = sources.owners("environment")
    assert {"babyai", "d4rl", "minari", "lerobot"} <= set(owners) and not {"text", "imagetext", "atari"} & set(owners)
