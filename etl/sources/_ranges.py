"""The range of real-valued actions, per dimension, which many logs do not state.

option, else what the log states, else the environment -> ActionSpec; else [-1, 1], or what the values show
(N, A) actions, a piece at a time -> `Seen` -> bounds rounded outwards

A range that is known counts, whatever the values are: the environment clips what lies beyond. Where none is known and
more than a few values leave [-1, 1], each dimension's comes from the values, and the user is warned.

Invariant: actions are clipped to a range only where the range is known, or where next to none lies beyond it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from etl.sources import ActionOptions
from schemas.episode import EpisodeError
from schemas.task import ActionSpec

Bounds = tuple[tuple[float, ...], tuple[float, ...]]
ROUNDING = np.float64(1.001)  # values up to here are still within [-1, 1]; beside float32 a Python float is rounded
FEW = 0.05  # share of values beyond [-1, 1] that noise may explain
SAMPLE = 2**16  # values a dimension that quantiles are taken of
OUTLIER = 100.0  # times the 99.9 % quantile: damage, and no part of the range


@dataclass(frozen=True)
class Seen:
    """Statistics of actions. `low`, `high`: (A,) finite values of each dimension, outliers left out; `values`: how
    many numbers; `beyond`: how many of them lie outside [-1, 1]; `whole`: all are whole numbers."""

    low: np.ndarray
    high: np.ndarray
    values: int
    beyond: int
    whole: bool

    @property
    def share(self) -> float:
        return self.beyond / max(1, self.values)

    @property
    def bounds(self) -> Bounds:
        """Each dimension's range, rounded outwards to two digits of its span, so that logs of one body agree."""
        pairs = [_outwards(float(a), float(b)) for a, b in zip(self.low, self.high)]
        return tuple(a for a, _ in pairs), tuple(b for _, b in pairs)


def seen(pieces: Iterable[np.ndarray], size: int) -> Seen | None:
    """Statistics of the actions (T, A) or (T,) of all pieces; None without a finite value in each dimension."""
    low, high = np.full(size, np.inf), np.full(size, -np.inf)
    samples: list[np.ndarray] = []
    values = beyond = sampled = 0
    whole = True
    for piece in pieces:
        flat = piece.reshape(len(piece), size).astype(np.float64)
        finite = np.isfinite(flat)
        low = np.minimum(low, np.where(finite, flat, np.inf).min(axis=0, initial=np.inf))
        high = np.maximum(high, np.where(finite, flat, -np.inf).max(axis=0, initial=-np.inf))
        kept = flat[finite]
        values, beyond = values + kept.size, beyond + int((np.abs(kept) > ROUNDING).sum())
        whole = whole and bool((kept == np.rint(kept)).all())
        if sampled < SAMPLE:
            samples.append(flat[:: max(1, len(flat) // (SAMPLE // 16))])
            sampled += len(samples[-1])
    if not values or not (low <= high).all():
        return None
    size_of = np.nanquantile(np.abs(np.concatenate(samples)), 0.999, axis=0)
    usual = np.where(np.isfinite(size_of) & (size_of > 0), OUTLIER * size_of, np.inf)
    return Seen(np.maximum(low, -usual), np.minimum(high, usual), values, beyond, whole)


def unlike(kind: str, size: int, own: ActionSpec | None, environment: str) -> tuple[str, ...]:
    """A line where logged actions, `size` values of `kind`, are of another form than their environment takes."""
    if own is None or (own.kind, own.size) == (kind, size):
        return ()
    logged, takes = (f"{n} {what} value{'s' * (n > 1)}" for n, what in ((size, kind), (own.size, own.kind)))
    return (f"an action of the log is {logged}, one of {environment} {takes}: the task cannot be played there. Log "
            "what env.step was given, or give the --environment that was logged",)  # fmt: skip


def given_bounds(options: ActionOptions, size: int) -> Bounds | None:
    """The command line's bounds. EpisodeError where they are not one for all dimensions or one each."""
    if not options.action_low:
        return None
    if len(options.action_low) not in (1, size):
        many = len(options.action_low)
        detail = f"{many} numbers in --action-low for actions of {size} values; give one for all, or {size}"
        raise EpisodeError("wrong shape", detail)
    return options.action_low, options.action_high


def action_spec(
    size: int, options: ActionOptions, declared: ActionSpec | None, pieces: Iterable[np.ndarray]
) -> tuple[ActionSpec, tuple[str, ...]]:
    """The space of real-valued actions of `size` values, and warnings. `declared`: what the log or its environment
    says, None where neither does; `pieces`: all actions, read only where they have to say it. EpisodeError where
    options do not fit, or nothing gives a range."""
    if bounds := given_bounds(options, size):
        return ActionSpec.continuous(*bounds, size), ()
    if declared is not None and options.action_bounds == "declared":
        return declared, ()
    found = seen(pieces, size)
    if found is None:
        raise EpisodeError(
            "unbounded action", "nothing says the range of its actions; give --action-low, --action-high"
        )
    if options.action_bounds == "log":
        return ActionSpec.continuous(*found.bounds, size), ()
    few = found.beyond <= FEW * found.values
    warnings = () if few and found.share < 0.001 else (warning(found, clipped=few),)
    low, high = ((-1.0,), (1.0,)) if few else found.bounds
    return ActionSpec.continuous(low, high, size), warnings


def warning(found: Seen, clipped: bool) -> str:
    """Warning about actions whose range nothing states: clipped to [-1, 1], or of the range that they show."""
    low, high = found.bounds
    flags = f"--action-low {_numbers(low)} --action-high {_numbers(high)}"
    line = f"{found.share:.1%} of its action values lie outside [-1, 1], from {found.low.min():g} to "
    line += f"{found.high.max():g}, and nothing says their range. "
    line += f"They are clipped; {flags} keeps them" if clipped else f"It is taken from them, as by {flags}"
    line += "; give the range if you know it, or --environment"
    if found.whole:
        line += ". All are whole numbers: if they are choices, record them as int64"
    return line


def _outwards(low: float, high: float) -> tuple[float, float]:
    if low == high:  # a dimension that never moves
        reach = max(1.0, abs(low))
        return low - reach, low + reach
    unit = 10.0 ** (math.floor(math.log10(high - low)) - 1)
    # a division leaves 0.30000000000000004 where 0.3 is meant
    digits = max(0, -math.floor(math.log10(unit)) + 1)
    return round(math.floor(low / unit) * unit, digits), round(math.ceil(high / unit) * unit, digits)


def _numbers(values: tuple[float, ...]) -> str:
    return f"{values[0]:g}" if len(set(values)) == 1 else " ".join(f"{value:g}" for value in values)
