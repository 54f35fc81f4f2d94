"""LeRobot datasets by their id, from a server on this machine that answers as the Hugging Face hub does."""

import hashlib
import http.server
import json
import tarfile
import threading
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from etl.fetch import download
from etl.sources import SourceError, of_dataset
from etl.sources.lerobot import SOURCE, Options

FIXTURE = Path(__file__).parents[1] / "fixtures/lerobot.tar.xz"
ID = "someone/two-cameras"


class Hub(http.server.BaseHTTPRequestHandler):
    """/api/datasets/ID/tree/REVISION, two entries a page, and /datasets/ID/resolve/REVISION/PATH."""

    def do_GET(self):
        server, url = self.server, urlsplit(self.path)
        server.requests.append((self.path, self.headers.get("Authorization")))
        if server.token and self.headers.get("Authorization") != f"Bearer {server.token}":
            return self.answer(401, b"")
        if url.path.startswith(f"/api/datasets/{ID}/tree/main"):
            below = unquote(url.path).removeprefix(f"/api/datasets/{ID}/tree/main").strip("/")
            listing = [one for one in server.listing if one["path"].startswith(below)]
            first = int(parse_qs(url.query).get("cursor", ["0"])[0])
            page = listing[first : first + 2]
            more = f'<http://{self.headers["Host"]}{url.path}?recursive=true&cursor={first + 2}>; rel="next"'
            return self.answer(200, json.dumps(page).encode(), Link=more if first + 2 < len(listing) else None)
        name = unquote(url.path).removeprefix(f"/datasets/{ID}/resolve/main/")
        return self.answer(200, server.files[name]) if name in server.files else self.answer(404, b"")

    def answer(self, status, body, **headers):
        self.send_response(status)
        for key, value in headers.items():
            if value:
                self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@contextmanager
def serving(root, monkeypatch):
    """A server of the files below a folder."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files = {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    server.files["README.md"] = b"# a card"
    server.listing = [{"type": "directory", "path": "meta"}] + [
        {"type": "file", "path": name, "size": len(data), "lfs": {"oid": hashlib.sha256(data).hexdigest()}}
        for name, data in server.files.items()
    ]
    server.requests, server.token = [], ""
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(download, "BACKOFF_SECONDS", 0.01)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with tarfile.open(FIXTURE) as archive:
        archive.extractall(tmp_path / "written", filter="data")
    with serving(tmp_path / "written/v21", monkeypatch) as server:
        yield server


def test_a_dataset_arrives_once_and_is_read(hub, tmp_path):
    (info,) = SOURCE.resolve(None, ID, tmp_path / "cache")
    assert info == tmp_path / "cache/lerobot" / ID / "meta/info.json"
    (scan,) = SOURCE.scan([info], Options())
    assert len(scan.episodes) == 4 and scan.task.name == "two-cameras" and not scan.rejected
    assert not (info.parents[1] / "README.md").exists()
    count = len(hub.requests)
    assert SOURCE.resolve(None, ID, tmp_path / "cache") == [info] and len(hub.requests) == count
    known = {one.id: one.cached for one in SOURCE.known(tmp_path / "cache")}
    assert known[ID] == info and known["lerobot/pusht"] is None
    assert of_dataset("lerobot/pusht", tmp_path / "cache") == "lerobot" == of_dataset(ID, tmp_path / "cache")


def test_the_token_goes_along_and_a_gated_dataset_says_how_to_get_in(hub, tmp_path, monkeypatch):
    hub.token = "hf_secret"
    with pytest.raises(SourceError, match=r"gated.*HF_TOKEN.*hf download someone/two-cameras") as error:
        SOURCE.resolve(None, ID, tmp_path / "cache")
    assert len(str(error.value).splitlines()) == 1
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    SOURCE.resolve(None, ID, tmp_path / "cache")
    assert {token for _, token in hub.requests[1:]} == {"Bearer hf_secret"}


def test_an_interrupted_download_goes_on_and_a_wrong_file_is_refused(hub, tmp_path):
    name = "data/chunk-000/episode_000002.parquet"
    whole = hub.files[name]
    hub.files[name] = whole[:-1] + b"x"
    with pytest.raises(SourceError, match="arrived with sha256"):
        SOURCE.resolve(None, ID, tmp_path / "cache")
    hub.files[name] = whole
    asked = len(hub.requests)
    SOURCE.resolve(None, ID, tmp_path / "cache")
    again = [path for path, _ in hub.requests[asked:] if "/resolve/" in path]
    assert any("episode_000002.parquet" in path for path in again)
    assert not any("meta/info.json" in path or "episode_000000.parquet" in path for path in again)


def test_no_network_no_such_dataset_and_strange_names(hub, tmp_path, monkeypatch):
    with pytest.raises(SourceError, match="status 404; check its name"):
        SOURCE.resolve(None, "someone/else", tmp_path)
    for name in ("pusht", "a/../b", "a/b/c", "/etc/passwd"):
        with pytest.raises(SourceError, match="no repository of the hub"):
            SOURCE.resolve(None, name, tmp_path)
    hub.listing.append({"type": "file", "path": "meta/../../../evil", "size": 1})
    with pytest.raises(SourceError, match="leads out of the dataset"):
        SOURCE.resolve(None, ID, tmp_path / "cache")
    assert not (tmp_path / "evil").exists()
    hub.listing[:] = [entry for entry in hub.listing if entry["path"] != "meta/info.json"][:-1]
    with pytest.raises(SourceError, match="it is no LeRobot dataset"):
        SOURCE.resolve(None, ID, tmp_path / "cache")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(SourceError, match=r"cannot reach .*; run `hf download .*give --input FOLDER"):
        SOURCE.resolve(None, ID, tmp_path / "elsewhere")
