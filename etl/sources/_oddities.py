"""Ends of the episodes in a log of rows, and its oddities.

terminals, timeouts (N,), time limit, `Evidence` of the observations -> `split` -> Split: stops, ends, warnings

Flags do not always mean what their names say. Exports leave timeouts out, or never set them; antmaze sets terminals
near the goal while the trajectory goes on; replay buffers set a timeout where a training iteration ends. So where flags
are missing, or do not fit the limit or each other, the observations are asked: is row i + 1 what row i led to?

Invariant: episodes are disjoint, in order, and cover all rows; a pure function of the arguments. Observations are read
only where the flags leave a doubt.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np

LONGEST = 2**16  # timesteps an episode: a log without any end is cut here, so that memory stays bounded
OFF_BY_ONE = 1  # exports leave out a trajectory's last row
CLUSTERS = 0.05  # share of terminals in the row after another one that real ends do not have
ALIKE = 0.5  # share of seams above which next_observations are something else, such as normalised
JUMP = 5.0  # times the usual step, at least
TOLERANCE = 1e-4
SAMPLE = 2**16  # steps that medians are taken of


class Evidence(Protocol):
    """Evidence of a log's observations on its rows, read on demand."""

    def seams(self) -> np.ndarray | None:
        """(N,) bool: row i + 1 is not what row i led to, by next_observations. None where there are none."""
        ...

    def jumps(self) -> np.ndarray | None:
        """(N,) float: distance of row i + 1 from row i in usual steps; see `distances`. None where it says nothing."""
        ...


class NoEvidence:
    """Of a log whose observations are not asked."""

    def seams(self) -> np.ndarray | None:
        return None

    def jumps(self) -> np.ndarray | None:
        return None


@dataclass(frozen=True)
class Split:
    """Episodes of N rows. `stops`: the row after each one's last, the final one is N; `ends`: one of `sources.ENDS`
    each; `warnings`: what may be wrong with them; `notes`: what else to say."""

    stops: tuple[int, ...]
    ends: tuple[str, ...]
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def bounds(self) -> list[tuple[int, int]]:
        """[start, stop) of each episode."""
        return list(pairwise([0, *self.stops]))


def split(
    terminals: np.ndarray,
    timeouts: np.ndarray | None,
    limit: int | None,
    evidence: Evidence | None = None,
    key: str = "timeouts",
) -> Split:
    """Episodes by the flags (N,) bool. `limit`: the environment's time limit in timesteps, where it is known; `key`:
    what the log calls its timeouts. ValueError where nothing can end an episode: no timeouts, no limit, no seams."""
    evidence = evidence or NoEvidence()
    warnings: list[str] = []
    notes: list[str] = []
    terminals = _without_inner(terminals, timeouts, evidence, warnings)
    bare = timeouts is None or not timeouts.any()
    given = np.zeros(len(terminals), bool) if timeouts is None else timeouts
    lengths = _lengths(terminals | given)
    too_long = limit is not None and max(lengths) > limit + OFF_BY_ONE
    open_end = not terminals.any() or (len(lengths) > 1 and not terminals[-1])
    seams = evidence.seams() if timeouts is None or too_long or (bare and open_end) else None
    if bare and seams is None:
        return _by_count(terminals, timeouts, limit, evidence, key, tuple(warnings))
    timed = given & ~terminals
    if seams is not None:
        if found := int((seams & ~terminals & ~given)[:-1].sum()):
            why = f"no '{key}'" if timeouts is None else f"'{key}' set nowhere" if bare else f"more than {limit} rows"
            notes.append(f"{why}: {found} episodes end where next_observations differ from the next row")
        timed = (given | seams) & ~terminals
    stops = _stops(terminals | timed, LONGEST)
    if seams is not None:  # nothing follows the last row
        reached = limit is not None and _between(stops)[-1] >= limit - OFF_BY_ONE
        timed[-1] = not terminals[-1] and (reached or bool(given[-1]))
    if limit is not None and (long := [n for n in _between(stops) if n > limit + OFF_BY_ONE]):
        warnings.append(f"{len(long)} of {len(stops)} episodes are longer than the limit of {limit:,} (up to "
                        f"{max(long):,} rows): ends are missing, or the limit is another; give "
                        f"--max-episode-steps {max(long)}, or record them again with '{key}'")  # fmt: skip
    by = "a seam of next_observations" if bare else f"'{key}'"
    return _ended(stops, terminals, timed, limit, by, tuple(warnings), tuple(notes))


