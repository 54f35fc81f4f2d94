"""`python -m tests.mutation`: forty small mistakes, made one at a time; how many does the suite catch?

    mistake -> a fork in a copy of the checkout that has it -> the tests of its file, quick ones first -> caught or not

Invariant: a mistake whose text is no longer in its file is an error, so this list is of the code as it is.
"""

from __future__ import annotations

import importlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest
import tyro

ROOT = Path(__file__).resolve().parent.parent
CAUGHT_AT_LEAST = 36
SECONDS = 1800
LIBRARIES = (
    "torch._dynamo", "deepspeed.runtime.zero.stage3", "apache_beam", "gymnasium_robotics", "matplotlib.pyplot",
    "hypothesis", "pyarrow.parquet", "h5py", "webdataset", "cv2", "PIL.Image", "sentencepiece",
)  # fmt: skip

TESTS = {
    "etl/tokenizers": ("tests/etl/test_tokenizers.py", "tests/etl/test_decode.py", "tests/etl/test_corruption.py"),
    "shards/sampler": ("tests/shards/test_sampler.py", "tests/shards/test_stream.py", "tests/trainer/test_golden.py"),
    "shards/timeline": ("tests/shards/test_stream.py", "tests/shards/test_faults.py", "tests/trainer/test_golden.py"),
    "trainer/loss": ("tests/trainer/test_model.py", "tests/trainer/test_golden.py"),
    "eval/agents": ("tests/eval/test_agent.py", "tests/eval/test_compare.py"),
    "eval/scores": ("tests/eval/test_scores.py", "tests/eval/test_report.py"),
    "trainer/checkpoint": (
        "tests/trainer/test_losing_nothing.py::test_the_last_and_the_best_checkpoints_are_kept",
        "tests/trainer/test_train.py",
    ),
    "trainer/model": ("tests/trainer/test_export.py", "tests/trainer/test_train.py", "tests/eval/test_compare.py"),
}  # fmt: skip

CONTINUOUS, IMAGE, TEXT = (f"etl/tokenizers/{name}.py" for name in ("continuous", "image", "text"))
SAMPLER, TIMELINE, LOSS, AGENT = "shards/sampler.py", "shards/timeline.py", "trainer/loss.py", "eval/agents/base.py"
SCORES, CHECKPOINT, EXPORT = "eval/scores.py", "trainer/checkpoint.py", "trainer/model/export.py"
MISTAKES = (
    (CONTINUOUS, "np.log(vocabulary.scale * vocabulary.mu + 1.0)\n    return np.copysign",
     "np.log(vocabulary.scale * vocabulary.mu + 2.0)\n    return np.copysign"),
    (CONTINUOUS, "np.clip(y, 0.0, bins - 1, out=y)", "np.clip(y, 0.0, bins - 2, out=y)"),
    (CONTINUOUS, "(y < 0.0) | (y > bins)", "y > bins"),
    (CONTINUOUS, "_tokens(y, vocabulary.bins, vocabulary.action_continuous.start)",
     "_tokens(y, vocabulary.bins - 1, vocabulary.action_continuous.start)"),
    (CONTINUOUS, "[bins] + 1.0)", "[bins] + 1.001)"),
    (CONTINUOUS, "0x10000 - above", "0xFFFF - above"),
    ("etl/tokenizers/discrete.py", " + ids.start).astype", " + ids.start + 1).astype"),
    (IMAGE, "(sums + 2 >> 2)", "(sums + 1 >> 2)"),
    (IMAGE, "((0, 0), (0, down), (0, right), (0, 0))", "((0, 0), (down, 0), (right, 0), (0, 0))"),
    (TEXT, "len(p) > length", "len(p) >= length"),
    (TEXT, "self.processor.encode(text) + end", "end + self.processor.encode(text)"),
    (SAMPLER, "np.argsort(counts - exact", "np.argsort(exact - counts"),
    (SAMPLER, "block * self.counts[task] + slot", "(block + 1) * self.counts[task] + slot"),
    (SAMPLER, "np.minimum(place // size, groups - 1)", "np.minimum(place // size, groups)"),
    (SAMPLER, "slot - self.first_slot[task]", "slot - self.first_slot[task] + 1"),
    (SAMPLER, "np.where(number < count, shuffled", "np.where(number < count - 1, shuffled"),
    (SAMPLER, "return blocks * self.counts + np", "return (blocks + 1) * self.counts + np"),
    (TIMELINE, "-(-sequence_length // self.layout.length)", "sequence_length // self.layout.length"),
    (TIMELINE, "other += other >= own", "other += other > own"),
    (TIMELINE, "stop - start - taken + 1)", "stop - start - taken + 2)"),
    (TIMELINE, "+ self.width[task] - taken", "+ self.width[task]"),
    (TIMELINE, "patches + inside * self.patch_bytes", "patches + inside * self.token_bytes"),
    (TIMELINE, " | (lap[1:] != lap[:-1])", ""),
    (LOSS, "int(3 * soft_bins)", "int(2 * soft_bins)"),
    (LOSS, "-0.5 * (offsets", "-0.6 * (offsets"),
    (LOSS, "neighbours < ids.stop", "neighbours <= ids.stop"),
    (LOSS, "flatten()[places + 1]", "flatten()[places]"),
    (LOSS, "ids.stop for ids in ranges) - start", "ids.stop for ids in ranges) - start - 1"),
    (AGENT, "(odds * self.centres).sum(dim=1) + 1)", "(odds * self.centres).sum(dim=1) + 1.02)"),
    (AGENT, "logits.double() / self.config", "logits.double() * self.config"),
    ("eval/agents/tokens.py", "self.layout.length - self.window + 1)", "self.layout.length - self.window + 2)"),
    (AGENT, 'shown = slice(length) if self.config.prompt == "start"',
     'shown = slice(length) if self.config.prompt == "end"'),
    ("eval/agents/prompts.py", "other.name != task.name and", "other.name != task.name or"),
    (SCORES, "cut = n // 4", "cut = n // 5"),
    (SCORES, "values.std(ddof=1)", "values.std()"),
    (SCORES, "50.0 * (1.0 - CONFIDENCE)", "100.0 * (1.0 - CONFIDENCE)"),
    (SCORES, "one.return_interval[0] > ceiling", "one.return_interval[1] > ceiling"),
    (CHECKPOINT, "records[:keep_last]", "records[: keep_last + 1]"),
    (EXPORT, "not tensor.isfinite().all()", "not tensor.isfinite().any()"),
    (EXPORT, "table[ids] = kept", "table[: len(kept)] = kept"),
)  # fmt: skip


