"""What decides on odd logs, against plain loops and damage: ends of episodes, ranges of actions, packed files."""

import bz2
import gzip
import lzma
import math

import h5py
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from etl import sources
from etl.sources import ENDS, ActionOptions, Rejection, _packed
from etl.sources._oddities import LONGEST, OFF_BY_ONE, differing, distances, split
from etl.sources._ranges import ROUNDING, action_spec, seen
from etl.sources._series import numbered
from etl.sources._survey import Range
from etl.sources.d4rl import SOURCE, Options
from etl.sources.text import SOURCE as TEXT
from etl.sources.text import Options as TextOptions
from schemas.episode import EpisodeError
from tests.etl.test_cases import hdf5, walk


class Seen:
    """Evidence that a test makes up."""

    def __init__(self, seams=None, jumps=None):
        self.found = seams, jumps

    def seams(self):
        return self.found[0]

    def jumps(self):
        return self.found[1]


def flags(rows):
    return arrays.arrays(bool, rows)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_whatever_the_flags_episodes_cover_all_rows(data):
    rows = data.draw(st.integers(1, 60))
    terminals, timeouts, seams = (data.draw(flags(rows)) for _ in range(3))
    steps = data.draw(arrays.arrays(np.float32, rows, elements=st.floats(0, 100, width=32)))
    limit = data.draw(st.none() | st.integers(1, 70))
    timeouts = data.draw(st.sampled_from([None, timeouts, np.zeros(rows, bool)]))
    evidence = data.draw(st.sampled_from([None, Seen(), Seen(seams), Seen(None, steps), Seen(seams, steps)]))
    try:
        found = split(terminals, timeouts, limit, evidence)
    except ValueError as error:
        assert "--max-episode-steps" in str(error) and timeouts is None and limit is None
        return
    assert found == split(terminals, timeouts, limit, evidence)
    assert list(found.stops) == sorted(set(found.stops)) and found.stops[0] > 0 and found.stops[-1] == rows
    assert len(found.ends) == len(found.stops) and set(found.ends) <= set(ENDS)
    for stop, end in zip(found.stops, found.ends):
        assert end != "terminated" or terminals[stop - 1]
    inner = [row for row in np.flatnonzero(terminals) if row + 1 not in found.stops]
    assert not inner or any("the trajectory goes on" in line for line in found.warnings)
    assert all(not math.isnan(n) and "\n" not in line for line in found.warnings for n in [0.0])
    if limit and any(b - a > limit + OFF_BY_ONE for a, b in found.bounds):
        assert any("longer than the limit" in line for line in found.warnings)


def test_a_log_without_any_end_is_cut():
    found = split(np.zeros(LONGEST + 5, bool), np.zeros(LONGEST + 5, bool), None)
    assert found.stops == (LONGEST, LONGEST + 5) and found.warnings


def pieces(values, size):
    return iter([values[n : n + size] for n in range(0, len(values), size)])


@pytest.mark.parametrize("size", [1, 2, 7, 100])
def test_seams_and_steps_do_not_depend_on_the_pieces(size):
    rng = np.random.default_rng(0)
    seen_, last = walk(rng, [8, 5, 9], 4), [7, 12, 21]
    rows = len(seen_)
    after = np.concatenate([seen_[1:], seen_[:1]])
    after[last] = rng.normal(size=(3, 4))
    expected = np.isin(np.arange(rows), last)
    np.testing.assert_array_equal(differing(pieces(seen_, size), pieces(after, size), rows), expected)
    assert differing(pieces(seen_, size), pieces(after * 2 + 1, size), rows) is None  # normalised: not the rows
    steps = np.abs(np.diff(seen_, axis=0))
    wanted = np.append((steps / np.median(steps, axis=0)).mean(axis=1), 0)
    np.testing.assert_allclose(distances(lambda: pieces(seen_, size), rows), wanted, rtol=1e-4)
    assert distances(lambda: pieces(np.ones((5, 2)), size), 5) is None


