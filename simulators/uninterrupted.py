"""Ctrl-C and its like held back while native code is set up.

    SIGINT, SIGTERM, SIGHUP inside the block -> remembered -> handled when the block has ended

KeyboardInterrupt while ale-py's extension module initialises aborts the process, and with it all clean-up.

Invariant: an interrupt is late, never lost.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Delays signals that have a handler until the block has ended. Outside the main thread,
    which alone it reaches, nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}
    for number in map(int, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)):
        if callable(handler := signal.getsignal(number)):
            handlers[number] = handler
    came: list[tuple[int, FrameType | None]] = []
    for number in handlers:
        signal.signal(number, lambda number, at: came.append((number, at)))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if came:
            handlers[came[0][0]](*came[0])
