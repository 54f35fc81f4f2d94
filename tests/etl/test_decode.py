"""Tokens decode back to the log: every field of every source, through the real build.

log, written here -> build -> shards -> decoded, piece by piece -> beside the log, as its own format's reader gives it

Continuous values agree within half a bin, in the units in which bins are uniform; beyond the range they are the
outermost bin's centre, and counted. All else is equal. A control decodes the tokens' neighbours: then nothing agrees.
"""

import gzip
import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import minari
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from gymnasium import spaces
from rich.console import Console

from etl import sources
from etl.build import Options, beam_flags, build
from etl.building.plan import BuildConfig
from etl.record import Options as RecordOptions
from etl.record import record
from etl.tokenizers import image
from etl.tokenizers.text import TextTokenizer
from etl.tokenizers.timestep import TimestepTokenizer
from schemas.layout import PATCH_SIZE
from shards.reader import Dataset
from simulators.suites import minigrid as gridworld
from tests.etl.test_sources_atari import write as write_atari
from tests.etl.test_sources_d4rl import write as write_d4rl
from tests.etl.test_sources_minari import write as write_minari

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:minari", "ignore::DeprecationWarning:gymnasium")
HALF_BIN = 1 / 1024  # of 1024 bins over [-1, 1]
EXACT, ROUNDED = 1e-9, 1e-7  # what arithmetic may add, what rounding to float32 may
PIECE = 7  # timesteps: most episodes are stored in several pieces
SENTENCES = ["go to the red ball", "naïve 漢字 🦊", "3.14159 ≠ x", "pick up the very old key"]


@dataclass
class Episode:
    """An episode as its log has it: pictures as the model should see them, documents as the field 'text'."""

    observation: dict[str, np.ndarray]
    action: np.ndarray | None = None
    reward: np.ndarray | None = None


@dataclass
class Log:
    """`episodes`: (file's last name, position) -> what was logged."""

    source: str
    place: Path
    episodes: dict[tuple, Episode]
    scan: Any = None
    counted: set[str] = field(default_factory=set)  # what its values make the build count


def compand(x):
    """The paper's appendix B, in float64."""
    x = np.asarray(x, np.float64)
    return np.sign(x) * np.log(np.abs(x) * 100 + 1) / np.log(256 * 100 + 1)


