"""`gato-train`: the real `deepspeed` launcher on this package's training command, wherever it is installed.

    gato-train --num_gpus 2 --recipe tiny  ->  checked  ->  deepspeed --num_gpus 2 .../trainer/main.py --recipe tiny
    Ctrl-C, SIGTERM, SIGHUP -> the ranks: they save and end -> the launcher ends -> this process ends

Invariant: this process outlives the training; if it is killed itself, the launcher gets SIGTERM (Linux) and the ranks
save and end.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import FrameType

import psutil

from schemas.terminal import ignored, protect_streams
from trainer.lifecycle import signal_on_parent_death

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
    if not starts_training(training):
        return [sys.executable, str(MAIN), *training]
    # -P: modules come from the environment, not from the current folder
    return [sys.executable, "-P", "-m", "deepspeed.launcher.runner", *launcher, str(MAIN), *training]


def starts_training(training: Sequence[str]) -> bool:
    """True if arguments of trainer/main.py ask for more than a text on the screen."""
    return not {"-h", "--help", "--dry-run"} & set(training)


def check_training(launcher: list[str], training: list[str]) -> None:
    """Refuses what the trainer would, before a launcher takes its seconds to start.

    Raises:
        ValueError: a setting out of range, or no such dataset on this machine (DatasetError).
        SystemExit: an option that does not exist, which is printed.
    """
    from trainer.arguments import parse
    from trainer.config import check
    from trainer.inputs import require_datasets

    flags = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    flags.add_argument("--num_gpus", "--num_accelerators", type=int, default=1)
    flags.add_argument("--hostfile", "-H")
    given = flags.parse_known_args(launcher)[0]
    config = parse(training)[1]
    check(config, max(1, given.num_gpus))
    if given.hostfile is None:  # else the data may lie on the other machines alone
        require_datasets(config.data)


def supervise(command: list[str]) -> int:
    """Run the launcher to its end; its exit status, or 128 + the signal on which the ranks were asked to end."""
    asked: list[int] = []
    started: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        for launcher in started:
            stop_ranks(launcher)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or not ignored(number):
            signal.signal(number, stop)
    prepare = partial(signal_on_parent_death, signal.SIGTERM)
    # a group of its own: a terminal's Ctrl-C would end the launcher before its ranks have saved
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, process_group=0, preexec_fn=prepare)
    started.append(process.pid)
    if asked:  # while it started
        stop_ranks(process.pid)
    status = process.wait()
    if asked:
        return 128 + asked[0]
    return status if status >= 0 else 128 - status


def stop_ranks(launcher: int) -> None:
    """SIGTERM, on which a run saves and ends, to the ranks of a launcher. Where none has started there is nothing to
    save: to all of its processes."""
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(launcher)
        family = [*process.children(recursive=True)]
        for one in [rank for rank in family if _is_rank(rank)] or [process, *family]:
            with suppress(psutil.NoSuchProcess):
                one.terminate()


def _is_rank(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        words = process.cmdline()
        return str(MAIN) in words and not any(word.startswith("deepspeed.launcher.") for word in words)
    return False


def main(arguments: Sequence[str] | None = None, end_with_parent: bool = False) -> int:
    """The console script; its exit status. `end_with_parent`: get SIGTERM when the process that started this one dies
    (Linux)."""
    protect_streams()
    if end_with_parent:
        signal_on_parent_death(signal.SIGTERM)
    try:
        launcher, training = split_arguments(list(sys.argv[1:] if arguments is None else arguments))
        command = command_line([*launcher, *training])
        if not starts_training(training):
            os.execv(command[0], command)
        check_training(launcher, training)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: nothing was started", file=sys.stderr)
        return 130
    return supervise(command)


if __name__ == "__main__":
    sys.exit(main())
