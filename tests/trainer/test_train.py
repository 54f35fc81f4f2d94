"""The real command under the real launcher: world sizes, resuming after kills, damage, bad input."""

import http.server
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
from safetensors.numpy import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trainer.checkpoint import CheckpointError, latest, load_export

ROOT = Path(__file__).resolve().parent.parent.parent
SMALL = (
    "--model.blocks 1 --model.heads 2 --model.width 32 --model.feed-forward 64 --model.head-size 16 "
    "--model.patch-channels 16 --model.stochastic-depth 0.1 --data.global-batch 8 --data.micro-batch 2 "
    "--data.stream.sequence-length 120 --data.stream.mixture-block 8 --run.evaluate-sequences 2"
)


def command(output, data, *extra, processes=1, steps=6) -> list[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [
        str(Path(sys.executable).with_name("deepspeed")),
        "--num_gpus",
        str(processes),
        "--master_port",
        str(port),
    ]
    folders = ["--data.folders", *map(str, data)]
    run = ["--run.output", str(output), "--steps", str(steps), "--run.log-every", "1", "--run.save-every", "2"]
    return [*launcher, "trainer/main.py", "--recipe", "tiny", *SMALL.split(), *folders, *run, *extra]


def train(*arguments, check=True, **options):
    done = subprocess.run(command(*arguments, **options), cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def losses(output) -> list[float]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line["train/loss"] for line in lines if line["step"] > 0]


@pytest.fixture(scope="module")
def finished(hopper, pong, tmp_path_factory):
    output = tmp_path_factory.mktemp("run")
    train(output, [hopper, pong])
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


def test_two_processes_give_the_same_losses(finished, hopper, pong, tmp_path):
    train(tmp_path, [pong, hopper], processes=2)
    assert losses(tmp_path) == pytest.approx(losses(finished), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_stages_give_the_same_losses(finished, hopper, pong, tmp_path, stage):
    train(tmp_path, [hopper, pong], "--deepspeed", f"zero{stage}_cpu", processes=2)
    assert losses(tmp_path) == pytest.approx(losses(finished), rel=1e-5)


def test_a_killed_run_goes_on_to_the_same_bits(finished, hopper, pong, tmp_path):
    process = subprocess.Popen(
        command(tmp_path, [hopper, pong]),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 200
    while latest_step(tmp_path) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert latest_step(tmp_path) >= 2
    train(tmp_path, [hopper, pong])
    assert losses(tmp_path) == losses(finished)
    ours, theirs = (load_file(f / "export" / "weights.safetensors") for f in (tmp_path, finished))
    assert all((ours[name] == theirs[name]).all() for name in theirs)


def latest_step(output) -> int:
    pointer = latest(output / "checkpoints") if (output / "checkpoints").is_dir() else None
    return pointer.step if pointer else 0


def test_sigterm_saves_and_ends(hopper, pong, tmp_path):
    process = subprocess.Popen(
        command(tmp_path, [hopper], steps=100_000),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 3:"):
            break
    subprocess.run(["pkill", "-TERM", "-f", f"run.output {tmp_path} "], check=True)
    rest = process.stdout.read()
    process.wait(timeout=100)
    left = subprocess.run(["pgrep", "-f", f"run.output {tmp_path} "], capture_output=True, text=True).stdout
    assert not left, "a rank was left behind"
    pointer = latest(tmp_path / "checkpoints")
    assert pointer is not None and pointer.step >= 3, rest
    assert load_export(tmp_path / "export")[1].step == pointer.step


def test_damaged_checkpoints_are_passed_over(finished, tmp_path, capsys):
    folder = shutil.copytree(finished / "checkpoints", tmp_path / "c")
    newest = latest(folder)
    assert newest is not None and newest.step == 6
    for name in newest.files:
        path = folder / newest.tag / name
        whole = path.read_bytes()
        for damaged in (whole[:-1], whole[:100] + bytes([whole[100] ^ 1]) + whole[101:]):
            path.write_bytes(damaged)
            found = latest(folder)
            assert found is not None and found.step == 4
            assert name.split("/")[-1] in capsys.readouterr().out
        path.write_bytes(whole)
    for pointer in folder.glob("*.json"):
        pointer.write_text("{")
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
        lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and message in lines[0], done.stderr
    unknown = train(tmp_path / "b", [hopper], "--model.colour", "red", check=False)
    assert unknown.returncode != 0 and "colour" in unknown.stdout + unknown.stderr


def figures(output, step):
    return next(line for line in map(json.loads, (output / "metrics.jsonl").open()) if line["step"] == step)


def test_what_the_model_has_seen_is_told(finished, hopper, pong):
    own = figures(finished, 6)
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
    own = figures(tmp_path / "run", 3)
    assert own["cache/misses"] > 0 and own["cache/bytes"] > 10_000
    # and goes on from a local copy, since the data are the same
    train(tmp_path / "run", [site[1] / Path(url).name for url in urls], steps=4, processes=2)
    assert losses(tmp_path / "run") == pytest.approx(losses(finished)[:4], abs=1e-6)


def test_a_bad_shard_stops_a_run_or_is_skipped(site, tmp_path):
    _, folder = site
    (folder / "hopper" / "shard-000001.tar").unlink()
    data = [folder / "hopper", folder / "pong"]
    stopped = train(tmp_path / "run", data, check=False, steps=3)
    lines = [line for line in stopped.stderr.splitlines() if line.startswith("error: ")]
    assert stopped.returncode and len(lines) == 1 and "shard-000001.tar: missing" in lines[0]
    train(tmp_path / "run", data, "--data.on-bad-shard", "skip", steps=3)
    assert figures(tmp_path / "run", 3)["data/bad_shards"] == 1


def test_the_gradient_norm_is_told(finished):
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert all(0.01 < line["train/gradient_norm"] < 1000 for line in lines if line["step"] > 0)
