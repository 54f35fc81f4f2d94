"""Which episodes stay: the paper's rule against a slow reading of it, counts, caps, exact copies."""

import json

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from etl.building import filters
from etl.building.filters import Filter
from schemas.dataset import load_manifest
from tests.conftest import run
from tests.etl.test_build import d4rl_file

returns = st.lists(st.floats(-1e4, 1e4), min_size=1, max_size=60)


def slow_expert(values):
    """Paper §3, word for word: the best mean of W successive returns."""
    window = max(1, int(min(1000, 0.1 * len(values))))
    return max(sum(values[j : j + window]) / window for j in range(len(values) - window + 1))


@given(returns)
def test_the_experts_return_is_the_best_window(values):
    assert filters.expert_return(np.array(values)) == pytest.approx(slow_expert(values), rel=1e-9, abs=1e-6)


@given(returns)
def test_a_share_never_asks_for_more_than_the_expert(values):
    expert = filters.expert_return(np.array(values))
    assert filters.threshold(np.array(values), 0.8) <= expert
    assert filters.threshold(np.array(values), 1.0) == expert


def rewarded(path, totals, length=10):
    """A D4RL file whose n-th episode has the n-th return."""
    rewards = np.repeat(np.array(totals, np.float32) / length, length)
    return d4rl_file(path, episodes=len(totals), length=length, rewards=rewards)


def kept(folder):
    lines = [json.loads(line) for line in (folder / "rejected.jsonl").read_text().splitlines()]
    (task,) = load_manifest(folder).tasks
    return task, lines


@pytest.mark.parametrize(
    ("flags", "episodes"),
    [
        (("--min-return", "35"), 7),
        (("--expert-share", "0.8"), 3),  # ten episodes: a window of one, the expert's return 100
        (("--first-episodes", "4"), 4),
        (("--min-return", "35", "--first-episodes", "2"), 2),
        (("--max-timesteps", "55"), 5),
    ],
)
def test_filters_keep_what_they_say(tmp_path, flags, episodes):
    path = rewarded(tmp_path / "x-medium-v4.hdf5", [10, 20, 30, 40, 50, 60, 70, 80, 90, 100])
    run("etl.build", "--input", path, "--output", tmp_path / "d", *flags)
    task, lines = kept(tmp_path / "d")
    assert (task.episodes, task.filtered_episodes, lines) == (episodes, 10 - episodes, [])
    if "--min-return" in flags:
        assert task.returns[0] >= 35


def test_filters_that_leave_nothing_say_so(tmp_path):
    path = rewarded(tmp_path / "x-medium-v4.hdf5", [1, 2])
    done = run("etl.build", "--input", path, "--output", tmp_path / "d", "--min-return", "99", check=False)
    assert done.returncode == 1 and "filters left out all of its 2 episodes" in done.stderr


def test_exact_copies_are_rejected_unless_wanted(tmp_path):
    path = d4rl_file(tmp_path / "x-medium-v4.hdf5", episodes=6, length=10)
    with h5py.File(path, "r+") as file:
        for key in ("observations", "actions", "rewards"):
            file[key][40:50] = file[key][10:20]
    run("etl.build", "--input", path, "--output", tmp_path / "d")
    task, lines = kept(tmp_path / "d")
    assert task.episodes == 5 and [(r["position"], r["reason"]) for r in lines] == [(4, "duplicate")]
    assert "episode 1" in lines[0]["detail"]
    run("etl.build", "--input", path, "--output", tmp_path / "e", "--keep-duplicates")
    assert kept(tmp_path / "e")[0].episodes == 6


def test_equal_returns_alone_make_no_copy(tmp_path):
    path = d4rl_file(tmp_path / "x-medium-v4.hdf5", episodes=6, length=10, rewards=np.zeros(60, np.float32))
    run("etl.build", "--input", path, "--output", tmp_path / "d")
    assert kept(tmp_path / "d")[0].episodes == 6


def test_a_filter_is_kept_in_the_manifest_and_another_is_another_dataset(tmp_path):
    path = rewarded(tmp_path / "x-medium-v4.hdf5", [10, 20, 30])
    run("etl.build", "--input", path, "--output", tmp_path / "d", "--min-return", "15")
    assert load_manifest(tmp_path / "d").config["filter"] == vars(Filter(min_return=15.0))
    done = run("etl.build", "--input", path, "--output", tmp_path / "d", "--min-return", "25", check=False)
    assert done.returncode == 1 and "--overwrite" in done.stderr
