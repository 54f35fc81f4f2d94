"""Opening HDF5 files that may be damaged: first in a child, which may die of them.

paths -> `tried`: `python -m etl.sources._hdf5`, under a limit of time and of memory -> what is wrong with each
path  -> `opened`: the file, which was tried before

Invariant: all that libhdf5 parses when a file is read was parsed once in the child.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import h5py
import numpy as np
from h5py import h5a, h5t

from etl.sources._hdf5.dataset import AGAIN, DAMAGE, Dataset, corrupt, member, stores_rows, values
from etl.sources._hdf5.rows import own_filters, places_of
from schemas.episode import EpisodeError

ADDRESSES = 2**32  # bytes of address space of the child
SECONDS, RATE, NODES = 20, 2**24, 100  # of the child: for a file, for its bytes, for what lies in it
VALUE_BYTES = 2**24  # of one value of variable length
NUMBERS = (h5t.INTEGER, h5t.FLOAT, h5t.ENUM)


def tried(paths: Iterable[Path]) -> dict[Path, EpisodeError]:
    """Faults of the files that cannot be opened, or that killed the process that opened them."""
    found: dict[Path, EpisodeError] = {}
    waiting = []
    for path in dict.fromkeys(paths):
        if (error := _refused(path)) is not None:
            found[path] = error
        else:
            waiting.append(path)
    while waiting:
        # -m finds this module wherever the parent did
        child = subprocess.run(
            [sys.executable, "-m", "etl.sources._hdf5"],
            input=b"\0".join(map(os.fsencode, waiting)),
            capture_output=True,
            env=os.environ
            | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONIOENCODING": "utf-8:replace"},
        )
        done = child.stdout.decode(errors="replace").splitlines()
        for path, line in zip(waiting, done):
            if line != "fine":
                found[path] = corrupt(line)
        if len(done) == len(waiting):
            break
        if child.returncode >= 0:
            raise RuntimeError(f"{waiting[len(done)]}: {child.stderr.decode(errors='replace').strip()[-300:]}")
        name = signal.Signals(-child.returncode).name
        why = "reading it does not end" if name == "SIGALRM" else f"reading it kills the process that does ({name})"
        found[waiting[len(done)]] = corrupt(why)
        waiting = waiting[len(done) + 1 :]
    return found


def opened(path: Path) -> h5py.File:
    """The file, which was tried before. EpisodeError says what is wrong with it now."""
    try:
        return h5py.File(path)
    except DAMAGE as error:
        raise _refused(path) or corrupt(str(error) or type(error).__name__) from error


def _refused(path: Path) -> EpisodeError | None:
    """Fault that shows before any parsing."""
    try:
        if not path.is_file():
            return EpisodeError("missing file", f"{path.name} is no file; {AGAIN}")
        if path.stat().st_size == 0:
            return EpisodeError("empty", f"0 bytes; {AGAIN}")
        if not h5py.is_hdf5(path):
            return EpisodeError("not HDF5", f"no HDF5 signature; {AGAIN}")
    except OSError as error:
        return EpisodeError("missing file", f"{path.name} cannot be opened ({error.strerror}); {AGAIN}")
    return None


def _touch(path: Path) -> None:
    """Everything that libhdf5 parses when the file is read, once."""
    with h5py.File(path) as file:
        list(file.attrs.items())
        seen: list[str] = []
        file.visit(seen.append)
        _allow(path, len(seen))
        for name in seen:
            try:
                if (node := member(file, name)) is None:  # a type that has a name
                    continue
                if h5a.get_num_attrs(node.id):
                    list(h5py.AttributeManager(node).items())
                if isinstance(node, Dataset) and node.plain and node.id.get_type().get_class() in NUMBERS:
                    continue
                if stores_rows(node, name):  # links to elsewhere are not visited
                    _touch_data(node)
            except MemoryError:
                raise
            except DAMAGE:  # the reader meets it too, if it reads this node at all
                continue


def _touch_data(node: Dataset) -> None:
    if node.size == 0:  # of any number of rows
        return
    if h5py.check_vlen_dtype(node.dtype) is not None or h5py.check_string_dtype(node.dtype) is not None:
        if any(len(item) > VALUE_BYTES for value in values(node, len(node)) for item in np.atleast_1d(value)):
            raise MemoryError
    elif node.chunks is not None and own_filters(node) is not None:
        places_of(node)
    elif node.chunks is not None:
        for start in range(0, len(node), node.chunks[0]):
            np.asarray(node[start : start + node.chunks[0]])


def _allow(path: Path, nodes: int = 0) -> None:
    """The process has so many seconds from now."""
    signal.alarm(SECONDS + path.stat().st_size // RATE + nodes // NODES)


def main() -> None:
    """The child: paths on stdin, one verdict per line on stdout. Dies of what it reads."""
    most = resource.getrlimit(resource.RLIMIT_AS)[1]  # a cluster's, which no user may raise
    allowed = ADDRESSES if most == resource.RLIM_INFINITY else min(ADDRESSES, most)
    resource.setrlimit(resource.RLIMIT_AS, (allowed, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for name in sys.stdin.buffer.read().split(b"\0"):
        path = Path(os.fsdecode(name))
        _allow(path)
        try:
            _touch(path)
        except MemoryError:
            print("asks for more memory than it can hold", flush=True)
        except DAMAGE as error:
            print(" ".join(str(error).split())[:200] or type(error).__name__, flush=True)
        else:
            print("fine", flush=True)