def test_rounding_of_float64_is_no_seam():
    exact = np.random.default_rng(0).normal(size=(50, 3))
    after = np.concatenate([exact[1:], exact[:1]]).astype(np.float32).astype(np.float64)
    assert np.flatnonzero(differing(pieces(exact, 9), pieces(after, 9), 50)).tolist() == [49]


@settings(max_examples=100, deadline=None)
@given(
    values=arrays.arrays(
        np.float32,
        st.tuples(st.integers(1, 30), st.integers(1, 3)),
        elements=st.floats(-1000, 1000, width=32, allow_subnormal=False),
    )
)
def test_ranges_enclose_what_they_come_from(values):
    found = seen(pieces(values, 7), values.shape[1])
    for d, (low, high) in enumerate(zip(*found.bounds)):
        assert low < high and low <= found.low[d] and found.high[d] <= high
        span = float(found.high[d]) - float(found.low[d])
        assert span == 0 or high - low <= 1.21 * span + 1e-9
    assert found.values == values.size and found.beyond == (np.abs(values.astype(np.float64)) > 1.001).sum()
    space, warnings = action_spec(values.shape[1], ActionOptions(), None, pieces(values, 7))
    assert warnings or np.abs(values).max() <= 1.001
    assert max(map(abs, space.low + space.high)) == 1 or found.share > 0.05


def test_outliers_are_no_part_of_a_range():
    values = np.random.default_rng(0).uniform(0, 8, (5000, 2))
    values[1234, 0] = 1e20
    values[77, 1] = np.nan
    assert seen(pieces(values, 999), 2).high[0] < 1000
    assert seen(iter([np.full((3, 1), np.nan)]), 1) is None
    with pytest.raises(EpisodeError, match="--action-low"):
        action_spec(1, ActionOptions(), None, iter([]))
    with pytest.raises(EpisodeError, match="3 numbers in --action-low for actions of 2 values"):
        action_spec(2, ActionOptions(action_low=(0, 0, 0), action_high=(1, 1, 1)), None, iter([]))


def test_numbered_files(tmp_path):
    alone = ["hopper-medium-v2", "hopper-medium-v3", "alone_3"]
    names = ["ep_10", "ep_2", "pick01", "pick2", "a/demo_1", "a/demo_2", "b/demo_1", "b/demo_2", *alone]
    found = numbered([tmp_path / "logs" / f"{name}.hdf5" for name in names])
    short = {key: [str(path.relative_to(tmp_path / "logs"))[:-5] for path in paths] for key, paths in found.items()}
    assert short == {
        "logs": ["ep_2", "ep_10"],
        "pick": ["pick01", "pick2"],
        "a": ["a/demo_1", "a/demo_2"],
        "b": ["b/demo_1", "b/demo_2"],
    }


PACKERS = {"gz": gzip.compress, "xz": lzma.compress, "bz2": bz2.compress}


@pytest.fixture(params=["gz", "zst", "xz", "bz2"])
def packed(request, tmp_path):
    """(path of a packed file, what is in it)"""
    data = b"".join(b"line %d " % n + bytes([97 + n % 26]) * (n % 500) + b"\n" for n in range(8000))
    path = tmp_path / f"text.txt.{request.param}"
    if request.param == "zst":
        with pa.CompressedOutputStream(str(path), "zstd") as file:
            file.write(data)
    else:
        path.write_bytes(PACKERS[request.param](data))
    return path, data


def test_any_place_of_a_packed_file(packed):
    path, data = packed
    rng = np.random.default_rng(0)
    for start in (*sorted(rng.integers(0, len(data), 4)), 0, len(data) - 1, 5):
        stream = _packed.opened(path)
        stream.seek(int(start))
        assert stream.read(3000) == data[start : start + 3000]
    stream.seek(0)
    assert stream.read() == data


