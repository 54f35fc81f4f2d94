"""gato-train's way from its arguments to the deepspeed launcher's command, and a run's config.json as a recipe."""

import re
import subprocess
import sys

import pytest

from tests.trainer.launch import launcher
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


def test_a_runs_configuration_is_a_recipe(tmp_path):
    import json

    path = tmp_path / "config.json"
    path.write_text(json.dumps({"recipe": "tiny-pong"} | to_dict(RECIPES["tiny-pong"])))
    asked, config = parse(["--config", str(path), "--steps", "7"])
    assert asked.recipe == "tiny-pong" and config.steps == 7
    assert config.optimiser == RECIPES["tiny-pong"].optimiser
    for text, message in (("{", "no configuration"), ('{"recipe": "tiny", "colour": 1}', "setting 'colour'")):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            parse(["--config", str(path)])
    with pytest.raises(ValueError, match="No such file"):
        parse(["--config", str(tmp_path / "none.json")])
