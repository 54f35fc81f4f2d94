"""Every source: the same bytes with one worker and with three, and in whatever order its files are found.

logs that the tests of the sources write -> build -> all files of the dataset
    -> files named last first, three workers that take shards as they come -> equal
"""

import io
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from etl import sources
from etl.build import Console, Options, beam_flags, build
from etl.building.plan import BuildConfig
from tests.etl import test_sources_atari as atari
from tests.etl import test_sources_hdf5 as hdf5
from tests.etl import test_sources_imagetext as imagetext
from tests.etl import test_sources_jat as jat
from tests.etl import test_sources_maniskill as maniskill
from tests.etl import test_sources_minari as minari
from tests.etl import test_sources_rl_unplugged as rl_unplugged
from tests.etl import test_sources_robomimic as robomimic
from tests.etl import test_sources_vintix as vintix
from tests.etl.logkit import contents
from tests.etl.test_build import d4rl_file
from tests.etl.test_sources_d3rlpy import GOLDEN, v1

FIXTURES = Path(__file__).parents[1] / "fixtures"
THREE = ["--direct_running_mode=multi_threading", "--direct_num_workers=3"]

pytestmark = [pytest.mark.process, pytest.mark.filterwarnings("ignore::UserWarning:minari")]


def unpacked(name, member):
    def write(folder):
        with tarfile.open(FIXTURES / f"{name}.tar.xz") as archive:
            archive.extractall(folder.parent / "written", filter="data")
        shutil.copytree(folder.parent / "written" / member, folder / member)

    return write


def two(write, *suffix):
    """Two logs by one writer, in files or folders of their own."""

    def twice(folder):
        for name in ("first", "second"):
            write(folder / "".join((name, *suffix)))

    return twice


def write_d3rlpy(folder):
    v1(folder / "one.h5")
    v1(folder / "two.h5", closed=False)
    shutil.copy(GOLDEN / "d3rlpy-continuous.h5", folder)


def write_npz(folder):
    for seed in range(5):
        np.savez_compressed(folder / f"{seed}.npz", **hdf5.dreamer(T=5 + seed, seed=seed))


def write_jat(folder):
    for kind in jat.KINDS:
        shutil.copytree(jat.GOLDEN / kind, folder / kind)


def write_rl_unplugged(folder):
    rl_unplugged.atari(folder, mixed=True)
    for part in range(3):
        made = [rl_unplugged.control(10 * part + seed, 4 + seed)[1] for seed in range(3)]
        rl_unplugged.store(folder / "walker_walk" / f"train-0000{part}-of-00003", made)


def write_minari(form):
    def write(folder):
        for name, space in (("a", minari.spaces.Box(-1, 1, (3,))), ("b", minari.spaces.Box(0, 255, (16, 16, 3), "u1"))):
            made = minari.write(space, dataset=f"own/{name}-v0", data_format=form).parents[1]
            shutil.move(made, folder / "own" / made.name)

    return write


def write_text(folder):
    for name in ("one", "two"):
        (folder / f"{name}.jsonl").write_text("".join(f'{{"text": "{name} line {n}"}}\n' for n in range(40)))


WRITERS = {
    "atari": lambda folder: [
        atari.write(folder / game / "1", seed=n) for n, game in enumerate(("Pong", "SpaceInvaders"))
    ],
    "d3rlpy": write_d3rlpy,
    "d4rl": lambda folder: [d4rl_file(folder / f"{name}-medium-v4.hdf5") for name in "ab"],
    "hdf5": lambda folder: hdf5.aloha(folder, episodes=5),
    "hdf5-npz": write_npz,
    "imagetext": lambda folder: imagetext.tars(folder, count=24, each=5),
    "jat": write_jat,
    "lerobot-v21": unpacked("lerobot", "v21"),
    "lerobot-v30": unpacked("lerobot", "v30"),
    "maniskill": two(maniskill.trajectories),
    "minari": write_minari("hdf5"),
    "minari-arrow": write_minari("arrow"),
    "minari-parquet": write_minari("parquet"),
    "rl_unplugged": write_rl_unplugged,
    "rlds": unpacked("rlds", "two_cameras"),
    "robomimic": two(robomimic.demos, ".hdf5"),
    "text": write_text,
    "vintix": two(vintix.trajectories),
}


def built(kind, place, output, flags=(), megabytes=0.02):
    options = Options(
        kind.split("-")[0],
        str(place),
        str(output),
        config=BuildConfig(shard_megabytes=megabytes, held_out_share=0.3),
        max_rejected_share=1.0,
    )
    build(options, beam_flags(list(flags), 1), Console(file=io.StringIO()))
    return contents(output)


def test_every_source_is_here():
    missing = set(sources.names()) - {kind.split("-")[0] for kind in WRITERS}
    assert missing == {"babyai"}  # which reads with minari's reader, and draws


@pytest.mark.parametrize("kind", WRITERS)
def test_bytes_do_not_depend_on_workers_or_the_order_of_files(kind, tmp_path, monkeypatch):
    place = tmp_path / "logs"
    place.mkdir()
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    WRITERS[kind](place)
    wanted = built(kind, place, tmp_path / "one/dataset")
    assert sum(name.endswith(".tar") for name in wanted) > 2
    source = type(sources.load(kind.split("-")[0]))
    own = source.resolve
    monkeypatch.setattr(source, "resolve", lambda self, *given: own(self, *given)[::-1])
    assert built(kind, place, tmp_path / "reversed/dataset", THREE) == wanted
