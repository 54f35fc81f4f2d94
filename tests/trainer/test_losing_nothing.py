"""Nothing is lost: kills at random moments, signals, other world sizes and ZeRO stages, full disks, hung ranks."""

import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from tests import warm
from tests.trainer.launch import (
    ROOT,
    command,
    errors,
    family,
    finish,
    latest_step,
    launcher,
    losses,
    metrics_at,
    nobody_left,
    train,
)
from trainer.checkpoint import CHECKPOINT_VERSION, Record, ResumeState, latest, publish, write_part
from trainer.config import RunConfig
from trainer.lifecycle import exclusive_run
from trainer.metrics import MetricsWriter
from trainer.model.export import load_export

STEPS = 40


@pytest.fixture(scope="module")
def whole(hopper, pong, tmp_path_factory):
    """Runs of STEPS steps that nothing disturbed, by ZeRO stage; of two processes."""
    made = {}

    def run(stage):
        if stage not in made:
            made[stage] = tmp_path_factory.mktemp("whole") / str(stage)
            train(made[stage], [hopper, pong], "--deepspeed", f"zero{stage}_cpu", processes=2, steps=STEPS)
        return made[stage]

    return run


def start(output, data, *extra, cold=False, **options):
    """A run in the background, its output in a pipe."""
    arguments = command(output, data, *extra, **options)
    return (subprocess if cold else warm).Popen(
        arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def await_step(process, number=1):
    """Read a run's output until it prints a step, or ends."""
    for line in process.stdout:
        if line.startswith("step ") and int(line.split()[1].strip(":")) >= number:
            return


def kill(output, victim, moment):
    """SIGKILL to a rank, the launcher, the command or all, after a random time or within a save."""
    if moment < 0:  # in the middle of a save
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline and not list((output / "checkpoints").glob("step-*/.*.tmp")):
            time.sleep(0.0005)
    else:
        time.sleep(moment)
    living = family(output)
    victims = sum(living.values(), []) if victim == "all" else living[victim][-1:]
    for process in victims:
        process.kill()


@pytest.mark.parametrize(
    "kills", [pytest.param(4, id="4"), pytest.param(20, id="20", marks=[pytest.mark.slow, pytest.mark.timeout(1800)])]
)
@pytest.mark.process
def test_killed_at_random_moments(whole, hopper, pong, tmp_path, kills):
    """After each restart a run resumes, and at its end losses and weights equal those of an undisturbed run."""
    chance, done = random.Random(kills), 0
    stage = 1 if kills > 4 else 0
    extra = ("--deepspeed", f"zero{stage}_cpu")
    reference = whole(stage)
    for number in range(kills):
        output = tmp_path / f"run{done}"
        process = start(output, [hopper, pong], *extra, processes=2, steps=STEPS, cold=number % 4 == 1)
        await_step(process)
        in_a_save = number % 2
        kill(output, ["rank", "launcher", "command", "all"][number // 2 % 4], -1 if in_a_save else chance.random() * 2)
        process.communicate(timeout=120)
        assert nobody_left(output), "a rank was left behind"
        if latest_step(output) == STEPS:
            done += 1
    output = tmp_path / f"run{done}"
    train(output, [hopper, pong], *extra, processes=2, steps=STEPS)
    for output in tmp_path.iterdir():
        assert losses(output) == losses(reference)
        ours, theirs = (load_file(f / "export" / "weights.safetensors") for f in (output, reference))
        assert all((ours[name] == theirs[name]).all() for name in theirs)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.process
def test_a_resumed_run_equals_an_uninterrupted_one(whole, hopper, pong, tmp_path, stage):
    for steps in (20, STEPS):
        train(tmp_path, [hopper, pong], "--deepspeed", f"zero{stage}_cpu", processes=2, steps=steps)
    assert losses(tmp_path) == losses(whole(stage))


@pytest.mark.process
def test_a_run_resumes_at_another_world_size_and_stage(whole, hopper, pong, tmp_path):
    for stage, processes, steps in ((1, 2, 8), (0, 1, 16), (3, 2, 24), (2, 1, 32), (1, 2, STEPS)):
        done = train(tmp_path, [hopper, pong], "--deepspeed", f"zero{stage}_cpu", processes=processes, steps=steps)
        assert steps == 8 or "resuming at step" in done.stdout
    assert losses(tmp_path) == pytest.approx(losses(whole(1)), rel=1e-4)


@pytest.mark.parametrize("target", ["command", "launcher", "rank", "all"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.process
def test_signals_save_and_end(hopper, tmp_path, target, number):
    if target == "rank" and number == signal.SIGINT:
        number = signal.SIGTERM  # nothing sends a lone rank the other
    process = start(tmp_path, [hopper], processes=2, steps=100_000)
    await_step(process, 3)
    living = family(tmp_path)
    for victim in sum(living.values(), []) if target == "all" else living[target][:1]:
        victim.send_signal(number)
    process.communicate(timeout=120)
    assert nobody_left(tmp_path), "a rank was left behind"
    step = latest_step(tmp_path)
    assert step >= 3 and load_export(tmp_path / "export")[1].step == step


@pytest.mark.process
def test_a_full_disk_costs_no_checkpoint(hopper, pong, tmp_path):
    """The kernel refuses files beyond a size, as a full disk does."""
    train(tmp_path, [hopper, pong], steps=2)
    done = train(
        tmp_path,
        [hopper, pong],
        steps=6,
        check=False,
        prepare=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8_000_000, 8_000_000)),
    )
    assert "step 4 not saved" in done.stdout and "step-00000004" in done.stdout, done.stdout
    assert done.returncode and "the last step could not be saved" in errors(done)[0]
    assert latest_step(tmp_path) == 2 and not list((tmp_path / "checkpoints").glob("step-*/.*"))
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00000002", "step-00000002.json"]
    train(tmp_path, [hopper, pong], steps=6)
    train(tmp_path / "other", [hopper, pong], steps=6)
    assert losses(tmp_path) == losses(tmp_path / "other")


@pytest.mark.process
def test_a_rank_that_hangs_ends_the_run(hopper, tmp_path):
    process = start(tmp_path, [hopper], "--run.patience-minutes", "0.1", processes=2, steps=100_000)
    await_step(process, 3)
    family(tmp_path)["rank"][1].send_signal(signal.SIGSTOP)
    output, _ = process.communicate(timeout=120)
    # the line comes first, unless the step began long before rank 0 waited: then the watchdog's stacks do
    said = "a rank was lost or does not answer; run the same command to resume" in output
    assert process.returncode and (said or "Timeout (0:00:07.500000)" in output) and "Traceback" not in output, output
    assert nobody_left(tmp_path)


@pytest.mark.process
def test_gradients_that_are_not_finite_are_skipped_then_end_the_run(hopper, tmp_path):
    """A learning rate without sense: the first step throws the weights far away, and no later one is applied."""
    extra = ("--optimiser.start-lr", "1e30", "--optimiser.peak-lr", "1e30", "--run.skip-limit", "3")
    done = train(tmp_path, [hopper], *extra, check=False, steps=50)
    assert done.returncode and "3 steps in a row" in errors(done)[0] and "sequences" in errors(done)[0]
    assert done.stdout.count("not finite") >= 3
    assert latest_step(tmp_path) >= 2 and metrics_at(tmp_path, 2)["train/skipped_steps"] >= 1


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.process
def test_a_skipped_step_changes_nothing(hopper, stage):
    script = [str(ROOT / "tests" / "trainer" / "skipped.py"), str(hopper), f"zero{stage}_cpu"]
    done = finish([*launcher(2), *script], timeout=120)
    assert done.returncode == 0 and done.stdout.count("a skipped step changed nothing") == 2, done.stdout + done.stderr


@pytest.mark.process
def test_one_run_per_folder(tmp_path):
    with exclusive_run(tmp_path, 0.1):
        script = (
            f"import pathlib, trainer.lifecycle as w\nwith w.exclusive_run(pathlib.Path({str(tmp_path)!r}), 0.3): pass"
        )
        done = finish([sys.executable, "-c", script])
        assert done.returncode and "another training writes there" in done.stderr
    with exclusive_run(tmp_path, 0.1):
        pass


def test_a_full_disk_costs_lines_of_metrics_and_not_the_run(tmp_path, capsys):
    writer = MetricsWriter(RunConfig(output=tmp_path), 0, 3)
    writer.file.close()
    with Path("/dev/full").open("a") as writer.file:
        writer.write(1, 8, 1.0, {"train/loss": 1.0})
        writer.close()
    assert "warning: metrics of step 1 not written: [Errno 28]" in capsys.readouterr().out


def test_the_last_and_the_best_checkpoints_are_kept(tmp_path):
    import torch

    (tmp_path / "step-mine").mkdir()
    for step, score in ((1, 3.0), (2, 1.0), (3, 2.0), (4, None), (5, 4.0)):
        name, digest = write_part(tmp_path / f"step-{step:08d}", 0, {"w": torch.ones(3)})
        record = Record(CHECKPOINT_VERSION, step, step * 8, step, 1, 0, score, ResumeState("", 8, {}), {name: digest})
        publish(tmp_path, record, keep_last=2, keep_best=1)
    (tmp_path / "step-mine").rmdir()  # it is nobody else's to remove
    assert sorted(os.listdir(tmp_path)) == [f"step-0000000{n}{end}" for n in (2, 4, 5) for end in ("", ".json")]
    newest = latest(tmp_path)
    assert newest is not None and newest.step == 5
