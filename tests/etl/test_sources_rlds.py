"""RLDS datasets that TensorFlow Datasets wrote, read without it: values, pictures, splits, last steps; damage."""

import io
import json
import random
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from etl import build, sources
from etl.sources import Rejection, SourceError
from etl.sources._tfrecord import Records, frame
from etl.sources.rlds import RLDS, SOURCE, Options
from schemas.episode import EpisodeError
from shards.reader import Dataset
from tests.etl.logkit import shards

FIXTURE = Path(__file__).parents[1] / "fixtures/rlds.tar.xz"
NAME = "two_cameras-{}.tfrecord-{:05d}-of-00002"


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    """Folder two_cameras, and two_cameras.npz with what the writer was given."""
    root = tmp_path_factory.mktemp("rlds")
    with tarfile.open(FIXTURE) as archive:
        archive.extractall(root, filter="data")
    return root


@pytest.fixture
def folder(written, tmp_path):
    shutil.copytree(written / "two_cameras", tmp_path / "two_cameras")
    return tmp_path / "two_cameras/1.0.0"


@pytest.fixture(scope="session")
def truth(written):
    """{split/n: {key: (steps, ...)}}."""
    found: dict = {}
    for name, values in np.load(written / "two_cameras.npz").items():
        split, n, key = name.split("/", 2)
        found.setdefault(f"{split}/{n}", {})[key] = values
    return found


def scanned(place, **options):
    (scan,) = SOURCE.scan(SOURCE.resolve(place, None, place), Options(**options))
    return scan


def episodes(place, **options):
    scan = scanned(place, **options)
    assert scan.task is not None, scan.rejected
    return scan, list(sources.read(SOURCE, scan.task, scan.episodes))


def given(truth, episode):
    """What the writer was given of an episode: TFDS shuffles them."""
    first = episode.observation["state"][0]
    (found,) = [name for name, one in truth.items() if np.array_equal(one["observation/state"][0], first)]
    return found, truth[found]


def test_every_value_comes_back(written, truth):
    scan, read = episodes(written / "two_cameras")
    assert scan.task.name == "two_cameras" and len(read) == 7 and not scan.rejected
    assert "44.8% of its action values lie outside [-1, 1]" in scan.warnings[0]  # RLDS does not say their range
    kinds = {spec.key: (spec.kind, spec.shape) for spec in scan.task.observation}
    assert kinds == {
        "arm/moving": ("discrete", ()),
        "gripper": ("discrete", ()),
        "image": ("image", (48, 64, 3)),
        "joints": ("continuous", (4,)),
        "language_instruction": ("text", (16,)),
        "packed": ("continuous", (2,)),
        "pose": ("continuous", (2, 2)),
        "state": ("continuous", (3,)),
        "wrist_image": ("image", (32, 32, 3)),
    }
    for episode in read:
        name, own = given(truth, episode)
        T = len(own["reward"]) - 1  # the last step has no action
        n = int(name.split("/")[1])
        assert episode.timesteps == T
        for key in ("state", "pose", "packed", "joints", "gripper", "arm/moving"):
            assert np.array_equal(
                episode.observation[key], own[f"observation/{key}"][:T].astype(episode.observation[key].dtype)
            )
        assert np.array_equal(episode.observation["image"], own["observation/image"][:T])  # PNG
        assert np.abs(episode.observation["wrist_image"].astype(int) - own["observation/wrist_image"][:T]).max() <= 2
        action = np.column_stack([own["action/open_gripper"], own["action/world_vector"]]).astype(np.float32)
        assert np.array_equal(episode.action, action[:T])
        assert set(episode.observation["language_instruction"]) == {("pick up the apple", "öffne die Schublade")[n % 2]}
        assert (episode.terminated, episode.truncated) == (n % 2 == 0, n % 2 == 1)
        assert episode.reward.sum() == (n % 2 == 0) and episode.reward[-1] == (n % 2 == 0)
    assert sorted(scan.notes) == [
        "two_cameras: an action is action/open_gripper, action/world_vector, in this order",
        "two_cameras: not read: natural_language_embedding; --observation-keys names what to read",
        "two_cameras: there are rewards in last steps, where RLDS has none; they count with the action before",
    ]


