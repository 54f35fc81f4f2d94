"""HDF5 files of unknown origin: rows unpacked here equal h5py's, and what kills libhdf5 kills only a child."""

import os
import resource
import subprocess
import sys

import h5py
import numpy as np
import pytest

from etl.sources import _hdf5
from etl.sources._hdf5 import rows as _rows
from etl.sources._hdf5 import trial
from schemas.episode import EpisodeError

N = 1000
STORED = {
    "contiguous": ((N, 3), np.float32, {}),
    "plain chunks": ((N, 3, 2), np.uint8, {"chunks": (7, 3, 2)}),
    "gzip": ((N, 3), np.float32, {"chunks": (64, 3), "compression": "gzip"}),
    "shuffle": ((N, 3), np.float64, {"chunks": (64, 2), "compression": "gzip", "shuffle": True}),
    "chunks wider than rows": ((N, 3), np.int16, {"chunks": (7, 2), "maxshape": (None, None)}),
    "one chunk": ((N,), np.bool_, {"chunks": (N,), "compression": "gzip"}),
    "three dimensions": ((N, 4, 5), np.uint8, {"chunks": (33, 3, 5), "compression": "gzip"}),
    "big endian": ((N, 2), ">f4", {"chunks": (100, 2), "compression": "gzip"}),
    "half": ((N,), np.float16, {"chunks": (100,), "shuffle": True}),
    "lzf": ((N, 2), np.float32, {"chunks": (64, 2), "compression": "lzf"}),
    "checksums": ((N, 2), np.float32, {"chunks": (64, 2), "compression": "gzip", "fletcher32": True}),
    "fixed strings": ((N,), "S5", {"chunks": (64,), "compression": "gzip"}),
}


@pytest.fixture(autouse=True)
def cold(monkeypatch):
    """The child is started here as by a user."""
    monkeypatch.setattr(trial, "subprocess", subprocess)


@pytest.fixture
def file(tmp_path):
    with h5py.File(tmp_path / "log.hdf5", "w") as file:
        yield file


def random(shape, dtype):
    values = np.random.default_rng(0).integers(0, 256, (*shape, np.dtype(dtype).itemsize), dtype=np.uint8)
    kind = np.dtype(dtype).kind
    return values.view(dtype)[..., 0] if kind in "iu" else (values[..., 0] % 2).astype(dtype)


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("band", [1, 4096, _rows.BAND])
def test_rows_are_those_of_h5py(file, monkeypatch, stored, band):
    monkeypatch.setattr(_rows, "BAND", band)
    shape, dtype, options = STORED[stored]
    dataset = file.create_dataset("x", data=random(shape, dtype), **options)
    rows = _hdf5.Rows(_hdf5.Dataset(dataset.id))
    assert (len(rows), rows.shape, rows.dtype) == (N, shape, dataset.dtype)
    for start, stop in ((0, 1), (0, 64), (60, 130), (130, 130), (500, 999), (999, 1000), (0, None), (10, 20)):
        np.testing.assert_array_equal(rows[start:stop], dataset[start:stop])


def test_our_own_unpacking_is_what_is_tested(file):
    own = {
        name: _hdf5.Rows(_hdf5.Dataset(file.create_dataset(name, data=random(shape, dtype), **options).id)).filters
        for name, (shape, dtype, options) in STORED.items()
    }
    assert [name for name, ours in own.items() if ours is None] == ["contiguous", "lzf", "checksums"]


@pytest.mark.parametrize("compression", [None, "gzip"])
def test_chunks_that_were_never_written_hold_the_fill_value(file, compression):
    dataset = file.create_dataset("x", (N, 2), np.float32, chunks=(64, 2), compression=compression, fillvalue=7.5)
    dataset[200:300] = 1.0
    dataset[700:] = 2.0  # not where the rows before them end in the file
    dataset[500:600] = 3.0
    np.testing.assert_array_equal(_hdf5.Rows(_hdf5.Dataset(dataset.id))[:], dataset[:])


def test_a_chunk_shorter_than_its_shape_is_damage(file):
    dataset = file.create_dataset("x", (N,), np.float32, chunks=(500,), compression="gzip")
    dataset[:] = 1.0
    dataset.id.write_direct_chunk((500,), b"\x78\x9c\x03\x00\x00\x00\x00\x01")  # inflates to nothing
    rows = _hdf5.Rows(_hdf5.Dataset(dataset.id))
    assert rows[:500].sum() == 500
    with pytest.raises(ValueError, match="has 0 bytes, expected 2000"):
        rows[500:]


