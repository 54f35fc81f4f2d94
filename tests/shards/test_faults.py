"""What a damaged or hostile dataset meets: one line that names file and remedy, or, where asked, other sequences."""

import io
import json
import pickle
import sys
import tarfile
from dataclasses import fields, replace

import numpy as np
import pyarrow as pa
import pytest

from schemas.dataset import MANIFEST_NAME, MEMBERS, SHARD_SCHEMA, DatasetError
from shards.cache import CacheConfig
from shards.folder import Folder
from shards.loader import Loader
from shards.reader import BadShard, Dataset, Store
from shards.stream import Stream, StreamConfig
from shards.verify import verify
from shards.writer import write_table
from tests import warm
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


@pytest.mark.parametrize(("version", "remedy"), [(2, "rebuild"), (5, "update this package"), ("x", "rebuild")])
def test_other_schema_versions_are_refused(made, version, remedy):
    manifest = json.loads((made / MANIFEST_NAME).read_text())
    (made / MANIFEST_NAME).write_text(json.dumps(manifest | {"schema_version": version}))
    with pytest.raises(DatasetError, match=f"dataset.json: schema version {version}, .* reads 3 to 4; {remedy}"):
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
    "absolute path": member("/etc/cron.d/x.tokens.npy"),
    "way up": member("../../x.tokens.npy"),
    "folder": member("a/x.tokens.npy"),
    "symbolic link": member("x.tokens.npy", b"", tarfile.SYMTYPE, link="/etc/passwd"),
    "hard link": member("x.tokens.npy", b"", tarfile.LNKTYPE, link="/etc/passwd"),
    "device": member("x.tokens.npy", b"", tarfile.CHRTYPE),
    "fifo": member("x.tokens.npy", b"", tarfile.FIFOTYPE),
    "directory": member("x", b"", tarfile.DIRTYPE),
    "long name header": member("x.tokens.npy", b"y" * 600, tarfile.GNUTYPE_LONGNAME),
    "pax header": member("x.tokens.npy", b"9 size=1\n", tarfile.XHDTYPE),
    "huge member": member("x.tokens.npy", b"x", size=8**11 - 1),
    "pickle member": member("x.pkl", pickle.dumps({})),
    "another pickle": member("x.tokens.pyd", pickle.dumps({})),
    "array of objects": member("x.tokens.npy", objects()),
    "no array": member("x.tokens.npy", b"what?" * 40),
    "terminal codes": member("a\n\x1b[2J.tokens.npy", b"x"),
    "one more meta.json": member("x.meta.json", b"{}"),
}


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_tar_is_refused(made, what, last):
    rewrite(shard(made), *HOSTILE[what], last=last)
    if not last:  # the index points at where the arrays are now
        shift(made, 512 + -(-len(HOSTILE[what][1]) // 512) * 512)
    sign(made)
    refused(made, "shard-000000.tar: byte .*; refused, rebuild the dataset")


def shift(folder, by):
    """Make the index point so many bytes further on in the first shard."""
    sign(folder)
    dataset = Dataset(folder)
    first = dataset.column("shard") == 0
    columns = {}
    for name in MEMBERS:
        offsets = dataset.column(f"{name}_offset").copy()
        columns[f"{name}_offset"] = np.where(first & (offsets >= 0), offsets + by, offsets)
    reindexed(folder, **columns)


def change_member(path, name, change):
    """Rewrite one member's (TarInfo, bytes) of a tar; sizes must stay."""
    members = members_of(path)
    with open(path, "wb") as file:
        for info, data in members:
            if info.name.endswith(name):
                info, data = change(info, data)
                change = lambda info, data: (info, data)  # noqa: E731 - the first one only
            file.write(info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % 512))
        file.write(bytes(1024))


def renamed(info, data):
    info.name = "zzz" + info.name[3:]
    return info, data


def mode(info, data):
    info.mode = 0o4755
    return info, data


def header(old, new):
    def change(info, data):
        assert old in data
        return info, data.replace(old, new.ljust(len(old)), 1)

    return change


ALTERED = {
    "renamed": (".tokens.npy", renamed),
    "mode": (".tokens.npy", mode),
    "shape": (".tokens.npy", header(b"(16, 5)", b"(5, 16)")),
    "huge shape": (".tokens.npy", header(b"(16, 5), }   ", b"(9999999, 9),}")),
    "brackets": (".tokens.npy", header(b"{'descr': '<u2'", b"((((((((((")),
    "text": (".tokens.npy", header(b"{'descr': '<u2'", b"{'descr': '''")),
    "order": (".tokens.npy", header(b"False", b"True ")),
    "dtype": (".tokens.npy", header(b"<u2", b"<i2")),
    "meta that is a pickle": (
        ".meta.json",
        lambda info, data: (info, pickle.dumps("x" * 99)[: len(data)].ljust(len(data))),
    ),
    "meta that lies": (".meta.json", header(b'"start": 0', b'"start": 9')),
    "rewards": (".reward.npy", lambda info, data: (info, data[:-4] + b"\0\0\0\0")),
}


@pytest.mark.parametrize("what", ALTERED)
def test_a_member_that_was_altered_is_refused(tmp_path, what):
    folder = make(tmp_path / "made", [Task("body", (16, 16))])
    change_member(shard(folder), *ALTERED[what])
    sign(folder)
    refused(folder, "shard-000000.tar: byte .*; refused, rebuild the dataset")


def test_a_tar_cut_at_a_member_or_with_junk_behind_is_refused(made):
    data = shard(made).read_bytes()
    for changed in (data[:-1024], data[:-512], data + b"junk" * 128, data + bytes(512)):
        shard(made).write_bytes(changed)
        sign(made)
        refused(made, "the tar's end is missing, or something comes before it")


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
    "behind the end": ("tokens_offset", lambda v: v + 10**9, "points beyond its shard's end"),
    "far behind the end": ("tokens_offset", lambda v: v * 0 + (2**63 - 1), "points beyond its shard's end"),
    "before the start": ("tokens_offset", lambda v: v * 0 - 1, "lacks 'tokens'"),
    "no such shard": ("shard", lambda v: v + 100, "names a shard"),
    "negative shard": ("shard", lambda v: v - 100, "names a shard"),
    "another length": ("timesteps", lambda v: v * 2, "as many bytes"),
    "no timesteps": ("timesteps", lambda v: v * 0, "has no timestep"),
    "another task": ("task", lambda v: 1 - v, "is not where the manifest has"),
    "no such task": ("task", lambda v: v + 7, "names a task"),
    "another split": ("held_out", lambda v: ~v, "out of order"),
    "another sum": ("split_stop", lambda v: v + 1, "out of order"),
    "episodes apart": ("split_episode", lambda v: v * 2, "out of order"),
    "another place": ("tokens_offset", lambda v: np.where(v >= 0, v + 2, v), "points beyond|not the member"),
    "few rewards": ("reward_bytes", lambda v: v * 0 + 4, "as many bytes of 'reward'"),
    "other endings": ("terminated", lambda v: ~v, "not the member"),
    "other returns": ("episode_return", lambda v: v + 1, "not the member"),
    "other episodes": ("episode", lambda v: v + 1, "not the member"),
}


