"""Warm interpreters: `python ...` and `deepspeed ...` as forks of a process that has imported everything.

    test: Popen --socket--> server: fork -> the caller's pipes, folder, environment, arguments -> runpy

A cold `deepspeed` starts three or four interpreters, each of which imports torch for two seconds. Here the same code
runs from its first line, the launcher's included, in real processes: each has its own id, command line, signals and
exit status. Only exec and the imports are left out.

Invariant: the server has one Python thread and has computed nothing, so its forks are as good as fresh interpreters.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

# Popped from sys.modules in a fork that runs them as __main__.
COMMANDS = (
    "etl.build", "etl.inspect", "etl.record", "etl.replay", "eval.compare", "eval.curve", "eval.ship", "shards.verify",
    "deepspeed.launcher.runner", "deepspeed.launcher.launch",
)  # fmt: skip
LIBRARIES = (
    "trainer.loop", "trainer.dry_run", "torch._dynamo", "torch.utils.tensorboard",
    "deepspeed.runtime.zero.muon.muon_optimizer", "deepspeed.runtime.zero.stage3", "setuptools",
    "ale_py", "gymnasium_robotics", "minigrid", "mujoco",
)  # fmt: skip
CHILD = "etl.sources._hdf5"  # the code's own: it limits its memory, and so needs a server that has loaded little
LAUNCHER = "deepspeed.launcher.launch"
LAUNCHER_POLL_SECONDS = 0.05  # instead of 1
TITLE_BYTES = 8192  # room for a fork's command line
MESSAGE_BYTES = 2**17

_cold_popen, _sleep = subprocess.Popen, time.sleep


class _Warm(subprocess.Popen):
    """subprocess.Popen whose process is forked instead of executed."""

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest) -> None:
        _, _, shell, p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite, *_, session, _ = rest
        assert preexec_fn is None and not pass_fds and not shell, "start this one cold"
        sys.audit("subprocess.Popen", args[0], args, cwd, env)
        request = {
            "arguments": [os.fsdecode(word) for word in args],
            "folder": os.fsdecode(cwd or os.getcwd()),
            "environment": dict(os.environ if env is None else env),
            "session": session,
        }
        streams = [given if given >= 0 else usual for usual, given in enumerate((p2cread, c2pwrite, errwrite))]
        self.pid = self._start(request, streams)
        self._child_created = True
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)  # type: ignore[attr-defined]

    def _start(self, request: dict[str, Any], streams: list[int]) -> int:
        """Id of the process."""
        sys.stdout.flush()
        sys.stderr.flush()
        if pid := os.fork():
            return pid
        become(request, streams)


def _launch(args: list[str], **options: Any) -> subprocess.Popen:
    """subprocess.Popen of a launcher: what is no Python (numactl) has nothing to be warm for."""
    return (_Warm if args[0] == sys.executable else _cold_popen)(args, **options)


class Popen(_Warm):
    """A command that starts with this interpreter or with a Python script beside it, forked from the server."""

    def _start(self, request: dict[str, Any], streams: list[int]) -> int:
        self._status, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            server = _server(CHILD if CHILD in request["arguments"] else "everything")
            socket.send_fds(server, [json.dumps(request).encode()], [theirs.fileno(), *streams])
        if not (answer := self._status.recv(64)):
            raise ChildProcessError("the server of warm interpreters ended; python -m tests.warm may show why")
        return int(answer)

    def _internal_poll(self, *unused: Any, **unused_too: Any) -> int | None:
        if self.returncode is None:
            pid, status = self._try_wait(os.WNOHANG)
            if pid:
                self._handle_exitstatus(status)  # type: ignore[attr-defined]
        return self.returncode

    def _try_wait(self, flags: int) -> tuple[int, int]:
        """As os.waitpid: the server is the parent, and passes on what it gets."""
        try:
            answer = self._status.recv(64, socket.MSG_DONTWAIT if flags else 0)
        except BlockingIOError:
            return 0, 0
        except OSError:  # closed: it was left by a test that failed
            return self.pid, signal.SIGKILL
        self._status.close()
        return self.pid, int(answer or signal.SIGKILL)


def run(
    command: list[str], input: Any = None, timeout: float | None = None, check: bool = False, text: bool = True,
    **options: Any,
) -> subprocess.CompletedProcess:  # fmt: skip
    """subprocess.run with captured output, warm."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": None if input is None else subprocess.PIPE}
    with Popen(command, text=text, **pipes, **options) as process:
        try:
            output, errors = process.communicate(input, timeout)
        except BaseException:
            process.kill()
            raise
    done = subprocess.CompletedProcess(command, process.returncode, output, errors)
    if check:
        done.check_returncode()
    return done


_servers: dict[str, socket.socket] = {}


