"""Run folders that were renamed, made read-only, or hold what is nobody's: said before a run, and no run is lost."""

import os
import shutil
import signal
import threading
import time
from dataclasses import replace

import pytest

from tests.trainer.launch import command, errors, finish, latest_step, losses, nobody_left, train
from trainer.checkpoint import discard, latest
from trainer.config import check, load_config
from trainer.lifecycle import StopRequest, exclusive_run
from trainer.recipes import RECIPES

TINY = RECIPES["tiny"]


def in_folder(output):
    return replace(TINY, run=replace(TINY.run, output=output))


@pytest.mark.parametrize("name", ["checkpoints", "export", "best", "exports", "tensorboard"])
def test_a_file_in_a_folders_place_is_named_before_the_run(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(ValueError, match=f"--run.output .*{name} is a file"):
        check(in_folder(tmp_path), 1)


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.json", ".lock"])
def test_a_folder_in_a_files_place_is_named_before_the_run(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=f"--run.output .*'{name}' there is a folder; move it away"):
        check(in_folder(tmp_path), 1)


@pytest.mark.parametrize("target", ["nowhere", "run"])
def test_a_link_to_nothing_or_to_itself_is_named(tmp_path, target):
    (tmp_path / "run").symlink_to(target)
    with pytest.raises(ValueError, match="--run.output .*run is a link to nothing"):
        check(in_folder(tmp_path / "run"), 1)


def test_a_name_that_is_no_unicode_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"--run.output .*this name is not in the encoding"):
        check(in_folder(tmp_path / os.fsdecode(b"\xff")), 1)
    with pytest.raises(ValueError, match=r"--data.folders .*this name is not in the encoding"):
        check(replace(TINY, data=replace(TINY.data, folders=(os.fsdecode(b"\xff"),))), 1)


@pytest.mark.parametrize(
    "body", [b"[" * 100_000, b'{"recipe": ["tiny"]}', b"[]", b"\xff\xfe", b'{"recipe": "a", "recipe": "b"}']
)
def test_a_file_that_is_no_configuration_is_one_line(tmp_path, body):
    (tmp_path / "config.json").write_bytes(body)
    with pytest.raises(ValueError, match="config.json: not the configuration of a run") as caught:
        load_config(tmp_path / "config.json")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.process
def test_renamed_folders_resume_and_foreign_names_are_passed_over(hopper, tmp_path):
    """Run and data are elsewhere; a folder and a file have names like a record's; file times are in the future."""
    train(tmp_path / "before", [hopper], steps=4)
    after, data = tmp_path / "größe ü [1] *", tmp_path / "hop per [ä]"
    (tmp_path / "before").rename(after)
    shutil.copytree(hopper, data)
    (after / "checkpoints" / "step-mine.json").write_text("{}")
    (after / "checkpoints" / "step-00000009.json").mkdir()
    for path in after.rglob("*"):
        os.utime(path, (4e9, 4e9))
    train(after, [data], steps=6)
    train(tmp_path / "whole", [hopper], steps=6)
    assert latest_step(after) == 6 and losses(after) == losses(tmp_path / "whole")


def test_names_that_are_nobodys_are_no_checkpoints(tmp_path):
    (tmp_path / "step-mine.json").write_text("{}")
    assert latest(tmp_path) is None


@pytest.mark.process
def test_fewer_steps_than_were_taken_is_said(hopper, tmp_path):
    train(tmp_path, [hopper], steps=4)
    done = train(tmp_path, [hopper], steps=2)
    assert "nothing to do for --steps 2 at step 4" in done.stdout and "stopped on request" not in done.stdout
    assert latest_step(tmp_path) == 4


@pytest.mark.process
def test_a_run_whose_folder_is_renamed_goes_on(hopper, tmp_path):
    """TensorBoard's thread ends by that, and the run does not."""
    output = tmp_path / "run"
    outcome = []
    words = command(output, [hopper], steps=40)
    thread = threading.Thread(target=lambda: outcome.append(finish(words)))
    thread.start()
    deadline = time.monotonic() + 100
    while not (output / "checkpoints" / "step-00000002.json").is_file():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    output.rename(tmp_path / "moved")
    thread.join()
    (done,) = outcome
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert latest_step(output) == 40 and not errors(done)


def test_what_cannot_be_removed_stays(tmp_path):
    """A file system that has become read-only."""
    (tmp_path / "step-00000002").mkdir()
    (tmp_path / "step-00000002.json").mkdir()  # which unlink refuses
    discard(tmp_path, "step-00000002")
    assert (tmp_path / "step-00000002").is_dir()


def test_a_wait_for_another_run_ends_when_asked_to(tmp_path):
    usual = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        stop = StopRequest()
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
        begun = time.monotonic()
        with exclusive_run(tmp_path, 0.1), pytest.raises(ValueError, match="stopped while waiting"):  # noqa: SIM117
            with exclusive_run(tmp_path, 60.0, stop):
                pass
        assert time.monotonic() - begun < 10
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)
    assert nobody_left(tmp_path, 1)
