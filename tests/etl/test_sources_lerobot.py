"""LeRobot datasets that its own writers made (v2.1, v3.0) and a v2.0 made of one: values, pictures, frames; damage."""

import json
import os
import random
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from etl import build, sources
from etl.sources import Rejection, SourceError
from etl.sources.lerobot import SOURCE, Options
from etl.sources.lerobot.video import Video
from schemas.episode import EpisodeError
from shards.reader import Dataset
from tests.etl.logkit import shards

FIXTURE = Path(__file__).parents[1] / "fixtures/lerobot.tar.xz"
CODEC = 6.0  # mean error of a pixel in a video: that of the AV1 encoder at LeRobot's settings
VERSIONS = ("v20", "v21", "v30")


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    """Folders v20, v21, v30, and v20.npz etc. with what the writers were given."""
    root = tmp_path_factory.mktemp("lerobot")
    with tarfile.open(FIXTURE) as archive:
        archive.extractall(root, filter="data")
    # v2.0 is v2.1 with the statistics of all episodes together
    shutil.copytree(root / "v21", root / "v20")
    shutil.copy(root / "v21.npz", root / "v20.npz")
    meta = root / "v20/meta"
    lines = [json.loads(line)["stats"] for line in (meta / "episodes_stats.jsonl").read_text().splitlines()]
    stats = {
        name: {how: getattr(np, how)([line[name][how] for line in lines], axis=0).tolist() for how in ("min", "max")}
        for name in ("action", "observation.state")
    }
    (meta / "stats.json").write_text(json.dumps(stats))
    (meta / "episodes_stats.jsonl").unlink()
    change(root / "v20", codebase_version="v2.0")
    return root


@pytest.fixture
def copy(written, tmp_path):
    def copied(version="v21"):
        return Path(shutil.copytree(written / version, tmp_path / version))

    return copied


def change(folder, **about):
    """Change keys of info.json."""
    path = folder / "meta/info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | about))


def scanned(folder, **options):
    return SOURCE.scan(SOURCE.resolve(folder, None, folder), Options(**options))


def episodes(folder, **options):
    """The task, and what becomes of each episode."""
    (scan,) = scanned(folder, **options)
    assert scan.task is not None
    return scan, list(sources.read(SOURCE, scan.task, scan.episodes))


def columns(path, edit):
    """Write a Parquet file again with its columns {name: array} edited; "twice" is another observation.grid."""
    table = pa.parquet.read_table(path)
    arrays = {name: table[name] for name in table.column_names}
    edit(arrays)
    names = [name.replace("twice", "observation.grid") for name in arrays]
    pa.parquet.write_table(pa.table(arrays).rename_columns(names), path)


def wrist(rows, data, name):
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    return pa.array([{"bytes": data, "path": name}] * rows, kind)


@pytest.mark.parametrize("version", VERSIONS)
def test_every_value_comes_back(written, version):
    truth = np.load(written / f"{version}.npz")
    scan, read = episodes(written / version)
    assert scan.task.name == version and len(read) == 4 and not (scan.rejected or scan.warnings or scan.notes)
    kinds = {spec.key: (spec.kind, spec.shape) for spec in scan.task.observation}
    assert kinds == {
        "state": ("continuous", (3,)),
        "grid": ("continuous", (2, 2)),
        "images/front": ("image", (48, 64, 3)),
        "images/wrist": ("image", (32, 32, 3)),
        "task": ("text", (16,)),
    }
    actions = np.concatenate([truth[f"{n}/action"] for n in range(4)])
    assert np.array_equal([scan.task.action.low, scan.task.action.high], [actions.min(axis=0), actions.max(axis=0)])
    for n, (ref, episode) in enumerate(zip(scan.episodes, read)):
        given = {
            name: truth[f"{n}/{name}"] for name in ("action", "next.reward", "observation.state", "observation.grid")
        }
        assert np.array_equal(episode.observation["state"], given["observation.state"])
        assert np.array_equal(episode.observation["grid"], given["observation.grid"])
        assert np.array_equal(episode.action, given["action"])
        assert np.array_equal(episode.reward, given["next.reward"][:, 0])
        assert ref.total == pytest.approx(given["next.reward"].sum(dtype=np.float64))
        assert np.array_equal(episode.observation["images/wrist"], truth[f"{n}/observation.images.wrist"])
        front, shown = truth[f"{n}/observation.images.front"], episode.observation["images/front"]
        error = np.abs(shown.astype(int) - front).mean(axis=(1, 2, 3))
        assert error.max() < CODEC
        for t in range(len(front)):  # each frame is its own, and not its neighbour
            others = [np.abs(shown[t].astype(int) - front[u]).mean() for u in range(len(front)) if u != t]
            assert error[t] < min(others)
        assert set(episode.observation["task"]) == {str(truth[f"{n}/task"])}
        assert (episode.terminated, episode.truncated) == (n % 2 == 0, n % 2 == 1)  # next.success


