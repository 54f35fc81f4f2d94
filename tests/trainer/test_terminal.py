"""What happens to a terminal does not happen to a run: closed pipes, tee killed by Ctrl-C, SIGHUP, nohup."""

import os
import signal
import subprocess
import time

import pytest

from tests import warm
from tests.trainer.launch import ROOT, command, family, latest_step, losses, nobody_left, train
from trainer.lifecycle import StopRequest, _launchers, _left_alone
from trainer.model.export import load_export

pytestmark = pytest.mark.process


def start(output, data, *, steps, nohup=False):
    """A run in a session of its own, both streams in one pipe."""
    line = command(output, data, processes=2, steps=steps)
    popen = subprocess.Popen if nohup else warm.Popen
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return popen(["nohup", *line] if nohup else line, cwd=ROOT, start_new_session=True, **pipes)


def await_step(process, number):
    for line in process.stdout:
        if line.startswith("step ") and int(line.split()[1].strip(":")) >= number:
            return


def test_a_reader_that_ends_changes_nothing(hopper, tmp_path):
    process = start(tmp_path / "read", [hopper], steps=8)
    await_step(process, 1)
    process.stdout.close()
    process.wait(200)
    assert nobody_left(tmp_path / "read") and latest_step(tmp_path / "read") == 8
    assert load_export(tmp_path / "read" / "export")[1].step == 8
    train(tmp_path / "whole", [hopper], processes=2, steps=8)
    assert losses(tmp_path / "read") == losses(tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP], ids=["ctrl-c", "closed"])
def test_what_ends_a_terminal_is_a_request_to_end(hopper, tmp_path, number):
    """Ctrl-C, whose reader it kills first, as with `deepspeed ... 2>&1 | tee log`; and the terminal's end."""
    process = start(tmp_path, [hopper], steps=100_000)
    await_step(process, 3)
    process.stdout.close()
    os.killpg(process.pid, number)
    process.wait(200)
    assert nobody_left(tmp_path)
    step = latest_step(tmp_path)
    assert step >= 3 and load_export(tmp_path / "export")[1].step == step
    assert f"resuming at step {step}" in train(tmp_path, [hopper], steps=step + 1).stdout


def test_nohup_outlives_the_terminal(hopper, tmp_path):
    process = start(tmp_path, [hopper], steps=100_000, nohup=True)
    try:
        await_step(process, 3)
        os.killpg(process.pid, signal.SIGHUP)
        await_step(process, 8)
        assert process.poll() is None and len(family(tmp_path)["rank"]) == 2
        os.killpg(process.pid, signal.SIGTERM)
        process.communicate(timeout=200)
        assert nobody_left(tmp_path) and latest_step(tmp_path) >= 8
    finally:
        for one in sum(family(tmp_path).values(), []):
            one.kill()


@pytest.fixture
def stop(monkeypatch):
    """A rank's own, in this process; its signals are as before afterwards."""
    monkeypatch.setenv("LOCAL_RANK", "0")
    usual = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    monkeypatch.setattr("trainer.lifecycle.signal_on_parent_death", lambda number: None)
    try:
        yield StopRequest()
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)


def test_a_shell_that_ends_is_no_launcher_that_died(stop):
    """Under torchrun or mpirun the parent's parent is the user's shell: nothing to end for."""
    assert _launchers() == (os.getppid(),)  # and none above it
    assert not stop.requested
    os.kill(os.getpid(), signal.SIGHUP)
    assert stop.requested


def test_a_signal_is_kept_that_arrives_while_the_launchers_are_looked_up(stop, monkeypatch):
    def looked_up():
        os.kill(os.getpid(), signal.SIGTERM)
        return _launchers()

    monkeypatch.setattr("trainer.lifecycle._launchers", looked_up)
    assert stop.requested
    assert stop.requested


@pytest.mark.parametrize("leader_ends", [True, False])
def test_a_rank_notices_a_launcher_that_ended_before_it_could_look(leader_ends):
    """A Ctrl-C that ended the `deepspeed` command was lost in what it had started."""
    read, write = os.pipe()
    ours, theirs = os.pipe()
    leader = os.fork()
    if not leader:
        os.setsid()
        if os.fork():
            os.close(write)
            if not leader_ends:
                os.close(theirs)
                os.read(ours, 1)
            os._exit(0)
        parent = os.getppid()
        while leader_ends and os.getppid() == parent:
            time.sleep(0.01)
        os.write(write, str(int(_left_alone())).encode())
        os._exit(0)
    os.close(write)
    if leader_ends:
        os.waitpid(leader, 0)
    assert os.read(read, 1) == str(int(leader_ends)).encode()
    os.close(theirs)
    if not leader_ends:
        os.waitpid(leader, 0)
    os.close(read), os.close(ours)