def _without_inner(
    terminals: np.ndarray, timeouts: np.ndarray | None, evidence: Evidence, warnings: list[str]
) -> np.ndarray:
    """Terminals but those inside a trajectory. They come in clusters; whether the trajectory goes on there, the
    distances of the observations say, where timeouts show what an end looks like."""
    clustered = int((terminals[1:] & terminals[:-1]).sum())
    count = int(terminals.sum())
    if clustered < max(2, CLUSTERS * count):
        return terminals
    problem = f"{clustered} of {count} rows with 'terminals' set follow another such row"
    jumps = evidence.jumps()
    ends = timeouts & ~terminals if timeouts is not None else np.zeros(len(terminals), bool)
    ends[-1] = False
    if jumps is not None and ends.any():
        inside = ~(terminals | ends)
        inside[-1] = False
        usual = max(JUMP, float(np.quantile(jumps[inside], 0.999))) if inside.any() else JUMP
        goes_on = terminals & (jumps <= usual)
        goes_on[-1] = False
        if np.median(jumps[ends]) > usual:  # an end shows
            if goes_on.any():
                warnings.append(f"{problem}; at {int(goes_on.sum())} of them the trajectory goes on (the next "
                                "observation is one step away): those end no episode. If they should, cut the log "
                                "there")  # fmt: skip
            return terminals & ~goes_on
    warnings.append(f"{problem}: episodes of one row, if the trajectory goes on there; clear 'terminals' in all rows "
                    "but the last one of each trajectory")  # fmt: skip
    return terminals


def _by_count(
    terminals: np.ndarray,
    timeouts: np.ndarray | None,
    limit: int | None,
    evidence: Evidence,
    key: str,
    warnings: tuple[str, ...],
) -> Split:
    """Without timeouts and without next_observations: a trajectory ends at a terminal or after `limit` rows."""
    if limit is None and timeouts is None:
        raise ValueError(f"no '{key}', no next_observations, and no known time limit; give --max-episode-steps")
    stops = _stops(terminals, limit or LONGEST)
    counted = np.zeros(len(terminals), bool)
    counted[[stop - 1 for stop in stops[:-1]]] = True
    counted &= ~terminals
    missing = f"no '{key}'" if timeouts is None else f"'{key}' set in none of {len(terminals):,} rows"
    if counted.any():
        line = f"{missing}: {int(counted.sum())} of {len(stops)} episodes end by counting {limit or LONGEST:,} rows"
        jumps = evidence.jumps()
        if jumps is not None and (other := _jumps_elsewhere(jumps, terminals, counted)):
            line += f", but the observations jump elsewhere ({other}): those are the likelier ends"
        warnings += (f"{line}; record the log again with '{key}' or next_observations",)
    elif not terminals[:-1].any() and len(terminals) > 1000 and timeouts is not None and limit is None:
        line = f"neither 'terminals' nor '{key}' end an episode in its {len(terminals):,} rows: they are read as one"
        warnings += (f"{line}; give --max-episode-steps, or record the log again with '{key}'",)
    timed = counted.copy()
    timed[-1] = not terminals[-1] and limit is not None and stops[-1] - ([0, *stops][-2]) == limit
    return _ended(stops, terminals, timed, limit, "count", warnings, ())


def _jumps_elsewhere(jumps: np.ndarray, terminals: np.ndarray, counted: np.ndarray) -> str:
    """Rows that look more like ends than the counted ones do, in words; '' where there are none."""
    quiet = ~(terminals | counted)
    quiet[-1] = False
    rows = np.flatnonzero(quiet & (jumps > 4 * JUMP))
    if not len(rows) or len(rows) > ALIKE * len(jumps) or np.median(jumps[counted]) > 4 * JUMP:
        return ""
    more = f" and {len(rows) - 3} more" if len(rows) > 3 else ""
    return f"after row {', '.join(str(int(row)) for row in rows[:3])}{more}"


