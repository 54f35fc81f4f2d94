"""Two cameras of different sizes and an instruction, by the commands: log, shards, training, play."""

import html

import numpy as np
import pytest

from schemas.layout import layout_of
from shards.reader import Dataset
from shards.verify import verify
from tests.conftest import run
from tests.simulators.test_own_environment import PATH
from tests.trainer.launch import losses, train
from trainer.model.export import load_export


@pytest.mark.process
def test_two_cameras_from_the_log_to_play(tmp_path):
    log, shards = tmp_path / "logs", tmp_path / "shards"
    run("etl.record", "-e", "reach:Cameras-v0", "--policy", "reach:presser", "--steps", "60", "-o", log, env=PATH)
    run("etl.build", "--source", "minari", "--input", log, "--output", shards, "--text-tokens", "4", env=PATH)
    dataset = verify(shards, full=True)
    task = dataset.manifest.tasks[0].spec
    layout = layout_of(task)
    cameras = {spec.key: spec for spec in task.observation if spec.kind == "image"}
    assert {key: spec.shape for key, spec in cameras.items()} == {
        "camera/left": (20, 30, 3),
        "camera/wrist": (12, 9, 1),
    }
    assert layout.patches == 2 + 1 and [picture.channels for picture in layout.pictures] == [3, 1]
    left, wrist = layout.split_patches(dataset.patches(0))
    assert len(np.unique(left[:, 0, 0, 0, 0])) > 6 and len(np.unique(wrist[0])) > 20  # its own pixels in each
    run("etl.inspect", shards, "-o", tmp_path / "page.html")
    page = html.unescape((tmp_path / "page.html").read_text())
    assert "<dt>cameras</dt><dd>camera/left: image 20x30x3 brought to" in page
    assert "camera/wrist: image 12x9x1 brought to" in page and "'turn' (5)" in page
    assert "<dt>lengths</dt><dd>min 12, median 12, max 12 timesteps</dd>" in page
    train(tmp_path / "run", [shards], steps=4)
    assert len(losses(tmp_path / "run")) == 4 and np.isfinite(losses(tmp_path / "run")).all()
    assert load_export(tmp_path / "run" / "export")[1].tasks == (task,)
    models = ("--gato", tmp_path / "run" / "export", "--models", "random", "gato")
    play = run("eval.compare", *models, "--datasets", shards, "--episodes", "2", "-o", tmp_path / "out", env=PATH)
    assert "failed" not in play.stdout, play.stdout
    line = next(line for line in play.stdout.splitlines() if line.startswith("| cameras-presser"))
    assert all(12 <= float(cell.split()[0]) <= 36 for cell in line.split("|")[-4:-2])  # 12 steps of 1 to 3 each
    assert Dataset(shards).manifest.fingerprint == dataset.manifest.fingerprint
