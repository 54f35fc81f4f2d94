"""Reads one folder the way a build does, and says whether anything but an answer or a refusal came of it.

folder -> resolve -> scan -> read -> check -> tokenize -> "fine", "rejected", "refused", or a Finding

Invariant: SourceError, EpisodeError and Rejection are answers; any other exception is a finding, and so are more than
MEMORY bytes above where the case began, and results that are not one a ref.
"""

from __future__ import annotations

import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from etl.building.plan import BuildConfig, make_plan
from etl.sources import Rejection, Source, SourceError, TaskScan
from etl.tokenizers.text import DEFAULT_MODEL, TextTokenizer
from etl.tokenizers.timestep import TimestepTokenizer
from schemas.episode import Document, EpisodeError
from schemas.vocabulary import by_name

ROOT = Path(__file__).resolve().parents[2]
MEMORY = 300 * 2**20
VOCABULARY = by_name("seed")
TEXT = TextTokenizer(DEFAULT_MODEL, VOCABULARY)


@dataclass(frozen=True)
class Finding:
    """`kind`: exception, protocol, memory, crash, hang, or mutator, which is a fault of the fuzzer. `where`: the last
    line of the project, FILE:LINE FUNCTION."""

    kind: str
    error: str
    where: str
    detail: str


class Broken(Exception):
    """A result that breaks the protocol of sources."""


class _Passed(BaseException):
    """Memory passed the bound."""


def attempt(source: Source, folder: Path, options: Any) -> str | Finding:
    """The outcome of one case."""
    before = _memory("VmRSS")
    _reset_peak()
    try:
        outcome: str | Finding = _read(source, folder, options)
    except Exception as error:
        kind, name = ("protocol", error.args[0]) if isinstance(error, Broken) else ("exception", type(error).__name__)
        own = [f"{place(f.filename)}:{f.lineno} {f.name}" for f in traceback.extract_tb(error.__traceback__)]
        own = [where for where in own if where[0] != ":"]
        outcome = Finding(kind, name, own[-1] if own else "", "".join(traceback.format_exception(error))[-6000:])
    grown = _memory("VmHWM") - before
    if grown > MEMORY and isinstance(outcome, str):
        detail = f"{grown / 2**20:.0f} MiB above the {before / 2**20:.0f} MiB it began with; then: {outcome}"
        outcome = Finding("memory", "", _blame(source, folder, options), detail)
    return outcome


def place(file: str) -> str:
    """A file of the project as it is cited; empty for any other, and for the fuzzer's own."""
    path = Path(file)
    own = path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in ("etl", "schemas")
    return str(path.relative_to(ROOT)) if own else ""


def _read(source: Source, folder: Path, options: Any) -> str:
    try:
        scans = source.scan(source.resolve(folder, None, folder), options)
    except SourceError:
        return "refused"
    rejected: list[Rejection] = []
    for scan in scans:
        rejected += scan.rejected
        _require(scan.task is not None or not scan.episodes, "episodes without a task")
        if scan.task is not None:
            rejected += _episodes(source, scan)
    make_plan(source.name, scans, BuildConfig(), TEXT.fingerprint)
    for each in rejected:
        _require(
            each.reason and each.detail and len(each.detail) < 2000, "a rejection without or with endless reason", each
        )
    return "rejected" if rejected else "fine"


def _episodes(source: Source, scan: TaskScan) -> list[Rejection]:
    task = scan.task
    assert task is not None
    tokenizer = TimestepTokenizer(task, VOCABULARY, TEXT)
    results = list(source.read(task, scan.episodes))
    _require(len(results) == len(scan.episodes), "not one result a ref")
    for ref, result in zip(scan.episodes, results):
        _require(result.position == ref.position, "not in the order of the refs")
        if isinstance(result, Document):
            TEXT.encode_document(result.text)
        elif not isinstance(result, Rejection):
            try:
                result.check(task)
            except EpisodeError:
                continue
            rows = [tokenizer.encode_observation(result.observation).tokens]
            rows += [tokenizer.encode_action(result.action)[0]] if task.action else []
            _require({len(own) for own in rows} == {result.timesteps}, "not one row of tokens a timestep")
    return [result for result in results if isinstance(result, Rejection)]


def _require(holds: Any, what: str, example: Any = "") -> None:
    if not holds:
        raise Broken(what, example)


def _memory(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _blame(source: Source, folder: Path, options: Any) -> str:
    """Reads again, one line of the project after the other: the line at which memory passes the bound."""
    limit, last = _memory("VmRSS") + MEMORY, ""

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal last
        where = place(frame.f_code.co_filename)
        if not where:
            return None
        if _memory("VmHWM") > limit:
            raise _Passed
        last = f"{where}:{frame.f_lineno} {frame.f_code.co_name}"
        return trace

    _reset_peak()
    sys.settrace(trace)
    try:
        _read(source, folder, options)
    except _Passed:
        return last
    except Exception:
        pass
    finally:
        sys.settrace(None)
    return ""
