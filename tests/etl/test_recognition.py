"""`--input ANYTHING`: each format is recognised by its own files, and what is not says what was seen."""

import json
import random
import shutil

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from rich.console import Console

from etl import build, sources
from etl.sources import Recognition, SourceError

KEYS = ("observations", "actions", "rewards", "terminals")


def d4rl_file(path):
    with h5py.File(path, "w") as file:
        for key in KEYS:
            file[key] = np.zeros((4, 1), np.float32)
    return path


def recognised(place):
    source, evidence = sources.recognise(place)
    return source.name, evidence


def test_d4rl_by_its_keys_whatever_lies_beside_it(tmp_path):
    d4rl_file(tmp_path / "own.hdf5")
    (tmp_path / "README.md").write_text("what it is")
    assert recognised(tmp_path) == ("d4rl", "own.hdf5 has keys observations, actions, rewards, terminals")
    assert recognised(tmp_path / "own.hdf5")[0] == "d4rl"


def test_hdf5_files_of_one_s_own_whose_flags_show_the_episodes(tmp_path):
    def put(name, *keys):
        with h5py.File(tmp_path / name, "w") as file:
            for key in keys:
                file[key] = np.zeros((4, 1), np.float32)
        return tmp_path / name

    nested = put("nested.hdf5", "observations/state", "actions", "rewards", "terminals")
    assert recognised(nested) == ("hdf5", "nested.hdf5 has keys actions, observations, rewards, terminals")
    assert recognised(put("d.h5", "observation", "actions", "reward", "dones"))[0] == "hdf5"
    assert recognised(put("t.h5", "obs", "actions", "rewards", "terminations", "truncations"))[0] == "hdf5"
    with pytest.raises(SourceError, match="keys in none.h5: actions, observations"):  # where does an episode end?
        sources.recognise(put("none.h5", "observations", "actions", "rewards"))
    half = nested.read_bytes()[:900]
    (tmp_path / "half.hdf5").write_bytes(half)
    with pytest.raises(SourceError, match="half.hdf5 cannot be read: .*HDF5"):
        sources.recognise(tmp_path / "half.hdf5")


def test_minari_by_its_spaces_and_babyai_by_its_level(tmp_path):
    about = {"observation_space": "{}", "action_space": "{}", "data_format": "hdf5"}
    (tmp_path / "a/data").mkdir(parents=True)
    (tmp_path / "a/data/metadata.json").write_text(json.dumps(about))
    assert recognised(tmp_path) == ("minari", "a/data/metadata.json with spaces, data_format hdf5")
    (tmp_path / "a/data/metadata.json").write_text(json.dumps(about | {"env_spec": '{"id": "BabyAI-GoToLocal-v0"}'}))
    assert recognised(tmp_path)[0] == "babyai"
    (tmp_path / "a/data/metadata.json").write_text("[damaged")
    with pytest.raises(SourceError, match=r"one file, metadata\.json"):
        sources.recognise(tmp_path)
    d4rl_file(tmp_path / "a/data/main_data.hdf5")
    assert recognised(tmp_path) == ("minari", "a/data/main_data.hdf5")


def test_dqn_replay_by_the_names_of_its_arrays(tmp_path):
    folder = tmp_path / "Pong/1/replay_logs"
    folder.mkdir(parents=True)
    (folder / "$store$_reward_ckpt.0.gz").write_bytes(b"")
    assert recognised(tmp_path) == ("atari", "Pong/1/replay_logs/$store$_reward_ckpt.0.gz")


def test_texts_by_their_endings_and_parquet_by_its_column(tmp_path):
    (tmp_path / "c.jsonl").write_text('{"text": "a"}\n')
    assert recognised(tmp_path) == ("text", "1 of 1 files end in .jsonl")
    pa.parquet.write_table(pa.table({"text": ["a"]}), tmp_path / "t.parquet")
    assert recognised(tmp_path / "t.parquet")[0] == "text"
    pa.parquet.write_table(pa.table({"number": [1]}), tmp_path / "t.parquet")
    with pytest.raises(SourceError, match=r"one file, t\.parquet; keys in t\.parquet: number"):
        sources.recognise(tmp_path / "t.parquet")


def test_what_is_of_no_format_says_what_was_seen_and_what_is_read(tmp_path):
    for name in ("a.bag", "b.bag", "c.npy"):
        (tmp_path / name).write_bytes(b"x")
    with h5py.File(tmp_path / "d.h5", "w") as file:
        file["pose"], file["torque"] = 1, 2
    with pytest.raises(SourceError) as error:
        sources.recognise(tmp_path)
    lines = str(error.value).splitlines()
    assert "4 files: 2 .bag, 1 .npy, 1 .h5; keys in d.h5: pose, torque" in lines[0] and "--source" in lines[0]
    assert [line.split(":")[0].strip() for line in lines[1:]] == sources.names()
    with pytest.raises(SourceError, match="no file"):
        sources.recognise(tmp_path / "nowhere")