def test_links_and_data_elsewhere_do_not_count(file, tmp_path):
    with h5py.File(tmp_path / "other.hdf5", "w") as other:
        other["x"] = np.zeros(3)
    file["own"] = np.zeros(3)
    file["external"] = h5py.ExternalLink("other.hdf5", "x")
    file["soft"] = h5py.SoftLink("/own")
    layout = h5py.VirtualLayout((3,), np.float64)
    layout[:] = h5py.VirtualSource("other.hdf5", "x", (3,))
    file.create_virtual_dataset("virtual", layout)
    found = {key: _hdf5.dataset(file, key) is not None for key in ("own", "external", "soft", "virtual", "absent")}
    assert [key for key, there in found.items() if there] == ["own"]


@pytest.mark.parametrize("userblock", [0, 512])
def test_values_in_other_files_do_not_count(tmp_path, userblock):
    (tmp_path / "raw").write_bytes(bytes(800))
    with h5py.File(tmp_path / "x.hdf5", "w", userblock_size=userblock) as file:
        file.create_dataset("external", (100,), np.float64, external=[(str(tmp_path / "raw"), 0, 800)])
        file["own"], file["none"] = np.zeros(100), h5py.Empty("f")
        file.create_dataset("never written", (100,), np.float64)
    with h5py.File(tmp_path / "x.hdf5") as file:
        assert _hdf5.dataset(file, "own") is not None and _hdf5.dataset(file, "external") is None
        assert _hdf5.dataset(file, "none") is None and _hdf5.member(file, "none").size == 0
        with pytest.raises(EpisodeError, match="fewer bytes than its shape"):
            _hdf5.dataset(file, "never written")


KINDS = {
    "float32": np.arange(6, dtype=np.float32).reshape(2, 3),
    "big-endian": np.arange(6, dtype=">f8"),
    "bool": np.array([True, False]),
    "a bool": np.True_,
    "an integer": np.int64(-3),
    "bytes": np.array([b"ab", b"c"]),
    "compound": np.zeros(2, [("a", "i4"), ("b", "f8")]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_dataset_is_described_and_read_as_by_h5py(file, kind):
    known = file.create_dataset("x", data=KINDS[kind])
    found = _hdf5.Dataset(known.id)
    assert (found.shape, found.dtype, found.size, found.chunks) == (known.shape, known.dtype, known.size, None)
    assert np.array_equal(found.read(), known[()]) and type(found.read()) is type(known[()])


def test_a_file_that_kills_its_reader_costs_that_file(tmp_path):
    good, deadly, last = (
        tmp_path / f"{name}.hdf5" for name in ("g\udce9\no d", "deadly", "last")
    )  # any bytes are a name
    for path in (good, deadly, last):
        with h5py.File(path, "w") as file:
            file["x"] = np.zeros(3)
            if path == deadly:  # a short chunk, which libhdf5 copies as if it were whole
                dataset = file.create_dataset("y", (2**24,), np.float32, chunks=(2**24,), fletcher32=True)
                dataset.id.write_direct_chunk((0,), bytes(2**17), filter_mask=1)
    wrong = _hdf5.tried([good, deadly, last])
    assert list(wrong) == [deadly] and wrong[deadly].reason == "corrupt HDF5"
    assert "kills the process" in wrong[deadly].detail


def test_a_file_that_is_none_is_refused_unopened(tmp_path):
    os.mkfifo(tmp_path / "pipe.hdf5")  # opening it would wait for ever
    (tmp_path / "folder.hdf5").mkdir()
    names = ("pipe.hdf5", "folder.hdf5", "absent.hdf5")
    assert {e.reason for e in _hdf5.tried(tmp_path / name for name in names).values()} == {"missing file"}


def test_endless_rows_of_nothing_cost_no_time(tmp_path):
    with h5py.File(tmp_path / "log.hdf5", "w") as file:
        file.create_dataset("x", (2**40, 0), h5py.string_dtype(), chunks=(64, 1), maxshape=(None, None))
        file.create_dataset("y", (2**40, 0), np.float32, chunks=(64, 1), maxshape=(None, None), fletcher32=True)
    assert _hdf5.tried([tmp_path / "log.hdf5"]) == {}


@pytest.mark.process
def test_the_child_lives_under_a_limit_that_it_may_not_raise(file, tmp_path):
    """As a cluster or `ulimit -v` gives it."""

    def limited():
        resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31))

    file.close()
    command = [sys.executable, "-m", "etl.sources._hdf5"]
    done = subprocess.run(command, input=os.fsencode(tmp_path / "log.hdf5"), capture_output=True, preexec_fn=limited)
    assert (done.stdout, done.stderr) == (b"fine\n", b"")
