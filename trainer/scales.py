"""Scales that standardise a body's observations: moments of each column of its timesteps.

first sequences of the stream -> values that tokens stand for -> mean and deviation of each column, by environment

Ids of discrete observations may be those of continuous values and mean none: mean and deviation 0.

Tasks of one environment have one scale, so that their levels stay comparable; tasks of different ones share places of
a timestep, not scales (docs/ablations.md), unless their domain is one body in all of its tasks, as Meta-World's arm is.

Invariant: a pure function of the stream, so a run that resumes computes the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from schemas.dataset import ObservationScale
from schemas.layout import OBSERVATION, field_columns, layout_of
from schemas.task import TaskSpec
from schemas.vocabulary import bin_values
from shards.stream import Stream

SEQUENCES = 1024
PER_TASK = 64  # sequences at least, where they are drawn evenly
CHUNK = 64
SMALLEST = 0.01  # deviation


def observation_scales(
    stream: Stream, sequences: int | None = None, shared: Sequence[str] = ()
) -> dict[str, ObservationScale]:
    """The scale of each task of a stream by name, from its first `sequences` sequences; by default SEQUENCES, or
    PER_TASK of each task. A task that has none among them is left as it is. Tasks of one layout share a scale in the
    domains `shared`."""
    sequences = sequences or max(SEQUENCES, PER_TASK * len(stream.tasks))
    values, ids = bin_values(stream.vocabulary).astype(np.float64), stream.vocabulary.observation_continuous
    specs = [timeline.dataset.manifest.tasks[timeline.task].spec for timeline in stream.timelines]
    lengths = [timeline.layout.length for timeline in stream.timelines]
    # the first task that shares environment, or domain, and layout
    bodies = [spec.domain if spec.domain in shared else spec.environment or spec.name for spec in specs]
    kinds = [(body, timeline.layout) for body, timeline in zip(bodies, stream.timelines)]
    group = np.array([kinds.index(kind) for kind in kinds])
    moments = np.zeros((3, len(specs), max(lengths)))
    for first in range(0, sequences, CHUNK):
        batch = stream.batch(first, min(CHUNK, sequences - first))
        used = (batch.roles == OBSERVATION) & (batch.tokens >= ids.start) & (batch.tokens < ids.stop)
        at = np.broadcast_to(group[batch.tasks][:, None], used.shape)[used], batch.positions[used]
        value = values[batch.tokens[used] - ids.start]
        for total, power in zip(moments, (value**0, value, value**2)):
            np.add.at(total, at, power)
    count = np.maximum(moments[0], 1)
    mean = moments[1] / count
    std = np.sqrt(np.maximum(moments[2] / count - mean**2, SMALLEST**2))
    std[moments[0] < 2], mean[moments[0] < 2] = 1.0, 0.0
    scales = {}
    for spec, row, length in zip(specs, group.tolist(), lengths):
        own = np.stack([mean[row, :length], std[row, :length]])
        own[:, discrete_columns(spec)] = 0.0
        scales[spec.name] = ObservationScale(*map(tuple, own.tolist()))
    return scales


def discrete_columns(task: TaskSpec) -> list[int]:
    """Those of a timestep that hold discrete observations."""
    stored = layout_of(task).stored_columns
    return [n for part in field_columns(task) if part.spec.kind == "discrete" for n in stored[part.tokens].tolist()]
