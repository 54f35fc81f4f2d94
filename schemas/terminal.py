"""A command and its terminal: streams whose reader may go away, and signals that ask it to end.

    stdout, stderr -> LossyStream: written as long as somebody reads, dropped after that
    SIGINT, SIGTERM, SIGHUP (unless it is ignored, as under nohup) -> KeyboardInterrupt, again until it arrives

Invariant: a closed stdout or stderr ends no command and changes no result.
"""

from __future__ import annotations

import functools
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, TextIO

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
AGAIN_SECONDS = 2.0


class LossyStream:
    """A text stream that drops what nobody can read any more."""

    def __init__(self, stream: TextIO | None):
        self.stream = stream

    def write(self, text: str) -> int:
        try:
            if self.stream is not None:
                self.stream.write(text)
        except UnicodeEncodeError:  # a terminal that knows few letters
            encoding = self.stream.encoding or "ascii"  # type: ignore[union-attr]
            self.write(text.encode(encoding, "replace").decode(encoding))
        except (OSError, ValueError):
            self._drop()
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            if self.stream is not None:
                self.stream.flush()
        except (OSError, ValueError):
            self._drop()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def _drop(self) -> None:
        """Point the file descriptor at nothing: Python flushes it again when it ends, and would fail then; libraries
        that write to it themselves go on too."""
        try:
            assert self.stream is not None
            descriptor, nothing = self.stream.fileno(), os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, descriptor)
            os.close(nothing)
        except (OSError, ValueError):
            self.stream = None


def open_closed_streams() -> None:
    """Point stdin, stdout and stderr at nothing where they are closed: else the next file that is opened takes their
    place, and libraries write into it."""
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            nothing = os.open(os.devnull, os.O_RDWR)
            if nothing != descriptor:
                os.dup2(nothing, descriptor)
                os.close(nothing)
            os.set_inheritable(descriptor, True)
            setattr(sys, name, open(descriptor, "r" if name == "stdin" else "w"))  # noqa: SIM115


def protect_streams() -> None:
    """Make sys.stdout and sys.stderr lossy for the rest of this process."""
    open_closed_streams()
    for name in ("stdout", "stderr"):
        if not isinstance(getattr(sys, name), LossyStream):
            setattr(sys, name, LossyStream(getattr(sys, name)))


def ignored(number: signal.Signals) -> bool:
    """True if this process was started so that it ignores a signal, as nohup does with SIGHUP."""
    return signal.getsignal(number) is signal.SIG_IGN


def status_of(interrupt: KeyboardInterrupt) -> int:
    """The exit status after an interrupt: 128 + the signal, as shells have it."""
    number = interrupt.args[0] if interrupt.args and isinstance(interrupt.args[0], int) else signal.SIGINT
    return 128 + number


class SignalKeyboardInterrupt(KeyboardInterrupt):
    """Raised by a signal in a command; its argument is the signal's number. It may be lost: Python drops what is
    raised in a callback or a destructor, and libraries catch everything. Then it is raised again."""

    listening = False

    def __del__(self) -> None:
        if SignalKeyboardInterrupt.listening:  # else it has reached the command's end
            signal.setitimer(signal.ITIMER_REAL, AGAIN_SECONDS)


@contextmanager
def _ending_signals() -> Iterator[None]:
    """While the block runs, the signals that ask a process to end raise KeyboardInterrupt. In the main thread only;
    elsewhere they stay as they are."""
    before: dict[signal.Signals, Any] = {}
    asked: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        if number != signal.SIGALRM:
            asked.append(number)
            before.setdefault(signal.SIGALRM, signal.signal(signal.SIGALRM, interrupt))
        raise SignalKeyboardInterrupt(asked[-1])

    usual_hook = sys.unraisablehook

    def hook(about: Any) -> None:
        if not issubclass(about.exc_type, SignalKeyboardInterrupt):  # which comes again
            usual_hook(about)

    if threading.current_thread() is threading.main_thread():
        SignalKeyboardInterrupt.listening = True
        sys.unraisablehook = hook
        # a handler that somebody else has set stays
        for number in ENDING:
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                before[number] = signal.signal(number, interrupt)
    try:
        yield
    finally:
        if before:
            SignalKeyboardInterrupt.listening = False
            sys.unraisablehook = usual_hook
        if signal.SIGALRM in before:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def home_paths(arguments: Sequence[str]) -> list[str]:
    """Arguments with the home folder for '~' in --option=~/folder, which shells leave as it is."""
    return [re.sub(r"^(--?[\w.-]+=)?~(?=/|$)", lambda found: (found[1] or "") + _home(), word) for word in arguments]


def _home() -> str:
    return os.path.expanduser("~")  # itself where there is none


def command(main: Callable[[], int]) -> Callable[[], int]:
    """The `main` of a command, made safe: its streams lossy, SIGTERM and SIGHUP like Ctrl-C, '~' the home folder. An
    interrupt that `main` does not handle itself ends it with one line."""

    @functools.wraps(main)
    def run() -> int:
        usual = sys.stdout, sys.stderr
        sys.argv[1:] = home_paths(sys.argv[1:])
        protect_streams()
        try:
            with _ending_signals():
                return main()
        except KeyboardInterrupt as interrupt:
            print("interrupted", file=sys.stderr)
            return status_of(interrupt)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            sys.stdout, sys.stderr = usual[0] or sys.stdout, usual[1] or sys.stderr

    return run
