"""Training on two hosts through pdsh: faults at random moments, from a lost machine to a cut cable; nothing is lost."""

import random
import signal
import time

import pytest
from safetensors.numpy import load_file

from tests.trainer.launch import family, latest_step, losses, nobody_left, train
from tests.trainer.two_hosts import Hosts, interrupt, missing

pytestmark = [pytest.mark.process, pytest.mark.slow, pytest.mark.timeout(3000)]

STEPS = 300
SECONDS_TO_END = 120.0
FAULTS = ("ctrl-c", "host 1 off", "cable cut", "ctrl-c", "host 0 off", "rank killed", "cable cut briefly",
          "launcher killed", "host 1 off", "terminal closed")  # fmt: skip


@pytest.fixture
def hosts(tmp_path):
    if why := missing():
        pytest.skip(why)
    (tmp_path / "hosts").mkdir()
    both = Hosts(tmp_path / "hosts")
    yield both
    both.close()


def await_step(output, process, number):
    """Wait until the run's log has a step, or the run has ended."""
    deadline = time.monotonic() + 200
    while process.poll() is None and time.monotonic() < deadline:
        text = output.with_suffix(".log").read_text()
        if any(f" step {n}: " in text for n in range(number, number + 10)):
            return
        time.sleep(0.1)


def strike(hosts, fault, output, process):
    """Let a fault happen, and wait until no process of the run is left."""
    if fault == "ctrl-c":
        interrupt(process)
    elif fault == "terminal closed":
        interrupt(process, signal.SIGHUP)
    elif fault.startswith("host"):
        hosts.power_off(int(fault.split()[1]))
    elif fault == "rank killed":
        for rank in family(output)["rank"][-1:]:
            rank.kill()
    elif fault == "launcher killed":
        process.kill()
    else:
        hosts.cable("down")
        time.sleep(3 if fault.endswith("briefly") else 40)  # patience is 18 seconds
        before = latest_step(output)
        hosts.cable("up")
        if fault.endswith("briefly"):  # it goes on by itself
            await_step(output, process, before + 5)
            interrupt(process)
    process.wait(SECONDS_TO_END)
    assert nobody_left(output, SECONDS_TO_END), f"{fault}: a rank was left"


@pytest.mark.parametrize("seed", [0])
def test_ten_faults_at_random_moments(hosts, hopper, tmp_path, seed):
    chance, output, reached, happened = random.Random(seed), tmp_path / "run", 0, []
    for fault in FAULTS:
        begun = time.monotonic()
        process = hosts.start(output, hopper, STEPS)
        await_step(output, process, reached + 1)
        time.sleep(chance.random() * 2)
        strike(hosts, fault, output, process)
        step = latest_step(output)
        happened.append(f"{fault}: {reached} -> {step}, {time.monotonic() - begun:.0f} s")
        print(happened[-1], flush=True)
        assert reached <= step < STEPS, happened
        reached = step
        for number in range(2):
            if hosts.sshd[number].poll() is not None:
                hosts.boot(number)
    for slots in ((1, 0), (2, 2)):  # other world sizes
        process = hosts.start(output, hopper, STEPS + 10 * sum(slots), slots)
        assert process.wait(300) == 0, output.with_suffix(".log").read_text()[-3000:]
        assert latest_step(output) == STEPS + 10 * sum(slots)
    train(tmp_path / "whole", [hopper], processes=2, steps=STEPS)
    assert losses(output)[:STEPS] == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)
    assert load_file(output / "export" / "weights.safetensors")


def test_ctrl_c_on_two_hosts_leaves_a_checkpoint_of_the_last_step(hosts, hopper, tmp_path):
    output = tmp_path / "run"
    process = hosts.start(output, hopper, 100_000)
    await_step(output, process, 3)
    interrupt(process)
    process.wait(SECONDS_TO_END)
    assert nobody_left(output, SECONDS_TO_END)
    log = output.with_suffix(".log").read_text()
    step = latest_step(output)
    assert step >= 3 and len(losses(output)) == step and "Traceback" not in log, log[-3000:]


def test_a_folder_on_one_host_alone_is_refused(hosts, hopper, tmp_path):
    """host 1 gets an empty file system over the run's folder."""
    output = tmp_path / "run"
    output.mkdir()
    hosts.on(1, "mount", "-t", "tmpfs", "none", str(output))
    process = hosts.start(output, hopper, 10)
    assert process.wait(SECONDS_TO_END)
    log = output.with_suffix(".log").read_text()
    assert "rank 1 on host-1 does not see the files that rank 0 on host-0 writes" in log, log[-3000:]