@pytest.mark.parametrize("version", VERSIONS)
def test_a_built_dataset_decodes_to_half_a_bin_whatever_the_order_of_files(written, tmp_path, version, monkeypatch):
    for name, turned in (("a", False), ("b", True)):
        arguments = ["--input", str(written / version), "--output", str(tmp_path / name), "--held-out-share", "0.25"]
        options, rest = build.parsed(arguments)
        assert options.source == "lerobot" and options.evidence.startswith("meta/info.json, codebase_version v")
        if turned:
            monkeypatch.setattr(Path, "glob", lambda *a, glob=Path.glob: sorted(glob(*a), reverse=True))
        build.build(options, build.beam_flags(rest, 1), build.Console(quiet=True))
    assert shards(tmp_path / "a") == shards(tmp_path / "b")
    dataset, truth = Dataset(tmp_path / "a"), np.load(written / f"{version}.npz")
    task = dataset.manifest.tasks[0].spec
    width = (np.array(task.action.high) - np.array(task.action.low)) / 1024
    for row, n in enumerate(dataset.column("position")):
        tokens = dataset.tokens(row)[:, -2:].astype(float) - dataset.manifest.vocabulary.action_continuous.start
        decoded = np.array(task.action.low) + (tokens + 0.5) * width
        assert (np.abs(decoded - truth[f"{n}/action"]) <= width / 2 + 1e-5).all()


def test_an_instruction_may_be_a_task(written):
    scans = scanned(written / "v30", task_per_instruction=True)
    assert [(scan.task.name, len(scan.episodes)) for scan in scans] == [
        ("v30-push-the-blue-block", 2),
        ("v30-push-the-red-block", 2),
    ]


@pytest.mark.parametrize("name", ["meta", "meta/info.json", "data", "videos"])
def test_a_folder_of_a_dataset_is_the_dataset(written, name):
    root = written / "v21"
    assert SOURCE.resolve(root / name, None, root) == [root / "meta/info.json"]
    assert SOURCE.recognise(root / name).evidence.endswith("info.json, codebase_version v2.1")


def test_what_is_observed_can_be_chosen(written, copy):
    scan, read = episodes(written / "v21", observation_keys=("observation.state", "observation.images.wrist"))
    assert {spec.key for spec in scan.task.observation} == {"state", "images/wrist", "task"}
    assert scan.notes == (
        "v21: not read: observation.grid, observation.images.front; --observation-keys names what to read",
    )
    assert set(read[0].observation) == {"state", "images/wrist", "task"}
    (scan,) = scanned(written / "v21", observation_keys=("observation.torque",))
    assert scan.task is None and "there are observation.grid" in scan.rejected[0].detail


def test_ranges_of_actions_are_the_options_or_without_statistics_the_datas(written, copy):
    scan, _ = episodes(written / "v21", action_low=(-3.0,), action_high=(60.0,))
    assert scan.task.action.low == (-3, -3) and scan.task.action.high == (60, 60)
    folder = copy("v30")
    (folder / "meta/stats.json").unlink()
    (own,), (data,) = scanned(written / "v30"), scanned(folder)
    assert data.task.action == own.task.action and "no statistics of actions" in data.notes[0]
    (folder / "meta/stats.json").write_text("[damaged")
    assert scanned(folder)[0].task.action == own.task.action
    (scan,) = scanned(written / "v30", action_low=(-1.0,) * 3, action_high=(1.0,) * 3)
    assert scan.rejected[0].reason == "wrong shape"


def test_a_dimension_that_never_changes_is_said(copy):
    folder = copy()
    for path in (folder / "data").glob("**/*.parquet"):
        columns(path, lambda arrays: arrays.update(action=pa.array([[0.5, 3.0]] * len(arrays["action"]))))
    (folder / "meta/episodes_stats.jsonl").unlink()
    scan, read = episodes(folder)
    assert "dimensions 0, 1 of the action never change" in scan.notes[1]
    assert all(not isinstance(episode, Rejection) for episode in read)
    assert scan.task.action.low[0] < 0.5 < scan.task.action.high[0]


def test_without_rewards_and_flags_it_is_said_and_episodes_end_with_their_recording(copy):
    folder = copy("v30")
    about = json.loads((folder / "meta/info.json").read_text())
    change(folder, features={k: v for k, v in about["features"].items() if not k.startswith("next.")} | {})
    columns(folder / "data/chunk-000/file-000.parquet", lambda a: [a.pop(k) for k in list(a) if k.startswith("next.")])
    scan, read = episodes(folder)
    assert scan.notes == ("v30: there is no next.reward: rewards and returns are 0",)
    assert all((ref.total, e.terminated, e.truncated, e.reward.any()) == (None, False, True, False)
               for ref, e in zip(scan.episodes, read))  # fmt: skip


