"""What a damaged or hostile dataset meets: one line that names file and remedy, or, where asked, other sequences."""

import io
import json
import pickle
import tarfile
from dataclasses import fields

import numpy as np
import pytest

from schemas.dataset import MANIFEST_NAME, DatasetError
from shards.loader import Loader
from shards.reader import BadShard, Dataset
from shards.stream import Stream, StreamConfig
from shards.verify import verify
from tests.shards.made import Task, make, reindexed, sign

CONFIG = StreamConfig(sequence_length=40, mixture_block=8)
BODY = Task("body", (30, 7, 50, 12, 41, 8, 19, 33), held_out=(2,))
FILMS = Task("films", (9, 14, 3, 22), patches=(2, 1), observation=0, action=1)


@pytest.fixture
def made(tmp_path):
    return make(tmp_path / "made", [BODY, FILMS], piece=16, shards=4)


def shard(folder, number=0):
    return folder / f"shard-{number:06d}.tar"


def refused(folder, message):
    with pytest.raises(DatasetError, match=message) as caught:
        verify(folder, full=True)
    assert "\n" not in str(caught.value)


def test_made_datasets_are_whole(made):
    assert verify(made, full=True).index.num_rows == sum(-(-n // 16) for n in BODY.lengths + FILMS.lengths)


@pytest.mark.parametrize(("version", "remedy"), [(2, "rebuild"), (4, "update this package"), ("x", "rebuild")])
def test_other_schema_versions_are_refused(made, version, remedy):
    manifest = json.loads((made / MANIFEST_NAME).read_text())
    (made / MANIFEST_NAME).write_text(json.dumps(manifest | {"schema_version": version}))
    with pytest.raises(DatasetError, match=f"dataset.json: schema version {version}, .* reads 3; {remedy}"):
        Dataset(made)


@pytest.mark.parametrize("name", ["../made/shard-000000.tar", "/etc/passwd", "a/b.tar"])
def test_a_shards_name_may_not_leave_the_folder(made, name):
    sign(made, [name] + [shard(made, n).name for n in range(1, 8)])
    for verify_ in ("auto", "size", "full"):
        with pytest.raises(DatasetError, match="leaves the folder; refused"):
            Dataset(made, verify_)


def members_of(path):
    with tarfile.open(path) as tar:
        return [(info, tar.extractfile(info).read()) for info in tar]


def rewrite(path, info, data, last=False):
    """The same tar with one more member in front or behind; its size is what `info` says."""
    old = members_of(path)
    with open(path, "wb") as file:
        for header, body in [*old, (info, data)] if last else [(info, data), *old]:
            file.write(header.tobuf(tarfile.USTAR_FORMAT) + body + bytes(-len(body) % 512))
        file.write(bytes(1024))


def member(name, data=b"x", type_=tarfile.REGTYPE, size=None, link=""):
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = type_, len(data) if size is None else size, link
    return info, data


def objects():
    file = io.BytesIO()
    np.save(file, np.array([{"a": 1}], object), allow_pickle=True)
    return file.getvalue()


HOSTILE = {
    "absolute path": (member("/etc/cron.d/x.tokens.npy"), "not a plain file"),
    "way up": (member("../../x.tokens.npy"), "not a plain file"),
    "folder": (member("a/x.tokens.npy"), "not a plain file"),
    "symbolic link": (member("x.tokens.npy", b"", tarfile.SYMTYPE, link="/etc/passwd"), "not a plain file"),
    "hard link": (member("x.tokens.npy", b"", tarfile.LNKTYPE, link="/etc/passwd"), "not a plain file"),
    "device": (member("x.tokens.npy", b"", tarfile.CHRTYPE), "not a plain file"),
    "fifo": (member("x.tokens.npy", b"", tarfile.FIFOTYPE), "not a plain file"),
    "directory": (member("x", b"", tarfile.DIRTYPE), "not a plain file"),
    "long name header": (member("x.tokens.npy", b"y" * 600, tarfile.GNUTYPE_LONGNAME), "not a plain file"),
    "pax header": (member("x.tokens.npy", b"9 size=1\n", tarfile.XHDTYPE), "not a plain file"),
    "huge member": (member("x.tokens.npy", b"x", size=8**11 - 1), "claims 8589934591 bytes"),
    "pickle member": (member("x.pkl", pickle.dumps({})), "not a plain file"),
    "another pickle": (member("x.tokens.pyd", pickle.dumps({})), "not a plain file"),
    "array of objects": (member("x.tokens.npy", objects()), "would be unpickled"),
    "no array": (member("x.tokens.npy", b"what?" * 40), "no .npy header"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_tar_is_refused(made, what):
    extra, message = HOSTILE[what]
    info, data = extra
    rewrite(shard(made), info, data)
    sign(made)
    refused(made, message)


def test_a_member_that_the_index_does_not_name_is_refused(made):
    info, data = members_of(shard(made))[0]
    info.name = "stranger.tokens.npy"
    rewrite(shard(made), info, data, last=True)  # so that the index still points at the others
    sign(made)
    refused(made, "'stranger.tokens.npy' is not what the index has")


def test_a_tar_cut_at_a_member_or_with_junk_behind_is_refused(made):
    data = shard(made).read_bytes()
    shard(made).write_bytes(data[:-1024])
    sign(made)
    refused(made, "no tar member at byte")
    shard(made).write_bytes(data + b"junk" * 128)
    sign(made)
    refused(made, "no tar member at byte")


def test_a_token_outside_the_vocabulary_is_refused(made):
    dataset = Dataset(made)
    row = int(np.flatnonzero(dataset.column("shard") == 0)[0])
    data = bytearray(shard(made).read_bytes())
    at = int(dataset.column("tokens_offset")[row])
    data[at : at + 2] = b"\xff\xff"
    shard(made).write_bytes(data)
    sign(made)
    refused(made, "outside the 34049 ids")


INDEX = {
    "behind the end": ("tokens_offset", lambda v: v + 10**9, "points behind its shard's end"),
    "no such shard": ("shard", lambda v: v + 100, "names a shard"),
    "negative shard": ("shard", lambda v: v - 100, "names a shard"),
    "another length": ("timesteps", lambda v: v * 2, "as many bytes"),
    "no timesteps": ("timesteps", lambda v: v * 0, "has no timestep"),
    "another task": ("task", lambda v: 1 - v, "is not where the manifest has"),
    "another split": ("held_out", lambda v: ~v, "out of order"),
    "another sum": ("split_stop", lambda v: v + 1, "out of order"),
    "episodes apart": ("split_episode", lambda v: v * 2, "out of order"),
    "another place": ("tokens_offset", lambda v: np.where(v >= 0, v + 2, v), "points behind|is not what the index has"),
}


@pytest.mark.parametrize("what", INDEX)
def test_an_index_that_lies_is_refused(made, what):
    name, change, message = INDEX[what]
    reindexed(made, **{name: change(Dataset(made).column(name).copy())})
    refused(made, message)


def test_an_index_that_points_behind_a_shard_is_no_crash(made):
    reindexed(made, tokens_offset=Dataset(made).column("tokens_offset") + 10**9)
    with pytest.raises(BadShard, match="points behind its end"):
        Stream([made], CONFIG, 0).batch(0, 16)


def test_deleted_while_mapped_goes_on_and_then_is_named(made):
    stream = Stream([made], CONFIG, 0)
    stream.store.maps.limit = 2
    before = stream.batch(0, 64)
    for number in range(8):
        stream.datasets[0].mapped(number)  # the last two stay mapped
    tokens = stream.datasets[0].tokens(0)
    kept = tokens.copy()
    for number in range(8):
        shard(made, number).unlink()
    assert np.array_equal(tokens, kept), "an array in hand outlives its file"
    with pytest.raises(BadShard, match="shard-00000.*: missing; run python -m etl.build"):
        stream.batch(0, 64)
    assert before.tokens.shape == (64, 40)


def test_more_shards_than_maps(made):
    few, many = (Stream([made], CONFIG, 0) for _ in range(2))
    few.store.maps.limit = 1
    assert same(few.batch(0, 64), many.batch(0, 64)) and len(few.store.maps._open) == 1


def same(a, b):
    return all(np.array_equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))


DAMAGE = {
    "missing": lambda path: path.unlink(),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "empty": lambda path: path.write_bytes(b""),
    "flipped": lambda path: path.write_bytes(path.read_bytes()[:600] + b"\xa5" + path.read_bytes()[601:]),
}


# a byte that flips under a running process is found by the next one that opens the dataset
@pytest.mark.parametrize(("what", "when"), [*((w, "before") for w in DAMAGE), ("missing", "after"), ("empty", "after")])
def test_bad_shards_stop_or_are_skipped_the_same_everywhere(made, what, when, capsys):
    if when == "before":
        DAMAGE[what](shard(made, 1))
        with pytest.raises(DatasetError, match="shard-000001.tar.*etl.build"):
            Stream([made], CONFIG, 0)
    streams = [Stream([made], CONFIG, 0, on_bad_shard="skip") for _ in range(3)]
    strict = Stream([made], CONFIG, 0) if when == "after" else None
    DAMAGE[what](shard(made, 1)) if when == "after" else None
    if strict:
        with pytest.raises(DatasetError, match="shard-000001.tar.*etl.build"):
            strict.batch(0, 64)
    whole = streams[0].batch(0, 64)
    assert streams[0].redrawn > 0 and list(streams[0].datasets[0].bad) == [1]
    assert capsys.readouterr().err.count("skipping a bad shard") == 1 - (when == "before")
    # one sequence at a time, and in another order
    single = [streams[1].batch(i, 1) for i in reversed(range(64))][::-1]
    assert np.array_equal(np.concatenate([b.tokens for b in single]), whole.tokens)
    assert np.array_equal(np.concatenate([b.patches for b in single if len(b.patches)]), whole.patches)
    loader = Loader(streams[2], 0, 64, 16)
    next(loader)
    figures = loader.figures()
    loader.close()
    assert figures["data/bad_shards"] == 1 and figures["data/redrawn_sequences"] > 0


def test_too_little_left_is_an_error(made):
    for number in range(4):
        shard(made, number).unlink()
    stream = Stream([made], CONFIG, 0, on_bad_shard="skip")
    with pytest.raises(DatasetError, match="task 'body': too little of it can be read"):
        stream.batch(0, 64)


def test_held_out_windows_skip_bad_shards(made):
    stream = Stream([made], CONFIG, 0, held_out=True, on_bad_shard="skip")
    assert stream.evaluation_batch(0, np.arange(4)).tokens.shape == (4, 40)
    (number,) = set(stream.datasets[0].column("shard")[slice(*stream.datasets[0].span(0, True))].tolist())
    shard(made, number).unlink()
    again = Stream([made], CONFIG, 0, held_out=True, on_bad_shard="skip")
    with pytest.raises(DatasetError, match="too little"):
        again.evaluation_batch(0, np.arange(4))


def test_an_index_or_manifest_is_never_skipped(made):
    (made / "index.arrow").write_bytes(b"")
    with pytest.raises(DatasetError, match="index.arrow"):
        Stream([made], CONFIG, 0, on_bad_shard="skip")
