"""Every command with nobody to read its output, and asked to end at any moment: no traceback, no process left."""

import contextlib
import io
import os
import random
import signal
import subprocess
import sys
import time

import psutil
import pytest

from schemas import terminal
from shards.reader import Dataset
from tests import warm
from tests.trainer.launch import ROOT

SECONDS_TO_END = 30.0
ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def build(logs, output, workers=1):
    return ["etl.build", "--source", "d4rl", "--input", logs / "d4rl", "--output", output, "--overwrite", "--workers",
            workers, "--shard-megabytes", "0.05"]  # fmt: skip


def record(logs, output, steps=200_000):
    return ["etl.record", "--environment", "Hopper-v4", "--policy", "random", "--steps", steps, "--output", output,
            "--overwrite"]  # fmt: skip


def compare(hopper, pong, output, episodes=200):
    return ["eval.compare", "--models", "random", "behaviour", "--datasets", hopper, pong, "--output", output,
            "--film-seconds", "0", "--processes", "2", "--episodes", episodes]  # fmt: skip


def command(words):
    return [sys.executable, "-m", *map(str, words)]


@pytest.mark.process
def test_a_reader_that_is_gone_ends_no_command(logs, hopper, pong, tmp_path):
    """Both streams' reader is gone before anything is written."""
    read, write = os.pipe()
    os.close(read)
    commands = {
        "build": build(logs, tmp_path / "build"),
        "workers": build(logs, tmp_path / "workers", workers=2),
        "record": record(logs, tmp_path / "record", steps=300),
        "inspect": ["etl.inspect", hopper, "--output", tmp_path / "page.html"],
        "verify": ["shards.verify", hopper],
        "compare": [*compare(hopper, pong, tmp_path / "compare", episodes=1), "--step-limit", "20"],
    }
    for name, words in commands.items():
        done = subprocess.run(command(words), cwd=ROOT, stdout=write, stderr=write, timeout=300)
        assert done.returncode == 0, name
    os.close(write)
    assert Dataset(tmp_path / "build").manifest.fingerprint == Dataset(tmp_path / "workers").manifest.fingerprint
    assert (tmp_path / "page.html").is_file() and next((tmp_path / "record").iterdir()).suffix == ".hdf5"
    assert (tmp_path / "compare" / "rows.parquet").is_file()


@pytest.mark.process
@pytest.mark.parametrize("closed", [">&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_streams_that_are_closed_from_the_start(logs, tmp_path, closed):
    """The next file that a process opens would take their place, and get what is printed."""
    words = " ".join(command(build(logs, tmp_path)))
    assert subprocess.run(["bash", "-c", f"exec {words} {closed}"], cwd=ROOT, timeout=300).returncode == 0
    assert Dataset(tmp_path, "full").manifest.shards.rows > 0


def ended(words, seconds, number, start=warm.Popen):
    """(exit status, stderr) of a command that gets a signal, with all its processes, after so many seconds."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = start(command(words), cwd=ROOT, start_new_session=True, **pipes)
    try:
        time.sleep(seconds)
        family = [*psutil.Process(process.pid).children(recursive=True)] if process.poll() is None else []
        with contextlib.suppress(ProcessLookupError):  # it may have ended by itself
            os.killpg(process.pid, number)
        stderr = process.communicate(timeout=SECONDS_TO_END)[1]
        left = psutil.wait_procs(family, timeout=10)[1]
        assert not left, (words[0], seconds, number, left)
        return process.returncode, stderr
    finally:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def check(words, moments, start=warm.Popen):
    for turn, seconds in enumerate(moments):
        number = ENDINGS[turn % 3]
        status, stderr = ended(words, seconds, number, start)
        if stderr.startswith("Fatal Python error: init_"):  # before any of our code
            continue
        # amid Python's own start a signal ends it as any program; a moment after the end comes too late
        assert status in (128 + number, 130, -number, 0), (words[0], seconds, number, status, stderr)
        if status >= 128:
            assert stderr.strip().splitlines()[-1].startswith("interrupted"), (words[0], seconds, stderr)
            assert "Traceback" not in stderr, (words[0], seconds, number, stderr)


@pytest.mark.process
def test_three_moments_per_command(logs, hopper, pong, tmp_path):
    check(build(logs, tmp_path / "build"), [0.3, 0.8, 1.6])
    check(build(logs, tmp_path / "workers", workers=2), [1.0, 2.0, 4.0])
    check(record(logs, tmp_path / "record"), [0.5, 1.5, 3.0])
    check(compare(hopper, pong, tmp_path / "compare"), [2.0, 6.0, 9.0])


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("name", ["build", "workers", "record", "compare"])
def test_twenty_moments_per_command(logs, hopper, pong, tmp_path, name):
    """Cold, as a user's shell starts them."""
    words = {"build": build(logs, tmp_path), "workers": build(logs, tmp_path, workers=2),
             "record": record(logs, tmp_path), "compare": compare(hopper, pong, tmp_path)}[name]  # fmt: skip
    chance = random.Random(name)
    check(words, [chance.uniform(0.2, 20.0) for _ in range(20)], subprocess.Popen)


def test_a_terminal_of_few_letters_gets_the_rest():
    raw = io.BytesIO()
    stream = terminal.LossyStream(io.TextIOWrapper(raw, "ascii", write_through=True))
    print("loss ━ 1.0 ä", file=stream)
    print("step 2", file=stream, flush=True)
    assert raw.getvalue() == b"loss ? 1.0 ?\nstep 2\n"


def test_interrupts_have_their_signals_status():
    assert terminal.status_of(KeyboardInterrupt()) == 130
    assert terminal.status_of(KeyboardInterrupt(signal.SIGHUP)) == 129


@pytest.mark.parametrize("number", ENDINGS)
def test_an_interrupt_that_is_lost_comes_again(monkeypatch, capfd, number):
    """Python drops what a signal raises in a destructor, and a library may catch everything."""
    monkeypatch.setattr(terminal, "AGAIN_SECONDS", 0.1)
    usual = signal.getsignal(signal.SIGALRM), sys.unraisablehook
    lost = []

    class Dropped:
        def __del__(self):
            lost.append("in a destructor")
            os.kill(os.getpid(), number)
            time.sleep(0)  # where the handler runs

    @terminal.command
    def main() -> int:
        Dropped()
        try:
            time.sleep(10)
        except BaseException:
            lost.append("caught")
        time.sleep(10)
        return 0

    assert main() == 128 + number and lost == ["in a destructor", "caught"]
    assert (signal.getsignal(signal.SIGALRM), sys.unraisablehook) == usual
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0 and capfd.readouterr().err == "interrupted\n"


def test_handlers_and_streams_are_as_before_after_a_command():
    usual = [signal.getsignal(number) for number in ENDINGS], sys.stdout, sys.stderr

    @terminal.command
    def main() -> int:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)
        return 0

    assert main() == 143
    assert ([signal.getsignal(number) for number in ENDINGS], sys.stdout, sys.stderr) == usual


def test_a_home_folder_is_one_after_an_equals_sign_too(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    given = ["~/a", "--output=~/b", "--data.folders", "~", "--x=a~/b", "a~", "~you/c", "--run.start-from=~"]
    assert terminal.home_paths(given) == [
        "/home/me/a", "--output=/home/me/b", "--data.folders", "/home/me", "--x=a~/b", "a~", "~you/c",
        "--run.start-from=/home/me",
    ]  # fmt: skip
