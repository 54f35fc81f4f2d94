"""TFRecord and tf.train.Example: against protobuf's own messages and the published check value of CRC-32C."""

import gzip

import numpy as np
import pytest

from etl.sources import _tfrecord
from etl.sources._tfrecord import Records, example, frame, masked_crc32c, outline, parsed
from schemas.episode import EpisodeError
from tests.etl.tfexample import Example, written

INTEGERS = [0, 1, 127, 128, -1, 2**63 - 1, -(2**63), 300]
FEATURES = {"a": [1.5, -2.25, np.inf], "b": INTEGERS, "c": [b"", b"x" * 300, b"\0\xff"], "steps/reward": [0.1]}


def test_the_checksum_is_the_published_one():
    for data, crc in ((b"123456789", 0xE3069283), (bytes(32), 0x8A9136AA)):  # RFC 3720's check values
        assert masked_crc32c(data) == ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32


def test_examples_equal_protobuf():
    found = example(written(**FEATURES))
    assert sorted(found) == sorted(FEATURES)
    assert found["a"].dtype == np.float32 and found["a"].tolist() == FEATURES["a"]
    assert found["b"].dtype == np.int64 and found["b"].tolist() == INTEGERS
    assert found["c"] == FEATURES["c"]
    assert list(example(written(**FEATURES), {"a"})) == ["a"]


def test_lists_that_are_not_packed_and_features_without_a_kind():
    message = Example()
    message.features.feature["nothing"].SetInParent()
    message.features.feature["none"].float_list.SetInParent()
    found = example(message.SerializeToString())
    assert found["nothing"] == [] and found["none"].shape == (0,)
    floats = delimited(1, delimited(2, b"\x0d\0\0\x80\x3f" + b"\x0d\0\0\0\x40"))  # one tag a value
    integers = delimited(1, b"f") + delimited(2, delimited(3, b"\x08\x05\x08\xac\x02"))
    assert example(delimited(1, delimited(1, delimited(1, b"g") + delimited(2, floats[2:]))))["g"].tolist() == [
        1.0,
        2.0,
    ]
    assert example(delimited(1, delimited(1, integers)))["f"].tolist() == [5, 300]


def test_the_outline_of_the_record_before_is_that_of_this_one():
    """Any byte changed, in packed values or beside them, after a record whose outline is kept."""
    good = written(a=[1.5, -2.0] * 20, b=INTEGERS, c=[b"xy"], d=[7], e=[])
    same = 0
    for at in range(len(good)):
        for change in (0x01, 0x80, 0xFF):
            bad = good[:at] + bytes([good[at] ^ change]) + good[at + 1 :]
            kept = outline(good)
            try:
                wanted = parsed(bad)
            except EpisodeError:
                with pytest.raises(EpisodeError, match="no tf.train.Example"):
                    outline(bad)
            else:
                found = outline(bad)
                assert found == wanted
                same += found is kept
    assert 100 < same / 3 < len(good) - 40


def delimited(number, data):
    return bytes([number << 3 | 2, len(data)]) + data


@pytest.mark.parametrize("packed", [False, True])
def test_records_in_order_by_position_and_by_offset(tmp_path, packed):
    records = [written(**FEATURES), b"", bytes(10_000), b"last"]
    data = b"".join(map(frame, records))
    path = tmp_path / "a.tfrecord"
    path.write_bytes(gzip.compress(data) if packed else data)
    with Records(path) as file:
        found = list(file)
        assert [data for _, data in found] == records
        assert [file.read(at) for at, _ in reversed(found)] == records[::-1]
        assert [file.record(n) for n in (2, 0, 3, 1, 4)] == [records[2], records[0], records[3], records[1], None]


@pytest.mark.parametrize("packed", [False, True])
def test_damage_is_named(tmp_path, packed):
    data = frame(b"first") + frame(bytes(9000))
    path = tmp_path / "a.tfrecord"

    def read(damaged):
        path.write_bytes(gzip.compress(damaged) if packed else damaged)
        with Records(path) as file:
            return list(file)

    for cut in (5, 15, len(data) - 1):
        with pytest.raises(EpisodeError, match=r"truncated TFRecord.*a\.tfrecord ends in the record at byte"):
            read(data[:cut])
    for place, what in ((0, "no record begins at byte 0"), (14, "at byte 0 does not match"), (5000, "at byte 21 ")):
        flipped = bytearray(data)
        flipped[place] ^= 4
        with pytest.raises(EpisodeError, match=f"corrupt TFRecord.*{what}"):
            read(bytes(flipped))
    path.write_bytes(gzip.compress(data)[:30])
    with Records(path) as file, pytest.raises(EpisodeError, match="corrupt gzip"):
        list(file)


def test_random_bytes_are_no_example_or_one():
    rng = np.random.default_rng(0)
    good = written(**FEATURES)
    for _ in range(3000):
        data = bytearray(good)
        for place in rng.integers(0, len(data), rng.integers(1, 4)):
            data[place] = rng.integers(0, 256)
        try:
            example(bytes(data[: rng.integers(0, len(data) + 1)]))
        except EpisodeError as error:
            assert error.reason == "corrupt Example"


def test_few_integers_are_read_as_many(monkeypatch):
    """By Python as by numpy: values, and what is refused."""
    rng = np.random.default_rng(0)
    values = [0, 1, 127, 128, 2**31, -1, -(2**63), 2**63 - 1, *rng.integers(-(2**62), 2**62, 20).tolist()]
    for value in values:
        data = written(x=[value, 5])
        found = []
        for few in (0, 32):
            monkeypatch.setattr(_tfrecord, "FEW", few)
            found.append(example(data)["x"])
        assert found[0].dtype == found[1].dtype == np.int64 and found[0].tolist() == found[1].tolist() == [value, 5]
    for packed in (b"\x80", b"\x80" * 10 + b"\x01", b"\x05\xff"):
        for read in (_tfrecord._few_varints, lambda data: _tfrecord._varints(np.frombuffer(data, np.uint8))):
            with pytest.raises(EpisodeError, match="corrupt Example"):
                read(packed)