def _ended(
    stops: list[int],
    terminals: np.ndarray,
    timed: np.ndarray,
    limit: int | None,
    by: str,
    warnings: tuple[str, ...],
    notes: tuple[str, ...],
) -> Split:
    """How each episode ended. A timeout before the limit is no limit: it marks where a training iteration or a
    recording ended, unless no episode shows another end. `by`: what ended those that time out, in words."""
    lengths, last = _between(stops), [stop - 1 for stop in stops]
    ends = ["terminated" if terminals[row] else "truncated" if timed[row] else "cut" for row in last]
    out = [n for n, end in zip(lengths, ends) if end == "truncated"]
    short = [n for n in out if limit is not None and n < limit - OFF_BY_ONE]
    least, words = 0, ""  # episodes that time out after fewer rows are cut
    common, count = Counter(out).most_common(1)[0] if out else (0, 0)
    own = common == max(out, default=0) and count > len(out) / 2  # most end after the same number of rows
    if limit is None and own and count < len(out):
        least, short = common, [n for n in out if n < common]
        words = f"before the others, which end after {common:,}"
    elif short and len(short) == len(out) and own:
        least, words = common, f"before the limit of {limit:,}: {common:,} is taken for the log's own"
    elif short and limit is not None:
        least = limit - OFF_BY_ONE if len(short) < len(out) or "terminated" in ends else 0
        words = f"before the limit of {limit:,}" + ("" if least else ", and none at it: they count as whole")
    if words:
        cut = sum(n < least for n in out)
        span = f"{min(short):,}" if min(short) == max(short) else f"{min(short):,} to {max(short):,}"
        line = f"{len(short)} of {len(stops)} episodes end by {by} after {span} rows, {words}"
        line += f". {cut} count as cut by the log, and have no return" if cut else ""
        warnings += (f"{line}; give --max-episode-steps if the limit is another",)
        ends = ["cut" if end == "truncated" and n < least else end for end, n in zip(ends, lengths)]
    return Split(tuple(stops), tuple(ends), warnings, notes)


def _stops(ends: np.ndarray, limit: int) -> list[int]:
    """Row after each episode's last one, by rows that end one and by counting `limit` rows."""
    stops = [int(row) + 1 for row in np.flatnonzero(ends)]
    if not stops or stops[-1] < len(ends):
        stops.append(len(ends))
    return [row for start, stop in pairwise([0, *stops]) for row in [*range(start + limit, stop, limit), stop]]


def _lengths(ends: np.ndarray) -> list[int]:
    return _between(_stops(ends, len(ends) + 1))


def _between(stops: list[int]) -> list[int]:
    return [b - a for a, b in pairwise([0, *stops])]


def differing(observations: Iterator[np.ndarray], following: Iterator[np.ndarray], rows: int) -> np.ndarray | None:
    """`Evidence.seams` of observations and next_observations, given in pieces (n, D) of equal rows. None where so many
    differ that next_observations are something else."""
    seams = np.ones(rows, bool)
    row, last = 0, None
    for now, after in zip(observations, following):
        if last is not None and len(now):
            seams[row - 1] = _differ(last, now[:1])[0]
        seams[row : row + len(now) - 1] = _differ(after[:-1], now[1:])
        row, last = row + len(now), after[-1:]
    return None if rows > 1 and seams[:-1].mean() > ALIKE else seams


def distances(observations: Callable[[], Iterator[np.ndarray]], rows: int) -> np.ndarray | None:
    """`Evidence.jumps` of observations, which each call gives in pieces (n, D): per row, the mean step of its
    dimensions to the next row, in medians of each dimension's own steps; the last row's is 0. None where nothing
    moves, or rows are missing."""
    kept: list[np.ndarray] = []
    for step in _steps(observations()):
        kept.append(step[:: max(1, len(step) * (rows // SAMPLE + 1) // SAMPLE)])
    if not kept or not sum(map(len, kept)):
        return None
    usual = np.median(np.concatenate(kept), axis=0)
    moving = usual > 0
    if not moving.any():
        return None
    found = [np.mean(step[:, moving] / usual[moving], axis=1) for step in _steps(observations())]
    flat = np.concatenate([*found, np.zeros(1, np.float32)])
    return flat if len(flat) == rows else None


def _steps(observations: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """Absolute differences (n, D) float32 of successive rows, piece by piece."""
    last: np.ndarray | None = None
    for piece in observations:
        flat = piece.reshape(len(piece), -1).astype(np.float32)
        joined = flat if last is None else np.concatenate([last, flat])
        yield np.nan_to_num(np.abs(np.diff(joined, axis=0)), posinf=0.0)
        last = flat[-1:]


def _differ(expected: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Rows (n,) that differ; NaN, of a damaged row too, says nothing."""
    near = np.isclose(expected, found, rtol=TOLERANCE, atol=TOLERANCE * TOLERANCE)
    near |= np.isnan(expected) | np.isnan(found)
    return ~near.all(axis=tuple(range(1, near.ndim)))
