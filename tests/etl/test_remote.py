"""Input and output on object storage, against a local S3-compatible server: the same bytes as on disk."""

import os
import socket
import subprocess
import sys
import time

import fsspec
import pytest

from schemas.dataset import load_manifest
from shards.folder import Folder
from tests.conftest import run
from tests.etl.test_build import SMALL, d4rl_file, digests

pytestmark = pytest.mark.process

pytest.importorskip("s3fs")
pytest.importorskip("moto")


@pytest.fixture(scope="module")
def s3():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    settings = {
        "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "NO_PROXY": "127.0.0.1",
    }  # fmt: skip
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        for _ in range(300):
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                time.sleep(0.1)
        store = fsspec.filesystem("s3", skip_instance_cache=True)
        store.mkdir("bucket")
        yield store
    finally:
        server.kill()
        server.wait()
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


@pytest.fixture(scope="module")
def inputs(s3, tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    d4rl_file(folder / "a-medium-v4.hdf5")
    d4rl_file(folder / "b-expert-v4.hdf5", episodes=30)
    for path in folder.iterdir():
        s3.put_file(str(path), f"bucket/logs/{path.name}")
    return folder


@pytest.fixture(scope="module")
def built(inputs, tmp_path_factory):
    output = tmp_path_factory.mktemp("built") / "d"
    run("etl.build", "--input", inputs, "--output", output, *SMALL)
    return output


def copied(s3, place, folder):
    s3.get(f"bucket/{place}", str(folder), recursive=True)
    return folder


def test_from_and_to_a_bucket_gives_the_local_bytes(s3, built, tmp_path):
    arguments = ("--input", "s3://bucket/logs", "--output", "s3://bucket/shards/d", "--cache", tmp_path, *SMALL)
    run("etl.build", *arguments)
    assert not [name for name in s3.find("bucket/shards/d") if ".build" in name or ".tmp" in name]
    there = copied(s3, "shards/d", tmp_path / "there")
    assert digests(there) == digests(built)
    run("shards.verify", "--full", there)
    assert "already built" in run("etl.build", *arguments).stderr
    s3.rm_file("bucket/shards/d/shard-000001.tar")
    assert "building the dataset again" in run("etl.build", *arguments).stderr
    assert digests(copied(s3, "shards/d", tmp_path / "again")) == digests(built)


def test_a_worker_fetches_what_it_lacks(s3, built, tmp_path):
    """Two worker processes with an empty cache of the driver's files: as on other machines."""
    cache = tmp_path / "cache"
    run("etl.build", "--input", "s3://bucket/logs", "--output", tmp_path / "d", "--cache", cache, *SMALL)
    assert digests(tmp_path / "d") == digests(built)
    from etl.fetch.remote import ensure

    (file,) = (cache / "remote" / "s3" / "bucket" / "logs").glob("a-*.hdf5")
    content = file.read_bytes()
    file.unlink()
    ensure(file, "s3://bucket/logs/a-medium-v4.hdf5")
    assert file.read_bytes() == content


def test_a_single_remote_file(s3, inputs, tmp_path):
    run("etl.build", "-i", "s3://bucket/logs/a-medium-v4.hdf5", "-o", tmp_path / "d", "--cache", tmp_path, *SMALL)
    assert [task.spec.name for task in load_manifest(tmp_path / "d").tasks] == ["a-medium-v4"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--input", "s3://bucket/nothing"), "s3://bucket/nothing"),
        (("--input", "s3://no-such-bucket/logs"), "s3://no-such-bucket/logs"),
        (("--input", "nonsense://x/y"), "nonsense"),
        (("--input", "s3://bucket/logs", "--output", "nonsense://x/y"), "nonsense"),
    ],
)
def test_bad_addresses_are_one_clear_error(s3, inputs, tmp_path, arguments, message):
    done = run("etl.build", *arguments, "--cache", tmp_path, check=False)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and len(errors) == 1 and message in errors[0], done.stderr


def test_a_folder_behaves_the_same_near_and_far(s3, tmp_path):
    for place in (tmp_path / "f", "s3://bucket/f"):
        folder = Folder(place)
        assert folder.read("x") is None and folder.names("*") == [] and not folder.holds("x", 1, "")
        folder.write(".build/x", b"abc")
        folder.write("y.tar", b"1")
        assert folder.read(".build/x") == b"abc" and folder.names("*", ".build") == ["x"]
        temporary = folder.temporary("z.tar")
        temporary.write_bytes(b"whole")
        folder.publish(temporary, "z.tar")
        assert not temporary.exists() and folder.read("z.tar") == b"whole"
        assert folder.names("*.tar") == ["y.tar", "z.tar"]
        folder.remove(".build")
        folder.remove("nothing")
        assert folder.read(".build/x") is None and folder.holds("y.tar", 1, Folder(tmp_path).path("")) is (
            folder.local is None
        )
