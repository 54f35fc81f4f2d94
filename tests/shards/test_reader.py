"""Whole datasets open, damaged ones are refused by name; plain webdataset reads the shards."""

import json
import shutil

import numpy as np
import pytest
import webdataset

from schemas.dataset import DatasetError
from shards.reader import Dataset
from shards.verify import verify
from shards.views import trajectories
from tests.conftest import run


@pytest.fixture
def copy(pong, tmp_path):
    return shutil.copytree(pong, tmp_path / "pong")


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def shard(folder):
    return sorted(folder.glob("shard-*.tar"))[0]


DAMAGE = {
    "flipped byte in a shard": (lambda f: flip(shard(f)), "shard-000000.tar: sha256 differs"),
    "flipped byte in the index": (lambda f: flip(f / "index.arrow"), "index.arrow: sha256 differs"),
    "truncated shard": (lambda f: shard(f).write_bytes(shard(f).read_bytes()[:-512]), "the manifest says"),
    "missing shard": (lambda f: shard(f).unlink(), "shard-000000.tar: missing"),
    "missing index": (lambda f: (f / "index.arrow").unlink(), "index.arrow: missing"),
    "empty manifest": (lambda f: (f / "dataset.json").write_text(""), "dataset.json: not JSON"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_named(copy, what):
    Dataset(copy)
    damage, message = DAMAGE[what]
    damage(copy)
    with pytest.raises(DatasetError, match=message):
        Dataset(copy)
    done = run("shards.verify", copy, "--full", check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1


def test_verify_looks_at_every_folder_and_wants_one(copy, tmp_path):
    assert run("shards.verify", check=False).returncode == 2
    done = run("shards.verify", tmp_path / "none", copy, check=False)
    assert done.returncode == 1 and "none" in done.stderr and "whole" in done.stdout


def test_the_manifests_counts_are_the_indexs(copy):
    manifest = json.loads((copy / "dataset.json").read_text())
    manifest["tasks"][0]["timesteps"] -= 1
    (copy / "dataset.json").write_text(json.dumps(manifest))
    with pytest.raises(DatasetError, match="counts"):
        verify(copy, full=False)


def test_full_verification_passes(hopper, pong):
    assert verify(hopper, full=True).index.num_rows > 10
    assert verify(pong, full=True).index.num_rows >= 3


def test_unmodified_webdataset_reads_the_same_arrays(pong):
    dataset = Dataset(pong)
    urls = [str(pong / name) for name in dataset.shards.column("name").to_pylist()]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert len(samples) == dataset.index.num_rows
    for row, sample in enumerate(samples):
        assert np.array_equal(sample["tokens.npy"], dataset.tokens(row))
        assert np.array_equal(sample["patches.npy"], dataset.patches(row))
        assert np.array_equal(sample["reward.npy"], dataset.reward(row))
        assert sample["meta.json"]["timesteps"] == len(dataset.tokens(row))


def test_arrays_are_views_not_copies(hopper):
    dataset = Dataset(hopper)
    assert not dataset.tokens(0).flags.owndata and not dataset.tokens(0).flags.writeable
    for name in ("split_stop", "timesteps", "shard", "tokens_offset"):
        mapped = dataset.index.column(name).chunk(0).buffers()[1]
        assert dataset.column(name).ctypes.data == mapped.address, f"{name} was copied"


def test_trajectories_join_the_pieces_of_an_episode(hopper, pong):
    dataset = Dataset(pong)
    episodes = trajectories(dataset, 0) + trajectories(dataset, 0, held_out=True)
    assert sum(len(e.reward) for e in episodes) == dataset.manifest.tasks[0].timesteps
    assert max(len(e.reward) for e in episodes) > 100, "pieces hold 100 timesteps"
    assert episodes[0].frames.shape[1:] == (64, 80, 1) and episodes[0].action.max() < 6
    first = trajectories(Dataset(hopper), 0)[0]
    assert first.observation.shape[1:] == (11,) and first.action.shape[1:] == (3,) and first.complete
