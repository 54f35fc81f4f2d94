"""`gato-train`: the real `deepspeed` launcher on this package's training command, wherever it is installed.

    gato-train --num_gpus 2 --recipe tiny  ->  deepspeed --num_gpus 2 .../trainer/main.py --recipe tiny

Invariant: the launcher replaces this process, so signals, exit status and output are the launcher's own.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

MAIN = Path(__file__).resolve().with_name("main.py")

# The launcher's flags, see `deepspeed --help`; every other argument is for trainer/main.py.
VALUE_FLAGS = {
    "-H", "--hostfile", "-i", "--include", "-e", "--exclude", "--num_nodes", "--num_gpus", "--num_accelerators",
    "--master_port", "--master_addr", "--node_rank", "--launcher", "--launcher_args", "--enable_each_rank_log",
    "--bind_core_list", "--ssh_port", "--venv_script", "--log_level",
}  # fmt: skip
SWITCHES = {
    "--no_local_rank", "--no_ssh", "--no_ssh_check", "--force_multi", "--save_pid", "--bind_cores_to_rank", "-q",
    "--quiet",
}  # fmt: skip
# These change what the launcher starts, which here is always trainer/main.py.
REFUSED = {"--module", "--no_python", "--autotuning"}


def split_arguments(arguments: list[str]) -> tuple[list[str], list[str]]:
    """The launcher's flags with their values, and the arguments of trainer/main.py, each in the order given.

    Raises:
        ValueError: a flag of the launcher has no value, or one that starts something else than this training.
    """
    launcher: list[str] = []
    training: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        flag, equals, _ = argument.partition("=")
        if flag in REFUSED:
            raise ValueError(f"{flag}: gato-train starts {MAIN} alone; run the deepspeed command itself for this flag")
        if flag in SWITCHES or (flag in VALUE_FLAGS and equals):
            launcher.append(argument)
        elif flag in VALUE_FLAGS:
            value = next(rest, None)
            if value is None:
                raise ValueError(f"{flag}: a value must follow, see deepspeed --help")
            launcher += [argument, value]
        else:
            training.append(argument)
    return launcher, training


def command_line(arguments: list[str]) -> list[str]:
    """The command that gato-train stands for. What starts no training (--help, --dry-run) needs no launcher."""
    launcher, training = split_arguments(arguments)
    if {"-h", "--help", "--dry-run"} & set(training):
        return [sys.executable, str(MAIN), *training]
    # -P: modules come from the environment, not from the current folder
    return [sys.executable, "-P", "-m", "deepspeed.launcher.runner", *launcher, str(MAIN), *training]


def launch(arguments: list[str], end_with_parent: bool = False) -> NoReturn:
    """Become the launcher. `end_with_parent`: get SIGTERM, on which a run saves and ends, when the process that
    started this one dies (Linux)."""
    command = command_line(arguments)
    if end_with_parent:
        from trainer.lifecycle import signal_on_parent_death

        signal_on_parent_death(signal.SIGTERM)
    sys.stdout.flush()
    os.execv(command[0], command)


def main() -> int:
    """The console script; returns only where the arguments make no sense."""
    try:
        launch(sys.argv[1:])
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
