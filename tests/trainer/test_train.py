"""The real command under the real launcher: world sizes, resuming after kills, damage, bad input."""

import http.server
import json
import shutil
import threading
from functools import partial
from pathlib import Path

import pytest
from safetensors.numpy import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.trainer.launch import errors, losses, metrics_at, train
from trainer.checkpoint import CheckpointError, latest
from trainer.model.export import load_export

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def finished(hopper, pong, tmp_path_factory):
    output = tmp_path_factory.mktemp("run")
    train(output, [hopper, pong], cold=True)
    return output


def test_a_run_leaves_an_export_that_loads(finished):
    model, info = load_export(finished / "export")
    assert info.step == 6 and sorted(task.name for task in info.tasks) == ["hopper-random-v4", "pong-run1"]
    assert sum(p.numel() for p in model.parameters()) == model.parameter_counts()["total"]
    last = json.loads((finished / "metrics.jsonl").read_text().splitlines()[-1])
    assert {f"held_out/{t}/{f}" for t in ("hopper-random-v4",) for f in ("loss", "accuracy", "action_error")} <= set(
        last
    )
    assert list((finished / "tensorboard").iterdir())


def test_an_export_from_before_a_setting_has_the_settings_default(finished, tmp_path):
    about = shutil.copytree(finished / "export", tmp_path / "export") / "model.json"
    body = json.loads(about.read_text())
    assert body["model"].pop("patch_norm") == "channel"  # tiny's
    about.write_text(json.dumps(body))
    assert load_export(about.parent)[1].model.patch_norm == "group"


@pytest.mark.parametrize(("stage", "processes"), [(0, 2), (1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (3, 2)])
def test_zero_stages_and_world_sizes_give_the_same_losses(finished, hopper, pong, tmp_path, stage, processes):
    train(tmp_path, [pong, hopper], "--deepspeed", f"zero{stage}_cpu", processes=processes)
    assert losses(tmp_path) == pytest.approx(losses(finished), rel=1e-5)
    ours, theirs = (load_file(f / "export" / "weights.safetensors") for f in (tmp_path, finished))
    assert all(abs(ours[name] - theirs[name]).max() < 1e-3 for name in theirs)


def test_damaged_checkpoints_are_passed_over(finished, tmp_path, capsys):
    folder = shutil.copytree(finished / "checkpoints", tmp_path / "c")
    newest = latest(folder)
    assert newest is not None and newest.step == 6
    for path in [folder / newest.tag / name for name in newest.files] + [folder / f"{newest.tag}.json"]:
        whole = path.read_bytes()
        for damaged in (whole[:-1], whole[:200] + bytes([whole[200] ^ 1]) + whole[201:], None):
            path.unlink() if damaged is None else path.write_bytes(damaged)
            found = latest(folder)
            assert found is not None and found.step == 4
            # a record that is gone is a checkpoint that never was: nothing to tell
            assert path.name in capsys.readouterr().out or (damaged is None and path.suffix == ".json")
            path.write_bytes(whole)
    for record in folder.glob("*.json"):
        record.write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        latest(folder)


def test_bad_input_is_one_clear_line(finished, hopper, tmp_path):
    empty = tmp_path / "none"
    empty.mkdir()
    cases = [
        (train(tmp_path / "a", [empty], check=False), "no dataset.json"),
        (train(finished, [hopper], check=False), "another stream"),
    ]
    for done, message in cases:
        assert done.returncode != 0
        assert len(errors(done)) == 1 and message in errors(done)[0], done.stderr
    unknown = train(tmp_path / "b", [hopper], "--model.colour", "red", check=False)
    assert unknown.returncode != 0 and "colour" in unknown.stdout + unknown.stderr


def test_metrics_count_what_the_model_has_seen(finished, hopper, pong):
    own = metrics_at(finished, 6)
    counts = {name: own[f"data/sequences/{name}"] for name in ("hopper-random-v4", "pong-run1")}
    assert sum(counts.values()) == 6 * 8 and set(counts.values()) == {24}
    assert 0 <= own["data/wait_share"] < 1 and own["data/padding_share"] == 0
    assert own["data/epochs/pong-run1"] > 0 and "cache/hits" not in own
    events = EventAccumulator(str(finished / "tensorboard")).Reload()
    assert {"data/wait_share", "data/sequences/pong-run1", "train/tokens_per_second"} <= set(events.Tags()["scalars"])


@pytest.fixture
def site(hopper, pong, tmp_path):
    """Both datasets on a web server: their URLs and the folder that is served."""
    for folder in (hopper, pong):
        shutil.copytree(folder, tmp_path / "site" / folder.name)
    handler = partial(QuietHandler, directory=str(tmp_path / "site"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield [f"http://127.0.0.1:{server.server_port}/{folder.name}" for folder in (hopper, pong)], tmp_path / "site"
    server.shutdown()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


def test_remote_datasets_give_the_same_losses(finished, site, tmp_path):
    pytest.importorskip("aiohttp")
    urls, _ = site
    cache = ["--data.cache.folder", str(tmp_path / "cache")]
    train(tmp_path / "run", urls, *cache, steps=3, processes=2)
    assert losses(tmp_path / "run") == pytest.approx(losses(finished)[:3], abs=1e-6)
    own = metrics_at(tmp_path / "run", 3)
    assert own["cache/misses"] > 0 and own["cache/bytes"] > 10_000
    # and resumes from a local copy, because the data are the same
    train(tmp_path / "run", [site[1] / Path(url).name for url in urls], steps=4, processes=2)
    assert losses(tmp_path / "run") == pytest.approx(losses(finished)[:4], abs=1e-6)


def test_a_bad_shard_stops_a_run_or_is_skipped(site, tmp_path):
    _, folder = site
    (folder / "hopper" / "shard-000001.tar").unlink()
    data = [folder / "hopper", folder / "pong"]
    stopped = train(tmp_path / "run", data, check=False, steps=3)
    assert stopped.returncode and len(errors(stopped)) == 1 and "shard-000001.tar: missing" in errors(stopped)[0]
    train(tmp_path / "run", data, "--data.on-bad-shard", "skip", steps=3)
    assert metrics_at(tmp_path / "run", 3)["data/bad_shards"] == 1


def test_metrics_hold_the_gradient_norm(finished):
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert all(0.01 < line["train/gradient_norm"] < 1000 for line in lines if line["step"] > 0)
