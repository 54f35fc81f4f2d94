"""Copies of unpacked gzip files: gzip's own bytes with and without them, whatever happens to the files."""

import gzip
import io
import random
import resource
from contextlib import nullcontext

import numpy as np
import pytest
from rich.console import Console

from etl import build
from etl.building import pipeline
from etl.building.plan import BuildConfig
from etl.sources import _unpacked
from etl.sources._gzip import DAMAGE, Gunzip
from etl.sources._tfrecord import frame
from etl.sources._unpacked import copies, opened
from tests.etl.tfexample import written

SIZE = 300_000


@pytest.fixture(scope="module")
def content():
    return np.random.default_rng(0).integers(0, 64, SIZE, np.uint8).tobytes()


@pytest.fixture
def path(tmp_path, content):
    path = tmp_path / "x.gz"
    path.write_bytes(gzip.compress(content[: SIZE // 2]) + gzip.compress(content[SIZE // 2 :]))
    return path


@pytest.fixture
def unpacked(monkeypatch):
    """Counts the bytes that are unpacked."""
    counts, piece = [0], Gunzip._piece

    def counted(file, most):
        found = piece(file, most)
        counts[0] += len(found)
        return found

    monkeypatch.setattr(Gunzip, "_piece", counted)
    return counts


def whole(file, count=7000):
    file.seek(0)
    return b"".join(iter(lambda: file.read(count), b""))


@pytest.mark.parametrize("kept", [True, False])
def test_any_order_of_reads(path, content, kept, unpacked):
    rng = random.Random(0)
    with copies() if kept else nullcontext():
        for _ in range(2):
            file = opened(path)
            for _ in range(50):
                start, count = rng.randrange(SIZE), rng.randrange(1, 5000)
                file.seek(start)
                assert file.read(count) == content[start : start + count]
            assert whole(file) == content and file.read(1) == b""
            file.close()
        for _ in range(2):  # copied where it is read from the front
            unpacked[0] = 0
            assert whole(opened(path)) == content
        assert unpacked[0] == (0 if kept else SIZE)


def test_a_file_read_back_and_forth_is_unpacked_once(path, content, unpacked):
    with copies():
        file = opened(path)
        assert file.read(100) == content[:100]
        assert whole(file) == content
        unpacked[0] = 0
        assert whole(file) == content
        other = opened(path)
        other.seek(SIZE - 5)
        assert other.read(10) == content[-5:] and unpacked[0] == 0
    file.seek(0)  # no longer kept
    assert file.read(SIZE) == content == whole(other) and unpacked[0] == 2 * SIZE


def test_two_files_at_once(path, tmp_path, content, unpacked):
    second = tmp_path / "y.gz"
    second.write_bytes(gzip.compress(content[::-1]))
    with copies():
        files = [opened(path), opened(second)]
        parts = [[file.read(9000) for file in files] for _ in range(SIZE // 9000 + 1)]
        assert b"".join(a for a, _ in parts) == content and b"".join(b for _, b in parts) == content[::-1]
        for _ in range(2):  # the second is copied once it is read alone
            assert whole(opened(second)) == content[::-1]
        unpacked[0] = 0
        assert whole(opened(path)) == content and whole(opened(second)) == content[::-1] and not unpacked[0]


@pytest.mark.parametrize("how", ["closed", "cut", "replaced", "no room", "full disk"])
def test_what_cannot_be_copied_is_unpacked(path, content, unpacked, monkeypatch, how):
    monkeypatch.setattr(_unpacked, "MEMORY_SHARE", 2**60 if how == "no room" else 4)
    expected, data = content, path.read_bytes()
    with copies():
        file = opened(path)
        assert file.read(SIZE // 3) == content[: SIZE // 3]
        if how == "closed":
            file.close()
        elif how == "cut":
            path.write_bytes(data[:-20])
            with pytest.raises(DAMAGE):
                whole(opened(path))
            path.write_bytes(data)
        elif how == "replaced":
            assert whole(file) == content
            expected = content[::-1]
            path.unlink()
            path.write_bytes(gzip.compress(expected))
        elif how == "full disk":
            limits = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE // 2, limits[1]))
            try:
                assert whole(file) == content
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        unpacked[0] = 0
        assert whole(opened(path)) == expected and unpacked[0] == SIZE


def test_a_build_unpacks_once_and_writes_the_same_bytes(tmp_path, unpacked, monkeypatch):
    folder, size = tmp_path / "walker", 0
    folder.mkdir()
    rng = np.random.default_rng(0)
    for n in range(3):
        records = []
        for episode in range(4):
            lists = {"observation/x": rng.normal(size=33 * 50), "action": rng.uniform(-1, 1, 33 * 2)}
            lists |= {"reward": rng.normal(size=33), "discount": np.ones(33), "step_type": np.r_[0, np.ones(31), 2]}
            floats = {key: values.astype(np.float32) for key, values in lists.items()}
            records.append(frame(written(**floats, episode_id=[200 * n + episode], timestamp=[1])))
        size += len(b"".join(records))
        (folder / f"train-0000{n}-of-00003").write_bytes(gzip.compress(b"".join(records)))
    found = []
    for kept in (True, False):
        monkeypatch.setattr(pipeline, "in_process", lambda flags, kept=kept: kept)
        unpacked[0], output = 0, tmp_path / str(kept) / "out"
        config = BuildConfig(shard_megabytes=0.01)
        options = build.Options(source="rl_unplugged", input=str(folder), output=str(output), config=config)
        build.build(options, build.beam_flags([], 1), Console(file=io.StringIO()))
        found.append({one.name: one.read_bytes() for one in output.iterdir()})
        # the first record of a file is looked at before
        assert (unpacked[0] <= 1.3 * size) is kept
    assert found[0] == found[1] and len(found[0]) > 6
