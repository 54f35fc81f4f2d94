"""Bytes of a shard, against tarfile and numpy, the slow references."""

import io
import tarfile

import numpy as np
import pytest

from schemas.dataset import SampleMeta
from shards.folder import Folder
from shards.writer import ShardWriter, tar_header

NAMES = ["a.tokens.npy", "hopper-medium-v2-0000001-0000000.meta.json", "x" * 100, "é" * 50, "y" * 60 + "/" + "z" * 90]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [0, 1, 511, 123_456_789, 8**11 - 1])
def test_headers_are_those_of_tarfile(name, size):
    info = tarfile.TarInfo(name)
    info.size = size
    assert tar_header(name, size) == info.tobuf(tarfile.USTAR_FORMAT, encoding="utf-8")


def test_members_are_those_of_numpy(tmp_path):
    writer = ShardWriter(Folder(tmp_path), "shard-000000.tar")
    members = {"tokens": np.arange(12, dtype=np.uint16).reshape(3, 4), "reward": np.ones(3, np.float32)}
    members["patches"] = np.asfortranarray(np.random.default_rng(0).integers(0, 256, (3, 2, 16, 16, 1), np.uint8))
    where = writer.add("a-0", members, SampleMeta("a", 0, 0, 3, 3, 0.0, terminated=True, truncated=False))
    writer.close()
    with tarfile.open(tmp_path / "shard-000000.tar") as tar:
        for name, array in members.items():
            np.testing.assert_array_equal(np.load(io.BytesIO(tar.extractfile(f"a-0.{name}.npy").read())), array)
            assert where[f"{name}_bytes"] == array.nbytes