def test_the_test_splits_are_held_out(written, tmp_path):
    scan = scanned(written / "two_cameras")
    assert {(Path(ref.file).name.split(".")[0], ref.held_out) for ref in scan.episodes} == {
        ("two_cameras-train", False),
        ("two_cameras-val", True),
    }


def test_a_built_dataset_decodes_to_half_a_bin_whatever_the_order_of_files(written, truth, tmp_path, monkeypatch):
    for name, turned in (("a", False), ("b", True)):
        arguments = ["--input", str(written / "two_cameras"), "--output", str(tmp_path / name)]
        options, rest = build.parsed([*arguments, "--action-low", "-3", "--action-high", "3"])
        assert options.source == "rlds" and options.evidence == "1.0.0/features.json with steps"
        if turned:
            monkeypatch.setattr(RLDS, "below", lambda self, folder, own=RLDS.below: own(self, folder)[::-1])
        build.build(options, build.beam_flags(rest, 1), build.Console(quiet=True))
    assert shards(tmp_path / "a") == shards(tmp_path / "b")
    dataset = Dataset(tmp_path / "a")
    _, read = episodes(written / "two_cameras", action_low=(-3.0,), action_high=(3.0,))
    by_place = {(episode.file, episode.position): episode for episode in read}
    assert len(dataset.column("position")) == 7
    for row, place in enumerate(zip(dataset.column("file"), dataset.column("position"))):
        raw = by_place[Path(str(place[0])).name, int(place[1])]
        tokens = dataset.tokens(row)[:, -3:].astype(float) - dataset.manifest.vocabulary.action_continuous.start
        assert (np.abs(-3 + (tokens + 0.5) * 6 / 1024 - raw.action) <= 3 / 1024 + 1e-6).all()


def test_an_embedding_is_read_where_it_is_named(written):
    scan, read = episodes(written / "two_cameras", observation_keys=("natural_language_embedding", "wrist_image"))
    assert {spec.key for spec in scan.task.observation} == {"natural_language_embedding", "wrist_image"}
    assert read[0].observation["natural_language_embedding"].shape[1:] == (8,)
    assert "--observation-keys some of them" in scanned(written, observation_keys=("torque",)).rejected[0].detail


def rewritten(path, edit):
    """Write a file's records again, each edited."""
    with Records(path) as records:
        data = [edit(data) for _, data in records]
    path.write_bytes(b"".join(frame(one) for one in data))


def test_damage_is_named(folder):
    path = folder / NAME.format("train", 1)
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    scan, _ = episodes(folder)
    assert {(r.file, r.reason) for r in scan.rejected} == {(path.name, "truncated TFRecord")}
    path.write_bytes(whole[:300] + bytes([whole[300] ^ 1]) + whole[301:])
    _, read = episodes(folder)
    assert [r.reason for r in read if isinstance(r, Rejection)] == ["corrupt TFRecord"]
    path.write_bytes(whole)
    with Records(path) as records:
        (_, first), *_ = records
    path.write_bytes(frame(first))
    scan, _ = episodes(folder)
    assert {(r.position, r.reason) for r in scan.rejected} == {(1, "missing record"), (2, "missing record")}
    about = json.loads((folder / "dataset_info.json").read_text())
    split = next(one for one in about["splits"] if one["name"] == "train")
    split["shardLengths"][1] = str(2**40)
    (folder / "dataset_info.json").write_text(json.dumps(about))
    scan, _ = episodes(folder)
    assert len(scan.rejected) == 10_000 and f"counts {2**40} episodes" in scan.rejected[0].detail