@pytest.mark.parametrize("what", INDEX)
def test_an_index_that_lies_is_refused(made, what):
    name, change, message = INDEX[what]
    reindexed(made, **{name: change(Dataset(made).column(name).copy())})
    refused(made, message)


def test_an_index_that_points_behind_a_shard_is_no_crash(made):
    reindexed(made, tokens_offset=Dataset(made).column("tokens_offset") + 10**9)
    with pytest.raises(BadShard, match="points beyond its end"):
        Stream([made], CONFIG, 0).batch(0, 16)


@pytest.mark.parametrize("name", ["index.arrow", "shards.arrow"])
def test_flipped_bits_of_a_table_are_found_in_every_mode(made, name):
    """Before Arrow sees them, which does not survive all of them."""
    data, rng = (made / name).read_bytes(), np.random.default_rng(0)
    for _ in range(60):
        changed = bytearray(data)
        changed[rng.integers(len(data))] ^= 1 << rng.integers(8)
        (made / name).write_bytes(changed)
        for check in (lambda: verify(made, full=False), lambda: Stream(made, CONFIG, 0, verify="size").batch(0, 8)):
            with pytest.raises(DatasetError, match=f"{name}: sha256 differs"):
                check()


def test_missing_values_in_the_index_are_refused(made):
    values = [None, *Dataset(made).column("tokens_offset")[1:].tolist()]
    reindexed(made, tokens_offset=values)
    refused(made, "index.arrow: rows or values are missing")


