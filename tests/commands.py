"""The project's commands as tests run them: inside this process where they start no other, else as a warm fork.

    run("etl.build", ...) -> main() with its output in files -> CompletedProcess, as from subprocess.run

A cold interpreter, as a user's shell starts it, is for the few tests that ask for one.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, chdir, contextmanager
from pathlib import Path
from typing import IO

import torch

from tests import warm

INSIDE = tuple(name for name in warm.COMMANDS if not name.startswith("deepspeed."))
TIMEOUT_SECONDS = 500


def run(*arguments: str | Path, check: bool = True, cold: bool = False, cwd=None, env=None):
    """A command of the project, as a user types it: python -m ARGUMENTS. CompletedProcess with its text."""
    words = [str(word) for word in arguments]
    command = [sys.executable, "-m", *words]
    if cold:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, cwd=cwd, env=env)
    elif words[0] in INSIDE and env is None and not _starts_others(words):
        done = _inside(words, cwd)
    else:
        done = warm.run(command, timeout=TIMEOUT_SECONDS, cwd=cwd, env=env)
    if check and done.returncode:
        raise AssertionError(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}")
    return done


def _starts_others(words: list[str]) -> bool:
    """Whether the command has worker processes, which are not started from a process as large as this."""
    default = "2" if words[0] == "eval.compare" else "1"
    flag = {"eval.compare": "--processes", "etl.build": "--workers"}.get(words[0], "")
    return (words[words.index(flag) + 1] if flag in words else default) != "1" or "multi_processing" in " ".join(words)


def _inside(words: list[str], cwd: str | Path | None) -> subprocess.CompletedProcess[str]:
    threads, argv = torch.get_num_threads(), sys.argv
    with ExitStack() as stack:
        output, errors = (stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(2))
        with _redirected("stdout", 1, output), _redirected("stderr", 2, errors), chdir(cwd or os.curdir):
            module = importlib.import_module(words[0])
            sys.argv = [str(module.__file__), *words[1:]]
            try:
                status = warm.exit_status(lambda: sys.exit(module.main()))
            finally:
                sys.argv = argv
                torch.set_num_threads(threads)
        for file in (output, errors):
            file.seek(0)
        return subprocess.CompletedProcess(words, status, output.read(), errors.read())


@contextmanager
def _redirected(name: str, number: int, file: IO[str]) -> Iterator[None]:
    """sys.NAME and descriptor NUMBER, where libraries write, go to `file`."""
    usual, kept = getattr(sys, name), os.dup(number)
    usual.flush()
    os.dup2(file.fileno(), number)
    try:
        with open(number, "w", closefd=False) as text:
            setattr(sys, name, text)
            yield
    finally:
        setattr(sys, name, usual)
        os.dup2(kept, number)
        os.close(kept)