def _server(loaded: str) -> socket.socket:
    """A socket of this process's server with so much loaded. It starts at the first call and ends with this process."""
    if loaded not in _servers:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, "-m", "tests.warm", loaded, str(theirs.fileno()), "x" * TITLE_BYTES]
        # What libraries read when they are loaded; a fork must not inherit BLAS's threads.
        environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        root = Path(__file__).resolve().parent.parent
        _cold_popen(command, cwd=root, env=environment, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
        theirs.close()
        _servers[loaded] = ours
    return _servers[loaded]


def serve(requests: socket.socket) -> None:
    """Fork for each request, and pass on exit statuses, until the other side is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for the commands
    awake, wake = socket.socketpair()
    wake.setblocking(False)
    signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    running: dict[int, socket.socket] = {}
    poll = select.poll()
    poll.register(requests, select.POLLIN)
    poll.register(awake, select.POLLIN)
    while True:
        ready = {number for number, _ in poll.poll()}
        if awake.fileno() in ready:
            awake.recv(4096)
            while running and (ended := os.waitpid(-1, os.WNOHANG))[0]:
                with running.pop(ended[0]) as status, suppress(OSError):  # nobody may be waiting
                    status.send(str(ended[1]).encode())
        if requests.fileno() in ready:
            body, fds, _, _ = socket.recv_fds(requests, MESSAGE_BYTES, 4)
            if not body:
                for pid in running:  # the test that started it was ended, or failed
                    with suppress(OSError):
                        (os.killpg if os.getpgid(pid) == pid else os.kill)(pid, signal.SIGKILL)
                return
            status, streams = socket.socket(fileno=fds[0]), fds[1:]
            if (pid := os.fork()) == 0:
                signal.set_wakeup_fd(-1)
                for one in (requests, awake, wake, status, *running.values()):
                    one.close()
                become(json.loads(body), streams)
            running[pid] = status
            status.send(str(pid).encode())
            for stream in streams:
                os.close(stream)


def become(request: dict[str, Any], streams: list[int]) -> NoReturn:
    """Turn this fork into the process that was asked for; ends it."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if request["session"]:
        os.setsid()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    for stream in {stream for stream in streams if stream > 2}:
        os.close(stream)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    words = request["arguments"]
    _show(words)
    launches = LAUNCHER in words or Path(words[0]).name == "deepspeed"
    subprocess.Popen = _launch if launches else _cold_popen  # type: ignore[misc,assignment]
    time.sleep = (lambda seconds: _sleep(min(seconds, LAUNCHER_POLL_SECONDS))) if launches else _sleep
    status = exit_status(lambda: _interpret(words))
    with suppress(BaseException):
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


def _show(words: list[str]) -> None:
    """Make `words` the command line that other processes see, over that of the server."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end = int(fields[45]), int(fields[46])
    title = b"\0".join(map(os.fsencode, words))[: end - start - 1]
    ctypes.memmove(start, title.ljust(end - start, b"\0"), end - start)


def _interpret(words: list[str]) -> None:
    """What `python` does with its arguments, or with a script that names it in its first line."""
    unbuffered = False
    if words[0] == sys.executable:
        words = words[1:]
        if unbuffered := words[0] == "-u":
            words = words[1:]
    sys.stdout.reconfigure(line_buffering=unbuffered, write_through=unbuffered)  # type: ignore[union-attr]
    kind = words[0]
    sys.path[0] = os.getcwd()
    sys.path[1:1] = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path not in ("", *sys.path)]
    if kind == "-m":
        sys.argv = words[1:]
        sys.modules.pop(words[1], None)
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv = ["-c", *words[2:]]
        main = sys.modules["__main__"] = ModuleType("__main__")
        exec(compile(words[1], "<string>", "exec"), main.__dict__)
    else:
        sys.argv = words
        sys.path[0] = str(Path(kind).resolve().parent)
        runpy.run_path(kind, run_name="__main__")


def exit_status(call: Callable[[], Any]) -> int:
    """Call it, and give the exit status that an interpreter would have after it; negative: of a signal."""
    try:
        call()
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            return 1
        return int(end.code or 0) & 255
    except KeyboardInterrupt:
        traceback.print_exc()
        return -signal.SIGINT
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def main() -> None:
    """The server. The command alone, without a socket, shows whether everything imports."""
    if sys.argv[1:2] == [CHILD]:
        importlib.import_module(CHILD)
    else:
        for name in (*LIBRARIES, *COMMANDS):
            with suppress(ImportError):  # which the command that needs it will say
                importlib.import_module(name)
        with suppress(ImportError):
            importlib.import_module("deepspeed.ops").__compatible_ops__  # noqa: B018  # found out once, with a compiler
    gc.collect()
    gc.freeze()  # pages of what is loaded stay shared
    if len(sys.argv) > 2:
        serve(socket.socket(fileno=int(sys.argv[2])))


if __name__ == "__main__":
    # Not as __main__: that is what the forks become.
    importlib.import_module("tests.warm").main()
