"""Every space that a task may have, from raw episodes to batches: bounds and choices per dimension, several pictures of
any size and channels, frame stacks, nested keys."""

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from etl.inspect import Options, inspect
from etl.inspection.decoded import TaskView
from etl.tokenizers import continuous
from etl.tokenizers.timestep import TimestepTokenizer
from schemas.episode import EpisodeError
from schemas.layout import continuous_values, layout_of, ordered_fields
from schemas.task import ActionSpec, FieldSpec, TaskSpec
from schemas.vocabulary import DISJOINT
from shards.reader import Dataset
from shards.stream import Stream, StreamConfig
from shards.verify import verify
from shards.views import trajectories
from tests.etl.memory import build, episode_of, values_of
from tests.shards.slow import check_batch, slow_patches

KEYS = ("a", "a/b", "a-b", "a0", "b/c/d", "z")
CAMERAS = (
    FieldSpec("wrist", "image", (30, 50, 1)),
    FieldSpec("front", "image", (48, 64, 3)),
    FieldSpec("depth", "image", (33, 40, 4), resized=(48, 32)),
    FieldSpec("stacked", "image", (20, 20, 4), stack=4, resized=(32, 32), fit="pad"),
    FieldSpec("joints", "continuous", (2,)),
)
ROBOT = TaskSpec("robot", "memory", CAMERAS, ActionSpec.continuous((-2, 0), (2, 0.5)))


def numbers(draw, count, low, high):
    """One number for each of `count` elements, or one for all."""
    length = draw(st.sampled_from([1, max(1, count)]))
    return tuple(draw(st.lists(st.integers(low, high), min_size=length, max_size=length)))


@st.composite
def fields(draw, key):
    kind = draw(st.sampled_from(["continuous", "discrete", "image"]))
    if kind == "image":
        stack, channels = draw(st.integers(1, 3)), draw(st.integers(1, 5))
        shape = (draw(st.integers(1, 40)), draw(st.integers(1, 40)), stack * channels)
        fit = draw(st.sampled_from(["resize", "pad"]))
        resized = (48, 64) if fit == "pad" else draw(st.sampled_from([None, (16, 32), (48, 16)]))
        return FieldSpec(key, "image", shape, resized=resized, fit=fit, stack=stack)
    shape = draw(st.sampled_from([(), (2,), (2, 3)]))
    if kind == "continuous":
        return FieldSpec(key, kind, shape)
    size = int(np.prod(shape))
    return FieldSpec(key, kind, shape, numbers(draw, size, 1, 9), numbers(draw, size, -5, 5))


@st.composite
def tasks(draw, name="random"):
    keys = draw(st.lists(st.sampled_from(KEYS), min_size=1, max_size=4, unique=True))
    size = draw(st.integers(1, 3))
    if draw(st.booleans()):
        each = st.lists(st.integers(-5, 5), min_size=size, max_size=size)
        action = ActionSpec.discrete([abs(n) + 1 for n in draw(each)], draw(each))
    else:
        low = [draw(st.floats(-100, 100)) for _ in range(size)]
        action = ActionSpec.continuous(low, [a + draw(st.floats(0.01, 100)) for a in low])
    return TaskSpec(name, "memory", tuple(draw(fields(key)) for key in keys), action)