def wide_values(rng, shape):
    """float32 of all magnitudes, zeros, the edges of all bins, the range's ends and what lies beyond."""
    edges = np.arange(1025) / 512 - 1
    edges = np.sign(edges) * np.expm1(np.abs(edges) * np.log(25601)) / 100
    special = [0.0, -0.0, 256, -256, 1e-30, -1e-30, 300, -300, 257, -1e4, 1e30, -3e38, *edges]
    values = rng.choice([-1, 1], np.prod(shape)) * 10 ** rng.uniform(-6, np.log10(255), np.prod(shape))
    few = min(len(special), len(values) // 2)
    values[rng.permutation(len(values))[:few]] = special[:few]
    return values.astype(np.float32).reshape(shape)


def actions_of(rng, shape, low, high):
    """float32 of the whole range, bin edges, both ends, and an overshoot here and there."""
    values = rng.uniform(low, high, np.prod(shape))
    edges = low + (high - low) * np.arange(0, 1025, 16) / 1024
    some = rng.permutation(len(values))[: len(edges) + 4]
    values[some] = [*edges, high + 1e-4, low - 1e-4, high + (high - low), low - (high - low)]
    return values.astype(np.float32).reshape(shape)


def d4rl(folder):
    """A maze's log with its goal, a plain one of float64, both of three episodes."""
    rng, rows, ends = np.random.default_rng(0), 600, (249, 499, 599)
    goal, wide = wide_values(rng, (rows, 2)), wide_values(rng, (rows, 4))
    moves = actions_of(rng, (rows, 2), -1, 1)
    maze = write_d4rl(folder / "maze.hdf5", rows, ends, observations=wide, actions=moves, **{"infos/goal": goal})
    exact = rng.normal(size=(rows, 5)) * [1e-3, 0.1, 1, 10, 50]
    plain = write_d4rl(folder / "plain.hdf5", rows, ends, observations=exact, actions=moves[::-1])
    episodes = {}
    for path in (maze, plain):
        with h5py.File(path) as file:
            for n, (start, stop) in enumerate([(0, 250), (250, 500), (500, 600)]):
                observation = {"observation": file["observations"][start:stop]}
                if "infos" in file:
                    observation["goal"] = file["infos/goal"][start:stop]
                action, reward = file["actions"][start:stop], file["rewards"][start:stop]
                episodes[path.name, n] = Episode(observation, action, reward)
    return Log("d4rl", folder, episodes, counted={"clipped", "outside"})


def read_minari(place, pick):
    """As Minari reads it. `pick`: one of its observations, number of timesteps -> {key: array}."""
    return {
        ("main_data.hdf5", int(own.id)): Episode(pick(own.observations, len(own)), own.actions, own.rewards)
        for own in minari.MinariDataset(place / "data").iterate_episodes()
    }


def minari_log(folder, space, action, wide, pick, **how):
    """Samples of the spaces, written by Minari; float arrays `wide` get wide values, float actions their edges."""
    rng = np.random.default_rng(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(folder))
        path = write_minari(space, action, "own-v0", steps=90, **how)
    with h5py.File(path, "a") as file:
        for group in file.values():
            group[wide][...] = wide_values(rng, group[wide].shape)
            if isinstance(action, spaces.Box):
                low, high = float(action.low.min()), float(action.high.max())
                group["actions"][...] = actions_of(rng, group["actions"].shape, low, high)
    return read_minari(folder / "own-v0", pick)


def minari_nested(folder):
    """Every kind of field, in dicts and tuples; an action range that is not symmetric."""
    pair = (spaces.MultiDiscrete([3, 7], start=[1, 0]), spaces.Box(5, 9, (2,), np.int16))
    body = {"place": spaces.Box(-np.inf, np.inf, (2, 3), np.float32), "speed": spaces.Box(-9, 9, (4,), np.float64)}
    space = {
        "body": spaces.Dict(body),
        "camera": spaces.Box(0, 255, (50, 40, 3), np.uint8),
        "flags": spaces.MultiBinary(3),
        "pair": spaces.Tuple(pair),
        "room": spaces.Discrete(5, start=-2),
        "words": spaces.Text(30),
    }

    def pick(own, T):
        found = {key: own[key][:T] for key in ("flags", "room")}
        found |= {f"body/{key}": values[:T] for key, values in own["body"].items()}
        found |= {f"pair/{n}": values[:T] for n, values in enumerate(own["pair"])}
        return found | {"camera": image.bilinear(own["camera"][:T], (48, 48)), "words": np.array(own["words"][:T])}

    action = spaces.Box(-2.0, 0.5, (3,), np.float32)
    episodes = minari_log(folder, spaces.Dict(space), action, "observations/body/place", pick)
    counted = {"clipped", "outside", "cut"}
    return Log("minari", folder, episodes, counted=counted)


def minari_discrete(folder):
    """Actions of two numbers that begin at 2 and 1, a grey picture that needs no resizing."""
    space = spaces.Tuple((spaces.Box(0, 255, (32, 48, 1), np.uint8), spaces.Box(-9, 9, (3,), np.float32)))
    action = spaces.MultiDiscrete([4, 9], start=[2, 1])

    def pick(own, T):
        return {str(n): values[:T] for n, values in enumerate(own)}

    episodes = minari_log(folder, space, action, "observations/_index_1", pick, jpeg_encoding=False)
    return Log("minari", folder, episodes, counted={"clipped"})


def babyai(folder):
    """The bot's own play, recorded."""
    options = RecordOptions("BabyAI-UnlockPickup-v0", steps=60, output=folder)
    place = record(options, Console(file=io.StringIO())).path

    def pick(own, T):
        pictures = np.pad(gridworld.draw(own["image"][:T]), ((0, 0), (0, 8), (0, 8), (0, 0)))
        return {"mission": np.array(own["mission"][:T]), "image": pictures, "direction": own["direction"][:T]}

    return Log(
        "babyai", folder, read_minari(place, pick), sources.load("babyai").options(text_tokens=4), counted={"cut"}
    )


def atari(folder, fit="80x64", channels=1):
    replay = folder / "Pong" / "1" / "replay_logs"
    lengths = (20, 33, 9)
    rows = sum(lengths) + 3 * 3 + 1
    colours = np.random.default_rng(3).integers(1, 255, (rows, 84, 84, 3), np.uint8)
    write_atari(replay, lengths, last_ends=True, **({"observation": colours} if channels == 3 else {}))
    arrays = {}
    for name in ("observation", "action", "reward"):
        with gzip.open(replay / f"$store$_{name}_ckpt.0.gz") as file:
            arrays[name] = np.load(file)
    episodes, start = {}, 0
    for number, length in enumerate(lengths):
        padding = 3 if channels == 1 else 0  # where its rows are not zero, they belong to the episode
        part = {name: array[start + padding : start + 3 + length] for name, array in arrays.items()}
        start += 3 + length
        frames = part["observation"].reshape(-1, 84, 84, channels)
        seen = np.zeros((len(frames), 96, 96, channels), np.uint8)
        seen[:, :84, :84] = frames
        seen = seen if fit == "padded" else image.bilinear(frames, (64, 80))
        key = "$store$_action_ckpt.0.gz", number
        episodes[key] = Episode({"frame": seen}, part["action"], part["reward"])
    return Log("atari", folder, episodes, sources.load("atari").options(frames=fit))


def documents(folder):
    texts = [f"Document {n}: {'word ' * (n * 40)}of {SENTENCES[n % 4]} end {n}." for n in range(12)]
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    pa.parquet.write_table(pa.table({"text": texts[::-1]}), folder / "b.parquet", row_group_size=5)
    (folder / "c.txt").write_text("\n\n".join(texts[3:]))
    files = {"a.jsonl": texts, "b.parquet": texts[::-1], "c.txt": texts[3:]}
    episodes = {
        (name, n): Episode({"text": np.array([text])}) for name, own in files.items() for n, text in enumerate(own)
    }
    return Log("text", folder, episodes)


CASES = {
    "d4rl": d4rl,
    "minari nested": minari_nested,
    "minari discrete": minari_discrete,
    "atari resized": atari,
    "atari padded": lambda folder: atari(folder, "padded"),
    "atari RGB": lambda folder: atari(folder, channels=3),
    "babyai": babyai,
    "text": documents,
}


def frames_of(patches, layout):
    """Patches laid side by side one by one, in reading order."""
    side, (picture,) = PATCH_SIZE, layout.pictures
    out = np.zeros((len(patches), picture.rows * side, picture.columns * side, layout.channels), np.uint8)
    for n in range(layout.patches):
        top, left = (place * side for place in divmod(n, picture.columns))
        out[:, top : top + side, left : left + side] = patches[:, n]
    return out


def decoded(dataset, neighbour=False):
    """(file's last name, position) -> task and arrays, from the shards alone. `neighbour`: of the tokens beside the
    stored ones, in the same ranges."""
    vocabulary = dataset.manifest.vocabulary
    model = dataset.manifest.text_model
    text = TextTokenizer(dataset.local(model.file), vocabulary) if model else None
    other = np.uint16(1 if neighbour else 0)
    found = {}
    order = np.lexsort([dataset.column(name) for name in ("start", "episode", "task")])
    for row in map(int, order):
        task = dataset.manifest.tasks[dataset.column("task")[row]].spec
        layout, tokens = dataset.layouts[dataset.column("task")[row]], dataset.tokens(row) ^ other
        key = dataset.column("file")[row].split("/")[-1], int(dataset.column("position")[row])
        _, piece = found.setdefault(key, (task, {}))
        if task.action is None:
            piece.setdefault("tokens", []).append(tokens[:, 0])
            continue
        tokenizer = TimestepTokenizer(task, vocabulary, text)
        arrays = tokenizer.decode_observation(tokens[:, : -layout.action])
        arrays["action"] = tokenizer.decode_action(tokens[:, -layout.action :])
        arrays["reward"] = dataset.reward(row)
        if layout.patches:
            (picture,) = (spec.key for spec in task.observation if spec.kind == "image")
            arrays[picture] = frames_of(dataset.patches(row) ^ np.uint8(other), layout)
        for name, array in arrays.items():
            piece.setdefault(name, []).append(array)
    for _, piece in found.values():
        for name in list(piece):
            piece[name] = np.concatenate(piece[name])
        if "tokens" in piece:  # without the end-of-text piece
            piece["text"] = np.array([text.decode(piece.pop("tokens")[:-1])])
    return found


def agrees(raw, back, slack):
    """Both in the units of bins. Whether each value lies within half a bin, and how many lay beyond the range."""
    inside = np.abs(raw) <= 1
    outermost = np.sign(raw) * (1 - HALF_BIN)
    distance = np.abs(np.where(inside, raw, outermost) - back)
    allowed = np.where(inside, HALF_BIN, 0) + slack
    return bool((distance <= allowed).all()), int(np.count_nonzero(~inside))


def compare(log, dataset, found):
    """(file, position, field) of all fields that differ from the log; how many there are; counts by task."""
    differ, fields, counts = [], 0, {}
    for key, own in log.episodes.items():
        task, back = found[key]
        kinds = {spec.key: spec.kind for spec in task.observation}
        count = counts.setdefault(task.name, {"clipped": 0, "outside": 0, "cut": 0})
        logged = dict(own.observation)
        assert set(logged) == set(kinds)
        if task.action:
            logged |= {"action": own.action, "reward": own.reward.astype(np.float32)}
            kinds |= {"action": task.action.kind, "reward": "exact"}
        assert set(back) == set(logged)
        for name, raw in logged.items():
            value, kind = back[name], kinds[name]
            assert value.shape == raw.shape, (key, name)
            if kind == "continuous" and name == "action":
                low, high = np.array(task.action.low), np.array(task.action.high)
                raw, value = (2 * (a.astype(np.float64) - low) / (high - low) - 1 for a in (raw, value))
                same, beyond = agrees(raw, value, ROUNDED)  # decoded to float32
                count["outside"] += beyond
            elif kind == "continuous":
                same, beyond = agrees(compand(raw), compand(value), EXACT if raw.dtype == np.float32 else ROUNDED)
                count["clipped"] += beyond
            elif kind == "text" and task.action:
                short = value != raw
                same = all(line and whole.startswith(line) for line, whole in zip(value[short], raw[short]))
                count["cut"] += int(short.sum())
            else:
                same = np.array_equal(value, raw)
            fields += 1
            if not same:
                differ.append((*key, name))
    return differ, fields, counts


@pytest.fixture(scope="module", params=CASES)
def log(request, tmp_path_factory):
    return CASES[request.param](tmp_path_factory.mktemp("log"))


@pytest.fixture(scope="module", params=["seed", "paper"])
def dataset(request, log, tmp_path_factory):
    folder = tmp_path_factory.mktemp("built") / "d"
    config = BuildConfig(vocabulary=request.param, shard_megabytes=0.1, piece_timesteps=PIECE)
    options = Options(log.source, str(log.place), str(folder), scan=log.scan, config=config)
    build(options, beam_flags([], 1), Console(file=io.StringIO()))
    return Dataset(folder)


def test_tokens_decode_to_the_log(log, dataset):
    found = decoded(dataset)
    assert set(found) == set(log.episodes) and dataset.manifest.rejected.rows == 0
    assert dataset.shards.num_rows > 1 or dataset.manifest.tasks[0].spec.action is None
    assert dataset.index.num_rows > len(found)  # pieces
    differ, _, counts = compare(log, dataset, found)
    assert differ == []
    for task in dataset.manifest.tasks:
        own = {"clipped": task.clipped_observations, "outside": task.out_of_range_actions, "cut": task.cut_texts}
        assert counts[task.spec.name] == own
    assert {name for count in counts.values() for name, n in count.items() if n} == log.counted


def test_the_neighbours_of_the_tokens_do_not(log, dataset):
    """The control: were every token one beside the right one, every field of every episode would be found out."""
    differ, fields, _ = compare(log, dataset, decoded(dataset, neighbour=True))
    rewards = sum(episode.reward is not None for episode in log.episodes.values())
    assert len(differ) == fields - rewards
