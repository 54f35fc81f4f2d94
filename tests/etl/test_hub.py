"""Logs of the Hugging Face hub by name, for every source whose logs lie there, from a server on this machine."""

import pytest

from etl import sources
from etl.fetch import hub as fetch
from etl.sources import SourceError, of_dataset
from tests.etl.test_determinism import WRITERS
from tests.etl.test_lerobot_hub import ID, serving

KINDS = ("d3rlpy", "hdf5", "hdf5-npz", "imagetext", "jat", "maniskill", "rlds", "robomimic", "vintix")


@pytest.fixture
def repository(tmp_path, monkeypatch, request):
    """The source, its logs on disk, and a server of them below the folder 'logs v1', a card beside it."""
    place = tmp_path / "written" / "logs v1"
    place.mkdir(parents=True)
    WRITERS[request.param](place)
    (place.parent / "README.md").write_text("# a card")
    with serving(place.parent, monkeypatch) as server:
        yield sources.load(request.param.split("-")[0]), place, server


@pytest.mark.parametrize("repository", KINDS, indirect=True)
def test_logs_arrive_once_and_are_those_on_disk(repository, tmp_path):
    source, place, server = repository
    cache = tmp_path / "cache"
    files = source.resolve(None, f"{ID}/logs v1", cache)
    assert all(path.is_relative_to(cache / source.name / ID / "logs v1") for path in files)
    wanted, found = (source.scan(some, source.options()) for some in (source.resolve(place, None, place), files))
    assert [(s.task, s.warnings, s.notes, s.rejected) for s in found] == [
        (s.task, s.warnings, s.notes, s.rejected) for s in wanted
    ]
    assert sum(len(scan.episodes) for scan in found) == sum(len(scan.episodes) for scan in wanted) > 2
    assert not (cache / source.name / ID / "README.md").exists()
    count = len(server.requests)
    assert source.resolve(None, f"{ID}/logs v1", cache) == files and len(server.requests) == count
    assert f"{ID}/logs v1" in {one.id for one in source.known(cache) if one.cached}
    assert of_dataset(f"{ID}/logs v1", cache) == source.name


@pytest.mark.parametrize("repository", ["jat"], indirect=True)
def test_a_folder_of_it_brings_no_other(repository, tmp_path):
    source, _, server = repository
    (first, *_) = files = source.resolve(None, f"{ID}/logs v1/atari-pong", tmp_path)
    assert {path.parent.name for path in files} == {"atari-pong"} and first.is_file()
    assert not any("mujoco" in path for path, _ in server.requests)
    assert {path.parent.name for path in source.resolve(None, ID, tmp_path)} > {"atari-pong"}
    assert source.resolve(None, f"{ID}/logs v1/atari-pong", tmp_path)


@pytest.mark.parametrize("repository", ["robomimic"], indirect=True)
def test_what_to_do_where_it_cannot_be_had(repository, tmp_path, monkeypatch):
    source, _, server = repository
    for name in ("lift", "a/../b", "a/b/../c", "/etc/passwd", "a/b@c/d/.."):
        with pytest.raises(SourceError, match="no repository of the hub; give --dataset one such as robomimic/"):
            source.resolve(None, name, tmp_path)
    with pytest.raises(SourceError, match=r"status 404; check its name; run `hf download someone/else"):
        source.resolve(None, "someone/else", tmp_path)
    with pytest.raises(SourceError, match=r"no .hdf5 file in it"):
        source.resolve(None, f"{ID}/README", tmp_path)
    with pytest.raises(SourceError, match=r"needs --input; give --dataset with a repository of the Hugging Face hub"):
        source.resolve(None, None, tmp_path)
    server.token = "hf_secret"
    with pytest.raises(SourceError, match=r"gated.*HF_TOKEN"):
        source.resolve(None, ID, tmp_path)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert source.resolve(None, ID, tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(SourceError, match=r"cannot reach .*; run `hf download .*give --input FOLDER"):
        source.resolve(None, ID, tmp_path / "elsewhere")
    assert fetch.place_of("a/b@v1.5/c d/e/", "") == ("a/b", "v1.5", "c d/e")
