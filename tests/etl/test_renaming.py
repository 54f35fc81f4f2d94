"""--rename: every source's fields under other names, with the values that they had; a task that can be played by it."""

import io

import h5py
import numpy as np
import pytest

import simulators
from etl import sources
from etl.build import Console, Options, beam_flags, build, parsed
from etl.building.renaming import names_of, with_names
from etl.sources import SourceError
from eval.environments import _check_spaces
from schemas.episode import RawEpisode
from shards.reader import Dataset
from tests.etl.logkit import shards
from tests.etl.test_determinism import WRITERS

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:minari")


def scans(source, place, kind):
    return source.scan(source.resolve(place, None, place), source.options())


@pytest.mark.parametrize("kind", sorted(set(WRITERS) - {"text", "imagetext"}))
def test_values_of_every_source_keep_their_bytes(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    place = tmp_path / "logs"
    place.mkdir()
    WRITERS[kind](place)
    source = sources.load(kind.split("-")[0])
    for before in scans(source, place, kind)[:2]:
        keys = sorted(spec.key for spec in before.task.observation)
        gone = keys[1] if len(keys) > 1 else None
        renamed = with_names(source, [f"{keys[0]}=other", *([f"{gone}="] if gone else [])])
        after = next(scan for scan in scans(renamed, place, kind) if scan.task.name == before.task.name)
        assert after.episodes == before.episodes and after.task.action == before.task.action
        assert {spec.key for spec in after.task.observation} == {"other", *keys} - {keys[0], gone}
        pairs = zip(
            sources.read(source, before.task, before.episodes),
            sources.read(renamed, after.task, after.episodes),
            strict=True,
        )
        for old, new in pairs:
            assert isinstance(old, RawEpisode) and isinstance(new, RawEpisode)
            own = {key: values for key, values in old.observation.items() if key != gone}
            own["other"] = own.pop(keys[0])
            assert own.keys() == new.observation.keys()
            assert all(np.array_equal(new.observation[key], values) for key, values in own.items())
            assert np.array_equal(old.action, new.action) and old.terminated == new.terminated


def pendulum(path, key):
    rng = np.random.default_rng(0)
    for n in range(3):
        with h5py.File(path / f"episode_{n}.hdf5", "w") as file:
            file[f"observations/{key}"] = rng.normal(size=(20, 3))
            file["observations/temperature"] = np.full((20, 1), n, np.float32)
            file["action"] = rng.uniform(-2, 2, (20, 1))


def made(place, output, *flags):
    arguments = ["--source", "hdf5", "-i", str(place), "-o", str(output), "--environment", "Pendulum-v1", *flags]
    options, rest = parsed(arguments)
    said = io.StringIO()
    build(options, beam_flags(rest, 1), Console(file=said, width=1000))
    return said.getvalue()


def test_a_log_of_other_names_can_be_played(tmp_path):
    for name in ("qpos", "observation"):
        (tmp_path / name / "log").mkdir(parents=True)
        pendulum(tmp_path / name / "log", name)
    said = made(tmp_path / "qpos/log", tmp_path / "qpos/out")
    assert "cannot be played there: --rename qpos=observation temperature= makes them agree" in said
    (task,) = Dataset(tmp_path / "qpos/out").manifest.tasks
    environment = simulators.make(task.spec.environment)
    with pytest.raises(simulators.SimulatorError, match="--rename OLD=NEW"):
        _check_spaces(task.spec, environment)
    flags = ("--rename", "qpos=observation", "temperature=")
    said = made(tmp_path / "qpos/log", tmp_path / "qpos/out", *flags, "--overwrite")
    assert "played" not in said
    (task,) = Dataset(tmp_path / "qpos/out").manifest.tasks
    _check_spaces(task.spec, environment)
    environment.close()
    made(tmp_path / "observation/log", tmp_path / "observation/out", "--rename", "temperature=")
    assert shards(tmp_path / "qpos/out") == shards(tmp_path / "observation/out")
    assert "already built" in made(tmp_path / "qpos/log", tmp_path / "qpos/out", *flags)


@pytest.mark.parametrize("rename", [("a",), ("=b",), ("a=b", "a=c"), ("a=c", "b=c")])
def test_what_is_no_renaming(rename):
    with pytest.raises(ValueError, match="--rename"):
        names_of(rename)


@pytest.mark.parametrize(
    ("rename", "why"),
    [
        (("joints=observation",), "no observation field is called so; there are qpos, temperature"),
        (("qpos=temperature",), "two fields called 'temperature'"),
        (("qpos=", "temperature="), "would have no field"),
    ],
)
def test_what_does_not_fit_a_log_is_refused(tmp_path, rename, why):
    pendulum(tmp_path, "qpos")
    with pytest.raises(SourceError, match=why):
        made(tmp_path, tmp_path / "out", "--rename", *rename)


def test_documents_have_no_fields_to_rename(tmp_path):
    WRITERS["text"](tmp_path)
    options = Options("text", str(tmp_path), str(tmp_path / "out"))
    with pytest.raises(SourceError, match="not of a simulator"):
        with_names(sources.load(options.source), ["text=other"]).scan(
            sources.load("text").resolve(tmp_path, None, tmp_path), sources.load("text").options()
        )
