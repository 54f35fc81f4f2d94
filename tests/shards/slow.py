"""The slow reference of a training sequence: one timestep and one token at a time."""

from __future__ import annotations

import numpy as np
import pytest

from schemas.layout import ACTION, PATCH, SEPARATOR, TEXT, TimestepLayout
from shards.batch import Batch
from shards.sampler import fold_in, random, random_bits, uniform_below
from shards.stream import Stream
from shards.tables import DRAWS


def slow_sequence(stream: Stream, i: int) -> dict[str, list]:
    """Sequence i, one timestep and one token at a time, from the sampler's place and the prompt's draws."""
    place = stream.sampler.places(np.array([i]))
    task, epoch, window = (int(a[0]) for a in (place.task, place.epoch, place.window))
    timeline, config = stream.timelines[task], stream.config
    dataset, layout, W = timeline.dataset, timeline.layout, timeline.width
    episode_of, rows = dataset.column("episode"), dataset.rows(timeline.task, stream.held_out)
    steps = [(int(row), t) for row in rows for t in range(dataset.column("timesteps")[row])]
    phase = int(uniform_below(random_bits(stream.seed, "phase", epoch, task), len(steps))[0])
    first = phase + window * W
    body = [(*steps[(first + n) % len(steps)], (first + n) // len(steps)) for n in range(W)]
    asked, end, size, choice, start = (random_bits(stream.seed, "prompt", i, n) for n in range(5))
    prompted = int(asked[0]) / 2**64 < config.prompt_probability and layout.action and W > 1
    if prompted and int(start[0]) / 2**64 < config.prompt_start_share:
        first = min(n for n, step in enumerate(steps) if episode_of[step[0]] == episode_of[body[0][0]])
        body = [(*steps[(first + n) % len(steps)], (first + n) // len(steps)) for n in range(W)]
    prompt = []
    others = [e for e in dict.fromkeys(episode_of[rows].tolist()) if e != episode_of[body[0][0]]]
    if prompted and others:
        length = 1 + int(uniform_below(size, min(max(1, int(W * config.prompt_max_share)), W - 1))[0])
        chosen = others[int(uniform_below(choice, len(others))[0])]
        if config.working_set is not None:
            near = phase + int(stream.sampler.neighbour_windows(place, fold_in(choice, 1))[0]) * W
            order = list(dict.fromkeys(episode_of[rows].tolist()))
            chosen = episode_of[steps[near % len(steps)][0]]
            if chosen == episode_of[body[0][0]]:
                chosen = order[(order.index(chosen) + 1) % len(order)]
        episode = [step for step in steps if episode_of[step[0]] == chosen]
        length = min(length, len(episode))
        start = int(uniform_below(fold_in(choice, 0), len(episode) - length + 1)[0])
        prompt = episode[-length:] if int(end[0]) / 2**64 < config.prompt_end_share else episode[start : start + length]
    out: dict[str, list] = {name: [] for name in ("tokens", "roles", "positions", "segments", "supervised")}
    out |= {"patches": [], "patch_index": [], "patch_positions": [], "returns": []}
    scale = stream.return_scales.get(timeline.name)
    rng = random(stream.seed, "patch").random((DRAWS, layout.patches, 2), np.float32)
    draw = int(uniform_below(random_bits(stream.seed, "patch", i), DRAWS)[0])
    segment, previous = 0, None
    for n, (row, t, *lap) in enumerate([*prompt, *body[: W - len(prompt)]]):
        here = (episode_of[row], lap)
        if n > len(prompt) and here != previous:
            segment += 1
        previous = here
        episode_return = float(dataset.column("episode_return")[row])
        out["returns"][segment:] = [(episode_return - scale.mean) / scale.std if scale else 0.0]
        stored = iter(dataset.tokens(row)[t].tolist())
        patches = iter(slow_patches(layout, dataset.patches(row)[t]) if layout.patches else [])
        for column, role in enumerate(layout.roles.tolist()):
            p = len(out["tokens"])
            if p == config.sequence_length:
                return out
            if role == PATCH:
                patch = len(out["patches"]) % layout.patches
                low, high = layout.patch_intervals[patch].T
                drawn = rng[(draw + n) % DRAWS, patch]
                out["patch_positions"].append(
                    [int(min(np.float32(a) + u * np.float32(b - a), b - 1)) for a, b, u in zip(low, high, drawn)]
                )
                out["patches"].append(next(patches))
                out["patch_index"].append(p)
            out["tokens"].append({PATCH: 0, SEPARATOR: 34048}.get(role) if role in (PATCH, SEPARATOR) else next(stored))
            target = role in (ACTION, TEXT) and p > 0 and out["segments"][p - 1] == segment
            if role == TEXT and layout.action and out["tokens"][p] == timeline.padding:
                target = False
            out["supervised"].append(target and (config.prompt_loss or n >= len(prompt)))
            out["roles"].append(role)
            out["positions"].append(column)
            out["segments"].append(segment)
    return out


def slow_patches(layout: TimestepLayout, stored: np.ndarray) -> list[np.ndarray]:
    """One timestep's pixels as they are stored to its patches (16, 16, 1 or 3), one after the other."""
    rest, found = stored.reshape(-1), []
    for picture in layout.pictures:
        for _ in range(picture.rows * picture.columns):
            size = 16 * 16 * picture.channels
            found.append(rest[:size].reshape(16, 16, picture.channels))
            rest = rest[size:]
    assert not len(rest)
    return found


def check_batch(stream: Stream, batch: Batch) -> None:
    """Every sequence of a batch equals the slow one."""
    L, patches = batch.tokens.shape[1], 0
    for n, i in enumerate(batch.sequence.tolist()):
        slow = slow_sequence(stream, i)
        for name in ("tokens", "roles", "positions", "segments", "supervised"):
            assert getattr(batch, name)[n].tolist() == slow[name], (i, name)
        assert batch.returns[n][: len(slow["returns"])] == pytest.approx(slow["returns"], abs=1e-5)
        index = batch.patch_index[patches : patches + len(slow["patch_index"])] - n * L
        assert index.tolist() == slow["patch_index"]
        positions = batch.patch_positions[patches : patches + len(index)]
        assert positions.tolist() == slow["patch_positions"]
        for pixels, wanted in zip(batch.patches[patches:], slow["patches"]):
            assert (pixels == wanted).all()  # grey beside colours is repeated
        patches += len(index)
    assert patches == len(batch.patches)