def slow_pictures(spec, frame):
    """One timestep's (H, W, C) to patches (16, 16, 1 or 3), pixel by pixel where nothing is filtered."""
    channels = spec.shape[2] // spec.stack
    newest, found = frame[:, :, (spec.stack - 1) * channels :], []
    while newest.shape[2]:
        count = 3 if newest.shape[2] >= 3 else 1
        picture, newest = newest[:, :, :count], newest[:, :, count:]
        height, width = spec.resized or tuple((side + 15) // 16 * 16 for side in spec.shape[:2])
        if spec.fit == "pad" or not spec.resized:
            large = np.zeros((height, width, count), np.uint8)
            large[: picture.shape[0], : picture.shape[1]] = picture
        else:
            large = None  # filtered: compared by its size and roughly
        for y in range(0, height, 16):
            for x in range(0, width, 16):
                found.append((count, None if large is None else large[y : y + 16, x : x + 16]))
    return found


def check_tokens(task, episodes, dataset):
    """What is stored decodes to what was logged: to half a bin per dimension, and exactly where it is discrete."""
    tokenizer, layout = TimestepTokenizer(task, DISJOINT), layout_of(task)
    rows = dataset.rows(0, held_out=False)
    for n, episode in enumerate(episodes):
        own = [int(row) for row in rows if dataset.column("episode")[row] == n]
        tokens = np.concatenate([dataset.tokens(row) for row in own])
        seen = tokenizer.decode_observation(tokens[:, : -layout.action])
        for spec in task.observation:
            if spec.kind == "discrete":
                assert (seen[spec.key] == episode.observation[spec.key]).all()
            elif spec.kind == "continuous":
                y = continuous.compand(episode.observation[spec.key], DISJOINT).clip(-1, 1)  # beyond it: clipped
                assert np.abs(continuous.compand(seen[spec.key], DISJOINT) - y).max() <= 1 / 1024 + 1e-9
        actions = tokenizer.decode_action(tokens[:, -layout.action :])
        if task.action.kind == "discrete":
            assert actions.shape == episode.action.shape and (actions == episode.action).all()
        else:
            half = (np.array(task.action.high) - np.array(task.action.low)) / 2048
            assert (np.abs(actions - episode.action) <= half + 1e-4 * np.abs(episode.action) + 1e-9).all()
        if layout.patches:
            stored = np.concatenate([dataset.patches(row) for row in own])
            for t in range(episode.timesteps):
                images = [spec for spec in ordered_fields(task) if spec.kind == "image"]
                wanted = [p for spec in images for p in slow_pictures(spec, episode.observation[spec.key][t])]
                found = slow_patches(layout, stored[t])
                assert [patch.shape[2] for patch in found] == [count for count, _ in wanted]
                for patch, (_, pixels) in zip(found, wanted):
                    assert pixels is None or (patch == pixels).all()


@settings(
    max_examples=25,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],  # each example builds two datasets: smaller ones are not worth the wait
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(first=tasks("first"), second=tasks("second"), seed=st.integers(0, 2**32), length=st.integers(20, 300))
def test_random_spaces_from_episode_to_batch(first, second, seed, length, tmp_path_factory, monkeypatch):
    rng, folders = np.random.default_rng(seed), []
    for task in (first, second):
        folders.append(tmp_path_factory.mktemp(task.name) / "data")
        episodes = [episode_of(task, int(rng.integers(1, 9)), rng, n) for n in range(4)]
        for episode in episodes:
            episode.check(task)
        dataset = build(folders[-1], task, episodes, monkeypatch, piece_timesteps=3, shard_megabytes=0.01)
        verify(folders[-1], full=True)
        check_tokens(task, episodes, dataset)
        for trajectory, episode in zip(trajectories(dataset, 0), episodes, strict=True):
            raw = continuous_values(task, episode.observation)
            assert (trajectory.observation is None) == (raw is None)
            assert raw is None or (trajectory.observation == raw).all()
            exact = trajectory.action == episode.action
            assert exact.all()
    stream = Stream(folders, StreamConfig(sequence_length=length), seed=3)
    for start in (0, 5):
        check_batch(stream, stream.batch(start, 5))


def test_cameras_of_other_sizes_and_channels_share_a_timestep(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    episodes = [episode_of(ROBOT, T, rng, n) for n, T in enumerate((7, 4))]
    dataset = build(tmp_path / "robot", ROBOT, episodes, monkeypatch, piece_timesteps=5)
    (layout,) = dataset.layouts
    # depth: RGB and one channel of 48 x 32; front 48 x 64 RGB; stacked 32 x 32; wrist 32 x 64, all by key
    shapes = [(p.rows, p.columns, p.channels) for p in layout.pictures]
    assert shapes == [(3, 2, 3), (3, 2, 1), (3, 4, 3), (2, 2, 1), (2, 4, 1)]
    assert layout.length == (6 + 6 + 12 + 4 + 8) + 2 + 1 + 2
    check_tokens(ROBOT, episodes, dataset)
    newest = slow_patches(layout, dataset.patches(0)[2])[24]
    assert (newest[..., 0] == episodes[0].observation["stacked"][2, :16, :16, 3]).all()
    # each picture's positions fill the 128 bins by themselves (appendix C.3)
    for first, stop, picture in zip((0, 6, 12, 24, 28), (6, 12, 24, 28, 36), layout.pictures):
        own = layout.patch_intervals[first:stop]
        assert own.min() == 0 and own[:, 0].max() == own[:, 1].max() == 128
        assert len(np.unique(own[:, 0, 0])) == picture.rows and len(np.unique(own[:, 1, 0])) == picture.columns


def test_every_picture_and_bound_is_inspected(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    dials = TaskSpec(
        "dials", "memory", (FieldSpec("x", "discrete", (2,), (2, 4), (0, 9)),), ActionSpec.discrete((3, 7))
    )
    for task in (ROBOT, dials):
        dataset = build(tmp_path / task.name, task, [episode_of(task, 9, rng, n) for n in range(3)], monkeypatch)
        for ending in ("html", "png"):
            output = tmp_path / f"{task.name}.{ending}"
            assert inspect(Options(str(tmp_path / task.name), output=output), Console(quiet=True)) == output
        view = TaskView(dataset, 0, None)
        view.survey()
        assert view.verdict[0], view.verdict
    page = (tmp_path / "robot.html").read_text()
    assert page.count("<text ") == page.count("<rect ") == 36  # a number and a frame per patch
    assert "2 continuous in [-2, 2], [0, 0.5]" in page
    assert "stacked: image 20x20x4 brought to 32x32 pixels (pad), the newest of 4 frames" in page
    view = TaskView(Dataset(tmp_path / "robot"), 0, None)
    (picture,) = [view.timestep(0, 4).picture]
    assert picture.shape == (48, 32 + 4 + 32 + 4 + 64 + 4 + 32 + 4 + 64, 3)
    wrist = Dataset(tmp_path / "robot").layouts[0].split_patches(Dataset(tmp_path / "robot").patches(0))[4][4]
    assert (picture[:16, -64:-48] == wrist[0]).all() and (picture[16:32, -16:] == wrist[7]).all()
    page = (tmp_path / "dials.html").read_text()
    assert "2 discrete, 3, 7 choices" in page and "x[1]" in page
    spans = [d.span(DISJOINT) for d in view_of(tmp_path / "dials").dimensions]
    assert [span[0] for span in spans] == [0, 9, 0, 0] and [span[1] for span in spans] == [1, 12, 2, 6]


def view_of(folder):
    view = TaskView(Dataset(folder), 0, None)
    view.survey()
    return view


def test_filtered_depth_is_resized_beside_its_colours(tmp_path, monkeypatch):
    (spec,) = (field for field in CAMERAS if field.key == "depth")
    frames = values_of(spec, 2, np.random.default_rng(0))
    task = TaskSpec("depth", "memory", (spec,), ActionSpec.discrete(2))
    pixels = TimestepTokenizer(task, DISJOINT).encode_observation({"depth": frames}).patches
    rgb, depth = layout_of(task).split_patches(pixels)
    for patches, channels in ((rgb, slice(3)), (depth, 3)):
        for t in range(2):
            wanted = np.asarray(Image.fromarray(frames[t, ..., channels]).resize((32, 48), Image.Resampling.BILINEAR))
            ours = patches[t].reshape(3, 2, 16, 16, -1).transpose(0, 2, 1, 3, 4).reshape(48, 32, -1)
            assert (
                np.abs(ours.squeeze().astype(int) - wanted.astype(int)).mean() < 16
            )  # another filter, the same picture


def test_values_are_checked_per_dimension():
    fields = (FieldSpec("pair", "discrete", (2,), (3, 7), (1, 0)),)
    task = TaskSpec("t", "memory", fields, ActionSpec.continuous((-1, 0), (1, 1000)))
    episode = episode_of(task, 5, np.random.default_rng(0))
    episode.check(task)
    episode.observation["pair"][2, 0] = 4
    with pytest.raises(EpisodeError, match=r"'pair' span \[\d, 4\] in dimension 0, allowed are \[1, 3\]"):
        episode.check(task)
    with pytest.raises(ValueError, match="outside"):
        TimestepTokenizer(task, DISJOINT).encode_observation(episode.observation)
    episode.observation["pair"][2, 0] = 1
    episode.action[3, 0] = 160  # within the second dimension's reach, not the first's
    with pytest.raises(EpisodeError, match=r"lies 160 from the middle of \[-1, 1\] in dimension 0"):
        episode.check(task)


def test_actions_are_clipped_and_counted_per_dimension():
    task = TaskSpec("t", "memory", (FieldSpec("x", "continuous", ()),), ActionSpec.continuous((-1, 0), (1, 100)))
    tokens, outside = TimestepTokenizer(task, DISJOINT).encode_action(
        np.array([[1.5, 1.5], [0.5, -3.0], [-1.0, 100.0]])
    )
    assert outside == 2
    first = DISJOINT.action_continuous.start
    assert (tokens - first).tolist() == [[1023, 15], [768, 0], [0, 1023]]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: ActionSpec.continuous((0, 1), (1, 1)), r"dimension 1 spans \[1, 1\]"),
        (lambda: ActionSpec.continuous(-np.inf, 1.0), "finite"),
        (lambda: ActionSpec.discrete((3, 0)), "0 choices"),
        (lambda: ActionSpec("discrete", 2, choices=(3,)), "2 discrete dimensions"),
        (lambda: ActionSpec("continuous", 1, (0.0,), (1.0,), (3,)), "1 continuous dimensions"),
        (lambda: FieldSpec("k", "discrete", (3,), (1, 2)), "2 numbers in .choices. for 3 values"),
        (lambda: FieldSpec("k", "image", (8, 8)), r"image of shape \(8, 8\)"),
        (lambda: FieldSpec("k", "image", (8, 8, 4), stack=3), "4 channels cannot be 3 stacked frames"),
        (lambda: FieldSpec("k", "image", (40, 8, 1), resized=(32, 16), fit="pad"), "cannot be padded"),
        (lambda: FieldSpec("k", "continuous", (8,), stack=2), "belong to images"),
        (lambda: FieldSpec("k", "continuous", (8,), (2,)), "belong to discrete fields"),
    ],
)
def test_specs_that_make_no_sense_cannot_be_made(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_more_choices_than_ids_are_refused():
    task = TaskSpec("t", "memory", (FieldSpec("k", "discrete", (), (1025,)),), ActionSpec.discrete(2))
    with pytest.raises(ValueError, match="observation 'k' has 1025 choices, there are ids for 1024"):
        TimestepTokenizer(task, DISJOINT)
