"""`python -m tests.fuzz.configuration --minutes 10`: damaged configurations of runs and of DeepSpeed, by --dry-run.

seed, case number -> config.json of a recipe, changed at random; a DeepSpeed file likewise -> trainer.main -> outcome

A finding keeps both files in a folder under --output.

Invariant: a configuration gives a plan, or one line and exit status 1 or 2; never another exception, within a minute.
"""

from __future__ import annotations

import contextlib
import io
import json
import signal
import sys
import time
import traceback
from collections import Counter
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, NoReturn
from unittest.mock import patch

import tyro

from trainer import main as command
from trainer.config import to_dict
from trainer.deepspeed_file import CONFIGS, config_names
from trainer.recipes import RECIPES

SECONDS = 60  # for one plan
VALUES = [None, True, False, -1, 0, 1, 2, 3, 7, 2**31, 2**40, 10**30, 1e9, 1e-12, 1e300, -0.5, float("inf"),
          float("nan"), "auto", "", "cpu", "true", "1", "ü", "\ud800", "\0", "../..", [], {}, [1], [[]], ["x"],
          {"enabled": "auto"}, {"enabled": True}, {"device": "cpu"}, {"stage": 3}]  # fmt: skip
DEEPSPEED_KEYS = [
    "bf16", "fp16", "torch_autocast", "zero_optimization", "optimizer", "scheduler", "train_batch_size", "unknown",
    "gradient_clipping", "gradient_accumulation_steps", "steps_per_print", "zero_allow_untested_optimizer",
]  # fmt: skip


@dataclass(frozen=True)
class Options:
    """Fuzz the configuration of a run and the DeepSpeed file that it names."""

    minutes: float = 10.0
    cases: int = sys.maxsize
    """It ends at whichever comes first."""
    seed: int = 0
    output: Path = Path("fuzz-findings/configuration")


def change(tree: Any, rng: Random) -> None:
    """Change one place of a JSON tree: another value, another name, one more, one fewer."""
    branch = tree
    while isinstance(branch, dict) and branch:
        key = rng.choice(sorted(branch))
        if isinstance(branch[key], dict) and branch[key] and rng.random() < 0.8:
            branch = branch[key]
            continue
        kind = rng.randrange(6)
        if kind == 0:
            del branch[key]
        elif kind == 1:
            branch[key[: rng.randrange(len(key) + 1)] + rng.choice(["", "s", "_"])] = branch.pop(key)
        else:
            branch[key] = deepcopy(rng.choice(VALUES))
        return


def damage(data: bytes, rng: Random) -> bytes:
    """Change the bytes of a file, seldom."""
    kind, place = rng.randrange(24), rng.randrange(len(data) + 1)
    if kind == 0:
        return data[:place]
    if kind == 1:
        return data[:place] + bytes([rng.randrange(256)]) + data[place + 1 :]
    if kind == 2:
        return rng.choice([b"\xef\xbb\xbf" + data, data.decode().encode("utf-16"), b"", b"\0" * 99, b"[" * 10**5])
    return data


def case(seed: int, number: int, folder: Path) -> list[str]:
    """The arguments of a case, whose files are in `folder`."""
    rng = Random(f"{seed} {number}")
    recipe = rng.choice(["tiny", "tiny", "tiny-tokens", "79m", "finetune", "1.18b-nodes"])
    body = to_dict(RECIPES[recipe])
    zero = json.loads((CONFIGS / f"{rng.choice(config_names())}.json").read_text())
    for _ in range(rng.choice([0, 1, 1, 2, 3])):
        if rng.random() < 0.3:
            zero[rng.choice(DEEPSPEED_KEYS)] = deepcopy(rng.choice(VALUES))
        change(zero, rng)
    for _ in range(rng.choice([0, 1, 1, 2, 3])):
        change(body, rng)
    named: Any = {"recipe": recipe if rng.random() < 0.95 else rng.choice(VALUES)} | body
    if rng.random() < 0.7:
        named["deepspeed"] = str(folder / "zero.json")
    (folder / "zero.json").write_bytes(damage(json.dumps(zero).encode(), rng))
    (folder / "config.json").write_bytes(damage(json.dumps(named).encode(), rng))
    more = rng.choice([[], [], ["--world", "2"], ["--data.folders", str(folder)]])
    return ["--dry-run", "--config", str(folder / "config.json"), "--data.root", str(folder), *more]


def attempt(arguments: list[str]) -> tuple[str, str]:
    """('plan', ''), ('refused', its line), or ('finding', what is wrong)."""
    out, err = io.StringIO(), io.StringIO()
    signal.signal(signal.SIGALRM, _hang)
    signal.alarm(SECONDS)
    streams = contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)
    try:
        # the command's own protections are of a whole process
        with patch.object(sys, "argv", ["main.py", *arguments]), streams[0], streams[1], _quiet():
            status = command.main()
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except (Exception, Hang) as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return "finding", f"{type(error).__name__} at {place.filename}:{place.lineno}: {error}"[:300]
    finally:
        signal.alarm(0)
    lines = [line for line in err.getvalue().splitlines() if line.strip()]
    if status == 0:
        return ("plan", "") if out.getvalue() else ("finding", "status 0 and no plan")
    if status == 2 and lines:  # the command line's own
        return "refused", lines[0]
    fine = len(lines) == 1 and lines[0].startswith("error: ") and len(lines[0]) > 20
    return ("refused" if fine else "finding", f"status {status}: {' / '.join(lines)}"[:300])


class Hang(BaseException):
    """A plan took too long."""


def _hang(*unused: Any) -> NoReturn:
    raise Hang(f"more than {SECONDS} seconds")


def _quiet() -> contextlib.AbstractContextManager[Any]:
    no_faults = SimpleNamespace(enable=lambda: None)
    return patch.multiple(command, protect_streams=lambda: None, StopRequest=lambda: None, faulthandler=no_faults)


def fuzz(options: Options) -> Counter[str]:
    """How often each outcome came; findings are printed and kept."""
    began, number, outcomes = time.monotonic(), 0, Counter[str]()
    while number < options.cases and time.monotonic() - began < 60 * options.minutes:
        with TemporaryDirectory() as name:
            folder = Path(name)
            kind, line = attempt(case(options.seed, number, folder))
            outcomes[kind] += 1
            if kind == "finding":
                kept = options.output / f"{options.seed}-{number}"
                kept.mkdir(parents=True, exist_ok=True)
                for path in folder.iterdir():
                    (kept / path.name).write_bytes(path.read_bytes())
                print(f"{kept}: {line}", flush=True)
        number += 1
    return outcomes


if __name__ == "__main__":
    counts = fuzz(tyro.cli(Options, prog="python -m tests.fuzz.configuration"))
    print(f"{counts.total()} cases: {dict(counts)}")
    sys.exit(int(counts["finding"] > 0))
