"""Logs recorded from the real simulators and datasets built from them, once a session."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.commands import run

# a shell starts what runs in its background with SIGINT ignored, which all processes started here would inherit
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def logs(tmp_path_factory) -> Path:
    """d4rl/hopper-random-v4.hdf5 and dqn_replay/Pong/1: some 1,500 and 300 timesteps."""
    folder = tmp_path_factory.mktemp("logs")
    hopper, pong = folder / "d4rl", folder / "dqn_replay"
    run("etl.record", "--environment", "Hopper-v4", "--policy", "random", "--steps", "1500", "--output", hopper)
    run("etl.record", "--environment", "ALE/Pong-v5", "--policy", "expert", "--steps", "300", "--output", pong)
    return folder


@pytest.fixture(scope="session")
def hopper(logs, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards") / "hopper"
    run("etl.build", "--source", "d4rl", "--input", logs / "d4rl", "--output", folder, "--shard-megabytes", "0.05")
    return folder


@pytest.fixture(scope="session")
def pong(logs, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards") / "pong"
    arguments = ("--source", "atari", "--input", logs / "dqn_replay", "--output", folder)
    run("etl.build", *arguments, "--piece-timesteps", "100")
    return folder
