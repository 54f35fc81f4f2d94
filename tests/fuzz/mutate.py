"""Damage to a log: to the bytes of its files, to the folder they lie in, or, by `formats`, to what they mean.

seed trees + random numbers -> one damaged tree, and what was done to it

A tree maps relative paths to contents; a string in place of bytes is "folder", "fifo", or the target of a link.

Invariant: a function of the seeds and the state of the random numbers alone.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path, PurePosixPath
from random import Random

Tree = dict[str, bytes | str]
Structure = Callable[[Tree, str, Random], str]
Edit = Callable[[bytes, int, int, Random], tuple[int, int, bytes]]

SHARD = re.compile(r"-\d{5}-of-\d{5}$")
NUMBERS = [0, 1, 2, 7, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 2**20, 2**28, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62]
NUMBERS += [2**63 - 1, 2**63, 2**64 - 1]
TOKENS = [b"\x89HDF\r\n\x1a\n", b"TREE", b"SNOD", b"HEAP", b"GCOL", b"OHDR", b"OCHK", b"FRHP", b"\x93NUMPY\x01\0"]
TOKENS += [b"\x93NUMPY\x03\0", b"PAR1", b"\x1f\x8b\x08\0", b'"\\ud800"', b"\\u0000", b"NaN", b"1e999", b"9" * 5000]
TOKENS += [b"[" * 5000, b'{"":' * 5000, b"\xef\xbb\xbf", b"\r", b"\n\n", b"\xe2\x80\xa8", b"\xed\xa0\x80", b"\0" * 64]
NAMES = [
    "\udcff",
    "a" * 240,
    " ",
    "$store$_action_ckpt.0.gz",
    "$store$_reward_ckpt.٣.gz",
    "x" + "9" * 200,
    "[*?]",
    "data",
]
NAMES += [
    "-v0",
    "a.tar",
    "%s{}",
    "\x1b[31m",
    "hopper_medium-v2",
    "metadata.json",
    "main_data.hdf5",
    "infos/goal",
    "episode_7",
]


def mutate(seeds: list[Tree], structures: dict[str, Structure], rng: Random) -> tuple[Tree, list[str]]:
    """A damaged copy of one of the seeds. `structures`: file ending, or "-of-" for one of NNNNN-of-NNNNN
    -> its format's mutator."""
    tree, done, damaged = dict(rng.choice(seeds)), [], set()
    for _ in range(1 + min(4, int(rng.expovariate(0.9)))):
        files = sorted(name for name, content in tree.items() if isinstance(content, bytes))
        if not files or rng.random() < 0.05:
            done.append(_folder(tree, rng.choice(seeds), rng))
            continue
        name = rng.choice(files)
        structure = structures.get("-of-" if SHARD.search(name) else PurePosixPath(name).suffix)
        if structure and name not in damaged and rng.random() < 0.6:
            with suppress(Exception):  # what the writer itself refuses is no case
                done.append(f"{name}: {structure(tree, name, rng)}")
        else:
            other = rng.choice([content for content in rng.choice(seeds).values() if isinstance(content, bytes)])
            tree[name], how = damage(bytes(tree[name]), rng, other)  # type: ignore[arg-type]
            done.append(f"{name}: {how}")
            damaged.add(name)
    return tree, done


def damage(data: bytes, rng: Random, other: bytes = b"") -> tuple[bytes, str]:
    """One to eight edits of bytes. They lie rather not among zeros, which are mostly unused."""
    done = []
    for _ in range(1 << rng.randrange(4)):
        spots = [rng.randrange(len(data) or 1) for _ in range(4)]
        at = next((spot for spot in spots if any(data[spot : spot + 1])), spots[0])
        name = rng.choice(list(EDITS))
        if name != "splice":
            start, stop, new = EDITS[name](data, at, at + min(1 << rng.randrange(12), len(data) // 2 + 1), rng)
        elif rng.random() < 0.3:
            start, stop, new = at, len(data), other[rng.randrange(len(other) or 1) :]
        else:
            continue
        data = data[:start] + new + data[stop:]
        done.append(name)
    return data, " ".join(done)


def _number(data: bytes, at: int, end: int, rng: Random) -> tuple[int, int, bytes]:
    width = rng.choice((1, 2, 4, 8))
    near = int.from_bytes(data[at : at + width], "little") + rng.choice((-8, -2, -1, 1, 2, 8, 256))
    value = rng.choice([near, *rng.choices(NUMBERS, k=2)]) % 256**width
    return at, at + width, value.to_bytes(width, rng.choice(("little", "little", "big")))


def _junk(count: int, rng: Random) -> bytes:
    return rng.choice([bytes(count), b"\xff" * count, rng.randbytes(count), rng.choice(TOKENS)])


# Each says which range to replace, and by what.
EDITS: dict[str, Edit] = {
    "flip": lambda data, at, end, rng: (at, at + 1, bytes(b ^ 1 << rng.randrange(8) for b in data[at : at + 1])),
    "number": _number,
    "other number": _number,
    "third number": _number,
    "token": lambda data, at, end, rng: (at, rng.choice((at, end)), rng.choice(TOKENS)),
    "fill": lambda data, at, end, rng: (at, end, _junk(end - at, rng)),
    "insert": lambda data, at, end, rng: (at, at, _junk(end - at, rng)),
    "append": lambda data, at, end, rng: (len(data), len(data), _junk(end - at, rng)),
    "delete": lambda data, at, end, rng: (at, end, b""),
    "truncate": lambda data, at, end, rng: (at, len(data), b""),
    "duplicate": lambda data, at, end, rng: (at, at, data[at:end]),
    "swap": lambda data, at, end, rng: (at, 2 * end - at, data[end : 2 * end - at] + data[at:end]),
    "splice": lambda data, at, end, rng: (at, at, b""),
    "empty": lambda data, at, end, rng: (0, 0 if rng.random() < 0.9 else len(data), b""),
}


def _folder(tree: Tree, other: Tree, rng: Random) -> str:
    """One change of names and kinds of files."""
    how = rng.choice(["add", "remove", "move", "swap", "special", "rename folder"])
    name, second = rng.choice(sorted(tree) or ["x"]), rng.choice(sorted(other))
    path = PurePosixPath(name)
    target = str(path.with_name(rng.choice(NAMES).replace("/", "") + rng.choice(["", path.suffix])))
    if how == "add":
        tree[target] = other[second]
    elif how == "remove":
        tree.pop(name, None)
    elif how == "move":
        tree[target] = tree.pop(name, b"")
    elif how == "swap":
        tree[name] = other[second]
    elif how == "special":
        tree[name] = rng.choice(["folder", "fifo", "missing", path.name, "..", "/dev/null"])
    else:
        old, new = rng.choice(path.parts), rng.choice(NAMES)
        for each in list(tree):
            tree["/".join(new if part == old else part for part in each.split("/"))] = tree.pop(each)
    return f"{name}: {how}"


def write(tree: Tree, folder: Path) -> None:
    """The tree as files, but for names that no file can have."""
    folder.mkdir(parents=True)
    for name, content in tree.items():
        path = folder / name
        with suppress(OSError, ValueError):
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                path.write_bytes(content)
            elif content in ("folder", "fifo"):
                path.mkdir() if content == "folder" else os.mkfifo(path)
            else:
                path.symlink_to(content)