def test_a_shards_hash_is_one(made):
    with pa.memory_map(str(made / "shards.arrow")) as source:
        rows = pa.ipc.open_file(source).read_all().to_pylist()
    rows[0]["sha256"] = "../../etc/passwd"
    digest = write_table(Folder(made), "shards.arrow", pa.Table.from_pylist(rows, SHARD_SCHEMA))
    manifest = json.loads((made / MANIFEST_NAME).read_text())
    (made / MANIFEST_NAME).write_text(json.dumps(manifest | {"shards": vars(digest)}))
    with pytest.raises(DatasetError, match="sha256 '../../etc/passwd' is none; refused"):
        Dataset(made)


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
    whole, redrawn = streams[0].fill(streams[0].plan(np.arange(64)), 0, 64)
    clean = make(made.parent / "clean", [BODY, FILMS], piece=16, shards=4)
    other = Stream([clean], CONFIG, 0).batch(0, 64)
    changed = [i for i in range(64) if not np.array_equal(whole.tokens[i], other.tokens[i])]
    assert 0 < len(changed) <= redrawn < 64 and list(streams[0].datasets[0].bad) == [1]
    assert capsys.readouterr().err.count("skipping a bad shard") == 1 - (when == "before")
    # one sequence at a time, and in another order
    single = [streams[1].batch(i, 1) for i in reversed(range(64))][::-1]
    assert np.array_equal(np.concatenate([b.tokens for b in single]), whole.tokens)
    assert np.array_equal(np.concatenate([b.patches for b in single if len(b.patches)]), whole.patches)
    for threads in (0, 1, 4):
        loader = Loader(streams[2], 0, 64, 16, threads=threads)
        next(loader)
        metrics = loader.metrics()
        loader.close()
        assert (metrics["data/bad_shards"], metrics["data/redrawn_sequences"]) == (1, redrawn)


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


@pytest.mark.process
def test_too_many_open_files_are_no_bad_shards(made):
    """Where the rest of a program holds almost all descriptors, fewer maps stay open."""
    wanted = Stream([made], CONFIG, 0).batch(0, 64)
    code = (
        "import resource, sys; import numpy as np; from shards.stream import *\n"
        "config = StreamConfig(sequence_length=40, mixture_block=8)\n"
        "stream = Stream(sys.argv[1], config, 0, on_bad_shard='skip'); stream.plan(np.arange(8))\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))\n"
        "held = []\n"
        "try:\n"
        "    while True: held.append(open('/dev/null'))\n"
        "except OSError: pass\n"
        "for file in held[:3]: file.close()\n"
        "batch, redrawn = stream.fill(stream.plan(np.arange(64)), 0, 64)\n"
        "print(int(batch.tokens.sum()), redrawn, len(stream.datasets[0].bad))\n"
    )
    done = warm.run([sys.executable, "-c", code, str(made)])
    assert done.stdout.split() == [str(wanted.tokens.sum()), "0", "0"], done.stderr


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_after_an_error_the_loader_tries_the_same_step_again(made, threads):
    wanted = [batch.sequence.copy() for batch in next(Loader(Stream([made], CONFIG, 0), 0, 64, 16))]
    loader = Loader(Stream([made], CONFIG, 0), 0, 64, 16, threads=threads)
    hidden = [path.rename(path.with_suffix(".away")) for path in made.glob("shard-*.tar")]
    for _ in range(2):
        with pytest.raises(BadShard, match="missing"):
            next(loader)
    for path in hidden:
        path.rename(path.with_suffix(".tar"))
    assert [batch.sequence.tolist() for batch in next(loader)] == [w.tolist() for w in wanted]
    assert next(loader)[0].sequence[0] == 64
    loader.close()


SETTINGS = {
    "sequence_length": (0, 1),
    "mixture_block": (0, -4),
    "working_set": (0,),
    "prompt_probability": (2.0, -1.0, float("nan")),
    "prompt_end_share": (5.0,),
    "prompt_max_share": (-1.0,),
    "prompt_start_share": (1.1,),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in SETTINGS.items() for value in values])
def test_settings_out_of_range_are_named(made, name, value):
    with pytest.raises(ValueError, match=f"--data.stream.{name.replace('_', '-')} .*must be from"):
        Stream([made], replace(CONFIG, **{name: value}), 0)


def test_other_bad_requests_are_named(made, tmp_path):
    for seed in (-1, 2**63):
        with pytest.raises(ValueError, match=f"--seed {seed}"):
            Stream([made], CONFIG, seed)
    with pytest.raises(ValueError, match="weight is 1.0e-12 of the mixture; make it 0, or"):
        Stream([made], replace(CONFIG, mixture_block=None, weights={"body": 1e-12}), 0)
    assert Stream([made], replace(CONFIG, weights={"body": 1e308, "films": 1e308}), 0).sampler.counts.tolist() == [4, 4]
    stream = Stream(str(made), CONFIG, 0)
    for bad in (
        {"rank": 2, "world": 2}, {"rank": -1}, {"start": -1}, {"global_batch": 0}, {"micro_batch": 0}, {"world": 0},
        {"micro_batch": -2}, {"threads": -1},
    ):  # fmt: skip
        with pytest.raises(ValueError, match="must be"):
            Loader(stream, **{"start": 0, "global_batch": 8, "micro_batch": 2} | bad)
    for cache in ({"gigabytes": float("nan")}, {"gigabytes": 0.0}):
        with pytest.raises(DatasetError, match="--data.cache.gigabytes"):
            Store(CacheConfig(**cache))
