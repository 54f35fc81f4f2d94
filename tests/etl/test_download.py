"""Downloads against a real HTTP server on this machine, with the faults that servers have."""

import base64
import fcntl
import gzip
import hashlib
import http.server
import io
import re
import socket
import threading

import h5py
import numpy as np
import pytest

from etl.fetch import download
from etl.fetch.download import fetch
from etl.sources import SourceError
from etl.sources.atari import SOURCE as ATARI
from etl.sources.d4rl import SOURCE as D4RL

CONTENT = np.random.default_rng(0).bytes(3_000_000)


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        server = self.server
        server.requests.append((self.path, self.headers.get("Range")))
        fault = server.faults.pop(0) if server.faults else None
        content = server.files.get(self.path)
        if isinstance(fault, int):
            return self.send_empty(fault)
        if content is None:
            return self.send_empty(404)
        start, status = 0, 200
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if match and server.etag and self.headers.get("If-Range") == server.etag:
            start, status = int(match[1]), 206
        self.send_response(status)
        if server.etag:
            self.send_header("ETag", server.etag)
        if status == 206:
            first = start + 1 if fault == "shifted" else start
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        if server.md5:
            self.send_header("x-goog-hash", "crc32c=AAAAAA==")
            self.send_header("x-goog-hash", f"md5={base64.b64encode(hashlib.md5(content).digest()).decode()}")
        body = content[start:]
        self.send_header("Content-Length", str(len(body) + (1000 if fault == "long" else 0)))
        self.end_headers()
        if fault == "flip":
            body = bytes([body[0] ^ 1]) + body[1:]
        if fault in ("drop", "long"):
            self.wfile.write(body[: len(body) // 2] if fault == "drop" else body)
            self.close_connection = True
            return None
        self.wfile.write(body)
        return None

    def send_empty(self, status):
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(download, "BACKOFF_SECONDS", 0.001)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.files, server.faults, server.requests, server.etag, server.md5 = {"/a/b.bin": CONTENT}, [], [], '"1"', 1
        server.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def get(server, folder, **kwargs):
    return fetch(f"{server.url}/a/b.bin", folder, **kwargs)


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_whole_file_then_cache(server, tmp_path):
    path = get(server, tmp_path / "new")
    assert path == tmp_path / "new" / "b.bin" and path.read_bytes() == CONTENT
    assert names(path.parent) == ["b.bin", "b.bin.sha256"]
    assert (path.parent / "b.bin.sha256").read_text().split() == [hashlib.sha256(CONTENT).hexdigest(), "b.bin"]
    assert get(server, tmp_path / "new") == path and len(server.requests) == 1


def test_resumes_after_a_drop(server, tmp_path):
    server.faults = ["drop", "drop"]
    assert get(server, tmp_path).read_bytes() == CONTENT
    ranges = [r for _, r in server.requests]
    assert ranges[0] is None and ranges[1].startswith("bytes=") and ranges[2] > ranges[1]
    assert names(tmp_path) == ["b.bin", "b.bin.sha256"]


def test_resumes_in_a_later_process(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "ATTEMPTS", 1)
    server.faults = ["drop"]
    with pytest.raises(SourceError):
        get(server, tmp_path)
    assert names(tmp_path) == ["b.bin.part", "b.bin.part.etag"]
    size = (tmp_path / "b.bin.part").stat().st_size
    assert 0 < size < len(CONTENT)
    assert get(server, tmp_path).read_bytes() == CONTENT
    assert server.requests[-1][1] == f"bytes={size}-"


@pytest.mark.parametrize("etag", ['"2"', None])
def test_starts_over_where_the_server_cannot_vouch_for_the_rest(server, tmp_path, etag):
    (tmp_path / "b.bin.part").write_bytes(b"something else")
    (tmp_path / "b.bin.part.etag").write_text('"1"')
    server.etag = etag
    assert get(server, tmp_path).read_bytes() == CONTENT


def test_a_part_of_unknown_version_is_not_resumed(server, tmp_path):
    (tmp_path / "b.bin.part").write_bytes(b"something else")
    assert get(server, tmp_path).read_bytes() == CONTENT
    assert server.requests == [("/a/b.bin", None)]


@pytest.mark.parametrize("faults", [[503], [503, 500, 429, 503], ["long"], ["flip"], ["drop", 416]])
def test_faults_that_pass(server, tmp_path, faults):
    server.faults = faults
    assert get(server, tmp_path).read_bytes() == CONTENT


def test_a_server_that_resumes_elsewhere_is_asked_again(server, tmp_path):
    server.faults = ["drop", "shifted"]
    assert get(server, tmp_path).read_bytes() == CONTENT
    first, second, third = [r for _, r in server.requests]
    assert first is None and second == third


def test_faults_that_stay(server, tmp_path):
    server.faults = [503] * 50
    with pytest.raises(SourceError, match="status 503") as error:
        get(server, tmp_path)
    assert str(tmp_path / "b.bin") in str(error.value) and "etl.record" in str(error.value)
    assert len(server.requests) == download.ATTEMPTS and names(tmp_path) == []


def test_a_length_that_never_arrives(server, tmp_path):
    server.faults, server.etag = ["long"] * 50, None
    with pytest.raises(SourceError, match="cannot download"):
        get(server, tmp_path)
    assert "b.bin" not in names(tmp_path)


def test_bytes_that_differ_from_the_servers_checksum(server, tmp_path):
    server.faults = ["flip"] * 50
    with pytest.raises(SourceError, match="md5"):
        get(server, tmp_path)
    assert "b.bin" not in names(tmp_path)


def test_missing_file_is_not_tried_again(server, tmp_path):
    with pytest.raises(SourceError, match="404"):
        fetch(f"{server.url}/none.bin", tmp_path)
    assert len(server.requests) == 1 and names(tmp_path) == []


def test_known_sha256(server, tmp_path):
    digest = hashlib.sha256(CONTENT).hexdigest()
    assert get(server, tmp_path / "good", sha256=digest.upper()).is_file()
    with pytest.raises(SourceError, match="sha256"):
        get(server, tmp_path / "bad", sha256="0" * 64)
    assert not (tmp_path / "bad" / "b.bin").exists()
    with pytest.raises(SourceError, match="delete it"):
        get(server, tmp_path / "good", sha256="0" * 64)


def test_a_cached_file_that_changed_is_refused(server, tmp_path):
    path = get(server, tmp_path)
    path.write_bytes(CONTENT[:-1])
    with pytest.raises(SourceError, match="delete it and b.bin.sha256") as error:
        get(server, tmp_path)
    assert str(path) in str(error.value)


def test_a_file_put_there_by_hand_is_taken_and_remembered(server, tmp_path):
    (tmp_path / "b.bin").write_bytes(b"mine")
    assert get(server, tmp_path).read_bytes() == b"mine" and server.requests == []
    (tmp_path / "b.bin").write_bytes(b"other")
    with pytest.raises(SourceError, match="delete it"):
        get(server, tmp_path)


def test_without_network_one_line_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(download, "BACKOFF_SECONDS", 0.001)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/x/file.hdf5"
    with pytest.raises(SourceError) as error:
        fetch(url, tmp_path)
    message = str(error.value)
    assert "\n" not in message and "refused" in message
    assert url in message and str(tmp_path / "file.hdf5") in message and "python -m etl.record" in message


def test_two_processes_do_not_write_the_same_part(server, tmp_path):
    with open(tmp_path / "b.bin.part", "ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(SourceError, match="another process"):
            get(server, tmp_path)


def test_d4rl_download(server, tmp_path, monkeypatch):
    monkeypatch.setenv(download.MIRROR_VARIABLE, f"{server.url}/")
    with h5py.File(tmp_path / "log.hdf5", "w") as file:
        for key, shape in (("observations", (9, 11)), ("actions", (9, 3)), ("rewards", 9), ("terminals", 9)):
            file[key] = np.zeros(shape, np.float32)
    server.files["/datasets/offline_rl/gym_mujoco_v2/hopper_medium-v2.hdf5"] = (tmp_path / "log.hdf5").read_bytes()
    (path,) = D4RL.resolve(None, None, tmp_path / "cache")
    assert path == tmp_path / "cache" / "d4rl" / "hopper_medium-v2.hdf5"
    (scan,) = D4RL.scan([path], D4RL.options())
    assert scan.task.name == "hopper-medium-v2" and [ref.timesteps for ref in scan.episodes] == [9]


@pytest.mark.parametrize("dataset, run, number", [(None, 1, 0), ("pong/3", 3, 0), ("Pong/2/7", 2, 7)])
def test_atari_download(server, tmp_path, monkeypatch, dataset, run, number):
    monkeypatch.setenv(download.MIRROR_VARIABLE, server.url)
    arrays = {
        "$store$_observation": np.ones((9, 84, 84), np.uint8),
        "$store$_action": np.zeros(9, np.int32),
        "$store$_reward": np.zeros(9, np.float32),
        "$store$_terminal": np.zeros(9, np.uint8),
        "add_count": np.array(8),
    }
    for name, array in arrays.items():
        plain = io.BytesIO()
        np.save(plain, array)
        address = f"/atari-replay-datasets/dqn/Pong/{run}/replay_logs/{name}_ckpt.{number}.gz"
        server.files[address.replace("$", "%24")] = gzip.compress(plain.getvalue())
    files = ATARI.resolve(None, dataset, tmp_path / "cache")
    assert [p.name for p in files] == [f"$store$_action_ckpt.{number}.gz"]
    assert len(server.requests) == len(arrays)
    (scan,) = ATARI.scan(files, ATARI.options())
    assert scan.task.name == f"pong-run{run}" and [ref.timesteps for ref in scan.episodes] == [8]