def test_unknown_keys_other_names_and_channels_first_are_no_trouble(copy):
    folder = copy("v21")
    about = json.loads((folder / "meta/info.json").read_text())
    for name in ("observation.images.front", "observation.images.wrist"):
        feature = about["features"][name]
        height, width, channels = feature["shape"]
        feature |= {"shape": [channels, height, width], "names": ["channels", "height", "width"], "new": {"a": 1}}
    change(folder, features=about["features"], future={"x": [1]}, fps=10.0)
    scan, read = episodes(folder)
    assert {spec.key: spec.shape for spec in scan.task.observation}["images/front"] == (48, 64, 3)
    assert not any(isinstance(episode, Rejection) for episode in read)


def test_a_video_that_is_shorter_than_its_table_is_a_rejection_and_no_repeated_frame(copy, written):
    folder = copy("v21")
    videos = sorted((folder / "videos").glob("**/*.mp4"))
    shutil.copy(videos[0], videos[2])  # 8 frames for 14 rows
    videos[3].unlink()
    _, read = episodes(folder)
    assert [getattr(episode, "reason", "") for episode in read] == ["", "", "wrong length", "missing file"]
    assert "no frame at 0.800 s (timestep 8): it ends before" in read[2].detail


def test_a_video_of_an_unknown_codec_and_pipes_in_place_of_files_are_rejections(copy):
    """Nothing waits for a pipe that nobody writes."""
    folder = copy("v21")
    videos = sorted((folder / "videos").glob("**/*.mp4"))
    videos[1].write_bytes(videos[1].read_bytes().replace(b"av01", b"zzzz"))
    videos[2].unlink()
    os.mkfifo(videos[2])
    (folder / "data/chunk-000/._episode_000000.parquet").write_bytes(b"\0\5\x16\7")  # as a Mac leaves it
    os.mkfifo(folder / "data/chunk-000/x.parquet")
    _, read = episodes(folder)
    assert [getattr(episode, "reason", "") for episode in read] == ["", "corrupt video", "missing file", ""]
    (folder / "meta/tasks.jsonl").unlink()
    os.mkfifo(folder / "meta/tasks.jsonl")
    assert scanned(folder)[0].rejected[0].reason == "corrupt metadata"


def test_a_video_of_other_fps_than_its_table_is_a_rejection(copy):
    folder = copy("v21")
    path = sorted((folder / "data").glob("**/*.parquet"))[1]

    def faster(arrays):
        arrays["timestamp"] = pa.array(np.arange(len(arrays["timestamp"]), dtype=np.float32) / 25)

    columns(path, faster)
    change(folder, fps=25)
    _, read = episodes(folder)
    assert read[1].reason == "missing frame" and "the nearest is at" in read[1].detail


@pytest.mark.parametrize("version, name, reason", [
    ("v21", "data/chunk-000/episode_000001.parquet", "missing file"),
    ("v21", "meta/tasks.jsonl", "missing file"),
    ("v30", "meta/tasks.parquet", "missing file"),
    ("v30", "meta/episodes/chunk-000/file-000.parquet", "missing key"),
    ("v30", "data/chunk-000/file-000.parquet", "missing file"),
    ("v30", "videos/observation.images.front/chunk-000/file-000.mp4", "missing file"),
])  # fmt: skip
def test_a_missing_file_is_named(copy, version, name, reason):
    folder = copy(version)
    (folder / name).unlink()
    (scan,) = scanned(folder)
    found = list(scan.rejected)
    if scan.task:
        found += [e for e in sources.read(SOURCE, scan.task, scan.episodes) if isinstance(e, Rejection)]
    assert found and {rejection.reason for rejection in found} == {reason}
    if "tasks" in name:
        assert found[0].detail.startswith(f"{Path(name).name} is not there")


def test_a_file_that_was_missing_is_seen_once_it_is_back(copy):
    path = copy("v30") / "meta/episodes/chunk-000/file-000.parquet"
    kept = path.read_bytes()
    path.unlink()
    assert any(isinstance(one, Rejection) for one in episodes(path.parents[3])[1])
    path.write_bytes(kept)
    assert not any(isinstance(one, Rejection) for one in episodes(path.parents[3])[1])