def test_logs_of_a_format_with_weaker_marks_are_not_left_out_in_silence(tmp_path):
    """As two recordings into one --output leave them."""
    about = {"observation_space": "{}", "action_space": "{}", "data_format": "hdf5"}
    (tmp_path / "cartpole/random-v1/data").mkdir(parents=True)
    (tmp_path / "cartpole/random-v1/data/metadata.json").write_text(json.dumps(about))
    evidence = "cartpole/random-v1/data/metadata.json with spaces, data_format hdf5"
    assert recognised(tmp_path) == ("minari", evidence)
    d4rl_file(tmp_path / "own.hdf5")
    beside = "; not read is what looks like d4rl (own.hdf5 has keys observations, actions, rewards, terminals): give it"
    assert recognised(tmp_path) == ("minari", f"{evidence}{beside} as --input by itself")


def test_two_formats_in_one_folder_are_an_error_that_lists_both(tmp_path, monkeypatch):
    d4rl_file(tmp_path / "own.hdf5")

    class Other:
        name = "other"

        def recognise(self, input):
            return Recognition("own.hdf5 looks odd", 1)

    monkeypatch.setattr(sources, "_registered", {"other": Other()})
    with pytest.raises(
        SourceError, match=r"d4rl \(own.hdf5 has keys.*\) and other \(own.hdf5 looks odd\); give --source"
    ):
        sources.recognise(tmp_path)
    monkeypatch.delattr(Other, "recognise")  # a plug-in of before
    assert recognised(tmp_path)[0] == "d4rl"


def test_damaged_files_are_never_recognised_by_an_error(tmp_path, logs):
    whole = (next((logs / "d4rl").glob("*.hdf5"))).read_bytes()
    random.seed(0)
    for n in range(12):
        data = bytearray(whole[: random.randrange(200, len(whole))] if n % 2 else whole)
        for _ in range(50):
            data[random.randrange(min(len(data), 4000))] = random.randrange(256)
        for suffix in (".hdf5", ".json", ".parquet", ".tfrecord", ".jsonl"):
            (tmp_path / f"file{suffix}").write_bytes(data)
        for name in ("metadata.json", "main_data.hdf5", "info.json", "features.json"):
            (tmp_path / name).write_bytes(data)
        for path in [tmp_path, *tmp_path.iterdir()]:
            for name in sources.names():
                recognition = sources.load(name).recognise(path)
                assert recognition is None or recognition.certainty in (0, 1, 2)


def test_the_build_takes_what_it_recognises_and_says_so(tmp_path, logs):
    console = Console(record=True, quiet=False, width=200)
    options, rest = build.parsed(
        ["-i", str(logs / "d4rl"), "-o", str(tmp_path / "d"), "--max-episode-steps", "99"], console
    )
    assert options.source == "d4rl" and not rest and options.scan.max_episode_steps == 99
    manifest = build.build(options, build.beam_flags(rest, 1), console)
    assert "d4rl: read as d4rl (hopper-random-v4.hdf5 has keys observations" in console.export_text()
    assert manifest.tasks[0].spec.source == "d4rl"
    options, _ = build.parsed(["--input", str(logs / "dqn_replay"), "--frames", "padded"], console)
    assert options.source == "atari" and options.scan.frames == "padded"


def test_without_input_the_source_is_the_one_that_knows_the_dataset(tmp_path):
    assert build.parsed([])[0].source == "d4rl"
    for dataset, source in {"hopper-medium-v2": "d4rl", "Pong/1": "atari", "D4RL/door/human-v2": "minari"}.items():
        assert build.parsed(["--dataset", dataset, "--cache", str(tmp_path)])[0].source == source
    with pytest.raises(SourceError, match="no such file"):
        build.parsed(["--input", str(tmp_path / "nowhere")])


def test_links_to_folders_are_not_followed(tmp_path):
    d4rl_file(tmp_path / "own.hdf5")
    (tmp_path / "below").mkdir()
    (tmp_path / "below/loop").symlink_to(tmp_path)
    shutil.copy(tmp_path / "own.hdf5", tmp_path / "below/same.hdf5")
    assert recognised(tmp_path / "below")[1].startswith("same.hdf5")
