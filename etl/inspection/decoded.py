"""A task's shards back to values: what each stored token decodes to, its bin, its error, and how often it occurs.

shards.reader.Dataset -> TaskView -> survey: every n-th timestep of all episodes -> counts of each Dimension, verdict
                                  -> timestep: one timestep -> Tokens, text, frames

The survey takes at most 200,000 timesteps per task. Where the shards keep the raw float32 beside the tokens, every
sampled value is compared with its bin.

Invariant: all values were read from the shards and decoded as the agent decodes them. A token that is no id of its
column is counted and marked, never decoded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from etl.building.oddities import TaskOddities
from etl.inspection.canvas import canvas
from etl.inspection.dimension import SLACK, Dimension
from etl.tokenizers.text import TextTokenizer
from etl.tokenizers.timestep import TimestepTokenizer
from schemas.layout import PATCH, PATCH_SIZE, ROLE_NAMES, TEXT
from shards.reader import Dataset

SAMPLE = 200_000  # timesteps per task that the survey looks at
BLOCK = 1 << 14  # of them at a time
STRIP = 8  # consecutive frames
EPISODES = 5000  # whose instructions are read
AROUND = 120  # text tokens on either side of the chosen one


def share(count: int, of: int) -> str:
    return f"{count:,} of {of:,} ({100 * count / max(1, of):.3g} %)"


class InspectError(ValueError):
    """The request is not in the dataset, or cannot be written; the message says what would do."""


@dataclass(frozen=True)
class Token:
    """One token of the timestep, or a run of patches up to column `last`. `state`: '', 'clipped' or 'wrong'."""

    column: int
    role: str
    name: str
    id: int | None = None
    last: int | None = None
    bin: int | None = None
    decoded: str = ""
    interval: tuple[float, float] | None = None
    raw: float | None = None
    error: float | None = None
    state: str = ""


@dataclass(frozen=True)
class Timestep:
    """One timestep decoded. `pieces`: its text, or that around it, as (piece, '' | 'padding' | 'here'); `strip`:
    consecutive frames with their number and what was done there."""

    episode: int
    number: int
    about: list[tuple[str, str]]
    tokens: list[Token]
    pieces: list[tuple[str, str]]
    text: str
    strip: list[tuple[int, str, np.ndarray]]

    @property
    def picture(self) -> np.ndarray | None:
        return next((frame for number, _, frame in self.strip if number == self.number), None)

    @property
    def wrong(self) -> int:
        return sum(token.state == "wrong" for token in self.tokens)


class TaskView:
    """Everything about one task that the outputs show: made from the manifest, then `survey` and `timestep`."""

    def __init__(self, dataset: Dataset, number: int, text: TextTokenizer | None, oddities: TaskOddities | None = None):
        self.oddities = oddities
        self.dataset, self.number, self.text = dataset, number, text
        self.summary, self.layout = dataset.manifest.tasks[number], dataset.layouts[number]
        self.task, self.vocabulary = self.summary.spec, dataset.manifest.vocabulary
        self.tokenizer = TimestepTokenizer(self.task, self.vocabulary, text)
        rows = np.flatnonzero(dataset.column("task") == number)
        self.rows = rows[np.lexsort((dataset.column("start")[rows], dataset.column("episode")[rows]))]
        self.dimensions = self._dimensions()
        ids = [(self.vocabulary.text.start, text.pieces if text else 0)] * self.layout.text
        ids += [(d.start, len(d.counts)) for d in self.dimensions]
        self.lowest, self.sizes = np.array(ids, np.int64).reshape(-1, 2).T  # of each stored column's ids
        self.pieces = np.zeros(text.pieces if text else 0, np.int64)  # how often each text piece was seen
        self.sampled = self.outside = 0  # timesteps the survey saw; their tokens that are not their column's ids

    def _dimensions(self) -> list[Dimension]:
        found: list[Dimension] = []
        for at in self.tokenizer.columns:
            spec = at.spec
            if spec.kind in ("text", "image"):
                continue
            ids, discrete = self.vocabulary.range("observation", spec.kind), spec.kind == "discrete"
            sizes, starts = (np.broadcast_to(n, spec.size) for n in (spec.choices or ids.size, spec.start or 0))
            for n, index in enumerate(np.ndindex(*spec.shape)):
                name = spec.key if spec.shape in ((), (1,)) else f"{spec.key}[{', '.join(map(str, index))}]"
                raw = None if discrete else at.raw.start + n
                about = (spec.kind, at.tokens.start + n, ids.start, np.zeros(sizes[n], int), raw)
                found.append(Dimension(name, "observation", *about, first=int(starts[n])))
        if action := self.task.action:
            first, discrete = self.layout.text + len(found), action.kind == "discrete"
            for n, ids in enumerate(self.tokenizer.action_ids):
                name = "action" if action.size == 1 else f"action[{n}]"
                about = (action.kind, first + n, ids.start, np.zeros(ids.size, int), None if discrete else n)
                more = {"first": action.start[n]} if discrete else {"low": action.low[n], "high": action.high[n]}
                found.append(Dimension(name, "action", *about, **more))
        return found

    @cached_property
    def returns(self) -> np.ndarray:
        """Raw returns of complete episodes."""
        column, rows = self.dataset.column, self.rows
        complete = (column("start")[rows] == 0) & (column("terminated")[rows] | column("truncated")[rows])
        return column("episode_return")[rows[complete]] if self.task.action else np.empty(0)

    @cached_property
    def instructions(self) -> Counter[str]:
        """How many episodes begin with which text, over at most EPISODES of them; empty where a task is documents."""
        found: Counter[str] = Counter()
        if self.text is None or not self.layout.text or self.task.action is None:
            return found
        first = self.rows[self.dataset.column("start")[self.rows] == 0]
        for row in first[:: -(-len(first) // EPISODES)]:
            stored = self._legal(self.dataset.tokens(row)[0])[None, : self.layout.text + self.layout.observation]
            values = self.tokenizer.decode_observation(stored)
            lines = [str(values[spec.key][0]) for spec in self.tokenizer.fields if spec.kind == "text"]
            found[" / ".join(lines)] += 1
        return found

    def survey(self) -> None:
        """Count bins, and compare raw values, over every n-th timestep of all episodes."""
        every = -(-self.summary.timesteps // SAMPLE)
        parts: list[list[np.ndarray]] = []
        seen = held = 0
        for row in self.rows:
            members = (self.dataset.tokens(row), self.dataset.observation(row), self.dataset.action(row))
            took = slice(-seen % every, None, every)
            parts.append([np.empty((0, 0)) if one is None else one[took] for one in members])
            seen, held = seen + len(members[0]), held + len(parts[-1][0])
            if held >= BLOCK or row == self.rows[-1]:
                self._count(*(np.concatenate(arrays) for arrays in zip(*parts)))
                parts, held = [], 0

    def _count(self, tokens: np.ndarray, observation: np.ndarray, action: np.ndarray) -> None:
        ordinals = tokens.astype(np.int64) - self.lowest
        inside = (ordinals >= 0) & (ordinals < self.sizes)
        self.sampled += len(tokens)
        self.outside += int(np.count_nonzero(~inside))
        text = slice(0, self.layout.text)
        self.pieces += np.bincount(ordinals[:, text][inside[:, text]], minlength=len(self.pieces))
        for d in self.dimensions:
            rows = inside[:, d.column]
            bins = ordinals[rows, d.column]
            d.counts += np.bincount(bins, minlength=len(d.counts))
            if d.raw is not None:
                raw = (observation if d.role == "observation" else action)[rows, d.raw]
                error, clipped = d.compare(bins, raw, self.vocabulary)
                d.clipped += int(np.count_nonzero(clipped))
                d.wrong += int(np.count_nonzero(np.abs(error) > 1 + SLACK))
                d.worst = max(d.worst, float(np.abs(error[~clipped]).max(initial=0.0)))

    @property
    def verdict(self) -> tuple[bool, str]:
        """True if the sampled tokens say what they should, and the finding in one sentence."""
        held = [d for d in self.dimensions if d.raw is not None]
        values, clipped = sum(d.total for d in held), sum(d.clipped for d in held)
        wrong = sum(d.wrong for d in held)
        if self.outside:
            return False, f"{self.outside:,} tokens of {self.sampled:,} timesteps lie outside the ids of their column"
        if wrong:
            return False, f"{wrong:,} of {values:,} values do not lie in the bin that their token names"
        if not held:
            return True, f"all tokens of {self.sampled:,} timesteps are ids of their column"
        worst = f"largest error {max(d.worst for d in held):.3f} half-bins; {share(clipped, values)} clipped"
        return True, f"all {values:,} values of {self.sampled:,} timesteps lie in the bin their token names ({worst})"

    def timestep(self, episode: int | None, number: int | None) -> Timestep:
        """One timestep decoded. InspectError says which ones there are."""
        data, column = self.dataset, self.dataset.column
        rows, t = self._find(episode, number)
        row, T = rows[0], int(column("episode_timesteps")[rows[0]])
        tokens = self._read(rows, data.tokens, t, t + 1)[0]
        about = [
            ("source", f"{column('file')[row]}, number {column('position')[row]}, from row {column('row')[row]}"),
            ("split", "held out" if column("held_out")[row] else "training"),
        ]
        if self.task.action:
            ending = next((e for e in ("terminated", "truncated") if column(e)[row]), "cut by the log's end")
            about.append(("episode", f"{T:,} timesteps, return {column('episode_return')[row]:.6g}, {ending}"))
            about.append(("reward", f"{self._read(rows, data.reward, t, t + 1)[0]:.6g}"))
            about.append(("action", self._action(tokens)))
            pieces, text = self._text(tokens[: self.layout.text], None)
        else:
            around = self._read(rows, data.tokens, max(0, t - AROUND), t + AROUND + 1)
            pieces, text = self._text(around[:, 0], min(t, AROUND))
        kept = {"observation": data.observation, "action": data.action}
        raws = {role: self._read(rows, get, t, t + 1)[0] for role, get in kept.items() if get(row) is not None}
        strip = self._strip(rows, max(0, min(t - STRIP // 2 + 1, T - STRIP))) if self.layout.patches else []
        episode = int(column("episode")[row])
        return Timestep(episode, t, about, self._tokens(tokens, raws), pieces, text, strip)

    def _find(self, episode: int | None, number: int | None) -> tuple[np.ndarray, int]:
        """Rows of the episode's pieces, and the timestep in it."""
        column, name = self.dataset.column, self.task.name
        known = np.unique(column("episode")[self.rows])
        chosen = int(known[0]) if episode is None else episode
        if chosen not in known:
            gone = "; that one was rejected" if known[0] < chosen < known[-1] else ""
            raise InspectError(f"--episode {chosen}: task '{name}' has episodes {known[0]} to {known[-1]}{gone}")
        rows = self.rows[column("episode")[self.rows] == chosen]
        T = int(column("episode_timesteps")[rows[0]])
        t = T // 2 if number is None else number
        if not 0 <= t < T:
            raise InspectError(f"--timestep {t}: episode {chosen} of task '{name}' has timesteps 0 to {T - 1}")
        return rows, t

    def _read(self, rows: np.ndarray, member: Callable, first: int, stop: int) -> np.ndarray:
        """Timesteps [first, stop) of an episode, as far as it goes, over its pieces."""
        starts, lengths = (self.dataset.column(name)[rows] for name in ("start", "timesteps"))
        touched = np.flatnonzero((starts < stop) & (first < starts + lengths))
        return np.concatenate([member(rows[n])[max(0, first - starts[n]) : stop - starts[n]] for n in touched])

    def _strip(self, rows: np.ndarray, first: int) -> list[tuple[int, str, np.ndarray]]:
        data = self.dataset
        tokens, patches = (self._read(rows, member, first, first + STRIP) for member in (data.tokens, data.patches))
        frames = canvas(self.layout, patches)
        if self.task.action:
            rewards = self._read(rows, data.reward, first, first + STRIP)
            done = [f"action {self._action(own)}, reward {reward:.3g}" for own, reward in zip(tokens, rewards)]
        else:
            done = [self._text(own[: self.layout.text], None)[1] for own in tokens]
        return list(zip(range(first, first + STRIP), done, frames))

    def _legal(self, stored: np.ndarray) -> np.ndarray:
        """Stored tokens moved into their columns' ids, so that those which are none can be shown, not decoded."""
        return np.clip(stored, self.lowest, self.lowest + self.sizes - 1)

    def _action(self, stored: np.ndarray) -> str:
        own, legal = (tokens[-self.layout.action :] for tokens in (stored, self._legal(stored)))
        if not np.array_equal(own, legal):
            return "none: its tokens are no ids of actions"
        values = np.ravel(self.tokenizer.decode_action(legal))
        return ", ".join(f"{v:.4g}" for v in values[:8]) + (", …" if len(values) > 8 else "")

    def _text(self, ids: np.ndarray, here: int | None) -> tuple[list[tuple[str, str]], str]:
        if self.text is None or not self.layout.text:
            return [], ""
        legal = np.clip(ids, self.lowest[0], self.lowest[0] + self.sizes[0] - 1)
        ids = np.where(ids == legal, ids, self.text.padding)  # which decodes to nothing
        padding = self.text.padding if self.task.action else -1
        states = ["padding" if i == padding else "here" if n == here else "" for n, i in enumerate(ids)]
        return [(self.piece(int(i)), state) for i, state in zip(ids, states)], self.text.decode(ids)

    def piece(self, id: int) -> str:
        """The text piece of a token."""
        assert self.text is not None
        return self.text.processor.id_to_piece(id - self.vocabulary.text.start)

    def _tokens(self, stored: np.ndarray, raws: dict[str, np.ndarray]) -> list[Token]:
        roles, legal, found = self.layout.roles, self._legal(stored), []
        observation = self.tokenizer.decode_observation(legal[None, : self.layout.text + self.layout.observation])
        decoded = [np.ravel(observation[f.key]) for f in self.tokenizer.fields if f.kind in ("continuous", "discrete")]
        if self.task.action:
            decoded.append(np.ravel(self.tokenizer.decode_action(legal[-self.layout.action :])))
        values = [v for array in decoded for v in array]  # integers stay integers
        place = dict(zip(self.layout.stored_columns.tolist(), range(self.layout.stored)))
        texts = [f.key for f in self.tokenizer.fields if f.kind == "text" for _ in range(f.shape[0])]
        for column in range(self.layout.length):
            role = ROLE_NAMES[roles[column]]
            if roles[column] == PATCH:
                if column == self.layout.patch_slots[0]:
                    size = f"{PATCH_SIZE}x{PATCH_SIZE}x{self.layout.channels} pixels each"
                    found.append(Token(column, role, size, last=int(self.layout.patch_slots[-1])))
            elif column not in place:
                found.append(Token(column, role, "", self.vocabulary.separator))
            elif roles[column] == TEXT:
                key, own, good = texts[place[column]], int(stored[place[column]]), int(legal[place[column]])
                state = "" if own == good else "wrong"
                found.append(Token(column, role, key, own, decoded="" if state else self.piece(own), state=state))
            else:
                n = place[column] - self.layout.text
                found.append(self._value(self.dimensions[n], column, int(stored[place[column]]), values[n], raws))
        return found

    def _value(self, d: Dimension, column: int, id: int, decoded: float, raws: dict[str, np.ndarray]) -> Token:
        bin = id - d.start
        if not 0 <= bin < len(d.counts):
            return Token(column, d.role, d.name, id, state="wrong")
        if d.raw is None:
            return Token(column, d.role, d.name, id, bin=bin, decoded=str(decoded))
        raw = raws[d.role][d.raw]
        error, clipped = (array[0] for array in d.compare(np.array([bin]), np.array([raw]), self.vocabulary))
        low, high = d.value(np.array([bin, bin + 1]) * (2.0 / self.vocabulary.bins) - 1.0, self.vocabulary)
        state = "wrong" if abs(error) > 1 + SLACK else "clipped" if clipped else ""
        numbers = {"interval": (float(low), float(high)), "raw": float(raw), "error": float(error), "state": state}
        return Token(column, d.role, d.name, id, bin=bin, decoded=f"{decoded:.6g}", **numbers)  # type: ignore[arg-type]
