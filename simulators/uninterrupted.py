"""Ctrl-C held back while native code is set up.

    SIGINT inside the block -> remembered -> raised when the block has ended

KeyboardInterrupt while ale-py's extension module initialises aborts the process, and with it all clean-up.

Invariant: an interrupt is late, never lost.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C waits until the block has ended. Outside the main thread, which alone it reaches, nothing changes."""
    handler, came = signal.getsignal(signal.SIGINT), []
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    signal.signal(signal.SIGINT, lambda number, at: came.append(at))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if came:
            handler(signal.SIGINT, came[0])