@dataclass(frozen=True)
class Options:
    """Make each mistake in a copy of the checkout, and see whether tests fail there."""

    only: Annotated[str, tyro.conf.arg(aliases=["-k"])] = ""
    """Mistakes in files whose name holds this."""
    processes: int = 1
    """Mistakes tried at a time."""


def copy(folder: Path) -> None:
    """The checkout's files, those of git and those that it does not ignore."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.check_output(command, cwd=ROOT, text=True).splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)


def attempt(number: int, folder: Path) -> None:
    """In a fork: make a mistake in a copy, and leave what its tests print in the copy's `output`. Exit status of the
    first pytest that fails, or 0."""
    signal.alarm(SECONDS)
    file, right, wrong = MISTAKES[number]
    copy(folder)
    text = (folder / file).read_text()
    (folder / file).write_text(text.replace(right, wrong))
    for name in [name for name in sys.modules if name.split(".")[0] == "tests"]:
        del sys.modules[name]
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    output = os.open("output", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    tests = next(tests for prefix, tests in TESTS.items() if file.startswith(prefix))
    status = 0
    for marks in ("not process and not slow", "process and not slow"):
        if status in (0, 5):  # 5: no test has these marks
            arguments = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--timeout=300", "-m", marks, *tests]
            status = int(pytest.main(arguments))
    sys.stdout.flush()
    os._exit(0 if status == 5 else status)


def report(number: int, folder: Path, status: int) -> bool:
    """Print what came of a mistake; whether it was caught."""
    file, right, wrong = MISTAKES[number]
    output = (folder / "output").read_text()
    failed = [line.split(" - ")[0] for line in output.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if status not in (0, 1):
        raise SystemExit(f"{file}: pytest itself ended with {status}\n{output[-3000:]}")
    print(f"{number + 1:2} {failed[0] if status else 'SURVIVED'}: {file}: {right!r} -> {wrong!r}", flush=True)
    return bool(status)


def main() -> int:
    """Exit status 1 where too few are caught."""
    options = tyro.cli(Options, prog="python -m tests.mutation")
    for file, right, _ in MISTAKES:
        if (count := (ROOT / file).read_text().count(right)) != 1:
            raise SystemExit(f"{file}: '{right}' is there {count} times; correct tests/mutation.py")
    for name in LIBRARIES:  # once for all forks; nothing of the project, which is what changes
        importlib.import_module(name)
    waiting = [n for n, (file, _, _) in enumerate(MISTAKES) if options.only in file]
    total, caught, began = len(waiting), 0, time.monotonic()
    running: dict[int, tuple[int, Path]] = {}
    with tempfile.TemporaryDirectory(prefix="gato-mutation-") as place:
        while waiting or running:
            while waiting and len(running) < options.processes:
                number = waiting.pop(0)
                folder = Path(place) / str(number)
                folder.mkdir()
                if (pid := os.fork()) == 0:
                    attempt(number, folder)
                running[pid] = number, folder
            pid, status = os.wait()
            number, folder = running.pop(pid)
            caught += report(number, folder, os.waitstatus_to_exitcode(status))
            shutil.rmtree(folder)
    print(f"{caught} of {total} caught in {time.monotonic() - began:.0f} s")
    return int(caught < CAUGHT_AT_LEAST * total // len(MISTAKES))


if __name__ == "__main__":
    sys.exit(main())