def test_a_damaged_packed_file_is_a_rejection(packed, tmp_path):
    """The good documents of the folder stay, and nothing else than a Rejection comes of the bad file."""
    path, _ = packed
    whole = path.read_bytes()
    (tmp_path / "good.jsonl").write_text('{"text": "fine"}\n')
    bad = path.with_name(f"bad.jsonl{path.suffix}")
    path.unlink()
    rng = np.random.default_rng(1)
    cuts = [whole[: int(n)] for n in rng.integers(1, len(whole), 5)] + [b"", b"plain"]
    for n in rng.integers(0, len(whole), 15):
        flipped = bytearray(whole)
        flipped[n] ^= 1 << int(rng.integers(8))
        cuts.append(bytes(flipped))
    for data in cuts:
        bad.write_bytes(data)
        (found,) = TEXT.scan(TEXT.resolve(tmp_path, None, tmp_path), TextOptions())
        results = list(sources.read(TEXT, found.task, found.episodes))
        assert "fine" in [one.text for one in results if not isinstance(one, Rejection)]
        assert all("\n" not in r.detail for r in (*found.rejected, *results) if isinstance(r, Rejection))
    bad.write_bytes(whole[: len(whole) // 2])
    (found,) = TEXT.scan(TEXT.resolve(tmp_path, None, tmp_path), TextOptions())
    assert [(r.file, r.reason) for r in found.rejected] == [(bad.name, "unreadable")] and len(found.episodes) == 1


def scanned(path, **options):
    (found,) = SOURCE.scan([path], Options(**options))
    return found


@pytest.mark.parametrize(
    ("changes", "reason", "word"),
    [
        ({"episode_terminals": np.zeros(9, bool)}, "wrong length", "episode_terminals"),
        ({"episode_terminals": np.array([b"x"] * 60)}, "wrong dtype", "episode_terminals"),
        ({"observations": np.zeros((60, 3, 5, 7), np.uint8)}, "wrong shape", "observations"),
        ({"observations": np.zeros((60, 40), np.uint8)}, "wrong dtype", "--picture-shape"),
        ({"observations": np.zeros((60, 40, 40, 3), np.float32)}, "wrong shape", "observations"),
    ],
)
def test_odd_arrays_are_rejected_with_their_cause(tmp_path, changes, reason, word):
    hdf5(tmp_path / "log.hdf5", [20] * 3, np.random.default_rng(0), **changes)
    (rejection,) = scanned(tmp_path / "log.hdf5").rejected
    assert (rejection.reason, rejection.position) == (reason, -1) and word in rejection.detail


@pytest.mark.parametrize("bounds", [(math.nan, 1.0), (-1.0, math.nan), (-math.inf, 1.0), (1.0, -1.0)])
def test_bounds_that_are_none_are_refused(bounds):
    with pytest.raises(ValueError, match="give as many of both, finite, each low below its high"):
        ActionOptions(action_low=bounds[:1], action_high=bounds[1:]).check()


def test_actions_of_another_form_than_the_environment_takes_are_warned_of(tmp_path):
    rng = np.random.default_rng(0)
    one_hot = np.eye(2, dtype=np.float32)[rng.integers(0, 2, 60)]
    hdf5(tmp_path / "log.hdf5", [20] * 3, rng, actions=one_hot, env_id="CartPole-v1")
    (line,) = scanned(tmp_path / "log.hdf5", max_episode_steps=20).warnings
    assert "is 2 continuous values, one of CartPole-v1 1 discrete value: the task cannot be played there" in line
    hdf5(tmp_path / "log.hdf5", [20] * 3, rng, actions=rng.integers(0, 3, 60), env_id="Pendulum-v1")
    (line,) = scanned(tmp_path / "log.hdf5", max_episode_steps=20).warnings
    assert "is 1 discrete value, one of Pendulum-v1 1 continuous value" in line
    hdf5(tmp_path / "log.hdf5", [20] * 3, rng, actions=rng.integers(0, 2, 60), env_id="CartPole-v1")
    assert not scanned(tmp_path / "log.hdf5", max_episode_steps=20).warnings


def test_files_are_found_whatever_the_case_of_their_ending(tmp_path):
    rng = np.random.default_rng(0)
    hdf5(tmp_path / "a.hdf5", [20], rng)
    hdf5(tmp_path / "B.HDF5", [20], rng)
    assert [path.name for path in SOURCE.resolve(tmp_path, None, tmp_path)] == ["B.HDF5", "a.hdf5"]


def test_next_observations_of_another_form_do_not_count(tmp_path):
    for number, after in enumerate((np.zeros((60, 2), np.float32), np.zeros((59, 5), np.float32), np.zeros(60, int))):
        path, rng = tmp_path / f"log{number}.hdf5", np.random.default_rng(0)
        hdf5(path, [20] * 3, rng, without=("timeouts",), next_observations=after, env_id="Hopper-v4")
        assert [ref.timesteps for ref in scanned(path, max_episode_steps=20).episodes] == [20] * 3


@pytest.mark.parametrize("first", [False, True])
def test_pictures_in_rows_of_d4rl(tmp_path, first):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (60, 16, 24, 3), np.uint8)
    path = tmp_path / "log.hdf5"
    hdf5(path, [20] * 3, rng, observations=pixels.transpose(0, 3, 1, 2) if first else pixels)
    found = scanned(path)
    assert found.task.observation[0].shape == (16, 24, 3)
    for n, episode in enumerate(sources.read(SOURCE, found.task, found.episodes)):
        np.testing.assert_array_equal(episode.observation["observation"], pixels[20 * n : 20 * n + 20])
    with h5py.File(path, "a") as file:
        offset = file["observations"].id.get_chunk_info(0).byte_offset
    data = bytearray(path.read_bytes())
    data[offset : offset + 30] = bytes(30)
    path.write_bytes(data)
    results = list(sources.read(SOURCE, found.task, found.episodes))
    assert any(isinstance(one, Rejection) and one.reason == "corrupt HDF5" for one in results)


def test_a_damaged_chunk_costs_its_episodes_where_seams_are_looked_for(tmp_path):
    rng, lengths = np.random.default_rng(0), [300] * 10
    whole, path = walk(rng, [301] * 10, 5), tmp_path / "log.hdf5"
    ends = np.isin(np.arange(3010) % 301, [300])
    now, after = whole[~ends], whole[1:][~ends[:-1]]
    hdf5(path, lengths, rng, without=("timeouts",), observations=now, next_observations=after, env_id="Hopper-v4")
    assert [ref.timesteps for ref in scanned(path).episodes] == lengths
    with h5py.File(path, "a") as file:
        del file["observations"]
        node = file.create_dataset("observations", data=now, chunks=(100, 5), compression="gzip")
        place = node.id.get_chunk_info(7)
        assert place.chunk_offset == (700, 0)
    data = bytearray(path.read_bytes())
    data[place.byte_offset : place.byte_offset + 40] = bytes(40)
    path.write_bytes(data)
    found = scanned(path)
    good = [one for one in sources.read(SOURCE, found.task, found.episodes) if not isinstance(one, Rejection)]
    assert {(one.row, one.timesteps) for one in good} == {(300 * n, 300) for n in range(10) if n != 2}


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_survey_of_values_is_that_of_a_plain_loop(data):
    width = data.draw(st.integers(1, 3))
    elements = st.one_of(
        st.floats(width=32),
        st.sampled_from([0.0, 1.0, -1.0, 1 + 2.0**-10, 1.0010000467300415, 1.5, 7.0, math.nan, math.inf]),
    )
    found, dimensions = Range(), [[] for _ in range(width)]
    for _ in range(data.draw(st.integers(1, 3))):
        values = data.draw(arrays.arrays(np.float32, (data.draw(st.integers(1, 5)), width), elements=elements))
        found.add(values, "action")
        for row in values.tolist():
            for own, value in zip(dimensions, row):
                own += [value] if math.isfinite(value) else []
    kept = [value for own in dimensions for value in own]
    assert found.seen.low.tolist() == [min(own, default=math.inf) for own in dimensions]
    assert found.seen.high.tolist() == [max(own, default=-math.inf) for own in dimensions]
    assert (found.seen.values, found.seen.beyond) == (len(kept), sum(abs(value) > ROUNDING for value in kept))
    assert found.seen.whole == all(value == round(value) for value in kept)
