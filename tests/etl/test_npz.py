"""Arrays of .npz files: rows as numpy reads them, in any order; a changed byte is damage."""

import numpy as np
import pytest

from etl.sources import _npz
from schemas.episode import EpisodeError

ARRAYS = {
    "random": np.random.default_rng(0).integers(0, 256, (400, 40), np.uint8),  # packs to its own size
    "smooth": np.arange(300 * 500, dtype=np.float64).reshape(300, 500) // 1000,  # packs to a few bytes
    "flags": np.arange(201) == 0,
    "none": np.zeros((0, 3), np.float32),
}
SAVED = {"stored": np.savez, "deflated": np.savez_compressed}


@pytest.mark.parametrize("saved", SAVED)
@pytest.mark.parametrize("piece", [97, _npz.PACKED])
def test_rows_are_numpys_forwards_and_back(tmp_path, monkeypatch, saved, piece):
    monkeypatch.setattr(_npz, "PACKED", piece)
    SAVED[saved](tmp_path / "log.npz", **ARRAYS)
    file = _npz.Npz(tmp_path / "log.npz")
    assert set(file.columns) == set(ARRAYS)
    for key, values in ARRAYS.items():
        column = file.columns[key]
        assert (column.shape, column.dtype) == (values.shape, values.dtype)
        for rows in (slice(0, 1), slice(1, 70), slice(150, 151), slice(0, None), slice(20, 60), slice(5, 5)):
            np.testing.assert_array_equal(column[rows], values[rows])
    file.close()


@pytest.mark.parametrize("saved", SAVED)
def test_a_changed_byte_is_damage(tmp_path, saved):
    SAVED[saved](tmp_path / "log.npz", random=ARRAYS["random"])
    data = bytearray((tmp_path / "log.npz").read_bytes())
    data[5000] ^= 1
    (tmp_path / "log.npz").write_bytes(data)
    column = _npz.Npz(tmp_path / "log.npz").columns["random"]
    with pytest.raises(EpisodeError, match="corrupt npz"):
        column[:]
