"""The gzip stream: the bytes of gzip's own reader, forwards, backwards, and from the points to resume from."""

import gzip
import random

import numpy as np
import pytest

from etl.sources import _gzip
from etl.sources._gzip import DAMAGE, Gunzip

SIZE = 300_000


@pytest.fixture(scope="module")
def content():
    rng = np.random.default_rng(0)
    return np.repeat(rng.integers(0, 256, SIZE // 10, np.uint8), 10).tobytes()


@pytest.fixture
def path(tmp_path, content):
    path = tmp_path / "x.gz"
    path.write_bytes(gzip.compress(content[: SIZE // 2]) + gzip.compress(content[SIZE // 2 :]) + bytes(512))
    return path


@pytest.mark.parametrize("mark", [1, 1000, 2**26])
def test_any_order_of_reads(monkeypatch, path, content, mark):
    monkeypatch.setattr(_gzip, "MARK", mark)
    monkeypatch.setattr(_gzip, "CHUNK", 700)
    monkeypatch.setattr(_gzip, "PIECE", 4096)
    rng = random.Random(0)
    file = Gunzip(path)
    for _ in range(200):
        start, count = rng.randrange(SIZE), rng.randrange(1, 5000)
        file.seek(start)
        assert file.read(count) == content[start : start + count]
    file.seek(SIZE)
    assert file.read(1) == b""


def test_going_back_costs_at_most_a_mark(monkeypatch, path):
    monkeypatch.setattr(_gzip, "MARK", 10_000)
    monkeypatch.setattr(_gzip, "CHUNK", 200)
    monkeypatch.setattr(_gzip, "PIECE", 4096)
    file = Gunzip(path)
    file.seek(SIZE - 1)
    unpacked = 0
    piece = file._piece

    def counted(most):
        nonlocal unpacked
        got = piece(most)
        unpacked += len(got)
        return got

    monkeypatch.setattr(file, "_piece", counted)
    for position in (SIZE // 2 - 5, 100_000, 50_001):
        unpacked = 0
        file.seek(position)
        assert unpacked <= 10_000 + 4096


@pytest.mark.parametrize("how", ["cut", "checksum", "flipped"])
def test_damage_is_raised(path, how):
    data = bytearray(path.read_bytes()[:-512])
    if how == "cut":
        data = data[:-100]
    else:
        data[-6 if how == "checksum" else len(data) // 4] ^= 0xFF
    path.write_bytes(data)
    file = Gunzip(path)
    with pytest.raises(DAMAGE):
        while file.read(2**16):
            pass