@pytest.mark.parametrize("edit, reason", [
    (lambda a: a.update(action=pa.array([[1.0]] * len(a["action"]))), "wrong shape"),
    (lambda a: a.update(action=pa.array(["x"] * len(a["action"]))), "wrong dtype"),
    (lambda a: a.update(action=pa.array([[float("nan"), 0.0]] * len(a["action"]))), "not finite"),
    (lambda a: a.update(action=pa.array([None] * len(a["action"]), pa.list_(pa.float32()))), "not finite"),
    (lambda a: a.pop("observation.grid"), "missing key"),
    (lambda a: a.update(twice=a["observation.grid"]), "corrupt Parquet"),
    (lambda a: a.update(frame_index=pa.array(range(1, len(a["action"]) + 1))), "wrong length"),
    (lambda a: a.update(task_index=pa.array([7] * len(a["action"]))), "missing key"),
    (lambda a: a.update({"observation.images.wrist": wrist(len(a["action"]), b"\x89PNG", None)}), "corrupt picture"),
    (lambda a: a.update({"observation.images.wrist": wrist(len(a["action"]), None, "../../x.png")}), "corrupt picture"),
    (lambda a: a.update(timestamp=pa.array([0.0] * len(a["action"]))), "out of range"),
])  # fmt: skip
def test_a_column_that_makes_no_sense_rejects_its_episode_alone(copy, edit, reason):
    folder = copy("v21")
    columns(folder / "data/chunk-000/episode_000002.parquet", edit)
    _, read = episodes(folder)
    assert [getattr(episode, "reason", "") for episode in read] == ["", "", reason, ""]


def test_an_episode_of_another_length_than_its_metadata_says_is_rejected(copy):
    folder = copy("v21")
    path = folder / "data/chunk-000/episode_000001.parquet"
    pa.parquet.write_table(pa.parquet.read_table(path).slice(0, 5), path)
    (scan,) = scanned(folder)
    assert [ref.position for ref in scan.episodes] == [0, 2, 3]
    assert [(r.position, r.reason) for r in scan.rejected] == [(1, "wrong length")]


def test_lengths_that_the_metadata_lacks_are_named(copy):
    folder = copy("v30")
    columns(folder / "meta/episodes/chunk-000/file-000.parquet", lambda arrays: arrays.pop("length"))
    (scan,) = scanned(folder)
    assert scan.task is None and "no 'length'" in scan.rejected[0].detail


def test_names_that_lead_out_of_the_folder_are_refused(copy):
    folder = copy("v21")
    change(folder, video_path="../../{video_key}/episode_{episode_index:06d}.mp4")
    _, read = episodes(folder)
    assert {episode.reason for episode in read} == {"corrupt metadata"}


def test_an_unknown_version_names_those_that_are_read(copy):
    folder = copy("v21")
    change(folder, codebase_version="v1.6")
    (scan,) = scanned(folder)
    assert scan.task is None and "v2.0, v2.1, v3.0 are read" in scan.rejected[0].detail
    change(folder, codebase_version="x" * 10_000)
    assert len(scanned(folder)[0].rejected[0].detail) < 300
    (folder / "meta/info.json").write_text("{")
    assert scanned(folder)[0].rejected[0].reason == "corrupt metadata"
    with pytest.raises(SourceError, match="no LeRobot dataset"):
        SOURCE.resolve(folder / "data/chunk-000", None, folder)


def test_videos_without_pyav_name_the_extra(written, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    (scan,) = scanned(written / "v30")
    assert scan.task is None and "pip install 'gato-open[video]'" in scan.rejected[0].detail


def test_frames_in_order_are_decoded_once_and_any_order_gives_the_same(written):
    path = next((written / "v30/videos").glob("**/*.mp4"))
    times = np.arange(50) / 10
    with Video(path) as video:
        whole = video.frames(times, 0.05, (48, 64, 3))
        assert np.array_equal(video.frames(times[20:30], 0.05, (48, 64, 3)), whole[20:30])
        assert np.array_equal(video.frames(times[30:40], 0.05, (48, 64, 3)), whole[30:40])
        assert np.array_equal(video.frames(times[3:4], 0.05, (48, 64, 3)), whole[3:4])
        with pytest.raises(EpisodeError, match="wrong shape"):
            video.frames(times[:1], 0.05, (32, 32, 3))
        with pytest.raises(EpisodeError, match="no frame at"):
            video.frames(np.array([50.0]), 0.05, (48, 64, 3))


@pytest.mark.parametrize("version", VERSIONS[1:])
def test_damaged_bytes_are_rejections_and_no_traceback(copy, version):
    random.seed(version)
    folder = copy(version)
    files = sorted(path for path in folder.glob("**/*") if path.is_file())
    for path in files:
        whole = path.read_bytes()
        for n in range(6):
            data = bytearray(whole[: random.randrange(len(whole))] if n % 3 == 0 else whole)
            for _ in range(1 if n % 3 == 1 else 40):
                if data:
                    data[random.randrange(len(data))] = random.randrange(256)
            path.write_bytes(data)
            try:
                for scan in SOURCE.scan(SOURCE.resolve(folder, None, folder), Options()):
                    if scan.task:
                        list(sources.read(SOURCE, scan.task, scan.episodes))
                        [SOURCE.parts(ref.file) for ref in scan.episodes]
            except SourceError:
                pass
        path.write_bytes(whole)