def tensor(step, *path):
    for name in path:
        step = step[name]["featuresDict"]["features"] if "featuresDict" in step[name] else step[name]["tensor"]
    return step


@pytest.mark.parametrize("edit, reason", [
    (lambda step: tensor(step, "action", "world_vector")["shape"].update(dimensions=["5"]), "wrong shape"),
    (lambda step: tensor(step, "observation", "state").update(dtype="int64"), "wrong dtype"),
    (lambda step: tensor(step, "observation", "state")["shape"].update(dimensions=["2"]), "wrong shape"),
    (lambda step: tensor(step, "observation").update(lost={"tensor": {"dtype": "float32"}}), "missing key"),
    (lambda step: tensor(step, "observation", "packed").update(dtype="float64"), "wrong shape"),
    (lambda step: step.pop("action"), "missing key"),
])  # fmt: skip
def test_a_description_that_does_not_fit_the_records_is_a_rejection(folder, edit, reason):
    about = json.loads((folder / "features.json").read_text())
    edit(about["featuresDict"]["features"]["steps"]["sequence"]["feature"]["featuresDict"]["features"])
    (folder / "features.json").write_text(json.dumps(about))
    scan = scanned(folder)
    assert scan.task is None and {rejection.reason for rejection in scan.rejected} == {reason}


def test_a_picture_of_another_size_or_of_none_is_a_rejection(folder):
    out = io.BytesIO()
    Image.new("RGB", (8, 8)).save(out, "PNG")

    def smaller(data):  # a PNG of the same length, which keeps the protobuf's lengths right
        at = data.find(b"\x89PNG")
        stop = data.find(b"IEND", at) + 8
        return data[:at] + out.getvalue().ljust(stop - at, b"\0")[: stop - at] + data[stop:]

    rewritten(folder / NAME.format("val", 0), smaller)
    _, read = episodes(folder)
    assert [r.reason for r in read if isinstance(r, Rejection)] == ["wrong shape"]
    rewritten(folder / NAME.format("val", 0), lambda data: data.replace(b"\x89PNG", b"\x89QNG"))
    _, read = episodes(folder)
    assert [r.reason for r in read if isinstance(r, Rejection)] == ["corrupt picture"]


def test_without_its_description_a_dataset_is_recognised_and_refused(folder):
    (folder / "features.json").unlink()
    source, evidence = sources.recognise(folder)
    assert source.name == "rlds" and evidence.endswith("holds steps/*")
    scan = scanned(folder)
    assert scan.task is None and "no features.json beside it" in scan.rejected[0].detail
    with pytest.raises(SourceError, match="no TFDS dataset"):
        SOURCE.resolve(folder.parent.parent / "elsewhere", None, folder)


def test_files_that_are_not_here_are_noted(folder):
    (folder / NAME.format("train", 0)).unlink()
    assert "two_cameras: 1 of 2 files of split 'train' are here" in scanned(folder).notes


def test_damaged_bytes_are_rejections_and_no_traceback(folder):
    random.seed(0)
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        for n in range(12):
            data = bytearray(whole[: random.randrange(len(whole))] if n % 3 == 0 else whole)
            for _ in range(1 if n % 3 == 1 else 40):
                if data:
                    data[random.randrange(len(data))] = random.randrange(256)
            if path.suffix != ".json" and n % 2:  # below the checksums
                try:
                    with Records(path) as records:
                        whole_records = [record for _, record in records]
                except EpisodeError:
                    whole_records = []
                for record in whole_records[:1]:
                    changed = bytearray(record)
                    for _ in range(5):
                        changed[random.randrange(min(4000, len(changed)))] = random.randrange(256)
                    data = bytearray(frame(bytes(changed)))
            path.write_bytes(data)
            scan = scanned(folder)
            if scan.task:
                list(sources.read(SOURCE, scan.task, scan.episodes))
            sources.recognise(folder.parent) if path.suffix != ".json" else None
            path.write_bytes(whole)
