"""gato-train's way from its arguments to the deepspeed launcher's command, and a run's config.json as a recipe."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest

from tests.trainer.launch import command, family, latest_step, launcher
from trainer.config import to_dict
from trainer.launcher import MAIN, REFUSED, SWITCHES, VALUE_FLAGS, command_line, split_arguments
from trainer.main import parse
from trainer.recipes import RECIPES


@pytest.mark.process
def test_every_flag_of_the_launcher_is_known():
    shown = subprocess.run([launcher()[0], "--help"], capture_output=True, text=True, check=True).stdout
    flags = set(re.findall(r"^  (-[\w-]+)|, (--?[\w-]+)", shown, re.MULTILINE))
    flags = {name for pair in flags for name in pair if name} - {"-h", "--help"}
    assert "--num_gpus" in flags and flags <= VALUE_FLAGS | SWITCHES | REFUSED


def test_flags_are_split_between_launcher_and_training():
    arguments = ["--recipe", "tiny", "--num_gpus", "2", "--steps", "5", "--master_port=123", "--no_local_rank"]
    own, training = split_arguments(arguments)
    assert own == ["--num_gpus", "2", "--master_port=123", "--no_local_rank"]
    assert training == ["--recipe", "tiny", "--steps", "5"]
    command = command_line(arguments)
    assert command[0] == sys.executable and command[-len(training) - 1 :] == [str(MAIN), *training]
    assert "deepspeed.launcher.runner" in command


def test_help_and_dry_run_need_no_launcher():
    assert command_line(["--dry-run", "--recipe", "tiny"]) == [
        sys.executable,
        str(MAIN),
        "--dry-run",
        "--recipe",
        "tiny",
    ]


@pytest.mark.process
@pytest.mark.parametrize("arguments", [["--num_gpus"], ["--module", "--recipe", "tiny"], ["--autotuning", "run"]])
def test_arguments_that_make_no_sense_are_named(arguments):
    done = subprocess.run([sys.executable, "-m", "trainer.launcher", *arguments], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {arguments[0]}: ")


@pytest.mark.process
@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--steps", "0"], "error: --steps 0: must be from 1"),
        (["--steps", "3", "--data.folders", "none"], "error: none: no dataset.json"),
        (["--data.root", "none"], "error: none: no finished dataset there"),
        (["--run.output", "README.md"], "error: --run.output README.md: README.md is a file; give a folder"),
        (["--num_gpus", "3"], "error: --data.global-batch 384: must be a multiple"),
        (["--colour", "1"], "--colour"),
    ],
)
def test_mistakes_are_shown_before_a_launcher_starts(arguments, message):
    code = "import sys; from trainer import launcher; status = launcher.main(); "
    code += "assert 'deepspeed' not in sys.modules; sys.exit(status)"
    line = [sys.executable, "-c", code, "--recipe", "tiny", *arguments]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, done.stderr


@pytest.mark.process
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_returns_after_the_run_has_saved(hopper, tmp_path, number):
    """SIGINT to the group, as a terminal sends it."""
    line = command(tmp_path, [hopper], processes=2, steps=100_000)
    line = [sys.executable, "-m", "trainer.launcher", *line[1 : line.index("trainer/main.py")], *line[6:]]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(line, start_new_session=True, **streams)
    try:
        deadline = time.monotonic() + 200
        while latest_step(tmp_path) < 2 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.2)
        (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
        status = process.wait(120)
        assert not any(family(tmp_path).values()), "the command returned before its run had ended"
        output, errors = process.communicate()
        assert status == 128 + number and "Traceback" not in output + errors, output + errors
        assert latest_step(tmp_path) >= 2 and (tmp_path / "export" / "model.json").is_file()
    finally:
        for one in sum(family(tmp_path).values(), []):
            one.kill()


def test_a_runs_configuration_is_a_recipe(tmp_path):
    import json

    path = tmp_path / "config.json"
    path.write_text(json.dumps({"recipe": "tiny-tokens"} | to_dict(RECIPES["tiny-tokens"])))
    asked, config = parse(["--config", str(path), "--steps", "7"])
    assert asked.recipe == "tiny-tokens" and config.steps == 7
    assert config.optimiser == RECIPES["tiny-tokens"].optimiser
    for text, message in (("{", "not the configuration"), ('{"recipe": "tiny", "colour": 1}', "setting 'colour'")):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            parse(["--config", str(path)])
    with pytest.raises(ValueError, match="No such file"):
        parse(["--config", str(tmp_path / "none.json")])
